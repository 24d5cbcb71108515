//! Rows of activations in 8 bits: a step for each 32 of them, which is the largest over 127.

use super::formats::{Format, GROUP};
use crate::pool::{self, SharedMut};

/// Rows that lie together, element by element, so that a product with 4 codes reads on.
pub(super) const TILE: usize = 8;

/// Quantised rows, `[tile][group]` with the rows of a tile side by side.
pub(super) struct Activations {
    pub(super) rows: usize,
    pub(super) groups: usize,
    /// Rows side by side: 1 or [`TILE`].
    pub(super) side: usize,
    /// `[tile][group][8][row][4]`.
    pub(super) codes: Vec<i8>,
    /// `[tile][group][row]`.
    pub(super) steps: Vec<f32>,
    /// `step * sum of codes`, where the weights have least elements, as `steps`.
    pub(super) sums: Vec<f32>,
    /// `-offset * sum of codes`, where the weights have an offset: of each 4 codes, `[row][group][8]`, where
    /// rows stand alone, of each half, or of all in the first half, `[tile][group][2][row]`, where they lie
    /// side by side.
    pub(super) bias: Vec<i32>,
}

impl Activations {
    /// `x` is `[rows, groups * 32]`.
    pub(super) fn new<F: Format>(x: &[f32], groups: usize, side: usize) -> Self {
        let len = groups * GROUP;
        let rows = x.len() / len;
        let tiles = rows.div_ceil(side);
        let own = |wanted: bool, len: usize| if wanted { len } else { 0 };
        let per_group = if side == 1 { 8 } else { 2 * side };
        let all = tiles * groups;
        let mut codes = vec![0; all * side * GROUP];
        let mut steps = vec![0.0; all * side];
        let mut sums = vec![0.0; own(F::LEAST, all * side)];
        let mut bias = vec![0; own(!F::LEAST, all * per_group)];
        {
            let codes = SharedMut::new(&mut codes);
            let steps = SharedMut::new(&mut steps);
            let sums = SharedMut::new(&mut sums);
            let bias = SharedMut::new(&mut bias);
            pool::for_each(tiles, 4 * x.len() as u64, |tile| {
                let first = tile * groups;
                // SAFETY: each task has a tile of its own.
                let (codes, steps, sums, bias) = unsafe {
                    (
                        codes.slice(first * side * GROUP, groups * side * GROUP),
                        steps.slice(first * side, groups * side),
                        sums.slice(own(F::LEAST, first * side), own(F::LEAST, groups * side)),
                        bias.slice(
                            own(!F::LEAST, first * per_group),
                            own(!F::LEAST, groups * per_group),
                        ),
                    )
                };
                let rows = &x[tile * side * len..x.len().min((tile + 1) * side * len)];
                for (row, x) in rows.chunks_exact(len).enumerate() {
                    for (group, x) in x.as_chunks::<GROUP>().0.iter().enumerate() {
                        let (step, own) = quantise(x);
                        let at = group * side + row;
                        steps[at] = step;
                        for (quad, four) in own.as_chunks::<4>().0.iter().enumerate() {
                            let to = (group * 8 + quad) * side + row;
                            codes[4 * to..4 * to + 4].copy_from_slice(four);
                        }
                        if F::LEAST {
                            sums[at] = step * sum(&own) as f32;
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
            });
        }
        Self { rows, groups, side, codes, steps, sums, bias }
    }
}

fn sum(codes: &[i8]) -> i32 {
    codes.iter().map(|code| i32::from(*code)).sum()
}

/// The step and the codes of a group. A step is not a number where an activation is none, or infinite.
#[inline(always)]
pub(super) fn quantise(x: &[f32; GROUP]) -> (f32, [i8; GROUP]) {
    let most = x.iter().fold(0.0f32, |most, x| most.max(x.abs()));
    let poison = x.iter().fold(0.0f32, |sum, x| sum + x * 0.0);
    let inverse = if most > 0.0 { 127.0 / most } else { 0.0 };
    // Adding 1.5 * 2^23 rounds to an integer and leaves that integer in the low bits. Where the largest is so
    // small that its inverse overflows, all are 0.
    let inverse = if inverse.is_finite() { inverse } else { 0.0 };
    let codes = x.map(|x| (x * inverse + 12_582_912.0).to_bits() as i8);
    (most / 127.0 + poison, codes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_are_within_half_a_step() {
        let x: [f32; GROUP] = std::array::from_fn(|i| (i as f32 - 11.3) * 0.37);
        let (step, codes) = quantise(&x);
        for (x, code) in x.iter().zip(codes) {
            assert!((x - step * f32::from(code)).abs() <= 0.5001 * step, "{x} {code}");
        }
        assert_eq!(codes.iter().map(|code| code.unsigned_abs()).max(), Some(127));
    }

    #[test]
    fn zeros_stay_zeros_and_what_is_no_number_stays_none() {
        assert_eq!(quantise(&[0.0; GROUP]), (0.0, [0; GROUP]));
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let mut x = [1.0; GROUP];
            x[7] = bad;
            assert!(quantise(&x).0.is_nan());
        }
        let (step, codes) = quantise(&[1e-40; GROUP]);
        assert!(step < 1e-41 && codes == [0; GROUP]);
    }
}
