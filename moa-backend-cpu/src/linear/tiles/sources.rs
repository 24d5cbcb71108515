//! What tiles are made of.

use std::arch::x86_64::*;
use std::ops::Range;

use half::{bf16, f16};
use pulp::x86::V4;

use super::{DEPTH, SIDE, Tile};
use crate::linear::blocks::{Blocks, fill_tiles};
use crate::simd::transpose::transpose;

/// A weight matrix in its type.
pub(in crate::linear) trait Source: Copy + Send + Sync {
    /// Numbers of bf16 whose sum stands for a weight, and for an activation.
    const PARTS: usize;

    /// Lays out outputs, at most as many as a tile has: `[step][part]`, with zeros for what is missing.
    ///
    /// # Safety
    /// Needs AVX-512 with VNNI and BF16.
    unsafe fn fill(&self, outputs: Range<usize>, to: &mut [Tile]);
}

/// Weights in bf16, as they are, in rows of `k`.
#[derive(Clone, Copy)]
pub(in crate::linear) struct Narrow<'a> {
    pub(in crate::linear) w: &'a [bf16],
    pub(in crate::linear) k: usize,
}

impl Source for Narrow<'_> {
    const PARTS: usize = 1;

    unsafe fn fill(&self, outputs: Range<usize>, to: &mut [Tile]) {
        let rows = &self.w[outputs.start * self.k..outputs.end * self.k];
        for (step, to) in to.iter_mut().enumerate() {
            let own = step * DEPTH..((step + 1) * DEPTH).min(self.k);
            if outputs.len() < SIDE || own.len() < DEPTH {
                *to = Tile([[bf16::ZERO; DEPTH]; SIDE]);
            }
            for (to, row) in to.0.iter_mut().zip(rows.chunks_exact(self.k)) {
                // A whole line is copied without a call.
                match row[own.clone()].first_chunk::<DEPTH>() {
                    Some(line) => *to = *line,
                    None => to[..own.len()].copy_from_slice(&row[own.clone()]),
                }
            }
        }
    }
}

/// Weights in f16, which are two of bf16, in rows of `k`.
#[derive(Clone, Copy)]
pub(in crate::linear) struct Halves<'a> {
    pub(in crate::linear) w: &'a [f16],
    pub(in crate::linear) k: usize,
}

impl Source for Halves<'_> {
    const PARTS: usize = 2;

    unsafe fn fill(&self, outputs: Range<usize>, to: &mut [Tile]) {
        // SAFETY: promised by the caller.
        unsafe { fill_halves(self.w, self.k, outputs, to) };
    }
}

/// # Safety
/// Needs AVX-512 BF16.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
unsafe fn fill_halves(w: &[f16], k: usize, outputs: Range<usize>, to: &mut [Tile]) {
    let rows = &w[outputs.start * k..outputs.end * k];
    for (step, [first, second]) in to.as_chunks_mut::<2>().0.iter_mut().enumerate() {
        let count = DEPTH.min(k - step * DEPTH);
        let mask = u32::MAX >> (DEPTH - count);
        for row in 0..SIDE {
            // SAFETY: masked lanes are not read, and lines of a tile are written.
            unsafe {
                let mask = if row < outputs.len() { mask } else { 0 };
                let from = rows.as_ptr().wrapping_add(row * k + step * DEPTH);
                let all = _mm512_maskz_loadu_epi16(mask, from.cast());
                let low = _mm512_cvtph_ps(_mm512_castsi512_si256(all));
                let high = _mm512_cvtph_ps(_mm512_extracti64x4_epi64::<1>(all));
                let [a, b] = split(low, high);
                store(a, &mut first.0[row]);
                store(b, &mut second.0[row]);
            }
        }
    }
}

/// Weights in blocks, widened and rounded.
impl Source for Blocks<'_> {
    const PARTS: usize = 1;

    unsafe fn fill(&self, outputs: Range<usize>, to: &mut [Tile]) {
        // SAFETY: promised by the caller.
        unsafe { fill_tiles(*self, outputs, to) };
    }
}

/// 32 numbers in two of bf16 each, whose sum has 16 bits.
#[inline]
#[target_feature(enable = "avx512f,avx512bf16")]
fn split(low: __m512, high: __m512) -> [__m512i; 2] {
    // Rounded numbers as f32 have the same bits above 16 others.
    let first = round(low, high);
    let a = _mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(_mm512_castsi512_si256(first)));
    let b = _mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64::<1>(first)));
    let second = round(
        _mm512_sub_ps(low, _mm512_castsi512_ps(a)),
        _mm512_sub_ps(high, _mm512_castsi512_ps(b)),
    );
    [first, second]
}

/// 32 numbers in bf16.
#[inline]
#[target_feature(enable = "avx512f,avx512bf16")]
pub(in crate::linear) fn round(low: __m512, high: __m512) -> __m512i {
    // SAFETY: 32 numbers of 16 bits both.
    unsafe { std::mem::transmute(_mm512_cvtne2ps_pbh(high, low)) }
}

#[inline]
#[target_feature(enable = "avx512f")]
pub(in crate::linear) fn store(line: __m512i, to: &mut [bf16; DEPTH]) {
    // SAFETY: 64 bytes.
    unsafe { _mm512_storeu_si512(to.as_mut_ptr().cast(), line) };
}

/// Rows of activations, at most as many as a tile has, of `k` elements each: `[step][part]`.
///
/// # Safety
/// Needs AVX-512 BF16.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
pub(super) unsafe fn pack(simd: V4, x: &[f32], k: usize, parts: usize, to: &mut [Tile]) {
    let mut lines = [Tile([[bf16::ZERO; DEPTH]; SIDE]); 2];
    for (step, to) in to.chunks_exact_mut(parts).enumerate() {
        let count = DEPTH.min(k - step * DEPTH);
        let mask = u32::MAX >> (DEPTH - count);
        let [first, second] = &mut lines;
        for (row, x) in x.chunks_exact(k).enumerate() {
            // SAFETY: masked lanes are not read.
            let half = |at: usize| unsafe {
                let from = x.as_ptr().wrapping_add(step * DEPTH + at);
                _mm512_maskz_loadu_ps((mask >> at) as u16, from)
            };
            let [a, b] = split(half(0), half(SIDE));
            store(a, &mut first.0[row]);
            store(b, &mut second.0[row]);
        }
        for (lines, to) in lines.iter().zip(to) {
            let lines: &[f32] = bytemuck::cast_slice(std::slice::from_ref(lines));
            let to = bytemuck::cast_slice_mut(std::slice::from_mut(to));
            transpose(simd, lines, SIDE, to, SIDE);
        }
    }
}
