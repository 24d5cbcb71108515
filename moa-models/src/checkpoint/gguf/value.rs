use std::fmt;

/// A metadata value. Numbers of every width are one kind each: a reader asks for a count, not for 32 bits.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Value {
    Unsigned(u64),
    Signed(i64),
    /// An f32 is kept as the number that its shortest decimal names, 1e-5 and not 9.99999974e-6.
    Float(f64),
    Flag(bool),
    Text(String),
    Texts(Vec<String>),
    Integers(Vec<i64>),
    Floats(Vec<f32>),
    /// An array that no reader here asks for, by its length: of flags or of arrays.
    Other(u64),
}

impl Value {
    pub(super) fn from_f32(value: f32) -> Self {
        Self::Float(value.to_string().parse().unwrap_or_else(|_| value.into()))
    }

    pub(super) fn as_unsigned(&self) -> Option<u64> {
        match *self {
            Self::Unsigned(n) => Some(n),
            Self::Signed(n) => n.try_into().ok(),
            _ => None,
        }
    }

    pub(super) fn as_number(&self) -> Option<f64> {
        match *self {
            Self::Unsigned(n) => Some(n as f64),
            Self::Signed(n) => Some(n as f64),
            Self::Float(x) => Some(x),
            _ => None,
        }
    }

    pub(super) fn as_flag(&self) -> Option<bool> {
        match *self {
            Self::Flag(flag) => Some(flag),
            _ => None,
        }
    }

    pub(super) fn as_text(&self) -> Option<&str> {
        match self {
            Self::Text(text) => Some(text),
            _ => None,
        }
    }
}

/// What the value is, for a message.
impl fmt::Display for Value {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unsigned(n) => write!(f, "{n}"),
            Self::Signed(n) => write!(f, "{n}"),
            Self::Float(x) => write!(f, "{x}"),
            Self::Flag(flag) => write!(f, "{flag}"),
            Self::Text(text) if text.chars().count() <= 40 => write!(f, "`{text}`"),
            Self::Text(text) => write!(f, "a text of {} bytes", text.len()),
            Self::Texts(texts) => write!(f, "{} texts", texts.len()),
            Self::Integers(values) => write!(f, "{} integers", values.len()),
            Self::Floats(values) => write!(f, "{} numbers", values.len()),
            Self::Other(len) => write!(f, "an array of {len} others"),
        }
    }
}
