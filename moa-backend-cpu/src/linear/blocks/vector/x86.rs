use std::arch::x86_64::*;

use super::Vector;

/// AVX2, FMA and F16C.
#[derive(Clone, Copy)]
pub(crate) struct Avx2;

/// AVX-512 with VNNI: products of 4 codes and their sum in one instruction.
#[derive(Clone, Copy)]
pub(crate) struct Vnni;

/// What both do alike, on vectors of 32 bytes.
macro_rules! on_256_bits {
    () => {
        type Bytes = __m256i;
        type Ints = __m256i;
        type Floats = __m256;

        #[inline(always)]
        unsafe fn half(bits: u16) -> f32 {
            unsafe { _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(bits.into()))) }
        }

        #[inline(always)]
        unsafe fn halves([a, b, c, d]: [*const u8; 4]) -> __m256 {
            unsafe {
                let [a, b, c, d] = [a.cast::<i32>(), b.cast(), c.cast(), d.cast()];
                let all = _mm_setr_epi32(
                    a.read_unaligned(),
                    b.read_unaligned(),
                    c.read_unaligned(),
                    d.read_unaligned(),
                );
                _mm256_cvtph_ps(all)
            }
        }

        #[inline(always)]
        unsafe fn bytes(from: *const u8) -> __m256i {
            unsafe { _mm256_loadu_si256(from.cast()) }
        }

        #[inline(always)]
        unsafe fn nibbles(from: *const u8) -> __m256i {
            unsafe {
                let both = _mm256_broadcastsi128_si256(_mm_loadu_si128(from.cast()));
                let low = _mm256_srlv_epi64(both, _mm256_setr_epi64x(0, 0, 4, 4));
                _mm256_and_si256(low, _mm256_set1_epi8(15))
            }
        }

        #[inline(always)]
        unsafe fn sixteens(bits: u32) -> __m256i {
            unsafe {
                // Byte i gets the byte of its bit, and keeps that bit alone.
                let place = _mm256_setr_epi64x(
                    0,
                    0x0101_0101_0101_0101,
                    0x0202_0202_0202_0202,
                    0x0303_0303_0303_0303,
                );
                let own = _mm256_set1_epi64x(0x8040_2010_0804_0201_u64 as i64);
                let spread = _mm256_shuffle_epi8(_mm256_set1_epi32(bits as i32), place);
                let set = _mm256_cmpeq_epi8(_mm256_and_si256(spread, own), own);
                _mm256_and_si256(set, _mm256_set1_epi8(16))
            }
        }

        #[inline(always)]
        unsafe fn field(x: __m256i, shift: u32, mask: u8) -> __m256i {
            unsafe {
                let shifted = _mm256_srl_epi16(x, _mm_cvtsi32_si128(shift as i32));
                _mm256_and_si256(shifted, _mm256_set1_epi8(mask as i8))
            }
        }

        #[inline(always)]
        unsafe fn up4(x: __m256i) -> __m256i {
            unsafe { _mm256_slli_epi16::<4>(x) }
        }

        #[inline(always)]
        unsafe fn or(a: __m256i, b: __m256i) -> __m256i {
            unsafe { _mm256_or_si256(a, b) }
        }

        #[inline(always)]
        unsafe fn flip(x: __m256i) -> __m256i {
            unsafe { _mm256_xor_si256(x, _mm256_set1_epi8(i8::MIN)) }
        }

        #[inline(always)]
        unsafe fn store(x: __m256i, to: *mut u8) {
            unsafe { _mm256_storeu_si256(to.cast(), x) }
        }

        #[inline(always)]
        unsafe fn ints(from: *const i32) -> __m256i {
            unsafe { _mm256_loadu_si256(from.cast()) }
        }

        #[inline(always)]
        unsafe fn zero_ints() -> __m256i {
            unsafe { _mm256_setzero_si256() }
        }

        #[inline(always)]
        unsafe fn join(high: __m256i, low: __m256i) -> __m256i {
            unsafe { _mm256_add_epi32(_mm256_slli_epi32::<7>(high), low) }
        }

        #[inline(always)]
        unsafe fn floats(from: *const f32) -> __m256 {
            unsafe { _mm256_loadu_ps(from) }
        }

        #[inline(always)]
        unsafe fn pairs(a: f32, b: f32) -> __m256 {
            unsafe { _mm256_blend_ps::<0xaa>(_mm256_set1_ps(a), _mm256_set1_ps(b)) }
        }

        #[inline(always)]
        unsafe fn mul(a: __m256, b: __m256) -> __m256 {
            unsafe { _mm256_mul_ps(a, b) }
        }

        #[inline(always)]
        unsafe fn plus(a: __m256, b: __m256) -> __m256 {
            unsafe { _mm256_add_ps(a, b) }
        }

        #[inline(always)]
        unsafe fn spread(x: __m256, places: __m256i) -> __m256 {
            unsafe { _mm256_permutevar8x32_ps(x, places) }
        }

        #[inline(always)]
        unsafe fn add(sums: __m256, ints: __m256i, factor: __m256) -> __m256 {
            unsafe { _mm256_fmadd_ps(_mm256_cvtepi32_ps(ints), factor, sums) }
        }

        #[inline(always)]
        unsafe fn total(x: __m256) -> f32 {
            unsafe {
                let four = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps::<1>(x));
                let two = _mm_add_ps(four, _mm_movehl_ps(four, four));
                _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)))
            }
        }

        #[inline(always)]
        unsafe fn lanes(x: __m256) -> [f32; 8] {
            let mut lanes = [0.0; 8];
            unsafe { _mm256_storeu_ps(lanes.as_mut_ptr(), x) };
            lanes
        }
    };
}

// SAFETY of the functions below: the caller has the machine, and promises what pointers are read or written.
impl Vector for Avx2 {
    on_256_bits!();

    const WIDE_IS_SIGNED: bool = true;

    #[inline(always)]
    unsafe fn dot<const WIDE: bool>(sums: __m256i, codes: __m256i, x: __m256i) -> __m256i {
        unsafe {
            // Two products of 8-bit codes overflow 16 bits, so wide codes are multiplied as a size and a
            // sign.
            let pairs = match WIDE {
                false => _mm256_maddubs_epi16(codes, x),
                true => {
                    let signed = _mm256_xor_si256(codes, _mm256_set1_epi8(i8::MIN));
                    _mm256_maddubs_epi16(_mm256_abs_epi8(signed), _mm256_sign_epi8(x, signed))
                }
            };
            _mm256_add_epi32(sums, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)))
        }
    }
}

impl Vector for Vnni {
    on_256_bits!();

    const WIDE_IS_SIGNED: bool = false;

    #[inline(always)]
    unsafe fn dot<const WIDE: bool>(sums: __m256i, codes: __m256i, x: __m256i) -> __m256i {
        unsafe { _mm256_dpbusd_epi32(sums, codes, x) }
    }
}
