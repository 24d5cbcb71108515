use cubecl::prelude::*;

use super::blocks::{Blocks, CHUNK, PLANE, SIDE, Words, any, lane, pack, partner, plane, sync};
use super::fragments::{Fragments, own};
use super::keys::{Head, Keys, attends, head, keys, position, slot};
use super::none::holds_none;
use super::scores::capped;
use super::words::widen_word;
use crate::Dtype;

/// Score of a key that a row does not see. Finite: the difference of two of them is a number.
const MASKED: f32 = -1e30;

/// The reference that is subtracted before exponentiating follows the maximum only when that has grown by
/// more than this, 8 bits: weights stay far below what a half holds, and sums are hardly ever rescaled.
const SLACK: f32 = 5.545_177_5;

/// Four elements.
type Floats = Vector<f32, Const<4>>;

/// Attention of one sequence's many new tokens over its cache and over themselves, f16 alike: as
/// [`super::attend`] without splits, with queries and weights rounded to f16 and products summed in f32.
/// Cubes: tiles of rows from the last one on, the store's heads.
#[allow(clippy::too_many_arguments)]
#[cube(launch_unchecked)]
pub(crate) fn prefill(
    q: &[Vector<f32, Const<4>>],
    k: &[Vector<u32, Const<4>>],
    v: &[Vector<u32, Const<4>>],
    cached_k: &[Vector<u32, Const<4>>],
    cached_v: &[Vector<u32, Const<4>>],
    table: &[u32],
    out: &mut [Vector<f32, Const<4>>],
    stats: &mut [f32],
    first: u32,
    tokens: u32,
    len: u32,
    query_heads: u32,
    kv_heads: u32,
    scale: f32,
    cap: f32,
    #[comptime] blocks: Blocks,
    #[comptime] has_cap: bool,
) {
    let tile_keys = comptime!(blocks.keys as u32);
    let stride = comptime!(blocks.scratch_stride());
    let mut staged_k = Shared::<[Words]>::new_slice(comptime!(blocks.keys * blocks.key_stride()));
    let mut staged_v = Shared::<[Words]>::new_slice(comptime!(blocks.keys * blocks.key_stride()));
    let mut scratch = Shared::<[Words]>::new_slice(comptime!(blocks.scratch()));
    let mut exchange = Shared::<[f32]>::new_slice(comptime!(blocks.units()));

    let (lane, plane) = (lane(blocks), plane(blocks));
    let at = plane * comptime!(SIDE * blocks.scratch_stride());
    let head = head(table, CUBE_POS_Y);
    let kv_head = head.number;
    let group = query_heads / kv_heads;
    let rows = tokens * group;
    // The last tile sees the most keys: it starts first.
    let tiles = rows.div_ceil(comptime!(blocks.rows() as u32));
    let first_row = (tiles - 1 - CUBE_POS_X) * comptime!(blocks.rows() as u32);
    let last_row = (first_row + comptime!(blocks.rows() as u32)).min(rows) - 1;
    let plane_row = first_row + (plane * SIDE) as u32;

    let keys = keys(&head, len + first_row / group, len + last_row / group + 1);
    let source = Source { first, len, kv_heads, kv_head, head, keys };

    let mut fragments = Fragments::new(blocks);
    #[unroll]
    for chunk in 0..comptime!(blocks.dim / CHUNK) {
        #[unroll]
        for i in 0..comptime!(SIDE * CHUNK / 8 / PLANE) {
            let number = lane + comptime!(i * PLANE);
            let column = number % comptime!(CHUNK / 8);
            // Rows beyond the last one repeat it and are not written.
            let row = (plane_row + (number / comptime!(CHUNK / 8)) as u32).min(last_row);
            let row = (first + row / group) * query_heads + kv_head * group + row % group;
            let from = row as usize * comptime!(blocks.dim / 4)
                + comptime!(chunk * CHUNK / 4)
                + 2 * column;
            let (low, high) = (q[from], q[from + 1]);
            let mut words = Words::new(0);
            #[unroll]
            for w in 0..2usize {
                let (left, right) = comptime!((2 * w, 2 * w + 1));
                words.insert(w, pack(low.extract(left), low.extract(right), blocks));
                let to = comptime!(w + 2);
                words.insert(to, pack(high.extract(left), high.extract(right), blocks));
            }
            scratch[at + number / comptime!(CHUNK / 8) * stride + column] = words;
        }
        sync(blocks);
        fragments.load_queries(&scratch, at, chunk, blocks);
        sync(blocks);
    }

    let own_row = (plane_row + (lane / 2) as u32).min(last_row);
    let query = len + own_row / group;
    // Of the plane's rows.
    let first_query = len + plane_row.min(last_row) / group;
    let last_query = len + (plane_row + comptime!(SIDE as u32 - 1)).min(last_row) / group;
    let mut reference = MASKED.runtime();
    let mut sum = 0.0f32;

    let mut next = Staged::new(blocks);
    next.load(k, v, cached_k, cached_v, &source, 0u32, blocks);
    let mut base = 0u32;
    while base < source.keys.count {
        // The tile before was read.
        sync_cube();
        next.store(&mut staged_k, &mut staged_v, blocks);
        sync_cube();
        // Beside the products.
        if base + tile_keys < source.keys.count {
            next.load(k, v, cached_k, cached_v, &source, base + tile_keys, blocks);
        }

        fragments.scores(&staged_k, &mut scratch, at, blocks);
        sync(blocks);
        let half = comptime!(blocks.keys / 2);
        let row = at + lane / 2 * stride;
        let mut scores = Array::<f32>::new(half);
        #[unroll]
        for i in 0..comptime!(blocks.keys / 8) {
            let bits = scratch[row + lane % 2 * comptime!(blocks.keys / 8) + i];
            #[unroll]
            for j in 0..4usize {
                let score = f32::from_bits(bits.extract(j)) * scale;
                scores[comptime!(4 * i + j)] = capped(score, cap, has_cap);
            }
        }
        let last_key = position(&source.keys, (base + tile_keys - 1).min(source.keys.count - 1));
        let all_within = (last_query < position(&source.keys, base) + source.head.window)
            | (last_key < source.head.sink);
        let full = (base + tile_keys <= source.keys.count) & (last_key <= first_query) & all_within;
        if !full {
            #[unroll]
            for i in 0..half {
                let number = base + (lane % 2 * half + i) as u32;
                let seen = (number < source.keys.count)
                    & attends(&source.head, query, position(&source.keys, number));
                scores[i] = select(seen, scores[i], MASKED);
            }
        }
        let mut top = scores[0];
        #[unroll]
        for i in 1..half {
            top = top.max(scores[i]);
        }
        top = top.max(partner(top, &mut exchange, blocks));
        let grown = top > reference + SLACK;
        let moved = select(grown, top, reference);
        // A row that has seen no key yet: any reference that is a number gives weights of 0.
        let subtracted = select(moved == MASKED, 0.0f32, moved);
        let factor = (reference - subtracted).exp();
        reference = moved;
        sum *= factor;
        #[unroll]
        for i in 0..half {
            scores[i] = (scores[i] - subtracted).exp();
            sum += scores[i];
        }
        // Scores were read.
        sync(blocks);
        if any(grown & (base > 0), blocks) {
            fragments.rescale(factor, &mut scratch, at, blocks);
        }
        #[unroll]
        for i in 0..comptime!(blocks.keys / 16) {
            let mut words = Words::new(0);
            #[unroll]
            for j in 0..4usize {
                let from = comptime!(8 * i + 2 * j);
                words.insert(j, pack(scores[from], scores[comptime!(from + 1)], blocks));
            }
            scratch[row + lane % 2 * comptime!(blocks.keys / 16) + i] = words;
        }
        sync(blocks);
        fragments.accumulate(&staged_v, &scratch, at, blocks);
        base += tile_keys;
    }

    // Weights were read.
    sync(blocks);
    sum += partner(sum, &mut exchange, blocks);
    let row = plane_row + (lane / 2) as u32;
    let to = ((first + own_row / group) * query_heads + kv_head * group + own_row % group) as usize;
    if row < rows && lane % 2 == 0 {
        stats[to] = reference + sum.ln();
    }
    let share = 1.0 / sum;
    #[unroll]
    for chunk in 0..comptime!(blocks.dim / CHUNK) {
        fragments.store_output(&mut scratch, at, chunk, blocks);
        sync(blocks);
        if row < rows {
            let to = to * comptime!(blocks.dim / 4)
                + comptime!(chunk * CHUNK / 4)
                + lane % 2 * comptime!(CHUNK / 8);
            #[unroll]
            for i in 0..comptime!(CHUNK / 8) {
                let bits = scratch[own(at, blocks) + i];
                let mut floats = Floats::new(0.0);
                #[unroll]
                for w in 0..4usize {
                    floats.insert(w, f32::from_bits(bits.extract(w)) * share);
                }
                out[to + i] = floats;
            }
        }
        sync(blocks);
    }
    if row < rows {
        let q_row = to * comptime!(blocks.dim / 4);
        for own in 0..comptime!(blocks.dim / 8) {
            let column = own / comptime!(CHUNK / 8) * comptime!(CHUNK / 4)
                + lane % 2 * comptime!(CHUNK / 8)
                + own % comptime!(CHUNK / 8);
            if holds_none::<Const<4>>(out[q_row + column]) {
                let mut anew = Floats::new(0.0);
                let mut number = 0u32;
                while number < source.keys.count {
                    let key = position(&source.keys, number);
                    if attends(&source.head, query, key) {
                        let mut score = 0.0f32;
                        #[unroll]
                        for d in 0..comptime!(blocks.dim / 4) {
                            score += q[q_row + d].dot(source.four(k, cached_k, key, d, blocks));
                        }
                        let score = capped(score * scale, cap, has_cap);
                        let weight = (score - reference).exp();
                        let value = source.four(v, cached_v, key, column, blocks);
                        anew += value * Floats::new(weight);
                    }
                    number += 1;
                }
                if number == source.keys.count {
                    out[q_row + column] = anew * Floats::new(share);
                }
            }
        }
    }
}

/// Where a tile's keys come from.
#[derive(CubeType, Clone, Copy)]
struct Source {
    first: u32,
    len: u32,
    kv_heads: u32,
    kv_head: u32,
    head: Head,
    keys: Keys,
}

#[cube]
impl Source {
    /// Four elements of the row at a position.
    #[allow(clippy::manual_is_multiple_of)]
    fn four(
        &self,
        new: &[Words],
        cached: &[Words],
        position: u32,
        column: usize,
        #[comptime] blocks: Blocks,
    ) -> Floats {
        let row_words = comptime!(blocks.dim / 8);
        let words = if position >= self.len {
            let row = (self.first + position - self.len) * self.kv_heads + self.kv_head;
            new[row as usize * row_words + column / 2]
        } else {
            cached[slot(&self.head, position) as usize * row_words + column / 2]
        };
        let mut four = Floats::new(0.0);
        #[unroll]
        for i in 0..2usize {
            let (low, high) = (words.extract(i), words.extract(comptime!(i + 2)));
            let word = select(column % 2 == 0, low, high);
            four.insert(comptime!(2 * i), widen_word(word, 0usize, Dtype::F16, false));
            four.insert(comptime!(2 * i + 1), widen_word(word, 1usize, Dtype::F16, false));
        }
        four
    }
}

/// A unit's share of a tile's keys and values on their way to shared memory.
#[derive(CubeType)]
struct Staged {
    keys: Array<Words>,
    values: Array<Words>,
}

#[cube]
impl Staged {
    fn new(#[comptime] blocks: Blocks) -> Self {
        let share = comptime!((blocks.keys * blocks.dim / 8).div_ceil(blocks.units()));
        Staged { keys: Array::<Words>::new(share), values: Array::<Words>::new(share) }
    }

    /// Loads from key number `base` on.
    #[allow(clippy::too_many_arguments)]
    fn load(
        &mut self,
        k: &[Words],
        v: &[Words],
        cached_k: &[Words],
        cached_v: &[Words],
        source: &Source,
        base: u32,
        #[comptime] blocks: Blocks,
    ) {
        let share = comptime!((blocks.keys * blocks.dim / 8).div_ceil(blocks.units()));
        let row_words = comptime!(blocks.dim / 8);
        #[unroll]
        for i in 0..share {
            let at = UNIT_POS as usize + comptime!(i * blocks.units());
            // Keys beyond the last one repeat it with weight 0, so that nothing unwritten is read.
            let number = (base + (at / row_words) as u32).min(source.keys.count - 1);
            let position = position(&source.keys, number);
            let column = at % row_words;
            if position >= source.len {
                let token = source.first + position - source.len;
                let row = token * source.kv_heads + source.kv_head;
                let from = row as usize * row_words + column;
                self.keys[i] = k[from];
                self.values[i] = v[from];
            } else {
                let from = slot(&source.head, position) as usize * row_words + column;
                self.keys[i] = cached_k[from];
                self.values[i] = cached_v[from];
            }
        }
    }

    fn store(
        &self,
        keys: &mut Shared<[Words]>,
        values: &mut Shared<[Words]>,
        #[comptime] blocks: Blocks,
    ) {
        let share = comptime!((blocks.keys * blocks.dim / 8).div_ceil(blocks.units()));
        let row_words = comptime!(blocks.dim / 8);
        #[unroll]
        for i in 0..share {
            let at = UNIT_POS as usize + comptime!(i * blocks.units());
            if comptime!((i + 1) * blocks.units() <= blocks.keys * blocks.dim / 8)
                || at < comptime!(blocks.keys * blocks.dim / 8)
            {
                let to = at / row_words * comptime!(blocks.key_stride()) + at % row_words;
                keys[to] = self.keys[i];
                values[to] = self.values[i];
            }
        }
    }
}
