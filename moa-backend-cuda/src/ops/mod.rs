//! What a Llama needs besides attention.

mod blas;
mod launch;

use std::ops::Range;
use std::sync::{Mutex, PoisonError};

use cudarc::driver::CudaSlice;

use crate::memory::{Staging, address};
use crate::{Device, Dtype, Error, Result, Tensor};
use blas::{Blas, Product};
use launch::{OpArgs, OpKernels};

/// The operations of a Llama layer beside attention, on one GPU and its own stream: cuBLASLt for
/// matrix products, own kernels for the rest.
///
/// Weights and the inputs of matrix products are f16 or bf16, one of them for all. The residual
/// stream and logits are f32, as sums over many layers and choices between near equals want; norms
/// and products sum in f32. Rows have a multiple of 8 elements. Calls return when their kernels are
/// launched; [`Tensor::to_f32`] waits for them.
#[derive(Debug)]
pub struct Operations {
    device: Device,
    dtype: Dtype,
    kernels: OpKernels,
    blas: Blas,
    staging: Mutex<Staging>,
}

/// Bytes of a weight that are copied to the device at once.
const PIECE_BYTES: usize = 4 << 20;

impl Operations {
    /// Compiles or loads the kernels, and opens cuBLASLt.
    ///
    /// # Errors
    /// [`Error::Argument`] unless `dtype` is f16 or bf16, [`Error::NoCublasLt`], [`Error::NoNvrtc`],
    /// [`Error::Compile`], [`Error::OutOfMemory`], [`Error::Driver`].
    pub fn new(device: &Device, dtype: Dtype) -> Result<Self> {
        if dtype == Dtype::F32 {
            return Err(Error::argument("Operations::new", "dtype", "f16 or bf16", dtype));
        }
        Ok(Self {
            device: device.clone(),
            dtype,
            kernels: OpKernels::load(device, dtype)?,
            blas: Blas::new(device)?,
            staging: Mutex::new(Staging::new(device)),
        })
    }

    /// The GPU.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// Type of weights and of what goes into matrix products.
    pub fn dtype(&self) -> Dtype {
        self.dtype
    }

    /// A tensor from bytes made piece by piece in page-locked memory: `fill` is given elements of
    /// the tensor and where to put them, as `dtype` in native byte order.
    ///
    /// # Errors
    /// [`Error::Shape`] unless there are 1 to 3 axes, [`Error::OutOfMemory`], [`Error::Driver`].
    pub fn upload(
        &self,
        shape: &[usize],
        dtype: Dtype,
        mut fill: impl FnMut(Range<usize>, &mut [u8]),
    ) -> Result<Tensor> {
        let tensor = Tensor::uninitialised(&self.device, "Operations::upload", shape, dtype)?;
        let len = shape.iter().product::<usize>();
        let piece = PIECE_BYTES / dtype.bytes();
        for start in (0..len).step_by(piece) {
            let elements = start..len.min(start + piece);
            let bytes = elements.len() * dtype.bytes();
            let to = tensor.pointer() + (start * dtype.bytes()) as u64;
            self.stage(bytes, to, |staged| fill(elements, staged))?;
        }
        Ok(tensor)
    }

    /// Rows `ids` of an embedding, `[vocab, hidden]`, as f32 `[ids, hidden]`.
    ///
    /// # Errors
    /// [`Error::Shape`], [`Error::Argument`] if an id is not a row of the table,
    /// [`Error::OutOfMemory`], [`Error::Driver`].
    pub fn embed(&self, table: &Tensor, ids: &[u32]) -> Result<Tensor> {
        const OP: &str = "embed";
        let [vocab, hidden] = self.matrix(OP, "table", table)?;
        let places = self.indices(OP, ids.iter().map(|&id| id as usize), vocab)?;
        let out = Tensor::uninitialised(&self.device, OP, &[ids.len(), hidden], Dtype::F32)?;
        let args = OpArgs { x: table.pointer(), ids: address(&places), ..shaped(&out) };
        // SAFETY: every id is a row of the table; all of it is on the device's stream.
        unsafe { self.kernels.by_elements("embed", 8, &args) }?;
        Ok(out)
    }

    /// Rows of `x` along its first axis, in the order given.
    ///
    /// # Errors
    /// [`Error::Shape`], [`Error::Argument`] if a row does not exist, [`Error::OutOfMemory`],
    /// [`Error::Driver`].
    pub fn rows(&self, x: &Tensor, rows: &[usize]) -> Result<Tensor> {
        const OP: &str = "rows";
        self.check_rows(OP, "x", x)?;
        let places = self.indices(OP, rows.iter().copied(), x.shape()[0])?;
        let shape = [&[rows.len()], &x.shape()[1..]].concat();
        let out = Tensor::uninitialised(&self.device, OP, &shape, x.dtype())?;
        let flag = i32::from(x.dtype() == Dtype::F32);
        let args = OpArgs { x: x.pointer(), ids: address(&places), flag, ..shaped(&out) };
        // SAFETY: every row exists; all of it is on the device's stream.
        unsafe { self.kernels.by_elements("rows", 8, &args) }?;
        Ok(out)
    }

    /// `x / sqrt(mean(x^2) + eps) * weight` for each row of an f32 `[rows, cols]`, rounded to
    /// [`dtype`](Self::dtype); `weight` is f32 `[cols]`.
    ///
    /// # Errors
    /// [`Error::Shape`], [`Error::Argument`], [`Error::OutOfMemory`], [`Error::Driver`].
    pub fn rms_norm(&self, x: &Tensor, weight: &Tensor, eps: f32) -> Result<Tensor> {
        const OP: &str = "rms_norm";
        self.check_rows(OP, "x", x)?;
        check_dtype(OP, "x", x, Dtype::F32)?;
        self.check_vector(OP, "weight", weight, x.row_len())?;
        let out = Tensor::uninitialised(&self.device, OP, x.shape(), self.dtype)?;
        let args = OpArgs { x: x.pointer(), w: weight.pointer(), eps, ..shaped(&out) };
        // SAFETY: the shapes are checked; all of it is on the device's stream.
        unsafe { self.kernels.by_rows("rms_norm", &args) }?;
        Ok(out)
    }

    /// `x . weight^T + bias`, rounded to `output`: `x` is `[rows, in]`, `weight` `[out, in]`, `bias`
    /// f32 `[out]`. An `x` of f32 is rounded first.
    ///
    /// # Errors
    /// [`Error::Shape`], [`Error::Argument`], [`Error::Blas`], [`Error::OutOfMemory`],
    /// [`Error::Driver`].
    pub fn linear(
        &self,
        x: &Tensor,
        weight: &Tensor,
        bias: Option<&Tensor>,
        output: Dtype,
    ) -> Result<Tensor> {
        const OP: &str = "linear";
        let [out, _] = self.matrix(OP, "weight", weight)?;
        let rows = x.shape()[0];
        let y = Tensor::uninitialised(&self.device, OP, &[rows, out], output)?;
        self.product(OP, x, weight, &y, (true, false))?;
        self.add_bias(y, bias)
    }

    /// `sum + x . weight^T + bias` with an f32 `sum`: the end of a residual branch.
    ///
    /// # Errors
    /// As [`linear`](Self::linear).
    pub fn linear_add(
        &self,
        sum: Tensor,
        x: &Tensor,
        weight: &Tensor,
        bias: Option<&Tensor>,
    ) -> Result<Tensor> {
        const OP: &str = "linear_add";
        let [out, _] = self.matrix(OP, "weight", weight)?;
        check_dtype(OP, "sum", &sum, Dtype::F32)?;
        check_shape(OP, "sum", &sum, &[x.shape()[0], out])?;
        let sum = sum.into_unique()?;
        self.product(OP, x, weight, &sum, (true, true))?;
        self.add_bias(sum, bias)
    }

    /// `silu(gate) * up`.
    ///
    /// # Errors
    /// [`Error::Shape`], [`Error::Argument`], [`Error::OutOfMemory`], [`Error::Driver`].
    pub fn swiglu(&self, gate: &Tensor, up: &Tensor) -> Result<Tensor> {
        const OP: &str = "swiglu";
        self.check_rows(OP, "gate", gate)?;
        check_shape(OP, "up", up, gate.shape())?;
        check_dtype(OP, "gate", gate, self.dtype)?;
        check_dtype(OP, "up", up, self.dtype)?;
        let out = Tensor::uninitialised(&self.device, OP, gate.shape(), self.dtype)?;
        let args = OpArgs { x: gate.pointer(), y: up.pointer(), ..shaped(&out) };
        // SAFETY: the shapes are checked; all of it is on the device's stream.
        unsafe { self.kernels.by_elements("swiglu", 8, &args) }?;
        Ok(out)
    }

    /// `x + y` with an f32 `x`.
    ///
    /// # Errors
    /// [`Error::Shape`], [`Error::Argument`], [`Error::OutOfMemory`], [`Error::Driver`].
    pub fn add(&self, x: Tensor, y: &Tensor) -> Result<Tensor> {
        const OP: &str = "add";
        self.check_rows(OP, "x", &x)?;
        check_dtype(OP, "x", &x, Dtype::F32)?;
        check_shape(OP, "y", y, x.shape())?;
        let x = x.into_unique()?;
        let flag = i32::from(y.dtype() == Dtype::F32);
        let args = OpArgs { x: x.pointer(), y: y.pointer(), flag, ..shaped(&x) };
        // SAFETY: the shapes are checked; all of it is on the device's stream.
        unsafe { self.kernels.by_elements("add", 8, &args) }?;
        Ok(x)
    }

    /// Rotates each head of `[tokens, heads, head_dim]` (half-split layout); `turns` holds a pair
    /// (cos, sin) for each token and dimension pair, f32 `[tokens, head_dim]`. `inverse` rotates
    /// back, which is also the gradient.
    ///
    /// # Errors
    /// [`Error::Shape`], [`Error::Argument`], [`Error::OutOfMemory`], [`Error::Driver`].
    pub fn rope(&self, x: Tensor, turns: &Tensor, inverse: bool) -> Result<Tensor> {
        const OP: &str = "rope";
        let &[tokens, _, head_dim] = x.shape() else {
            return Err(Error::shape(OP, "x", "[tokens, heads, head dim]", x.shape()));
        };
        if !head_dim.is_multiple_of(2) {
            return Err(Error::argument(OP, "head dim", "even", head_dim));
        }
        check_shape(OP, "turns", turns, &[tokens, head_dim])?;
        check_dtype(OP, "turns", turns, Dtype::F32)?;
        let x = x.into_unique()?;
        let args = OpArgs {
            // Not null: f32.
            y: if x.dtype() == Dtype::F32 { x.pointer() } else { 0 },
            w: turns.pointer(),
            y_stride: head_dim as i64,
            flag: i32::from(inverse),
            ..shaped(&x)
        };
        // SAFETY: the shapes are checked; all of it is on the device's stream.
        unsafe { self.kernels.by_elements("rope", 2, &args) }?;
        Ok(x)
    }

    /// `d (+)= x . weight^T`, or `x . weight` unless transposed.
    fn product(
        &self,
        op: &'static str,
        x: &Tensor,
        weight: &Tensor,
        d: &Tensor,
        (transposed, accumulate): (bool, bool),
    ) -> Result<()> {
        let [out, input] = self.matrix(op, "weight", weight)?;
        let (n, k) = if transposed { (out, input) } else { (input, out) };
        let m = x.shape()[0];
        check_shape(op, "x", x, &[m, k])?;
        if m == 0 {
            return Ok(());
        }
        let rounded = match x.dtype() {
            Dtype::F32 => Some(self.cast(x)?),
            other if other == self.dtype => None,
            other => return Err(Error::argument(op, "x", self.dtype, other)),
        };
        let x = rounded.as_ref().unwrap_or(x);
        let product = Product {
            m,
            n,
            k,
            a_stride: k,
            d_stride: n,
            transposed,
            input: self.dtype,
            output: d.dtype(),
            accumulate,
        };
        // SAFETY: the shapes are checked; all of it is on the device's stream.
        unsafe { self.blas.run(product, x.pointer(), weight.pointer(), d.pointer()) }
    }

    fn add_bias(&self, y: Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
        const OP: &str = "linear";
        let Some(bias) = bias else { return Ok(y) };
        self.check_rows(OP, "out", &y)?;
        self.check_vector(OP, "bias", bias, y.row_len())?;
        let flag = i32::from(y.dtype() == Dtype::F32);
        let args = OpArgs { w: bias.pointer(), flag, ..shaped(&y) };
        // SAFETY: the shapes are checked; all of it is on the device's stream.
        unsafe { self.kernels.by_elements("add_bias", 8, &args) }?;
        Ok(y)
    }

    /// An f32 tensor, rounded.
    fn cast(&self, x: &Tensor) -> Result<Tensor> {
        const OP: &str = "cast";
        self.check_rows(OP, "x", x)?;
        let out = Tensor::uninitialised(&self.device, OP, x.shape(), self.dtype)?;
        let args = OpArgs { x: x.pointer(), ..shaped(&out) };
        // SAFETY: the shapes are the same; all of it is on the device's stream.
        unsafe { self.kernels.by_elements("cast", 8, &args) }?;
        Ok(out)
    }

    /// Indices below `limit`, on the device.
    fn indices(
        &self,
        op: &'static str,
        indices: impl Iterator<Item = usize>,
        limit: usize,
    ) -> Result<CudaSlice<i32>> {
        let mut places = Vec::new();
        for index in indices {
            match i32::try_from(index) {
                Ok(place) if index < limit => places.push(place),
                _ => {
                    let expected = format_args!("below {limit}").to_string();
                    return Err(Error::argument(op, "index", expected, index));
                }
            }
        }
        let slice = self.device.alloc::<i32>("indices", places.len())?;
        let bytes: &[u8] = bytemuck::cast_slice(&places);
        self.stage(bytes.len(), address(&slice), |staged| staged.copy_from_slice(bytes))?;
        Ok(slice)
    }

    /// Copies `bytes` bytes, which `fill` writes, to memory just allocated for them.
    fn stage(&self, bytes: usize, to: u64, fill: impl FnOnce(&mut [u8])) -> Result<()> {
        if bytes == 0 {
            return Ok(());
        }
        self.device.bind()?;
        let mut staging = self.staging.lock().unwrap_or_else(PoisonError::into_inner);
        // SAFETY: private callers pass memory of that size, on the device's stream.
        unsafe { staging.fill(bytes, to, self.device.stream(), fill) }
    }

    /// `[rows, cols]` of a weight.
    fn matrix(&self, op: &'static str, what: &'static str, weight: &Tensor) -> Result<[usize; 2]> {
        let &[rows, cols] = weight.shape() else {
            return Err(Error::shape(op, what, "2 axes", weight.shape()));
        };
        self.check_rows(op, what, weight)?;
        check_dtype(op, what, weight, self.dtype)?;
        Ok([rows, cols])
    }

    fn check_vector(
        &self,
        op: &'static str,
        what: &'static str,
        vector: &Tensor,
        len: usize,
    ) -> Result<()> {
        check_shape(op, what, vector, &[len])?;
        check_dtype(op, what, vector, Dtype::F32)
    }

    /// Rows that the kernels can take, on this device.
    fn check_rows(&self, op: &'static str, what: &'static str, x: &Tensor) -> Result<()> {
        if x.device().context() != self.device.context() {
            return Err(Error::argument(op, what, "on the device of the operations", "on another"));
        }
        let cols = x.row_len();
        if !cols.is_multiple_of(8) || i32::try_from(cols).is_err() {
            return Err(Error::shape(op, what, "rows of a multiple of 8 elements", x.shape()));
        }
        match i32::try_from(x.shape()[0]) {
            Ok(_) => Ok(()),
            Err(_) => Err(Error::shape(op, what, "fewer than 2^31 rows", x.shape())),
        }
    }
}

/// Arguments of an operation that writes `out`, whose inputs have rows as long as it.
fn shaped(out: &Tensor) -> OpArgs {
    let cols = out.row_len();
    let stride = cols as i64;
    OpArgs {
        out: out.pointer(),
        x_stride: stride,
        y_stride: stride,
        out_stride: stride,
        rows: out.shape()[0] as i32,
        cols: cols as i32,
        ..OpArgs::default()
    }
}

fn check_shape(op: &'static str, what: &'static str, x: &Tensor, expected: &[usize]) -> Result<()> {
    match x.shape() == expected {
        true => Ok(()),
        false => Err(Error::shape(op, what, format_args!("{expected:?}"), x.shape())),
    }
}

fn check_dtype(op: &'static str, what: &'static str, x: &Tensor, expected: Dtype) -> Result<()> {
    match x.dtype() == expected {
        true => Ok(()),
        false => Err(Error::argument(op, what, expected, x.dtype())),
    }
}
