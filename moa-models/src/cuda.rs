//! The operations on one NVIDIA GPU, over [`moa_backend_cuda`]. Weights are rounded to the type of
//! the activations on their way to the device, and are nowhere else.

use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};
use moa_backend_cuda::{CudaBackend, Device, Dtype, Operations, Tensor};

use crate::ops::Ops;
use crate::weights::{DType, MappedTensor};
use crate::{Error, Result};

/// Element type of weights, activations and KV caches on the GPU.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum CudaDtype {
    /// IEEE half precision: finer, but overflows beyond 65504.
    F16,
    /// The upper half of an f32, as most models are published.
    #[default]
    Bf16,
}

/// Runs a model on an NVIDIA GPU.
///
/// Activations are f32 in the residual stream and of the 16-bit type elsewhere; logits are f32.
#[derive(Debug)]
pub struct CudaOps {
    attention: CudaBackend,
    operations: Operations,
}

impl CudaOps {
    /// On device `ordinal`, counted from 0. The attention kernels are compiled when the first
    /// sequence needs them; the others, and the device, are tried now.
    ///
    /// # Errors
    /// [`Error::Backend`] with a [`moa_backend_cuda::Error`] that names what is missing: driver,
    /// device, compute capability, NVRTC, cuBLASLt, memory.
    pub fn new(ordinal: usize, dtype: CudaDtype) -> Result<Self> {
        let dtype = match dtype {
            CudaDtype::F16 => Dtype::F16,
            CudaDtype::Bf16 => Dtype::Bf16,
        };
        let device = Device::open(ordinal).map_err(Error::backend)?;
        Ok(Self {
            attention: CudaBackend::new(&device, dtype).map_err(Error::backend)?,
            operations: Operations::new(&device, dtype).map_err(Error::backend)?,
        })
    }

    /// The GPU.
    pub fn device(&self) -> &Device {
        self.operations.device()
    }

    fn dtype(&self) -> Dtype {
        self.operations.dtype()
    }
}

impl Ops for CudaOps {
    type Tensor = Tensor;
    type Matrix = Tensor;
    type Vector = Tensor;
    /// Pairs (cos, sin), f32 `[tokens, head_dim]`.
    type Rotations = Tensor;
    type Attention = CudaBackend;

    fn attention(&self) -> &CudaBackend {
        &self.attention
    }

    fn cache_element_bytes(&self) -> usize {
        self.dtype().bytes()
    }

    fn check_room(&self, what: &'static str, bytes: u64) -> Result<()> {
        let (free, _) = self.device().memory().map_err(Error::backend)?;
        match bytes <= free {
            true => Ok(()),
            false => {
                Err(Error::backend(moa_backend_cuda::Error::OutOfMemory { what, bytes, free }))
            }
        }
    }

    fn weight_bytes(&self, elements: u64) -> u64 {
        elements * self.dtype().bytes() as u64
    }

    fn matrix(&self, tensor: MappedTensor) -> Result<Tensor> {
        self.upload(&tensor, self.dtype())
    }

    fn vector(&self, tensor: MappedTensor) -> Result<Tensor> {
        self.upload(&tensor, Dtype::F32)
    }

    fn shape(&self, x: &Tensor) -> Vec<usize> {
        x.shape().to_vec()
    }

    fn tensor(&self, values: Vec<f32>, shape: &[usize]) -> Result<Tensor> {
        Tensor::from_f32(self.device(), &values, shape, Dtype::F32).map_err(Error::backend)
    }

    fn values(&self, x: Tensor) -> Result<Vec<f32>> {
        x.to_f32().map_err(Error::backend)
    }

    fn embed(&self, table: &Tensor, ids: &[u32]) -> Result<Tensor> {
        self.operations.embed(table, ids).map_err(Error::backend)
    }

    fn rms_norm(&self, x: &Tensor, weight: &Tensor, eps: f32) -> Result<Tensor> {
        self.operations.rms_norm(x, weight, eps).map_err(Error::backend)
    }

    fn linear(&self, x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
        self.operations.linear(x, weight, bias, self.dtype()).map_err(Error::backend)
    }

    fn linear_add(
        &self,
        x: Tensor,
        y: &Tensor,
        weight: &Tensor,
        bias: Option<&Tensor>,
    ) -> Result<Tensor> {
        self.operations.linear_add(x, y, weight, bias).map_err(Error::backend)
    }

    fn logits(&self, x: &Tensor, weight: &Tensor) -> Result<Tensor> {
        self.operations.linear(x, weight, None, Dtype::F32).map_err(Error::backend)
    }

    fn rotations(&self, cos: Vec<f32>, sin: Vec<f32>, head_dim: usize) -> Result<Tensor> {
        let turns: Vec<f32> = cos.iter().zip(&sin).flat_map(|(&c, &s)| [c, s]).collect();
        let shape = [turns.len() / head_dim.max(1), head_dim];
        let upload = self.operations.upload(&shape, Dtype::F32, |range, staged| {
            staged.copy_from_slice(bytemuck::cast_slice(&turns[range]));
        });
        upload.map_err(Error::backend)
    }

    fn rope(
        &self,
        x: Tensor,
        head_dim: usize,
        rotations: &Tensor,
        inverse: bool,
    ) -> Result<Tensor> {
        let shape = x.shape();
        let (rows, width) = (shape[0], shape[1..].iter().product::<usize>());
        let heads = width.checked_div(head_dim).unwrap_or(0);
        let x = self.reshape(x, &[rows, heads, head_dim])?;
        self.operations.rope(x, rotations, inverse).map_err(Error::backend)
    }

    fn reshape(&self, x: Tensor, shape: &[usize]) -> Result<Tensor> {
        x.reshape(shape).map_err(Error::backend)
    }

    fn swiglu(&self, gate: Tensor, up: &Tensor) -> Result<Tensor> {
        self.operations.swiglu(&gate, up).map_err(Error::backend)
    }

    fn add(&self, x: Tensor, y: &Tensor) -> Result<Tensor> {
        self.operations.add(x, y).map_err(Error::backend)
    }

    fn rows(&self, x: &Tensor, rows: &[usize]) -> Result<Tensor> {
        self.operations.rows(x, rows).map_err(Error::backend)
    }
}

impl CudaOps {
    /// A weight as `dtype`, converted piece by piece in page-locked memory.
    fn upload(&self, tensor: &MappedTensor, dtype: Dtype) -> Result<Tensor> {
        let (bytes, from) = (tensor.bytes(), tensor.dtype());
        let mut values = Vec::new();
        let fill = |range: std::ops::Range<usize>, staged: &mut [u8]| {
            let size = from.size_bytes();
            let bytes = &bytes[range.start * size..range.end * size];
            let same = matches!(
                (from, dtype),
                (DType::F32, Dtype::F32) | (DType::F16, Dtype::F16) | (DType::BF16, Dtype::Bf16)
            );
            if same && cfg!(target_endian = "little") {
                return staged.copy_from_slice(bytes);
            }
            values.clear();
            from.extend_f32(bytes, &mut values);
            match dtype {
                Dtype::F32 => staged.copy_from_slice(bytemuck::cast_slice(&values)),
                // Page-locked memory begins at a page.
                Dtype::F16 => {
                    bytemuck::cast_slice_mut::<u8, f16>(staged).convert_from_f32_slice(&values)
                }
                Dtype::Bf16 => {
                    bytemuck::cast_slice_mut::<u8, bf16>(staged).convert_from_f32_slice(&values)
                }
            }
        };
        self.operations.upload(tensor.shape(), dtype, fill).map_err(Error::backend)
    }
}
