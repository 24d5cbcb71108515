//! Products of a few rows with many, read straight from their storage type.

use pulp::Simd;

use super::outer::LANES;
use crate::element::Element;

/// Rows of `dim` elements at a stride, in memory that other code owns.
#[derive(Clone, Copy)]
pub(crate) struct Rows<'a, E> {
    pub(crate) data: &'a [E],
    pub(crate) stride: usize,
    pub(crate) count: usize,
}

impl<E> Rows<'_, E> {
    fn check(&self, dim: usize) {
        assert!(self.count == 0 || self.data.len() >= (self.count - 1) * self.stride + dim);
    }
}

/// Keys taken together, so that their sums do not wait for each other.
const KEYS: usize = 4;

/// `scores[r * score_stride + j] = rows[r] . keys[j]` for `R` rows of `dim` f32 elements that are
/// padded with zeros to a multiple of [`LANES`].
#[inline(always)]
pub(crate) fn dots<S: Simd, E: Element, const R: usize>(
    simd: S,
    dim: usize,
    rows: Rows<'_, f32>,
    keys: Rows<'_, E>,
    scores: &mut [f32],
    score_stride: usize,
) {
    if keys.count == 0 {
        return;
    }
    assert!(rows.count >= R);
    rows.check(dim.next_multiple_of(LANES));
    keys.check(dim);
    assert!(scores.len() >= (R - 1) * score_stride + keys.count);
    let mut j = 0;
    while keys.count - j >= KEYS {
        // SAFETY: rows and keys lie inside their slices by the checks above.
        let sums = unsafe { dot_block::<S, E, R, KEYS>(simd, dim, rows, keys, j) };
        for (i, sums) in sums.iter().enumerate() {
            for (r, &sum) in sums.iter().enumerate() {
                scores[r * score_stride + j + i] = simd.reduce_sum_f32s(sum);
            }
        }
        j += KEYS;
    }
    while j < keys.count {
        // SAFETY: as above.
        let sums = unsafe { dot_block::<S, E, R, 1>(simd, dim, rows, keys, j) };
        for (r, &sum) in sums[0].iter().enumerate() {
            scores[r * score_stride + j] = simd.reduce_sum_f32s(sum);
        }
        j += 1;
    }
}

/// Unreduced dot products of `R` rows with `K` keys.
///
/// # Safety
/// `rows` must have `R` rows of `dim` elements rounded up to [`LANES`], `keys` the rows
/// `j..j + K` of `dim` elements.
#[inline(always)]
unsafe fn dot_block<S: Simd, E: Element, const R: usize, const K: usize>(
    simd: S,
    dim: usize,
    rows: Rows<'_, f32>,
    keys: Rows<'_, E>,
    j: usize,
) -> [[S::f32s; R]; K] {
    let lanes = S::F32_LANES;
    let mut sums = [[simd.splat_f32s(0.0); R]; K];
    // SAFETY: inside the slice by the caller's promise.
    let (rows_at, keys_at) =
        (rows.data.as_ptr(), unsafe { keys.data.as_ptr().add(j * keys.stride) });
    let mut at = 0;
    while dim - at >= lanes {
        let mut row = [simd.splat_f32s(0.0); R];
        for (r, row) in row.iter_mut().enumerate() {
            // SAFETY: whole vectors before `dim`.
            *row = unsafe { f32::load(simd, rows_at.add(r * rows.stride + at)) };
        }
        for (k, sums) in sums.iter_mut().enumerate() {
            // SAFETY: as above.
            let key = unsafe { E::load(simd, keys_at.add(k * keys.stride + at)) };
            for (sum, row) in sums.iter_mut().zip(row) {
                *sum = simd.mul_add_e_f32s(row, key, *sum);
            }
        }
        at += lanes;
    }
    if at < dim {
        for (k, sums) in sums.iter_mut().enumerate() {
            let key = &keys.data[(j + k) * keys.stride + at..][..dim - at];
            let key = partial(simd, key);
            for (r, sum) in sums.iter_mut().enumerate() {
                let row = simd.partial_load_f32s(&rows.data[r * rows.stride + at..][..lanes]);
                *sum = simd.mul_add_e_f32s(row, key, *sum);
            }
        }
    }
    sums
}

/// `out[r * out_stride..] += sum over j of weights[r * weight_stride + j] * values[j]` for `R` rows;
/// rows of `out` are padded to a multiple of [`LANES`].
#[inline(always)]
pub(crate) fn weighted_sum<S: Simd, E: Element, const R: usize>(
    simd: S,
    dim: usize,
    weights: &[f32],
    weight_stride: usize,
    values: Rows<'_, E>,
    out: &mut [f32],
    out_stride: usize,
) {
    if values.count == 0 {
        return;
    }
    let lanes = S::F32_LANES;
    values.check(dim);
    assert!(weights.len() >= (R - 1) * weight_stride + values.count);
    assert!(out.len() >= (R - 1) * out_stride + dim.next_multiple_of(LANES));
    let mut at = 0;
    while dim - at >= 4 * lanes {
        // SAFETY: whole vectors inside the slices by the checks above.
        unsafe {
            sum_block::<S, E, R, 4>(simd, at, weights, weight_stride, values, out, out_stride)
        };
        at += 4 * lanes;
    }
    while dim - at >= lanes {
        // SAFETY: as above.
        unsafe {
            sum_block::<S, E, R, 1>(simd, at, weights, weight_stride, values, out, out_stride)
        };
        at += lanes;
    }
    if at < dim {
        for r in 0..R {
            let out = &mut out[r * out_stride + at..][..lanes];
            let mut sum = simd.partial_load_f32s(out);
            for j in 0..values.count {
                let value = partial(simd, &values.data[j * values.stride + at..][..dim - at]);
                let weight = simd.splat_f32s(weights[r * weight_stride + j]);
                sum = simd.mul_add_e_f32s(value, weight, sum);
            }
            simd.partial_store_f32s(out, sum);
        }
    }
}

/// `V` vectors of `R` rows of `out`, from column `at`.
///
/// # Safety
/// The columns must lie inside every row of `values` and `out`, and `weights` must have
/// `values.count` elements in each of `R` rows.
#[inline(always)]
unsafe fn sum_block<S: Simd, E: Element, const R: usize, const V: usize>(
    simd: S,
    at: usize,
    weights: &[f32],
    weight_stride: usize,
    values: Rows<'_, E>,
    out: &mut [f32],
    out_stride: usize,
) {
    let lanes = S::F32_LANES;
    let mut sums = [[simd.splat_f32s(0.0); V]; R];
    for j in 0..values.count {
        let mut value = [simd.splat_f32s(0.0); V];
        for (v, value) in value.iter_mut().enumerate() {
            // SAFETY: promised by the caller.
            *value = unsafe {
                E::load(simd, values.data.as_ptr().add(j * values.stride + at + v * lanes))
            };
        }
        for (r, sums) in sums.iter_mut().enumerate() {
            // SAFETY: promised by the caller.
            let weight = simd.splat_f32s(unsafe { *weights.get_unchecked(r * weight_stride + j) });
            for (sum, value) in sums.iter_mut().zip(value) {
                *sum = simd.mul_add_e_f32s(value, weight, *sum);
            }
        }
    }
    for (r, sums) in sums.iter().enumerate() {
        for (v, &sum) in sums.iter().enumerate() {
            let out = &mut out[r * out_stride + at + v * lanes..][..lanes];
            let old = simd.partial_load_f32s(out);
            simd.partial_store_f32s(out, simd.add_f32s(old, sum));
        }
    }
}

/// Fewer elements than a vector, with zeros after them.
#[inline(always)]
fn partial<S: Simd, E: Element>(simd: S, from: &[E]) -> S::f32s {
    let mut wide = [0.0; LANES];
    E::widen_slice(from, &mut wide[..from.len()]);
    simd.partial_load_f32s(&wide[..S::F32_LANES])
}
