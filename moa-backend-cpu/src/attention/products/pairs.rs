//! Pairs of bf16 (AVX-512 BF16): queries and weights are rounded, keys and values are what the cache holds, sums are
//! f32.

use std::arch::x86_64::*;

use half::bf16;
use pulp::x86::V4;
use pulp::{Simd, f32x16};

use super::super::keys::{Part, Source};
use super::super::tile::TileTask;
use super::Products;
use crate::Result;
use crate::simd::has_bf16_pairs;
use crate::simd::outer::{LANES, Outer, PANEL, Sum};
use crate::workspace::Workspace;

/// A machine that multiplies pairs of bf16.
#[derive(Clone, Copy)]
pub(in crate::attention) struct Pairs(V4);

impl Pairs {
    /// This one, if it does.
    pub(in crate::attention) fn here() -> Option<Self> {
        if has_bf16_pairs() { V4::try_new().map(Self) } else { None }
    }

    /// Runs a task whose keys and values are bf16.
    pub(in crate::attention) fn run(
        self,
        task: &TileTask<'_>,
        workspace: &mut Workspace,
    ) -> Result<()> {
        #[target_feature(
            enable = "avx2,fma,avx512f,avx512bw,avx512cd,avx512dq,avx512vl,avx512bf16"
        )]
        fn compute(pairs: Pairs, task: &TileTask<'_>, workspace: &mut Workspace) -> Result<()> {
            task.compute(pairs.0, pairs, workspace)
        }
        // SAFETY: the machine has the instructions, or there would be no value of this type.
        unsafe { compute(self, task, workspace) }
    }
}

/// Rows of bf16 as lanes, each padded with a zero to whole ones.
fn copy(rows: &[bf16], dim: usize, to: &mut [f32]) {
    let to: &mut [bf16] = bytemuck::cast_slice_mut(to);
    if dim.is_multiple_of(2) {
        return to.copy_from_slice(rows);
    }
    for (to, row) in to.chunks_exact_mut(dim + 1).zip(rows.chunks_exact(dim)) {
        to[..dim].copy_from_slice(row);
        to[dim] = bf16::ZERO;
    }
}

/// Words of even, then of odd lanes: the upper half of each, taken from two vectors in turn.
const UPPER: [u16; 2 * LANES] = {
    let mut words = [0; 2 * LANES];
    let mut lane = 0;
    while lane < LANES {
        words[2 * lane] = 2 * lane as u16 + 1;
        words[2 * lane + 1] = 2 * lane as u16 + 1 + 2 * LANES as u16;
        lane += 1;
    }
    words
};

/// `2^x` of `x` up to 0, to the nearest bf16 in the upper half of each lane: 0 of `-inf`, and no number of what is
/// none.
///
/// Half a step of a bf16 is 2^-9 to 2^-8 of it, beside which the relative error of the polynomial, below 8e-5, is small.
///
/// # Safety
/// Needs AVX-512DQ.
#[inline(always)]
unsafe fn weight(x: __m512) -> __m512i {
    // SAFETY: promised by the caller.
    unsafe {
        // Down to a whole number, as `scalef` rounds its exponent.
        const DOWN: i32 = 1;
        let fraction = _mm512_reduce_ps::<DOWN>(x);
        // Minimax polynomial of degree 3 for 2^f on [0, 1] (Remez).
        let mut power = _mm512_set1_ps(7.802_452e-2);
        for c in [2.260_671_6e-1, 6.958_335e-1, 9.999_252e-1] {
            power = _mm512_fmadd_ps(power, fraction, _mm512_set1_ps(c));
        }
        let bits = _mm512_castps_si512(_mm512_scalef_ps(power, x));
        // What is no number stays none: its lower half is 0 here, as products of bf16 have it.
        _mm512_add_epi32(bits, _mm512_set1_epi32(0x8000))
    }
}

/// The same bits.
#[inline(always)]
fn of_lanes(lanes: f32x16) -> __m512 {
    // SAFETY: both are 16 lanes of f32.
    unsafe { std::mem::transmute(lanes) }
}

/// The same bits.
#[inline(always)]
fn lanes_of(vector: __m512) -> f32x16 {
    // SAFETY: as above.
    unsafe { std::mem::transmute(vector) }
}

impl Sum<V4> for Pairs {
    #[inline(always)]
    fn add(self, _simd: V4, sum: f32x16, x: f32x16, w: f32x16) -> f32x16 {
        // SAFETY: the machine has the instruction, or there would be no value of this type; all vectors are as long.
        unsafe {
            let pairs = |lanes| std::mem::transmute::<f32x16, __m512bh>(lanes);
            lanes_of(_mm512_dpbf16_ps(of_lanes(sum), pairs(x), pairs(w)))
        }
    }
}

impl Products<V4> for Pairs {
    const SUMMANDS: usize = 2;
    const ROUNDS: bool = true;

    #[inline(always)]
    fn query(self, query: &mut [f32]) {
        for at in (0..query.len()).step_by(LANES) {
            let mask = u16::MAX >> LANES.saturating_sub(query.len() - at);
            // SAFETY: masked elements are neither read nor written, and what is written lies before what is read
            // next, as it is half as long.
            unsafe {
                let wide = _mm512_maskz_loadu_ps(mask, query.as_ptr().add(at));
                let narrow = std::mem::transmute::<__m256bh, __m256i>(_mm512_cvtneps_pbh(wide));
                let to = query.as_mut_ptr().cast::<i16>().add(at);
                // With a zero after the last element of an odd number.
                _mm256_mask_storeu_epi16(to, mask | mask << 1, narrow);
            }
        }
    }

    #[inline(always)]
    fn in_place<'a>(self, source: &Source<'a>, part: Part) -> Option<&'a [f32]> {
        if !source.dim.is_multiple_of(2) {
            return None;
        }
        source.rows.bf16s(part).and_then(|rows| bytemuck::try_cast_slice(rows).ok())
    }

    fn gather(self, source: &Source<'_>, part: Part, to: &mut [f32]) {
        let Some(rows) = source.rows.bf16s(part) else { unreachable!("rows of bf16") };
        copy(rows, source.dim, to);
    }

    #[inline(always)]
    fn columns<'a>(self, rows: &'a [f32], dim: usize, spare: &'a mut [f32]) -> &'a [f32] {
        let (rows, stride): (&[u16], usize) = (bytemuck::cast_slice(rows), dim.next_multiple_of(2));
        let all = rows.len() / (2 * stride) * dim;
        for (to, rows) in spare[..all].chunks_exact_mut(dim).zip(rows.chunks_exact(2 * stride)) {
            for d in (0..dim).step_by(LANES) {
                let mask = u16::MAX >> LANES.saturating_sub(dim - d);
                // SAFETY: the machine has the instructions, or there would be no value of this type; masked elements
                // are neither read nor written.
                unsafe {
                    let row = rows.as_ptr().add(d).cast::<i16>();
                    let even = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, row));
                    let odd = _mm256_maskz_loadu_epi16(mask, row.add(stride));
                    let odd = _mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(odd));
                    let pairs = _mm512_or_si512(even, odd);
                    _mm512_mask_storeu_epi32(to.as_mut_ptr().add(d).cast(), mask, pairs);
                }
            }
        }
        &spare[..all]
    }

    fn summand(self, lane: f32, index: usize) -> f32 {
        let bits = lane.to_bits();
        f32::from_bits(if index.is_multiple_of(2) { bits << 16 } else { bits & 0xffff_0000 })
    }

    #[inline(always)]
    fn are_finite(self, lanes: &[f32]) -> bool {
        let words: &[u16] = bytemuck::cast_slice(lanes);
        words.iter().fold(0, |most, x| most.max(x & 0x7fff)) < 0x7f80
    }

    #[inline(always)]
    fn outer(self, simd: V4, outer: Outer<'_>) {
        outer.run(simd, self);
    }

    #[inline(always)]
    fn weights<const C: usize>(
        self,
        simd: V4,
        at: usize,
        scores: &mut [f32x16],
        max: [f32x16; C],
    ) -> [f32x16; C] {
        // Vectors of a panel's row.
        const VECTORS: usize = PANEL / LANES;
        assert!(at + C <= VECTORS && scores.len().is_multiple_of(2 * VECTORS));
        let ones = simd.splat_f32s(f32::from_bits(0x3f80_3f80));
        let mut total = [simd.splat_f32s(0.0); C];
        for pair in 0..scores.len() / (2 * VECTORS) {
            for c in 0..C {
                // SAFETY: the machine has the instructions, or there would be no value of this type; the vectors lie
                // in the scores, and those that are written over have been read.
                unsafe {
                    let from = scores.as_mut_ptr().add(at + c);
                    let even = simd.sub_f32s(*from.add(2 * pair * VECTORS), max[c]);
                    let odd = simd.sub_f32s(*from.add((2 * pair + 1) * VECTORS), max[c]);
                    let (even, odd) = (weight(of_lanes(even)), weight(of_lanes(odd)));
                    let upper = _mm512_loadu_si512(UPPER.as_ptr().cast());
                    let weights = _mm512_permutex2var_epi16(even, upper, odd);
                    let weights = lanes_of(_mm512_castsi512_ps(weights));
                    *from.add(pair * VECTORS) = weights;
                    total[c] = self.add(simd, total[c], weights, ones);
                }
            }
        }
        total
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Weights of scores, a pair of keys after the other, and their sums.
    fn weights(pairs: Pairs, scores: &[[f32; LANES]]) -> (Vec<[f32; LANES]>, [f32; LANES]) {
        #[target_feature(
            enable = "avx2,fma,avx512f,avx512bw,avx512cd,avx512dq,avx512vl,avx512bf16"
        )]
        fn run(pairs: Pairs, scores: &mut [f32]) -> f32x16 {
            let zero = pairs.0.splat_f32s(0.0);
            pairs.weights::<1>(pairs.0, 1, V4::as_mut_simd_f32s(scores).0, [zero])[0]
        }
        let mut panel = vec![[0.0; PANEL]; scores.len()];
        for (panel, scores) in panel.iter_mut().zip(scores) {
            panel[LANES..2 * LANES].copy_from_slice(scores);
        }
        // SAFETY: the machine has the instructions, or there would be no value of this type.
        let sums = unsafe { run(pairs, panel.as_flattened_mut()) };
        let weight =
            |key: usize| std::array::from_fn(|i| pairs.summand(panel[key / 2][LANES + i], key));
        ((0..scores.len()).map(weight).collect(), bytemuck::cast(sums))
    }

    #[test]
    fn weights_are_the_nearest_bf16_and_add_up() {
        let Some(pairs) = Pairs::here() else { return };
        let scores: Vec<[f32; LANES]> = (0..2000)
            .map(|key| std::array::from_fn(|i| -0.004 * (key * LANES + i) as f32 % 125.0))
            .collect();
        let (found, sums) = weights(pairs, &scores);
        let mut expected = [0.0; LANES];
        for (scores, found) in scores.iter().zip(&found) {
            for i in 0..LANES {
                let exact = f64::from(scores[i]).exp2();
                // Half a step, and the polynomial.
                let most = scores[i].floor().exp2() / 256.0;
                let error = (f64::from(found[i]) - exact).abs();
                assert!(error < f64::from(most) + 8e-5 * exact, "{}: {}", scores[i], found[i]);
                expected[i] += f64::from(found[i]);
            }
        }
        for (sum, expected) in sums.into_iter().zip(expected) {
            assert!((f64::from(sum) - expected).abs() < 1e-5 * expected, "{sum} {expected}");
        }
    }

    #[test]
    fn weights_at_the_ends_are_exact() {
        let Some(pairs) = Pairs::here() else { return };
        for (score, expected) in
            [(0.0, 1.0), (-1.0, 0.5), (-1e30, 0.0), (f32::NEG_INFINITY, 0.0), (-200.0, 0.0)]
        {
            let (found, sums) = weights(pairs, &[[score; LANES], [f32::NEG_INFINITY; LANES]]);
            assert_eq!(
                (found[0], found[1], sums),
                ([expected; LANES], [0.0; LANES], [expected; LANES])
            );
        }
        for bits in [0x7fc0_0000, 0xffff_0000, 0x7fff_0000] {
            let (found, sums) = weights(pairs, &[[f32::from_bits(bits); LANES], [0.0; LANES]]);
            assert!(found[0].iter().chain(&sums).all(|x| x.is_nan()));
        }
    }
}
