use crate::{LayerLayout, Result};

/// Which sign the influence of an attention value keeps when entries are summed into blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
pub enum InfluenceSign {
    /// As it is: the paper.
    #[default]
    Signed,
    /// Its absolute value: the original code.
    Absolute,
}

/// One layer's inputs to [`SparseAttentionBackend::influence`], for one sequence under full causal
/// attention. Tensors are `[tokens, heads, head_dim]`, after RoPE.
#[derive(Debug)]
pub struct InfluenceInputs<'a, T> {
    /// Queries, `[tokens, query_heads, head_dim]`.
    pub q: &'a T,
    /// Keys, `[tokens, kv_heads, head_dim]`.
    pub k: &'a T,
    /// Values, `[tokens, kv_heads, head_dim]`.
    pub v: &'a T,
    /// Attention output, `[tokens, query_heads, head_dim]`.
    pub out: &'a T,
    /// Log-sum-exp of each row of scaled scores, `[tokens, query_heads]`.
    pub lse: &'a T,
    /// Gradient of the objective by `out`, same shape.
    pub d_out: &'a T,
    /// Tokens per side of an influence block.
    pub block: usize,
    /// Signed or absolute sums.
    pub sign: InfluenceSign,
    /// Whether the gradients by q, k and v are wanted too.
    pub gradients: bool,
}

/// Gradients of the objective by one layer's q, k and v; same shapes as those.
#[derive(Debug)]
pub struct Gradients<T> {
    /// By queries.
    pub d_q: T,
    /// By keys.
    pub d_k: T,
    /// By values.
    pub d_v: T,
}

/// What [`SparseAttentionBackend::influence`] returns.
#[derive(Debug)]
pub struct InfluenceOutput<T> {
    /// Block sums over each KV head's query group, `[kv_heads, blocks, blocks]` row-major with
    /// query blocks first; entries above the diagonal are 0.
    pub blocks: Vec<f64>,
    /// Present if they were asked for.
    pub gradients: Option<Gradients<T>>,
}

/// A device that can run attention with per-head spans.
///
/// Three operations carry everything: [`open`](Self::open) a layer's cache, [`extend`](Self::extend)
/// it, and [`influence`](Self::influence) for profiling. Prefill, decode, chunked prefill, multi-turn
/// chat and speculative verification are all `extend`. The law: **the output does not depend on how a
/// sequence was cut into chunks, on what else is in the batch, or on spare capacity**, and a failed
/// call leaves every cache as it was.
///
/// Tensors hold a ragged batch packed along the first axis, `[tokens, heads, head_dim]`, as a linear
/// layer writes it: no padding, no transposes.
pub trait SparseAttentionBackend {
    /// Activations.
    type Tensor;
    /// Keys and values of one sequence in one layer.
    type Cache;
    /// What can go wrong; [`crate::Error`] is part of it.
    type Error: From<crate::Error> + std::error::Error + Send + Sync + 'static;

    /// Name for messages, such as `"cpu"`.
    fn name(&self) -> &'static str;

    /// An empty cache.
    ///
    /// # Errors
    /// If the memory cannot be had or `head_dim` is not supported.
    fn open(&self, layout: &LayerLayout, head_dim: usize) -> Result<Self::Cache, Self::Error>;

    /// Appends `tokens[i] >= 1` tokens to each cache and returns their attention outputs,
    /// `[sum(tokens), query_heads, head_dim]`. `q` has the shape of the output, `k` and `v` have
    /// `kv_heads` instead of `query_heads`; RoPE is already applied. Scores are scaled by `scale`.
    /// With `lse`, also the log-sum-exp of each row, `[sum(tokens), query_heads]`.
    ///
    /// # Errors
    /// If shapes do not fit or a cache has no room; no cache is changed then.
    #[allow(clippy::too_many_arguments, clippy::type_complexity)]
    fn extend(
        &self,
        caches: &mut [&mut Self::Cache],
        tokens: &[usize],
        q: &Self::Tensor,
        k: &Self::Tensor,
        v: &Self::Tensor,
        scale: f32,
        lse: bool,
    ) -> Result<(Self::Tensor, Option<Self::Tensor>), Self::Error>;

    /// Tokens that a cache holds.
    fn len(&self, cache: &Self::Cache) -> usize;

    /// An independent copy, for shared prefixes.
    ///
    /// # Errors
    /// If the memory cannot be had.
    fn fork(&self, cache: &Self::Cache) -> Result<Self::Cache, Self::Error>;

    /// Forgets all tokens after the first `len`.
    ///
    /// # Errors
    /// [`crate::Error::Evicted`] if keys that were overwritten would be needed.
    fn truncate(&self, cache: &mut Self::Cache, len: usize) -> Result<(), Self::Error>;

    /// Bytes that a cache really holds on the device.
    fn bytes(&self, cache: &Self::Cache) -> u64;

    /// Influence of every attention value on the objective, summed over blocks, and the gradients
    /// that continue the backward sweep. `out` and `lse` must come from the very `q`, `k` and `v`
    /// given, not from a cache that rounded them: see the division by `1 - A`. To first order, masking `A_ij` changes the objective by
    /// `E_ij = A_ij / (1 - A_ij) * (D_i - dO_i . V_j)` with `D_i = dO_i . O_i` (MoA, section 4.2,
    /// written with the output's gradient).
    ///
    /// # Errors
    /// [`crate::Error::Unsupported`] unless the backend overrides it.
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
    /// [`crate::Error::Unsupported`] unless the backend overrides it.
    fn decode_seconds(
        &self,
        _span: usize,
        _group: usize,
        _head_dim: usize,
    ) -> Result<f64, Self::Error> {
        Err(crate::Error::Unsupported { backend: self.name(), operation: "decode_seconds" }.into())
    }
}
