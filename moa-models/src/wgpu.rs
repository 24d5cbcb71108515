//! The operations on any GPU that wgpu reaches, over [`moa_backend_wgpu`]. Weights stay on the device,
//! in the type of their file.

use std::ops::Range;

use moa_backend_wgpu::{Device, Dtype, Matrix, Tensor, WgpuBackend, ops as kernels};

use crate::mapped::MappedTensor;
use crate::ops::{BackwardOps, LinearWeights, Ops, RandomWeights, part_seeds, random_amplitude};
use crate::rope::RopeTable;
use crate::weights::DType;
use crate::{CacheDtype, Error, Result};

/// Runs a model on a GPU over Vulkan, Metal, DX12 or WebGPU.
#[derive(Debug)]
pub struct WgpuOps {
    attention: WgpuBackend,
    /// With f32 caches.
    exact: WgpuBackend,
}

impl WgpuOps {
    /// On the GPU of this number, or on the one that wgpu prefers, with KV caches of this element type.
    ///
    /// # Errors
    /// [`Error::Backend`] with a [`moa_backend_wgpu::Error`] if there is no such GPU.
    pub fn open(index: Option<usize>, cache: CacheDtype) -> Result<Self> {
        let device = index.map_or_else(Device::open, Device::open_nth).map_err(Error::backend)?;
        let dtype = match cache {
            CacheDtype::F32 => Dtype::F32,
            CacheDtype::F16 => Dtype::F16,
            CacheDtype::Bf16 => Dtype::Bf16,
        };
        Ok(Self::new(&device, dtype))
    }

    /// On this device, with KV caches of this element type.
    pub fn new(device: &Device, cache: Dtype) -> Self {
        Self {
            attention: WgpuBackend::new(device, cache),
            exact: WgpuBackend::new(device, Dtype::F32),
        }
    }

    fn device(&self) -> &Device {
        self.attention.device()
    }
}

impl Ops for WgpuOps {
    type Tensor = Tensor;
    type Matrix = Matrix;
    type Vector = Tensor;
    type Joined = Vec<(Matrix, Option<Tensor>)>;
    /// Cosines and sines, `[tokens, head_dim / 2]` each.
    type Rotations = [Tensor; 2];
    type Attention = WgpuBackend;

    fn attention(&self) -> &WgpuBackend {
        &self.attention
    }

    fn cache_element_bytes(&self) -> usize {
        self.attention.cache_dtype().bytes()
    }

    fn matrix(&self, tensor: MappedTensor) -> Result<Matrix> {
        let &[rows, cols] = tensor.shape() else {
            return Err(Error::invalid("weight", "2 axes", tensor.shape().len()));
        };
        let dtype = match tensor.dtype() {
            DType::F32 => Dtype::F32,
            DType::F16 => Dtype::F16,
            DType::BF16 => Dtype::Bf16,
        };
        Matrix::new(self.device(), tensor.bytes(), rows, cols, dtype).map_err(Error::backend)
    }

    fn vector(&self, tensor: MappedTensor) -> Result<Tensor> {
        let values = tensor.to_f32();
        let len = values.len();
        self.tensor(values, &[len])
    }

    fn join(&self, parts: Vec<LinearWeights>) -> Result<Self::Joined> {
        let load = |LinearWeights { weight, bias }| {
            Ok((self.matrix(weight)?, bias.map(|bias| self.vector(bias)).transpose()?))
        };
        parts.into_iter().map(load).collect()
    }

    fn shape(&self, x: &Tensor) -> Vec<usize> {
        x.shape().to_vec()
    }

    fn tensor(&self, values: Vec<f32>, shape: &[usize]) -> Result<Tensor> {
        Tensor::new(self.device(), &values, shape).map_err(Error::backend)
    }

    fn values(&self, x: Tensor) -> Result<Vec<f32>> {
        x.to_vec().map_err(Error::backend)
    }

    fn embed(&self, table: &Matrix, ids: &[u32]) -> Result<Tensor> {
        kernels::embed(table, ids).map_err(Error::backend)
    }

    fn rms_norm(&self, x: &Tensor, weight: &Tensor, eps: f32) -> Result<Tensor> {
        kernels::rms_norm(x, weight, eps).map_err(Error::backend)
    }

    fn linear(&self, x: &Tensor, weight: &Matrix, bias: Option<&Tensor>) -> Result<Tensor> {
        kernels::linear(x, weight, bias).map_err(Error::backend)
    }

    fn linears(&self, x: &Tensor, joined: &Self::Joined) -> Result<Vec<Tensor>> {
        joined.iter().map(|(weight, bias)| self.linear(x, weight, bias.as_ref())).collect()
    }

    fn rotations(&self, sequences: &[(&RopeTable, Range<usize>)]) -> Result<[Tensor; 2]> {
        let (mut cos, mut sin) = (Vec::new(), Vec::new());
        let mut rows = 0;
        for (table, positions) in sequences {
            rows += positions.len();
            for (c, s) in positions.clone().flat_map(|position| table.cos_sin(position)) {
                cos.push(c);
                sin.push(s);
            }
        }
        let shape = [rows, cos.len() / rows.max(1)];
        Ok([self.tensor(cos, &shape)?, self.tensor(sin, &shape)?])
    }

    fn rope(
        &self,
        x: Tensor,
        head_dim: usize,
        [cos, sin]: &[Tensor; 2],
        inverse: bool,
    ) -> Result<Tensor> {
        let (rows, width) = (x.rows(), x.row_len());
        if head_dim == 0 || width % head_dim != 0 {
            let expected = format!("a multiple of head_dim ({head_dim})");
            return Err(Error::invalid("row", expected, width));
        }
        let x = self.reshape(x, &[rows, width / head_dim, head_dim])?;
        kernels::rope(&x, cos, sin, inverse).map_err(Error::backend)
    }

    fn reshape(&self, x: Tensor, shape: &[usize]) -> Result<Tensor> {
        x.reshape(shape).map_err(Error::backend)
    }

    fn swiglu(&self, gate: Tensor, up: &Tensor) -> Result<Tensor> {
        kernels::swiglu(&gate, up).map_err(Error::backend)
    }

    fn add(&self, x: Tensor, y: &Tensor) -> Result<Tensor> {
        kernels::add(&x, y).map_err(Error::backend)
    }

    fn rows(&self, x: &Tensor, rows: &[usize]) -> Result<Tensor> {
        kernels::rows(x, rows).map_err(Error::backend)
    }
}

impl RandomWeights for WgpuOps {
    fn random_matrix(&self, out: usize, input: usize, seed: u32) -> Result<Matrix> {
        let amplitude = random_amplitude(input);
        Matrix::random(self.device(), out, input, Dtype::Bf16, amplitude, seed)
            .map_err(Error::backend)
    }

    fn random_joined(&self, outs: &[usize], input: usize, seed: u32) -> Result<Self::Joined> {
        let parts = outs.iter().zip(part_seeds(seed));
        parts.map(|(&out, seed)| Ok((self.random_matrix(out, input, seed)?, None))).collect()
    }

    fn ones(&self, len: usize) -> Result<Tensor> {
        self.tensor(vec![1.0; len], &[len])
    }
}

impl BackwardOps for WgpuOps {
    fn exact_attention(&self) -> &WgpuBackend {
        &self.exact
    }

    fn linear_backward(&self, d_y: &Tensor, weight: &Matrix) -> Result<Tensor> {
        kernels::linear_backward(d_y, weight).map_err(Error::backend)
    }

    fn linears_backward(&self, d_y: &[Tensor], joined: &Self::Joined) -> Result<Tensor> {
        let mut sum = None;
        for (d_y, (weight, _)) in d_y.iter().zip(joined) {
            let d_x = self.linear_backward(d_y, weight)?;
            sum = Some(match sum {
                Some(sum) => self.add(sum, &d_x)?,
                None => d_x,
            });
        }
        sum.ok_or_else(|| Error::invalid("joined layers", "at least 1", 0))
    }

    fn rms_norm_backward(
        &self,
        x: &Tensor,
        weight: &Tensor,
        eps: f32,
        d_y: &Tensor,
    ) -> Result<Tensor> {
        kernels::rms_norm_backward(x, weight, eps, d_y).map_err(Error::backend)
    }

    fn swiglu_backward(
        &self,
        gate: &Tensor,
        up: &Tensor,
        d_y: &Tensor,
    ) -> Result<(Tensor, Tensor)> {
        kernels::swiglu_backward(gate, up, d_y).map_err(Error::backend)
    }

    fn place_rows(&self, x: &Tensor, rows: Range<usize>, total: usize) -> Result<Tensor> {
        kernels::place_rows(x, rows, total).map_err(Error::backend)
    }
}
