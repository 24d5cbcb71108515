//! Many rows: 16 rows of weights are unpacked once, their codes side by side by fours, and multiplied with all
//! rows of activations.

use super::activations::{Activations, TILE};
use super::formats::{Format, GROUP};
use super::vector::Vector;

/// Weight rows that are unpacked together.
pub(super) const ROWS: usize = 16;

/// Floats of the scratch memory for rows of so many groups.
pub(super) const fn scratch(groups: usize) -> [usize; 3] {
    [groups * GROUP * ROWS / 4, groups * 2 * ROWS, groups * ROWS]
}

/// Some unpacked rows of weights.
pub(super) struct Unpacked<'a> {
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
    /// Needs the machine of `V`.
    #[inline(always)]
    pub(super) unsafe fn new<V: Vector, F: Format>(
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
                let scales = unsafe { F::scales::<V>(block.as_ptr()) };
                for g in 0..F::GROUPS {
                    let group = b * F::GROUPS + g;
                    let mut own = [[0u8; 4]; 8];
                    // SAFETY: a whole block, and room for a group's codes.
                    unsafe {
                        V::store(F::codes::<V>(block.as_ptr(), g), own.as_mut_ptr().cast());
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

    /// Products with one tile of `x`, of which as many rows are computed at a time as registers hold.
    ///
    /// # Safety
    /// Needs the machine of `V`.
    #[inline(always)]
    pub(super) unsafe fn product<V: Vector, F: Format>(
        &self,
        x: &Activations,
        tile: usize,
        y: &mut [[f32; ROWS]; TILE],
    ) {
        let groups = x.groups;
        assert!(x.side == TILE && (tile + 1) * groups * TILE <= x.steps.len());
        assert!(x.codes.len() == x.steps.len() * GROUP);
        assert!(!F::LEAST || x.sums.len() == x.steps.len());
        assert!(F::LEAST || x.bias.len() == x.steps.len() * 2);
        assert!(self.codes.len() == groups * GROUP * ROWS);
        assert!(self.steps.len() == groups * 2 * ROWS && self.least.len() == groups * ROWS);
        // SAFETY: the tile and all groups lie inside the slices by the assertions.
        unsafe {
            match V::AT_ONCE {
                8 => self.some::<V, F, 8>(x, tile, y),
                4 => self.some::<V, F, 4>(x, tile, y),
                _ => self.some::<V, F, 2>(x, tile, y),
            }
        }
    }

    /// [`product`](Self::product), `T` rows at a time.
    ///
    /// # Safety
    /// Needs the machine of `V`, and what `product` asserts.
    #[inline(always)]
    unsafe fn some<V: Vector, F: Format, const T: usize>(
        &self,
        x: &Activations,
        tile: usize,
        y: &mut [[f32; ROWS]; TILE],
    ) {
        let groups = x.groups;
        let parts = if F::HALVES { 2 } else { 1 };
        let quads = 8 / parts;
        let biased = !F::LEAST && !(F::WIDE && V::WIDE_IS_SIGNED);
        for first in (0..TILE).step_by(T) {
            // SAFETY: promised by the caller.
            unsafe {
                let zero = V::row_floats([0.0; ROWS].as_ptr());
                let mut sums = [zero; T];
                for group in 0..groups {
                    // Of the first row of those that are computed.
                    let at = (tile * groups + group) * TILE + first;
                    let x_codes = x.codes.as_ptr().add((at - first) * GROUP).cast::<i32>();
                    let x_steps = x.steps.as_ptr().add(at);
                    for part in 0..parts {
                        let mut ints = [V::row_ints(0); T];
                        if biased {
                            let bias = x.bias.as_ptr();
                            let bias = bias.add((at - first) * 2 + part * TILE + first);
                            for (t, ints) in ints.iter_mut().enumerate() {
                                *ints = V::row_ints(*bias.add(t));
                            }
                        }
                        for quad in part * quads..(part + 1) * quads {
                            let codes = self.codes.as_ptr().add((group * 8 + quad) * 4 * ROWS);
                            let codes = V::quads(codes);
                            let own = x_codes.add(quad * TILE + first);
                            for (t, ints) in ints.iter_mut().enumerate() {
                                let own = own.add(t).read_unaligned();
                                *ints = match F::WIDE {
                                    true => V::row_dot::<true>(*ints, codes, own),
                                    false => V::row_dot::<false>(*ints, codes, own),
                                };
                            }
                        }
                        let steps = self.steps.as_ptr().add((2 * group + part) * ROWS);
                        let steps = V::row_floats(steps);
                        for t in 0..T {
                            sums[t] = V::row_add(sums[t], ints[t], *x_steps.add(t), steps);
                        }
                    }
                    if F::LEAST {
                        let least = V::row_floats(self.least.as_ptr().add(group * ROWS));
                        let x_sums = x.sums.as_ptr().add(at);
                        for (t, sum) in sums.iter_mut().enumerate() {
                            *sum = V::row_scale(*sum, *x_sums.add(t), least);
                        }
                    }
                }
                for (t, sum) in sums.into_iter().enumerate() {
                    V::row_store(sum, y[first + t].as_mut_ptr());
                }
            }
        }
    }
}
