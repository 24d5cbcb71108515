use bytemuck::Pod;
use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};
use moa_core::Dtype;
use pulp::Simd;

/// An element type that a cache can hold and a kernel can read.
pub(crate) trait Element: Pod + Send + Sync {
    /// The type's name.
    const DTYPE: Dtype;

    /// Branch-free, so that loops over it become SIMD code.
    fn widen(self) -> f32;

    /// One vector's worth of elements, exact.
    ///
    /// # Safety
    /// `from` must be valid for `S::F32_LANES` elements.
    unsafe fn load<S: Simd>(simd: S, from: *const Self) -> S::f32s;

    /// Rounds to the nearest representable values.
    fn narrow_slice(from: &[f32], to: &mut [Self]);

    /// The elements themselves, if they are f32 already.
    fn as_f32(_from: &[Self]) -> Option<&[f32]> {
        None
    }

    /// The elements themselves, if they are bf16.
    fn as_bf16(_from: &[Self]) -> Option<&[bf16]> {
        None
    }

    /// Exact. To be inlined into code compiled for the machine's instruction set.
    #[inline(always)]
    fn widen_slice(from: &[Self], to: &mut [f32]) {
        for (to, &from) in to.iter_mut().zip(from) {
            *to = from.widen();
        }
    }
}

impl Element for f32 {
    const DTYPE: Dtype = Dtype::F32;

    #[inline(always)]
    fn widen(self) -> f32 {
        self
    }

    #[inline(always)]
    unsafe fn load<S: Simd>(_simd: S, from: *const Self) -> S::f32s {
        // SAFETY: promised by the caller; a vector is plain old data.
        unsafe { from.cast::<S::f32s>().read_unaligned() }
    }

    fn narrow_slice(from: &[f32], to: &mut [Self]) {
        to.copy_from_slice(from);
    }

    #[inline(always)]
    fn as_f32(from: &[Self]) -> Option<&[f32]> {
        Some(from)
    }
}

impl Element for bf16 {
    const DTYPE: Dtype = Dtype::Bf16;

    #[inline(always)]
    fn widen(self) -> f32 {
        f32::from_bits(u32::from(self.to_bits()) << 16)
    }

    #[inline(always)]
    unsafe fn load<S: Simd>(simd: S, from: *const Self) -> S::f32s {
        // SAFETY: promised by the caller.
        unsafe { widen_vector(simd, from) }
    }

    fn narrow_slice(from: &[f32], to: &mut [Self]) {
        for (to, from) in to.iter_mut().zip(from) {
            let bits = from.to_bits();
            // To nearest, ties to even; a NaN stays one.
            let rounded = bits.wrapping_add(0x7fff + (bits >> 16 & 1)) >> 16;
            let narrow = if from.is_nan() { bits >> 16 | 0x40 } else { rounded };
            *to = Self::from_bits(narrow as u16);
        }
    }

    #[inline(always)]
    fn as_bf16(from: &[Self]) -> Option<&[bf16]> {
        Some(from)
    }
}

impl Element for f16 {
    const DTYPE: Dtype = Dtype::F16;

    #[inline(always)]
    fn widen(self) -> f32 {
        let bits = u32::from(self.to_bits());
        let sign = (bits & 0x8000) << 16;
        let magnitude = bits & 0x7fff;
        // Moves exponent and mantissa into place, then corrects the exponent's bias (127 - 15) by
        // a multiplication, which also normalises subnormal numbers.
        let scaled = f32::from_bits(magnitude << 13) * f32::from_bits((127 + 112) << 23);
        let special = if magnitude >= 0x7c00 { 0x7f80_0000 } else { 0 };
        f32::from_bits(sign | scaled.to_bits() | special)
    }

    #[inline(always)]
    unsafe fn load<S: Simd>(simd: S, from: *const Self) -> S::f32s {
        #[cfg(target_arch = "x86_64")]
        if crate::simd::is_avx512::<S>() {
            use std::arch::x86_64::{__m256i, _mm256_loadu_si256, _mm512_cvtph_ps};
            // SAFETY: the machine has AVX-512F, or there would be no value of that type.
            let wide = unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(from.cast::<__m256i>())) };
            // SAFETY: the same type, as just compared.
            return unsafe { std::mem::transmute_copy(&wide) };
        }
        // SAFETY: promised by the caller.
        unsafe { widen_vector(simd, from) }
    }

    fn narrow_slice(from: &[f32], to: &mut [Self]) {
        to.convert_from_f32_slice(from);
    }
}

/// A loop over a vector's lanes, which the compiler turns into a widening load and shifts.
///
/// # Safety
/// `from` must be valid for `S::F32_LANES` elements.
#[inline(always)]
unsafe fn widen_vector<S: Simd, E: Element>(simd: S, from: *const E) -> S::f32s {
    let mut vector = simd.splat_f32s(0.0);
    let lanes = bytemuck::cast_slice_mut::<S::f32s, f32>(std::slice::from_mut(&mut vector));
    for (i, lane) in lanes.iter_mut().enumerate() {
        // SAFETY: promised by the caller.
        *lane = unsafe { *from.add(i) }.widen();
    }
    vector
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn widening_is_exact_for_every_bit_pattern() {
        for bits in 0..=u16::MAX {
            let (h, b) = (f16::from_bits(bits), bf16::from_bits(bits));
            assert!(
                h.is_nan() && h.widen().is_nan() || h.widen().to_bits() == h.to_f32().to_bits()
            );
            assert!(
                b.is_nan() && b.widen().is_nan() || b.widen().to_bits() == b.to_f32().to_bits()
            );
        }
    }

    #[test]
    fn narrowing_to_bf16_rounds_to_nearest_even() {
        let x: Vec<f32> = (0..=u32::MAX).step_by(997).map(f32::from_bits).collect();
        let mut narrow = vec![bf16::ZERO; x.len()];
        bf16::narrow_slice(&x, &mut narrow);
        for (x, narrow) in x.iter().zip(narrow) {
            let expected = bf16::from_f32(*x);
            assert!(narrow.to_bits() == expected.to_bits() || narrow.is_nan() && x.is_nan());
        }
    }
}
