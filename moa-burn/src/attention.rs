use burn::backend::{DispatchDevice, DispatchTensor};
use burn::tensor::{DType, Device, FloatDType, Tensor};
use burn_cubecl::CubeDevice;
use moa_backend_wgpu::{Cache, MatrixUnits, WgpuBackend};
use moa_core::{
    Append, ArgumentError, CacheState, Dtype, ExtendInputs, LayerLayout, Plan, Scores,
    SparseAttentionBackend,
};

use crate::bridge::plain;
use crate::{Error, Result};

const OP: &str = "SparseAttention::forward";

/// Attention of one model on one of burn's devices. Clones share what they hold on the device.
#[derive(Clone, Debug)]
pub struct SparseAttention {
    pub(crate) kernels: WgpuBackend,
    pub(crate) device: CubeDevice,
}

/// Keys and values of one sequence in one layer.
#[derive(Debug)]
pub struct LayerCache(pub(crate) Cache);

impl LayerCache {
    /// How far the cache is filled, and where each head keeps which position.
    pub fn state(&self) -> &CacheState {
        self.0.as_ref()
    }

    /// Forgets all tokens and keeps the memory.
    pub fn reset(&mut self) {
        self.0.reset();
    }
}

impl SparseAttention {
    /// Attention on `device`, of a CubeCL runtime, with caches of f32, f16 or bf16. Of an autodiff device it is on the
    /// one within.
    ///
    /// # Errors
    /// [`Error::Backend`] and [`Error::Elements`] for another device or type.
    ///
    /// # Panics
    /// If burn has no such device, as burn does.
    pub fn new(device: &Device, cache_dtype: DType) -> Result<Self> {
        let dtype = match cache_dtype {
            DType::F32 => Dtype::F32,
            DType::F16 => Dtype::F16,
            DType::BF16 => Dtype::Bf16,
            got => {
                let (argument, expected) = ("caches", "f32, f16 or bf16");
                return Err(Error::Elements { argument, expected, got });
            }
        };
        let device = device.clone().inner();
        // Of builds with other backends of burn's.
        #[allow(unreachable_patterns)]
        let device = match device.as_dispatch() {
            DispatchDevice::Cube(device) => device.clone(),
            _ => {
                let got = format_args!("{device:?}").to_string();
                return Err(Error::Backend { argument: "device", got });
            }
        };
        let kernels = moa_backend_wgpu::Device::from_client(device.client());
        Ok(Self { kernels: WgpuBackend::new(&kernels, dtype), device })
    }

    /// The same with another use of matrix units.
    pub fn with_matrix_units(self, matrix_units: MatrixUnits) -> Self {
        Self { kernels: self.kernels.with_matrix_units(matrix_units), ..self }
    }

    /// Empty caches for a sequence of at most `context_length` tokens, one for each layer of the plan.
    ///
    /// # Errors
    /// [`Error::Attention`] for a length that the plan's rules cannot serve, a head dimension that the kernels lack, or
    /// memory that is short.
    pub fn open(&self, plan: &Plan, context_length: usize) -> Result<Vec<LayerCache>> {
        let head_dim = plan.shape().head_dim;
        let layouts = plan.layouts(context_length, 0)?;
        layouts.iter().map(|layout| self.open_layer(layout, head_dim)).collect()
    }

    /// An empty cache of one layer, for engines that keep layouts of their own, such as with slack.
    ///
    /// # Errors
    /// [`Error::Attention`] for a head dimension that the kernels lack, or memory that is short.
    pub fn open_layer(&self, layout: &LayerLayout, head_dim: usize) -> Result<LayerCache> {
        SparseAttentionBackend::open(self, layout, head_dim)
    }

    /// Appends new tokens to the caches of a batch and attends to what each head's span keeps.
    ///
    /// `q` is `[batch, query_heads, tokens, head_dim]` after RoPE, `k` and `v` have the KV heads; a cache for each
    /// sequence of the batch. `scores` is their factor, or [`Scores`] with a softcap or sinks. The output has the shape of `q`.
    /// f16 and bf16 are widened, and the output is rounded to the type of `q`.
    ///
    /// # Errors
    /// [`Error::Gradients`] for tensors of an autodiff device, [`Error::Backend`] and [`Error::Elements`] for others of
    /// another kind, [`Error::Attention`] around [`ArgumentError`] for shapes, around
    /// [`moa_core::Error::CapacityExceeded`] for tokens that do not fit, around errors of the device.
    pub fn forward<'a>(
        &self,
        caches: &mut [&mut LayerCache],
        q: Tensor<4>,
        k: Tensor<4>,
        v: Tensor<4>,
        scores: impl Into<Scores<'a, Tensor<1>>>,
    ) -> Result<Tensor<4>> {
        let (batch, [_, query_heads, tokens, head_dim]) = (caches.len(), q.dims());
        for (argument, tensor) in [("q", &q), ("k", &k), ("v", &v)] {
            let dims = tensor.dims();
            if [dims[0], dims[2]] != [batch, tokens] || dims.contains(&0) {
                let expected = format!("[{batch}, heads, {tokens}, head_dim] and not empty");
                return Err(ArgumentError::shape(OP, argument, expected, &dims).into());
            }
        }
        for (argument, tensor) in [("q", &q), ("k", &k), ("v", &v)] {
            plain(argument, &tensor.clone().into_dispatch())?;
        }
        let packed = |tensor: Tensor<4>| {
            let [_, heads, _, dim] = tensor.dims();
            tensor.swap_dims(1, 2).reshape([batch * tokens, heads, dim])
        };
        let (q, k, v) = (packed(q), packed(k), packed(v));
        let mut batch_of: Vec<_> =
            caches.iter_mut().map(|cache| Append { cache: &mut **cache, tokens }).collect();
        let out = self.forward_packed(&mut batch_of, q, k, v, scores)?;
        Ok(out.reshape([batch, tokens, query_heads, head_dim]).swap_dims(1, 2))
    }

    /// [`forward`](Self::forward) for sequences of unequal numbers of new tokens, packed one after the other:
    /// `[tokens, heads, head_dim]`, as a linear layer writes it, with nothing to transpose.
    ///
    /// # Errors
    /// Those of [`forward`](Self::forward).
    pub fn forward_packed<'a>(
        &self,
        batch: &mut [Append<'_, LayerCache>],
        q: Tensor<3>,
        k: Tensor<3>,
        v: Tensor<3>,
        scores: impl Into<Scores<'a, Tensor<1>>>,
    ) -> Result<Tensor<3>> {
        let dtype = q.dtype();
        let (q, k, v) = (widened("q", q)?, widened("k", k)?, widened("v", v)?);
        let Scores { scale, softcap, sinks } = scores.into();
        let sinks = sinks.map(|sinks| widened("sinks", sinks.clone())).transpose()?;
        let scores = Scores { scale, softcap, sinks: sinks.as_ref() };
        let inputs = ExtendInputs::new(&q, &k, &v, scores);
        let out = Tensor::from_dispatch(self.extend(batch, &inputs)?.out);
        Ok(if dtype == DType::F32 { out } else { out.cast(dtype) })
    }

    /// An independent copy of a sequence's cache, for shared prefixes.
    ///
    /// # Errors
    /// [`Error::Attention`] if memory is short.
    pub fn fork(&self, cache: &LayerCache) -> Result<LayerCache> {
        SparseAttentionBackend::fork(self, cache)
    }

    /// Forgets all tokens after the first `len`: [`CacheState::truncate`].
    ///
    /// # Errors
    /// [`Error::Attention`] around [`moa_core::Error::Evicted`] if a head would need keys that it no longer has.
    pub fn truncate(&self, cache: &mut LayerCache, len: usize) -> Result<()> {
        SparseAttentionBackend::truncate(self, cache, len)
    }
}

fn widened<const D: usize>(argument: &'static str, tensor: Tensor<D>) -> Result<DispatchTensor> {
    match tensor.dtype() {
        DType::F32 => Ok(tensor.into_dispatch()),
        DType::F16 | DType::BF16 => Ok(tensor.cast(FloatDType::F32).into_dispatch()),
        got => Err(Error::Elements { argument, expected: "f32, f16 or bf16", got }),
    }
}
