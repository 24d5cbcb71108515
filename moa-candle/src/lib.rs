//! Attention with a span of its own for every KV head, on candle's tensors.
//!
//! A [moa](moa_core) plan says how much of the context each KV head of a model must see. [`SparseAttention`] is
//! the module that a candle model calls in place of its own attention, and [`LayerCache`] the key-value
//! cache of one layer, which really is as small as the plan says: heads of different sizes in one buffer.
//!
//! | | CPU | CUDA (feature `cuda`) |
//! |---|---|---|
//! | tensors | f32; f16 and bf16 are widened | f16, bf16 |
//! | copies | queries, keys and values once, into the order that the kernels read | none: candle's memory and stream |
//! | output | its memory becomes the tensor | written into memory that candle allocates |
//!
//! ```
//! use candle_core::{DType, Device, Tensor};
//! use moa_candle::SparseAttention;
//! use moa_core::{ModelShape, Plan};
//!
//! // One layer of two KV heads: head 0 sees everything, head 1 sees 4 sinks and 60 recent keys.
//! let shape = ModelShape { layers: 1, query_heads: 4, kv_heads: 2, head_dim: 32 };
//! let plan = Plan::retrieval_heads(shape, 4, 60, &[(0, 0)])?;
//!
//! let attention = SparseAttention::new(&Device::Cpu, DType::F32)?;
//! let mut caches = attention.open(&plan, 1024)?;
//!
//! // `[batch, heads, tokens, head_dim]` with any strides, after RoPE: a chunk of 100 tokens.
//! let q = Tensor::randn(0f32, 1., (1, 4, 100, 32), &Device::Cpu)?;
//! let k = Tensor::randn(0f32, 1., (1, 2, 100, 32), &Device::Cpu)?;
//! let v = Tensor::randn(0f32, 1., (1, 2, 100, 32), &Device::Cpu)?;
//! let out = attention.forward(&mut [&mut caches[0]], &q, &k, &v, 1. / 32f32.sqrt())?;
//! assert_eq!(out.dims(), [1, 4, 100, 32]);
//! assert_eq!(caches[0].state().len(), 100);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! In a model of candle-transformers: `examples/llama`, whose block calls [`SparseAttention::forward`] where
//! candle's concatenates its cache, repeats KV heads, masks and multiplies.

mod cpu;
#[cfg(feature = "cuda")]
mod cuda;

use candle_core::{DType, Device, Error, Result, Tensor};
use moa_backend_cpu::CpuBackend;
use moa_core::{
    Append, ArgumentError, CacheState, Dtype, ExtendInputs, Extended, LayerLayout, Plan, Scores,
    SparseAttentionBackend, check_extend,
};

/// Attention of one model on one device. Clones share what they hold on the device.
#[derive(Clone, Debug)]
pub struct SparseAttention(Road);

#[derive(Clone, Debug)]
enum Road {
    Cpu(CpuBackend),
    #[cfg(feature = "cuda")]
    Cuda(std::sync::Arc<cuda::Road>),
}

/// Keys and values of one sequence in one layer.
#[derive(Debug)]
pub struct LayerCache(Store);

#[derive(Debug)]
enum Store {
    Cpu(moa_backend_cpu::Cache),
    #[cfg(feature = "cuda")]
    Cuda(cuda::Cache),
}

impl SparseAttention {
    /// Attention on `device` with caches of `cache_dtype`: f32, f16 or bf16 on the CPU, f16 or bf16, as the
    /// tensors, on CUDA.
    ///
    /// # Errors
    /// [`Error::Msg`] if the device or the type is another one, or the feature `cuda` is off; errors of the
    /// device.
    pub fn new(device: &Device, cache_dtype: DType) -> Result<Self> {
        let dtype = match cache_dtype {
            DType::F32 => Dtype::F32,
            DType::F16 => Dtype::F16,
            DType::BF16 => Dtype::Bf16,
            other => candle_core::bail!("cache type: expected f32, f16 or bf16, got {other:?}"),
        };
        match device {
            Device::Cpu => Ok(Self(Road::Cpu(CpuBackend::new(dtype)))),
            #[cfg(feature = "cuda")]
            Device::Cuda(device) => Ok(Self(Road::Cuda(cuda::Road::open(device, dtype)?.into()))),
            other => candle_core::bail!(
                "device: expected the CPU, or CUDA in a build with the feature `cuda`, got {:?}",
                other.location()
            ),
        }
    }

    /// Empty caches for a sequence of at most `context_length` tokens, one for each layer of the plan.
    ///
    /// # Errors
    /// [`Error::Wrapped`] around [`moa_core::Error`] or the device's error of a failed allocation.
    pub fn open(&self, plan: &Plan, context_length: usize) -> Result<Vec<LayerCache>> {
        let layouts = plan.layouts(context_length, 0).map_err(Error::wrap)?;
        layouts.iter().map(|layout| self.open_layer(layout, plan.shape().head_dim)).collect()
    }

    /// An empty cache of one layer, for engines that keep layouts of their own, such as with slack.
    ///
    /// # Errors
    /// Those of [`open`](Self::open).
    pub fn open_layer(&self, layout: &LayerLayout, head_dim: usize) -> Result<LayerCache> {
        let store = match &self.0 {
            Road::Cpu(backend) => Store::Cpu(backend.open(layout, head_dim).map_err(Error::wrap)?),
            #[cfg(feature = "cuda")]
            Road::Cuda(road) => Store::Cuda(road.clone().cache(layout, head_dim)?),
        };
        Ok(LayerCache(store))
    }

    /// Appends new tokens to the caches of a batch and attends to what each head's span keeps.
    ///
    /// `q` is `[batch, query_heads, tokens, head_dim]` after RoPE, `k` and `v` have the KV heads; a cache for
    /// each sequence of the batch. Strides are any on the CPU; on CUDA a row's elements lie together. The output has the
    /// shape of `q`, and lies in memory as `[batch, tokens, query_heads, head_dim]`, which is what the
    /// output projection reads: `out.transpose(1, 2)?.flatten_from(2)?` copies nothing. `scores` is their factor, or
    /// [`Scores`] with a softcap or with sinks, `[query_heads]` of any float type.
    ///
    /// # Errors
    /// [`Error::Msg`] or [`Error::Wrapped`] if the arguments do not fit together, a cache has no room or lies on
    /// another device, or gradients are tracked, which this operation does not have. No cache is changed then.
    pub fn forward<'a>(
        &self,
        caches: &mut [&mut LayerCache],
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        scores: impl Into<Scores<'a, Tensor>>,
    ) -> Result<Tensor> {
        let (_, query_heads, tokens, head_dim) = q.dims4()?;
        let batch = caches.len();
        // What `check_extend` reads of a tensor that holds as many tokens of each sequence.
        let packed = |argument, x: &Tensor| match *x.dims() {
            [sequences, heads, each, dim] if [sequences, each] == [batch, tokens] => {
                Ok([batch * tokens, heads, dim])
            }
            ref other => {
                let expected = format!("[{batch}, heads, {tokens}, head_dim]");
                Err(Error::wrap(ArgumentError::shape("forward", argument, expected, other)))
            }
        };
        let shapes = [packed("q", q)?, packed("k", k)?, packed("v", v)?];
        let [of_q, of_k, of_v] = shapes.each_ref().map(|shape| &shape[..]);
        let scores @ Scores { scale, softcap, sinks } = scores.into();
        let of_sinks = sinks.map(Tensor::dims);
        let of_scores = Scores { scale, softcap, sinks: of_sinks.as_ref() };
        let mut own: Vec<_> =
            caches.iter_mut().map(|cache| Append { cache: &mut **cache, tokens }).collect();
        check_extend(&own, &ExtendInputs::new(&of_q, &of_k, &of_v, of_scores), |shape| *shape)
            .map_err(Error::wrap)?;
        let out = self.run(&mut own, [q, k, v], scores, false, None)?.out;
        out.reshape((batch, tokens, query_heads, head_dim))?.transpose(1, 2)
    }

    /// [`forward`](Self::forward) for sequences of unequal numbers of new tokens, packed one after the other:
    /// `[tokens, heads, head_dim]`, as a linear layer writes it. The output is packed likewise, and the log-sum-exp comes with
    /// it where it is asked for.
    ///
    /// # Errors
    /// Those of [`forward`](Self::forward).
    pub fn extend(
        &self,
        batch: &mut [Append<'_, LayerCache>],
        inputs: &ExtendInputs<'_, Tensor>,
    ) -> Result<Extended<Tensor>> {
        check_extend(batch, inputs, |x| x.dims()).map_err(Error::wrap)?;
        let ExtendInputs { q, k, v, scores, lse, key_feedback } = *inputs;
        let as_one = |x: &Tensor| x.unsqueeze(0)?.transpose(1, 2);
        self.run(batch, [&as_one(q)?, &as_one(k)?, &as_one(v)?], scores, lse, key_feedback)
    }

    fn run(
        &self,
        batch: &mut [Append<'_, LayerCache>],
        qkv: [&Tensor; 3],
        scores: Scores<'_, Tensor>,
        lse: bool,
        key_feedback: Option<&Tensor>,
    ) -> Result<Extended<Tensor>> {
        if qkv.into_iter().chain(scores.sinks).chain(key_feedback).any(|x| x.track_op()) {
            candle_core::bail!(
                "q, k, v, sinks, key_feedback: expected tensors without gradients (`detach`), got tracked ones"
            );
        }
        match &self.0 {
            Road::Cpu(backend) => cpu::extend(backend, batch, qkv, scores, lse, key_feedback),
            #[cfg(feature = "cuda")]
            Road::Cuda(road) => road.extend(batch, qkv, scores, lse, key_feedback),
        }
    }

    /// An independent copy of a sequence's cache, for shared prefixes.
    ///
    /// # Errors
    /// [`Error::Msg`] if the cache lies on another device, [`Error::Wrapped`] if memory is short.
    pub fn fork(&self, cache: &LayerCache) -> Result<LayerCache> {
        match (&self.0, &cache.0) {
            (Road::Cpu(backend), Store::Cpu(cache)) => {
                Ok(LayerCache(Store::Cpu(backend.fork(cache).map_err(Error::wrap)?)))
            }
            #[cfg(feature = "cuda")]
            (Road::Cuda(road), Store::Cuda(cache)) => {
                Ok(LayerCache(Store::Cuda(road.clone().fork(cache)?)))
            }
            #[cfg(feature = "cuda")]
            _ => Err(elsewhere()),
        }
    }

    /// Forgets all tokens after the first `len`: [`CacheState::truncate`].
    ///
    /// # Errors
    /// [`Error::Wrapped`] around [`moa_core::Error::Evicted`] if a head would need keys that it no longer has;
    /// [`Error::Msg`] if the cache lies on another device.
    pub fn truncate(&self, cache: &mut LayerCache, len: usize) -> Result<()> {
        match (&self.0, &mut cache.0) {
            (Road::Cpu(backend), Store::Cpu(cache)) => {
                backend.truncate(cache, len).map_err(Error::wrap)
            }
            #[cfg(feature = "cuda")]
            (Road::Cuda(road), Store::Cuda(cache)) => road.truncate(cache, len),
            #[cfg(feature = "cuda")]
            _ => Err(elsewhere()),
        }
    }
}

#[cfg(feature = "cuda")]
fn elsewhere() -> Error {
    Error::msg("cache: expected one that this attention opened, got one of another device")
}

impl LayerCache {
    /// How far the cache is filled, and where each head keeps which position.
    pub fn state(&self) -> &CacheState {
        match &self.0 {
            Store::Cpu(cache) => cache.as_ref(),
            #[cfg(feature = "cuda")]
            Store::Cuda(cache) => cache.state(),
        }
    }
}

impl AsRef<CacheState> for LayerCache {
    fn as_ref(&self) -> &CacheState {
        self.state()
    }
}

/// The README's example compiles and runs.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
