//! Operations on rows of activations, and element by element.

use cubecl::prelude::*;

use super::words::widen;
use crate::Dtype;

/// Units that share a row in [`rms_norm`].
pub(crate) const NORM_UNITS: usize = 64;

/// Rows `ids` of a table times `factor`, one unit per vector of the output.
#[cube(launch_unchecked)]
pub(crate) fn gather<N: Size, M: Size>(
    table: &[Vector<u32, M>],
    ids: &[u32],
    out: &mut [Vector<f32, N>],
    count: u32,
    vectors: u32,
    factor: f32,
    #[comptime] dtype: Dtype,
) {
    let vectors = vectors as usize;
    if ABSOLUTE_POS < count as usize {
        let from = ids[ABSOLUTE_POS / vectors] as usize * vectors + ABSOLUTE_POS % vectors;
        out[ABSOLUTE_POS] = widen::<N, M>(table[from], dtype) * Vector::new(factor);
    }
}

/// `x / sqrt(mean(x^2) + eps) * weight`, one cube per row of `len` elements.
#[cube(launch_unchecked)]
pub(crate) fn rms_norm(x: &[f32], weight: &[f32], out: &mut [f32], rows: u32, len: u32, eps: f32) {
    let row = CUBE_POS_X + CUBE_POS_Y * CUBE_COUNT_X;
    if row >= rows {
        terminate!();
    }
    let len = len as usize;
    let first = row as usize * len;
    let mut squares = 0.0f32;
    let mut at = UNIT_POS as usize;
    while at < len {
        squares += x[first + at] * x[first + at];
        at += NORM_UNITS;
    }
    let mut shared = Shared::<[f32]>::new_slice(NORM_UNITS);
    shared[UNIT_POS as usize] = squares;
    sync_cube();
    let mut sum = 0.0f32;
    for unit in 0..NORM_UNITS {
        sum += shared[unit];
    }
    let factor = 1.0 / (sum / len as f32 + eps).sqrt();
    let mut at = UNIT_POS as usize;
    while at < len {
        out[first + at] = x[first + at] * factor * weight[at];
        at += NORM_UNITS;
    }
}

/// Rotates pairs `(i, i + half)` of heads of `2 * half` elements; `cos` and `sin` are
/// `[tokens, half]`. One unit per pair; `sign` -1 rotates back. Products are fused by name, as in [`super::decode`], where recorded
/// steps rotate.
#[allow(clippy::too_many_arguments)]
#[cube(launch_unchecked)]
pub(crate) fn rope(
    x: &[f32],
    cos: &[f32],
    sin: &[f32],
    out: &mut [f32],
    pairs: u32,
    heads: u32,
    half: u32,
    sign: f32,
) {
    if ABSOLUTE_POS < pairs as usize {
        let half = half as usize;
        let i = ABSOLUTE_POS % half;
        let head = ABSOLUTE_POS / half;
        let angle = head / heads as usize * half + i;
        let first = head * 2 * half + i;
        let (cos, sin) = (cos[angle], sin[angle] * sign);
        let (a, b) = (x[first], x[first + half]);
        out[first] = fma(a, cos, -(b * sin));
        out[first + half] = fma(b, cos, a * sin);
    }
}

/// Units of a cube of [`likeliest`].
pub(crate) const LIKELIEST_UNITS: usize = 256;

/// Of each cube's share of a row: the bits of the highest number, the lowest place of it, and whether there is a NaN or an
/// infinity above. `share` is the length of a share.
#[cube(launch_unchecked)]
pub(crate) fn likeliest(x: &[f32], out: &mut [u32], len: u32, share: u32) {
    let mut tops = Shared::<[f32]>::new_slice(LIKELIEST_UNITS);
    let mut places = Shared::<[u32]>::new_slice(LIKELIEST_UNITS);
    let mut bad = Shared::<[u32]>::new_slice(LIKELIEST_UNITS);
    let unit = UNIT_POS as usize;
    let first = CUBE_POS_X * share;
    let end = (first + share).min(len);
    let mut top = f32::new(f32::MIN);
    let mut place = first;
    let mut is_bad = 0u32;
    let mut at = first + UNIT_POS;
    while at < end {
        let number = x[at as usize];
        let bits = number.to_bits();
        // By bits, as a compiler may take it that there is no NaN.
        if bits == 0x7f80_0000 || (bits & 0x7fff_ffff) > 0x7f80_0000 {
            is_bad = 1;
        } else if number > top {
            top = number;
            place = at;
        }
        at += comptime!(LIKELIEST_UNITS as u32);
    }
    tops[unit] = top;
    places[unit] = place;
    bad[unit] = is_bad;
    let mut half = comptime!(LIKELIEST_UNITS / 2).runtime();
    while half > 0 {
        sync_cube();
        if unit < half {
            let (other, other_place) = (tops[unit + half], places[unit + half]);
            let (own, own_place) = (tops[unit], places[unit]);
            if other > own || (other == own && other_place < own_place) {
                tops[unit] = other;
                places[unit] = other_place;
            }
            bad[unit] |= bad[unit + half];
        }
        half /= 2;
    }
    sync_cube();
    if unit == 0 {
        let to = 3 * CUBE_POS_X as usize;
        out[to] = tops[0].to_bits();
        out[to + 1] = places[0];
        out[to + 2] = bad[0];
    }
}

/// `silu(gate) * up`.
#[cube(launch_unchecked)]
pub(crate) fn swiglu(gate: &[f32], up: &[f32], out: &mut [f32], len: u32) {
    if ABSOLUTE_POS < len as usize {
        let x = gate[ABSOLUTE_POS];
        out[ABSOLUTE_POS] = x / (1.0 + (-x).exp()) * up[ABSOLUTE_POS];
    }
}

/// `x + y`, where `y` repeats after `period` elements.
#[cube(launch_unchecked)]
pub(crate) fn add(x: &[f32], y: &[f32], out: &mut [f32], len: u32, period: u32) {
    if ABSOLUTE_POS < len as usize {
        out[ABSOLUTE_POS] = x[ABSOLUTE_POS] + y[ABSOLUTE_POS % period as usize];
    }
}

/// Gradient of [`rms_norm`] by `x`: with `r = 1 / sqrt(mean(x^2) + eps)` and `g = dy * weight`,
/// `dx = r * (g - x * r^2 * mean(g * x))`.
#[allow(clippy::too_many_arguments)]
#[cube(launch_unchecked)]
pub(crate) fn rms_norm_backward(
    x: &[f32],
    weight: &[f32],
    d_y: &[f32],
    d_x: &mut [f32],
    rows: u32,
    len: u32,
    eps: f32,
) {
    let row = CUBE_POS_X + CUBE_POS_Y * CUBE_COUNT_X;
    if row >= rows {
        terminate!();
    }
    let len = len as usize;
    let first = row as usize * len;
    let mut squares = 0.0f32;
    let mut products = 0.0f32;
    let mut at = UNIT_POS as usize;
    while at < len {
        squares += x[first + at] * x[first + at];
        products += x[first + at] * d_y[first + at] * weight[at];
        at += NORM_UNITS;
    }
    let mut shared = Shared::<[f32]>::new_slice(comptime!(2 * NORM_UNITS));
    shared[UNIT_POS as usize] = squares;
    shared[NORM_UNITS + UNIT_POS as usize] = products;
    sync_cube();
    let mut square = 0.0f32;
    let mut product = 0.0f32;
    for unit in 0..NORM_UNITS {
        square += shared[unit];
        product += shared[NORM_UNITS + unit];
    }
    let factor = 1.0 / (square / len as f32 + eps).sqrt();
    let back = factor * factor * product / len as f32;
    let mut at = UNIT_POS as usize;
    while at < len {
        d_x[first + at] = factor * (d_y[first + at] * weight[at] - x[first + at] * back);
        at += NORM_UNITS;
    }
}

/// Gradients of [`swiglu`] by gate and up.
#[cube(launch_unchecked)]
pub(crate) fn swiglu_backward(
    gate: &[f32],
    up: &[f32],
    d_y: &[f32],
    d_gate: &mut [f32],
    d_up: &mut [f32],
    len: u32,
) {
    if ABSOLUTE_POS < len as usize {
        let x = gate[ABSOLUTE_POS];
        let sigmoid = 1.0 / (1.0 + (-x).exp());
        let d = d_y[ABSOLUTE_POS];
        d_gate[ABSOLUTE_POS] = d * up[ABSOLUTE_POS] * sigmoid * (1.0 + x * (1.0 - sigmoid));
        d_up[ABSOLUTE_POS] = d * x * sigmoid;
    }
}

/// `x` from element `first` on, zeros elsewhere.
#[cube(launch_unchecked)]
pub(crate) fn place(x: &[f32], out: &mut [f32], first: u32, len: u32, total: u32) {
    if ABSOLUTE_POS < total as usize {
        let (first, len) = (first as usize, len as usize);
        let mut value = 0.0f32;
        if (ABSOLUTE_POS >= first) & (ABSOLUTE_POS < first + len) {
            value = x[ABSOLUTE_POS - first];
        }
        out[ABSOLUTE_POS] = value;
    }
}
