//! What a Llama needs besides attention.

mod backward;
mod elementwise;
mod indices;
pub(crate) mod launch;
mod sample;

use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

use crate::kernels::compile::check_half;
use crate::kernels::source::Source;
use crate::linear::Clusters;
use crate::linear::blas::Blas;
use crate::memory::Staging;
use crate::{Device, Dtype, Error, Result, Tensor};
pub use backward::AttentionGradients;
pub use elementwise::Turns;
pub use indices::Indices;
use launch::{FORWARD, OpArgs, OpKernels};
pub use sample::Draw;

/// The operations of a Llama layer beside attention, on one GPU and its own stream: cuBLASLt for
/// matrix products of more than 2 rows, own kernels for the rest.
///
/// Weights and the inputs of matrix products are f16 or bf16, one of them for all; those of linear
/// layers may be e4m3 instead ([`crate::E4m3Weight`]), and all may lie in blocks ([`crate::BlockWeight`]). The residual
/// stream and logits are f32, as sums over many layers and choices between near equals want; norms
/// and products sum in f32. Rows have a multiple of 8 elements. Calls return when their kernels are
/// launched; [`Tensor::to_f32`] waits for them.
#[derive(Debug)]
pub struct Operations {
    pub(crate) device: Device,
    pub(crate) dtype: Dtype,
    pub(crate) kernels: OpKernels,
    pub(crate) backward: Lazy,
    pub(crate) sampling: Lazy,
    pub(crate) gemv: Lazy,
    pub(crate) e4m3: Lazy,
    pub(crate) e4m3_rows: Lazy,
    /// Whether activations of large products with 8-bit weights are rounded too.
    pub(crate) rounds_activations: bool,
    pub(crate) e4m3_wgmma: Lazy,
    /// What the device has room for, once it was asked.
    pub(crate) clusters: Mutex<Option<Clusters>>,
    /// Whether weights of 8-bit floats may lie as warpgroup instructions read them.
    pub(crate) has_wgmma: bool,
    pub(crate) blocks: Lazy,
    pub(crate) blocks_row: Lazy,
    pub(crate) blas: Blas,
    pub(crate) staging: Mutex<Staging>,
}

/// Kernels that are loaded when they are first needed.
pub(crate) type Lazy = Mutex<Option<Arc<OpKernels>>>;

/// Bytes of a weight that are copied to the device at once.
pub(crate) const PIECE_BYTES: usize = 4 << 20;

impl Operations {
    /// Compiles or loads the kernels, and opens cuBLASLt.
    ///
    /// # Errors
    /// [`Error::Argument`] unless `dtype` is f16 or bf16, [`Error::NoCublasLt`], [`Error::NoNvrtc`],
    /// [`Error::Compile`], [`Error::OutOfMemory`], [`Error::Driver`].
    pub fn new(device: &Device, dtype: Dtype) -> Result<Self> {
        check_half("Operations::new", dtype)?;
        Ok(Self {
            device: device.clone(),
            dtype,
            kernels: OpKernels::load(device, dtype, Source::Ops, &FORWARD)?,
            backward: Lazy::default(),
            sampling: Lazy::default(),
            gemv: Lazy::default(),
            e4m3: Lazy::default(),
            e4m3_rows: Lazy::default(),
            rounds_activations: false,
            e4m3_wgmma: Lazy::default(),
            clusters: Mutex::default(),
            has_wgmma: device.architecture().has_wgmma(),
            blocks: Lazy::default(),
            blocks_row: Lazy::default(),
            blas: Blas::new(device)?,
            staging: Mutex::new(Staging::new(device)),
        })
    }

    /// Weights of 8-bit floats that are made from here on lie as the kernels that every GPU has read them, and their products
    /// are those of a GPU without warpgroup instructions. Sums are then in another order.
    #[must_use]
    pub fn without_wgmma(mut self) -> Self {
        self.has_wgmma = false;
        self
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
    /// [`Error::Argument`] unless there are 1 to 3 axes, [`Error::OutOfMemory`], [`Error::Driver`].
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

    /// A weight of uniform random numbers in `[-amplitude, amplitude)`, for measurements of speed.
    ///
    /// # Errors
    /// [`Error::Argument`], [`Error::OutOfMemory`], [`Error::Driver`].
    pub fn random(
        &self,
        shape: &[usize],
        dtype: Dtype,
        amplitude: f32,
        seed: u32,
    ) -> Result<Tensor> {
        const OP: &str = "random";
        let tensor = Tensor::uninitialised(&self.device, OP, shape, dtype)?;
        self.check_rows(OP, "shape", &tensor)?;
        // A vector is one row.
        let (rows, cols) = match shape {
            &[cols] => (1, cols),
            _ => (shape[0], tensor.row_len()),
        };
        let args = OpArgs {
            // Not null: f32.
            y: if dtype == Dtype::F32 { tensor.pointer() } else { 0 },
            rows: rows as i32,
            cols: cols as i32,
            out_stride: cols as i64,
            eps: amplitude,
            flag: seed as i32,
            ..shaped(&tensor)
        };
        // SAFETY: the shape is the tensor's; all of it is on the device's stream.
        unsafe { self.kernels.by_elements("randomise", 8, &args) }?;
        Ok(tensor)
    }

    /// Kernels that are loaded when they are first needed.
    pub(crate) fn lazily(
        &self,
        kept: &Lazy,
        source: Source,
        names: &[&'static str],
    ) -> Result<Arc<OpKernels>> {
        let mut kept = kept.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(kernels) = &*kept {
            return Ok(Arc::clone(kernels));
        }
        let loaded = OpKernels::load(&self.device, self.dtype, source, names)?;
        Ok(Arc::clone(kept.insert(Arc::new(loaded))))
    }

    /// Copies `bytes` bytes, which `fill` writes, to memory just allocated for them.
    pub(crate) fn stage(&self, bytes: usize, to: u64, fill: impl FnOnce(&mut [u8])) -> Result<()> {
        if bytes == 0 {
            return Ok(());
        }
        self.device.bind()?;
        let mut staging = self.staging.lock().unwrap_or_else(PoisonError::into_inner);
        // SAFETY: private callers pass memory of that size, on the device's stream.
        unsafe { staging.fill(bytes, to, self.device.stream(), fill) }
    }

    /// `[rows, cols]` of a weight.
    pub(crate) fn matrix(
        &self,
        op: &'static str,
        what: &'static str,
        weight: &Tensor,
    ) -> Result<[usize; 2]> {
        let &[rows, cols] = weight.shape() else {
            return Err(Error::shape(op, what, "2 axes", weight.shape()));
        };
        self.check_rows(op, what, weight)?;
        check_dtype(op, what, weight, self.dtype)?;
        Ok([rows, cols])
    }

    pub(crate) fn check_vector(
        &self,
        op: &'static str,
        what: &'static str,
        vector: &Tensor,
        len: usize,
    ) -> Result<()> {
        check_shape(op, what, vector, &[len])?;
        self.check_place(op, what, vector)?;
        check_dtype(op, what, vector, Dtype::F32)
    }

    /// On this device, and aligned as the kernels read it.
    pub(crate) fn check_place(
        &self,
        op: &'static str,
        what: &'static str,
        x: &Tensor,
    ) -> Result<()> {
        if !x.device().is_same(&self.device) {
            return Err(Error::argument(op, what, "on the device of the operations", "on another"));
        }
        match x.pointer().is_multiple_of(16) {
            true => Ok(()),
            false => Err(Error::argument(op, what, "at a multiple of 16 bytes", x.pointer())),
        }
    }

    /// Rows that the kernels can take, on this device.
    pub(crate) fn check_rows(
        &self,
        op: &'static str,
        what: &'static str,
        x: &Tensor,
    ) -> Result<()> {
        self.check_place(op, what, x)?;
        let cols = x.row_len();
        let aligned = cols.is_multiple_of(8) && x.stride().is_multiple_of(8);
        if !aligned || i32::try_from(cols).is_err() {
            return Err(Error::shape(op, what, "rows of a multiple of 8 elements", x.shape()));
        }
        match i32::try_from(x.shape()[0]) {
            Ok(_) => Ok(()),
            Err(_) => Err(Error::shape(op, what, "fewer than 2^31 rows", x.shape())),
        }
    }
}

/// Arguments of an operation that writes `out`.
pub(crate) fn shaped(out: &Tensor) -> OpArgs {
    OpArgs {
        out: out.pointer(),
        out_stride: out.stride() as i64,
        rows: out.shape()[0] as i32,
        cols: out.row_len() as i32,
        ..OpArgs::default()
    }
}

impl OpArgs {
    pub(crate) fn with_x(self, x: &Tensor) -> Self {
        Self { x: x.pointer(), x_stride: x.stride() as i64, ..self }
    }

    pub(crate) fn with_y(self, y: &Tensor) -> Self {
        Self { y: y.pointer(), y_stride: y.stride() as i64, ..self }
    }
}

pub(crate) fn check_shape(
    op: &'static str,
    what: &'static str,
    x: &Tensor,
    expected: &[usize],
) -> Result<()> {
    match x.shape() == expected {
        true => Ok(()),
        false => Err(Error::shape(op, what, format_args!("{expected:?}"), x.shape())),
    }
}

pub(crate) fn check_dtype(
    op: &'static str,
    what: &'static str,
    x: &Tensor,
    expected: Dtype,
) -> Result<()> {
    match x.dtype() == expected {
        true => Ok(()),
        false => Err(Error::argument(op, what, expected, x.dtype())),
    }
}
