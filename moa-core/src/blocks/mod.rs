//! Weights in quantised blocks, as GGUF has them: the one description of their bytes that every backend is
//! tested against.

mod narrow;

pub(crate) use narrow::f32_to_f16;

use std::fmt;
use std::str::FromStr;

use crate::Error;

/// How weights are quantised: the layout of a block of a row's elements, by the name that GGUF has for it.
///
/// Every format has codes of at most 8 bits, a step for each 32 of them (each 16 in [`Q6K`](Self::Q6K)), and an
/// element is `step * code`, or `step * code + least`. A new type is a breaking change: backends match on all.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum BlockType {
    /// 32 elements of 4 bits and a step.
    Q4_0,
    /// 32 elements of 4 bits, a step and the least element.
    Q4_1,
    /// 32 elements of 5 bits and a step.
    Q5_0,
    /// 32 elements of 5 bits, a step and the least element.
    Q5_1,
    /// 32 elements of 8 bits and a step.
    Q8_0,
    /// 256 elements of 4 bits, steps and least elements of 6 bits for each 32.
    Q4K,
    /// 256 elements of 5 bits, steps and least elements of 6 bits for each 32.
    Q5K,
    /// 256 elements of 6 bits, steps of 8 bits for each 16.
    Q6K,
}

impl BlockType {
    /// Every type that there is.
    pub const ALL: [Self; 8] = [
        Self::Q4_0,
        Self::Q4_1,
        Self::Q5_0,
        Self::Q5_1,
        Self::Q8_0,
        Self::Q4K,
        Self::Q5K,
        Self::Q6K,
    ];

    /// The type's name in flags and messages, such as `"q4_k"`.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Q4_0 => "q4_0",
            Self::Q4_1 => "q4_1",
            Self::Q5_0 => "q5_0",
            Self::Q5_1 => "q5_1",
            Self::Q8_0 => "q8_0",
            Self::Q4K => "q4_k",
            Self::Q5K => "q5_k",
            Self::Q6K => "q6_k",
        }
    }

    /// Elements of a block.
    #[must_use]
    pub const fn block_len(self) -> usize {
        match self {
            Self::Q4K | Self::Q5K | Self::Q6K => 256,
            _ => 32,
        }
    }

    /// Bytes of a block.
    #[must_use]
    pub const fn block_bytes(self) -> usize {
        match self {
            Self::Q4_0 => 18,
            Self::Q4_1 => 20,
            Self::Q5_0 => 22,
            Self::Q5_1 => 24,
            Self::Q8_0 => 34,
            Self::Q4K => 144,
            Self::Q5K => 176,
            Self::Q6K => 210,
        }
    }

    /// Elements from `start` on as f32, as exact as the format: the numbers that the formats' reference
    /// implementation gives, bit for bit.
    ///
    /// # Panics
    /// If `blocks` has not so many elements.
    pub fn widen(self, blocks: &[u8], start: usize, to: &mut [f32]) {
        let (len, size) = (self.block_len(), self.block_bytes());
        let mut values = [0.0; 256];
        let (mut at, mut rest) = (start, to);
        while !rest.is_empty() {
            let block = at / len * size;
            self.decode(&blocks[block..block + size], &mut values);
            let from = at % len;
            let count = rest.len().min(len - from);
            let (own, others) = rest.split_at_mut(count);
            own.copy_from_slice(&values[from..from + count]);
            (at, rest) = (at + count, others);
        }
    }

    /// The elements of one block, first of all.
    fn decode(self, block: &[u8], to: &mut [f32; 256]) {
        let half = |at: usize| f16_to_f32(u16::from_le_bytes([block[at], block[at + 1]]));
        // Code `i` of the two in each of 16 bytes: the low halves come first.
        let nibble = |at: usize, i: usize| i32::from(block[at + i % 16] >> (i / 16 * 4) & 15);
        let fifth = |at: usize, i: usize| i32::from(block[at + i / 8] >> (i % 8) & 1) << 4;
        match self {
            Self::Q4_0 => (0..32).for_each(|i| to[i] = half(0) * (nibble(2, i) - 8) as f32),
            Self::Q4_1 => (0..32).for_each(|i| to[i] = half(0) * nibble(4, i) as f32 + half(2)),
            Self::Q5_0 => (0..32).for_each(|i| {
                to[i] = half(0) * ((nibble(6, i) | fifth(2, i)) - 16) as f32;
            }),
            Self::Q5_1 => (0..32).for_each(|i| {
                to[i] = half(0) * (nibble(8, i) | fifth(4, i)) as f32 + half(2);
            }),
            Self::Q8_0 => (0..32).for_each(|i| {
                to[i] = half(0) * f32::from(i8::from_le_bytes([block[2 + i]]));
            }),
            Self::Q4K | Self::Q5K => {
                // Of each pair of groups, the first has the low halves of 32 bytes.
                let low = if self == Self::Q4K { 16 } else { 48 };
                for (i, to) in to.iter_mut().enumerate() {
                    let (group, at) = (i / 32, i % 32);
                    let mut code = block[low + group / 2 * 32 + at] >> (group % 2 * 4) & 15;
                    if self == Self::Q5K {
                        code |= (block[16 + at] >> group & 1) << 4;
                    }
                    let [step, least] = six_bits(&block[4..16], group);
                    let least = half(2) * f32::from(least);
                    *to = half(0) * f32::from(step) * f32::from(code) - least;
                }
            }
            Self::Q6K => {
                for (i, to) in to.iter_mut().enumerate() {
                    // Each half has 64 bytes of two codes' low bits and 32 of four codes' high bits.
                    let (side, quarter, at) = (i / 128, i % 128 / 32, i % 32);
                    let low = block[64 * side + 32 * (quarter % 2) + at] >> (quarter / 2 * 4) & 15;
                    let high = block[128 + 32 * side + at] >> (2 * quarter) & 3;
                    let step = half(208) * f32::from(i8::from_le_bytes([block[192 + i / 16]]));
                    *to = step * (i32::from(low | high << 4) - 32) as f32;
                }
            }
        }
    }
}

/// Step and least element of a group, of 6 bits: those of the last four groups have their two highest bits
/// where the first eight numbers have two left.
fn six_bits(bytes: &[u8], group: usize) -> [u8; 2] {
    match group {
        0..4 => [bytes[group] & 63, bytes[group + 4] & 63],
        _ => [
            bytes[group + 4] & 15 | bytes[group - 4] >> 6 << 4,
            bytes[group + 4] >> 4 | bytes[group] >> 6 << 4,
        ],
    }
}

pub(crate) fn f16_to_f32(half: u16) -> f32 {
    let (sign, magnitude) = (u32::from(half & 0x8000) << 16, u32::from(half & 0x7fff));
    let bits = match magnitude {
        // Multiples of 2^-24.
        0..0x400 => (magnitude as f32 / 16_777_216.0).to_bits(),
        0x400..0x7c00 => (magnitude << 13) + 0x3800_0000,
        _ => magnitude << 13 | 0x7f80_0000,
    };
    f32::from_bits(sign | bits)
}

impl fmt::Display for BlockType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

impl FromStr for BlockType {
    type Err = Error;

    /// Reads a [`name`](Self::name).
    ///
    /// # Errors
    /// [`Error::Invalid`] if no type has this name.
    fn from_str(name: &str) -> Result<Self, Error> {
        let found = Self::ALL.into_iter().find(|kind| kind.name() == name);
        found
            .ok_or_else(|| Error::invalid("block type", Self::ALL.map(Self::name).join(", "), name))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_f16_is_widened() {
        for (half, expected) in [
            (0x3c00, 1.0),
            (0x0001, 2f32.powi(-24)),
            (0x03ff, 1023.0 * 2f32.powi(-24)),
            (0x0400, 2f32.powi(-14)),
            (0x7bff, 65504.0),
            (0x7c00, f32::INFINITY),
        ] {
            assert_eq!(f16_to_f32(half), expected);
            assert_eq!(f16_to_f32(half | 0x8000), -expected);
        }
        assert!(f16_to_f32(0x7e00).is_nan());
    }

    #[test]
    fn names_are_read_back() {
        for kind in BlockType::ALL {
            assert_eq!(kind.name().parse::<BlockType>().unwrap(), kind);
        }
        assert!("q2_k".parse::<BlockType>().unwrap_err().to_string().contains("q6_k"));
    }

    #[test]
    fn parts_are_those_of_the_whole() {
        for kind in BlockType::ALL {
            let size = 512 / kind.block_len() * kind.block_bytes();
            let bytes: Vec<u8> = (0..size).map(|i| (i * 37 % 101) as u8 & 0x5f).collect();
            let mut all = [0.0; 512];
            kind.widen(&bytes, 0, &mut all);
            for range in [0..1, 31..33, 200..300, 511..512, 512..512] {
                let mut part = vec![0.0; range.len()];
                kind.widen(&bytes, range.start, &mut part);
                assert_eq!(part, all[range]);
            }
        }
    }
}
