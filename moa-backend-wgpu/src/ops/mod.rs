//! The other operations of a Llama, on the tensors of this crate. All return when their kernels are
//! queued.

mod backward;

pub use backward::{linear_backward, place_rows, rms_norm_backward, swiglu_backward};

use cubecl::{CubeCount, CubeDim};

use crate::extend::{Limits, Row, arg, square};
use crate::kernels::linear::{FEATURE_UNITS, few_rows, many_rows};
use crate::kernels::rows as kernels;
use crate::kernels::rows::NORM_UNITS;
use crate::{Device, Dtype, Error, Matrix, Result, Tensor};

/// Most rows for which a linear layer reads its weight once per few of them.
const FEW_ROWS: usize = 16;

/// Rows `ids` of a table, `[ids, cols]`.
///
/// # Errors
/// [`Error::Argument`] if an id is no row, [`Error::TooLarge`].
pub fn embed(table: &Matrix, ids: &[u32]) -> Result<Tensor> {
    const OP: &str = "embed";
    if let Some(id) = ids.iter().find(|&&id| id as usize >= table.rows()) {
        return Err(Error::argument(OP, "id", format_args!("below {}", table.rows()), id));
    }
    let out = Tensor::uninitialised(table.device(), OP, &[ids.len(), table.cols()])?;
    gather(&table.words, table.dtype(), ids, &out);
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
    gather(x.handle(), Dtype::F32, &ids, &out);
    Ok(out)
}

fn gather(table: &cubecl::server::Handle, dtype: Dtype, ids: &[u32], out: &Tensor) {
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
            row.width / dtype.per_word(),
            arg(table),
            arg(&ids),
            arg(out.handle()),
            count as u32,
            row.vectors as u32,
            dtype,
        );
    }
}

/// `x / sqrt(mean(x^2) + eps) * weight` per row.
///
/// # Errors
/// [`Error::Shape`] unless the weight has an element per column, [`Error::TooLarge`].
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

/// `count` cubes along x and y.
fn grid(device: &Device, count: usize) -> CubeCount {
    let along_x = count.min(Limits::of(device).cubes as usize);
    CubeCount::Static(along_x as u32, count.div_ceil(along_x.max(1)) as u32, 1)
}

/// `x . weight^T + bias`, `[rows, weight rows]`.
///
/// # Errors
/// [`Error::Shape`] if shapes do not fit, [`Error::TooLarge`].
pub fn linear(x: &Tensor, weight: &Matrix, bias: Option<&Tensor>) -> Result<Tensor> {
    const OP: &str = "linear";
    let (rows, features) = (x.rows(), weight.rows());
    if x.row_len() != weight.cols() {
        let expected = format_args!("[rows, {}]", weight.cols()).to_string();
        return Err(Error::shape(OP, "x", expected, x.shape()));
    }
    if let Some(bias) = bias.filter(|bias| bias.shape() != [features]) {
        return Err(Error::shape(OP, "bias", format_args!("[{features}]"), bias.shape()));
    }
    let device = x.device();
    let out = Tensor::uninitialised(device, OP, &[rows, features])?;
    if rows == 0 {
        return Ok(out);
    }
    let row = Row::of(weight.cols());
    let (width, words) = (row.width, row.width / weight.dtype().per_word());
    let limits = Limits::of(device);
    let (has_bias, bias) = (u32::from(bias.is_some()), bias.unwrap_or(x));
    let [x, bias, to] = [x, bias, &out].map(|tensor| arg(tensor.handle()));
    let sizes = [rows, features, row.vectors].map(|n| n as u32);
    if rows <= FEW_ROWS {
        let count = if rows == 1 { 1 } else { 4 };
        let along_x = features.min(limits.cubes as usize);
        let cubes = (along_x, rows.div_ceil(count), features.div_ceil(along_x));
        // SAFETY: there is a cube for each feature and group of rows; shapes were checked.
        unsafe {
            few_rows::launch_unchecked(
                device.client(),
                CubeCount::Static(cubes.0 as u32, cubes.1 as u32, cubes.2 as u32),
                CubeDim::new_1d(FEATURE_UNITS as u32),
                width,
                words,
                x,
                arg(&weight.words),
                bias,
                to,
                sizes[0],
                sizes[1],
                sizes[2],
                has_bias,
                count,
                weight.dtype(),
            );
        }
    } else {
        let tile = square(&limits, rows, width);
        let cubes = [features.div_ceil(tile.keys()), rows.div_ceil(tile.rows())];
        if let Some(cubes) = cubes.into_iter().find(|&n| n > limits.cubes as usize) {
            return Err(Error::argument(
                OP,
                "tiles",
                format_args!("at most {}", limits.cubes),
                cubes,
            ));
        }
        // SAFETY: there is a cube for each tile of the output; shapes were checked.
        unsafe {
            many_rows::launch_unchecked(
                device.client(),
                CubeCount::Static(cubes[0] as u32, cubes[1] as u32, 1),
                CubeDim::new_1d(tile.units() as u32),
                width,
                words,
                x,
                arg(&weight.words),
                bias,
                to,
                sizes[0],
                sizes[1],
                sizes[2],
                has_bias,
                tile,
                weight.dtype(),
            );
        }
    }
    Ok(out)
}

/// Rotates heads in pairs `(i, i + head_dim / 2)`; `x` is `[tokens, heads, head_dim]`, `cos` and `sin`
/// are `[tokens, head_dim / 2]`. `inverse` rotates back.
///
/// # Errors
/// [`Error::Shape`] if shapes do not fit, [`Error::TooLarge`].
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
/// [`Error::Shape`] if shapes differ, [`Error::TooLarge`].
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
/// [`Error::Shape`] if shapes differ, [`Error::TooLarge`].
pub fn add(x: &Tensor, y: &Tensor) -> Result<Tensor> {
    let (out, cubes) = pairwise("add", x, y)?;
    if let Some((cubes, dim)) = cubes {
        let [x, y, to] = [x, y, &out].map(|tensor| arg(tensor.handle()));
        let client = out.device().client();
        // SAFETY: all three have that many elements.
        unsafe {
            kernels::add::launch_unchecked(client, cubes, dim, x, y, to, out.len() as u32);
        }
    }
    Ok(out)
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
