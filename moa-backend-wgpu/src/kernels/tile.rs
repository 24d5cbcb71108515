// The macro that compiles for the device drops attributes of functions.
#![allow(clippy::too_many_arguments)]

use cubecl::prelude::*;

use super::words::widen;
use crate::Dtype;

/// How the units of a cube share a tile of scores: `unit_rows * units_y` rows, which are pairs of a
/// new token and a query head of its group, by `unit_keys * units_x` keys.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Tile {
    /// Rows of a unit.
    pub(crate) unit_rows: usize,
    /// Units that share the rows.
    pub(crate) units_y: usize,
    /// Keys of a unit.
    pub(crate) unit_keys: usize,
    /// Units that share the keys, and the columns of the output.
    pub(crate) units_x: usize,
    /// Vectors of a row that are multiplied at a time.
    pub(crate) depth: usize,
}

impl Tile {
    pub(crate) const fn rows(&self) -> usize {
        self.unit_rows * self.units_y
    }

    pub(crate) const fn keys(&self) -> usize {
        self.unit_keys * self.units_x
    }

    pub(crate) const fn units(&self) -> usize {
        self.units_x * self.units_y
    }

    /// Vectors between rows of a staged tile; one more than needed spreads them over the banks.
    pub(crate) const fn staged(&self) -> usize {
        self.depth + 1
    }

    /// Vectors of the staged rows.
    pub(crate) const fn left(&self) -> usize {
        self.rows() * self.staged()
    }

    /// Vectors of the buffer that holds keys, then values.
    pub(crate) const fn right(&self) -> usize {
        let (keys, values) = (self.keys() * self.staged(), self.units());
        if keys > values { keys } else { values }
    }

    /// Elements of the buffer of weights, whose rows are one longer for the same reason.
    pub(crate) const fn weights(&self) -> usize {
        self.rows() * (self.keys() + 1)
    }

    /// Bytes of shared memory, with two words for each key.
    pub(crate) const fn shared_bytes(&self, width: usize) -> usize {
        4 * ((self.left() + self.right()) * width + self.weights() + 2 * self.keys())
    }
}

/// Rows of one head of a tensor `[tokens, heads, vectors]`: tokens from `first` on, those beyond
/// `last` repeating it.
#[derive(CubeType, Clone, Copy)]
pub(crate) struct Rows {
    pub(crate) heads: u32,
    pub(crate) head: u32,
    pub(crate) first: u32,
    pub(crate) last: u32,
}

/// Index of a row in its tensor, in units of rows.
#[cube]
pub(crate) fn row(rows: &Rows, at: u32) -> usize {
    ((rows.first + at).min(rows.last) * rows.heads + rows.head) as usize
}

/// Shared memory of a cube with a [`Tile`].
#[derive(CubeType)]
pub(crate) struct Stage<N: Size> {
    left: Shared<[Vector<f32, N>]>,
    right: Shared<[Vector<f32, N>]>,
    weights: Shared<[f32]>,
}

#[cube]
impl<N: Size> Stage<N> {
    pub(crate) fn new(#[comptime] tile: Tile) -> Self {
        Stage::<N> {
            left: Shared::<[Vector<f32, N>]>::new_slice(comptime!(tile.left())),
            right: Shared::<[Vector<f32, N>]>::new_slice(comptime!(tile.right())),
            weights: Shared::<[f32]>::new_slice(comptime!(tile.weights())),
        }
    }

    /// The unit's products of left with right rows, `[unit_rows, unit_keys]`: rows
    /// `y * unit_rows..` by `x, x + units_x, ..`.
    pub(crate) fn products(
        &mut self,
        products: &mut Array<f32>,
        left: &[Vector<f32, N>],
        left_rows: &Rows,
        right: &[Vector<f32, N>],
        right_rows: &Rows,
        vectors: usize,
        #[comptime] tile: Tile,
    ) {
        #[unroll]
        for p in 0..comptime!(tile.unit_rows * tile.unit_keys) {
            products[p] = 0.0;
        }
        for chunk in 0..vectors.div_ceil(tile.depth) {
            // What was staged before was read.
            sync_cube();
            self.load_left(left, left_rows, chunk, vectors, tile);
            let mut at = UNIT_POS as usize;
            while at < comptime!(tile.keys() * tile.depth) {
                let column = chunk * tile.depth + at % tile.depth;
                let mut value = Vector::<f32, N>::new(0.0);
                if column < vectors {
                    value = right[row(right_rows, (at / tile.depth) as u32) * vectors + column];
                }
                self.right[at / tile.depth * comptime!(tile.staged()) + at % tile.depth] = value;
                at += comptime!(tile.units());
            }
            sync_cube();
            self.multiply(products, tile);
        }
    }

    /// The same with right rows in the words of a type.
    pub(crate) fn products_with_words<M: Size>(
        &mut self,
        products: &mut Array<f32>,
        left: &[Vector<f32, N>],
        left_rows: &Rows,
        right: &[Vector<u32, M>],
        right_rows: &Rows,
        vectors: usize,
        #[comptime] tile: Tile,
        #[comptime] dtype: Dtype,
    ) {
        #[unroll]
        for p in 0..comptime!(tile.unit_rows * tile.unit_keys) {
            products[p] = 0.0;
        }
        for chunk in 0..vectors.div_ceil(tile.depth) {
            sync_cube();
            self.load_left(left, left_rows, chunk, vectors, tile);
            let mut at = UNIT_POS as usize;
            while at < comptime!(tile.keys() * tile.depth) {
                let column = chunk * tile.depth + at % tile.depth;
                let mut value = Vector::<f32, N>::new(0.0);
                if column < vectors {
                    let from = row(right_rows, (at / tile.depth) as u32) * vectors + column;
                    value = widen::<N, M>(right[from], dtype);
                }
                self.right[at / tile.depth * comptime!(tile.staged()) + at % tile.depth] = value;
                at += comptime!(tile.units());
            }
            sync_cube();
            self.multiply(products, tile);
        }
    }

    fn load_left(
        &mut self,
        left: &[Vector<f32, N>],
        left_rows: &Rows,
        chunk: usize,
        vectors: usize,
        #[comptime] tile: Tile,
    ) {
        let mut at = UNIT_POS as usize;
        while at < comptime!(tile.rows() * tile.depth) {
            let column = chunk * tile.depth + at % tile.depth;
            let mut value = Vector::<f32, N>::new(0.0);
            if column < vectors {
                value = left[row(left_rows, (at / tile.depth) as u32) * vectors + column];
            }
            self.left[at / tile.depth * comptime!(tile.staged()) + at % tile.depth] = value;
            at += comptime!(tile.units());
        }
    }

    /// Adds the products of what is staged.
    fn multiply(&self, products: &mut Array<f32>, #[comptime] tile: Tile) {
        let x = UNIT_POS as usize % tile.units_x;
        let y = UNIT_POS as usize / tile.units_x;
        let staged = comptime!(tile.staged());
        // Not unrolled: drivers do that where it helps, and compile much less.
        for d in 0..tile.depth {
            let mut held = Array::<Vector<f32, N>>::new(tile.unit_keys);
            #[unroll]
            for j in 0..tile.unit_keys {
                held[j] = self.right[(x + j * tile.units_x) * staged + d];
            }
            #[unroll]
            for i in 0..tile.unit_rows {
                let a = self.left[(y * tile.unit_rows + i) * staged + d];
                #[unroll]
                for j in 0..tile.unit_keys {
                    products[i * tile.unit_keys + j] += a.dot(held[j]);
                }
            }
        }
    }

    /// Shares a unit's weight of a left with a right row with the cube.
    pub(crate) fn weigh(&mut self, left: usize, right: usize, weight: f32, #[comptime] tile: Tile) {
        self.weights[left * comptime!(tile.keys() + 1) + right] = weight;
    }

    /// Adds the right rows, by their weights, to the unit's rows and columns of `sums`,
    /// `[unit_rows, columns]` with columns `x, x + units_x, ..`.
    pub(crate) fn accumulate(
        &mut self,
        sums: &mut Array<Vector<f32, N>>,
        right: &[Vector<f32, N>],
        right_rows: &Rows,
        vectors: usize,
        #[comptime] tile: Tile,
        #[comptime] columns: usize,
    ) {
        let unit = UNIT_POS as usize;
        let x = unit % tile.units_x;
        let y = unit / tile.units_x;
        #[unroll]
        for c in 0..columns {
            let column = c * tile.units_x + x;
            for block in 0..comptime!(tile.keys() / tile.units_y) {
                let first = block * tile.units_y;
                let mut value = Vector::<f32, N>::new(0.0);
                if column < vectors {
                    value = right[row(right_rows, (first + y) as u32) * vectors + column];
                }
                // Weights are written, and what was staged before was read.
                sync_cube();
                self.right[unit] = value;
                sync_cube();
                for key in 0..tile.units_y {
                    let value = self.right[key * tile.units_x + x];
                    #[unroll]
                    for i in 0..tile.unit_rows {
                        let at = (y * tile.unit_rows + i) * comptime!(tile.keys() + 1);
                        let weight = self.weights[at + first + key];
                        sums[i * columns + c] += value * Vector::new(weight);
                    }
                }
            }
        }
        sync_cube();
    }

    /// The same for one column of right rows in the words of a type.
    pub(crate) fn accumulate_words<M: Size>(
        &mut self,
        sums: &mut Array<Vector<f32, N>>,
        right: &[Vector<u32, M>],
        right_rows: &Rows,
        column: usize,
        vectors: usize,
        #[comptime] tile: Tile,
        #[comptime] dtype: Dtype,
    ) {
        let unit = UNIT_POS as usize;
        let x = unit % tile.units_x;
        let y = unit / tile.units_x;
        for block in 0..comptime!(tile.keys() / tile.units_y) {
            let first = block * tile.units_y;
            let mut value = Vector::<f32, N>::new(0.0);
            if column < vectors {
                let from = row(right_rows, (first + y) as u32) * vectors + column;
                value = widen::<N, M>(right[from], dtype);
            }
            sync_cube();
            self.right[unit] = value;
            sync_cube();
            for key in 0..tile.units_y {
                let value = self.right[key * tile.units_x + x];
                #[unroll]
                for i in 0..tile.unit_rows {
                    let at = (y * tile.unit_rows + i) * comptime!(tile.keys() + 1);
                    sums[i] += value * Vector::new(self.weights[at + first + key]);
                }
            }
        }
        sync_cube();
    }

    /// Sum over the cube's units, which all must call this.
    pub(crate) fn sum(&mut self, value: f32, #[comptime] tile: Tile) -> f32 {
        sync_cube();
        self.weights[UNIT_POS as usize] = value;
        sync_cube();
        let mut sum = 0.0f32;
        for unit in 0..comptime!(tile.units()) {
            sum += self.weights[unit];
        }
        sum
    }
}
