//! Many rows: the micro-kernel of attention. The activations are packed once, the weights are
//! converted to f32 block by block where they are not f32 already.

use std::ops::Range;

use pulp::Simd;

use super::blocks::Blocks;
use super::range;
use crate::element::Element;
use crate::pool::{self, SharedMut};
use crate::simd::outer::{LANES, Outer, PANEL, pack_columns};
use crate::workspace::{self, Workspace};

/// Outputs per task: a multiple of the micro-kernel's rows.
const COLS: usize = 48;

/// Products summed at a time, so that a block of weights and the activations that meet it stay in
/// near memory.
const K_BLOCK: usize = 256;

/// Panels of activations per task.
const PANELS: usize = 8;

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
    /// The elements themselves, if they are f32.
    fn as_f32(&self) -> Option<&[f32]>;

    /// Elements from `start` on as f32.
    fn widen(&self, start: usize, to: &mut [f32]);
}

impl<E: Element> Source for &[E] {
    #[inline(always)]
    fn as_f32(&self) -> Option<&[f32]> {
        E::as_f32(self)
    }

    #[inline(always)]
    fn widen(&self, start: usize, to: &mut [f32]) {
        E::widen_slice(&self[start..start + to.len()], to);
    }
}

impl Source for Blocks<'_> {
    fn as_f32(&self) -> Option<&[f32]> {
        None
    }

    fn widen(&self, start: usize, to: &mut [f32]) {
        self.kind.widen(self.bytes, start, to);
    }
}

/// Product of `x` `[m, k]` with a weight to `[m, n]`.
pub(super) fn product<W: Source>(
    x: &[f32],
    w: W,
    side: Side,
    (m, n, k): (usize, usize, usize),
    out: &SharedMut<'_, f32>,
) {
    if m == 0 || k == 0 {
        return;
    }
    let packed = pack(x, m, k);
    let groups = m.div_ceil(PANELS * PANEL);
    pool::for_each(n.div_ceil(COLS) * groups, (m * n * k) as u64, |task| {
        workspace::run(Block {
            packed: &packed,
            w,
            side,
            cols: range(task / groups, COLS, n),
            rows: range(task % groups, PANELS * PANEL, m),
            n,
            k,
            out,
        });
    });
}

/// Activations as `[panel][k][row]`.
fn pack(x: &[f32], m: usize, k: usize) -> Vec<f32> {
    let mut packed = vec![0.0; m.div_ceil(PANEL) * k * PANEL];
    {
        let packed = SharedMut::new(&mut packed);
        pool::for_each(m.div_ceil(PANEL), 4 * (m * k) as u64, |p| {
            // SAFETY: each task has a panel of its own.
            let panel = unsafe { packed.slice(p * k * PANEL, k * PANEL) };
            let rows = range(p, PANEL, m).map(|row| &x[row * k..(row + 1) * k]);
            pack_columns(panel, rows.enumerate(), 1.0);
        });
    }
    packed
}

/// Some outputs of some rows.
struct Block<'a, W> {
    packed: &'a [f32],
    w: W,
    side: Side,
    cols: Range<usize>,
    rows: Range<usize>,
    n: usize,
    k: usize,
    out: &'a SharedMut<'a, f32>,
}

impl<W: Source> workspace::Task for Block<'_, W> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S, workspace: &mut Workspace) {
        let (first_panel, panels) = (self.rows.start / PANEL, self.rows.len().div_ceil(PANEL));
        let [wide, sums] = workspace.parts([COLS * K_BLOCK, panels * COLS * PANEL]);
        for block in 0..self.k.div_ceil(K_BLOCK) {
            let sum = range(block, K_BLOCK, self.k);
            let (b, b_step, b_row) = self.weights(sum.clone(), wide);
            for (p, sums) in sums.chunks_exact_mut(COLS * PANEL).enumerate() {
                simd.vectorize(Outer {
                    k: sum.len(),
                    n: self.cols.len(),
                    width: (self.rows.len() - p * PANEL).min(PANEL).next_multiple_of(LANES),
                    a: &self.packed[((first_panel + p) * self.k + sum.start) * PANEL..],
                    b,
                    b_step,
                    b_row,
                    c: sums,
                    accumulate: block > 0,
                });
            }
        }
        for (r, row) in self.rows.clone().enumerate() {
            let sums = &sums[r / PANEL * COLS * PANEL..][..self.cols.len() * PANEL];
            // SAFETY: each task has a block of its own.
            let y = unsafe { self.out.slice(row * self.n + self.cols.start, self.cols.len()) };
            for (y, sums) in y.iter_mut().zip(sums.chunks_exact(PANEL)) {
                *y = sums[r % PANEL];
            }
        }
    }
}

impl<W: Source> Block<'_, W> {
    /// The block of weights for some summands, with its strides by summand and by output.
    #[inline(always)]
    fn weights<'b>(&'b self, sum: Range<usize>, wide: &'b mut [f32]) -> (&'b [f32], usize, usize) {
        let (rows, cols) = match self.side {
            Side::Forward => (self.cols.clone(), sum),
            Side::Backward => (sum, self.cols.clone()),
        };
        let stride = match self.side {
            Side::Forward => self.k,
            Side::Backward => self.n,
        };
        let strides = |stride| match self.side {
            Side::Forward => (1, stride),
            Side::Backward => (stride, 1),
        };
        if let Some(w) = self.w.as_f32() {
            let (step, row) = strides(stride);
            return (&w[rows.start * stride + cols.start..], step, row);
        }
        for (to, row) in wide.chunks_exact_mut(cols.len()).zip(rows) {
            self.w.widen(row * stride + cols.start, to);
        }
        let (step, row) = strides(cols.len());
        (wide, step, row)
    }
}
