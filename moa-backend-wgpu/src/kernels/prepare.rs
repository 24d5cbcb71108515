//! What surrounds attention on narrow rows: new keys and values become codes, queries are rotated, and outputs are
//! rotated back.

use cubecl::prelude::*;
use moa_core::{CacheType, RowType};

use super::codes::{code_of, scale_of};
use super::keys::head;
use crate::MAX_HEAD_DIM;

/// Units of a cube, which share a row.
pub(crate) const ROW_UNITS: usize = 64;

/// Rounds `rows` new keys and values to codes, and rotates `query_rows` queries. Cubes: the rows, then the queries.
///
/// `keys` and `values` are rows of words; after the keys comes a word of scales for each row. `block` is
/// [`moa_core::rotation`] of `dim`. `feedback` is [`moa_core::key_feedback`] of each KV head, where keys have it.
#[allow(clippy::too_many_arguments)]
#[cube(launch_unchecked)]
pub(crate) fn prepare(
    q: &[f32],
    k: &[f32],
    v: &[f32],
    feedback: &[f32],
    rotated: &mut [f32],
    keys: &mut [u32],
    values: &mut [u32],
    rows: u32,
    query_rows: u32,
    kv_heads: u32,
    dim: u32,
    block: u32,
    key_words: u32,
    value_words: u32,
    #[comptime] own: CacheType,
    #[comptime] has_feedback: bool,
) {
    let mut staged = Shared::<[f32]>::new_slice(MAX_HEAD_DIM);
    let mut sizes = Shared::<[u32]>::new_slice(ROW_UNITS);
    let row = CUBE_POS_Y * CUBE_COUNT_X + CUBE_POS_X;
    if row >= rows + query_rows {
        terminate!();
    }
    let (dim, block) = (dim as usize, block as usize);
    if row < rows {
        let row = row as usize;
        let (key_words, value_words) = (key_words as usize, value_words as usize);
        stage(k, row, &mut staged, dim);
        let key = narrow_row(
            &mut staged,
            &mut sizes,
            feedback,
            row % kv_heads as usize * dim * dim,
            keys,
            row * key_words,
            key_words,
            dim,
            block,
            comptime!(own.keys()),
            has_feedback,
        );
        sync_cube();
        stage(v, row, &mut staged, dim);
        let value = narrow_row(
            &mut staged,
            &mut sizes,
            feedback,
            0usize.runtime(),
            values,
            row * value_words,
            value_words,
            dim,
            block,
            comptime!(own.values()),
            false,
        );
        if UNIT_POS == 0 {
            keys[rows as usize * key_words + row] = key | (value << 16);
        }
    } else {
        let row = (row - rows) as usize;
        stage(q, row, &mut staged, dim);
        rotate(&mut staged, dim, block);
        let mut at = UNIT_POS as usize;
        while at < dim {
            rotated[row * dim + at] = staged[at];
            at += ROW_UNITS;
        }
    }
}

/// Rotates the output rows of one sequence or several, those of a store's `heads`, back in place: the Hadamard matrix
/// is its own inverse but for a factor. Cubes: rows of tokens from `first` on.
#[allow(clippy::too_many_arguments)]
#[cube(launch_unchecked)]
pub(crate) fn rotate_back(
    out: &mut [f32],
    table: &[u32],
    first: u32,
    tokens: u32,
    query_heads: u32,
    heads: u32,
    group: u32,
    dim: u32,
    block: u32,
) {
    let mut staged = Shared::<[f32]>::new_slice(MAX_HEAD_DIM);
    let row = CUBE_POS_Y * CUBE_COUNT_X + CUBE_POS_X;
    let token = row / (heads * group);
    if token >= tokens {
        terminate!();
    }
    let own = row % (heads * group) / group;
    let query_head = head(table, own).number * group + row % group;
    let row = ((first + token) * query_heads + query_head) as usize;
    let factor = 1.0 / block as f32;
    let (dim, block) = (dim as usize, block as usize);
    stage(&*out, row, &mut staged, dim);
    rotate(&mut staged, dim, block);
    let mut at = UNIT_POS as usize;
    while at < dim {
        out[row * dim + at] = staged[at] * factor;
        at += ROW_UNITS;
    }
}

#[cube]
fn stage(from: &[f32], row: usize, staged: &mut [f32], dim: usize) {
    let mut at = UNIT_POS as usize;
    while at < dim {
        staged[at] = from[row * dim + at];
        at += ROW_UNITS;
    }
    sync_cube();
}

/// [`moa_core::rotate`]: elements at a distance of 1 first.
#[cube]
fn rotate(staged: &mut [f32], dim: usize, block: usize) {
    let mut step = 1usize.runtime();
    while step < block {
        let mut pair = UNIT_POS as usize;
        while pair < dim / 2 {
            let low = pair / step * (2 * step) + pair % step;
            let (a, b) = (staged[low], staged[low + step]);
            staged[low] = a + b;
            staged[low + step] = a - b;
            pair += ROW_UNITS;
        }
        step *= 2;
        sync_cube();
    }
}

/// [`RowType::narrow_with`] of the staged row, whose words start at `first` and whose feedback starts at `square`; returns
/// the bits of its scale.
// Kernels have no iterators.
#[allow(clippy::too_many_arguments, clippy::needless_range_loop)]
#[cube]
fn narrow_row(
    staged: &mut [f32],
    sizes: &mut [u32],
    feedback: &[f32],
    square: usize,
    to: &mut [u32],
    first: usize,
    words: usize,
    dim: usize,
    block: usize,
    #[comptime] own: RowType,
    #[comptime] has_feedback: bool,
) -> u32 {
    if comptime!(own.rotates()) {
        rotate(staged, dim, block);
    }
    let unit = UNIT_POS as usize;
    // As bits, numbers that are none are larger than all others.
    let mut most = 0u32.runtime();
    let mut at = unit;
    while at < dim {
        most = most.max(staged[at].to_bits() & 0x7fff_ffff);
        at += ROW_UNITS;
    }
    sizes[unit] = most;
    sync_cube();
    for other in 0..ROW_UNITS {
        most = most.max(sizes[other]);
    }
    let scale = scale_of(most, own);
    if comptime!(has_feedback) {
        feed_back(staged, scale, feedback, square, dim);
    }
    let mut at = unit;
    while at < words {
        let mut word = 0u32.runtime();
        #[unroll]
        for i in 0..4usize {
            let element = 4 * at + i;
            word |= code_of(staged[element], scale, own) << comptime!(8 * i as u32);
            if comptime!(matches!(own, RowType::Int4)) {
                let upper = code_of(staged[dim / 2 + element], scale, own);
                word |= upper << comptime!(8 * i as u32 + 4);
            }
        }
        to[first + at] = word;
        at += ROW_UNITS;
    }
    scale
}

/// What rounding each element leaves over, given to those before it: [`moa_core::key_feedback`].
#[cube]
// Kernels have no ranges with `contains`.
#[allow(clippy::manual_range_contains)]
fn feed_back(staged: &mut [f32], scale: u32, feedback: &[f32], square: usize, dim: usize) {
    // From 2^-60 to 2^60, as bits of a bf16. Units that wait for one another must not do so in a branch.
    let is_fed = (scale >= 0x2180) & (scale <= 0x5d80);
    let wide = f32::from_bits(scale << 16);
    let mut after = dim;
    while after > 1 {
        let j = after - 1;
        let code = code_of(staged[j], scale, comptime!(RowType::Int4));
        let left = staged[j] - (code as f32 - 7.5) * wide;
        let left = select(is_fed, f32::from_bits(left.to_bits() & 0xffff_f000), 0.0f32);
        let mut at = UNIT_POS as usize;
        while at < j {
            staged[at] += feedback[square + j * dim + at] * left;
            at += ROW_UNITS;
        }
        after -= 1;
        sync_cube();
    }
}
