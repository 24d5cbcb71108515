//! Gradients of the operations by their input, for profiling.

use std::ops::Range;

use cubecl::{CubeCount, CubeDim};

use super::{grid, pairwise};
use crate::attention::{Limits, Row, arg, square};
use crate::kernels::linear::backward;
use crate::kernels::rows as kernels;
use crate::kernels::rows::NORM_UNITS;
use crate::kernels::words::per_word;
use crate::{Dtype, Error, Matrix, Result, Tensor};

/// `d_y . weight`, `[rows, weight columns]`.
///
/// # Errors
/// [`Error::Argument`] unless `d_y` has a column per row of the weight, or for more rows
/// than one launch has, [`Error::TooLarge`].
pub fn linear_backward(d_y: &Tensor, weight: &Matrix) -> Result<Tensor> {
    const OP: &str = "linear_backward";
    let (rows, features) = (d_y.rows(), weight.rows());
    if d_y.row_len() != features {
        return Err(Error::shape(OP, "d_y", format_args!("[rows, {features}]"), d_y.shape()));
    }
    let Some(dtype) = weight.dtype() else {
        return linear_backward(d_y, &weight.as_plain(Dtype::F32)?);
    };
    let device = d_y.device();
    let d_x = Tensor::uninitialised(device, OP, &[rows, weight.cols()])?;
    if rows == 0 {
        return Ok(d_x);
    }
    let row = Row::of(weight.cols());
    let limits = Limits::of(device);
    let tile = square(&limits, rows, row.width);
    let tiles = rows.div_ceil(tile.rows());
    if tiles > limits.cubes as usize {
        let most = limits.cubes as usize * tile.rows();
        return Err(Error::argument(OP, "rows", format_args!("at most {most}"), rows));
    }
    // SAFETY: there is a cube for each tile of the output; shapes were checked.
    unsafe {
        backward::launch_unchecked(
            device.client(),
            CubeCount::Static(row.vectors.div_ceil(tile.units_x) as u32, tiles as u32, 1),
            CubeDim::new_1d(tile.units() as u32),
            row.width,
            row.width / per_word(dtype),
            arg(d_y.handle()),
            arg(&weight.words),
            arg(d_x.handle()),
            rows as u32,
            features as u32,
            row.vectors as u32,
            tile,
            dtype,
        );
    }
    Ok(d_x)
}

/// Gradient of [`super::rms_norm`] by `x`.
///
/// # Errors
/// [`Error::Argument`] if shapes do not fit, [`Error::TooLarge`].
pub fn rms_norm_backward(x: &Tensor, weight: &Tensor, eps: f32, d_y: &Tensor) -> Result<Tensor> {
    const OP: &str = "rms_norm_backward";
    if weight.shape() != [x.row_len()] {
        return Err(Error::shape(OP, "weight", format_args!("[{}]", x.row_len()), weight.shape()));
    }
    let (d_x, cubes) = pairwise(OP, x, d_y)?;
    if cubes.is_some() {
        // SAFETY: there is a cube for each row.
        unsafe {
            kernels::rms_norm_backward::launch_unchecked(
                x.device().client(),
                grid(x.device(), x.rows()),
                CubeDim::new_1d(NORM_UNITS as u32),
                arg(x.handle()),
                arg(weight.handle()),
                arg(d_y.handle()),
                arg(d_x.handle()),
                x.rows() as u32,
                x.row_len() as u32,
                eps,
            );
        }
    }
    Ok(d_x)
}

/// Gradients of [`super::swiglu`] by gate and up.
///
/// # Errors
/// [`Error::Argument`] if shapes differ, [`Error::TooLarge`].
pub fn swiglu_backward(gate: &Tensor, up: &Tensor, d_y: &Tensor) -> Result<(Tensor, Tensor)> {
    const OP: &str = "swiglu_backward";
    let (d_gate, cubes) = pairwise(OP, gate, up)?;
    let (d_up, _) = pairwise(OP, gate, d_y)?;
    if let Some((cubes, dim)) = cubes {
        // SAFETY: all five have that many elements.
        unsafe {
            kernels::swiglu_backward::launch_unchecked(
                gate.device().client(),
                cubes,
                dim,
                arg(gate.handle()),
                arg(up.handle()),
                arg(d_y.handle()),
                arg(d_gate.handle()),
                arg(d_up.handle()),
                gate.len() as u32,
            );
        }
    }
    Ok((d_gate, d_up))
}

/// `x` at `rows` of a zero tensor of `total` rows.
///
/// # Errors
/// [`Error::Argument`] unless `x` has that many rows and they exist, [`Error::TooLarge`].
pub fn place_rows(x: &Tensor, rows: Range<usize>, total: usize) -> Result<Tensor> {
    const OP: &str = "place_rows";
    if x.rows() != rows.len() || rows.end > total {
        let expected = format_args!("{} of {total}", rows.len()).to_string();
        return Err(Error::argument(OP, "rows", expected, x.rows()));
    }
    let shape = [&[total], &x.shape()[1..]].concat();
    let out = Tensor::uninitialised(x.device(), OP, &shape)?;
    if out.len() > 0 {
        let (cubes, dim) = out.device().cubes(out.len());
        // SAFETY: the output has that many elements, and `x` those from the first row on.
        unsafe {
            kernels::place::launch_unchecked(
                x.device().client(),
                cubes,
                dim,
                arg(x.handle()),
                arg(out.handle()),
                (rows.start * x.row_len()) as u32,
                x.len() as u32,
                out.len() as u32,
            );
        }
    }
    Ok(out)
}
