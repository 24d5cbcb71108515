//! The kernel for one or a few new tokens: bound by memory, every key and value is read once for
//! all query heads of its group.

use std::ops::Range;

use moa_core::{HeadLayout, rotate};
use pulp::Simd;

use super::keys::{Segment, Source, segments};
use super::schedule::SPLIT_KEYS;
use super::scores::{Rule, Total};
use super::tile::NOTHING;
use crate::Result;
use crate::simd::dot::Queries;
use crate::simd::exp2::exp2;
use crate::simd::outer::LANES;
use crate::simd::whole;
use crate::workspace::{self, Workspace};

/// One split of the keys of one KV head, for all new tokens of a sequence.
pub(crate) struct RowTask<'a> {
    pub(crate) head: &'a HeadLayout,
    pub(crate) len: usize,
    pub(crate) tokens: usize,
    /// The split: keys of each token counted in ascending order of position.
    pub(crate) split: Range<usize>,
    pub(crate) group: usize,
    /// The group's query head `h` of token `t` starts at `t * q_stride + h * dim`.
    pub(crate) q: &'a [f32],
    pub(crate) q_stride: usize,
    pub(crate) keys: Source<'a>,
    pub(crate) values: Source<'a>,
    pub(crate) rule: Rule<'a>,
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

impl workspace::Task for RowTask<'_> {
    type Output = Result<()>;

    #[inline(always)]
    fn run<S: Simd>(self, simd: S, workspace: &mut Workspace) -> Result<()> {
        let (dim, wide, group) = (self.keys.dim, padded(self.keys.dim), self.group);
        let is_whole = whole::is_used(self.keys.rows.row_type(), dim);
        // Two codes of 16 bits to an f32, of an even head dimension.
        let codes = if is_whole { group * dim / 2 } else { 0 };
        let [q, scores, codes, steps, sums] =
            workspace.parts([group * wide, group * SPLIT_KEYS, codes, group, group])?;
        let codes: &mut [i16] = bytemuck::cast_slice_mut(codes);
        let sums: &mut [i32] = bytemuck::cast_slice_mut(sums);
        for token in 0..self.tokens {
            self.pack_queries(token, q);
            if is_whole {
                let rows = q.chunks_exact(wide).zip(codes.chunks_exact_mut(dim));
                for ((q, codes), (step, sum)) in rows.zip(steps.iter_mut().zip(&mut *sums)) {
                    (*step, *sum) = whole::round(&q[..dim], codes);
                }
            }
            let whole = is_whole.then_some(whole::Queries { codes, steps, sums });
            let pieces = self.pieces(token);
            scores.fill(f32::NEG_INFINITY);
            for &(at, piece) in &pieces {
                let queries = Queries { wide: q, whole };
                let part = self.keys.part(piece);
                self.keys.rows.dots(part, queries, &mut scores[at..], SPLIT_KEYS);
            }
            if self.rule.is_capped() {
                let seen = pieces.last().map_or(0, |(at, piece)| at + piece.len);
                let padded = seen.next_multiple_of(LANES);
                for scores in scores.chunks_exact_mut(SPLIT_KEYS) {
                    self.rule.cap(simd, &mut scores[..padded]);
                    scores[seen..padded].fill(f32::NEG_INFINITY);
                }
            }
            let partial_len = partial_len(dim);
            let partial = &mut self.partial[token * group * partial_len..][..group * partial_len];
            for (scores, partial) in
                scores.chunks_exact_mut(SPLIT_KEYS).zip(partial.chunks_exact_mut(partial_len))
            {
                partial.fill(0.0);
                let padded = self.split.len().next_multiple_of(LANES);
                (partial[0], partial[1]) = softmax(simd, &mut scores[..padded]);
            }
            for &(at, piece) in &pieces {
                let (part, weights) = (self.values.part(piece), (&mut scores[at..], SPLIT_KEYS));
                let out = (&mut partial[2..], partial_len);
                self.values.rows.add_weighted(part, group, weights, out);
            }
        }
        Ok(())
    }
}

impl RowTask<'_> {
    /// The split's segments of the keys that a token sees, each with the place of its first key in the split.
    ///
    /// Each token has splits of its own, so that its sums are those of a call of this token alone.
    fn pieces(&self, token: usize) -> Vec<(usize, Segment)> {
        let mut before = 0;
        let mut pieces = Vec::with_capacity(6);
        let query = self.len + token;
        for segment in segments(self.head, self.len, query..query + 1) {
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

    /// Queries of one token, `[group, padded dim]`, times the factor of the rule.
    fn pack_queries(&self, token: usize, packed: &mut [f32]) {
        let dim = self.keys.dim;
        let scale = self.rule.factor * self.keys.unrotated();
        let from = &self.q[token * self.q_stride..][..self.group * dim];
        for (to, from) in packed.chunks_exact_mut(padded(dim)).zip(from.chunks_exact(dim)) {
            to.fill(0.0);
            to.iter_mut().zip(from).for_each(|(to, x)| *to = x * scale);
            if self.keys.rotates() {
                rotate(&mut to[..dim]);
            }
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
/// `partial` holds the row's splits at a stride, `total` is told the row's maximum and sum.
pub(crate) fn merge(
    partial: &[f32],
    stride: usize,
    splits: usize,
    total: impl Fn(f32, f32) -> Total,
    out: &mut [f32],
) -> f32 {
    let max = (0..splits).map(|s| partial[s * stride]).fold(NOTHING, f32::max);
    let mut sum = 0.0;
    for split in 0..splits {
        sum += (partial[split * stride] - max).exp2() * partial[split * stride + 1];
    }
    let Total { share, sum, lse } = total(max, sum);
    out.fill(0.0);
    for split in 0..splits {
        let weight = (partial[split * stride] - max).exp2() * share / sum;
        out.iter_mut().zip(&partial[split * stride + 2..]).for_each(|(o, x)| *o += weight * x);
    }
    lse
}
