//! The instructions that products over blocks are made of, for each kind of machine.

#[cfg(target_arch = "x86_64")]
mod x86;

use half::f16;

#[cfg(target_arch = "x86_64")]
pub(super) use x86::{Avx2, Vnni};

/// Instructions on 32 codes of 8 bits, the 8 sums of 4 products each, and 8 floats.
///
/// # Safety
/// All functions need the machine that the type stands for, and pointers that are valid for what is read or
/// written there.
pub(super) trait Vector: Copy {
    type Bytes: Copy;
    type Ints: Copy;
    type Floats: Copy;

    /// Codes of 8 bits are multiplied as signed numbers, 128 less than they are.
    const WIDE_IS_SIGNED: bool;

    unsafe fn half(bits: u16) -> f32;
    /// The two f16 that each of 4 places begins with, side by side.
    unsafe fn halves(from: [*const u8; 4]) -> Self::Floats;
    /// 32 bytes.
    unsafe fn bytes(from: *const u8) -> Self::Bytes;
    /// The low halves of 16 bytes, then their high halves.
    unsafe fn nibbles(from: *const u8) -> Self::Bytes;
    /// `0x10` for each of 32 bits that is set.
    unsafe fn sixteens(bits: u32) -> Self::Bytes;
    /// `x >> shift & mask` of each byte; the mask has at most `8 - shift` bits.
    unsafe fn field(x: Self::Bytes, shift: u32, mask: u8) -> Self::Bytes;
    /// `x << 4` of bytes below 16.
    unsafe fn up4(x: Self::Bytes) -> Self::Bytes;
    unsafe fn or(a: Self::Bytes, b: Self::Bytes) -> Self::Bytes;
    /// The highest bit of each byte changed.
    unsafe fn flip(x: Self::Bytes) -> Self::Bytes;
    unsafe fn store(x: Self::Bytes, to: *mut u8);

    /// 8 integers, which need not be aligned.
    unsafe fn ints(from: *const i32) -> Self::Ints;
    unsafe fn zero_ints() -> Self::Ints;
    /// `sums + codes * x`, summed by fours; `WIDE` codes may be above 127.
    unsafe fn dot<const WIDE: bool>(
        sums: Self::Ints,
        codes: Self::Bytes,
        x: Self::Bytes,
    ) -> Self::Ints;
    /// `high * 128 + low`.
    unsafe fn join(high: Self::Ints, low: Self::Ints) -> Self::Ints;
    /// 8 floats, which need not be aligned.
    unsafe fn floats(from: *const f32) -> Self::Floats;
    /// `a` in lanes of even number, `b` in the others.
    unsafe fn pairs(a: f32, b: f32) -> Self::Floats;
    unsafe fn mul(a: Self::Floats, b: Self::Floats) -> Self::Floats;
    unsafe fn plus(a: Self::Floats, b: Self::Floats) -> Self::Floats;
    /// The lane of `x` that each lane of `places` names.
    unsafe fn spread(x: Self::Floats, places: Self::Ints) -> Self::Floats;
    /// `sums + ints * factor`.
    unsafe fn add(sums: Self::Floats, ints: Self::Ints, factor: Self::Floats) -> Self::Floats;
    unsafe fn total(x: Self::Floats) -> f32;
    unsafe fn lanes(x: Self::Floats) -> [f32; 8];
}

/// Plain code, for machines that have none of the others; compilers make vectors of most of it.
#[derive(Clone, Copy)]
pub(super) struct Scalar;

impl Vector for Scalar {
    type Bytes = [u8; 32];
    type Ints = [i32; 8];
    type Floats = [f32; 8];

    const WIDE_IS_SIGNED: bool = false;

    #[inline(always)]
    unsafe fn half(bits: u16) -> f32 {
        f16::from_bits(bits).to_f32()
    }

    #[inline(always)]
    unsafe fn halves(from: [*const u8; 4]) -> [f32; 8] {
        // SAFETY: promised by the caller.
        let pairs = from.map(|from| unsafe { from.cast::<[[u8; 2]; 2]>().read() });
        std::array::from_fn(|i| f16::from_le_bytes(pairs[i / 2][i % 2]).to_f32())
    }

    #[inline(always)]
    unsafe fn bytes(from: *const u8) -> [u8; 32] {
        // SAFETY: promised by the caller.
        unsafe { from.cast::<[u8; 32]>().read_unaligned() }
    }

    #[inline(always)]
    unsafe fn nibbles(from: *const u8) -> [u8; 32] {
        // SAFETY: promised by the caller.
        let from = unsafe { from.cast::<[u8; 16]>().read_unaligned() };
        std::array::from_fn(|i| from[i % 16] >> (i / 16 * 4) & 15)
    }

    #[inline(always)]
    unsafe fn sixteens(bits: u32) -> [u8; 32] {
        std::array::from_fn(|i| ((bits >> i & 1) << 4) as u8)
    }

    #[inline(always)]
    unsafe fn field(x: [u8; 32], shift: u32, mask: u8) -> [u8; 32] {
        x.map(|x| x >> shift & mask)
    }

    #[inline(always)]
    unsafe fn up4(x: [u8; 32]) -> [u8; 32] {
        x.map(|x| x << 4)
    }

    #[inline(always)]
    unsafe fn or(a: [u8; 32], b: [u8; 32]) -> [u8; 32] {
        std::array::from_fn(|i| a[i] | b[i])
    }

    #[inline(always)]
    unsafe fn flip(x: [u8; 32]) -> [u8; 32] {
        x.map(|x| x ^ 0x80)
    }

    #[inline(always)]
    unsafe fn store(x: [u8; 32], to: *mut u8) {
        // SAFETY: promised by the caller.
        unsafe { to.cast::<[u8; 32]>().write_unaligned(x) }
    }

    #[inline(always)]
    unsafe fn ints(from: *const i32) -> [i32; 8] {
        // SAFETY: promised by the caller.
        unsafe { from.cast::<[i32; 8]>().read_unaligned() }
    }

    #[inline(always)]
    unsafe fn zero_ints() -> [i32; 8] {
        [0; 8]
    }

    #[inline(always)]
    unsafe fn dot<const WIDE: bool>(sums: [i32; 8], codes: [u8; 32], x: [u8; 32]) -> [i32; 8] {
        std::array::from_fn(|i| {
            let product = |j: usize| i32::from(codes[j]) * i32::from(x[j] as i8);
            sums[i] + (4 * i..4 * i + 4).map(product).sum::<i32>()
        })
    }

    #[inline(always)]
    unsafe fn join(high: [i32; 8], low: [i32; 8]) -> [i32; 8] {
        std::array::from_fn(|i| (high[i] << 7) + low[i])
    }

    #[inline(always)]
    unsafe fn floats(from: *const f32) -> [f32; 8] {
        // SAFETY: promised by the caller.
        unsafe { from.cast::<[f32; 8]>().read_unaligned() }
    }

    #[inline(always)]
    unsafe fn pairs(a: f32, b: f32) -> [f32; 8] {
        [a, b, a, b, a, b, a, b]
    }

    #[inline(always)]
    unsafe fn mul(a: [f32; 8], b: [f32; 8]) -> [f32; 8] {
        std::array::from_fn(|i| a[i] * b[i])
    }

    #[inline(always)]
    unsafe fn plus(a: [f32; 8], b: [f32; 8]) -> [f32; 8] {
        std::array::from_fn(|i| a[i] + b[i])
    }

    #[inline(always)]
    unsafe fn spread(x: [f32; 8], places: [i32; 8]) -> [f32; 8] {
        std::array::from_fn(|i| x[places[i] as usize % 8])
    }

    #[inline(always)]
    unsafe fn add(sums: [f32; 8], ints: [i32; 8], factor: [f32; 8]) -> [f32; 8] {
        std::array::from_fn(|i| sums[i] + ints[i] as f32 * factor[i])
    }

    #[inline(always)]
    unsafe fn total(x: [f32; 8]) -> f32 {
        x.iter().sum()
    }

    #[inline(always)]
    unsafe fn lanes(x: [f32; 8]) -> [f32; 8] {
        x
    }
}
