//! Influence and gradients of one sequence under causal attention to the `window` most recent keys, which are at
//! most the tokens. Tensors are
//! `[tokens, heads, vectors]`; `lse` and `delta` are `[tokens, query_heads]`.
//!
//! With `P = exp(S - lse)` and `G = dO . V`: `E = P / (1 - P) * (D - G)`, `dV = P^T dO`,
//! `dS = scale * P * (G - D)`, `dQ = dS K`, `dK = dS^T Q`.

use cubecl::prelude::*;

use super::none::holds_none_of;
use super::tile::{Rows, Stage, Tile};

/// Least value of `1 - P`.
const MIN_REST: f32 = 1e-6;

/// `D = dO . O` of each row, one unit each.
#[cube(launch_unchecked)]
pub(crate) fn row_dots<N: Size>(
    a: &[Vector<f32, N>],
    b: &[Vector<f32, N>],
    dots: &mut [f32],
    rows: u32,
    vectors: u32,
) {
    if ABSOLUTE_POS < rows as usize {
        let vectors = vectors as usize;
        let mut dot = 0.0f32;
        for column in 0..vectors {
            dot += a[ABSOLUTE_POS * vectors + column].dot(b[ABSOLUTE_POS * vectors + column]);
        }
        dots[ABSOLUTE_POS] = dot;
    }
}

/// Sums of influence over blocks of `block` queries by `block` keys and the query heads of a KV
/// head, `[kv_heads, blocks, blocks]`. Cubes: key blocks, query blocks, KV heads.
#[allow(clippy::too_many_arguments)]
#[cube(launch_unchecked)]
pub(crate) fn influence<N: Size>(
    q: &[Vector<f32, N>],
    k: &[Vector<f32, N>],
    v: &[Vector<f32, N>],
    d_out: &[Vector<f32, N>],
    lse: &[f32],
    delta: &[f32],
    blocks: &mut [f32],
    tokens: u32,
    query_heads: u32,
    kv_heads: u32,
    window: u32,
    block: u32,
    vectors: u32,
    absolute: u32,
    scale: f32,
    #[comptime] tile: Tile,
) {
    let vectors = vectors as usize;
    let x = UNIT_POS as usize % tile.units_x;
    let y = UNIT_POS as usize / tile.units_x;
    let kv_head = CUBE_POS_Z;
    let group = query_heads / kv_heads;
    let last_query = ((CUBE_POS_Y + 1) * block).min(tokens) - 1;
    let last_key = ((CUBE_POS_X + 1) * block).min(tokens) - 1;
    let mut stage = Stage::<N>::new(tile);
    let mut scores = Array::<f32>::new(comptime!(tile.unit_rows * tile.unit_keys));
    let mut grads = Array::<f32>::new(comptime!(tile.unit_rows * tile.unit_keys));
    let mut sum = 0.0f32;

    // Above the diagonal there is nothing.
    if CUBE_POS_X <= CUBE_POS_Y {
        for member in 0..group {
            let query_head = kv_head * group + member;
            let mut first_query = CUBE_POS_Y * block;
            while first_query <= last_query {
                let queries = Rows {
                    heads: query_heads,
                    head: query_head,
                    first: first_query,
                    last: last_query,
                };
                let end = last_key.min(first_query + comptime!(tile.rows() as u32 - 1));
                let mut first_key = CUBE_POS_X * block;
                while first_key <= end {
                    let keys =
                        Rows { heads: kv_heads, head: kv_head, first: first_key, last: last_key };
                    stage.products(&mut scores, q, &queries, k, &keys, vectors, tile);
                    stage.products(&mut grads, d_out, &queries, v, &keys, vectors, tile);
                    #[unroll]
                    for i in 0..tile.unit_rows {
                        let query = first_query + (y * tile.unit_rows + i) as u32;
                        let row = (query.min(last_query) * query_heads + query_head) as usize;
                        #[unroll]
                        for j in 0..tile.unit_keys {
                            let key = first_key + (x + j * tile.units_x) as u32;
                            let is_seen = (key < query) & (query < key + window);
                            if (query <= last_query) & (key <= last_key) & is_seen {
                                let at = i * tile.unit_keys + j;
                                let p = (scores[at] * scale - lse[row]).exp();
                                let rest = (1.0 - p).max(MIN_REST);
                                let e = p / rest * (delta[row] - grads[at]);
                                if absolute == 1 {
                                    sum += e.abs();
                                } else {
                                    sum += e;
                                }
                            }
                        }
                    }
                    first_key += comptime!(tile.keys() as u32);
                }
                first_query += comptime!(tile.rows() as u32);
            }
        }
    }
    let sum = stage.sum(sum, tile);
    if UNIT_POS == 0 {
        let side = CUBE_COUNT_X;
        blocks[((kv_head * side + CUBE_POS_Y) * side + CUBE_POS_X) as usize] = sum;
    }
}

/// Probability of a pair and `dO . V`, given where its rows start.
#[allow(clippy::too_many_arguments)]
#[cube]
fn pair<N: Size>(
    q: &[Vector<f32, N>],
    k: &[Vector<f32, N>],
    v: &[Vector<f32, N>],
    d_out: &[Vector<f32, N>],
    query: usize,
    key: usize,
    lse: f32,
    scale: f32,
    vectors: usize,
) -> (f32, f32) {
    let mut score = 0.0f32;
    let mut gain = 0.0f32;
    for d in 0..vectors {
        score += q[query + d].dot(k[key + d]);
        gain += d_out[query + d].dot(v[key + d]);
    }
    ((score * scale - lse).exp(), gain)
}

/// Gradient by queries. Cubes: tiles of queries, query heads.
#[allow(clippy::too_many_arguments)]
#[cube(launch_unchecked)]
pub(crate) fn query_gradient<N: Size>(
    q: &[Vector<f32, N>],
    k: &[Vector<f32, N>],
    v: &[Vector<f32, N>],
    d_out: &[Vector<f32, N>],
    lse: &[f32],
    delta: &[f32],
    d_q: &mut [Vector<f32, N>],
    tokens: u32,
    query_heads: u32,
    kv_heads: u32,
    window: u32,
    vectors: u32,
    scale: f32,
    #[comptime] tile: Tile,
    #[comptime] columns: usize,
) {
    let vectors = vectors as usize;
    let x = UNIT_POS as usize % tile.units_x;
    let y = UNIT_POS as usize / tile.units_x;
    let query_head = CUBE_POS_Y;
    let kv_head = query_head / (query_heads / kv_heads);
    let first = CUBE_POS_X * comptime!(tile.rows() as u32);
    let end = (first + comptime!(tile.rows() as u32)).min(tokens);
    let queries = Rows { heads: query_heads, head: query_head, first, last: end - 1 };
    let mut stage = Stage::<N>::new(tile);
    let mut scores = Array::<f32>::new(comptime!(tile.unit_rows * tile.unit_keys));
    let mut grads = Array::<f32>::new(comptime!(tile.unit_rows * tile.unit_keys));
    let mut sums = Array::<Vector<f32, N>>::new(comptime!(tile.unit_rows * columns));
    #[unroll]
    for at in 0..comptime!(tile.unit_rows * columns) {
        sums[at] = Vector::new(0.0);
    }

    let mut first_key = 0u32;
    while first_key < end {
        let keys = Rows { heads: kv_heads, head: kv_head, first: first_key, last: end - 1 };
        stage.products(&mut scores, q, &queries, k, &keys, vectors, tile);
        stage.products(&mut grads, d_out, &queries, v, &keys, vectors, tile);
        #[unroll]
        for i in 0..tile.unit_rows {
            let query = first + (y * tile.unit_rows + i) as u32;
            let row = (query.min(end - 1) * query_heads + query_head) as usize;
            #[unroll]
            for j in 0..tile.unit_keys {
                let key = first_key + (x + j * tile.units_x) as u32;
                let at = i * tile.unit_keys + j;
                let p = (scores[at] * scale - lse[row]).exp();
                let is_seen = (key <= query) & (query < key + window);
                let weight = select(is_seen, scale * p * (grads[at] - delta[row]), 0.0);
                stage.weigh(y * tile.unit_rows + i, x + j * tile.units_x, weight, tile);
            }
        }
        stage.accumulate(&mut sums, k, &keys, vectors, tile, columns);
        first_key += comptime!(tile.keys() as u32);
    }
    #[unroll]
    for i in 0..tile.unit_rows {
        let query = first + (y * tile.unit_rows + i) as u32;
        if (query < end) & holds_none_of::<N>(&sums, i * columns, columns) {
            let row = (query * query_heads + query_head) as usize;
            let mut anew = Array::<Vector<f32, N>>::new(columns);
            #[unroll]
            for c in 0..columns {
                anew[c] = Vector::new(0.0);
            }
            let mut key = 0u32;
            while key <= query {
                if query < key + window {
                    let own = (key * kv_heads + kv_head) as usize * vectors;
                    let (p, gain) =
                        pair(q, k, v, d_out, row * vectors, own, lse[row], scale, vectors);
                    #[unroll]
                    for c in 0..columns {
                        let column = (c * tile.units_x + x).min(vectors - 1);
                        anew[c] += k[own + column] * Vector::new(scale * p * (gain - delta[row]));
                    }
                }
                key += 1;
            }
            if key > query {
                #[unroll]
                for c in 0..columns {
                    sums[i * columns + c] = anew[c];
                }
            }
        }
        #[unroll]
        for c in 0..columns {
            let column = c * tile.units_x + x;
            if query < end && column < vectors {
                let row = (query * query_heads + query_head) as usize;
                d_q[row * vectors + column] = sums[i * columns + c];
            }
        }
    }
}

/// Gradient by keys, or by values. Cubes: tiles of keys, KV heads.
#[allow(clippy::too_many_arguments)]
#[cube(launch_unchecked)]
pub(crate) fn key_gradient<N: Size>(
    q: &[Vector<f32, N>],
    k: &[Vector<f32, N>],
    v: &[Vector<f32, N>],
    d_out: &[Vector<f32, N>],
    lse: &[f32],
    delta: &[f32],
    d_key: &mut [Vector<f32, N>],
    tokens: u32,
    query_heads: u32,
    kv_heads: u32,
    window: u32,
    vectors: u32,
    scale: f32,
    #[comptime] by_values: bool,
    #[comptime] tile: Tile,
    #[comptime] columns: usize,
) {
    let vectors = vectors as usize;
    let x = UNIT_POS as usize % tile.units_x;
    let y = UNIT_POS as usize / tile.units_x;
    let kv_head = CUBE_POS_Y;
    let group = query_heads / kv_heads;
    let first = CUBE_POS_X * comptime!(tile.rows() as u32);
    let end = (first + comptime!(tile.rows() as u32)).min(tokens);
    let keys = Rows { heads: kv_heads, head: kv_head, first, last: end - 1 };
    let mut stage = Stage::<N>::new(tile);
    let mut scores = Array::<f32>::new(comptime!(tile.unit_rows * tile.unit_keys));
    let mut grads = Array::<f32>::new(comptime!(tile.unit_rows * tile.unit_keys));
    let mut sums = Array::<Vector<f32, N>>::new(comptime!(tile.unit_rows * columns));
    #[unroll]
    for at in 0..comptime!(tile.unit_rows * columns) {
        sums[at] = Vector::new(0.0);
    }

    for member in 0..group {
        let query_head = kv_head * group + member;
        let mut first_query = first;
        while first_query < tokens {
            let queries =
                Rows { heads: query_heads, head: query_head, first: first_query, last: tokens - 1 };
            stage.products(&mut scores, k, &keys, q, &queries, vectors, tile);
            if comptime!(!by_values) {
                stage.products(&mut grads, v, &keys, d_out, &queries, vectors, tile);
            }
            #[unroll]
            for i in 0..tile.unit_rows {
                let key = first + (y * tile.unit_rows + i) as u32;
                #[unroll]
                for j in 0..tile.unit_keys {
                    let query = first_query + (x + j * tile.units_x) as u32;
                    let row = (query.min(tokens - 1) * query_heads + query_head) as usize;
                    let at = i * tile.unit_keys + j;
                    let mut weight = (scores[at] * scale - lse[row]).exp();
                    if comptime!(!by_values) {
                        weight *= scale * (grads[at] - delta[row]);
                    }
                    let is_seen = (query < tokens) & (key <= query) & (query < key + window);
                    let weight = select(is_seen, weight, 0.0);
                    stage.weigh(y * tile.unit_rows + i, x + j * tile.units_x, weight, tile);
                }
            }
            if comptime!(by_values) {
                stage.accumulate(&mut sums, d_out, &queries, vectors, tile, columns);
            } else {
                stage.accumulate(&mut sums, q, &queries, vectors, tile, columns);
            }
            first_query += comptime!(tile.keys() as u32);
        }
    }
    #[unroll]
    for i in 0..tile.unit_rows {
        let key = first + (y * tile.unit_rows + i) as u32;
        if (key < end) & holds_none_of::<N>(&sums, i * columns, columns) {
            let own = (key * kv_heads + kv_head) as usize * vectors;
            let mut anew = Array::<Vector<f32, N>>::new(columns);
            #[unroll]
            for c in 0..columns {
                anew[c] = Vector::new(0.0);
            }
            let last = (key + window).min(tokens) * group;
            let mut at = key * group;
            while at < last {
                let query = (at / group * query_heads + kv_head * group + at % group) as usize;
                let (p, gain) =
                    pair(q, k, v, d_out, query * vectors, own, lse[query], scale, vectors);
                #[unroll]
                for c in 0..columns {
                    let column = (c * tile.units_x + x).min(vectors - 1);
                    if comptime!(by_values) {
                        anew[c] += d_out[query * vectors + column] * Vector::new(p);
                    } else {
                        let weight = scale * p * (gain - delta[query]);
                        anew[c] += q[query * vectors + column] * Vector::new(weight);
                    }
                }
                at += 1;
            }
            if at == last {
                #[unroll]
                for c in 0..columns {
                    sums[i * columns + c] = anew[c];
                }
            }
        }
        #[unroll]
        for c in 0..columns {
            let column = c * tile.units_x + x;
            if key < end && column < vectors {
                let own = (key * kv_heads + kv_head) as usize * vectors;
                d_key[own + column] = sums[i * columns + c];
            }
        }
    }
}
