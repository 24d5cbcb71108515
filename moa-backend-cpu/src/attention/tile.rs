//! The kernel for chunks: a tile of query tokens against tiles of keys, scores kept transposed.

use std::ops::Range;

use moa_core::{HeadLayout, rotate};
use pulp::Simd;

use super::keys::{Segment, Source, segments};
use super::scores::Rule;
use crate::Result;
use crate::pool::SharedMut;
use crate::simd::exp2::exp2;
use crate::simd::outer::{LANES, Outer, PANEL, pack_columns};
use crate::workspace::{self, Workspace};

/// Keys per tile: the scores of one panel are then as large as the first-level cache, and the
/// masked part of edge tiles is small.
pub(crate) const TILE_KEYS: usize = 128;

/// Running maximum of a row that has seen nothing. Finite, so that a difference of two is a number.
pub(crate) const NOTHING: f32 = -1e30;

/// Query heads of one KV head, and the tensors they are read from and written to.
pub(crate) struct TileTask<'a> {
    pub(crate) head: &'a HeadLayout,
    /// Tokens cached before the chunk.
    pub(crate) len: usize,
    /// Tile's tokens, counted in the chunk.
    pub(crate) tokens: Range<usize>,
    /// First row of the chunk in the packed tensors.
    pub(crate) first: usize,
    pub(crate) query_heads: usize,
    /// First query head and number of them.
    pub(crate) query_head: usize,
    pub(crate) group: usize,
    pub(crate) q: &'a [f32],
    pub(crate) keys: Source<'a>,
    pub(crate) values: Source<'a>,
    pub(crate) rule: Rule<'a>,
    pub(crate) out: &'a SharedMut<'a, f32>,
    pub(crate) lse: Option<&'a SharedMut<'a, f32>>,
}

impl workspace::Task for TileTask<'_> {
    type Output = Result<()>;

    #[inline(always)]
    fn run<S: Simd>(self, simd: S, workspace: &mut Workspace) -> Result<()> {
        let dim = self.keys.dim;
        let tokens = self.tokens.len();
        let rows = self.group * tokens;
        let panels = rows.div_ceil(PANEL);
        let rotated = if self.keys.rotates() { rows * dim } else { 0 };
        let [q, o, scores, keys, values, all_row_tokens, max, sum, rotated] = workspace.parts([
            panels * dim * PANEL,
            panels * dim * PANEL,
            TILE_KEYS * PANEL,
            TILE_KEYS * dim,
            TILE_KEYS * dim,
            panels * PANEL,
            panels * PANEL,
            panels * PANEL,
            rotated,
        ])?;
        self.pack_queries(q, all_row_tokens, rotated);
        o.fill(0.0);
        max.fill(NOTHING);
        sum.fill(0.0);

        let queries = self.len + self.tokens.start..self.len + self.tokens.end;
        let segments = segments(self.head, self.len, queries.clone());
        let mut bounds = [(0.0, 0.0); TILE_KEYS];
        let mut tiles = Tiles { segments: &segments, used: 0 };
        while let Some(end) = tiles.begin() {
            let mut count = 0;
            let mut direct = None;
            while let Some(segment) = tiles.next(end) {
                let (k, v) = (self.keys.part(segment), self.values.part(segment));
                // A tile that is f32 and in one piece is read where it lies.
                direct = match segment.len == TILE_KEYS {
                    true => self.keys.rows.plain(k).zip(self.values.rows.plain(v)),
                    false => None,
                };
                if direct.is_none() {
                    let place = count * dim..(count + segment.len) * dim;
                    self.keys.rows.widen(k, &mut keys[place.clone()]);
                    self.values.rows.widen(v, &mut values[place]);
                }
                for i in 0..segment.len {
                    bounds[count + i] = self.row_bounds(segment.position + i, &queries);
                }
                count += segment.len;
            }
            let (keys, values) = direct.unwrap_or((keys, values));
            for p in 0..panels {
                let row_token = &all_row_tokens[p * PANEL..rows.min((p + 1) * PANEL)];
                let seen = Seen::new(&bounds[..count], row_token);
                if seen.keys.is_empty() {
                    continue;
                }
                let n = seen.keys.len();
                let width = row_token.len().next_multiple_of(LANES);
                let o = &mut o[p * dim * PANEL..][..dim * PANEL];
                simd.vectorize(Outer {
                    k: dim,
                    n,
                    width,
                    a: &q[p * dim * PANEL..][..dim * PANEL],
                    b: &keys[seen.keys.start * dim..],
                    b_step: 1,
                    b_row: dim,
                    c: scores,
                    accumulate: false,
                });
                if self.rule.is_capped() {
                    for scores in scores[..n * PANEL].chunks_exact_mut(PANEL) {
                        self.rule.cap(simd, &mut scores[..width]);
                    }
                }
                let padded = p * PANEL..p * PANEL + width;
                if seen.partly {
                    mask(simd, &all_row_tokens[padded.clone()], &bounds[seen.keys.clone()], scores);
                }
                let state = (&mut max[padded.clone()], &mut sum[padded]);
                softmax(simd, n, scores, state, o);
                let values = &values[seen.keys.start * dim..][..n * dim];
                // 0 times an infinite value is no number: a product of whole tiles would bring what a row
                // must not see into it.
                if seen.partly && !values.iter().all(|value| value.is_finite()) {
                    add_pairs(row_token, &bounds[seen.keys.clone()], scores, (values, dim), o);
                    continue;
                }
                simd.vectorize(Outer {
                    k: n,
                    n: dim,
                    width,
                    a: scores,
                    b: values,
                    b_step: dim,
                    b_row: 1,
                    c: o,
                    accumulate: true,
                });
            }
        }
        self.write(o, max, sum);
        Ok(())
    }
}

impl TileTask<'_> {
    /// Rows of a tile are ordered by token, then by query head, so that a panel has few tokens and
    /// sees few keys that it must mask.
    fn row(&self, head: usize, token: usize) -> (usize, usize) {
        let row = token * self.group + head;
        (row / PANEL, row % PANEL)
    }

    /// Queries as `[panel][dim][row]`, times the factor of the rule.
    fn pack_queries(&self, packed: &mut [f32], row_token: &mut [f32], rotated: &mut [f32]) {
        let dim = self.keys.dim;
        let scale = self.rule.factor * self.keys.unrotated();
        let query = |row: usize| {
            let token = self.first + self.tokens.start + row / self.group;
            let head = self.query_head + row % self.group;
            &self.q[(token * self.query_heads + head) * dim..][..dim]
        };
        for (row, to) in rotated.chunks_exact_mut(dim).enumerate() {
            to.copy_from_slice(query(row));
            rotate(to);
        }
        let query = |row: usize| match self.keys.rotates() {
            true => &rotated[row * dim..][..dim],
            false => query(row),
        };
        let rows = self.group * self.tokens.len();
        if !rows.is_multiple_of(PANEL) {
            packed[rows / PANEL * dim * PANEL..].fill(0.0);
            row_token[rows / PANEL * PANEL..].fill(0.0);
        }
        for (at, token) in row_token.iter_mut().enumerate().take(rows) {
            *token = (at / self.group) as f32;
        }
        for (p, panel) in packed.chunks_exact_mut(dim * PANEL).enumerate() {
            let rows = p * PANEL..rows.min((p + 1) * PANEL);
            pack_columns(panel, rows.enumerate().map(|(column, row)| (column, query(row))), scale);
        }
    }

    /// First and last token of the tile that see a key, as exact small floats: the mask
    /// `key <= query && (key < sink || query - key < window)` solved for the query.
    #[inline(always)]
    fn row_bounds(&self, key: usize, queries: &Range<usize>) -> (f32, f32) {
        let last = queries.len() - 1;
        let first = key.saturating_sub(queries.start).min(last + 1);
        let span = self.head.span();
        let end = key.saturating_add(span.window());
        let end = if key < span.sink() {
            last + 1
        } else {
            end.saturating_sub(queries.start).min(last + 1)
        };
        (first as f32, end as f32 - 1.0)
    }

    fn write(&self, o: &[f32], max: &[f32], sum: &[f32]) {
        let dim = self.keys.dim;
        for (t, token) in self.tokens.clone().enumerate() {
            let row = (self.first + token) * self.query_heads + self.query_head;
            // SAFETY: only this task writes these query heads of this token.
            let out = unsafe { self.out.slice(row * dim, self.group * dim) };
            for (head, out) in out.chunks_exact_mut(dim).enumerate() {
                let (panel, column) = self.row(head, t);
                let at = panel * PANEL + column;
                let total = self.rule.total(self.query_head + head, max[at], sum[at]);
                let inverse = self.values.unrotated() * total.share / total.sum;
                let o = &o[panel * dim * PANEL..][..dim * PANEL];
                for (out, o) in out.iter_mut().zip(o.chunks_exact(PANEL)) {
                    *out = o[column] * inverse;
                }
                if self.values.rotates() {
                    rotate(out);
                }
            }
            if let Some(lse) = self.lse {
                // SAFETY: as above.
                let lse = unsafe { lse.slice(row, self.group) };
                for (head, lse) in lse.iter_mut().enumerate() {
                    let (panel, column) = self.row(head, t);
                    let at = panel * PANEL + column;
                    *lse = self.rule.total(self.query_head + head, max[at], sum[at]).lse;
                }
            }
        }
    }
}

/// Hands out the segments tile by tile. Tiles begin at multiples of [`TILE_KEYS`] positions, whatever the queries
/// are: the sums of a query then have one order in every cut of its sequence.
struct Tiles<'a> {
    segments: &'a [Segment],
    used: usize,
}

impl Tiles<'_> {
    /// The position of the next key.
    fn position(&self) -> Option<usize> {
        Some(self.segments.first()?.position + self.used)
    }

    /// Where the tile of the next key ends.
    fn begin(&self) -> Option<usize> {
        Some((self.position()? / TILE_KEYS + 1) * TILE_KEYS)
    }

    /// The next stretch of keys before `end`.
    fn next(&mut self, end: usize) -> Option<Segment> {
        let (first, start) = (self.segments.first()?, self.position()?);
        let piece = first.clip(start..end)?;
        self.used += piece.len;
        if self.used == first.len {
            self.segments = &self.segments[1..];
            self.used = 0;
        }
        Some(piece)
    }
}

/// Which keys of a tile some row of a panel sees.
struct Seen {
    keys: Range<usize>,
    /// Whether some row does not see some of these keys.
    partly: bool,
}

impl Seen {
    /// From the keys' first and last tokens and the rows' tokens in ascending order.
    fn new(bounds: &[(f32, f32)], row_token: &[f32]) -> Self {
        let (Some(&low), Some(&high)) = (row_token.first(), row_token.last()) else {
            return Self { keys: 0..0, partly: false };
        };
        let visible = |&(first, last): &(f32, f32)| first <= high && last >= low;
        let start = bounds.iter().position(visible).unwrap_or(bounds.len());
        let end = bounds.iter().rposition(visible).map_or(start, |last| last + 1);
        let partly = bounds[start..end].iter().any(|&(first, last)| first > low || last < high);
        Self { keys: start..end, partly }
    }
}

/// Adds the values of the pairs that the mask keeps, one pair at a time.
#[cold]
fn add_pairs(
    row_token: &[f32],
    bounds: &[(f32, f32)],
    weights: &[f32],
    (values, dim): (&[f32], usize),
    o: &mut [f32],
) {
    for (key, &(first, last)) in bounds.iter().enumerate() {
        for (row, &token) in row_token.iter().enumerate() {
            if token < first || token > last {
                continue;
            }
            let weight = weights[key * PANEL + row];
            for (d, value) in values[key * dim..][..dim].iter().enumerate() {
                o[d * PANEL + row] += weight * value;
            }
        }
    }
}

/// Hides the scores of rows whose token lies outside a key's bounds.
#[inline(always)]
fn mask<S: Simd>(simd: S, row_token: &[f32], bounds: &[(f32, f32)], scores: &mut [f32]) {
    let (row_token, _) = S::as_simd_f32s(row_token);
    let hidden = simd.splat_f32s(f32::NEG_INFINITY);
    for (scores, &(first, last)) in scores.chunks_exact_mut(PANEL).zip(bounds) {
        let (first, last) = (simd.splat_f32s(first), simd.splat_f32s(last));
        for (score, &token) in S::as_mut_simd_f32s(scores).0.iter_mut().zip(row_token) {
            let below = simd.less_than_f32s(token, first);
            let above = simd.greater_than_f32s(token, last);
            *score = simd.select_f32s(simd.or_m32s(below, above), hidden, *score);
        }
    }
}

/// Turns scores into weights relative to the running maximum, and brings the sum and the output
/// accumulated so far to the new maximum.
#[inline(always)]
fn softmax<S: Simd>(
    simd: S,
    count: usize,
    scores: &mut [f32],
    state: (&mut [f32], &mut [f32]),
    o: &mut [f32],
) {
    let (scores, _) = S::as_mut_simd_f32s(&mut scores[..count * PANEL]);
    let (o, _) = S::as_mut_simd_f32s(o);
    let (max, sum) = (S::as_mut_simd_f32s(state.0).0, S::as_mut_simd_f32s(state.1).0);
    // Several vectors of rows at a time, so that no chain of maxima or sums waits for itself.
    let mut at = 0;
    while max.len() - at >= 4 {
        softmax_columns::<S, 4>(simd, at, scores, (max, sum), o);
        at += 4;
    }
    while max.len() > at {
        softmax_columns::<S, 1>(simd, at, scores, (max, sum), o);
        at += 1;
    }
}

/// [`softmax`] of the `C` vectors of rows from `at`.
#[inline(always)]
fn softmax_columns<S: Simd, const C: usize>(
    simd: S,
    at: usize,
    scores: &mut [S::f32s],
    (max, sum): (&mut [S::f32s], &mut [S::f32s]),
    o: &mut [S::f32s],
) {
    let stride = PANEL / S::F32_LANES;
    let (Some(max), Some(sum)) =
        (max[at..].first_chunk_mut::<C>(), sum[at..].first_chunk_mut::<C>())
    else {
        return;
    };
    let mut new_max = *max;
    for row in scores.chunks_exact(stride) {
        for (max, &score) in new_max.iter_mut().zip(&row[at..at + C]) {
            *max = simd.max_f32s(*max, score);
        }
    }
    let mut total = [simd.splat_f32s(0.0); C];
    for row in scores.chunks_exact_mut(stride) {
        for ((score, max), total) in row[at..at + C].iter_mut().zip(new_max).zip(&mut total) {
            *score = exp2(simd, simd.sub_f32s(*score, max));
            *total = simd.add_f32s(*total, *score);
        }
    }
    let mut correction = [simd.splat_f32s(0.0); C];
    for c in 0..C {
        correction[c] = exp2(simd, simd.sub_f32s(max[c], new_max[c]));
        sum[c] = simd.mul_add_e_f32s(sum[c], correction[c], total[c]);
    }
    *max = new_max;
    for row in o.chunks_exact_mut(stride) {
        for (o, correction) in row[at..at + C].iter_mut().zip(correction) {
            *o = simd.mul_f32s(*o, correction);
        }
    }
}
