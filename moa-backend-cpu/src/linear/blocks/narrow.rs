//! Blocks as bf16, for tiles.

use std::arch::x86_64::*;
use std::ops::Range;

use super::formats::{Format, GROUP};
use super::vector::Vnni;
use crate::linear::tiles::{SIDE, Tile, round, store};

/// Some rows of weights in tiles, a group in each: values are those of `widen`, rounded. Rows that are missing are zeros.
///
/// # Safety
/// Needs AVX-512 with VNNI and BF16.
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512bf16")]
pub(super) unsafe fn fill<F: Format>(w: &[u8], rows: Range<usize>, to: &mut [Tile]) {
    let row_bytes = to.len() / F::GROUPS * F::BYTES;
    let w = &w[rows.start * row_bytes..rows.end * row_bytes];
    if rows.len() < SIDE {
        to.fill(bytemuck::Zeroable::zeroed());
    }
    let offset = _mm512_set1_epi32(F::OFFSET);
    for (b, tiles) in to.chunks_exact_mut(F::GROUPS).enumerate() {
        for (row, w) in w.chunks_exact(row_bytes).enumerate() {
            let block = w[b * F::BYTES..(b + 1) * F::BYTES].as_ptr();
            // SAFETY: a whole block.
            let scales = unsafe { F::scales::<Vnni>(block) };
            for (g, tile) in tiles.iter_mut().enumerate() {
                // SAFETY: as above.
                let codes = unsafe { F::codes::<Vnni>(block, g) };
                let half = |codes: __m128i, i: usize| {
                    let codes = _mm512_sub_epi32(_mm512_cvtepu8_epi32(codes), offset);
                    let step = _mm512_set1_ps(scales.steps[g][i]);
                    let wide = _mm512_mul_ps(step, _mm512_cvtepi32_ps(codes));
                    match F::LEAST {
                        true => _mm512_add_ps(wide, _mm512_set1_ps(scales.least[g])),
                        false => wide,
                    }
                };
                let low = half(_mm256_castsi256_si128(codes), 0);
                let high = half(_mm256_extracti128_si256::<1>(codes), 1);
                store(round(low, high), &mut tile.0[row]);
            }
        }
    }
}

const _: () = assert!(2 * SIDE == GROUP);
