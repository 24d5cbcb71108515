//! Many rows, on machines with VNNI: 16 rows of weights are unpacked once, their codes side by side by fours,
//! and multiplied with all rows of activations.

use std::arch::x86_64::*;
use std::ops::Range;

use super::activations::{Activations, TILE};
use super::formats::{Format, GROUP};
use super::vector::{Vector, Vnni};
use crate::pool::SharedMut;

/// Weight rows that are unpacked together: the lanes of a vector.
pub(super) const ROWS: usize = 16;

/// Floats of the scratch memory for rows of so many groups.
pub(super) const fn scratch(groups: usize) -> [usize; 3] {
    [groups * GROUP * ROWS / 4, groups * 2 * ROWS, groups * ROWS]
}

/// Products of some rows of `x` with the rows `cols` of a matrix of `n`, whose blocks are `w`.
///
/// # Safety
/// Needs a machine with VNNI. No other code may write these outputs at the same time.
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")]
pub(super) unsafe fn many<F: Format>(
    x: &Activations,
    w: &[u8],
    scratch: [&mut [f32]; 3],
    rows: Range<usize>,
    cols: Range<usize>,
    n: usize,
    out: &SharedMut<'_, f32>,
) {
    // SAFETY: the machine has VNNI.
    let unpacked = unsafe { Unpacked::new::<F>(w, x.groups, scratch) };
    let mut y = [[0.0; ROWS]; TILE];
    for first in rows.clone().step_by(TILE) {
        // SAFETY: as above.
        unsafe { unpacked.product::<F>(x, first / TILE, &mut y) };
        for (row, y) in (first..rows.end).zip(&y) {
            // SAFETY: promised by the caller.
            let to = unsafe { out.slice(row * n + cols.start, cols.len()) };
            to.copy_from_slice(&y[..cols.len()]);
        }
    }
}

/// Some unpacked rows of weights.
struct Unpacked<'a> {
    /// `[group][8][16][4]`.
    codes: &'a mut [u8],
    /// `[group][2][16]`.
    steps: &'a mut [f32],
    /// `[group][16]`.
    least: &'a mut [f32],
}

impl<'a> Unpacked<'a> {
    /// At most 16 rows of `groups` groups; those that are missing are zeros.
    ///
    /// # Safety
    /// Needs a machine with VNNI.
    #[inline(always)]
    unsafe fn new<F: Format>(
        w: &[u8],
        groups: usize,
        [codes, steps, least]: [&'a mut [f32]; 3],
    ) -> Self {
        let codes: &mut [u8] = bytemuck::cast_slice_mut(codes);
        let (blocks, count) = (groups / F::GROUPS, w.len() / (groups / F::GROUPS * F::BYTES));
        assert!(count <= ROWS && codes.len() == groups * GROUP * ROWS);
        assert!(steps.len() == groups * 2 * ROWS && least.len() == groups * ROWS);
        if count < ROWS {
            codes.fill(0);
            steps.fill(0.0);
            least.fill(0.0);
        }
        let quads: &mut [[u8; 4]] = bytemuck::cast_slice_mut(&mut *codes);
        for b in 0..blocks {
            for row in 0..count {
                let block = &w[(row * blocks + b) * F::BYTES..][..F::BYTES];
                // SAFETY: a whole block.
                let scales = unsafe { F::scales::<Vnni>(block.as_ptr()) };
                for g in 0..F::GROUPS {
                    let group = b * F::GROUPS + g;
                    let mut own = [[0u8; 4]; 8];
                    // SAFETY: a whole block, and room for a group's codes.
                    unsafe {
                        let codes = F::codes::<Vnni>(block.as_ptr(), g);
                        Vnni::store(codes, own.as_mut_ptr().cast());
                    }
                    let to = &mut quads[group * 8 * ROWS..(group + 1) * 8 * ROWS];
                    for (to, own) in to.chunks_exact_mut(ROWS).zip(own) {
                        to[row] = own;
                    }
                    steps[2 * group * ROWS + row] = scales.steps[g][0];
                    steps[(2 * group + 1) * ROWS + row] = scales.steps[g][1];
                    least[group * ROWS + row] = scales.least[g];
                }
            }
        }
        Self { codes, steps, least }
    }

    /// Products with one tile of `x`.
    ///
    /// # Safety
    /// Needs a machine with VNNI.
    #[inline(always)]
    unsafe fn product<F: Format>(&self, x: &Activations, tile: usize, y: &mut [[f32; ROWS]; TILE]) {
        let groups = x.groups;
        assert!(x.side == TILE && (tile + 1) * groups * TILE <= x.steps.len());
        assert!(x.codes.len() == x.steps.len() * 2 * GROUP);
        assert!(!F::LEAST || x.sums.len() == x.steps.len());
        assert!(F::LEAST || x.bias.len() == x.steps.len() * 2);
        assert!(self.codes.len() == groups * GROUP * ROWS);
        assert!(self.steps.len() == groups * 2 * ROWS && self.least.len() == groups * ROWS);
        let parts = if F::HALVES { 2 } else { 1 };
        let quads = 8 / parts;
        // SAFETY: a tile and all groups lie inside the slices by the assertions above.
        unsafe {
            let mut sums = [_mm512_setzero_ps(); TILE];
            for group in 0..groups {
                let at = (tile * groups + group) * TILE;
                let x_codes = x.codes.as_ptr().add(at * 2 * GROUP).cast::<i32>();
                let x_steps = x.steps.as_ptr().add(at);
                for part in 0..parts {
                    let mut high = [_mm512_setzero_si512(); TILE];
                    let mut low = high;
                    if !F::LEAST {
                        let bias = x.bias.as_ptr().add(at * 2 + part * TILE);
                        for (t, low) in low.iter_mut().enumerate() {
                            *low = _mm512_set1_epi32(*bias.add(t));
                        }
                    }
                    for quad in part * quads..(part + 1) * quads {
                        let codes = self.codes.as_ptr().add((group * 8 + quad) * 4 * ROWS);
                        let codes = _mm512_loadu_si512(codes.cast());
                        let own = x_codes.add(quad * 2 * TILE);
                        let own = |t| _mm512_set1_epi32(own.add(t).read_unaligned());
                        for t in 0..TILE {
                            high[t] = _mm512_dpbusd_epi32(high[t], codes, own(t));
                            low[t] = _mm512_dpbusd_epi32(low[t], codes, own(TILE + t));
                        }
                    }
                    let steps = self.steps.as_ptr().add((2 * group + part) * ROWS);
                    let steps = _mm512_loadu_ps(steps);
                    for t in 0..TILE {
                        let all = _mm512_add_epi32(_mm512_slli_epi32::<7>(high[t]), low[t]);
                        let step = _mm512_mul_ps(steps, _mm512_set1_ps(*x_steps.add(t)));
                        sums[t] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(all), step, sums[t]);
                    }
                }
                if F::LEAST {
                    let least = _mm512_loadu_ps(self.least.as_ptr().add(group * ROWS));
                    let x_sums = x.sums.as_ptr().add(at);
                    for (t, sum) in sums.iter_mut().enumerate() {
                        *sum = _mm512_fmadd_ps(_mm512_set1_ps(*x_sums.add(t)), least, *sum);
                    }
                }
            }
            for (sum, y) in sums.into_iter().zip(y) {
                _mm512_storeu_ps(y.as_mut_ptr(), sum);
            }
        }
    }
}
