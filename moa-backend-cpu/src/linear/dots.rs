//! Few rows: dot products straight from the weights' storage type, bound by memory.

use std::borrow::Cow;

use pulp::{Simd, WithSimd};

use super::{PANEL_ROWS, range};
use crate::Result;
use crate::element::Element;
use crate::pool::{self, SharedMut};
use crate::simd::dispatch;
use crate::simd::dot::{Rows, streamed_dots};
use crate::simd::outer::LANES;
use crate::zeroed::zeroed;

/// Weight rows per task.
const DOT_BLOCK: usize = 32;

/// Each weight row is read once, in its storage type, for all rows of `x`.
pub(super) fn forward<E: Element>(
    x: &[f32],
    w: &[E],
    (m, n, k): (usize, usize, usize),
    out: &SharedMut<'_, f32>,
) -> Result<()> {
    let wide = k.next_multiple_of(LANES);
    let x = if wide == k { Cow::Borrowed(x) } else { Cow::Owned(padded(x, k, wide)?) };
    pool::for_each(n.div_ceil(DOT_BLOCK), (m * n * k) as u64, |task| {
        let rows = range(task, DOT_BLOCK, n);
        let mut y = [0.0; PANEL_ROWS * DOT_BLOCK];
        dispatch(Dots { x: &x, w: &w[rows.start * k..rows.end * k], k, wide, y: &mut y });
        for (i, y) in y.chunks_exact(DOT_BLOCK).take(m).enumerate() {
            // SAFETY: each task has columns of its own.
            let to = unsafe { out.slice(i * n + rows.start, rows.len()) };
            to.copy_from_slice(&y[..rows.len()]);
        }
    });
    Ok(())
}

fn padded(x: &[f32], k: usize, wide: usize) -> Result<Vec<f32>> {
    let mut padded: Vec<f32> = zeroed(x.len() / k.max(1) * wide, "padded activations")?;
    for (to, from) in padded.chunks_exact_mut(wide.max(1)).zip(x.chunks_exact(k.max(1))) {
        to[..k].copy_from_slice(from);
    }
    Ok(padded)
}

/// `y[i][j] = x[i] . w[j]`, `y` at a stride of [`DOT_BLOCK`].
struct Dots<'a, E> {
    x: &'a [f32],
    w: &'a [E],
    k: usize,
    wide: usize,
    y: &'a mut [f32],
}

impl<E: Element> WithSimd for Dots<'_, E> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Self { x, w, k, wide, y } = self;
        if k == 0 {
            return;
        }
        let (m, count) = (x.len() / wide, w.len() / k);
        let mut i = 0;
        macro_rules! rows {
            ($r:literal) => {
                while m - i >= $r {
                    let rows = Rows { data: &x[i * wide..], stride: wide, count: m - i };
                    let w = Rows { data: w, stride: k, count };
                    let y = &mut y[i * DOT_BLOCK..];
                    streamed_dots::<S, E, $r>(simd, k, rows, w, y, DOT_BLOCK);
                    i += $r;
                }
            };
        }
        rows!(4);
        rows!(2);
        rows!(1);
    }
}
