//! What a device has to offer, and the checks that all devices share.

mod check;
mod extend;
mod influence;

pub use check::{AttentionShape, check_batch, check_extend, check_influence, check_softcap};
pub use extend::{Append, ExtendInputs, Extended, Scores};
pub use influence::{Gradients, InfluenceInputs, InfluenceOutput, InfluenceSign};

use crate::{CacheState, CacheType, LayerLayout, Result};

/// A device that can run attention with per-head spans.
///
/// Three operations carry everything: [`open`](Self::open) makes a layer's cache,
/// [`extend`](Self::extend) appends to it and attends, and [`influence`](Self::influence) measures
/// what each head needs. Prefill, decode, chunked prefill, multi-turn chat and speculative
/// verification are all `extend`. The law that a backend keeps: **the output does not depend on how a
/// sequence was cut into chunks, on what else is in the batch, or on spare capacity**, and a failed
/// call leaves every cache as it was.
///
/// Tensors hold a ragged batch packed along the first axis, `[tokens, heads, head_dim]`, as a linear
/// layer writes it: no padding, no transposes.
///
/// # A whole backend
/// The geometry says where keys lie and which of them a query sees, and [`check_extend`] what is wrong
/// with a call; what is left is storage and arithmetic. This backend has the
/// [`reference`](mod@crate::reference) for arithmetic and a `Vec` for storage:
///
/// ```
/// use std::ops::Range;
/// use std::sync::Arc;
///
/// use moa_core::reference::{self, Heads, Scores};
/// use moa_core::{
///     Append, CacheState, Dtype, Error, ExtendInputs, Extended, LayerLayout, Result, Span,
///     SparseAttentionBackend, check_extend,
/// };
///
/// struct Host;
///
/// struct Tensor {
///     data: Vec<f32>,
///     shape: Vec<usize>,
/// }
///
/// /// Keys and values, `[slots, head_dim]` each.
/// #[derive(Clone)]
/// struct Cache {
///     state: CacheState,
///     keys: Vec<f32>,
///     values: Vec<f32>,
/// }
///
/// impl AsRef<CacheState> for Cache {
///     fn as_ref(&self) -> &CacheState {
///         &self.state
///     }
/// }
///
/// impl Cache {
///     /// Cached rows by position, `[len, kv_heads, head_dim]`, and then the new ones. Rows that no
///     /// query sees any more stay 0.
///     fn rows(&self, cached: &[f32], new: &[f32]) -> Vec<f64> {
///         let (len, dim) = (self.state.len(), self.state.head_dim());
///         let heads = self.state.layout().heads();
///         let mut rows = vec![0.0; len * heads.len() * dim];
///         for (h, head) in heads.iter().enumerate() {
///             for run in head.cached_keys(len, len..len + 1).into_iter().flat_map(|r| head.runs(r)) {
///                 for i in 0..run.len {
///                     let from = &cached[(run.slot.0 + i) * dim..][..dim];
///                     let to = &mut rows[((run.position.0 + i) * heads.len() + h) * dim..][..dim];
///                     to.iter_mut().zip(from).for_each(|(to, from)| *to = f64::from(*from));
///                 }
///             }
///         }
///         rows.extend(new.iter().map(|x| f64::from(*x)));
///         rows
///     }
///
///     fn append(&mut self, k: &[f32], v: &[f32], tokens: usize) -> Result<()> {
///         let (len, dim) = (self.state.len(), self.state.head_dim());
///         let heads = self.state.layout().heads();
///         for (h, head) in heads.iter().enumerate() {
///             for run in head.append(len, tokens) {
///                 for i in 0..run.len {
///                     let from = ((run.position.0 - len + i) * heads.len() + h) * dim;
///                     let to = (run.slot.0 + i) * dim;
///                     self.keys[to..to + dim].copy_from_slice(&k[from..from + dim]);
///                     self.values[to..to + dim].copy_from_slice(&v[from..from + dim]);
///                 }
///             }
///         }
///         self.state.append(tokens)
///     }
/// }
///
/// impl SparseAttentionBackend for Host {
///     type Tensor = Tensor;
///     type Cache = Cache;
///     type Error = Error;
///
///     fn name(&self) -> &'static str {
///         "host"
///     }
///
///     fn slot_bytes(&self, head_dim: usize) -> u64 {
///         Dtype::F32.slot_bytes(head_dim)
///     }
///
///     fn open(&self, layout: &LayerLayout, head_dim: usize) -> Result<Cache> {
///         layout.check_cache_types(self.name(), |own| self.has_cache_type(own))?;
///         let empty = vec![0.0; layout.slots() * head_dim];
///         let state = CacheState::new(Arc::new(layout.clone()), head_dim);
///         Ok(Cache { state, keys: empty.clone(), values: empty })
///     }
///
///     fn extend(
///         &self,
///         batch: &mut [Append<'_, Cache>],
///         inputs: &ExtendInputs<'_, Tensor>,
///     ) -> Result<Extended<Tensor>> {
///         let shape = check_extend(batch, inputs, |tensor| &tensor.shape[..])?;
///         let heads = Heads { query: shape.query_heads, kv: shape.kv_heads, dim: shape.head_dim };
///         let (mut out, mut lse, mut first) = (Vec::new(), Vec::new(), 0);
///         for Append { cache, tokens } in batch {
///             let part = |x: &Tensor, heads: usize| -> Range<usize> {
///                 let row = heads * x.shape[2];
///                 first * row..(first + *tokens) * row
///             };
///             let k = &inputs.k.data[part(inputs.k, heads.kv)];
///             let v = &inputs.v.data[part(inputs.v, heads.kv)];
///             // The reference starts at position 0: queries of old tokens do not matter.
///             let len = cache.state.len();
///             let mut q = vec![0.0; len * heads.query * heads.dim];
///             q.extend(inputs.q.data[part(inputs.q, heads.query)].iter().map(|x| f64::from(*x)));
///             let spans: Vec<Span> = cache.state.layout().heads().iter().map(|h| h.span()).collect();
///             let (keys, values) = (cache.rows(&cache.keys, k), cache.rows(&cache.values, v));
///             let sinks: Option<Vec<f64>> =
///                 inputs.scores.sinks.map(|sinks| sinks.data.iter().map(|x| f64::from(*x)).collect());
///             let scores = Scores {
///                 softcap: inputs.scores.softcap.map(f64::from),
///                 sinks: sinks.as_deref(),
///                 ..Scores::from(f64::from(inputs.scores.scale))
///             };
///             let (all, sums) = reference::extend(heads, &q, &keys, &values, &spans, scores);
///             out.extend(all[len * heads.query * heads.dim..].iter().map(|x| *x as f32));
///             lse.extend(sums[len * heads.query..].iter().map(|x| *x as f32));
///             cache.append(k, v, *tokens)?;
///             first += *tokens;
///         }
///         Ok(Extended {
///             out: Tensor { data: out, shape: inputs.q.shape.clone() },
///             lse: inputs.lse.then(|| Tensor { data: lse, shape: inputs.q.shape[..2].to_vec() }),
///         })
///     }
///
///     fn fork(&self, cache: &Cache) -> Result<Cache> {
///         Ok(cache.clone())
///     }
///
///     fn truncate(&self, cache: &mut Cache, len: usize) -> Result<()> {
///         cache.state.truncate(len)
///     }
///
///     fn bytes(&self, cache: &Cache) -> u64 {
///         (size_of_val(&cache.keys[..]) + size_of_val(&cache.values[..])) as u64
///     }
/// }
///
/// // One KV head that sees 1 sink and 3 recent keys. With equal keys, attention is their values' mean.
/// let layout = LayerLayout::new(&[Span::new(1, 3)?], 100, 0)?;
/// let mut cache = Host.open(&layout, 1)?;
/// let tensor = |data: &[f32]| Tensor { data: data.to_vec(), shape: vec![data.len(), 1, 1] };
/// let mut step = |values: &[f32]| -> Result<Vec<f32>> {
///     let (x, v) = (tensor(&vec![1.0; values.len()]), tensor(values));
///     let mut batch = [Append { cache: &mut cache, tokens: values.len() }];
///     let inputs = ExtendInputs::new(&x, &x, &v, 1.0);
///     Ok(Host.extend(&mut batch, &inputs)?.out.data)
/// };
/// assert_eq!(step(&[4.0, 0.0, 2.0, 6.0])?, [4.0, 2.0, 2.0, 3.0]);
/// assert_eq!(step(&[8.0])?, [(4.0 + 2.0 + 6.0 + 8.0) / 4.0]);
/// assert_eq!(Host.bytes(&cache), layout.bytes(1, Host.slot_bytes(1)));
/// # Ok::<(), Error>(())
/// ```
pub trait SparseAttentionBackend {
    /// Activations on the device.
    type Tensor;
    /// Keys and values of one sequence in one layer, and how far they are filled.
    type Cache: AsRef<CacheState>;
    /// What can go wrong; [`crate::Error`] is part of it.
    type Error: From<crate::Error> + std::error::Error + Send + Sync + 'static;

    /// The backend's name for messages, such as `"cpu"`.
    fn name(&self) -> &'static str;

    /// Bytes of one slot of a cache, key and value together, that [`open`](Self::open) would give a
    /// head of `head_dim` elements whose type the layout does not say. A budget in bytes is reckoned with it
    /// before anything is opened.
    fn slot_bytes(&self, head_dim: usize) -> u64;

    /// Whether a head's cache can be of this type where a layout asks for it
    /// ([`LayerLayout::with_cache_types`]); none can unless the backend overrides it.
    fn has_cache_type(&self, _cache_type: CacheType) -> bool {
        false
    }

    /// An empty cache.
    ///
    /// # Errors
    /// [`crate::Error::Argument`] if the device does not support `head_dim` or a layout of this
    /// size, [`crate::Error::CacheType`] if it lacks the [type](Self::has_cache_type) of a head, or the
    /// backend's error of a failed allocation.
    fn open(&self, layout: &LayerLayout, head_dim: usize) -> Result<Self::Cache, Self::Error>;

    /// Appends new tokens to each cache of the batch and returns their attention outputs.
    ///
    /// # Errors
    /// [`crate::Error::Argument`] if the arguments do not fit together ([`check_extend`] finds what
    /// does not), [`crate::Error::CapacityExceeded`] if a cache has no room,
    /// [`crate::Error::Unsupported`] if the backend lacks `softcap` or `sinks` and is asked for them,
    /// and errors of the device. No cache is changed then.
    fn extend(
        &self,
        batch: &mut [Append<'_, Self::Cache>],
        inputs: &ExtendInputs<'_, Self::Tensor>,
    ) -> Result<Extended<Self::Tensor>, Self::Error>;

    /// An independent copy, for shared prefixes.
    ///
    /// # Errors
    /// The backend's error of a failed allocation; `cache` is as it was.
    fn fork(&self, cache: &Self::Cache) -> Result<Self::Cache, Self::Error>;

    /// Forgets all tokens after the first `len`: [`CacheState::truncate`].
    ///
    /// # Errors
    /// [`crate::Error::Evicted`] if keys that were overwritten would be needed,
    /// [`crate::Error::Invalid`] if the cache holds fewer tokens.
    fn truncate(&self, cache: &mut Self::Cache, len: usize) -> Result<(), Self::Error>;

    /// Bytes that a cache really holds on the device.
    fn bytes(&self, cache: &Self::Cache) -> u64;

    /// Influence of every attention value on the objective, summed over blocks, and the gradients
    /// that continue the backward sweep.
    ///
    /// `out` and `lse` must come from the very `q`, `k` and `v` given, not from a cache that rounded
    /// them: see the division by `1 - A`. To first order, masking `A_ij` changes the objective by
    /// `E_ij = A_ij / (1 - A_ij) * (D_i - dO_i . V_j)` with `D_i = dO_i . O_i` (MoA, section 4.2,
    /// written with the output's gradient).
    ///
    /// Scores are plain: there is no softcap here, nor sinks, whose gradient would be asked for too.
    ///
    /// # Errors
    /// [`crate::Error::Unsupported`] unless the backend overrides it; then
    /// [`crate::Error::Argument`] and errors of the device.
    fn influence(
        &self,
        _inputs: &InfluenceInputs<'_, Self::Tensor>,
        _scale: f32,
    ) -> Result<InfluenceOutput<Self::Tensor>, Self::Error> {
        Err(crate::Error::Unsupported { backend: self.name(), operation: "influence" }.into())
    }

    /// Measured seconds of one decode step of one KV head with `span` keys, for searches whose
    /// budget is time.
    ///
    /// # Errors
    /// [`crate::Error::Unsupported`] unless the backend overrides it; then
    /// [`crate::Error::Invalid`] if a count is 0, and errors of the device.
    fn decode_seconds(
        &self,
        _span: usize,
        _group: usize,
        _head_dim: usize,
    ) -> Result<f64, Self::Error> {
        Err(crate::Error::Unsupported { backend: self.name(), operation: "decode_seconds" }.into())
    }
}
