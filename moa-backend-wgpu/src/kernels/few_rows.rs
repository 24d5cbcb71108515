//! `x . weight^T + bias` of few rows, where reading the weight once per [`Shape::MOST`] of them is all that counts;
//! for several layers of one input at once, of the input's norm, and with the SwiGLU of two layers.

use cubecl::prelude::*;

use super::decode::{Floats, Words};
use super::lanes::add;
use super::quants::{Elements, GROUP, factors, four};

/// Units of a cube.
pub(crate) const UNITS: usize = 128;

/// Units that share features.
const LANES: usize = 32;

/// Loads of each feature that a unit has under way at once.
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
    /// Whether layers read the norm of `x`.
    pub(crate) norm: bool,
    /// Whether two layers of as many features are gate and up of a SwiGLU, which takes the place of the first one's output.
    pub(crate) pair: bool,
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

    /// Features that units share. The norm makes a second load for each of the input, so that two of them pay for it.
    const fn each(&self) -> usize {
        if self.norm { 2 } else { 1 }
    }

    /// Features of a cube, of each layer.
    pub(crate) const fn features(&self) -> usize {
        UNITS / LANES * self.each()
    }

    /// Rows of weights that a unit reads.
    const fn streams(&self) -> usize {
        if self.pair { 2 * self.each() } else { self.each() }
    }

    const fn sums(&self) -> usize {
        if self.planes { 1 } else { UNITS * self.rows * self.streams() }
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

/// Cubes: tiles of [`Shape::features`], groups of rows, and tiles again. `x` is `[rows, columns]` in floats,
/// `plus` as the output of a single layer, `norm` a row's weights. Units that share features read the whole of a row between
/// them, and so have its norm.
#[allow(clippy::too_many_arguments)]
#[cube(launch_unchecked)]
pub(crate) fn few_rows(
    x: &[Floats],
    plus: &[f32],
    norm: &[Floats],
    layers: &mut Sequence<Layer>,
    rows: u32,
    tiles: u32,
    columns: u32,
    eps: f32,
    #[comptime] shape: Shape,
) {
    let tile = CUBE_POS_X + CUBE_POS_Z * CUBE_COUNT_X;
    if tile >= tiles {
        terminate!();
    }
    let count = comptime!(shape.rows);
    let streams = comptime!(shape.streams());
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
    let each = comptime!(shape.each());
    let feature =
        (tile - first) * comptime!(shape.features() as u32) + (unit / LANES * each) as u32;
    // Features beyond the last one repeat it and are not written.
    let mut own_rows = Array::<usize>::new(each);
    #[unroll]
    for e in 0..each {
        own_rows[e] = (feature + comptime!(e as u32)).min(features - 1) as usize * columns;
    }

    let mut totals = Array::<f32>::new(comptime!(count * streams));
    let mut squares = Array::<f32>::new(count);
    #[unroll]
    for i in 0..comptime!(count * streams) {
        totals[i] = 0.0;
    }
    #[unroll]
    for r in 0..count {
        squares[r] = 0.0;
    }
    let mut base = 0usize;
    while base < columns {
        let mut words = Array::<Words>::new(comptime!(AHEAD * streams));
        let mut steps = Array::<Words>::new(comptime!(AHEAD * streams));
        #[unroll]
        for l in 0..shape.layers {
            if comptime!(shape.layers == 1 || shape.pair) || number == comptime!(l as u32) {
                let layer = layers.index(l);
                let to = comptime!(if shape.pair { l * each } else { 0 });
                #[unroll]
                for i in 0..comptime!(each * AHEAD) {
                    let row = own_rows[comptime!(i / AHEAD)];
                    let column = (base + comptime!(i % AHEAD * LANES) + lane).min(columns - 1);
                    words[to * AHEAD + i] = layer.weight[row + column];
                    if comptime!(shape.elements.is_blocks()) {
                        let group = (row + column) * comptime!(shape.elements.per_load()) / GROUP;
                        steps[to * AHEAD + i] = layer.weight[layer.steps as usize + group / 8];
                    }
                }
            }
        }
        #[unroll]
        for a in 0..AHEAD {
            let column = base + comptime!(a * LANES) + lane;
            let from = column.min(columns - 1) * parts;
            let counts = select(column < columns, f32::new(1.0), f32::new(0.0));
            let mut own = Array::<Floats>::new(streams);
            #[unroll]
            for s in 0..streams {
                own[s] = Vector::new(0.0f32);
                if comptime!(shape.elements.is_blocks()) {
                    let load = own_rows[comptime!(s % each)] + column.min(columns - 1);
                    let group = load * comptime!(shape.elements.per_load()) / GROUP;
                    own[s] = factors(steps[s * AHEAD + a], group, shape.elements);
                }
            }
            #[unroll]
            for p in 0..parts {
                let mut weights = Array::<Floats>::new(streams);
                #[unroll]
                for s in 0..streams {
                    let four = four(words[s * AHEAD + a], own[s], p, shape.elements, shape.native);
                    weights[s] = four * Vector::new(counts);
                }
                #[unroll]
                for r in 0..count {
                    // Rows beyond the last one, alike.
                    let row = (first_row + r as u32).min(rows - 1) as usize;
                    let mut input = x[row * columns * parts + from + p];
                    if comptime!(shape.norm) {
                        squares[r] += input.dot(input) * counts;
                        input *= norm[from + p];
                    }
                    #[unroll]
                    for s in 0..streams {
                        totals[s * count + r] += input.dot(weights[s]);
                    }
                }
            }
        }
        base += comptime!(AHEAD * LANES);
    }
    add(&mut totals, &mut sums, comptime!(count * streams), LANES, UNITS, shape.planes);
    if comptime!(shape.norm) {
        add(&mut squares, &mut sums, count, LANES, UNITS, shape.planes);
        #[unroll]
        for r in 0..count {
            let mean = squares[r] / (columns * comptime!(4 * parts)) as f32;
            let factor = 1.0 / (mean + eps).sqrt();
            #[unroll]
            for s in 0..streams {
                totals[s * count + r] *= factor;
            }
        }
    }

    if lane == 0 {
        #[unroll]
        for e in 0..each {
            let feature = feature + comptime!(e as u32);
            if feature < features {
                if comptime!(shape.pair) {
                    #[unroll]
                    for l in 0..shape.layers {
                        let layer = layers.index(l);
                        if layer.has_bias == 1 {
                            let more = layer.bias[feature as usize];
                            #[unroll]
                            for r in 0..count {
                                totals[(l * each + e) * count + r] += more;
                            }
                        }
                    }
                    let out = layers.index_mut(0);
                    #[unroll]
                    for r in 0..count {
                        let row = first_row + r as u32;
                        if row < rows {
                            let (gate, up) =
                                (totals[e * count + r], totals[(each + e) * count + r]);
                            let to = (row * features + feature) as usize;
                            out.out[to] = gate / (1.0 + (-gate).exp()) * up;
                        }
                    }
                } else {
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
                                    let mut total = totals[e * count + r] + more;
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
        }
    }
}
