//! Rows as a cache holds them, in words: elements of a [`Dtype`](crate::Dtype), or codes of [`RowType`] whose scales
//! lie apart. A word of scales is a key's in its low half and the value's of the same slot in its high half.

use cubecl::prelude::*;
use moa_core::{CacheType, RowType};

use super::decode::Floats;
use super::lanes::part;
use super::words::per_word;
use crate::{Error, Result};

/// What head dimensions must be a multiple of, so that rows are whole words and units have four elements each.
pub(crate) const fn dim_step(own: RowType) -> usize {
    match own {
        RowType::Plain(dtype) => per_word(dtype),
        RowType::Int4 => 8,
        _ => 4,
    }
}

/// Checks that rows of `head_dim` elements can be stored in words and read by the kernels.
pub(crate) fn check_rows(op: &'static str, head_dim: usize, own: CacheType) -> Result<()> {
    let step = dim_step(own.keys()).max(dim_step(own.values()));
    match head_dim.is_multiple_of(step) {
        true => Ok(()),
        false => {
            let expected = format_args!("a multiple of {step} for {own}").to_string();
            Err(Error::argument(op, "head_dim", expected, head_dim))
        }
    }
}

/// Words of a row.
pub(crate) const fn row_words(own: RowType, head_dim: usize) -> usize {
    own.code_bytes(head_dim) / 4
}

/// Words that a unit of decode reads at once: 16 bytes, or as many codes as there are halves in them.
pub(crate) const fn load_words(own: RowType) -> usize {
    match own {
        RowType::Plain(_) => 4,
        RowType::Int4 => 1,
        _ => 2,
    }
}

/// Vectors of four elements in such a load; [`vector_of`] says which.
pub(crate) const fn load_parts(own: RowType) -> usize {
    match own {
        RowType::Plain(dtype) => per_word(dtype),
        _ => 2,
    }
}

/// Which vector of four elements of a row a part of a load is, of `columns` loads.
#[cube]
pub(crate) fn vector_of(
    column: usize,
    columns: usize,
    #[comptime] part: usize,
    #[comptime] own: RowType,
) -> usize {
    match own {
        // Of its high halves come elements of the row's second half.
        RowType::Int4 => column + comptime!(part) * columns,
        _ => column * comptime!(load_parts(own)) + comptime!(part),
    }
}

/// Four elements of a load, without their scale.
#[cube]
pub(crate) fn elements<W: Size>(
    words: Vector<u32, W>,
    #[comptime] number: usize,
    #[comptime] own: RowType,
    #[comptime] native: bool,
) -> Floats {
    match own {
        RowType::Plain(dtype) => part::<W>(words, number, dtype, native),
        RowType::Int4 => {
            let word = words.extract(0usize);
            codes(word, comptime!(4 * number as u32).runtime(), own)
        }
        _ => codes(words.extract(number), 0u32.runtime(), own),
    }
}

/// The elements of a word's codes, of codes of 4 bits those that are so many bits up in their bytes.
#[cube]
pub(crate) fn codes(word: u32, up: u32, #[comptime] own: RowType) -> Floats {
    let mut wide = Vector::new(0.0f32);
    #[unroll]
    for i in 0..4usize {
        let byte = word >> comptime!(8 * i as u32);
        let element = match own {
            RowType::Int8 => ((byte & 0xff) ^ 128) as f32 - 128.0,
            RowType::Fp8 => widen_e4m3(byte & 0xff),
            _ => ((byte >> up) & 15) as f32 - 7.5,
        };
        wide.insert(i, element);
    }
    wide
}

/// [`moa_core::e4m3_to_f32`] of a code that is a number.
#[cube]
pub(crate) fn widen_e4m3(code: u32) -> f32 {
    let magnitude = code & 0x7f;
    let mut bits = (magnitude << 20) + 0x3c00_0000;
    if magnitude < 8 {
        // A multiple of 2^-9. A smaller exponent than an f32's is what devices may take for 0.
        bits = (magnitude as f32 * 0.001_953_125).to_bits();
    }
    f32::from_bits(bits | ((code & 0x80) << 24))
}

/// The scale of a slot's key, or of its value.
#[cube]
pub(crate) fn scale(word: u32, #[comptime] of_value: bool) -> f32 {
    let bits = if comptime!(of_value) { word & 0xffff_0000 } else { word << 16 };
    f32::from_bits(bits)
}

/// A vector's component.
#[cube]
pub(crate) fn component<W: Size>(words: Vector<u32, W>, at: usize) -> u32 {
    let mut word = words.extract(0usize);
    #[unroll]
    for i in 1..W::value() {
        word = select(at == i, words.extract(i), word);
    }
    word
}

/// The least bf16 whose product with the type's top is at least `most`, the bits of the row's largest element by size.
#[cube]
pub(crate) fn scale_of(most: u32, #[comptime] own: RowType) -> u32 {
    let mut scale = 0x7fc0u32;
    if most < 0x7f80_0000 {
        scale = 0;
        if most > comptime!(least_of_scale(own)) {
            let largest = f32::from_bits(most);
            let quotient = largest * comptime!(1.0 / own.top());
            // The quotient is cut, and devices round it as they like: two steps below it all is well.
            scale = (quotient.to_bits() >> 16).max(0x82) - 2;
            while f32::from_bits(scale << 16) * comptime!(own.top()) < largest {
                scale += 1;
            }
        }
    }
    scale
}

/// The largest number whose scale is below 2^-126, as bits.
fn least_of_scale(own: RowType) -> u32 {
    (moa_core::widen_scale(0x7f) * own.top()).to_bits()
}

/// The code of an element, given the bits of its row's scale: decided by comparison with products that are exact, as
/// devices' quotients are not.
// Every device has `max` and `min`.
#[allow(clippy::manual_clamp)]
#[cube]
pub(crate) fn code_of(x: f32, scale: u32, #[comptime] own: RowType) -> u32 {
    // Of a scale that is 0 or no number, every code is that of 0.
    let is_some = (scale > 0) & (scale < 0x7f80);
    let scale = f32::from_bits(scale << 16);
    match own {
        RowType::Int4 => {
            let mut cell = 0.0f32;
            if is_some {
                cell = (x * (1.0 / scale)).floor();
                if (cell + 1.0) * scale <= x {
                    cell += 1.0;
                }
                if cell * scale > x {
                    cell -= 1.0;
                }
            }
            (cell + 8.0).max(0.0).min(15.0) as u32
        }
        _ => {
            let bits = x.to_bits();
            let size = f32::from_bits(bits & 0x7fff_ffff);
            let mut code = 0u32;
            if is_some {
                code = nearest(size * (1.0 / scale), own);
                // Halves go to the even code.
                let odd = code & 1 == 1;
                let (own_value, above) = (value_of(code, own), value_of(code + 1, own));
                let below = value_of(code.max(1) - 1, own);
                let (upper, lower) =
                    ((own_value + above) * 0.5 * scale, (own_value + below) * 0.5 * scale);
                if (size > upper) | ((size == upper) & odd) {
                    code += 1;
                } else if (size < lower) | ((size == lower) & odd) {
                    code -= 1;
                }
                if comptime!(matches!(own, RowType::Int8)) {
                    code = select(bits >> 31 == 1, (256 - code) & 0xff, code);
                } else {
                    code |= (bits >> 24) & 0x80;
                }
            }
            code
        }
    }
}

/// The code of a size, or one next to it.
#[cube]
fn nearest(size: f32, #[comptime] own: RowType) -> u32 {
    match own {
        RowType::Int8 => ((size + 0.5) as u32).min(127),
        _ => {
            let bits = size.to_bits();
            let mut code = (((bits + 0x7_ffff + ((bits >> 20) & 1)) >> 20).max(960) - 960).min(126);
            if bits < 0x3c80_0000 {
                // Below 2^-6 all steps are equal.
                code = (size * 512.0 + 0.5) as u32;
            }
            code
        }
    }
}

/// The size that a code stands for, in scales.
#[cube]
fn value_of(code: u32, #[comptime] own: RowType) -> f32 {
    match own {
        RowType::Int8 => code as f32,
        _ => widen_e4m3(code),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NARROW: [RowType; 3] = [RowType::Int8, RowType::Fp8, RowType::Int4];

    /// A row of one element that is not rotated by anything, and the scale that the specification gives it.
    fn code_by_scale(own: RowType, x: f32, largest: f32) -> (u32, u32, u16, u8) {
        // Two elements: rotated by halves of their sum and difference, they are these two again.
        let mut row = match own.rotates() {
            true => [(largest + x) / 2.0, (largest - x) / 2.0],
            false => [largest, x],
        };
        let mut codes = [0; 2];
        let bytes = own.code_bytes(2);
        let expected = own.narrow(&mut row, &mut codes[..bytes]);
        let scale = scale_of(row[0].abs().max(row[1].abs()).to_bits(), own);
        let last = match own {
            RowType::Int4 => codes[0] >> 4,
            _ => codes[1],
        };
        (scale, code_of(row[1], scale, own), expected, last)
    }

    #[test]
    fn codes_and_scales_are_the_specifications() {
        for own in NARROW {
            for i in 0..400_000u32 {
                let share = f32::from(i as u16) / 65536.0;
                let largest = f32::from_bits(0x2f80_0000 + i.wrapping_mul(48_271) % 0x2000_0000);
                let x = match i % 4 {
                    0 => largest * share,
                    1 => -largest * share,
                    2 => largest * (i % 509) as f32 / 508.0,
                    _ => -largest * (i % 17) as f32 / 16.0,
                };
                let (scale, code, expected, last) = code_by_scale(own, x, largest);
                assert_eq!(scale, u32::from(expected), "{own:?}: {largest:e}");
                assert_eq!(code, u32::from(last), "{own:?}: {x:e} of {largest:e}");
            }
        }
    }

    #[test]
    fn the_ends_are_the_specifications() {
        for own in NARROW {
            let edge = f32::from_bits(least_of_scale(own));
            for most in
                [0.0, edge, edge * (1.0 + 1e-6), 1e-38, 1e-30, 3e38, f32::INFINITY, f32::NAN]
            {
                let mut codes = [0; 1];
                let expected = own.narrow(&mut [most], &mut codes);
                let scale = scale_of(most.to_bits(), own);
                assert_eq!(scale, u32::from(expected), "{own:?}: {most:e}");
                let code = u32::from(codes[0]) & if own == RowType::Int4 { 15 } else { 255 };
                assert_eq!(code_of(most, scale, own), code, "{own:?}: {most:e}");
            }
        }
    }

    /// Every boundary between two codes, the numbers around it, and both signs.
    #[test]
    fn boundaries_are_the_specifications() {
        for own in NARROW {
            for scale in [0x3f80u32, 0x3faa, 0x40ff, 0x2081] {
                let wide = moa_core::widen_scale(scale as u16);
                let codes: Vec<f32> = match own {
                    RowType::Int8 => (0..127).map(|c| c as f32 + 0.5).collect(),
                    RowType::Fp8 => (0..126u8)
                        .map(|c| (moa_core::e4m3_to_f32(c) + moa_core::e4m3_to_f32(c + 1)) / 2.0)
                        .collect(),
                    _ => (0..=8).map(|c| c as f32).collect(),
                };
                for middle in codes {
                    let edge = middle * wide;
                    for bits in edge.to_bits().saturating_sub(2)..edge.to_bits() + 3 {
                        for x in [f32::from_bits(bits), -f32::from_bits(bits)] {
                            let quotient = f64::from(x) / f64::from(wide);
                            let expected = match own {
                                RowType::Int8 => quotient.round_ties_even() as i8 as u8,
                                RowType::Int4 => (quotient.floor() + 8.0).clamp(0.0, 15.0) as u8,
                                _ => continue,
                            };
                            assert_eq!(code_of(x, scale, own), u32::from(expected), "{x:e}");
                        }
                    }
                }
            }
        }
        // Of e4m3 the specification's own way: a row whose first element gives the scale.
        for code in 0..126u8 {
            let middle = (moa_core::e4m3_to_f32(code) + moa_core::e4m3_to_f32(code + 1)) / 2.0;
            for bits in middle.to_bits() - 2..middle.to_bits() + 3 {
                for x in [f32::from_bits(bits), -f32::from_bits(bits)] {
                    let (mut row, mut codes) = ([448.0, x], [0; 2]);
                    let scale = RowType::Fp8.narrow(&mut row, &mut codes);
                    assert_eq!(
                        code_of(x, scale.into(), RowType::Fp8),
                        u32::from(codes[1]),
                        "{x:e}"
                    );
                }
            }
        }
    }

    #[test]
    fn every_e4m3_is_widened_exactly() {
        for code in (0..=255u8).filter(|code| code & 0x7f != 0x7f) {
            let expected = moa_core::e4m3_to_f32(code);
            assert_eq!(widen_e4m3(code.into()).to_bits(), expected.to_bits(), "{code}");
        }
    }
}
