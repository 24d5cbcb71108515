//! Products of queries in whole numbers with codes: exact sums, of 16 bits times 16.
//!
//! A code of 8 or 4 bits becomes a whole number of 16 bits by one instruction for 32 of them, and one more
//! multiplies these by those of a query and adds neighbours; f32 takes three times as many. A query of 16 bits is off by at most
//! 2^-16 of its largest element, a key of 8 bits by 2^-8.

use moa_core::RowType;

/// Queries, each as whole numbers times a step of its own.
#[derive(Clone, Copy)]
#[cfg_attr(not(target_arch = "x86_64"), allow(dead_code))]
pub(crate) struct Queries<'a> {
    /// `[count, dim]`.
    pub(crate) codes: &'a [i16],
    /// What a code of 1 stands for.
    pub(crate) steps: &'a [f32],
    /// Of all codes of a query.
    pub(crate) sums: &'a [i32],
}

/// The largest code of a query.
const TOP: f32 = 32_767.0;

/// A query of so many elements has sums within 32 bits: 127 * 32,767 * 512 is below 2^31.
const MOST_DIM: usize = 512;

/// Codes of a vector.
const LANES: usize = 32;

/// Whether keys of this type meet queries in whole numbers on this machine.
pub(crate) fn is_used(keys: RowType, dim: usize) -> bool {
    let codes = match keys {
        RowType::Int8 => LANES,
        RowType::Int4 => 2 * LANES,
        _ => return false,
    };
    super::has_avx512() && dim <= MOST_DIM && dim.is_multiple_of(codes)
}

/// Rounds a query; returns its step and the sum of its codes. The step is no number where an element is none, or
/// infinite.
pub(crate) fn round(query: &[f32], codes: &mut [i16]) -> (f32, i32) {
    // As bits, what is no number is larger than all numbers.
    let largest = query.iter().fold(0, |most, x| most.max(x.to_bits() & 0x7fff_ffff));
    let largest = f32::from_bits(largest);
    let step = if largest.is_finite() { largest / TOP } else { f32::NAN };
    // A step so small has no inverse, and what it makes of any key is 0.
    let inverse = if step < f32::MIN_POSITIVE { 0.0 } else { step.recip() };
    let mut sum = 0;
    for (code, x) in codes.iter_mut().zip(query) {
        *code = (x * inverse).round_ties_even() as i16;
        sum += i32::from(*code);
    }
    (step, sum)
}

#[cfg(not(target_arch = "x86_64"))]
pub(crate) fn dots<E>(dots: super::dot::Dots<'_, E>) -> Option<super::dot::Dots<'_, E>> {
    Some(dots)
}

#[cfg(target_arch = "x86_64")]
pub(crate) use self::by_avx512::{Codes, dots};

#[cfg(target_arch = "x86_64")]
mod by_avx512 {
    use std::arch::x86_64::*;

    use super::{LANES, Queries};
    use crate::element::RowElement;
    use crate::simd::dot::{Dots, KEYS, by_rows, put};

    /// Types whose codes become whole numbers of 16 bits, less an offset.
    pub(crate) trait Codes: RowElement {
        /// Vectors of 32 codes that 32 bytes hold: of the first half of a row's elements, then of the second.
        const VECTORS: usize;
        /// Whether what a code stands for has a half.
        const HALVES: bool;
        /// A code of 0 stands for so much, in halves if there are any.
        const OFFSET: i32;

        /// # Safety
        /// Needs AVX-512BW.
        unsafe fn words(bytes: __m256i) -> [__m512i; 2];
    }

    /// Gives back what has no queries in whole numbers.
    pub(crate) fn dots<E: Codes>(dots: Dots<'_, E>) -> Option<Dots<'_, E>> {
        let Some(queries) = dots.queries.whole else { return Some(dots) };
        let Dots { dim, keys, scales, scores, score_stride, .. } = dots;
        let count = queries.steps.len();
        assert!(crate::simd::has_avx512() && dim.is_multiple_of(LANES * E::VECTORS));
        assert!(queries.codes.len() >= count * dim && queries.sums.len() >= count);
        assert!(keys.len() >= scales.len() * E::units(dim));
        by_rows!(count, r, R => {
                    // SAFETY: the machine has AVX-512BW; queries and keys are whole rows of whole vectors.
                    unsafe {
        scores_of::<E, R>(dim, queries, r, (keys, scales), scores, score_stride);
                    }
                });
        None
    }

    /// `scores[(r + i) * stride + j]` of `R` queries from the one at `r` with all keys.
    ///
    /// # Safety
    /// Needs AVX-512BW, `R` queries from `r` on and a key of `dim` elements for each scale, which are whole vectors.
    #[target_feature(enable = "avx512f,avx512bw")]
    unsafe fn scores_of<E: Codes, const R: usize>(
        dim: usize,
        queries: Queries<'_>,
        r: usize,
        (keys, scales): (&[E], &[u16]),
        scores: &mut [f32],
        stride: usize,
    ) {
        let (units, count) = (E::units(dim), scales.len());
        let factors: [(f32, i32); R] = std::array::from_fn(|i| {
            let step = queries.steps[r + i];
            let unit = if E::HALVES { 0.5 * step } else { step };
            (unit, E::OFFSET * queries.sums[r + i])
        });
        for j in (0..count).step_by(KEYS) {
            // Keys after the last are the last again.
            let rows: [*const u8; KEYS] =
                std::array::from_fn(|k| keys[(j + k).min(count - 1) * units..].as_ptr().cast());
            let mut sums = [[_mm512_setzero_si512(); KEYS]; R];
            for step in 0..units / LANES {
                let mut words = [[_mm512_setzero_si512(); 2]; KEYS];
                for (words, row) in words.iter_mut().zip(rows) {
                    // SAFETY: 32 bytes of the row.
                    *words = unsafe { E::words(_mm256_loadu_si256(row.add(step * LANES).cast())) };
                }
                for (i, sums) in sums.iter_mut().enumerate() {
                    // By number, as in `panels`.
                    #[allow(clippy::needless_range_loop)]
                    for v in 0..E::VECTORS {
                        let at = (r + i) * dim + v * units + step * LANES;
                        // SAFETY: a vector of the query's.
                        let query =
                            unsafe { _mm512_loadu_si512(queries.codes.as_ptr().add(at).cast()) };
                        for k in 0..KEYS {
                            let words = words[k];
                            let products = _mm512_madd_epi16(words[v], query);
                            sums[k] = _mm512_add_epi32(sums[k], products);
                        }
                    }
                }
            }
            let scales = scales_from(&scales[j..]);
            for (i, (sums, (unit, offset))) in sums.into_iter().zip(factors).enumerate() {
                let sums = reduced(sums);
                let sums = if E::HALVES { _mm_slli_epi32::<1>(sums) } else { sums };
                let sums = _mm_add_epi32(sums, _mm_set1_epi32(offset));
                let sums = _mm_mul_ps(_mm_cvtepi32_ps(sums), _mm_set1_ps(unit));
                let sums = _mm_mul_ps(sums, scales);
                let mut four = [0.0; KEYS];
                // SAFETY: as many.
                unsafe { _mm_storeu_ps(four.as_mut_ptr(), sums) };
                put(&mut scores[(r + i) * stride + j..], four, count - j);
            }
        }
    }

    /// The first scales, widened.
    #[inline]
    #[target_feature(enable = "avx512f")]
    fn scales_from(scales: &[u16]) -> __m128 {
        let mut four = [0; KEYS];
        match scales.first_chunk() {
            Some(all) => four = *all,
            None => four.iter_mut().zip(scales).for_each(|(to, scale)| *to = *scale),
        }
        // SAFETY: as many.
        let bits = _mm_cvtepu16_epi32(unsafe { _mm_loadl_epi64(four.as_ptr().cast()) });
        // A bf16 is the upper half of an f32.
        _mm_castsi128_ps(_mm_slli_epi32::<16>(bits))
    }

    /// The sums of each vector's lanes.
    #[inline]
    #[target_feature(enable = "avx512f")]
    fn reduced([a, b, c, d]: [__m512i; KEYS]) -> __m128i {
        let ab = _mm512_add_epi32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
        let cd = _mm512_add_epi32(_mm512_unpacklo_epi32(c, d), _mm512_unpackhi_epi32(c, d));
        let all = _mm512_add_epi32(_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd));
        let (low, high) = (_mm512_castsi512_si256(all), _mm512_extracti64x4_epi64::<1>(all));
        let half = _mm256_add_epi32(low, high);
        _mm_add_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256::<1>(half))
    }
}
