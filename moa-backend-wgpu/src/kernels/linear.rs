//! `x . weight^T + bias`: `x` is `[rows, vectors]`, the weight `[features, vectors]` in the words of
//! its type, the output `[rows, features]`.

use cubecl::prelude::*;

use super::tile::{Rows, Stage, Tile};
use crate::Dtype;

/// For many rows. Cubes: tiles of features, tiles of rows.
#[allow(clippy::too_many_arguments)]
#[cube(launch_unchecked)]
pub(crate) fn many_rows<N: Size, M: Size>(
    x: &[Vector<f32, N>],
    weight: &[Vector<u32, M>],
    bias: &[f32],
    out: &mut [f32],
    rows: u32,
    features: u32,
    vectors: u32,
    has_bias: u32,
    #[comptime] tile: Tile,
    #[comptime] dtype: Dtype,
) {
    let unit_x = UNIT_POS as usize % tile.units_x;
    let unit_y = UNIT_POS as usize / tile.units_x;
    let first_row = CUBE_POS_Y * comptime!(tile.rows() as u32);
    let first_feature = CUBE_POS_X * comptime!(tile.keys() as u32);
    let left = Rows { heads: 1, head: 0, first: first_row, last: rows - 1 };
    let right = Rows { heads: 1, head: 0, first: first_feature, last: features - 1 };
    let mut stage = Stage::<N>::new(tile);
    let mut sums = Array::<f32>::new(comptime!(tile.unit_rows * tile.unit_keys));
    stage.products_with_words::<M>(
        &mut sums,
        x,
        &left,
        weight,
        &right,
        vectors as usize,
        tile,
        dtype,
    );
    #[unroll]
    for j in 0..tile.unit_keys {
        let feature = first_feature + (unit_x + j * tile.units_x) as u32;
        if feature < features {
            let mut add = 0.0f32;
            if has_bias == 1 {
                add = bias[feature as usize];
            }
            #[unroll]
            for i in 0..tile.unit_rows {
                let row = first_row + (unit_y * tile.unit_rows + i) as u32;
                if row < rows {
                    out[(row * features + feature) as usize] = sums[i * tile.unit_keys + j] + add;
                }
            }
        }
    }
}

/// Gradient by the input: `d_y . weight`, `d_y` being `[rows, features]`. Cubes: `units_x` vectors of
/// columns, tiles of rows.
#[allow(clippy::too_many_arguments)]
#[cube(launch_unchecked)]
pub(crate) fn backward<N: Size, M: Size>(
    d_y: &[f32],
    weight: &[Vector<u32, M>],
    d_x: &mut [Vector<f32, N>],
    rows: u32,
    features: u32,
    vectors: u32,
    #[comptime] tile: Tile,
    #[comptime] dtype: Dtype,
) {
    let unit_y = UNIT_POS as usize / tile.units_x;
    let vectors = vectors as usize;
    let column = CUBE_POS_X as usize * tile.units_x + UNIT_POS as usize % tile.units_x;
    let first_row = CUBE_POS_Y * comptime!(tile.rows() as u32);
    let mut stage = Stage::<N>::new(tile);
    let mut sums = Array::<Vector<f32, N>>::new(tile.unit_rows);
    #[unroll]
    for i in 0..tile.unit_rows {
        sums[i] = Vector::new(0.0);
    }
    let mut first = 0u32;
    while first < features {
        let mut at = UNIT_POS as usize;
        while at < comptime!(tile.rows() * tile.keys()) {
            let (left, right) = (at / comptime!(tile.keys()), at % comptime!(tile.keys()));
            let (row, feature) = (first_row + left as u32, first + right as u32);
            let mut value = 0.0f32;
            if (row < rows) & (feature < features) {
                value = d_y[(row * features + feature) as usize];
            }
            stage.weigh(left, right, value, tile);
            at += comptime!(tile.units());
        }
        let block = Rows { heads: 1, head: 0, first, last: features - 1 };
        stage.accumulate_words::<M>(&mut sums, weight, &block, column, vectors, tile, dtype);
        first += comptime!(tile.keys() as u32);
    }
    #[unroll]
    for i in 0..tile.unit_rows {
        let row = first_row + (unit_y * tile.unit_rows + i) as u32;
        if (row < rows) & (column < vectors) {
            d_x[row as usize * vectors + column] = sums[i];
        }
    }
}
