//! Products of a few rows with many, read straight from their storage type.

use pulp::{Simd, WithSimd};

use super::outer::LANES;
use super::{prefetch, whole};
use crate::element::RowElement;

/// Rows of `dim` elements at a stride of codes, in memory that other code owns.
#[derive(Clone, Copy)]
pub(crate) struct Rows<'a, E> {
    pub(crate) data: &'a [E],
    pub(crate) stride: usize,
    pub(crate) count: usize,
}

impl<E: RowElement> Rows<'_, E> {
    fn check(&self, dim: usize) {
        let last = E::units(dim);
        assert!(self.count == 0 || self.data.len() >= (self.count - 1) * self.stride + last);
    }
}

/// Runs `$body` for 4, 3, 2 or 1 rows at a time: `$r` is the first of them and the constant `$n` their number.
macro_rules! by_rows {
    ($count:expr, $r:ident, $n:ident => $body:block) => {{
        let mut $r = 0;
        while $count - $r >= 4 {
            const $n: usize = 4;
            $body
            $r += 4;
        }
        match $count - $r {
            3 => {
                const $n: usize = 3;
                $body
            }
            2 => {
                const $n: usize = 2;
                $body
            }
            1 => {
                const $n: usize = 1;
                $body
            }
            _ => {}
        }
    }};
}
#[cfg(target_arch = "x86_64")]
pub(crate) use by_rows;

/// The query heads of one token and KV head.
#[derive(Clone, Copy)]
pub(crate) struct Queries<'a> {
    /// Rows that are padded with zeros to a multiple of [`LANES`].
    pub(crate) wide: &'a [f32],
    /// The same, where [`whole::is_used`] says so.
    pub(crate) whole: Option<whole::Queries<'a>>,
}

/// `scores[r * score_stride + j] = queries[r] . keys[j]`
pub(crate) struct Dots<'a, E> {
    pub(crate) dim: usize,
    pub(crate) queries: Queries<'a>,
    pub(crate) keys: &'a [E],
    /// One for each key, if the type has any.
    pub(crate) scales: &'a [u16],
    pub(crate) scores: &'a mut [f32],
    pub(crate) score_stride: usize,
}

/// Keys taken together, so that their sums do not wait for each other.
pub(crate) const KEYS: usize = 4;

impl<E: RowElement> WithSimd for Dots<'_, E> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Self { dim, queries, keys, scales, scores, score_stride } = self;
        let (stride, units) = (dim.next_multiple_of(LANES), E::units(dim));
        let (count, keys_count) = (queries.wide.len() / stride, keys.len() / units);
        if keys_count == 0 {
            return;
        }
        assert!(count == 0 || scores.len() >= (count - 1) * score_stride + keys_count);
        by_rows!(count, r, R => {
            for j in (0..keys_count).step_by(KEYS) {
                prefetch(keys[j * units..].as_ptr(), KEYS * units * size_of::<E>());
                // Keys after the last are the last again.
                let mut rows = [&keys[..0]; KEYS];
                for (k, row) in rows.iter_mut().enumerate() {
                    *row = &keys[(j + k).min(keys_count - 1) * units..][..units];
                }
                let queries = &queries.wide[r * stride..][..R * stride];
                let sums = dot_block::<S, E, R>(simd, dim, queries, rows);
                for (i, sums) in sums.into_iter().enumerate() {
                    let scores = &mut scores[(r + i) * score_stride + j..];
                    put(scores, reduced(simd, sums), keys_count - j);
                }
            }
        });
        multiply::<E>(scores, score_stride, scales);
    }
}

/// Writes the sums of the keys that there are.
#[inline(always)]
pub(crate) fn put(scores: &mut [f32], sums: [f32; KEYS], left: usize) {
    match scores.first_chunk_mut() {
        Some(all) if left >= KEYS => *all = sums,
        _ => scores.iter_mut().zip(sums).take(left).for_each(|(score, sum)| *score = sum),
    }
}

/// Multiplies each row's scores, or weights, of the first keys by the scales of these, if they have any.
#[inline(always)]
fn multiply<E: RowElement>(scores: &mut [f32], stride: usize, scales: &[u16]) {
    if scales.is_empty() {
        return;
    }
    for scores in scores.chunks_mut(stride) {
        scores.iter_mut().zip(scales).for_each(|(score, scale)| *score *= E::scale(*scale));
    }
}

/// Dot products of `R` rows, padded to a multiple of [`LANES`], with keys: not summed over lanes yet.
#[inline(always)]
fn dot_block<S: Simd, E: RowElement, const R: usize>(
    simd: S,
    dim: usize,
    rows: &[f32],
    keys: [&[E]; KEYS],
) -> [[S::f32s; KEYS]; R] {
    let (lanes, stride) = (S::F32_LANES, dim.next_multiple_of(LANES));
    assert!(rows.len() >= R * stride && keys.iter().all(|key| key.len() >= E::units(dim)));
    let mut sums = [[simd.splat_f32s(0.0); KEYS]; R];
    let rows = rows.as_ptr();
    let pairs = E::pairs(dim, lanes);
    for pair in 0..pairs {
        let places = E::places(dim, lanes, pair);
        let mut vectors = [[simd.splat_f32s(0.0); 2]; KEYS];
        for k in 0..KEYS {
            // SAFETY: a pair of the row's.
            vectors[k] = unsafe { E::load_pair(simd, keys[k].as_ptr(), dim, pair) };
        }
        // By number, as in `panels`.
        for (r, sums) in sums.iter_mut().enumerate() {
            for (v, at) in places.into_iter().enumerate() {
                // SAFETY: whole vectors before `dim`.
                let row = unsafe { f32::load(simd, rows.add(r * stride), dim, at) };
                for k in 0..KEYS {
                    sums[k] = simd.mul_add_e_f32s(row, vectors[k][v], sums[k]);
                }
            }
        }
    }
    for at in (pairs * 2 * lanes..dim).step_by(lanes) {
        let mut vectors = [simd.splat_f32s(0.0); KEYS];
        for (own, key) in vectors.iter_mut().zip(keys) {
            *own = vector(simd, key, dim, at);
        }
        for (r, sums) in sums.iter_mut().enumerate() {
            // SAFETY: padded rows are whole vectors.
            let row = unsafe { f32::load(simd, rows.add(r * stride), dim, at) };
            for (sum, key) in sums.iter_mut().zip(vectors) {
                *sum = simd.mul_add_e_f32s(row, key, *sum);
            }
        }
    }
    sums
}

/// The sums of each vector's lanes, in the same order whichever of the four a vector is.
#[inline(always)]
fn reduced<S: Simd>(simd: S, vectors: [S::f32s; KEYS]) -> [f32; KEYS] {
    #[cfg(target_arch = "x86_64")]
    if super::is_avx512::<S>() {
        // SAFETY: the machine has AVX-512; the same types.
        return unsafe { reduced_by_avx512(std::mem::transmute_copy(&vectors)) };
    }
    let mut sums = [0.0; KEYS];
    for (sum, vector) in sums.iter_mut().zip(vectors) {
        *sum = simd.reduce_sum_f32s(vector);
    }
    sums
}

#[cfg(target_arch = "x86_64")]
#[inline]
#[target_feature(enable = "avx512f")]
fn reduced_by_avx512([a, b, c, d]: [std::arch::x86_64::__m512; KEYS]) -> [f32; KEYS] {
    use std::arch::x86_64::*;
    let ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
    let cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
    let [low, high] = [_mm512_shuffle_ps::<0x44>(ab, cd), _mm512_shuffle_ps::<0xee>(ab, cd)];
    let all = _mm512_add_ps(low, high);
    let upper = _mm256_castpd_ps(_mm512_extractf64x4_pd::<1>(_mm512_castps_pd(all)));
    let half = _mm256_add_ps(_mm512_castps512_ps256(all), upper);
    let four = _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps::<1>(half));
    let mut sums = [0.0; KEYS];
    // SAFETY: as many.
    unsafe { _mm_storeu_ps(sums.as_mut_ptr(), four) };
    sums
}

/// `out[r * out_stride..] += sum over j of weights[r * weight_stride + j] * values[j]`, rows of `out` being padded
/// to a multiple of [`LANES`]. Weights are multiplied by the values' scales, if they have any.
///
/// Sums go on from where they are: they are the same bit for bit in however many calls values come.
pub(crate) struct WeightedSums<'a, E> {
    pub(crate) dim: usize,
    pub(crate) count: usize,
    pub(crate) weights: &'a mut [f32],
    pub(crate) weight_stride: usize,
    pub(crate) values: &'a [E],
    pub(crate) scales: &'a [u16],
    pub(crate) out: &'a mut [f32],
    pub(crate) out_stride: usize,
}

impl<E: RowElement> WithSimd for WeightedSums<'_, E> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Self { dim, count, weights, weight_stride, values, scales, out, out_stride } = self;
        multiply::<E>(weights, weight_stride, scales);
        by_rows!(count, r, R => {
            let (weights, out) = (&weights[r * weight_stride..], &mut out[r * out_stride..]);
            sum_rows::<S, E, R>(simd, dim, (weights, weight_stride), values, (out, out_stride));
        });
    }
}

/// [`WeightedSums`] of `R` rows.
#[inline(always)]
fn sum_rows<S: Simd, E: RowElement, const R: usize>(
    simd: S,
    dim: usize,
    (weights, weight_stride): (&[f32], usize),
    values: &[E],
    (out, out_stride): (&mut [f32], usize),
) {
    let (lanes, units) = (S::F32_LANES, E::units(dim));
    let count = values.len() / units;
    if count == 0 {
        return;
    }
    assert!(weights.len() >= (R - 1) * weight_stride + count);
    assert!(out.len() >= (R - 1) * out_stride + dim.next_multiple_of(LANES));
    let pairs = E::pairs(dim, lanes);
    let mut pair = 0;
    while pair < pairs {
        let stride = (weight_stride, out_stride);
        // SAFETY: pairs of the rows', and weights of all of them, by the checks above.
        unsafe {
            if pairs - pair >= 2 {
                sum_block::<S, E, R, 2>(simd, dim, pair, weights, values, out, stride);
                pair += 2;
            } else {
                sum_block::<S, E, R, 1>(simd, dim, pair, weights, values, out, stride);
                pair += 1;
            }
        }
    }
    for at in (pairs * 2 * lanes..dim).step_by(lanes) {
        let mut sums = [simd.splat_f32s(0.0); R];
        for (r, sum) in sums.iter_mut().enumerate() {
            *sum = simd.partial_load_f32s(&out[r * out_stride + at..][..lanes]);
        }
        for (j, value) in values.chunks_exact(units).enumerate() {
            let value = vector(simd, value, dim, at);
            for (r, sum) in sums.iter_mut().enumerate() {
                let weight = simd.splat_f32s(weights[r * weight_stride + j]);
                *sum = simd.mul_add_e_f32s(value, weight, *sum);
            }
        }
        for (r, sum) in sums.into_iter().enumerate() {
            simd.partial_store_f32s(&mut out[r * out_stride + at..][..lanes], sum);
        }
    }
}

/// `P` pairs of vectors of `R` rows of `out`, from this pair on.
///
/// # Safety
/// `values` must be rows of `dim` elements with these pairs, `out` must have their columns in `R` rows, and
/// `weights` an element for each of `values` in `R` rows.
#[inline(always)]
unsafe fn sum_block<S: Simd, E: RowElement, const R: usize, const P: usize>(
    simd: S,
    dim: usize,
    pair: usize,
    weights: &[f32],
    values: &[E],
    out: &mut [f32],
    (weight_stride, out_stride): (usize, usize),
) {
    let lanes = S::F32_LANES;
    let places: [[usize; 2]; P] = std::array::from_fn(|p| E::places(dim, lanes, pair + p));
    let mut sums = [[[simd.splat_f32s(0.0); 2]; P]; R];
    for (r, sums) in sums.iter_mut().enumerate() {
        for (sum, at) in sums.as_flattened_mut().iter_mut().zip(places.as_flattened()) {
            *sum = simd.partial_load_f32s(&out[r * out_stride + at..][..lanes]);
        }
    }
    for (j, value) in values.chunks_exact(E::units(dim)).enumerate() {
        if pair == 0 {
            prefetch(value.as_ptr(), size_of_val(value));
        }
        let mut vectors = [[simd.splat_f32s(0.0); 2]; P];
        for (p, vectors) in vectors.iter_mut().enumerate() {
            // SAFETY: promised by the caller.
            *vectors = unsafe { E::load_pair(simd, value.as_ptr(), dim, pair + p) };
        }
        for (r, sums) in sums.iter_mut().enumerate() {
            // SAFETY: promised by the caller.
            let weight = simd.splat_f32s(unsafe { *weights.get_unchecked(r * weight_stride + j) });
            for p in 0..P {
                let (sums, values) = (&mut sums[p], vectors[p]);
                for v in 0..2 {
                    sums[v] = simd.mul_add_e_f32s(values[v], weight, sums[v]);
                }
            }
        }
    }
    for (r, sums) in sums.iter().enumerate() {
        for (sum, at) in sums.as_flattened().iter().zip(places.as_flattened()) {
            simd.partial_store_f32s(&mut out[r * out_stride + at..][..lanes], *sum);
        }
    }
}

/// Rows as f32.
pub(crate) struct Widen<'a, E> {
    pub(crate) dim: usize,
    pub(crate) rows: &'a [E],
    /// One for each row, if the type has any.
    pub(crate) scales: &'a [u16],
    pub(crate) to: &'a mut [f32],
}

impl<E: RowElement> WithSimd for Widen<'_, E> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Self { dim, rows, scales, to } = self;
        let (lanes, pairs) = (S::F32_LANES, E::pairs(dim, S::F32_LANES));
        let rows = rows.chunks_exact(E::units(dim)).zip(to.chunks_exact_mut(dim));
        for (i, (row, to)) in rows.enumerate() {
            let scale = scales.get(i).map_or(1.0, |scale| E::scale(*scale));
            let factor = simd.splat_f32s(scale);
            for pair in 0..pairs {
                // SAFETY: a pair of the row's.
                let vectors = unsafe { E::load_pair(simd, row.as_ptr(), dim, pair) };
                for (vector, at) in vectors.into_iter().zip(E::places(dim, lanes, pair)) {
                    simd.partial_store_f32s(&mut to[at..][..lanes], simd.mul_f32s(vector, factor));
                }
            }
            for (at, to) in to.iter_mut().enumerate().skip(pairs * 2 * lanes) {
                *to = E::element(row, dim, at) * scale;
            }
        }
    }
}

/// `y[r * y_stride + j] = rows[r] . weights[j]` for `R` rows of `dim` f32 elements that are padded with zeros to
/// a multiple of [`LANES`].
///
/// Weights are read one after the other, in one stream as long as the matrix, which memory answers fastest.
#[inline(always)]
pub(crate) fn streamed_dots<S: Simd, E: RowElement, const R: usize>(
    simd: S,
    dim: usize,
    rows: Rows<'_, f32>,
    weights: Rows<'_, E>,
    y: &mut [f32],
    y_stride: usize,
) {
    if weights.count == 0 {
        return;
    }
    assert!(rows.count >= R);
    rows.check(dim.next_multiple_of(LANES));
    weights.check(dim);
    assert!(y.len() >= (R - 1) * y_stride + weights.count);
    for j in 0..weights.count {
        // SAFETY: rows and weights lie inside their slices by the checks above.
        let sums = unsafe {
            match S::REGISTER_COUNT >= 32 {
                true => streamed_dot::<S, E, R, 4>(simd, dim, rows, weights, j),
                false => streamed_dot::<S, E, R, 2>(simd, dim, rows, weights, j),
            }
        };
        for (r, sum) in sums.into_iter().enumerate() {
            y[r * y_stride + j] = simd.reduce_sum_f32s(sum);
        }
    }
}

/// Unreduced dot products of `R` rows with one row of weights, `U` vectors of it at a time, so that sums do not
/// wait for each other.
///
/// # Safety
/// `rows` must have `R` rows of `dim` elements rounded up to [`LANES`], `weights` a row `j` of `dim` elements.
#[inline(always)]
unsafe fn streamed_dot<S: Simd, E: RowElement, const R: usize, const U: usize>(
    simd: S,
    dim: usize,
    rows: Rows<'_, f32>,
    weights: Rows<'_, E>,
    j: usize,
) -> [S::f32s; R] {
    let lanes = S::F32_LANES;
    let mut sums = [[simd.splat_f32s(0.0); R]; U];
    // SAFETY: inside the slice by the caller's promise.
    let (x, w) = (rows.data.as_ptr(), unsafe { weights.data.as_ptr().add(j * weights.stride) });
    let mut at = 0;
    while dim - at >= U * lanes {
        prefetch(w.wrapping_add(at), U * lanes * size_of::<E>());
        for (u, sums) in sums.iter_mut().enumerate() {
            // SAFETY: whole vectors before `dim`.
            let weight = unsafe { E::load(simd, w, dim, at + u * lanes) };
            for (r, sum) in sums.iter_mut().enumerate() {
                // SAFETY: as above.
                let x = unsafe { f32::load(simd, x.add(r * rows.stride), dim, at + u * lanes) };
                *sum = simd.mul_add_e_f32s(x, weight, *sum);
            }
        }
        at += U * lanes;
    }
    while at < dim {
        let weight = &weights.data[j * weights.stride..][..E::units(dim)];
        let weight = partial(simd, weight, dim, at);
        for (r, sum) in sums[0].iter_mut().enumerate() {
            let x = simd.partial_load_f32s(&rows.data[r * rows.stride + at..][..lanes]);
            *sum = simd.mul_add_e_f32s(x, weight, *sum);
        }
        at += lanes;
    }
    std::array::from_fn(|r| {
        let mut total = sums[0][r];
        for sums in &sums[1..] {
            total = simd.add_f32s(total, sums[r]);
        }
        total
    })
}

/// The vector of a row's elements from the one at `at`, with zeros after its last.
#[inline(always)]
fn vector<S: Simd, E: RowElement>(simd: S, row: &[E], dim: usize, at: usize) -> S::f32s {
    if dim - at < S::F32_LANES || row.len() < E::units(dim) {
        return partial(simd, row, dim, at);
    }
    // SAFETY: a whole vector of a whole row.
    unsafe { E::load(simd, row.as_ptr(), dim, at) }
}

/// The same, element by element.
#[inline(always)]
fn partial<S: Simd, E: RowElement>(simd: S, row: &[E], dim: usize, at: usize) -> S::f32s {
    let mut wide = [0.0; LANES];
    for (i, wide) in wide.iter_mut().enumerate().take(S::F32_LANES.min(dim - at)) {
        *wide = E::element(row, dim, at + i);
    }
    simd.partial_load_f32s(&wide[..S::F32_LANES])
}

#[cfg(test)]
#[path = "dot_tests.rs"]
mod tests;
