use cubecl::prelude::*;

use super::decode::Floats;
use super::keys::head;

/// Units of a cube.
pub(crate) const JOIN_UNITS: usize = 256;

/// Splits that a unit has under way at once.
const AHEAD: usize = 8;

/// Joins the partial results of [`super::decode`]. Cubes: query heads of the store's heads, sequences.
///
/// `partial` is `[sequences, query_heads, splits, vectors]`, `partial_stats` alike (maximum, sum); `out`
/// and `lse` are those of the tokens from `first_token` on. `lanes` is the power of two from `vectors` on.
#[allow(clippy::too_many_arguments)]
#[cube(launch_unchecked)]
pub(crate) fn join(
    partial: &[Floats],
    partial_stats: &[f32],
    table: &[u32],
    out: &mut [Floats],
    lse: &mut [f32],
    first_token: u32,
    query_heads: u32,
    group: u32,
    splits: u32,
    vectors: u32,
    #[comptime] lanes: usize,
) {
    let rows = comptime!(JOIN_UNITS / lanes);
    let mut outputs = Shared::<[Floats]>::new_slice(JOIN_UNITS);
    let mut stats = Shared::<[f32]>::new_slice(comptime!(2 * rows));
    let unit = UNIT_POS as usize;
    let lane = unit % lanes;
    let row = unit / lanes;
    let vectors = vectors as usize;
    let column = lane.min(vectors - 1);
    let splits = splits as usize;
    let query_head = head(table, CUBE_POS_X / group).number * group + CUBE_POS_X % group;
    let head = (CUBE_POS_Y * query_heads + query_head) as usize;

    let mut maximum = f32::new(-1e30);
    let mut sum = 0.0f32;
    let mut output = Vector::new(0.0f32);
    let mut base = row;
    while base < splits {
        let mut maxima = Array::<f32>::new(AHEAD);
        let mut parts = Array::<f32>::new(AHEAD);
        let mut held = Array::<Floats>::new(AHEAD);
        let mut best = maximum;
        #[unroll]
        for a in 0..AHEAD {
            // Those beyond the last one are as those without keys: how many there are depends on other sequences, or on those to come.
            let split = base + a * rows;
            let at = head * splits + split.min(splits - 1);
            maxima[a] = select(split < splits, partial_stats[2 * at], -1e30);
            parts[a] = select(split < splits, partial_stats[2 * at + 1], 0.0);
            held[a] = partial[at * vectors + column];
            best = best.max(maxima[a]);
        }
        let rescale = (maximum - best).exp();
        maximum = best;
        sum *= rescale;
        output *= Vector::new(rescale);
        #[unroll]
        for a in 0..AHEAD {
            let factor = (maxima[a] - best).exp();
            let factor = select(parts[a] > 0.0, factor, 0.0);
            sum += parts[a] * factor;
            output += held[a] * Vector::new(factor);
        }
        base += comptime!(AHEAD * rows);
    }

    outputs[unit] = output;
    if lane == 0 {
        stats[2 * row] = maximum;
        stats[2 * row + 1] = sum;
    }
    sync_cube();
    if unit < vectors {
        let mut largest = stats[0];
        for other in 1..rows {
            largest = largest.max(stats[2 * other]);
        }
        let mut total = 0.0f32;
        let mut joined = Vector::new(0.0f32);
        for other in 0..rows {
            let factor = (stats[2 * other] - largest).exp();
            total += stats[2 * other + 1] * factor;
            joined += outputs[other * lanes + unit] * Vector::new(factor);
        }
        let to = (first_token * query_heads) as usize + head;
        out[to * vectors + unit] = joined * Vector::new(1.0 / total);
        if unit == 0 {
            lse[to] = largest + total.ln();
        }
    }
}
