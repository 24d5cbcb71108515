use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::Error;

/// The element type of weights, activations or cached keys and values.
///
/// More types will come: a device says which of them it has by an error where one is asked for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[non_exhaustive]
pub enum Dtype {
    /// IEEE single precision, 4 bytes.
    #[default]
    F32,
    /// IEEE half precision, 2 bytes: 11 bits of precision, values up to 65504.
    F16,
    /// The upper half of an f32, 2 bytes: 8 bits of precision, the range of f32.
    Bf16,
}

impl Dtype {
    /// Every type that there is.
    pub const ALL: [Self; 3] = [Self::F32, Self::F16, Self::Bf16];

    /// The type's name in files, flags and messages, such as `"bf16"`.
    pub const fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::F16 => "f16",
            Self::Bf16 => "bf16",
        }
    }

    /// Bytes of one element.
    pub const fn bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::Bf16 => 2,
        }
    }

    /// Bytes of one cache slot, key and value together, where elements of this type are all that it
    /// holds. A backend whose slots hold more answers
    /// [`SparseAttentionBackend::slot_bytes`](crate::SparseAttentionBackend::slot_bytes) itself.
    pub const fn slot_bytes(self, head_dim: usize) -> u64 {
        2 * head_dim as u64 * self.bytes() as u64
    }
}

impl fmt::Display for Dtype {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

impl FromStr for Dtype {
    type Err = Error;

    /// Reads a [`name`](Self::name).
    ///
    /// # Errors
    /// [`Error::Invalid`] if no type has this name.
    fn from_str(name: &str) -> Result<Self, Error> {
        let found = Self::ALL.into_iter().find(|dtype| dtype.name() == name);
        found.ok_or_else(|| {
            Error::invalid("element type", Self::ALL.map(Self::name).join(", "), name)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_the_same_in_text_and_in_files() {
        for dtype in Dtype::ALL {
            assert_eq!(dtype.to_string().parse::<Dtype>().unwrap(), dtype);
            assert_eq!(serde_json::to_value(dtype).unwrap(), dtype.name());
            assert_eq!(serde_json::from_value::<Dtype>(dtype.name().into()).unwrap(), dtype);
        }
        assert!(
            matches!("e4m3".parse::<Dtype>(), Err(Error::Invalid { got, .. }) if got == "e4m3")
        );
    }
}
