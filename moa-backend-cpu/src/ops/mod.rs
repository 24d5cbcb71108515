//! What a Llama needs besides attention, on [`Tensor`]: large calls are spread over
//! the current rayon pool, small ones run on the calling thread.

mod rms_norm;
mod rope;
mod swiglu;

pub use crate::linear::{BlockType, WeightData, WeightRef, linear, linear_backward_input, linears};
pub use rms_norm::{rms_norm, rms_norm_backward};
pub use rope::rope;
pub use swiglu::{swiglu, swiglu_backward};

use crate::pool::{self, SharedMut};
use crate::{Error, Result, Tensor};

/// Rows per task of an elementwise operation.
const ROWS: usize = 32;

/// `x += y`: the residual connection.
///
/// # Errors
/// [`Error::Argument`] if the shapes differ.
pub fn add_assign(x: &mut Tensor, y: &Tensor) -> Result<()> {
    if x.shape() != y.shape() {
        return Err(Error::shape("add_assign", "y", format_args!("{:?}", x.shape()), y.shape()));
    }
    let row_len = x.row_len();
    by_rows(x.data_mut(), row_len, 1, |row, x| {
        x.iter_mut().zip(&y.data()[row * row_len..]).for_each(|(x, y)| *x += y);
    });
    Ok(())
}

/// Calls `body(first row, rows)` for stretches of rows; `cost` is the work per element in
/// multiply-adds.
pub(crate) fn by_rows(
    data: &mut [f32],
    row_len: usize,
    cost: u64,
    body: impl Fn(usize, &mut [f32]) + Sync,
) {
    if data.is_empty() {
        return;
    }
    let (rows, work) = (data.len() / row_len, data.len() as u64 * cost);
    let data = SharedMut::new(data);
    pool::for_each(rows.div_ceil(ROWS), work, |task| {
        let first = task * ROWS;
        let count = ROWS.min(rows - first);
        // SAFETY: each task has rows of its own.
        body(first, unsafe { data.slice(first * row_len, count * row_len) });
    });
}
