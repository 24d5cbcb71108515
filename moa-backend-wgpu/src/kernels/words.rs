//! Cached elements in words of 32 bits. WebGPU has 16-bit floats as an extension only, and no bf16;
//! integer arithmetic is everywhere, exact, and hidden behind the reads.

use cubecl::prelude::*;
use half::f16;

use crate::{Dtype, Error, Result};

/// Elements in a word of 32 bits.
pub(crate) const fn per_word(dtype: Dtype) -> usize {
    4 / dtype.bytes()
}

/// Checks that rows of `len` elements of this type can be stored in words and read by the kernels.
pub(crate) fn check_words(
    op: &'static str,
    what: &'static str,
    len: usize,
    dtype: Dtype,
) -> Result<()> {
    if !matches!(dtype, Dtype::F32 | Dtype::F16 | Dtype::Bf16) {
        return Err(Error::argument(op, "dtype", "f32, f16 or bf16", dtype));
    }
    match len.is_multiple_of(per_word(dtype)) {
        true => Ok(()),
        false => Err(Error::argument(op, what, format_args!("even for {dtype}"), len)),
    }
}

/// `M` words as `N` elements; a word holds one or two of them.
#[cube]
pub(crate) fn widen<N: Size, M: Size>(
    words: Vector<u32, M>,
    #[comptime] dtype: Dtype,
) -> Vector<f32, N> {
    let mut wide = Vector::<f32, N>::new(0.0);
    #[unroll]
    for i in 0..M::value() {
        let word = words.extract(i);
        match dtype {
            Dtype::F32 => wide.insert(i, f32::from_bits(word)),
            Dtype::F16 => {
                wide.insert(2 * i, widen_f16(word & 0xffff));
                wide.insert(2 * i + 1, widen_f16(word >> 16));
            }
            _ => {
                wide.insert(2 * i, f32::from_bits(word << 16));
                wide.insert(2 * i + 1, f32::from_bits(word & 0xffff_0000));
            }
        }
    }
    wide
}

/// Rounds pairs of elements to nearest, ties to even, one unit per word.
#[cube(launch_unchecked)]
pub(crate) fn narrow(from: &[f32], to: &mut [u32], words: u32, #[comptime] dtype: Dtype) {
    if ABSOLUTE_POS < words as usize {
        let (low, high) = (from[2 * ABSOLUTE_POS], from[2 * ABSOLUTE_POS + 1]);
        let word = match dtype {
            Dtype::F16 => narrow_f16(low) | (narrow_f16(high) << 16),
            _ => narrow_bf16(low) | (narrow_bf16(high) << 16),
        };
        to[ABSOLUTE_POS] = word;
    }
}

/// The low (0) or high (1) element of a word of two; `native` where the device converts f16 itself.
#[cube]
pub(crate) fn widen_word(
    word: u32,
    #[comptime] half: usize,
    #[comptime] dtype: Dtype,
    #[comptime] native: bool,
) -> f32 {
    if comptime!(matches!(dtype, Dtype::F16) && native) {
        let pair = Vector::<f16, Const<2>>::reinterpret(word);
        f32::cast_from(pair.extract(half))
    } else if comptime!(matches!(dtype, Dtype::F16)) {
        widen_f16((word >> comptime!(16 * half as u32)) & 0xffff)
    } else {
        let bits = if comptime!(half == 0) { word << 16 } else { word & 0xffff_0000 };
        f32::from_bits(bits)
    }
}

#[cube]
pub(crate) fn widen_f16(half: u32) -> f32 {
    let magnitude = half & 0x7fff;
    let mut bits = (magnitude << 13) + 0x3800_0000;
    if magnitude < 0x400 {
        // A multiple of 2^-24.
        bits = (magnitude as f32 * 5.960_464_5e-8).to_bits();
    }
    if magnitude >= 0x7c00 {
        bits = (magnitude << 13) | 0x7f80_0000;
    }
    f32::from_bits(bits | ((half & 0x8000) << 16))
}

#[cube]
pub(crate) fn narrow_f16(x: f32) -> u32 {
    let bits = x.to_bits();
    let magnitude = bits & 0x7fff_ffff;
    // Adds half a unit of the last place, or less so that ties go to even.
    let normal = magnitude.max(0x3880_0000);
    let mut half = ((normal + 0xfff + ((normal >> 13) & 1)) >> 13) - 0x1_c000;
    if magnitude < 0x3880_0000 {
        // The last place of numbers from 0.5 to 1 is 2^-24, as that of the smallest halves.
        half = (f32::from_bits(magnitude) + 0.5).to_bits() - 0x3f00_0000;
    }
    if magnitude >= 0x4780_0000 {
        half = 0x7c00;
    }
    if magnitude > 0x7f80_0000 {
        half = 0x7e00;
    }
    half | ((bits >> 16) & 0x8000)
}

#[cube]
pub(crate) fn narrow_bf16(x: f32) -> u32 {
    let bits = x.to_bits();
    let magnitude = bits & 0x7fff_ffff;
    let mut half = (magnitude + 0x7fff + ((bits >> 16) & 1)) >> 16;
    if magnitude > 0x7f80_0000 {
        half = 0x7fc0;
    }
    half | ((bits >> 16) & 0x8000)
}

#[cfg(test)]
mod tests {
    use half::bf16;

    use super::*;

    #[test]
    fn every_f16_is_widened_and_narrowed_exactly() {
        for bits in 0..=u16::MAX {
            let (expected, got) = (f16::from_bits(bits).to_f32(), widen_f16(bits.into()));
            assert!(expected.to_bits() == got.to_bits() || expected.is_nan() && got.is_nan());
            if !expected.is_nan() {
                assert_eq!(narrow_f16(got), u32::from(bits), "{expected}");
            }
        }
    }

    #[test]
    fn narrowing_rounds_to_nearest_even() {
        let edges =
            [65503.9f32, 65519.9, 65520.0, 65535.9, 65536.0, 1e30, 5.96e-8, 2.9e-8, 2.98e-8];
        let patterns = (0..2_000_000u32).map(|i| f32::from_bits(i.wrapping_mul(2147)));
        // Numbers that end in a tie.
        let ties = (0..0x8000u32).map(|i| f32::from_bits((i << 16) | 0x1000 | (i & 1) << 15));
        for x in edges.into_iter().chain(patterns).chain(ties).flat_map(|x| [x, -x]) {
            let (half, brain) = (f16::from_f32(x), bf16::from_f32(x));
            if x.is_nan() {
                assert!(f16::from_bits(narrow_f16(x) as u16).is_nan());
                assert!(bf16::from_bits(narrow_bf16(x) as u16).is_nan());
            } else {
                assert_eq!(narrow_f16(x), u32::from(half.to_bits()), "{x:e}");
                assert_eq!(narrow_bf16(x), u32::from(brain.to_bits()), "{x:e}");
            }
        }
    }
}
