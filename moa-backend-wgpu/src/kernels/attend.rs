use cubecl::prelude::*;
use moa_core::{CacheType, RowType};

use super::codes::{codes, scale as scale_in};
use super::keys::{Head, attends, head, keys, position, slot, split_keys};
use super::none::holds_none_of;
use super::scores::capped;
use super::tile::Tile;
use super::words::widen;

/// What a kernel is compiled for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Shape {
    pub(crate) tile: Tile,
    /// Vectors of an output row that are one unit's.
    pub(crate) columns: usize,
    /// How the store holds keys and values.
    pub(crate) own: CacheType,
    /// Whether several cubes share the keys of a tile and leave partial results.
    pub(crate) partial: bool,
    /// Whether scores have a softcap.
    pub(crate) has_cap: bool,
}

/// Set in the row number of a key that is not in the cache yet.
const NEW: u32 = 1 << 31;

/// Score of a key that a row does not see. Finite: the difference of two of them is a number.
const MASKED: f32 = -1e30;

/// Attention of one sequence's new tokens over its cache and over themselves. Cubes: tiles of rows,
/// the store's heads, splits of the keys.
///
/// `q` and `out` are `[batch tokens, query_heads, vectors]`, `k` and `v` alike with `kv_heads`
/// in the words of the cache, of which the sequence has `tokens` from `first` on; of narrow rows, `scales` is the word of
/// `k` where their scales start. `stats` is the log-sum-exp of each row. Of
/// partial results, `out` is `[heads, splits, rows, vectors]` without the division by the sum,
/// and `stats` holds each row's (maximum, sum).
#[allow(clippy::too_many_arguments)]
#[cube(launch_unchecked)]
pub(crate) fn attend<N: Size, M: Size>(
    q: &[Vector<f32, N>],
    k: &[Vector<u32, M>],
    v: &[Vector<u32, M>],
    cached_k: &[Vector<u32, M>],
    cached_v: &[Vector<u32, M>],
    table: &[u32],
    out: &mut [Vector<f32, N>],
    stats: &mut [f32],
    first: u32,
    tokens: u32,
    len: u32,
    query_heads: u32,
    kv_heads: u32,
    vectors: u32,
    scale: f32,
    cap: f32,
    scales: u32,
    #[comptime] shape: Shape,
) {
    let (keys_held, values_held) = comptime!((shape.own.keys(), shape.own.values()));
    let narrow = comptime!(keys_held.is_narrow());
    let tile = comptime!(shape.tile);
    let tile_keys = comptime!(shape.tile.keys());
    let unit_rows = comptime!(tile.unit_rows);
    let unit_keys = comptime!(tile.unit_keys);
    let units_x = comptime!(tile.units_x);
    let units = comptime!(tile.units());
    let depth = comptime!(tile.depth);
    let staged = comptime!(tile.staged());
    let columns = comptime!(shape.columns);
    let vectors = vectors as usize;
    let weights_row = comptime!(tile.keys() + 1);

    let mut left = Shared::<[Vector<f32, N>]>::new_slice(comptime!(tile.left()));
    let mut right = Shared::<[Vector<f32, N>]>::new_slice(comptime!(tile.right()));
    let mut weights = Shared::<[f32]>::new_slice(comptime!(tile.weights()));
    let mut key_rows = Shared::<[u32]>::new_slice(comptime!(tile.keys()));
    let mut key_scales =
        Shared::<[u32]>::new_slice(comptime!(if narrow { tile.keys() } else { 1 }));

    let unit = UNIT_POS as usize;
    let x = unit % units_x;
    let y = unit / units_x;
    let head = head(table, CUBE_POS_Y);
    let kv_head = head.number;
    let group = query_heads / kv_heads;
    let rows = tokens * group;
    let first_row = CUBE_POS_X * comptime!(tile.rows() as u32);
    let last_row = (first_row + comptime!(tile.rows() as u32)).min(rows) - 1;

    let keys = keys(&head, len + first_row / group, len + last_row / group + 1);
    let mut from = 0u32;
    let mut to = keys.count;
    if comptime!(shape.partial) {
        let share = split_keys(keys.count);
        from = CUBE_POS_Z * share;
        to = (from + share).min(keys.count);
    }
    // A head with fewer splits than another one.
    if from >= to {
        terminate!();
    }

    let mut queries = Array::<u32>::new(unit_rows);
    let mut maximum = Array::<f32>::new(unit_rows);
    let mut sum = Array::<f32>::new(unit_rows);
    let mut output = Array::<Vector<f32, N>>::new(comptime!(tile.unit_rows * shape.columns));
    let mut scores = Array::<f32>::new(comptime!(tile.unit_rows * tile.unit_keys));
    #[unroll]
    for i in 0..unit_rows {
        // Rows beyond the last one repeat it and are not written.
        let row = (first_row + (y * unit_rows + i) as u32).min(last_row);
        queries[i] = len + row / group;
        maximum[i] = MASKED;
        sum[i] = 0.0;
        #[unroll]
        for c in 0..columns {
            output[i * columns + c] = Vector::new(0.0);
        }
    }

    let mut base = from;
    while base < to {
        // The tile before was read.
        sync_cube();
        let mut at = unit;
        while at < tile_keys {
            // Keys beyond the last one repeat it with weight 0, so that nothing unwritten is read.
            let position = position(&keys, (base + at as u32).min(to - 1));
            let row = row_of(&head, position, first, len, kv_heads);
            key_rows[at] = row;
            if comptime!(narrow) {
                key_scales[at] = scales_of::<M>(k, cached_k, &head, row, scales);
            }
            at += units;
        }
        #[unroll]
        for s in 0..comptime!(tile.unit_rows * tile.unit_keys) {
            scores[s] = 0.0;
        }

        for chunk in 0..vectors.div_ceil(depth) {
            sync_cube();
            let mut at = unit;
            while at < comptime!(tile.rows() * tile.depth) {
                let column = chunk * depth + at % depth;
                let row = (first_row + (at / depth) as u32).min(last_row);
                let mut value = Vector::<f32, N>::new(0.0);
                if column < vectors {
                    let token = first + row / group;
                    let query_head = kv_head * group + row % group;
                    value = q[(token * query_heads + query_head) as usize * vectors + column];
                }
                left[at / depth * staged + at % depth] = value;
                at += units;
            }
            let mut at = unit;
            while at < comptime!(tile.keys() * tile.depth) {
                let column = chunk * depth + at % depth;
                let mut value = Vector::<f32, N>::new(0.0);
                if column < vectors {
                    value =
                        load::<N, M>(k, cached_k, key_rows[at / depth], column, vectors, keys_held);
                    if comptime!(narrow) {
                        value *= Vector::new(scale_in(key_scales[at / depth], false));
                    }
                }
                right[at / depth * staged + at % depth] = value;
                at += units;
            }
            sync_cube();
            // Not unrolled: drivers do that where it helps, and compile much less.
            for d in 0..depth {
                let mut held = Array::<Vector<f32, N>>::new(unit_keys);
                #[unroll]
                for j in 0..unit_keys {
                    held[j] = right[(x + j * units_x) * staged + d];
                }
                #[unroll]
                for i in 0..unit_rows {
                    let query = left[(y * unit_rows + i) * staged + d];
                    #[unroll]
                    for j in 0..unit_keys {
                        scores[i * unit_keys + j] += query.dot(held[j]);
                    }
                }
            }
        }

        let mut best = Array::<f32>::new(unit_rows);
        #[unroll]
        for i in 0..unit_rows {
            best[i] = maximum[i];
        }
        #[unroll]
        for j in 0..unit_keys {
            let number = base + (x + j * units_x) as u32;
            let key = position(&keys, number);
            #[unroll]
            for i in 0..unit_rows {
                let seen = (number < to) & attends(&head, queries[i], key);
                let score = capped(scores[i * unit_keys + j] * scale, cap, shape.has_cap);
                let score = select(seen, score, MASKED);
                scores[i * unit_keys + j] = score;
                best[i] = best[i].max(score);
            }
        }
        #[unroll]
        for i in 0..unit_rows {
            weights[(y * unit_rows + i) * weights_row + x] = best[i];
        }
        sync_cube();
        let mut rescale = Array::<f32>::new(unit_rows);
        #[unroll]
        for i in 0..unit_rows {
            let mut largest = maximum[i];
            for other in 0..units_x {
                largest = largest.max(weights[(y * unit_rows + i) * weights_row + other]);
            }
            rescale[i] = (maximum[i] - largest).exp();
            maximum[i] = largest;
        }
        sync_cube();
        #[unroll]
        for i in 0..unit_rows {
            sum[i] *= rescale[i];
            #[unroll]
            for j in 0..unit_keys {
                let score = scores[i * unit_keys + j];
                // A score that is no number is no weight either.
                let weight = select(score == MASKED, 0.0, (score - maximum[i]).exp());
                sum[i] += weight;
                weights[(y * unit_rows + i) * weights_row + x + j * units_x] = weight;
            }
            #[unroll]
            for c in 0..columns {
                output[i * columns + c] *= Vector::new(rescale[i]);
            }
        }
        sync_cube();

        #[unroll]
        for c in 0..columns {
            let column = c * units_x + x;
            if comptime!(tile.units_y <= 4) {
                // So few units read a value that the device's cache shares it.
                if column < vectors {
                    for key in 0..tile_keys {
                        let mut value =
                            load::<N, M>(v, cached_v, key_rows[key], column, vectors, values_held);
                        if comptime!(narrow) {
                            value *= Vector::new(scale_in(key_scales[key], true));
                        }
                        #[unroll]
                        for i in 0..unit_rows {
                            let weight = weights[(y * unit_rows + i) * weights_row + key];
                            output[i * columns + c] += value * Vector::new(weight);
                        }
                    }
                }
            } else {
                for block in 0..comptime!(tile.keys().div_ceil(tile.units_y)) {
                    let first_key = block * tile.units_y;
                    let mut value = Vector::<f32, N>::new(0.0);
                    if column < vectors && first_key + y < tile_keys {
                        value = load::<N, M>(
                            v,
                            cached_v,
                            key_rows[first_key + y],
                            column,
                            vectors,
                            values_held,
                        );
                        if comptime!(narrow) {
                            value *= Vector::new(scale_in(key_scales[first_key + y], true));
                        }
                    }
                    right[unit] = value;
                    sync_cube();
                    for key in 0..comptime!(tile.units_y) {
                        if first_key + key < tile_keys {
                            let value = right[key * units_x + x];
                            #[unroll]
                            for i in 0..unit_rows {
                                let row = (y * unit_rows + i) * weights_row;
                                let weight = weights[row + first_key + key];
                                output[i * columns + c] += value * Vector::new(weight);
                            }
                        }
                    }
                    sync_cube();
                }
            }
        }
        base += comptime!(tile.keys() as u32);
    }

    sync_cube();
    #[unroll]
    for i in 0..unit_rows {
        weights[(y * unit_rows + i) * weights_row + x] = sum[i];
    }
    sync_cube();
    #[unroll]
    for i in 0..unit_rows {
        let row = first_row + (y * unit_rows + i) as u32;
        let mut total = 0.0f32;
        for other in 0..units_x {
            total += weights[(y * unit_rows + i) * weights_row + other];
        }
        if row < rows {
            let at = if comptime!(shape.partial) {
                (CUBE_POS_Y * CUBE_COUNT_Z + CUBE_POS_Z) * rows + row
            } else {
                (first + row / group) * query_heads + kv_head * group + row % group
            };
            let mut factor = 1.0f32;
            if comptime!(!shape.partial) {
                factor /= total;
            }
            if x == 0 {
                if comptime!(shape.partial) {
                    stats[2 * at as usize] = maximum[i];
                    stats[2 * at as usize + 1] = total;
                } else {
                    stats[at as usize] = maximum[i] + total.ln();
                }
            }
            if holds_none_of::<N>(&output, i * columns, columns) {
                let token = first + row / group;
                let query = (token * query_heads + kv_head * group + row % group) as usize;
                let mut anew = Array::<Vector<f32, N>>::new(columns);
                #[unroll]
                for c in 0..columns {
                    anew[c] = Vector::new(0.0);
                }
                let mut number = from;
                while number < to {
                    let key = position(&keys, number);
                    if attends(&head, queries[i], key) {
                        let key = row_of(&head, key, first, len, kv_heads);
                        let mut score = 0.0f32;
                        for d in 0..vectors {
                            let key = load::<N, M>(k, cached_k, key, d, vectors, keys_held);
                            score += q[query * vectors + d].dot(key);
                        }
                        let mut step = 1.0f32;
                        if comptime!(narrow) {
                            let both = scales_of::<M>(k, cached_k, &head, key, scales);
                            score *= scale_in(both, false);
                            step *= scale_in(both, true);
                        }
                        let score = capped(score * scale, cap, shape.has_cap);
                        let weight = step * (score - maximum[i]).exp();
                        #[unroll]
                        for c in 0..columns {
                            let column = (c * units_x + x).min(vectors - 1);
                            let value =
                                load::<N, M>(v, cached_v, key, column, vectors, values_held);
                            anew[c] += value * Vector::new(weight);
                        }
                    }
                    number += 1;
                }
                if number == to {
                    #[unroll]
                    for c in 0..columns {
                        output[i * columns + c] = anew[c];
                    }
                }
            }
            #[unroll]
            for c in 0..columns {
                let column = c * units_x + x;
                if column < vectors {
                    out[at as usize * vectors + column] =
                        output[i * columns + c] * Vector::new(factor);
                }
            }
        }
    }
}

/// The row of the key at a position, with [`NEW`] where it is not cached.
#[cube]
fn row_of(head: &Head, position: u32, first: u32, len: u32, kv_heads: u32) -> u32 {
    if position >= len {
        ((first + position - len) * kv_heads + head.number) | NEW
    } else {
        slot(head, position)
    }
}

/// The word of a narrow row's scales.
#[cube]
fn scales_of<M: Size>(
    new: &[Vector<u32, M>],
    cached: &[Vector<u32, M>],
    head: &Head,
    row: u32,
    scales: u32,
) -> u32 {
    if row >= NEW {
        new[(scales + row - NEW) as usize].extract(0usize)
    } else {
        cached[(head.scales + row - head.offset) as usize].extract(0usize)
    }
}

/// A vector of a key or value, new or cached, without its scale.
#[cube]
fn load<N: Size, M: Size>(
    new: &[Vector<u32, M>],
    cached: &[Vector<u32, M>],
    row: u32,
    column: usize,
    vectors: usize,
    #[comptime] own: RowType,
) -> Vector<f32, N> {
    match own {
        RowType::Plain(dtype) => widen::<N, M>(fetch(new, cached, row, column, vectors), dtype),
        RowType::Int4 => {
            // Elements of the row's second half are the high halves of the first's bytes.
            let half = vectors / 2;
            let upper = column >= half;
            let at = select(upper, column - half, column);
            let word = fetch(new, cached, row, at, half).extract(0usize);
            spread::<N>(word, select(upper, 4u32, 0u32), own)
        }
        _ => {
            let word = fetch(new, cached, row, column, vectors).extract(0usize);
            spread::<N>(word, 0u32.runtime(), own)
        }
    }
}

#[cube]
fn fetch<M: Size>(
    new: &[Vector<u32, M>],
    cached: &[Vector<u32, M>],
    row: u32,
    column: usize,
    vectors: usize,
) -> Vector<u32, M> {
    if row >= NEW {
        new[(row - NEW) as usize * vectors + column]
    } else {
        cached[row as usize * vectors + column]
    }
}

/// A word's four codes, as a vector of the kernel's four.
#[cube]
fn spread<N: Size>(word: u32, up: u32, #[comptime] own: RowType) -> Vector<f32, N> {
    let four = codes(word, up, own);
    let mut wide = Vector::<f32, N>::new(0.0);
    #[unroll]
    for i in 0..N::value() {
        wide.insert(i, four.extract(i));
    }
    wide
}
