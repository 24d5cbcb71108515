//! What the tile kernel multiplies: f32, or pairs of bf16 where keys and values are bf16 and the machine has an
//! instruction for them.

#[cfg(target_arch = "x86_64")]
pub(super) mod pairs;

use pulp::Simd;

use super::keys::{Part, Source};
use crate::simd::exp2::exp2;
use crate::simd::outer::{Outer, PANEL};

/// How lanes of 32 bits are filled and multiplied. A lane of queries, keys, weights or values holds as many summands
/// as are multiplied at a time: of one row's elements in products of queries with keys, of one column's in those of
/// weights with values.
pub(super) trait Products<S: Simd>: Copy {
    /// Summands of a lane.
    const SUMMANDS: usize;

    /// Whether [`query`](Self::query) has anything to do.
    const ROUNDS: bool;

    /// A query, which was multiplied by its factor, as lanes in its place.
    fn query(self, query: &mut [f32]);

    /// A source's rows as lanes, if they lie in memory that way.
    fn in_place<'a>(self, source: &Source<'a>, part: Part) -> Option<&'a [f32]>;

    /// Rows as lanes, `[rows][dim.div_ceil(SUMMANDS)]`.
    fn gather(self, source: &Source<'_>, part: Part, to: &mut [f32]);

    /// Gathered rows as lanes of their columns, `[rows.div_ceil(SUMMANDS)][dim]`.
    fn columns<'a>(self, rows: &'a [f32], dim: usize, spare: &'a mut [f32]) -> &'a [f32];

    /// Element `index % SUMMANDS` of a lane.
    fn summand(self, lane: f32, index: usize) -> f32;

    /// Whether all summands of lanes are finite.
    fn are_finite(self, lanes: &[f32]) -> bool;

    fn outer(self, simd: S, outer: Outer<'_>);

    /// Turns scores of `C` vectors of rows, from vector `at` of each key's on, into weights: `2^(score - max)`, as
    /// lanes of their columns. Returns the sums of these weights.
    fn weights<const C: usize>(
        self,
        simd: S,
        at: usize,
        scores: &mut [S::f32s],
        max: [S::f32s; C],
    ) -> [S::f32s; C];
}

/// Products of f32.
#[derive(Clone, Copy)]
pub(super) struct Wide;

impl<S: Simd> Products<S> for Wide {
    const SUMMANDS: usize = 1;
    const ROUNDS: bool = false;

    fn query(self, _query: &mut [f32]) {}

    fn in_place<'a>(self, source: &Source<'a>, part: Part) -> Option<&'a [f32]> {
        source.rows.plain(part)
    }

    fn gather(self, source: &Source<'_>, part: Part, to: &mut [f32]) {
        source.rows.widen(part, to);
    }

    fn columns<'a>(self, rows: &'a [f32], _dim: usize, _spare: &'a mut [f32]) -> &'a [f32] {
        rows
    }

    fn summand(self, lane: f32, _index: usize) -> f32 {
        lane
    }

    #[inline(always)]
    fn are_finite(self, lanes: &[f32]) -> bool {
        // As bits, what is no number is larger than all numbers.
        lanes.iter().fold(0, |most, x| most.max(x.to_bits() & 0x7fff_ffff)) < 0x7f80_0000
    }

    #[inline(always)]
    fn outer(self, simd: S, outer: Outer<'_>) {
        simd.vectorize(outer);
    }

    #[inline(always)]
    fn weights<const C: usize>(
        self,
        simd: S,
        at: usize,
        scores: &mut [S::f32s],
        max: [S::f32s; C],
    ) -> [S::f32s; C] {
        let mut total = [simd.splat_f32s(0.0); C];
        for row in scores.chunks_exact_mut(PANEL / S::F32_LANES) {
            // By number, as in `panels`.
            for c in 0..C {
                let weight = exp2(simd, simd.sub_f32s(row[at + c], max[c]));
                row[at + c] = weight;
                total[c] = simd.add_f32s(total[c], weight);
            }
        }
        total
    }
}
