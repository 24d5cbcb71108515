/// One sequence of a batch: the cache that it lies in, and how many tokens it grows by.
#[derive(Debug)]
pub struct Append<'a, C> {
    /// Keys and values of the sequence so far.
    pub cache: &'a mut C,
    /// New tokens, at least 1.
    pub tokens: usize,
}

/// The new tokens of a batch, as [`SparseAttentionBackend::extend`] takes them: packed one sequence
/// after the other, after RoPE.
///
/// [`SparseAttentionBackend::extend`]: crate::SparseAttentionBackend::extend
#[derive(Debug)]
pub struct ExtendInputs<'a, T> {
    /// Queries, `[tokens, query_heads, head_dim]`.
    pub q: &'a T,
    /// Keys, `[tokens, kv_heads, head_dim]`.
    pub k: &'a T,
    /// Values, `[tokens, kv_heads, head_dim]`.
    pub v: &'a T,
    /// Factor of the scores.
    pub scale: f32,
    /// Whether the log-sum-exp of each row of scores is wanted too.
    pub lse: bool,
}

// Derived, they would ask for a tensor that can be copied.
impl<T> Copy for ExtendInputs<'_, T> {}

impl<T> Clone for ExtendInputs<'_, T> {
    fn clone(&self) -> Self {
        *self
    }
}

/// The attention output of the tokens that [`extend`](crate::SparseAttentionBackend::extend)
/// appended.
#[derive(Clone, Debug, PartialEq)]
pub struct Extended<T> {
    /// Attention output, `[tokens, query_heads, head_dim]`.
    pub out: T,
    /// Log-sum-exp of each row of scaled scores, `[tokens, query_heads]`, if it was asked for.
    pub lse: Option<T>,
}
