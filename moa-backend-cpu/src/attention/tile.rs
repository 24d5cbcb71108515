//! The kernel for chunks: a tile of query tokens against tiles of keys, scores kept transposed.

use std::ops::Range;

#[cfg(target_arch = "x86_64")]
use moa_core::{Dtype, RowType};
use moa_core::{HeadLayout, rotate};
use pulp::Simd;

use super::keys::{Segment, Source, segments};
#[cfg(target_arch = "x86_64")]
use super::products::pairs::Pairs;
use super::products::{Products, Wide};
use super::scores::Rule;
use crate::Result;
use crate::pool::SharedMut;
use crate::simd::exp2::exp2;
#[cfg(target_arch = "x86_64")]
use crate::simd::is_avx512;
use crate::simd::outer::{LANES, Outer, PANEL, pack_columns};
use crate::simd::transpose::transpose;
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
    /// Whether products may be of bf16.
    pub(crate) narrow: bool,
    pub(crate) out: &'a SharedMut<'a, f32>,
    pub(crate) lse: Option<&'a SharedMut<'a, f32>>,
}

impl workspace::Task for TileTask<'_> {
    type Output = Result<()>;

    #[inline(always)]
    fn run<S: Simd>(self, simd: S, workspace: &mut Workspace) -> Result<()> {
        #[cfg(target_arch = "x86_64")]
        if let Some(pairs) = self.pairs::<S>() {
            return pairs.run(&self, workspace);
        }
        self.compute(simd, Wide, workspace)
    }
}

impl TileTask<'_> {
    /// Whether code for `S` takes products of bf16. This alone decides it.
    #[cfg(target_arch = "x86_64")]
    fn pairs<S: Simd>(&self) -> Option<Pairs> {
        let both = [self.keys, self.values];
        let are_bf16 = both.iter().all(|s| s.rows.row_type() == RowType::Plain(Dtype::Bf16));
        if self.narrow && are_bf16 && is_avx512::<S>() { Pairs::here() } else { None }
    }

    #[inline(always)]
    pub(super) fn compute<S: Simd, P: Products<S>>(
        &self,
        simd: S,
        products: P,
        workspace: &mut Workspace,
    ) -> Result<()> {
        let dim = self.keys.dim;
        // Lanes of a query or of a key.
        let steps = dim.div_ceil(P::SUMMANDS);
        let rows = self.group * self.tokens.len();
        let panels = rows.div_ceil(PANEL);
        let copied = if self.keys.rotates() || P::ROUNDS { rows * dim } else { 0 };
        let spare = if P::SUMMANDS > 1 { TILE_KEYS / P::SUMMANDS * dim } else { 0 };
        let [q, o, scores, keys, values, spare, all_row_tokens, max, sum, copied] = workspace
            .parts([
                panels * steps * PANEL,
                panels * dim * PANEL,
                TILE_KEYS * PANEL,
                TILE_KEYS * steps,
                TILE_KEYS * steps,
                spare,
                panels * PANEL,
                panels * PANEL,
                panels * PANEL,
                copied,
            ])?;
        self.pack_queries(simd, products, q, all_row_tokens, copied);
        o.fill(0.0);
        max.fill(NOTHING);
        sum.fill(0.0);

        let queries = self.len + self.tokens.start..self.len + self.tokens.end;
        let segments = segments(self.head, self.len, queries.clone());
        let mut bounds = [(0.0, 0.0); TILE_KEYS];
        let mut tiles = Tiles { segments: &segments, used: 0 };
        while let Some(end) = tiles.begin() {
            let mut count = 0_usize;
            let mut direct = None;
            let mut next = end - TILE_KEYS;
            let mut all_seen = true;
            while let Some(segment) = tiles.next(end) {
                let (k, v) = (self.keys.part(segment), self.values.part(segment));
                // A tile that lies in one piece is read from there.
                direct = match segment.len == TILE_KEYS {
                    true => {
                        products.in_place(&self.keys, k).zip(products.in_place(&self.values, v))
                    }
                    false => None,
                };
                // Lanes hold the same positions wherever the queries begin to see: rows of zeros, which no query
                // sees, take the place of what is missing.
                let missing = match segment.position == next {
                    true => 0,
                    false => {
                        count.next_multiple_of(P::SUMMANDS) - count + segment.position % P::SUMMANDS
                    }
                };
                pad(count, missing, steps, [&mut *keys, &mut *values], &mut bounds);
                all_seen &= missing == 0;
                count += missing;
                if direct.is_none() {
                    let place = count * steps..(count + segment.len) * steps;
                    products.gather(&self.keys, k, &mut keys[place.clone()]);
                    products.gather(&self.values, v, &mut values[place]);
                }
                match self.is_seen_by_all(segment, &queries) {
                    true => bounds[count..][..segment.len].fill((0.0, f32::INFINITY)),
                    false => {
                        all_seen = false;
                        for i in 0..segment.len {
                            bounds[count + i] = self.row_bounds(segment.position + i, &queries);
                        }
                    }
                }
                count += segment.len;
                next = segment.position + segment.len;
            }
            let missing = count.next_multiple_of(P::SUMMANDS) - count;
            pad(count, missing, steps, [&mut *keys, &mut *values], &mut bounds);
            all_seen &= missing == 0;
            count += missing;
            let (keys, values) = direct.unwrap_or((keys, values));
            let values = products.columns(&values[..count * steps], dim, spare);
            // Looked at where some query does not see a value.
            let mut are_finite = None;
            for p in 0..panels {
                let row_token = &all_row_tokens[p * PANEL..rows.min((p + 1) * PANEL)];
                let seen = match all_seen {
                    true => Seen { keys: 0..count, partly: false },
                    false => Seen::new(&bounds[..count], row_token, P::SUMMANDS),
                };
                if seen.keys.is_empty() {
                    continue;
                }
                let n = seen.keys.len();
                let width = row_token.len().next_multiple_of(LANES);
                let o = &mut o[p * dim * PANEL..][..dim * PANEL];
                products.outer(
                    simd,
                    Outer {
                        k: steps,
                        n,
                        width,
                        a: &q[p * steps * PANEL..][..steps * PANEL],
                        b: &keys[seen.keys.start * steps..],
                        b_step: 1,
                        b_row: steps,
                        c: scores,
                        accumulate: false,
                    },
                );
                if self.rule.is_capped() {
                    for scores in scores[..n * PANEL].chunks_exact_mut(PANEL) {
                        self.rule.cap(simd, &mut scores[..width]);
                    }
                }
                let padded = p * PANEL..p * PANEL + width;
                if seen.partly {
                    let row_token = (&all_row_tokens[padded.clone()], row_token.len());
                    mask(simd, row_token, &bounds[seen.keys.clone()], scores);
                }
                let state = (&mut max[padded.clone()], &mut sum[padded]);
                softmax(simd, products, n, scores, state, o);
                let lanes = seen.keys.start / P::SUMMANDS..seen.keys.end / P::SUMMANDS;
                let seen_values = &values[lanes.start * dim..lanes.end * dim];
                // 0 times an infinite value is no number: a product of whole tiles would bring what a row
                // must not see into it.
                if seen.partly && !*are_finite.get_or_insert_with(|| products.are_finite(values)) {
                    let value = |key: usize, d: usize| {
                        products.summand(seen_values[key / P::SUMMANDS * dim + d], key)
                    };
                    let weight = |key: usize, row: usize| {
                        products.summand(scores[key / P::SUMMANDS * PANEL + row], key)
                    };
                    add_pairs(row_token, &bounds[seen.keys.clone()], weight, (value, dim), o);
                    continue;
                }
                products.outer(
                    simd,
                    Outer {
                        k: lanes.len(),
                        n: dim,
                        width,
                        a: scores,
                        b: seen_values,
                        b_step: dim,
                        b_row: 1,
                        c: o,
                        accumulate: true,
                    },
                );
            }
        }
        self.write(simd, o, max, sum);
        Ok(())
    }

    /// The token, counted in the packed tensors, and the query head of a row. Rows of a tile are ordered by token, then
    /// by query head, so that a panel has few tokens and sees few keys that it must mask.
    fn token_and_head(&self, row: usize) -> (usize, usize) {
        let token = self.first + self.tokens.start + row / self.group;
        (token, self.query_head + row % self.group)
    }

    /// Queries, times the factor of the rule, as `[panel][lane][row]`.
    #[inline(always)]
    fn pack_queries<S: Simd, P: Products<S>>(
        &self,
        _simd: S,
        products: P,
        packed: &mut [f32],
        row_token: &mut [f32],
        copied: &mut [f32],
    ) {
        let dim = self.keys.dim;
        let steps = dim.div_ceil(P::SUMMANDS);
        let scale = self.rule.factor * self.keys.unrotated();
        let query = |row: usize| {
            let (token, head) = self.token_and_head(row);
            &self.q[(token * self.query_heads + head) * dim..][..dim]
        };
        for (row, to) in copied.chunks_exact_mut(dim).enumerate() {
            to.copy_from_slice(query(row));
            if self.keys.rotates() {
                rotate(to);
            }
            if P::ROUNDS {
                to.iter_mut().for_each(|x| *x *= scale);
                products.query(to);
            }
        }
        let query = |row: usize| match copied.is_empty() {
            true => query(row),
            false => &copied[row * dim..][..steps],
        };
        let rows = self.group * self.tokens.len();
        if !rows.is_multiple_of(PANEL) {
            packed[rows / PANEL * steps * PANEL..].fill(0.0);
            row_token[rows / PANEL * PANEL..].fill(0.0);
        }
        for (at, token) in row_token.iter_mut().enumerate().take(rows) {
            *token = (at / self.group) as f32;
        }
        for (p, panel) in packed.chunks_exact_mut(steps * PANEL).enumerate() {
            let rows = p * PANEL..rows.min((p + 1) * PANEL);
            let rows = rows.enumerate().map(|(column, row)| (column, query(row)));
            match P::ROUNDS {
                true => pack_columns(panel, rows, |lane| lane),
                false => pack_columns(panel, rows, |x| x * scale),
            }
        }
    }

    /// Whether every query of the tile sees all keys of a segment.
    fn is_seen_by_all(&self, segment: Segment, queries: &Range<usize>) -> bool {
        let (span, end) = (self.head.span(), segment.position + segment.len);
        let is_recent = queries.end - 1 < segment.position.saturating_add(span.window());
        end <= queries.start + 1 && (end <= span.sink() || is_recent)
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

    #[inline(always)]
    fn write<S: Simd>(&self, simd: S, o: &[f32], max: &[f32], sum: &[f32]) {
        let dim = self.keys.dim;
        let rows = self.group * self.tokens.len();
        let mut block = [0.0; LANES * LANES];
        for first in (0..rows).step_by(LANES) {
            // Rows that are columns side by side.
            let o = &o[first / PANEL * dim * PANEL + first % PANEL..];
            let mut outs: [&mut [f32]; LANES] = Default::default();
            let mut factors = [0.0; LANES];
            for (i, row) in (first..rows.min(first + LANES)).enumerate() {
                let (token, head) = self.token_and_head(row);
                let at = token * self.query_heads + head;
                let total = self.rule.total(head, max[row], sum[row]);
                // SAFETY: only this task writes these query heads of this token.
                outs[i] = unsafe { self.out.slice(at * dim, dim) };
                factors[i] = self.values.unrotated() * total.share / total.sum;
                if let Some(lse) = self.lse {
                    // SAFETY: as above.
                    unsafe { lse.slice(at, 1)[0] = total.lse };
                }
            }
            let whole = dim - dim % LANES;
            for d in (0..whole).step_by(LANES) {
                transpose(simd, &o[d * PANEL..], PANEL, &mut block, LANES);
                for ((out, row), factor) in
                    outs.iter_mut().zip(block.chunks_exact(LANES)).zip(factors)
                {
                    let Some(out) = out.get_mut(d..d + LANES) else { break };
                    out.iter_mut().zip(row).for_each(|(out, o)| *out = o * factor);
                }
            }
            for (i, (out, factor)) in outs.iter_mut().zip(factors).enumerate() {
                for (d, out) in out.iter_mut().enumerate().skip(whole) {
                    *out = o[d * PANEL + i] * factor;
                }
                if self.values.rotates() {
                    rotate(out);
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
    /// From the keys' first and last tokens and the rows' tokens in ascending order. Whole lanes of so many summands.
    fn new(bounds: &[(f32, f32)], row_token: &[f32], summands: usize) -> Self {
        let (Some(&low), Some(&high)) = (row_token.first(), row_token.last()) else {
            return Self { keys: 0..0, partly: false };
        };
        let visible = |&(first, last): &(f32, f32)| first <= high && last >= low;
        let start = bounds.iter().position(visible).unwrap_or(bounds.len());
        let end = bounds.iter().rposition(visible).map_or(start, |last| last + 1);
        let (start, end) = (start - start % summands, end.next_multiple_of(summands));
        let partly = bounds[start..end].iter().any(|&(first, last)| first > low || last < high);
        Self { keys: start..end, partly }
    }
}

/// Adds the values of the pairs that the mask keeps, one pair at a time.
#[cold]
fn add_pairs(
    row_token: &[f32],
    bounds: &[(f32, f32)],
    weight: impl Fn(usize, usize) -> f32,
    (value, dim): (impl Fn(usize, usize) -> f32, usize),
    o: &mut [f32],
) {
    for (key, &(first, last)) in bounds.iter().enumerate() {
        for (row, &token) in row_token.iter().enumerate() {
            if token < first || token > last {
                continue;
            }
            let weight = weight(key, row);
            for d in 0..dim {
                o[d * PANEL + row] += weight * value(key, d);
            }
        }
    }
}

/// Puts so many rows of zeros, which no query sees, after the first keys and values of a tile.
fn pad(
    count: usize,
    missing: usize,
    steps: usize,
    tiles: [&mut [f32]; 2],
    bounds: &mut [(f32, f32)],
) {
    for tile in tiles {
        tile[count * steps..(count + missing) * steps].fill(0.0);
    }
    bounds[count..count + missing].fill((f32::INFINITY, f32::NEG_INFINITY));
}

/// Hides the scores of rows whose token lies outside a key's bounds. The tokens of the first `rows` rows ascend; what
/// is left of a vector is padding.
#[inline(always)]
fn mask<S: Simd>(
    simd: S,
    (row_token, rows): (&[f32], usize),
    bounds: &[(f32, f32)],
    scores: &mut [f32],
) {
    let (Some(&low), Some(&high)) = (row_token[..rows].first(), row_token[..rows].last()) else {
        return;
    };
    let (row_token, _) = S::as_simd_f32s(row_token);
    let hidden = simd.splat_f32s(f32::NEG_INFINITY);
    for (scores, &(first, last)) in scores.chunks_exact_mut(PANEL).zip(bounds) {
        if first <= low && last >= high {
            continue;
        }
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
fn softmax<S: Simd, P: Products<S>>(
    simd: S,
    products: P,
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
        softmax_columns::<S, P, 4>(simd, products, at, scores, (max, sum), o);
        at += 4;
    }
    while max.len() > at {
        softmax_columns::<S, P, 1>(simd, products, at, scores, (max, sum), o);
        at += 1;
    }
}

/// [`softmax`] of the `C` vectors of rows from `at`.
#[inline(always)]
fn softmax_columns<S: Simd, P: Products<S>, const C: usize>(
    simd: S,
    products: P,
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
    // By number, as in `panels`, here and below.
    let mut new_max = *max;
    for row in scores.chunks_exact(stride) {
        let row = &row[at..at + C];
        for c in 0..C {
            new_max[c] = simd.max_f32s(new_max[c], row[c]);
        }
    }
    let total = products.weights(simd, at, scores, new_max);
    let mut correction = [simd.splat_f32s(0.0); C];
    for c in 0..C {
        correction[c] = exp2(simd, simd.sub_f32s(max[c], new_max[c]));
        sum[c] = simd.mul_add_e_f32s(sum[c], correction[c], total[c]);
    }
    *max = new_max;
    for row in o.chunks_exact_mut(stride) {
        for c in 0..C {
            row[at + c] = simd.mul_f32s(row[at + c], correction[c]);
        }
    }
}
