//! Products with weights that stay in their storage type.

mod dots;
mod panels;

use half::{bf16, f16};

use self::panels::Side;
use crate::pool::SharedMut;
use crate::{Error, Result, Tensor};

/// Rows of `x` from which converting weights to f32 is faster than dot products with the weights as
/// they lie in memory.
const PANEL_ROWS: usize = 10;

/// Elements of a weight matrix.
#[derive(Clone, Copy, Debug)]
pub enum WeightData<'a> {
    /// 4 bytes each.
    F32(&'a [f32]),
    /// 2 bytes each.
    F16(&'a [f16]),
    /// 2 bytes each.
    Bf16(&'a [bf16]),
}

/// A weight matrix `[rows, cols]` = `[out, in]`, row-major, borrowed in its storage type.
#[derive(Clone, Copy, Debug)]
pub struct WeightRef<'a> {
    data: WeightData<'a>,
    rows: usize,
    cols: usize,
}

impl<'a> WeightRef<'a> {
    /// Takes `data` as `[rows, cols]`.
    ///
    /// # Errors
    /// [`Error::Argument`] unless the data has `rows * cols` elements.
    pub fn new(data: WeightData<'a>, rows: usize, cols: usize) -> Result<Self> {
        let len = match data {
            WeightData::F32(x) => x.len(),
            WeightData::F16(x) => x.len(),
            WeightData::Bf16(x) => x.len(),
        };
        if rows.checked_mul(cols) != Some(len) {
            return Err(Error::shape(
                "WeightRef::new",
                "data",
                format_args!("[{rows}, {cols}]"),
                &[len],
            ));
        }
        Ok(Self { data, rows, cols })
    }

    /// Outputs.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Inputs.
    pub fn cols(&self) -> usize {
        self.cols
    }
}

macro_rules! with_weight {
    ($weight:expr, $w:ident => $body:expr) => {
        match $weight.data {
            WeightData::F32($w) => $body,
            WeightData::F16($w) => $body,
            WeightData::Bf16($w) => $body,
        }
    };
}

/// `x . weight^T + bias`: `[tokens, in]` to `[tokens, out]`. Axes of `x` after the first count as one.
///
/// # Errors
/// [`Error::Argument`] if the shapes do not fit.
pub fn linear(x: &Tensor, weight: WeightRef<'_>, bias: Option<&[f32]>) -> Result<Tensor> {
    const OP: &str = "linear";
    let (m, n, k) = (x.rows(), weight.rows, weight.cols);
    if x.row_len() != k {
        return Err(Error::shape(OP, "x", format_args!("[tokens, {k}]"), x.shape()));
    }
    if let Some(bias) = bias.filter(|bias| bias.len() != n) {
        return Err(Error::shape(OP, "bias", format_args!("[{n}]"), &[bias.len()]));
    }
    let mut y = Tensor::zeros(&[m, n])?;
    if m > 0 && n > 0 {
        let out = SharedMut::new(y.data_mut());
        with_weight!(weight, w => match m {
            0..PANEL_ROWS => dots::forward(x.data(), w, (m, n, k), &out),
            _ => panels::product(x.data(), w, Side::Forward, (m, n, k), &out),
        });
    }
    if let Some(bias) = bias {
        crate::ops::by_rows(y.data_mut(), n, 1, |_, rows| {
            for row in rows.chunks_exact_mut(n) {
                row.iter_mut().zip(bias).for_each(|(y, b)| *y += b);
            }
        });
    }
    Ok(y)
}

/// `dy . weight`: the gradient of [`linear`] by its input, `[tokens, out]` to `[tokens, in]`.
///
/// # Errors
/// [`Error::Argument`] if the shapes do not fit.
pub fn linear_backward_input(dy: &Tensor, weight: WeightRef<'_>) -> Result<Tensor> {
    let (m, n, k) = (dy.rows(), weight.cols, weight.rows);
    if dy.row_len() != k {
        return Err(Error::shape(
            "linear_backward_input",
            "dy",
            format_args!("[tokens, {k}]"),
            dy.shape(),
        ));
    }
    let mut dx = Tensor::zeros(&[m, n])?;
    let out = SharedMut::new(dx.data_mut());
    with_weight!(weight, w => panels::product(dy.data(), w, Side::Backward, (m, n, k), &out));
    Ok(dx)
}

fn range(index: usize, step: usize, end: usize) -> std::ops::Range<usize> {
    index * step..end.min((index + 1) * step)
}
