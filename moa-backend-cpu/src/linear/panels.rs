//! Many rows: the micro-kernel of attention. The activations are packed once, the weights are
//! converted to f32 block by block where they are not f32 already.

use std::ops::Range;

use pulp::Simd;

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

/// Product of `x` `[m, k]` with a weight to `[m, n]`.
pub(super) fn product<E: Element>(
    x: &[f32],
    w: &[E],
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
struct Block<'a, E> {
    packed: &'a [f32],
    w: &'a [E],
    side: Side,
    cols: Range<usize>,
    rows: Range<usize>,
    n: usize,
    k: usize,
    out: &'a SharedMut<'a, f32>,
}

impl<E: Element> workspace::Task for Block<'_, E> {
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

impl<'a, E: Element> Block<'a, E> {
    /// The block of weights for some summands, with its strides by summand and by output.
    #[inline(always)]
    fn weights<'b>(&self, sum: Range<usize>, wide: &'b mut [f32]) -> (&'b [f32], usize, usize)
    where
        'a: 'b,
    {
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
        if let Some(w) = E::as_f32(self.w) {
            let (step, row) = strides(stride);
            return (&w[rows.start * stride + cols.start..], step, row);
        }
        for (to, row) in wide.chunks_exact_mut(cols.len()).zip(rows) {
            E::widen_slice(&self.w[row * stride + cols.start..row * stride + cols.end], to);
        }
        let (step, row) = strides(cols.len());
        (wide, step, row)
    }
}
