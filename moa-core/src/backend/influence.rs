/// Which sign the influence of an attention value keeps when entries are summed into blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
pub enum InfluenceSign {
    /// As it is: the paper.
    #[default]
    Signed,
    /// Its absolute value: the original code.
    Absolute,
}

/// One layer's inputs to [`SparseAttentionBackend::influence`](crate::SparseAttentionBackend::influence), for one sequence under causal
/// attention, full or within the sliding window of the model's layer. Tensors are `[tokens, heads, head_dim]`, after RoPE.
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
    /// Most recent keys that a query sees, its own included; as many as there are tokens, or more, for full
    /// causal attention.
    pub window: usize,
    /// Tokens per side of an influence block.
    pub block: usize,
    /// Signed or absolute sums.
    pub sign: InfluenceSign,
    /// Whether the gradients by q, k and v are wanted too.
    pub gradients: bool,
}

// Derived, they would ask for a tensor that can be copied.
impl<T> Copy for InfluenceInputs<'_, T> {}

impl<T> Clone for InfluenceInputs<'_, T> {
    fn clone(&self) -> Self {
        *self
    }
}

/// Gradients of the objective by one layer's q, k and v; same shapes as those.
#[derive(Clone, Debug, PartialEq)]
pub struct Gradients<T> {
    /// By queries.
    pub d_q: T,
    /// By keys.
    pub d_k: T,
    /// By values.
    pub d_v: T,
}

/// What [`SparseAttentionBackend::influence`](crate::SparseAttentionBackend::influence) returns.
#[derive(Clone, Debug, PartialEq)]
pub struct InfluenceOutput<T> {
    /// Block sums over each KV head's query group, `[kv_heads, blocks, blocks]` row-major with
    /// query blocks first; entries above the diagonal, and those of hidden keys, are 0.
    pub blocks: Vec<f64>,
    /// Present if they were asked for.
    pub gradients: Option<Gradients<T>>,
}
