//! The instructions that products over blocks are made of, for each kind of machine.

#[cfg(target_arch = "x86_64")]
mod x86;

use half::f16;

#[cfg(target_arch = "x86_64")]
pub(super) use x86::{Avx2, Vnni};

/// Instructions on 32 codes of 8 bits, the 8 sums of 4 products each, and 8 floats; and on 4 codes of each of
/// 16 rows, with one sum and one float for a row.
///
/// # Safety
/// All functions need the machine that the type stands for, and pointers that are valid for what is read or
/// written there.
pub(super) trait Vector: Copy {
    type Bytes: Copy;
    type Ints: Copy;
    type Floats: Copy;
    type Quads: Copy;
    type RowInts: Copy;
    type RowFloats: Copy;

    /// Codes of 8 bits are multiplied as signed numbers, 128 less than they are.
    const WIDE_IS_SIGNED: bool;
    /// Rows of activations that 16 rows of weights are multiplied with at once: 2, 4 or 8.
    const AT_ONCE: usize;

    unsafe fn half(bits: u16) -> f32;
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
    /// `a` in the first 4 lanes, `b` in the others.
    unsafe fn pair(a: f32, b: f32) -> Self::Floats;
    /// `sums + ints * factor`.
    unsafe fn add(sums: Self::Floats, ints: Self::Ints, factor: Self::Floats) -> Self::Floats;
    unsafe fn total(x: Self::Floats) -> f32;

    /// 4 codes of each of 16 rows, row after row.
    unsafe fn quads(from: *const u8) -> Self::Quads;
    unsafe fn row_ints(x: i32) -> Self::RowInts;
    /// `sums + codes * x` of each row; `x` has 4 signed bytes.
    unsafe fn row_dot<const WIDE: bool>(
        sums: Self::RowInts,
        codes: Self::Quads,
        x: i32,
    ) -> Self::RowInts;
    unsafe fn row_floats(from: *const f32) -> Self::RowFloats;
    /// `sums + ints * x * factors`.
    unsafe fn row_add(
        sums: Self::RowFloats,
        ints: Self::RowInts,
        x: f32,
        factors: Self::RowFloats,
    ) -> Self::RowFloats;
    /// `sums + x * factors`.
    unsafe fn row_scale(sums: Self::RowFloats, x: f32, factors: Self::RowFloats)
    -> Self::RowFloats;
    unsafe fn row_store(x: Self::RowFloats, to: *mut f32);
}

/// Plain code, for machines that have none of the others; compilers make vectors of most of it.
#[derive(Clone, Copy)]
pub(super) struct Scalar;

impl Vector for Scalar {
    type Bytes = [u8; 32];
    type Ints = [i32; 8];
    type Floats = [f32; 8];
    type Quads = [[u8; 4]; 16];
    type RowInts = [i32; 16];
    type RowFloats = [f32; 16];

    const WIDE_IS_SIGNED: bool = false;
    const AT_ONCE: usize = 4;

    #[inline(always)]
    unsafe fn half(bits: u16) -> f32 {
        f16::from_bits(bits).to_f32()
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
    unsafe fn pair(a: f32, b: f32) -> [f32; 8] {
        [a, a, a, a, b, b, b, b]
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
    unsafe fn quads(from: *const u8) -> [[u8; 4]; 16] {
        // SAFETY: promised by the caller.
        unsafe { from.cast::<[[u8; 4]; 16]>().read_unaligned() }
    }

    #[inline(always)]
    unsafe fn row_ints(x: i32) -> [i32; 16] {
        [x; 16]
    }

    #[inline(always)]
    unsafe fn row_dot<const WIDE: bool>(
        sums: [i32; 16],
        codes: [[u8; 4]; 16],
        x: i32,
    ) -> [i32; 16] {
        let x = x.to_le_bytes().map(|x| i32::from(x as i8));
        std::array::from_fn(|i| {
            let c = codes[i].map(i32::from);
            sums[i] + c[0] * x[0] + c[1] * x[1] + c[2] * x[2] + c[3] * x[3]
        })
    }

    #[inline(always)]
    unsafe fn row_floats(from: *const f32) -> [f32; 16] {
        // SAFETY: promised by the caller.
        unsafe { from.cast::<[f32; 16]>().read_unaligned() }
    }

    #[inline(always)]
    unsafe fn row_add(sums: [f32; 16], ints: [i32; 16], x: f32, factors: [f32; 16]) -> [f32; 16] {
        std::array::from_fn(|i| sums[i] + ints[i] as f32 * x * factors[i])
    }

    #[inline(always)]
    unsafe fn row_scale(sums: [f32; 16], x: f32, factors: [f32; 16]) -> [f32; 16] {
        std::array::from_fn(|i| sums[i] + x * factors[i])
    }

    #[inline(always)]
    unsafe fn row_store(x: [f32; 16], to: *mut f32) {
        // SAFETY: promised by the caller.
        unsafe { to.cast::<[f32; 16]>().write_unaligned(x) }
    }
}
