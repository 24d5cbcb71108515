use std::ops::Range;
use std::sync::Arc;

use bytemuck::Pod;
use cudarc::driver::{result, sys};
use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};

use crate::arena::Memory;
use crate::kernels::tables::{DevicePointer, Packed};
use crate::{Device, Dtype, Error, Result};

/// What a tensor's copy is called where the host has no memory for it.
const WHAT: &str = "a tensor's values";

/// Row-major activations in device memory with one to three axes, the first of which packs the
/// tokens of all sequences of a batch. Clones share memory; whoever writes in place takes a copy
/// first.
#[derive(Clone, Debug)]
pub struct Tensor {
    device: Device,
    data: Arc<Memory>,
    dtype: Dtype,
    shape: [usize; 3],
    axes: usize,
    /// Elements before the first one.
    offset: usize,
    /// Elements between entries of the first axis.
    stride: usize,
}

fn unsupported(op: &'static str, dtype: Dtype) -> Error {
    Error::argument(op, "dtype", "f32, f16 or bf16", dtype)
}

/// Shape and element type: all that checks of arguments look at.
pub(crate) trait Form {
    fn shape(&self) -> &[usize];
    fn dtype(&self) -> Dtype;
}

impl Form for Tensor {
    fn shape(&self) -> &[usize] {
        self.shape()
    }

    fn dtype(&self) -> Dtype {
        self.dtype
    }
}

impl Tensor {
    /// Copies numbers to the device, rounded to `dtype`.
    ///
    /// # Errors
    /// [`Error::Argument`] unless there are 1 to 3 axes whose product is `data.len()`,
    /// [`Error::OutOfMemory`].
    pub fn from_f32(device: &Device, data: &[f32], shape: &[usize], dtype: Dtype) -> Result<Self> {
        match dtype {
            Dtype::F32 => Self::from_bytes(device, bytemuck::cast_slice(data), shape, dtype),
            Dtype::F16 => {
                let mut rounded: Vec<f16> = Error::host_zeros(WHAT, data.len())?;
                rounded.convert_from_f32_slice(data);
                Self::from_bytes(device, bytemuck::cast_slice(&rounded), shape, dtype)
            }
            Dtype::Bf16 => {
                let mut rounded: Vec<bf16> = Error::host_zeros(WHAT, data.len())?;
                rounded.convert_from_f32_slice(data);
                Self::from_bytes(device, bytemuck::cast_slice(&rounded), shape, dtype)
            }
            other => Err(unsupported("Tensor::from_f32", other)),
        }
    }

    /// Copies elements of `dtype` in native byte order to the device.
    ///
    /// # Errors
    /// [`Error::Argument`] unless there are 1 to 3 axes that make up `bytes`, [`Error::OutOfMemory`].
    pub fn from_bytes(
        device: &Device,
        bytes: &[u8],
        shape: &[usize],
        dtype: Dtype,
    ) -> Result<Self> {
        const OP: &str = "Tensor::from_bytes";
        let (.., len) = check(OP, shape)?;
        if len.checked_mul(dtype.bytes()) != Some(bytes.len()) {
            let expected = format!("{len} elements of {dtype} for shape {shape:?}");
            return Err(Error::shape(OP, "data", expected, &[bytes.len() / dtype.bytes()]));
        }
        let tensor = Self::uninitialised(device, OP, shape, dtype)?;
        if !bytes.is_empty() {
            device.settle()?;
            device.bind()?;
            // SAFETY: the tensor was made for these bytes, which the call has read when it returns.
            unsafe { result::memcpy_htod_async(tensor.pointer(), bytes, device.stream().cast()) }
                .map_err(Error::driver("cuMemcpyHtoDAsync"))?;
        }
        Ok(tensor)
    }

    /// All zeros.
    ///
    /// # Errors
    /// [`Error::Argument`] unless there are 1 to 3 axes, [`Error::OutOfMemory`].
    pub fn zeros(device: &Device, shape: &[usize], dtype: Dtype) -> Result<Self> {
        let tensor = Self::uninitialised(device, "Tensor::zeros", shape, dtype)?;
        tensor.clear()?;
        Ok(tensor)
    }

    /// Makes all elements 0, also those that clones see.
    ///
    /// # Errors
    /// [`Error::Argument`] if there are gaps between rows, [`Error::Driver`].
    pub fn clear(&self) -> Result<()> {
        if !self.is_contiguous() {
            return Err(Error::shape("clear", "tensor", "rows without gaps", self.shape()));
        }
        self.device.bind()?;
        // SAFETY: these are the tensor's bytes.
        unsafe {
            result::memset_d8_async(self.pointer(), 0, self.bytes(), self.device.stream().cast())
        }
        .map_err(Error::driver("cuMemsetD8Async"))
    }

    /// Memory that holds whatever it held before, for a kernel to write.
    ///
    /// # Errors
    /// [`Error::Argument`] unless there are 1 to 3 axes, [`Error::OutOfMemory`].
    pub fn empty(device: &Device, shape: &[usize], dtype: Dtype) -> Result<Self> {
        Self::uninitialised(device, "Tensor::empty", shape, dtype)
    }

    /// To be written by a kernel that writes every element.
    pub(crate) fn uninitialised(
        device: &Device,
        op: &'static str,
        shape: &[usize],
        dtype: Dtype,
    ) -> Result<Self> {
        let (padded, axes, len) = check(op, shape)?;
        let bytes = len.saturating_mul(dtype.bytes());
        let data = Arc::new(Memory::new(device, "tensor", bytes)?);
        let stride = padded[1] * padded[2];
        Ok(Self { device: device.clone(), data, dtype, shape: padded, axes, offset: 0, stride })
    }

    /// All elements, copied to the host once the device has computed them.
    ///
    /// # Errors
    /// [`Error::Driver`], also for what went wrong in an earlier kernel; [`Error::HostMemory`].
    pub fn to_f32(&self) -> Result<Vec<f32>> {
        if !self.is_contiguous() {
            return self.contiguous()?.to_f32();
        }
        let mut values: Vec<f32> = Error::host_zeros(WHAT, self.len())?;
        match self.dtype {
            Dtype::F32 => self.read(&mut values)?,
            Dtype::F16 => {
                let mut halves: Vec<f16> = Error::host_zeros(WHAT, self.len())?;
                self.read(&mut halves)?;
                halves.convert_to_f32_slice(&mut values);
            }
            Dtype::Bf16 => {
                let mut halves: Vec<bf16> = Error::host_zeros(WHAT, self.len())?;
                self.read(&mut halves)?;
                halves.convert_to_f32_slice(&mut values);
            }
            other => return Err(unsupported("Tensor::to_f32", other)),
        }
        Ok(values)
    }

    /// Copies all elements to `to`, which is of the same type and length; waits for them.
    fn read<T: Pod>(&self, to: &mut [T]) -> Result<()> {
        if to.is_empty() {
            return Ok(());
        }
        self.device.settle()?;
        self.device.bind()?;
        // SAFETY: the callers' slices have the tensor's bytes, and live until the stream is done.
        unsafe { result::memcpy_dtoh_async(to, self.pointer(), self.device.stream().cast()) }
            .map_err(Error::driver("cuMemcpyDtoHAsync"))?;
        self.device.synchronize()
    }

    /// Some columns of `[rows, columns]`, in the same memory.
    ///
    /// # Errors
    /// [`Error::Argument`] unless there are two axes, the second of which has these columns.
    pub fn columns(&self, columns: Range<usize>) -> Result<Self> {
        const OP: &str = "Tensor::columns";
        match self.shape() {
            &[rows, all] if columns.start <= columns.end && columns.end <= all => Ok(Self {
                shape: [rows, columns.len(), 1],
                offset: self.offset + columns.start,
                ..self.clone()
            }),
            shape => {
                Err(Error::shape(OP, "tensor", format!("[rows, at least {}]", columns.end), shape))
            }
        }
    }

    /// Some entries of the first axis, in the same memory.
    ///
    /// # Errors
    /// [`Error::Argument`] if there are not as many.
    pub fn rows(&self, rows: Range<usize>) -> Result<Self> {
        if rows.start > rows.end || rows.end > self.shape[0] {
            let expected = format!("at least {} rows", rows.end);
            return Err(Error::shape("Tensor::rows", "tensor", expected, self.shape()));
        }
        let [_, second, third] = self.shape;
        let offset = self.offset + rows.start * self.stride;
        Ok(Self { shape: [rows.len(), second, third], offset, ..self.clone() })
    }

    /// The same elements under another shape.
    ///
    /// # Errors
    /// [`Error::Argument`] unless there are 1 to 3 axes with the same number of elements.
    pub fn reshape(self, shape: &[usize]) -> Result<Self> {
        const OP: &str = "Tensor::reshape";
        let (padded, axes, len) = check(OP, shape)?;
        if len != self.len() {
            return Err(Error::shape(OP, "shape", format!("{} elements", self.len()), shape));
        }
        if self.is_contiguous() {
            return Ok(Self { shape: padded, axes, stride: padded[1] * padded[2], ..self });
        }
        // Rows with gaps between them stay rows.
        match padded[0] == self.shape[0] {
            true => Ok(Self { shape: padded, axes, ..self }),
            false => self.contiguous()?.reshape(shape),
        }
    }

    /// The tensor with memory of its own, to be written in place.
    pub(crate) fn into_unique(mut self) -> Result<Self> {
        match Arc::get_mut(&mut self.data).is_some() {
            true => Ok(self),
            false => self.contiguous(),
        }
    }

    /// A copy without gaps.
    fn contiguous(&self) -> Result<Self> {
        let copy = Self::uninitialised(&self.device, "copy", self.shape(), self.dtype)?;
        if self.len() == 0 {
            return Ok(copy);
        }
        self.device.bind()?;
        let width = self.row_len() * self.dtype.bytes();
        let rows = sys::CUDA_MEMCPY2D {
            srcXInBytes: 0,
            srcY: 0,
            srcMemoryType: sys::CUmemorytype::CU_MEMORYTYPE_DEVICE,
            srcHost: std::ptr::null(),
            srcDevice: self.pointer(),
            srcArray: std::ptr::null_mut(),
            srcPitch: self.stride * self.dtype.bytes(),
            dstXInBytes: 0,
            dstY: 0,
            dstMemoryType: sys::CUmemorytype::CU_MEMORYTYPE_DEVICE,
            dstHost: std::ptr::null_mut(),
            dstDevice: copy.pointer(),
            dstArray: std::ptr::null_mut(),
            dstPitch: width,
            WidthInBytes: width,
            Height: self.shape[0],
        };
        // SAFETY: both tensors have these rows, on the device's stream.
        unsafe { sys::cuMemcpy2DAsync_v2(&rows, self.device.stream().cast()).result() }
            .map_err(Error::driver("cuMemcpy2DAsync"))?;
        Ok(copy)
    }

    /// Lengths of the axes.
    pub fn shape(&self) -> &[usize] {
        &self.shape[..self.axes]
    }

    /// Element type.
    pub fn dtype(&self) -> Dtype {
        self.dtype
    }

    /// Address of the first element.
    pub fn pointer(&self) -> DevicePointer {
        self.data.address() + (self.offset * self.dtype.bytes()) as u64
    }

    /// As kernels read it, `[tokens, heads, head_dim]`.
    pub fn packed(&self) -> Packed {
        let head = self.shape[2] as i64;
        Packed { data: self.pointer(), token: self.stride as i64, head }
    }

    pub(crate) fn device(&self) -> &Device {
        &self.device
    }

    /// Elements between entries of the first axis.
    pub(crate) fn stride(&self) -> usize {
        self.stride
    }

    pub(crate) fn is_contiguous(&self) -> bool {
        self.stride == self.row_len() || self.shape[0] <= 1
    }

    /// Elements of one entry of the first axis.
    pub(crate) fn row_len(&self) -> usize {
        self.shape[1..].iter().product()
    }

    fn len(&self) -> usize {
        self.shape.iter().product()
    }

    fn bytes(&self) -> usize {
        self.len() * self.dtype.bytes()
    }
}

fn check(op: &'static str, shape: &[usize]) -> Result<([usize; 3], usize, usize)> {
    let mut padded = [1; 3];
    if shape.is_empty() || shape.len() > 3 {
        return Err(Error::shape(op, "shape", "1 to 3 axes", shape));
    }
    padded[..shape.len()].copy_from_slice(shape);
    let len = shape.iter().try_fold(1usize, |n, &axis| n.checked_mul(axis));
    match len {
        Some(len) => Ok((padded, shape.len(), len)),
        None => Err(Error::shape(op, "shape", "fewer than 2^64 elements", shape)),
    }
}
