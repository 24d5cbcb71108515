//! The other operations of a Llama, on the tensors of this crate. All return when their kernels are
//! queued.

mod backward;

pub use crate::linear::{Layer, linear, linear_add, linears, normed_linears, normed_swiglu};
pub use backward::{linear_backward, place_rows, rms_norm_backward, swiglu_backward};

use cubecl::{CubeCount, CubeDim};

use crate::attention::{Row, arg, grid};
use crate::kernels::rows as kernels;
use crate::kernels::rows::NORM_UNITS;
use crate::kernels::words::per_word;
use crate::{Dtype, Error, Matrix, Result, Tensor};

/// Rows `ids` of a table times `factor`, `[ids, cols]`.
///
/// # Errors
/// [`Error::Argument`] if an id is no row, [`Error::TooLarge`].
pub fn embed(table: &Matrix, ids: &[u32], factor: f32) -> Result<Tensor> {
    const OP: &str = "embed";
    if let Some(id) = ids.iter().find(|&&id| id as usize >= table.rows()) {
        return Err(Error::argument(OP, "id", format_args!("below {}", table.rows()), id));
    }
    let Some(dtype) = table.dtype() else { return table.widened(Some(ids), factor) };
    let out = Tensor::uninitialised(table.device(), OP, &[ids.len(), table.cols()])?;
    gather(&table.words, dtype, ids, factor, &out);
    Ok(out)
}

/// Rows of `x` in the order given.
///
/// # Errors
/// [`Error::Argument`] if a row does not exist, [`Error::TooLarge`].
pub fn rows(x: &Tensor, rows: &[usize]) -> Result<Tensor> {
    const OP: &str = "rows";
    if let Some(row) = rows.iter().find(|&&row| row >= x.rows()) {
        return Err(Error::argument(OP, "row", format_args!("below {}", x.rows()), row));
    }
    let ids: Vec<u32> = rows.iter().map(|&row| row as u32).collect();
    let shape = [&[rows.len()], &x.shape()[1..]].concat();
    let out = Tensor::uninitialised(x.device(), OP, &shape)?;
    gather(x.handle(), Dtype::F32, &ids, 1.0, &out);
    Ok(out)
}

fn gather(table: &cubecl::server::Handle, dtype: Dtype, ids: &[u32], factor: f32, out: &Tensor) {
    if out.len() == 0 {
        return;
    }
    let row = Row::of(out.row_len());
    let count = out.rows() * row.vectors;
    let client = out.device().client();
    let ids = client.create_from_slice(bytemuck::cast_slice(ids));
    let (cubes, dim) = out.device().cubes(count);
    // SAFETY: the ids are rows of the table, and the output has a row for each.
    unsafe {
        kernels::gather::launch_unchecked(
            client,
            cubes,
            dim,
            row.width,
            row.width / per_word(dtype),
            arg(table),
            arg(&ids),
            arg(out.handle()),
            count as u32,
            row.vectors as u32,
            factor,
            dtype,
        );
    }
}

/// `x / sqrt(mean(x^2) + eps) * weight` per row.
///
/// # Errors
/// [`Error::Argument`] unless the weight has an element per column, [`Error::TooLarge`].
pub fn rms_norm(x: &Tensor, weight: &Tensor, eps: f32) -> Result<Tensor> {
    const OP: &str = "rms_norm";
    if weight.shape() != [x.row_len()] {
        return Err(Error::shape(OP, "weight", format_args!("[{}]", x.row_len()), weight.shape()));
    }
    let out = Tensor::uninitialised(x.device(), OP, x.shape())?;
    if out.len() > 0 {
        // SAFETY: there is a cube for each row.
        unsafe {
            kernels::rms_norm::launch_unchecked(
                x.device().client(),
                grid(x.device(), x.rows()),
                CubeDim::new_1d(NORM_UNITS as u32),
                arg(x.handle()),
                arg(weight.handle()),
                arg(out.handle()),
                x.rows() as u32,
                x.row_len() as u32,
                eps,
            );
        }
    }
    Ok(out)
}
/// Rotates heads in pairs `(i, i + head_dim / 2)`; `x` is `[tokens, heads, head_dim]`, `cos` and `sin`
/// are `[tokens, head_dim / 2]`. `inverse` rotates back.
///
/// # Errors
/// [`Error::Argument`] if shapes do not fit, [`Error::TooLarge`].
pub fn rope(x: &Tensor, cos: &Tensor, sin: &Tensor, inverse: bool) -> Result<Tensor> {
    const OP: &str = "rope";
    let &[tokens, heads, head_dim] = x.shape() else {
        return Err(Error::shape(OP, "x", "[tokens, heads, head dim]", x.shape()));
    };
    let half = head_dim / 2;
    for (what, table) in [("cos", cos), ("sin", sin)] {
        if table.shape() != [tokens, half] {
            return Err(Error::shape(OP, what, format_args!("[{tokens}, {half}]"), table.shape()));
        }
    }
    if !head_dim.is_multiple_of(2) {
        return Err(Error::shape(OP, "x", "an even head dim", x.shape()));
    }
    let out = Tensor::uninitialised(x.device(), OP, x.shape())?;
    let pairs = tokens * heads * half;
    if pairs > 0 {
        let (cubes, dim) = x.device().cubes(pairs);
        // SAFETY: there are that many pairs, and angles for each token.
        unsafe {
            kernels::rope::launch_unchecked(
                x.device().client(),
                cubes,
                dim,
                arg(x.handle()),
                arg(cos.handle()),
                arg(sin.handle()),
                arg(out.handle()),
                pairs as u32,
                heads as u32,
                half as u32,
                if inverse { -1.0 } else { 1.0 },
            );
        }
    }
    Ok(out)
}

/// `silu(gate) * up`.
///
/// # Errors
/// [`Error::Argument`] if shapes differ, [`Error::TooLarge`].
pub fn swiglu(gate: &Tensor, up: &Tensor) -> Result<Tensor> {
    let (out, cubes) = pairwise("swiglu", gate, up)?;
    if let Some((cubes, dim)) = cubes {
        let [gate, up, to] = [gate, up, &out].map(|tensor| arg(tensor.handle()));
        let client = out.device().client();
        // SAFETY: all three have that many elements.
        unsafe {
            kernels::swiglu::launch_unchecked(client, cubes, dim, gate, up, to, out.len() as u32);
        }
    }
    Ok(out)
}

/// `x + y`.
///
/// # Errors
/// [`Error::Argument`] if shapes differ, [`Error::TooLarge`].
pub fn add(x: &Tensor, y: &Tensor) -> Result<Tensor> {
    let (out, cubes) = pairwise("add", x, y)?;
    launch_add(x, y, &out, cubes);
    Ok(out)
}

/// `x + y` of each row of `x` and the one row of `y`, which has as many elements.
pub(crate) fn add_rows(x: &Tensor, y: &Tensor) -> Result<Tensor> {
    let (out, cubes) = pairwise("add", x, x)?;
    launch_add(x, y, &out, cubes);
    Ok(out)
}

fn launch_add(x: &Tensor, y: &Tensor, out: &Tensor, cubes: Option<Cubes>) {
    let Some((cubes, dim)) = cubes else { return };
    let (len, period) = (out.len() as u32, y.len() as u32);
    let client = out.device().client();
    let [x, y, out] = [x, y, out].map(|tensor| arg(tensor.handle()));
    // SAFETY: `x` and the output have that many elements, and `y` so many that repeat.
    unsafe {
        kernels::add::launch_unchecked(client, cubes, dim, x, y, out, len, period);
    }
}

type Cubes = (CubeCount, CubeDim);

fn pairwise(op: &'static str, x: &Tensor, y: &Tensor) -> Result<(Tensor, Option<Cubes>)> {
    if x.shape() != y.shape() {
        return Err(Error::shape(op, "right side", format_args!("{:?}", x.shape()), y.shape()));
    }
    let out = Tensor::uninitialised(x.device(), op, x.shape())?;
    let cubes = (out.len() > 0).then(|| x.device().cubes(out.len()));
    Ok((out, cubes))
}
