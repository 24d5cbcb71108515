//! The kernel for one or a few new tokens: bound by memory, every key and value is read once for
//! all query heads of its group.

use std::ops::Range;

use moa_core::HeadLayout;
use pulp::Simd;

use super::keys::{Segment, Source, segments};
use super::schedule::SPLIT_KEYS;
use super::tile::NOTHING;
use crate::element::Element;
use crate::simd::dot::{Rows, dots, weighted_sum};
use crate::simd::exp2::exp2;
use crate::simd::outer::LANES;
use crate::workspace::{self, Workspace};

/// One split of the keys of one KV head, for all new tokens of a sequence.
pub(crate) struct RowTask<'a, E> {
    pub(crate) head: &'a HeadLayout,
    pub(crate) len: usize,
    pub(crate) tokens: usize,
    /// The split: keys counted in ascending order of position.
    pub(crate) split: Range<usize>,
    pub(crate) group: usize,
    /// The group's query head `h` of token `t` starts at `t * q_stride + h * dim`.
    pub(crate) q: &'a [f32],
    pub(crate) q_stride: usize,
    pub(crate) keys: Source<'a, E>,
    pub(crate) values: Source<'a, E>,
    pub(crate) scale: f32,
    /// `[tokens, group]` partial results of [`partial_len`] elements: maximum, sum, output.
    pub(crate) partial: &'a mut [f32],
}

/// Elements of a partial result of one row.
pub(crate) fn partial_len(dim: usize) -> usize {
    2 + padded(dim)
}

/// Head dimension rounded up so that every row is whole vectors.
fn padded(dim: usize) -> usize {
    dim.next_multiple_of(LANES)
}

/// Calls a kernel for 4, 2 or 1 rows at a time.
macro_rules! by_rows {
    ($rows:expr, $r:ident => $kernel:ident $arguments:tt) => {{
        let mut $r = 0;
        while $rows - $r >= 4 {
            by_rows!(@call $kernel, 4, $arguments);
            $r += 4;
        }
        while $rows - $r >= 2 {
            by_rows!(@call $kernel, 2, $arguments);
            $r += 2;
        }
        if $rows > $r {
            by_rows!(@call $kernel, 1, $arguments);
        }
    }};
    (@call $kernel:ident, $n:literal, ($($argument:expr),+ $(,)?)) => {
        $kernel::<S, _, $n>($($argument),+)
    };
}

impl<E: Element> workspace::Task for RowTask<'_, E> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S, workspace: &mut Workspace) {
        let (dim, wide) = (self.keys.dim, padded(self.keys.dim));
        let [q, scores] = workspace.parts([self.group * wide, self.group * SPLIT_KEYS]);
        let pieces = self.pieces();
        for token in 0..self.tokens {
            self.pack_queries(token, q);
            let query = self.len + token;
            let seen = self.head.span().visible_to(query..query + 1);
            scores.fill(f32::NEG_INFINITY);
            for (at, piece) in Self::seen(&pieces, &seen) {
                let scores = &mut scores[at..];
                let keys = rows(self.keys.rows(piece), dim, piece.len);
                by_rows!(self.group, r => dots(
                    simd, dim, rows(&q[r * wide..], wide, self.group - r), keys,
                    &mut scores[r * SPLIT_KEYS..], SPLIT_KEYS,
                ));
            }
            let partial_len = partial_len(dim);
            let partial =
                &mut self.partial[token * self.group * partial_len..][..self.group * partial_len];
            for (scores, partial) in
                scores.chunks_exact_mut(SPLIT_KEYS).zip(partial.chunks_exact_mut(partial_len))
            {
                partial.fill(0.0);
                let padded = self.split.len().next_multiple_of(LANES);
                (partial[0], partial[1]) = softmax(simd, &mut scores[..padded]);
            }
            for (at, piece) in Self::seen(&pieces, &seen) {
                let scores = &scores[at..];
                let values = rows(self.values.rows(piece), dim, piece.len);
                by_rows!(self.group, r => weighted_sum(
                    simd, dim, &scores[r * SPLIT_KEYS..], SPLIT_KEYS, values,
                    &mut partial[r * partial_len + 2..], partial_len,
                ));
            }
        }
    }
}

fn rows<E>(data: &[E], stride: usize, count: usize) -> Rows<'_, E> {
    Rows { data, stride, count }
}

impl<E: Element> RowTask<'_, E> {
    /// The split's segments, each with the place of its first key in the split.
    fn pieces(&self) -> Vec<(usize, Segment)> {
        let mut before = 0;
        let mut pieces = Vec::with_capacity(6);
        for segment in segments(self.head, self.len, self.len..self.len + self.tokens) {
            let start = self.split.start.saturating_sub(before);
            let end = self.split.end.saturating_sub(before);
            let positions = segment.position + start..segment.position + end.min(segment.len);
            if let Some(piece) = segment.clip(positions) {
                pieces.push((before + start - self.split.start, piece));
            }
            before += segment.len;
        }
        pieces
    }

    /// The parts of the pieces that one query sees.
    fn seen<'a>(
        pieces: &'a [(usize, Segment)],
        seen: &'a [Range<usize>; 2],
    ) -> impl Iterator<Item = (usize, Segment)> + 'a {
        pieces.iter().flat_map(move |&(at, piece)| {
            seen.iter().filter_map(move |range| {
                let part = piece.clip(range.clone())?;
                Some((at + part.position - piece.position, part))
            })
        })
    }

    /// Queries of one token, `[group, padded dim]`, scaled so that scores are logarithms to the
    /// base 2.
    fn pack_queries(&self, token: usize, packed: &mut [f32]) {
        let dim = self.keys.dim;
        let scale = self.scale * std::f32::consts::LOG2_E;
        let from = &self.q[token * self.q_stride..][..self.group * dim];
        for (to, from) in packed.chunks_exact_mut(padded(dim)).zip(from.chunks_exact(dim)) {
            to.fill(0.0);
            to.iter_mut().zip(from).for_each(|(to, x)| *to = x * scale);
        }
    }
}

/// Turns scores into weights; returns their maximum and the sum of the weights.
#[inline(always)]
fn softmax<S: Simd>(simd: S, scores: &mut [f32]) -> (f32, f32) {
    let (scores, _) = S::as_mut_simd_f32s(scores);
    let max = scores.iter().fold(simd.splat_f32s(NOTHING), |max, &s| simd.max_f32s(max, s));
    let max = simd.reduce_max_f32s(max);
    let mut sum = simd.splat_f32s(0.0);
    for score in scores {
        *score = exp2(simd, simd.sub_f32s(*score, simd.splat_f32s(max)));
        sum = simd.add_f32s(sum, *score);
    }
    (max, simd.reduce_sum_f32s(sum))
}

/// Merges the partial results of one row, in order, into its output; returns the log-sum-exp.
/// `partial` holds the row's splits at a stride.
pub(crate) fn merge(partial: &[f32], stride: usize, splits: usize, out: &mut [f32]) -> f32 {
    let max = (0..splits).map(|s| partial[s * stride]).fold(NOTHING, f32::max);
    let mut sum = 0.0;
    for split in 0..splits {
        sum += (partial[split * stride] - max).exp2() * partial[split * stride + 1];
    }
    out.fill(0.0);
    for split in 0..splits {
        let weight = (partial[split * stride] - max).exp2() / sum;
        out.iter_mut().zip(&partial[split * stride + 2..]).for_each(|(o, x)| *o += weight * x);
    }
    max * std::f32::consts::LN_2 + sum.ln()
}
