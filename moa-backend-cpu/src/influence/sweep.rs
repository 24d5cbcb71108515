use std::ops::Range;

use moa_core::InfluenceSign;
use pulp::Simd;

use crate::simd::exp2::exp2;
use crate::simd::outer::PANEL;

/// Smallest `1 - A`: where a row puts everything on one key, f32 holds no more digits of it.
const MIN_REST: f32 = 1e-6;

/// The elementwise part of one tile, in one pass: from scores and `dO . V` to influence, and for
/// gradients to probabilities and score gradients in place.
pub(super) struct Sweep<'a> {
    pub(super) first_query: usize,
    pub(super) queries: usize,
    pub(super) keys: Range<usize>,
    /// Rows, padded.
    pub(super) width: usize,
    /// Keys that a query sees, at most as many as there are tokens.
    pub(super) window: usize,
    pub(super) block: usize,
    pub(super) sign: InfluenceSign,
    /// Scale of the score gradients, if they are wanted.
    pub(super) gradient_scale: Option<f32>,
    /// To the base 2.
    pub(super) lse: &'a [f32],
    pub(super) dots: &'a [f32],
    /// `[key][row]`: in scores to the base 2, out probabilities.
    pub(super) scores: &'a mut [f32],
    /// `[key][row]`: in `dO . V`, out score gradients.
    pub(super) products: &'a mut [f32],
    /// `[query blocks of this tile, blocks]`, added to.
    pub(super) blocks: &'a mut [f64],
    pub(super) block_columns: usize,
}

#[inline(always)]
pub(super) fn sweep<S: Simd>(simd: S, mut s: Sweep<'_>) {
    match (s.sign, s.gradient_scale) {
        (InfluenceSign::Signed, None) => run::<S, false, false>(simd, &mut s, 0.0),
        (InfluenceSign::Signed, Some(scale)) => run::<S, false, true>(simd, &mut s, scale),
        (InfluenceSign::Absolute, None) => run::<S, true, false>(simd, &mut s, 0.0),
        (InfluenceSign::Absolute, Some(scale)) => run::<S, true, true>(simd, &mut s, scale),
    }
}

#[inline(always)]
fn run<S: Simd, const ABSOLUTE: bool, const GRADIENTS: bool>(
    simd: S,
    s: &mut Sweep<'_>,
    scale: f32,
) {
    let mut start = s.keys.start;
    while start < s.keys.end {
        let column = start / s.block;
        let end = s.keys.end.min((column + 1).saturating_mul(s.block));
        // Keys that every query sees, its own not among them, need no mask.
        let far = (s.first_query + PANEL).saturating_sub(s.window).clamp(start, end);
        let middle = s.first_query.clamp(far, end);
        let mut sums = [0.0f32; PANEL];
        {
            let (sums, _) = S::as_mut_simd_f32s(&mut sums[..s.width]);
            for (v, sum) in sums.iter_mut().enumerate() {
                let [far, below, edge] = [start..far, far..middle, middle..end];
                *sum = column_sum::<S, ABSOLUTE, GRADIENTS, true>(simd, s, v, far, scale, *sum);
                *sum = column_sum::<S, ABSOLUTE, GRADIENTS, false>(simd, s, v, below, scale, *sum);
                *sum = column_sum::<S, ABSOLUTE, GRADIENTS, true>(simd, s, v, edge, scale, *sum);
            }
        }
        for (row, &sum) in sums[..s.queries].iter().enumerate() {
            let block = (s.first_query + row) / s.block - s.first_query / s.block;
            s.blocks[block * s.block_columns + column] += f64::from(sum);
        }
        start = end;
    }
}

/// One vector of rows over some positions of the tile; returns `total` plus its influence.
#[inline(always)]
fn column_sum<S: Simd, const ABSOLUTE: bool, const GRADIENTS: bool, const EDGE: bool>(
    simd: S,
    s: &mut Sweep<'_>,
    v: usize,
    positions: Range<usize>,
    scale: f32,
    mut total: S::f32s,
) -> S::f32s {
    let stride = PANEL / S::F32_LANES;
    let (one, min_rest) = (simd.splat_f32s(1.0), simd.splat_f32s(MIN_REST));
    let (zero, scale) = (simd.splat_f32s(0.0), simd.splat_f32s(-scale));
    let (lse, dots) = (S::as_simd_f32s(s.lse).0[v], S::as_simd_f32s(s.dots).0[v]);
    let rows: S::f32s = vector(|i| (v * S::F32_LANES + i) as f32, simd);
    let local = (positions.start - s.keys.start) * PANEL..(positions.end - s.keys.start) * PANEL;
    let (scores, _) = S::as_mut_simd_f32s(&mut s.scores[local.clone()]);
    let (products, _) = S::as_mut_simd_f32s(&mut s.products[local]);
    let columns = scores.chunks_exact_mut(stride).zip(products.chunks_exact_mut(stride));
    for ((scores, products), position) in columns.zip(positions) {
        let (score, product) = (&mut scores[v], &mut products[v]);
        let mut p = exp2(simd, simd.sub_f32s(*score, lse));
        let slope = simd.sub_f32s(dots, *product);
        let rest = simd.max_f32s(simd.sub_f32s(one, p), min_rest);
        let gain = simd.mul_f32s(p, slope);
        let mut e = simd.div_f32s(gain, rest);
        if EDGE {
            // Rows of this key's own query, and of the first query that does not see it any more.
            let own = (position as i64 - s.first_query as i64) as f32;
            let (diagonal, past) = (simd.splat_f32s(own), simd.splat_f32s(own + s.window as f32));
            let seen = simd.less_than_f32s(rows, past);
            p = simd.select_f32s(simd.less_than_f32s(rows, diagonal), zero, p);
            p = simd.select_f32s(seen, p, zero);
            e = simd.select_f32s(simd.greater_than_f32s(rows, diagonal), e, zero);
            e = simd.select_f32s(seen, e, zero);
        }
        total = simd.add_f32s(total, if ABSOLUTE { simd.abs_f32s(e) } else { e });
        if GRADIENTS {
            *score = p;
            let gain = if EDGE { simd.mul_f32s(p, slope) } else { gain };
            *product = simd.mul_f32s(gain, scale);
        }
    }
    total
}

#[inline(always)]
fn vector<S: Simd>(value: impl Fn(usize) -> f32, simd: S) -> S::f32s {
    let mut vector = simd.splat_f32s(0.0);
    let lanes = bytemuck::cast_slice_mut::<S::f32s, f32>(std::slice::from_mut(&mut vector));
    lanes.iter_mut().enumerate().for_each(|(i, lane)| *lane = value(i));
    vector
}
