//! How a row of a key or a value becomes what a cache holds, and back: the specification for every device.

use super::feedback::feed_back;
use crate::Dtype;
use crate::blocks::{f16_to_f32, f32_to_f16};

/// How a cache holds one row: a token's key, or its value, of one KV head.
///
/// A narrow row is codes and one scale `s`. It is made in three steps, each exact or rounded as IEEE 754 says, so
/// that every device comes to the same bits:
///
/// 1. `y` is the row, [rotated](rotate) where the type [rotates](Self::rotates).
/// 2. `s` is the least bf16 with `s * TOP >= max |y|`, where `TOP` is [`top`](Self::top). It is 0 where that is
///    below 2^-126, and no number where an element of `y` is infinite or none.
/// 3. Every element's code is the number nearest to `y / s` that the type has, of two the even one. Codes of 4
///    bits are cells instead: the code of `[c, c + 1)` is `c + 8`, at most 15, and stands for `c + 1/2`.
///
/// `s * TOP`, `s` times a code, and `s` times the middle of two codes have at most 24 bits, so that a
/// device whose division is not exact decides by comparison with them.
///
/// Keys of 4 bits may have [feedback](crate::key_feedback), which changes `y` on the way.
///
/// A query that meets rotated keys is rotated too, which multiplies scores by [`rotation`]; what attention makes
/// of rotated values is rotated back, which does the same to the output.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum RowType {
    /// Elements of this type, each rounded to the nearest, without a scale.
    Plain(Dtype),
    /// Whole numbers from -127 to 127, one byte each, in two's complement.
    Int8,
    /// Floats of 8 bits, e4m3 without infinities: a sign, 4 bits of exponent of bias 7, 3 of mantissa.
    Fp8,
    /// Halves from -7.5 to 7.5. Byte `i` holds element `i` in its low half and element `i + n` in its high half,
    /// where `n` is half of the head dimension, rounded up.
    Int4,
}

impl RowType {
    /// Bytes of a row's scale, a bf16.
    pub const SCALE_BYTES: usize = 2;

    /// Bytes of a row of `head_dim` elements, its scale included.
    pub const fn bytes(self, head_dim: usize) -> usize {
        self.code_bytes(head_dim) + if self.is_narrow() { Self::SCALE_BYTES } else { 0 }
    }

    /// Bytes of a row's elements or codes.
    pub const fn code_bytes(self, head_dim: usize) -> usize {
        match self {
            Self::Plain(dtype) => head_dim * dtype.bytes(),
            Self::Int8 | Self::Fp8 => head_dim,
            Self::Int4 => head_dim.div_ceil(2),
        }
    }

    /// Whether a row has codes and a scale.
    pub const fn is_narrow(self) -> bool {
        !matches!(self, Self::Plain(_))
    }

    /// Whether rows are [rotated](rotate) before they are rounded.
    pub const fn rotates(self) -> bool {
        matches!(self, Self::Int8 | Self::Int4)
    }

    /// What the largest element of a row is at most, in scales.
    pub const fn top(self) -> f32 {
        match self {
            Self::Plain(_) => 1.0,
            Self::Int8 => 127.0,
            Self::Fp8 => 448.0,
            Self::Int4 => 8.0,
        }
    }

    /// Rounds a row, which is rotated in place, to `codes`, and returns the bits of its scale.
    /// A plain row has no codes and no scale.
    ///
    /// # Panics
    /// If there are not [`code_bytes`](Self::code_bytes) codes.
    pub fn narrow(self, row: &mut [f32], codes: &mut [u8]) -> u16 {
        self.narrow_with(None, row, codes)
    }

    /// [`narrow`](Self::narrow) of a key, with its head's [feedback](crate::key_feedback) where there is one, which
    /// types of other than 4 bits pass over. What the row holds afterwards means nothing then.
    ///
    /// # Panics
    /// If there are not [`code_bytes`](Self::code_bytes) codes, or not as many numbers of the feedback as the square of
    /// the row's.
    pub fn narrow_with(self, feedback: Option<&[f32]>, row: &mut [f32], codes: &mut [u8]) -> u16 {
        assert_eq!(codes.len(), self.code_bytes(row.len()));
        if self.rotates() {
            rotate(row);
        }
        let scale = scale_of(row, self.top());
        if let (Self::Int4, Some(feedback)) = (self, feedback) {
            feed_back(row, widen_scale(scale), feedback);
        }
        let wide = f64::from(widen_scale(scale));
        // Of a scale that is 0 or no number, every code is that of 0.
        let of = |x: &f32| if wide > 0.0 { f64::from(*x) / wide } else { 0.0 };
        match self {
            Self::Plain(_) => {}
            Self::Int8 => {
                for (code, x) in codes.iter_mut().zip(&*row) {
                    *code = (of(x) + WHOLE).to_bits() as u8;
                }
            }
            Self::Fp8 => {
                for (code, x) in codes.iter_mut().zip(&*row) {
                    *code = e4m3(of(x));
                }
            }
            Self::Int4 => {
                let cell = |x: &f32| {
                    let (x, near) = (of(x), of(x) + WHOLE - WHOLE);
                    let floor = if near > x { near - 1.0 } else { near };
                    (floor + 8.0).min(15.0) as u8
                };
                let (low, high) = row.split_at(codes.len());
                for (i, (code, x)) in codes.iter_mut().zip(low).enumerate() {
                    *code = cell(x) | high.get(i).map_or(0, cell) << 4;
                }
            }
        }
        scale
    }

    /// What codes and a scale stand for: the row as it was rounded, so still rotated where the type rotates.
    /// Of a plain type, nothing.
    ///
    /// # Panics
    /// If there are not [`code_bytes`](Self::code_bytes) codes.
    pub fn widen(self, codes: &[u8], scale: u16, row: &mut [f32]) {
        assert_eq!(codes.len(), self.code_bytes(row.len()));
        let scale = widen_scale(scale);
        match self {
            Self::Plain(_) => {}
            Self::Int8 => {
                row.iter_mut().zip(codes).for_each(|(x, c)| *x = f32::from(*c as i8) * scale);
            }
            Self::Fp8 => {
                row.iter_mut().zip(codes).for_each(|(x, c)| *x = e4m3_to_f32(*c) * scale);
            }
            Self::Int4 => {
                let (low, high) = row.split_at_mut(codes.len());
                let value = |code: u8| (f32::from(code) - 7.5) * scale;
                low.iter_mut().zip(codes).for_each(|(x, c)| *x = value(c & 15));
                high.iter_mut().zip(codes).for_each(|(x, c)| *x = value(c >> 4));
            }
        }
    }

    /// What attention sees of a row once it is in a cache: rounded, and rotated back.
    pub fn round(self, row: &[f32]) -> Vec<f64> {
        self.round_with(None, row)
    }

    /// [`round`](Self::round) of a key, with its head's [feedback](crate::key_feedback) where there is one.
    ///
    /// # Panics
    /// As [`narrow_with`](Self::narrow_with).
    pub fn round_with(self, feedback: Option<&[f32]>, row: &[f32]) -> Vec<f64> {
        let mut row = row.to_vec();
        match self {
            Self::Plain(dtype) => {
                row.iter_mut().for_each(|x| *x = plain(*x, dtype));
                row.into_iter().map(f64::from).collect()
            }
            _ => {
                let mut codes = vec![0; self.code_bytes(row.len())];
                let scale = self.narrow_with(feedback, &mut row, &mut codes);
                self.widen(&codes, scale, &mut row);
                let mut wide: Vec<f64> = row.into_iter().map(f64::from).collect();
                if self.rotates() {
                    let factor = rotation(wide.len()) as f64;
                    rotate(&mut wide);
                    wide.iter_mut().for_each(|x| *x /= factor);
                }
                wide
            }
        }
    }

    /// Most that [`round`](Self::round) changes an element of a row, given the row's euclidean length and the
    /// largest of its elements by size (neither of them near the ends of f32).
    ///
    /// A narrow row's step is at most `2^-7` wider than it need be, as its scale is a bf16. Each element of a
    /// rotated row is off by at most half a step, and all of them together by no more than their euclidean
    /// length, which the way back keeps.
    pub fn bound(self, head_dim: usize, length: f64, largest: f64) -> f64 {
        const SCALE: f64 = 1.0 + 1.0 / 128.0;
        let rotated = |top: f64| {
            let block = rotation(head_dim) as f64;
            // The largest element of a rotated row of length 1, normalised.
            let most = (largest * block.sqrt()).min(length);
            most / top * SCALE / 2.0 * block.sqrt() * (1.0 + 1e-5)
        };
        match self {
            Self::Plain(Dtype::F32) => 0.0,
            Self::Plain(Dtype::F16) => largest / 2048.0,
            Self::Plain(Dtype::Bf16) => largest / 256.0,
            Self::Int8 => rotated(127.0),
            Self::Int4 => rotated(8.0),
            // Half of the last place of the largest, which may be just above a power of two.
            Self::Fp8 => largest / 16.0,
        }
    }
}

/// Elements that [`rotate`] mixes: the largest power of two that divides the head dimension.
pub const fn rotation(head_dim: usize) -> usize {
    match head_dim {
        0 => 1,
        _ => 1 << head_dim.trailing_zeros(),
    }
}

/// Multiplies each stretch of [`rotation`] elements by the Hadamard matrix of 1 and -1 (Sylvester's order), which
/// spreads an outlier over all of them. Twice is [`rotation`] times the row.
///
/// Elements at a distance of 1 are added and subtracted first, then those at 2, 4 and so on: nothing but
/// additions, each rounded alone, which come to the same bits on every device.
pub fn rotate<T>(row: &mut [T])
where
    T: Copy + std::ops::Add<Output = T> + std::ops::Sub<Output = T>,
{
    let block = rotation(row.len());
    let mut step = 1;
    while step < block {
        for pair in row.chunks_exact_mut(2 * step) {
            let (low, high) = pair.split_at_mut(step);
            for (a, b) in low.iter_mut().zip(high) {
                (*a, *b) = (*a + *b, *a - *b);
            }
        }
        step *= 2;
    }
}

/// A row's scale as an f32: the bits of a bf16 are the upper half of it.
#[inline]
pub const fn widen_scale(bits: u16) -> f32 {
    f32::from_bits((bits as u32) << 16)
}

/// The least bf16 whose product with `top` is not below the largest element by size.
fn scale_of(row: &[f32], top: f32) -> u16 {
    const NO_NUMBER: u16 = 0x7fc0;
    // A comparison would pass over elements that are no number; as bits they are larger than all others.
    let largest = row.iter().fold(0, |most, x| most.max(x.to_bits() & 0x7fff_ffff));
    let largest = f32::from_bits(largest);
    if !largest.is_finite() {
        return NO_NUMBER;
    }
    // The quotient is rounded: one step below what it is cut to may do.
    let mut scale = ((largest / top).to_bits() >> 16).saturating_sub(1) as u16;
    while widen_scale(scale) * top < largest {
        scale += 1;
    }
    if widen_scale(scale) < f32::MIN_POSITIVE { 0 } else { scale }
}

/// Added to a number of at most 2^51 by size it leaves the nearest whole number, of two the even one, in the sum's
/// lowest bits in two's complement. `round_ties_even` and `floor` are calls where a target has no instruction for them.
const WHOLE: f64 = 6_755_399_441_055_744.0;

/// The nearest e4m3 of a number of at most 448 by size, of two the even one.
fn e4m3(x: f64) -> u8 {
    let sign = if x.is_sign_negative() { 0x80 } else { 0 };
    // Below 2^-6 all steps are equal.
    let exponent = ((x.abs().to_bits() >> 52) as i32 - 1023).max(-6);
    // 2^(3 - exponent), exactly: Rust does not promise the precision of `powi`.
    let factor = f64::from_bits(((1023 + 3 - exponent) as u64) << 52);
    let steps = (x.abs() * factor).round_ties_even() as i32;
    // The bit before the mantissa counts as one more of the exponent.
    sign | (((exponent + 6) << 3) + steps) as u8
}

/// The value of an e4m3.
pub const fn e4m3_to_f32(code: u8) -> f32 {
    let sign = (code as u32 & 0x80) << 24;
    if code & 0x7f == 0x7f {
        return f32::NAN;
    }
    // In an f32's place with a bias of 127 - 7 too little; the product also normalises small numbers.
    let moved = f32::from_bits(sign | (code as u32 & 0x7f) << 20);
    moved * f32::from_bits((127 + 120) << 23)
}

fn plain(x: f32, dtype: Dtype) -> f32 {
    match dtype {
        Dtype::F32 => x,
        Dtype::F16 => f16_to_f32(f32_to_f16(x)),
        Dtype::Bf16 if x.is_nan() => x,
        Dtype::Bf16 => {
            let bits = x.to_bits();
            f32::from_bits(bits.wrapping_add(0x7fff + (bits >> 16 & 1)) & 0xffff_0000)
        }
    }
}

#[cfg(test)]
#[path = "rounding_tests.rs"]
mod tests;
