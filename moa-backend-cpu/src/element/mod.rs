//! What tensors and caches are made of, and how it becomes vectors of f32.

mod codes;
mod float;

use bytemuck::Pod;
use half::bf16;
use moa_core::{RowType, widen_scale};
use pulp::Simd;

pub(crate) use self::codes::{Fp8, Int4, Int8};
pub(crate) use self::float::Element;
use crate::simd::dispatch;
use crate::simd::dot::Dots;

/// What a row of a cache is made of: elements, or codes whose products with the row's scale are elements.
pub(crate) trait RowElement: Pod + Send + Sync {
    /// How rows are rounded.
    const TYPE: RowType;

    /// What loaded elements are to be multiplied by beside the row's scale: a power of two.
    const UNIT: f32 = 1.0;

    /// Codes of a row of `dim` elements.
    fn units(dim: usize) -> usize {
        dim
    }

    /// Pairs of vectors that a row begins with.
    #[inline(always)]
    fn pairs(dim: usize, lanes: usize) -> usize {
        dim / (2 * lanes)
    }

    /// Where the vectors of a pair begin, in elements.
    #[inline(always)]
    fn places(_dim: usize, lanes: usize, pair: usize) -> [usize; 2] {
        [2 * pair * lanes, (2 * pair + 1) * lanes]
    }

    /// A pair of vectors.
    ///
    /// # Safety
    /// `row` must be a row of `dim` elements, and `pair` one of its [`pairs`](Self::pairs).
    #[inline(always)]
    unsafe fn load_pair<S: Simd>(
        simd: S,
        row: *const Self,
        dim: usize,
        pair: usize,
    ) -> [S::f32s; 2] {
        let [low, high] = Self::places(dim, S::F32_LANES, pair);
        // SAFETY: promised by the caller.
        unsafe { [Self::load(simd, row, dim, low), Self::load(simd, row, dim, high)] }
    }

    /// The vector of a row's elements from the one at `at`.
    ///
    /// # Safety
    /// `row` must be a row of `dim` elements, `at + S::F32_LANES` of them at most.
    unsafe fn load<S: Simd>(simd: S, row: *const Self, dim: usize, at: usize) -> S::f32s;

    /// A row's element, as it is loaded.
    fn element(row: &[Self], dim: usize, at: usize) -> f32;

    /// Rounds a row, which is spoilt, with its head's feedback where it is a key's, and returns its scale.
    fn narrow(feedback: Option<&[f32]>, row: &mut [f32], to: &mut [Self]) -> u16;

    /// The elements themselves, if they are f32 already.
    fn plain(_from: &[Self]) -> Option<&[f32]> {
        None
    }

    /// The elements themselves, if they are bf16.
    fn bf16s(_from: &[Self]) -> Option<&[bf16]> {
        None
    }

    /// What loaded elements of a row of this scale are to be multiplied by.
    #[inline(always)]
    fn scale(bits: u16) -> f32 {
        widen_scale(bits) * Self::UNIT
    }

    /// Products of queries with keys.
    fn dots(dots: Dots<'_, Self>) {
        dispatch(dots);
    }
}

impl<E: Element> RowElement for E {
    const TYPE: RowType = RowType::Plain(E::DTYPE);

    #[inline(always)]
    unsafe fn load<S: Simd>(simd: S, row: *const Self, _dim: usize, at: usize) -> S::f32s {
        // SAFETY: promised by the caller.
        unsafe { <E as Element>::load(simd, row.add(at)) }
    }

    #[inline(always)]
    fn element(row: &[Self], _dim: usize, at: usize) -> f32 {
        row[at].widen()
    }

    fn narrow(_: Option<&[f32]>, row: &mut [f32], to: &mut [Self]) -> u16 {
        E::narrow_slice(row, to);
        0
    }

    #[inline(always)]
    fn plain(from: &[Self]) -> Option<&[f32]> {
        E::as_f32(from)
    }

    #[inline(always)]
    fn bf16s(from: &[Self]) -> Option<&[bf16]> {
        E::as_bf16(from)
    }
}
