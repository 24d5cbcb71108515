//! Scores with a softcap, and learned sinks.

use cubecl::prelude::*;

/// Units of a cube of [`add_sinks`].
pub(crate) const SINK_UNITS: usize = 64;

/// Taylor's terms of `tanh` after the first: the relative error is below 6e-8 up to 0.3.
const THIRD: f32 = -1.0 / 3.0;
const FIFTH: f32 = 2.0 / 15.0;
const SEVENTH: f32 = -17.0 / 315.0;
const NINTH: f32 = 62.0 / 2835.0;

const MINUS_TWO: f32 = -2.0;

/// `cap * tanh(score / cap)` in a kernel for a softcap, else the score. Not the device's own tanh, of which WebGPU
/// promises nothing near 0.
#[cube]
pub(crate) fn capped(score: f32, cap: f32, #[comptime] has_cap: bool) -> f32 {
    if comptime!(has_cap) {
        let x = score / cap;
        let size = x.abs();
        let fading = (size * MINUS_TWO).exp();
        let far = (1.0 - fading) / (1.0 + fading);
        let square = x * x;
        let slope = ((square * NINTH + SEVENTH) * square + FIFTH) * square + THIRD;
        let near = size + size * square * slope;
        let bounded = cap * select(size < 0.3, near, far);
        select(x < 0.0, -bounded, bounded)
    } else {
        score
    }
}

/// Brings each query head's sink to finished rows `[tokens, query_heads, dim]` and their log-sum-exps. A cube for each
/// row.
#[cube(launch_unchecked)]
#[allow(clippy::manual_clamp)]
pub(crate) fn add_sinks(
    out: &mut [f32],
    lse: &mut [f32],
    sinks: &[f32],
    rows: u32,
    query_heads: u32,
    dim: u32,
) {
    let row = CUBE_POS_X + CUBE_POS_Y * CUBE_COUNT_X;
    if row >= rows {
        terminate!();
    }
    let before = lse[row as usize];
    let sink = sinks[(row % query_heads) as usize];
    // Shaders need not know infinities: neither a sink that is one, nor an exponential.
    let ahead = (sink - before).max(-80.0).min(80.0);
    let share = 1.0 / (1.0 + ahead.exp());
    let mut at = UNIT_POS as usize;
    while at < dim as usize {
        out[row as usize * dim as usize + at] *= share;
        at += SINK_UNITS;
    }
    // All units have read it.
    sync_cube();
    if UNIT_POS == 0 {
        lse[row as usize] = before.max(sink) + (1.0 + (-ahead.abs()).exp()).ln();
    }
}
