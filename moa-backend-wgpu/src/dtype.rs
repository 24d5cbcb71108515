use std::fmt;

/// Element type of cached keys and values, and of weights. Every device has all of them: 16-bit elements are stored
/// in pairs, in words of 32 bits, and taken apart by integer arithmetic.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
pub enum Dtype {
    /// 4 bytes: numbers are kept as they come.
    #[default]
    F32,
    /// 2 bytes, 11 bits of precision, values up to 65504. Rows must be of even length.
    F16,
    /// 2 bytes, 8 bits of precision, the range of f32. Rows must be of even length.
    Bf16,
}

impl Dtype {
    /// Bytes of one element.
    pub const fn bytes(self) -> usize {
        4 / self.per_word()
    }

    /// Elements in a word of 32 bits.
    pub(crate) const fn per_word(self) -> usize {
        match self {
            Self::F32 => 1,
            Self::F16 | Self::Bf16 => 2,
        }
    }
}

impl fmt::Display for Dtype {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::F32 => "f32",
            Self::F16 => "f16",
            Self::Bf16 => "bf16",
        })
    }
}
