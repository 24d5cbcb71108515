//! The operations on any GPU that wgpu reaches, over [`moa_backend_wgpu`]. Weights stay on the device,
//! in the type of their file, or where products of many rows are rounded to f16, in that. Blocks of Q4_0, Q4_K and
//! Q8_0 stay what they are; others are widened.

mod replay;

use std::ops::Range;

use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};
use moa_backend_wgpu::ops::{self as kernels, Layer};
use moa_backend_wgpu::{Cache, Device as Gpu, Dtype, Matrix, Tensor, WgpuBackend};
use moa_core::{CacheState, CacheType};

use crate::checkpoint::mapped::MappedTensor;
use crate::decoder::block::parts;
use crate::device::replay::{Replay, ReplayBatch};
use crate::device::rope_table::RopeTable;
use crate::device::{Backward, Device, LinearWeights, Load, Math};
use crate::{Error, Result, memory};

/// Runs a model on a GPU over Vulkan, Metal, DX12 or WebGPU. Clones are the same device.
///
/// With f16 caches, and where the device has matrix units for them, linear layers multiply more than 8 rows in f16
/// and sum in f32: activations beyond 65,504 overflow there, as in any model in f16. Everything else is f32
/// arithmetic.
#[derive(Clone, Debug)]
pub struct Wgpu {
    attention: WgpuBackend,
    /// With f32 caches.
    exact: WgpuBackend,
    /// What linear layers round many rows to.
    inner: Dtype,
}

impl Wgpu {
    /// On the GPU of this number, or on the one that wgpu prefers, with KV caches of this type, a [`Dtype`] or a
    /// [`CacheType`].
    ///
    /// # Errors
    /// [`Error::Backend`] with a [`moa_backend_wgpu::Error`] if there is no such GPU.
    pub fn open(index: Option<usize>, cache: impl Into<CacheType>) -> Result<Self> {
        let device = index.map_or_else(Gpu::open, Gpu::open_nth)?;
        Ok(Self::new(&device, cache))
    }

    /// On this device, with KV caches of this type, a [`Dtype`] or a [`CacheType`].
    pub fn new(device: &Gpu, cache: impl Into<CacheType>) -> Self {
        let cache = cache.into();
        // Only caches of f16 say that f16 is exact enough.
        let inner = cache.dtype().unwrap_or_default();
        Self {
            attention: WgpuBackend::new(device, cache),
            exact: WgpuBackend::new(device, Dtype::F32),
            inner: if device.multiplies(inner) { inner } else { Dtype::F32 },
        }
    }

    fn gpu(&self) -> &Gpu {
        self.attention.device()
    }

    /// In their blocks where the backend has kernels for those, else widened to `wide`.
    fn in_blocks(&self, tensor: &MappedTensor, wide: Dtype) -> Result<Matrix> {
        match (tensor.blocks(), tensor.shape()) {
            (Some(kind), &[rows, cols]) if Matrix::keeps(kind) => {
                Ok(Matrix::in_blocks(self.gpu(), tensor.bytes(), rows, cols, kind)?)
            }
            _ => self.matrix(tensor.widened(wide)?),
        }
    }
}

impl Device for Wgpu {
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

    fn default_cache_type(&self) -> Option<CacheType> {
        Some(self.attention.cache_type())
    }

    fn saved_cache_type(&self) -> Option<String> {
        Some(format!("wgpu {}", self.attention.cache_type()))
    }

    fn save_cache(&self, cache: &Cache) -> Result<Vec<u8>> {
        Ok(cache.to_bytes()?)
    }

    fn restore_cache(&self, state: CacheState, bytes: &[u8]) -> Result<Cache> {
        Ok(self.attention.restore(state, bytes)?)
    }

    fn shape(&self, x: &Tensor) -> Vec<usize> {
        x.shape().to_vec()
    }

    fn tensor(&self, values: Vec<f32>, shape: &[usize]) -> Result<Tensor> {
        Ok(Tensor::new(self.gpu(), &values, shape)?)
    }

    fn values(&self, x: Tensor) -> Result<Vec<f32>> {
        Ok(x.to_vec()?)
    }

    fn synchronize(&self) -> Result<()> {
        Ok(self.gpu().synchronize()?)
    }

    unsafe fn replay(
        &self,
        batch: &ReplayBatch<'_, Self>,
    ) -> Result<Option<Box<dyn Replay<Self>>>> {
        Ok(replay::Recorded::new(self, batch)?.map(|own| Box::new(own) as _))
    }

    /// Steps of one token alone are recorded: those of two are asked for, and in vain.
    fn replayed_tokens(&self, group: usize) -> usize {
        if group == 1 { 2 } else { 1 }
    }
}

impl Load for Wgpu {
    fn matrix(&self, tensor: MappedTensor) -> Result<Matrix> {
        let &[rows, cols] = tensor.shape() else {
            return Err(Error::invalid("weight", "2 axes", tensor.shape().len()));
        };
        let Some(dtype) = tensor.dtype() else {
            return self.in_blocks(&tensor, Dtype::F32);
        };
        Ok(Matrix::new(self.gpu(), tensor.bytes(), rows, cols, dtype)?)
    }

    fn linear_matrix(&self, tensor: MappedTensor) -> Result<Matrix> {
        if let (Dtype::F16, Some(Dtype::Bf16), &[rows, cols]) =
            (self.inner, tensor.dtype(), tensor.shape())
            && let Some(bytes) = narrowed(tensor.bytes())?
        {
            return Ok(Matrix::new(self.gpu(), &bytes, rows, cols, Dtype::F16)?);
        }
        if tensor.blocks().is_some() {
            return self.in_blocks(&tensor, self.inner);
        }
        self.matrix(tensor)
    }

    fn vector(&self, tensor: MappedTensor) -> Result<Tensor> {
        let values = tensor.to_f32()?;
        let len = values.len();
        self.tensor(values, &[len])
    }

    fn join(&self, parts: Vec<LinearWeights>) -> Result<Self::Joined> {
        let load = |LinearWeights { weight, bias }| {
            Ok((self.linear_matrix(weight)?, bias.map(|bias| self.vector(bias)).transpose()?))
        };
        parts.into_iter().map(load).collect()
    }
}

impl Math for Wgpu {
    fn embed(&self, table: &Matrix, ids: &[u32], factor: f32) -> Result<Tensor> {
        Ok(kernels::embed(table, ids, factor)?)
    }

    fn rms_norm(&self, x: &Tensor, weight: &Tensor, eps: f32) -> Result<Tensor> {
        Ok(kernels::rms_norm(x, weight, eps)?)
    }

    fn linears(&self, x: &Tensor, joined: &Self::Joined) -> Result<Vec<Tensor>> {
        Ok(kernels::linears(x, &layers(joined), self.inner)?)
    }

    fn normed_linears(
        &self,
        x: &Tensor,
        weight: &Tensor,
        eps: f32,
        joined: &Self::Joined,
    ) -> Result<Vec<Tensor>> {
        Ok(kernels::normed_linears(x, weight, eps, &layers(joined), self.inner)?)
    }

    fn normed_swiglu(
        &self,
        x: &Tensor,
        weight: &Tensor,
        eps: f32,
        gate_up: &Self::Joined,
    ) -> Result<Tensor> {
        let pair = parts(layers(gate_up))?;
        Ok(kernels::normed_swiglu(x, weight, eps, pair, self.inner)?)
    }

    fn linear_add(
        &self,
        x: Tensor,
        y: &Tensor,
        weight: &Matrix,
        bias: Option<&Tensor>,
    ) -> Result<Tensor> {
        Ok(kernels::linear_add(&x, y, Layer { weight, bias }, self.inner)?)
    }

    fn logits(&self, x: &Tensor, weight: &Matrix) -> Result<Tensor> {
        Ok(kernels::linear(x, weight, None)?)
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
        Ok(kernels::rope(&x, cos, sin, inverse)?)
    }

    fn reshape(&self, x: Tensor, shape: &[usize]) -> Result<Tensor> {
        Ok(x.reshape(shape)?)
    }

    fn swiglu(&self, gate: Tensor, up: &Tensor) -> Result<Tensor> {
        Ok(kernels::swiglu(&gate, up)?)
    }

    fn add(&self, x: Tensor, y: &Tensor) -> Result<Tensor> {
        Ok(kernels::add(&x, y)?)
    }

    fn rows(&self, x: &Tensor, rows: &[usize]) -> Result<Tensor> {
        Ok(kernels::rows(x, rows)?)
    }
}

fn layers(joined: &[(Matrix, Option<Tensor>)]) -> Vec<Layer<'_>> {
    joined.iter().map(|(weight, bias)| Layer { weight, bias: bias.as_ref() }).collect()
}

/// bf16 elements as f16; `None` if one is too large for that.
fn narrowed(bytes: &[u8]) -> Result<Option<Vec<u8>>> {
    const BLOCK: usize = 4096;
    let mut out = memory::room(bytes.len(), "a weight in f16")?;
    let (mut wide, mut narrow) = ([0.0f32; BLOCK], [f16::ZERO; BLOCK]);
    for block in bytes.chunks(2 * BLOCK) {
        let len = block.len() / 2;
        for (to, from) in wide.iter_mut().zip(block.chunks_exact(2)) {
            *to = bf16::from_le_bytes([from[0], from[1]]).to_f32();
        }
        narrow[..len].convert_from_f32_slice(&wide[..len]);
        let too_large = |(n, w): (&f16, &f32)| n.is_infinite() && w.is_finite();
        if narrow[..len].iter().zip(&wide).any(too_large) {
            return Ok(None);
        }
        out.extend(narrow[..len].iter().flat_map(|x| x.to_le_bytes()));
    }
    Ok(Some(out))
}

impl Backward for Wgpu {
    fn exact_attention(&self) -> &WgpuBackend {
        &self.exact
    }

    fn linear_backward(&self, d_y: &Tensor, weight: &Matrix) -> Result<Tensor> {
        Ok(kernels::linear_backward(d_y, weight)?)
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
        Ok(kernels::rms_norm_backward(x, weight, eps, d_y)?)
    }

    fn swiglu_backward(
        &self,
        gate: &Tensor,
        up: &Tensor,
        d_y: &Tensor,
    ) -> Result<(Tensor, Tensor)> {
        Ok(kernels::swiglu_backward(gate, up, d_y)?)
    }

    fn place_rows(&self, x: &Tensor, rows: Range<usize>, total: usize) -> Result<Tensor> {
        Ok(kernels::place_rows(x, rows, total)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn weights_are_narrowed_unless_one_is_too_large() {
        let weights: Vec<f32> = (0..9000).map(|i| (i as f32 - 4500.0) / 300.0).collect();
        let bytes = |weights: &[f32]| -> Vec<u8> {
            weights.iter().flat_map(|&x| bf16::from_f32(x).to_le_bytes()).collect()
        };
        let narrow = narrowed(&bytes(&weights)).unwrap().unwrap();
        for (got, &weight) in narrow.chunks_exact(2).zip(&weights) {
            let got = f16::from_le_bytes([got[0], got[1]]);
            assert_eq!(got.to_f32(), bf16::from_f32(weight).to_f32());
        }
        // Below f16's normal numbers they are rounded.
        for weight in [1e-6, 1e-9] {
            let rounded = f16::from_f32(bf16::from_f32(weight).to_f32());
            assert_eq!(narrowed(&bytes(&[weight])).unwrap(), Some(rounded.to_le_bytes().to_vec()));
        }
        assert_eq!(narrowed(&bytes(&[1.0, 7e4])).unwrap(), None);
        assert!(narrowed(&bytes(&[f32::INFINITY])).unwrap().is_some());
    }
}
