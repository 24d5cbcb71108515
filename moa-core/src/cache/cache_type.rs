use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::rounding::RowType;
use crate::{Dtype, Error};

/// How a KV head's cache holds keys and values. Weights and activations have a [`Dtype`]; every one of them is
/// a cache type too, and caches have narrower ones besides.
///
/// The narrow types keep a scale for every row, that is for every key and every value of a token, of
/// [`RowType::SCALE_BYTES`] bytes. How a row is rounded says [`RowType`].
///
/// ```
/// use moa_core::CacheType;
/// let bytes = |cache: CacheType| cache.slot_bytes(128);
/// assert_eq!((bytes(CacheType::F16), bytes(CacheType::Int8)), (512, 2 * (128 + 2)));
/// assert_eq!((bytes(CacheType::K8V4), bytes(CacheType::Int4)), (130 + 66, 2 * (64 + 2)));
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[non_exhaustive]
pub enum CacheType {
    /// [`Dtype::F32`].
    F32,
    /// [`Dtype::F16`].
    F16,
    /// [`Dtype::Bf16`].
    Bf16,
    /// Whole numbers of 8 bits, rotated.
    Int8,
    /// Floats of 8 bits (e4m3), not rotated.
    Fp8,
    /// Keys as in [`Int8`](Self::Int8), values as in [`Int4`](Self::Int4): keys need more bits than values.
    K8V4,
    /// Numbers of 4 bits, rotated.
    Int4,
}

impl CacheType {
    /// Every type that there is, the widest first.
    pub const ALL: [Self; 7] =
        [Self::F32, Self::F16, Self::Bf16, Self::Int8, Self::Fp8, Self::K8V4, Self::Int4];

    /// The type's name in files, flags and messages, such as `"int8"`.
    pub const fn name(self) -> &'static str {
        match self {
            Self::F32 => Dtype::F32.name(),
            Self::F16 => Dtype::F16.name(),
            Self::Bf16 => Dtype::Bf16.name(),
            Self::Int8 => "int8",
            Self::Fp8 => "fp8",
            Self::K8V4 => "k8v4",
            Self::Int4 => "int4",
        }
    }

    /// How the rows of keys are held.
    pub const fn keys(self) -> RowType {
        match self {
            Self::F32 => RowType::Plain(Dtype::F32),
            Self::F16 => RowType::Plain(Dtype::F16),
            Self::Bf16 => RowType::Plain(Dtype::Bf16),
            Self::Int8 | Self::K8V4 => RowType::Int8,
            Self::Fp8 => RowType::Fp8,
            Self::Int4 => RowType::Int4,
        }
    }

    /// How the rows of values are held.
    pub const fn values(self) -> RowType {
        match self {
            Self::K8V4 => RowType::Int4,
            other => other.keys(),
        }
    }

    /// The element type, if the cache holds nothing but elements of one.
    pub const fn dtype(self) -> Option<Dtype> {
        match self.keys() {
            RowType::Plain(dtype) => Some(dtype),
            _ => None,
        }
    }

    /// Bytes of one slot, key and value together, scales included.
    pub const fn slot_bytes(self, head_dim: usize) -> u64 {
        (self.keys().bytes(head_dim) + self.values().bytes(head_dim)) as u64
    }
}

impl From<Dtype> for CacheType {
    fn from(dtype: Dtype) -> Self {
        match dtype {
            Dtype::F32 => Self::F32,
            Dtype::F16 => Self::F16,
            Dtype::Bf16 => Self::Bf16,
        }
    }
}

impl fmt::Display for CacheType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

impl FromStr for CacheType {
    type Err = Error;

    /// Reads a [`name`](Self::name).
    ///
    /// # Errors
    /// [`Error::Invalid`] if no type has this name.
    fn from_str(name: &str) -> Result<Self, Error> {
        let found = Self::ALL.into_iter().find(|cache| cache.name() == name);
        found
            .ok_or_else(|| Error::invalid("cache type", Self::ALL.map(Self::name).join(", "), name))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_the_same_in_text_and_in_files() {
        for cache in CacheType::ALL {
            assert_eq!(cache.to_string().parse::<CacheType>().unwrap(), cache);
            assert_eq!(serde_json::to_value(cache).unwrap(), cache.name());
            assert_eq!(serde_json::from_value::<CacheType>(cache.name().into()).unwrap(), cache);
        }
        for dtype in Dtype::ALL {
            let cache = CacheType::from(dtype);
            assert_eq!((cache.name(), cache.dtype()), (dtype.name(), Some(dtype)));
            assert_eq!(cache.slot_bytes(80), dtype.slot_bytes(80));
        }
        assert!(matches!("e4m3".parse::<CacheType>(), Err(Error::Invalid { .. })));
    }

    #[test]
    fn slots_count_their_scales_and_odd_rows_a_whole_byte() {
        let bytes = |head_dim| CacheType::ALL.map(|cache| cache.slot_bytes(head_dim));
        assert_eq!(bytes(64), [512, 256, 256, 132, 132, 66 + 34, 68]);
        assert_eq!(bytes(5), [40, 20, 20, 14, 14, 7 + 5, 10]);
    }
}
