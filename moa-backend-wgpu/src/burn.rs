//! burn's tensors on wgpu are buffers of CubeCL, so they change hands without a copy.
//!
//! Both sides queue their kernels with the same client, which keeps them in order.

use burn_backend::DType;
use burn_cubecl::CubeDevice;
use burn_cubecl::tensor::CubeTensor;

use crate::{Device, Error, Result, Tensor};

impl Device {
    /// The device of burn's tensors.
    pub fn from_burn(device: &CubeDevice) -> Self {
        Self::from_client(device.client())
    }
}

impl Tensor {
    /// The buffer of a burn tensor. As long as both exist, burn writes neither in place.
    ///
    /// # Errors
    /// [`Error::Argument`] unless it is f32, without gaps and of 1 to 3
    /// axes.
    pub fn from_burn(tensor: &CubeTensor) -> Result<Self> {
        const OP: &str = "Tensor::from_burn";
        if tensor.dtype != DType::F32 {
            return Err(Error::argument(OP, "dtype", "f32", tensor.dtype.name()));
        }
        if tensor.meta.is_tiled() || !tensor.is_contiguous() {
            let got = format_args!("{:?}", tensor.meta.strides()).to_string();
            return Err(Error::argument(OP, "strides", "those of rows without gaps", got));
        }
        let device = Device::from_client(tensor.client.clone());
        let shape = tensor.meta.shape().to_vec();
        Self::from_handle(&device, tensor.handle.clone(), &shape)
    }

    /// The same buffer as a burn tensor.
    ///
    /// # Errors
    /// [`Error::Argument`] if the tensor lies on another device than `device`.
    pub fn into_burn(self, device: &CubeDevice) -> Result<CubeTensor> {
        const OP: &str = "Tensor::into_burn";
        if !self.device().is(&Device::from_burn(device)) {
            let got = self.device().name().to_owned();
            return Err(Error::argument(OP, "device", format_args!("{device:?}"), got));
        }
        let shape = burn_backend::Shape::from(self.shape().to_vec());
        let (client, handle) = (self.device().client().clone(), self.handle().clone());
        Ok(CubeTensor::new_contiguous(client, device.clone(), shape, handle, DType::F32))
    }
}
