use std::sync::Arc;

use cudarc::driver::{CudaSlice, result};
use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};

use crate::memory::address;
use crate::tables::{DevicePointer, Packed};
use crate::{Device, Dtype, Error, Result};

/// Row-major activations in device memory with one to three axes, the first of which packs the
/// tokens of all sequences of a batch. Clones share memory; whoever writes in place takes a copy
/// first.
#[derive(Clone, Debug)]
pub struct Tensor {
    device: Device,
    data: Arc<CudaSlice<u8>>,
    dtype: Dtype,
    shape: [usize; 3],
    axes: usize,
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
    /// [`Error::Shape`] unless there are 1 to 3 axes whose product is `data.len()`,
    /// [`Error::OutOfMemory`].
    pub fn from_f32(device: &Device, data: &[f32], shape: &[usize], dtype: Dtype) -> Result<Self> {
        match dtype {
            Dtype::F32 => Self::from_bytes(device, bytemuck::cast_slice(data), shape, dtype),
            Dtype::F16 => {
                let mut rounded = vec![f16::ZERO; data.len()];
                rounded.convert_from_f32_slice(data);
                Self::from_bytes(device, bytemuck::cast_slice(&rounded), shape, dtype)
            }
            Dtype::Bf16 => {
                let mut rounded = vec![bf16::ZERO; data.len()];
                rounded.convert_from_f32_slice(data);
                Self::from_bytes(device, bytemuck::cast_slice(&rounded), shape, dtype)
            }
        }
    }

    /// Copies elements of `dtype` in native byte order to the device.
    ///
    /// # Errors
    /// [`Error::Shape`] unless there are 1 to 3 axes that make up `bytes`, [`Error::OutOfMemory`].
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
    /// [`Error::Shape`] unless there are 1 to 3 axes, [`Error::OutOfMemory`].
    pub fn zeros(device: &Device, shape: &[usize], dtype: Dtype) -> Result<Self> {
        let tensor = Self::uninitialised(device, "Tensor::zeros", shape, dtype)?;
        device.bind()?;
        // SAFETY: these are the tensor's bytes.
        unsafe {
            result::memset_d8_async(tensor.pointer(), 0, tensor.bytes(), device.stream().cast())
        }
        .map_err(Error::driver("cuMemsetD8Async"))?;
        Ok(tensor)
    }

    /// To be written by a kernel that writes every element.
    pub(crate) fn uninitialised(
        device: &Device,
        op: &'static str,
        shape: &[usize],
        dtype: Dtype,
    ) -> Result<Self> {
        let (padded, axes, len) = check(op, shape)?;
        let data = Arc::new(device.alloc("tensor", len.saturating_mul(dtype.bytes()))?);
        Ok(Self { device: device.clone(), data, dtype, shape: padded, axes })
    }

    /// All elements, copied to the host once the device has computed them.
    ///
    /// # Errors
    /// [`Error::Driver`], also for what went wrong in an earlier kernel.
    pub fn to_f32(&self) -> Result<Vec<f32>> {
        let bytes = self
            .device
            .cuda_stream()
            .clone_dtoh(&*self.data)
            .map_err(Error::driver("cuMemcpyDtoHAsync"))?;
        let bytes = &bytes[..self.bytes()];
        // Element by element: a vector of bytes need not be aligned to more.
        Ok(match self.dtype {
            Dtype::F32 => bytes.chunks_exact(4).map(bytemuck::pod_read_unaligned).collect(),
            Dtype::F16 => bytes
                .chunks_exact(2)
                .map(|x| bytemuck::pod_read_unaligned::<f16>(x).to_f32())
                .collect(),
            Dtype::Bf16 => bytes
                .chunks_exact(2)
                .map(|x| bytemuck::pod_read_unaligned::<bf16>(x).to_f32())
                .collect(),
        })
    }

    /// The same elements under another shape.
    ///
    /// # Errors
    /// [`Error::Shape`] unless there are 1 to 3 axes with the same number of elements.
    pub fn reshape(self, shape: &[usize]) -> Result<Self> {
        const OP: &str = "Tensor::reshape";
        let (padded, axes, len) = check(OP, shape)?;
        if len != self.len() {
            return Err(Error::shape(OP, "shape", format!("{} elements", self.len()), shape));
        }
        Ok(Self { shape: padded, axes, ..self })
    }

    /// The tensor with memory of its own, to be written in place.
    pub(crate) fn into_unique(mut self) -> Result<Self> {
        if Arc::get_mut(&mut self.data).is_some() {
            return Ok(self);
        }
        let copy = Self::uninitialised(&self.device, "copy", self.shape(), self.dtype)?;
        if self.bytes() > 0 {
            let stream = self.device.stream().cast();
            self.device.bind()?;
            // SAFETY: both tensors have these bytes, on the device's stream.
            unsafe {
                result::memcpy_dtod_async(copy.pointer(), self.pointer(), self.bytes(), stream)
            }
            .map_err(Error::driver("cuMemcpyDtoDAsync"))?;
        }
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
        address(&self.data)
    }

    /// As kernels read it, `[tokens, heads, head_dim]`.
    pub fn packed(&self) -> Packed {
        Packed::contiguous(self.pointer(), self.shape[1], self.shape[2])
    }

    pub(crate) fn device(&self) -> &Device {
        &self.device
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
