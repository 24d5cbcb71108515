//! burn's tensors on CubeCL are buffers of CubeCL, so they change hands without a copy.
//!
//! burn queues operations and fuses them before they run. A call of moa is not queued: a cache is written in place,
//! which burn's queue does not know of, and it may put independent operations in another order. What its tensors wait
//! for is run when it is called, and its result is a tensor that has been written. Kernels of both sides are launched
//! by one client, which keeps them in order, and nothing waits for the GPU.

use burn::backend::fusion::custom::{OperationIr, OperationOutput, StreamId};
use burn::backend::fusion::{NoOp, get_client};
use burn::backend::ir::{BackendIr, InitOperationIr};
use burn::backend::{
    BackendTensor, Cube, DispatchAutodiffContext, DispatchKindConversion, DispatchTensor,
    TensorMetadata,
};
use burn::tensor::{DType, Shape};
use burn_cubecl::kernel::into_contiguous;
use burn_cubecl::tensor::CubeTensor;
use burn_cubecl::{CubeBackend, CubeDevice};
use moa_backend_wgpu::{Device, Tensor};

use crate::{Error, Result};

/// The buffer of a burn tensor, copied only if it has gaps. As long as both exist, burn writes neither in place.
pub(crate) fn lower(argument: &'static str, tensor: &DispatchTensor) -> Result<Tensor> {
    plain(argument, tensor)?;
    let got = tensor.dtype();
    if got != DType::F32 {
        return Err(Error::Elements { argument, expected: "f32", got });
    }
    let other = |got| Error::Backend { argument, got };
    let tensor: BackendTensor<Cube> =
        DispatchTensor::try_into_backend(tensor.clone()).map_err(other)?;
    let BackendTensor::Float(tensor) = tensor else {
        return Err(other(format_args!("a tensor of kind {}", tensor.name()).to_string()));
    };
    let client = tensor.client.clone();
    let tensor = into_contiguous(client.resolve_tensor_float::<CubeBackend>(tensor));
    let device = Device::from_client(tensor.client.clone());
    Ok(Tensor::from_handle(&device, tensor.handle.clone(), tensor.meta.shape())?)
}

/// Refuses tensors of autodiff devices, also where nothing is tracked: the result would silently be a constant.
pub(crate) fn plain(argument: &'static str, tensor: &DispatchTensor) -> Result<()> {
    match tensor.autodiff {
        DispatchAutodiffContext::Disabled => Ok(()),
        _ => Err(Error::Gradients { argument }),
    }
}

/// The same buffer as a burn tensor of this device, or a copy where the calling thread's stream is not the one that
/// allocated it: burn may write in place on the thread's, and whoever reads waits for the one of the allocation alone.
pub(crate) fn lift(tensor: Tensor, device: &CubeDevice) -> DispatchTensor {
    let shape = Shape::from(tensor.shape().to_vec());
    let handle = tensor.handle().clone();
    let tensor = CubeTensor::new_contiguous(
        device.client(),
        device.clone(),
        shape.clone(),
        handle,
        DType::F32,
    );
    let is_own = tensor.handle.stream == StreamId::current();
    let tensor = if is_own { tensor } else { tensor.copy() };
    let burns = get_client::<CubeBackend>(device);
    let handle = CubeBackend::float_tensor_handle(tensor);
    let init = InitOperationIr::create(shape, DType::F32, || burns.register_tensor_handle(handle));
    let queued =
        burns.register(StreamId::current(), OperationIr::Init(init), NoOp::<CubeBackend>::new());
    <DispatchTensor as DispatchKindConversion<Cube>>::from_backend(BackendTensor::Float(
        queued.output(),
    ))
}
