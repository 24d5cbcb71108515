//! Many rows: the weights of some outputs are laid side by side, summand by summand, once for all rows of
//! activations, which are read as they lie in memory.

#[cfg(target_arch = "x86_64")]
pub(super) mod pairs;

use std::ops::Range;

use pulp::Simd;

use super::blocks::{Blocks, widen_blocks};
use super::range;
use crate::Result;
use crate::element::Element;
use crate::pool::{self, SharedMut};
use crate::simd::outer::LANES;
use crate::simd::transpose::transpose;
use crate::workspace::{self, Workspace};

/// Outputs side by side: the vectors that the micro-kernel keeps for each row, 4 of AVX-512.
const COLS: usize = 64;

/// Summands that are brought to lanes of 32 bits at a time, so that they stay in near memory.
const STEPS: usize = 256;

/// Rows for which laying out weights is worth its time.
const LEAST_ROWS: usize = 120;

/// Which way the weights are multiplied.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Side {
    /// `y = x . w^T` with `w` `[n, k]`.
    Forward,
    /// `y = x . w` with `w` `[k, n]`.
    Backward,
}

/// A weight matrix whose elements are counted through all rows.
pub(super) trait Source: Copy + Send + Sync {
    /// Elements from `start` on as f32.
    fn widen(&self, start: usize, to: &mut [f32]);
}

impl<E: Element> Source for &[E] {
    #[inline(always)]
    fn widen(&self, start: usize, to: &mut [f32]) {
        E::widen_slice(&self[start..start + to.len()], to);
    }
}

impl Source for Blocks<'_> {
    fn widen(&self, start: usize, to: &mut [f32]) {
        widen_blocks(self.kind, self.bytes, start, to);
    }
}

/// What lanes of 32 bits hold. A step is what one lane sums at a time.
trait Lanes: Copy + Send + Sync {
    /// Steps of output `col` from `first` on.
    fn steps(&self, col: usize, first: usize, to: &mut [f32]);

    /// One step of all outputs, where weights lie that way.
    fn across(&self, step: usize, cols: Range<usize>, to: &mut [f32]) -> bool;
}

/// How lanes are multiplied with the vectors of `S`.
///
/// # Safety
/// All functions need the machine that the type stands for, and pointers to what is read.
trait Multiply<S: Simd>: Lanes {
    /// As long as `S::f32s`.
    type Vector: Copy;

    unsafe fn zero(simd: S) -> Self::Vector;
    unsafe fn splat(simd: S, from: *const f32) -> Self::Vector;
    unsafe fn load(from: *const f32) -> Self::Vector;
    /// `sum + x * w`.
    unsafe fn add(simd: S, sum: Self::Vector, x: Self::Vector, w: Self::Vector) -> Self::Vector;
}

/// Weights widened to f32, a summand a step.
#[derive(Clone, Copy)]
struct Wide<W> {
    w: W,
    side: Side,
    /// Length of a row of `w`.
    row: usize,
}

impl<W: Source> Lanes for Wide<W> {
    #[inline(always)]
    fn steps(&self, col: usize, first: usize, to: &mut [f32]) {
        self.w.widen(col * self.row + first, to);
    }

    #[inline(always)]
    fn across(&self, step: usize, cols: Range<usize>, to: &mut [f32]) -> bool {
        if self.side == Side::Forward {
            return false;
        }
        self.w.widen(step * self.row + cols.start, &mut to[..cols.len()]);
        true
    }
}

impl<S: Simd, W: Source> Multiply<S> for Wide<W> {
    type Vector = S::f32s;

    #[inline(always)]
    unsafe fn zero(simd: S) -> S::f32s {
        simd.splat_f32s(0.0)
    }

    #[inline(always)]
    unsafe fn splat(simd: S, from: *const f32) -> S::f32s {
        // SAFETY: promised by the caller.
        simd.splat_f32s(unsafe { *from })
    }

    #[inline(always)]
    unsafe fn load(from: *const f32) -> S::f32s {
        // SAFETY: promised by the caller.
        unsafe { from.cast::<S::f32s>().read_unaligned() }
    }

    #[inline(always)]
    unsafe fn add(simd: S, sum: S::f32s, x: S::f32s, w: S::f32s) -> S::f32s {
        simd.mul_add_e_f32s(x, w, sum)
    }
}

/// Product of `x` `[m, k]` with a weight to `[m, n]`.
pub(super) fn product<W: Source>(
    x: &[f32],
    w: W,
    side: Side,
    (m, n, k): (usize, usize, usize),
    out: &SharedMut<'_, f32>,
) -> Result<()> {
    let row = if side == Side::Forward { k } else { n };
    let product = Product { x, stride: k, lanes: Wide { w, side, row }, n, steps: k, out };
    product.run(m, m * n * k, |block| workspace::run(block))
}

struct Product<'a, K> {
    /// `[m, stride]`, of which the first `steps` count.
    x: &'a [f32],
    stride: usize,
    lanes: K,
    n: usize,
    steps: usize,
    out: &'a SharedMut<'a, f32>,
}

impl<K: Lanes> Product<'_, K> {
    /// Cuts the outputs into blocks. Each output is summed in order of its steps, whatever the cut.
    fn run(
        &self,
        m: usize,
        work: usize,
        body: impl Fn(Block<'_, K>) -> Result<()> + Sync,
    ) -> Result<()> {
        if m == 0 || self.n == 0 || self.steps == 0 {
            return Ok(());
        }
        let panels = self.n.div_ceil(COLS);
        // Some tasks for each thread, so that none waits long for the others.
        let parts = (4 * rayon::current_num_threads()).div_ceil(panels);
        let parts = parts.min(m / LEAST_ROWS).max(1);
        let rows = m.div_ceil(parts).next_multiple_of(12);
        let parts = m.div_ceil(rows);
        pool::try_for_each(panels * parts, work as u64, |task| {
            body(Block {
                product: self,
                cols: range(task / parts, COLS, self.n),
                rows: range(task % parts, rows, m),
            })
        })
    }
}

/// Some outputs of some rows.
struct Block<'a, K> {
    product: &'a Product<'a, K>,
    cols: Range<usize>,
    rows: Range<usize>,
}

impl<W: Source> workspace::Task for Block<'_, Wide<W>> {
    type Output = Result<()>;

    #[inline(always)]
    fn run<S: Simd>(self, simd: S, workspace: &mut Workspace) -> Result<()> {
        // SAFETY: the machine has the instructions of `S`, or there would be no value of that type.
        unsafe { self.compute(simd, workspace) }
    }
}

impl<K: Lanes> Block<'_, K> {
    /// # Safety
    /// Needs the machine that `K` stands for.
    #[inline(always)]
    unsafe fn compute<S: Simd>(self, simd: S, workspace: &mut Workspace) -> Result<()>
    where
        K: Multiply<S>,
    {
        let Product { x, stride, steps, .. } = *self.product;
        let sizes = [steps.next_multiple_of(LANES) * COLS, LANES * STEPS];
        let [panel, lanes] = workspace.parts(sizes)?;
        self.lay_out(simd, panel, lanes);
        assert!(stride >= steps && x.len() >= self.rows.end * stride);
        let vectors = self.cols.len().next_multiple_of(LANES) / S::F32_LANES;
        let mut done = 0;
        macro_rules! columns {
            ($v:literal: $($m:literal)+) => {
                while vectors - done >= $v {
                    let mut row = self.rows.start;
                    $(while self.rows.end - row >= $m {
                        // SAFETY: the rows lie inside of `x` by the assertion, and the panel has the columns.
                        unsafe { self.tile::<S, $m, $v>(simd, row, done, panel) };
                        row += $m;
                    })+
                    done += $v;
                }
            };
        }
        // As many sums as the registers hold, with some left for the operands.
        if S::REGISTER_COUNT >= 32 {
            columns!(4: 6 4 2 1);
            columns!(2: 12 6 2 1);
        } else {
            columns!(2: 6 4 2 1);
        }
        columns!(1: 12 4 1);
        Ok(())
    }

    /// `panel[step][COLS]`, with zeros for what is missing in a vector.
    #[inline(always)]
    fn lay_out<S: Simd>(&self, simd: S, panel: &mut [f32], lanes: &mut [f32]) {
        let Product { lanes: kind, steps, .. } = self.product;
        let width = self.cols.len().next_multiple_of(LANES);
        for (step, to) in panel.chunks_exact_mut(COLS).take(*steps).enumerate() {
            to[self.cols.len()..width].fill(0.0);
            if !kind.across(step, self.cols.clone(), to) {
                break;
            }
            if step + 1 == *steps {
                return;
            }
        }
        for first in (0..*steps).step_by(STEPS) {
            let count = STEPS.min(steps - first);
            for col in (0..width).step_by(LANES) {
                for (i, to) in lanes.chunks_exact_mut(STEPS).enumerate() {
                    to[count..count.next_multiple_of(LANES)].fill(0.0);
                    match self.cols.start + col + i {
                        own if own < self.cols.end => kind.steps(own, first, &mut to[..count]),
                        _ => to[..count].fill(0.0),
                    }
                }
                for step in (0..count).step_by(LANES) {
                    let to = &mut panel[(first + step) * COLS + col..];
                    transpose(simd, &lanes[step..], STEPS, to, COLS);
                }
            }
        }
    }

    /// Outputs of `M` rows, `V` vectors from number `done` on.
    ///
    /// # Safety
    /// Needs the machine that `K` stands for. `x` must have the rows, the panel and the outputs the vectors, but
    /// for outputs that the last vector has too many.
    #[inline(always)]
    unsafe fn tile<S: Simd, const M: usize, const V: usize>(
        &self,
        simd: S,
        row: usize,
        done: usize,
        panel: &[f32],
    ) where
        K: Multiply<S>,
    {
        let Product { x, stride, n, steps, out, .. } = *self.product;
        // SAFETY: promised by the caller.
        let sums = unsafe {
            let x: [*const f32; M] = std::array::from_fn(|i| x.as_ptr().add((row + i) * stride));
            let mut w = panel.as_ptr().add(done * S::F32_LANES);
            let mut sums = [[K::zero(simd); V]; M];
            for step in 0..steps {
                let mut own = [K::zero(simd); V];
                for (v, own) in own.iter_mut().enumerate() {
                    *own = K::load(w.add(v * S::F32_LANES));
                }
                // By number: what an iterator over two arrays calls may stay a call, for which all sums leave
                // their registers.
                for i in 0..M {
                    let (x, sums) = (K::splat(simd, x[i].add(step)), &mut sums[i]);
                    for v in 0..V {
                        sums[v] = K::add(simd, sums[v], x, own[v]);
                    }
                }
                w = w.wrapping_add(COLS);
            }
            sums
        };
        let at = done * S::F32_LANES;
        let width = (V * S::F32_LANES).min(self.cols.len() - at);
        for (i, sums) in sums.iter().enumerate() {
            // SAFETY: each task has a block of its own, and `V` vectors are `V * S::F32_LANES` floats.
            unsafe {
                let to = out.slice((row + i) * n + self.cols.start + at, width);
                to.copy_from_slice(std::slice::from_raw_parts(sums.as_ptr().cast(), width));
            }
        }
    }
}
