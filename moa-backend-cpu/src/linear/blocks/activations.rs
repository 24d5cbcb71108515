//! Rows of activations in 15 bits, as two codes of 8: a step for each 32 of them.

use super::Level;
use super::formats::{Format, GROUP};
use super::vector::Vector;
use crate::Result;
use crate::pool::{self, SharedMut};
use crate::zeroed::zeroed;

/// Rows that lie together, element by element, so that a product with 4 codes reads on.
#[cfg(target_arch = "x86_64")]
pub(super) const TILE: usize = 8;

/// The largest code: `high * 128 + low` with both in 8 bits.
pub(super) const MOST: f32 = 127.0 * 128.0;

/// The bit of a float's sign.
const SIGN: u32 = 1 << 31;

/// Quantised rows, `[tile][group]` with the rows of a tile side by side.
pub(super) struct Activations {
    pub(super) rows: usize,
    pub(super) groups: usize,
    /// Rows side by side: 1, or those of a tile.
    pub(super) side: usize,
    /// High and low codes: `[row][group][2][32]` where rows stand alone, `[tile][group][8][2][row][4]` where
    /// they lie side by side.
    pub(super) codes: Vec<i8>,
    /// `[tile][group][row]`.
    pub(super) steps: Vec<f32>,
    /// `step * sum of codes`, where the weights have least elements, as `steps`. Where rows stand alone and weights
    /// have an offset, `-offset` times that.
    pub(super) sums: Vec<f32>,
    /// `-offset * sum of codes`, where the weights have an offset: of each half, or of all in the first half,
    /// `[tile][group][2][row]`, where rows lie side by side; of each 4 codes, `[row][group][8]`, where they stand
    /// alone and halves differ in their steps.
    pub(super) bias: Vec<i32>,
}

impl Activations {
    /// `x` is `[rows, groups * 32]`.
    pub(super) fn new<F: Format>(
        level: Level,
        x: &[f32],
        groups: usize,
        side: usize,
    ) -> Result<Self> {
        const WHAT: &str = "rounded activations";
        let len = groups * GROUP;
        let rows = x.len() / len;
        let tiles = rows.div_ceil(side);
        let own = |wanted: bool, len: usize| if wanted { len } else { 0 };
        let by_sums = by_sums::<F>(side);
        // Of a tile.
        let sizes = [
            groups * side * 2 * GROUP,
            groups * side,
            own(by_sums, groups * side),
            own(!by_sums, groups * if side == 1 { 8 } else { 2 * side }),
        ];
        let mut codes: Vec<i8> = zeroed(tiles * sizes[0], WHAT)?;
        let mut steps: Vec<f32> = zeroed(tiles * sizes[1], WHAT)?;
        let mut sums: Vec<f32> = zeroed(tiles * sizes[2], WHAT)?;
        let mut bias: Vec<i32> = zeroed(tiles * sizes[3], WHAT)?;
        {
            let codes = SharedMut::new(&mut codes);
            let steps = SharedMut::new(&mut steps);
            let sums = SharedMut::new(&mut sums);
            let bias = SharedMut::new(&mut bias);
            pool::for_each(tiles, 8 * x.len() as u64, |tile| {
                // SAFETY: each task has a tile of its own.
                let to = unsafe {
                    Tile {
                        side,
                        codes: codes.slice(tile * sizes[0], sizes[0]),
                        steps: steps.slice(tile * sizes[1], sizes[1]),
                        sums: sums.slice(tile * sizes[2], sizes[2]),
                        bias: bias.slice(tile * sizes[3], sizes[3]),
                    }
                };
                let rows = &x[tile * side * len..x.len().min((tile + 1) * side * len)];
                level.fill::<F>(rows, len, to);
            });
        }
        Ok(Self { rows, groups, side, codes, steps, sums, bias })
    }
}

/// Whether what weights add to all codes is multiplied with sums in f32. Rows side by side begin their products with
/// an offset, in whole numbers; rows alone would add it for every block, a tenth of their time.
fn by_sums<F: Format>(side: usize) -> bool {
    F::LEAST || side == 1 && !F::HALVES
}

/// The part of [`Activations`] of some rows.
pub(super) struct Tile<'a> {
    side: usize,
    codes: &'a mut [i8],
    steps: &'a mut [f32],
    sums: &'a mut [f32],
    bias: &'a mut [i32],
}

/// Quantises the rows of a tile, of `len` elements each.
///
/// # Safety
/// Needs the machine of `V`, for whose instructions it is compiled.
#[inline(always)]
pub(super) unsafe fn fill<V: Vector, F: Format>(rows: &[f32], len: usize, to: Tile<'_>) {
    let Tile { side, codes, steps, sums, bias } = to;
    for (row, x) in rows.chunks_exact(len).enumerate() {
        for (group, x) in x.as_chunks::<GROUP>().0.iter().enumerate() {
            let (step, own) = quantise(x);
            let at = group * side + row;
            steps[at] = step;
            // By number: `map` of an array may stay a call for each element.
            let (mut highs, mut lows) = ([0; GROUP], [0; GROUP]);
            for i in 0..GROUP {
                (highs[i], lows[i]) = (high(own[i]), low(own[i]));
            }
            let parts = [highs, lows];
            if side == 1 {
                let to = &mut codes[group * 2 * GROUP..(group + 1) * 2 * GROUP];
                to.copy_from_slice(parts.as_flattened());
            } else {
                let quads = &mut codes.as_chunks_mut::<4>().0[group * 16 * side..];
                for (part, codes) in parts.iter().enumerate() {
                    for (quad, four) in codes.as_chunks::<4>().0.iter().enumerate() {
                        quads[(quad * 2 + part) * side + row] = *four;
                    }
                }
            }
            if by_sums::<F>(side) {
                let factor = if F::LEAST { 1 } else { -F::OFFSET };
                sums[at] = step * (factor * sum(&own)) as f32;
            } else if side == 1 {
                let fours = own.as_chunks::<4>().0;
                for (to, four) in bias[8 * group..][..8].iter_mut().zip(fours) {
                    *to = -F::OFFSET * sum(four);
                }
            } else if F::HALVES {
                let (a, b) = own.split_at(GROUP / 2);
                bias[2 * group * side + row] = -F::OFFSET * sum(a);
                bias[(2 * group + 1) * side + row] = -F::OFFSET * sum(b);
            } else {
                bias[2 * group * side + row] = -F::OFFSET * sum(&own);
            }
        }
    }
}

#[inline(always)]
fn sum(codes: &[i16]) -> i32 {
    codes.iter().map(|code| i32::from(*code)).sum()
}

/// From -127 to 127. Codes of what is no number may be any, and count for nothing.
#[inline(always)]
fn high(code: i16) -> i8 {
    (code.wrapping_add(64) >> 7) as i8
}

/// From -64 to 63.
#[inline(always)]
fn low(code: i16) -> i8 {
    code.wrapping_sub(i16::from(high(code)) << 7) as i8
}

/// The step and the codes of a group. A step is not a number where an activation is none, or infinite.
#[inline(always)]
pub(super) fn quantise(x: &[f32; GROUP]) -> (f32, [i16; GROUP]) {
    // Sizes of floats are ordered as their bits are, those of what is no number or infinite above all others: a sum
    // or a maximum of floats would take one after the other.
    let mut most = 0;
    for x in x {
        most = (x.to_bits() & !SIGN).max(most);
    }
    let most = f32::from_bits(most);
    let inverse = if most > 0.0 { MOST / most } else { 0.0 };
    // Where the largest is so small that its inverse overflows, all are 0.
    let inverse = if inverse.is_finite() { inverse } else { 0.0 };
    // Adding 1.5 * 2^23 rounds to an integer and leaves that integer in the low bits.
    let mut codes = [0; GROUP];
    for i in 0..GROUP {
        codes[i] = (x[i] * inverse + 12_582_912.0).to_bits() as i16;
    }
    (most / MOST + most * 0.0, codes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_are_within_half_a_step_and_come_in_two_parts() {
        let x: [f32; GROUP] = std::array::from_fn(|i| (i as f32 - 11.3) * 0.37);
        let (step, codes) = quantise(&x);
        for (x, code) in x.iter().zip(codes) {
            assert!((x - step * f32::from(code)).abs() <= 0.501 * step, "{x} {code}");
        }
        assert_eq!(codes.iter().map(|code| code.unsigned_abs()).max(), Some(MOST as u16));
        for code in -MOST as i16..=MOST as i16 {
            assert_eq!(i16::from(high(code)) * 128 + i16::from(low(code)), code);
            assert!(high(code).unsigned_abs() <= 127 && low(code).unsigned_abs() <= 64);
        }
    }

    #[test]
    fn zeros_stay_zeros_and_what_is_no_number_stays_none() {
        assert_eq!(quantise(&[0.0; GROUP]), (0.0, [0; GROUP]));
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let mut x = [1.0; GROUP];
            x[7] = bad;
            assert!(quantise(&x).0.is_nan());
        }
        // What the low bits of one that is none say passes through.
        let payload = f32::from_bits(0x7fc0_7fff);
        let (step, codes) = quantise(&[payload; GROUP]);
        assert!(step.is_nan());
        for code in codes.into_iter().chain(i16::MIN..=i16::MAX) {
            let _ = (high(code), low(code));
        }
        let (step, codes) = quantise(&[1e-40; GROUP]);
        assert!(step < 1e-41 && codes == [0; GROUP]);
    }
}
