//! `x . weight^T + bias` of few rows, where reading the weight once per [`Shape::MOST`] of them is all that counts;
//! for several layers of one input at once.

use cubecl::prelude::*;

use super::decode::{Floats, Words};
use super::lanes::add;
use super::quants::{Elements, GROUP, factors, four};

/// Units of a cube.
pub(crate) const UNITS: usize = 256;

/// Units that share a feature.
const LANES: usize = 32;

/// Features of a cube.
pub(crate) const FEATURES: usize = UNITS / LANES;

/// Loads that a unit has under way at once.
const AHEAD: usize = 4;

/// What the kernel is compiled for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Shape {
    pub(crate) layers: usize,
    /// Rows of a cube.
    pub(crate) rows: usize,
    /// What the weights' words hold.
    pub(crate) elements: Elements,
    /// Sums by plane operations, in place of shared memory.
    pub(crate) planes: bool,
    /// f16 is widened by the device's own conversion.
    pub(crate) native: bool,
    /// Whether `plus` is added.
    pub(crate) plus: bool,
}

impl Shape {
    /// Most rows of a cube.
    pub(crate) const MOST: usize = 8;

    /// Rows that there are kernels for.
    pub(crate) const ROWS: [usize; 3] = [1, 4, Self::MOST];

    /// Whether a plane of the device holds the units of a feature.
    pub(crate) const fn fits_planes(units: usize) -> bool {
        units >= LANES
    }

    const fn sums(&self) -> usize {
        if self.planes { 1 } else { UNITS * self.rows }
    }

    pub(crate) const fn shared_bytes(&self) -> usize {
        4 * self.sums()
    }
}

/// One layer: `weight` is `[features, columns]`, `out` `[rows, features]`.
#[derive(CubeType, CubeLaunch)]
pub(crate) struct Layer {
    pub(crate) weight: Box<[Words]>,
    /// Of an element per feature, if `has_bias` is 1.
    pub(crate) bias: Box<[f32]>,
    pub(crate) out: Box<[f32]>,
    pub(crate) features: u32,
    /// The layer's first tile of features.
    pub(crate) first: u32,
    pub(crate) has_bias: u32,
    /// Where steps of blocks begin, in loads.
    pub(crate) steps: u32,
}

/// Cubes: tiles of [`FEATURES`] features, groups of rows, and tiles again. `x` is `[rows, columns]` in floats,
/// `plus` as the output of a single layer.
#[cube(launch_unchecked)]
pub(crate) fn few_rows(
    x: &[Floats],
    plus: &[f32],
    layers: &mut Sequence<Layer>,
    rows: u32,
    tiles: u32,
    columns: u32,
    #[comptime] shape: Shape,
) {
    let tile = CUBE_POS_X + CUBE_POS_Z * CUBE_COUNT_X;
    if tile >= tiles {
        terminate!();
    }
    let count = comptime!(shape.rows);
    let parts = comptime!(shape.elements.per_load() / 4);
    let mut sums = Shared::<[f32]>::new_slice(comptime!(shape.sums()));
    let unit = UNIT_POS as usize;
    let lane = unit % LANES;
    let columns = columns as usize;
    let first_row = CUBE_POS_Y * comptime!(count as u32);

    let mut number = 0u32;
    let mut first = 0u32;
    let mut features = layers.index(0).features;
    #[unroll]
    for l in 1..shape.layers {
        let layer = layers.index(l);
        if tile >= layer.first {
            number = comptime!(l as u32).runtime();
            first = layer.first;
            features = layer.features;
        }
    }
    let feature = (tile - first) * comptime!(FEATURES as u32) + (unit / LANES) as u32;
    // Features beyond the last one repeat it and are not written.
    let row = feature.min(features - 1) as usize * columns;

    let mut totals = Array::<f32>::new(count);
    #[unroll]
    for r in 0..count {
        totals[r] = 0.0;
    }
    let mut base = 0usize;
    while base < columns {
        let mut words = Array::<Words>::new(AHEAD);
        let mut steps = Array::<Words>::new(AHEAD);
        #[unroll]
        for l in 0..shape.layers {
            if comptime!(shape.layers == 1) || number == comptime!(l as u32) {
                let layer = layers.index(l);
                #[unroll]
                for a in 0..AHEAD {
                    let column = (base + comptime!(a * LANES) + lane).min(columns - 1);
                    words[a] = layer.weight[row + column];
                    if comptime!(shape.elements.is_blocks()) {
                        let group = (row + column) * comptime!(shape.elements.per_load()) / GROUP;
                        steps[a] = layer.weight[layer.steps as usize + group / 8];
                    }
                }
            }
        }
        #[unroll]
        for a in 0..AHEAD {
            let column = base + comptime!(a * LANES) + lane;
            let from = column.min(columns - 1) * parts;
            let counts = select(column < columns, f32::new(1.0), f32::new(0.0));
            let mut own = Vector::new(0.0f32);
            if comptime!(shape.elements.is_blocks()) {
                let load = row + column.min(columns - 1);
                let group = load * comptime!(shape.elements.per_load()) / GROUP;
                own = factors(steps[a], group, shape.elements);
            }
            #[unroll]
            for p in 0..parts {
                let weights = four(words[a], own, p, shape.elements, shape.native);
                let weights = weights * Vector::new(counts);
                #[unroll]
                for r in 0..count {
                    // Rows beyond the last one, alike.
                    let row = (first_row + r as u32).min(rows - 1) as usize;
                    totals[r] += x[row * columns * parts + from + p].dot(weights);
                }
            }
        }
        base += comptime!(AHEAD * LANES);
    }
    add(&mut totals, &mut sums, count, LANES, UNITS, shape.planes);

    if lane == 0 && feature < features {
        #[unroll]
        for l in 0..shape.layers {
            if comptime!(shape.layers == 1) || number == comptime!(l as u32) {
                let layer = layers.index_mut(l);
                let mut more = 0.0f32;
                if layer.has_bias == 1 {
                    more = layer.bias[feature as usize];
                }
                #[unroll]
                for r in 0..count {
                    let row = first_row + r as u32;
                    if row < rows {
                        let to = (row * features + feature) as usize;
                        let mut total = totals[r] + more;
                        if comptime!(shape.plus) {
                            total += plus[to];
                        }
                        layer.out[to] = total;
                    }
                }
            }
        }
    }
}
