//! The codes of narrow rows.

use bytemuck::{Pod, Zeroable};
use moa_core::RowType;
use pulp::Simd;

use super::RowElement;
use crate::simd::dot::Dots;
use crate::simd::{dispatch, whole};

/// The codes of narrow rows, a byte each.
macro_rules! codes {
    ($($(#[$doc:meta])* $name:ident)+) => {
        $(
            $(#[$doc])*
            #[derive(Clone, Copy, Debug)]
            #[repr(transparent)]
            pub(crate) struct $name(u8);

            // SAFETY: a byte, of which any is valid.
            unsafe impl Zeroable for $name {}
            // SAFETY: as above.
            unsafe impl Pod for $name {}
        )+
    };
}

codes! {
    /// [`RowType::Int8`].
    Int8
    /// [`RowType::Fp8`].
    Fp8
    /// Two of [`RowType::Int4`].
    Int4
}

/// A loop over a vector's lanes, which the compiler turns into vector instructions.
#[inline(always)]
fn lanes<S: Simd>(simd: S, lane: impl Fn(usize) -> f32) -> S::f32s {
    let mut vector = simd.splat_f32s(0.0);
    let lanes = bytemuck::cast_slice_mut::<S::f32s, f32>(std::slice::from_mut(&mut vector));
    for (i, to) in lanes.iter_mut().enumerate() {
        *to = lane(i);
    }
    vector
}

/// Codes to pairs of vectors, where compilers do not find the instructions.
#[cfg(target_arch = "x86_64")]
mod by_avx512 {
    use std::arch::x86_64::*;

    /// # Safety
    /// Needs AVX-512F and 32 codes.
    #[inline]
    #[target_feature(enable = "avx512f")]
    pub(super) unsafe fn int8(codes: *const u8) -> [__m512; 2] {
        // SAFETY: promised by the caller.
        let [low, high] =
            unsafe { [_mm_loadu_si128(codes.cast()), _mm_loadu_si128(codes.add(16).cast())] };
        [
            _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(low)),
            _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(high)),
        ]
    }

    /// The bits of e4m3 where f16 has its own: numbers come out `2^-8` times as large.
    ///
    /// # Safety
    /// Needs AVX-512BW and 32 codes.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw")]
    pub(super) unsafe fn fp8(codes: *const u8) -> [__m512; 2] {
        // SAFETY: promised by the caller.
        let wide = _mm512_cvtepi8_epi16(unsafe { _mm256_loadu_si256(codes.cast()) });
        let moved = _mm512_slli_epi16::<7>(wide);
        // The sign has come to two places, of which the upper one counts.
        let halves = _mm512_and_si512(moved, _mm512_set1_epi16(0xbf80_u16 as i16));
        [
            _mm512_cvtph_ps(_mm512_castsi512_si256(halves)),
            _mm512_cvtph_ps(_mm512_extracti64x4_epi64::<1>(halves)),
        ]
    }

    /// The low and the high halves of bytes.
    ///
    /// # Safety
    /// Needs AVX-512F and 16 bytes.
    #[inline]
    #[target_feature(enable = "avx512f")]
    pub(super) unsafe fn int4(bytes: *const u8) -> [__m512; 2] {
        // SAFETY: promised by the caller.
        let codes = _mm512_cvtepu8_epi32(unsafe { _mm_loadu_si128(bytes.cast()) });
        // Looks at the lowest 4 bits of each index alone.
        let values = _mm512_setr_ps(
            -7.5, -6.5, -5.5, -4.5, -3.5, -2.5, -1.5, -0.5, 0.5, 1.5, 2.5, 3.5, 4.5, 5.5, 6.5, 7.5,
        );
        [
            _mm512_permutexvar_ps(codes, values),
            _mm512_permutexvar_ps(_mm512_srli_epi32::<4>(codes), values),
        ]
    }
}

/// The pair of vectors of a type on AVX-512, from where its bytes begin.
macro_rules! load_pair {
    ($by_avx512:path, |$dim:ident, $pair:ident, $lanes:ident| $at:expr) => {
        #[inline(always)]
        unsafe fn load_pair<S: Simd>(
            simd: S,
            row: *const Self,
            $dim: usize,
            $pair: usize,
        ) -> [S::f32s; 2] {
            let $lanes = S::F32_LANES;
            #[cfg(target_arch = "x86_64")]
            if crate::simd::is_avx512::<S>() {
                // SAFETY: the machine has AVX-512; the codes are promised by the caller.
                let wide = unsafe { $by_avx512(row.cast::<u8>().add($at)) };
                // SAFETY: the same type.
                return unsafe { std::mem::transmute_copy(&wide) };
            }
            let [low, high] = Self::places($dim, $lanes, $pair);
            // SAFETY: promised by the caller.
            unsafe { [Self::load(simd, row, $dim, low), Self::load(simd, row, $dim, high)] }
        }
    };
}

/// What both of the types whose codes are bytes do.
macro_rules! bytes {
    ($name:ident, $value:expr, $by_avx512:path, $($more:item)*) => {
        impl RowElement for $name {
            const TYPE: RowType = RowType::$name;

            #[inline(always)]
            unsafe fn load<S: Simd>(simd: S, row: *const Self, _: usize, at: usize) -> S::f32s {
                // SAFETY: promised by the caller.
                lanes(simd, |i| $value(unsafe { (*row.add(at + i)).0 }))
            }

            load_pair!($by_avx512, |dim, pair, lanes| 2 * pair * lanes);

            #[inline(always)]
            fn element(row: &[Self], _dim: usize, at: usize) -> f32 {
                $value(row[at].0)
            }

            fn narrow(feedback: Option<&[f32]>, row: &mut [f32], to: &mut [Self]) -> u16 {
                Self::TYPE.narrow_with(feedback, row, bytemuck::cast_slice_mut(to))
            }

            $($more)*
        }
    };
}

bytes! {
    Int8, |code: u8| f32::from(code as i8), by_avx512::int8,
    fn dots(dots: Dots<'_, Self>) {
        if let Some(dots) = whole::dots(dots) {
            dispatch(dots);
        }
    }
}

/// The value of an e4m3 that is a number, as all that are cached are, over [`Fp8::UNIT`]: without a branch.
#[inline(always)]
fn e4m3(code: u8) -> f32 {
    let code = u32::from(code);
    f32::from_bits((code & 0x80) << 24 | (code & 0x7f) << 20) * f32::from_bits((127 + 112) << 23)
}

bytes! {
    Fp8, e4m3, by_avx512::fp8,
    const UNIT: f32 = 256.0;
}

impl RowElement for Int4 {
    const TYPE: RowType = RowType::Int4;

    fn units(dim: usize) -> usize {
        dim.div_ceil(2)
    }

    #[inline(always)]
    fn pairs(dim: usize, lanes: usize) -> usize {
        // Of rows with another rest the halves of bytes are no vectors.
        if dim.is_multiple_of(2 * lanes) { dim / (2 * lanes) } else { 0 }
    }

    #[inline(always)]
    fn places(dim: usize, lanes: usize, pair: usize) -> [usize; 2] {
        [pair * lanes, dim / 2 + pair * lanes]
    }

    load_pair!(by_avx512::int4, |dim, pair, lanes| pair * lanes);

    #[inline(always)]
    unsafe fn load<S: Simd>(simd: S, row: *const Self, dim: usize, at: usize) -> S::f32s {
        let half = Self::units(dim);
        // SAFETY: promised by the caller, where `i` is an element of the row.
        let low = |i: usize| f32::from(unsafe { (*row.add(i)).0 } & 15) - 7.5;
        // SAFETY: as above, where `i` is not below `half`.
        let high = |i: usize| f32::from(unsafe { (*row.add(i - half)).0 } >> 4) - 7.5;
        if at + S::F32_LANES <= half {
            lanes(simd, |i| low(at + i))
        } else if at >= half {
            lanes(simd, |i| high(at + i))
        } else {
            lanes(simd, |i| if at + i < half { low(at + i) } else { high(at + i) })
        }
    }

    #[inline(always)]
    fn element(row: &[Self], dim: usize, at: usize) -> f32 {
        let half = Self::units(dim);
        let code = if at < half { row[at].0 & 15 } else { row[at - half].0 >> 4 };
        f32::from(code) - 7.5
    }

    fn narrow(feedback: Option<&[f32]>, row: &mut [f32], to: &mut [Self]) -> u16 {
        Self::TYPE.narrow_with(feedback, row, bytemuck::cast_slice_mut(to))
    }

    fn dots(dots: Dots<'_, Self>) {
        if let Some(dots) = whole::dots(dots) {
            dispatch(dots);
        }
    }
}

#[cfg(target_arch = "x86_64")]
impl whole::Codes for Int8 {
    const VECTORS: usize = 1;
    const HALVES: bool = false;
    const OFFSET: i32 = 0;

    #[inline(always)]
    unsafe fn words(bytes: std::arch::x86_64::__m256i) -> [std::arch::x86_64::__m512i; 2] {
        use std::arch::x86_64::{_mm512_cvtepi8_epi16, _mm512_setzero_si512};
        // SAFETY: promised by the caller.
        unsafe { [_mm512_cvtepi8_epi16(bytes), _mm512_setzero_si512()] }
    }
}

#[cfg(target_arch = "x86_64")]
impl whole::Codes for Int4 {
    const VECTORS: usize = 2;
    const HALVES: bool = true;
    const OFFSET: i32 = -15;

    #[inline(always)]
    unsafe fn words(bytes: std::arch::x86_64::__m256i) -> [std::arch::x86_64::__m512i; 2] {
        use std::arch::x86_64::*;
        // SAFETY: promised by the caller.
        unsafe {
            let bytes = _mm512_cvtepu8_epi16(bytes);
            let low = _mm512_and_si512(bytes, _mm512_set1_epi16(15));
            [low, _mm512_srli_epi16::<4>(bytes)]
        }
    }
}

#[cfg(test)]
mod tests {
    use half::{bf16, f16};

    use super::*;

    struct Loads<'a, E>(&'a [E], usize);

    impl<E: RowElement> pulp::WithSimd for Loads<'_, E> {
        type Output = Vec<f32>;

        #[inline(always)]
        fn with_simd<S: Simd>(self, simd: S) -> Vec<f32> {
            let Self(row, dim) = self;
            let mut all = vec![f32::NAN; dim];
            let mut put = |at: usize, vector: S::f32s| {
                all[at..][..S::F32_LANES].copy_from_slice(bytemuck::cast_slice(&[vector]));
            };
            for pair in 0..E::pairs(dim, S::F32_LANES) {
                // SAFETY: a pair of the row.
                let vectors = unsafe { E::load_pair(simd, row.as_ptr(), dim, pair) };
                let places = E::places(dim, S::F32_LANES, pair);
                places.into_iter().zip(vectors).for_each(|(at, vector)| put(at, vector));
            }
            for at in (E::pairs(dim, S::F32_LANES) * 2 * S::F32_LANES..dim).step_by(S::F32_LANES) {
                // SAFETY: whole vectors of the row.
                put(at, unsafe { E::load(simd, row.as_ptr(), dim, at) });
            }
            all
        }
    }

    #[test]
    fn every_code_is_what_the_specification_says_on_every_instruction_set() {
        fn check<E: RowElement>(widen: impl Fn(&[E], &mut [f32])) {
            for dim in [256, 240, 272, 48, 16] {
                let codes = E::units(dim) * size_of::<E>();
                let bytes: Vec<u8> = (0..codes).map(|i| (i * 89 + i / 256) as u8).collect();
                let row: Vec<E> =
                    bytes.chunks_exact(size_of::<E>()).map(bytemuck::pod_read_unaligned).collect();
                let mut expected = vec![0.0; dim];
                widen(&row, &mut expected);
                for found in
                    crate::simd::tests::on_every_arch(|| crate::simd::dispatch(Loads(&row, dim)))
                {
                    for (at, (found, expected)) in found.iter().zip(&expected).enumerate() {
                        let same = |x: f32| x * E::UNIT == *expected || expected.is_nan();
                        assert!(same(*found), "{dim}, {at}: {found} {expected}");
                        assert!(same(E::element(&row, dim, at)));
                    }
                }
            }
        }
        fn codes<E: RowElement>() {
            check::<E>(|row, to| E::TYPE.widen(bytemuck::cast_slice(row), 0x3f80, to));
        }
        codes::<Int8>();
        codes::<Fp8>();
        codes::<Int4>();
        check::<f16>(|row, to| row.iter().zip(to).for_each(|(x, to)| *to = x.to_f32()));
        check::<bf16>(|row, to| row.iter().zip(to).for_each(|(x, to)| *to = x.to_f32()));
    }
}
