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
    /// How they become weights.
    pub scores: Scores<'a, T>,
    /// Whether the log-sum-exp of each row of scores is wanted too.
    pub lse: bool,
    /// [Feedback](crate::key_feedback) of each KV head, `[kv_heads, head_dim, head_dim]`, by which keys of heads in 4 bits get
    /// their codes; others pass over it. f32 on every device. As the numbers lie on the device, nothing checks them.
    pub key_feedback: Option<&'a T>,
}

impl<'a, T> ExtendInputs<'a, T> {
    /// Inputs without feedback, of which no log-sum-exp is wanted. Plain attention has a factor in place of the scores:
    ///
    /// ```
    /// # use moa_core::{ExtendInputs, Scores};
    /// # let (q, k, v) = ((), (), ());
    /// let plain = ExtendInputs::new(&q, &k, &v, 0.125);
    /// let scores = Scores { softcap: Some(50.0), ..Scores::from(0.0625) };
    /// let capped = ExtendInputs { lse: true, ..ExtendInputs::new(&q, &k, &v, scores) };
    /// ```
    pub fn new(q: &'a T, k: &'a T, v: &'a T, scores: impl Into<Scores<'a, T>>) -> Self {
        Self { q, k, v, scores: scores.into(), lse: false, key_feedback: None }
    }
}

// Derived, they would ask for a tensor that can be copied.
impl<T> Copy for ExtendInputs<'_, T> {}

impl<T> Clone for ExtendInputs<'_, T> {
    fn clone(&self) -> Self {
        *self
    }
}

/// How products of queries and keys become weights. From an `f32`: plain attention with this factor.
#[derive(Debug)]
pub struct Scores<'a, T> {
    /// Factor of the products.
    pub scale: f32,
    /// Bounds the scores: `scale * q.k` becomes `softcap * tanh(scale * q.k / softcap)`, as in Gemma 2. From
    /// [`LEAST_SOFTCAP`](Self::LEAST_SOFTCAP) to [`MOST_SOFTCAP`](Self::MOST_SOFTCAP).
    pub softcap: Option<f32>,
    /// Learned sinks, `[query_heads]`, as in gpt-oss: the logit of a key that every query of the head sees and whose value
    /// is 0. It adds to the softmax's denominator, after the factor and the softcap, which do not touch it. f32 on
    /// every device.
    ///
    /// Minus infinity takes no part. As the numbers lie on the device, nothing checks them: outputs of a head whose
    /// logit is NaN or infinity mean nothing.
    pub sinks: Option<&'a T>,
}

impl<T> Scores<'_, T> {
    /// The smallest softcap, with which all keys weigh the same.
    pub const LEAST_SOFTCAP: f32 = 1e-20;

    /// The largest softcap, with which no score changes.
    pub const MOST_SOFTCAP: f32 = 1e20;
}

impl<T> From<f32> for Scores<'_, T> {
    fn from(scale: f32) -> Self {
        Self { scale, softcap: None, sinks: None }
    }
}

impl<T> Copy for Scores<'_, T> {}

impl<T> Clone for Scores<'_, T> {
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
    /// Log-sum-exp of each row of scores, `[tokens, query_heads]`, if it was asked for: the logarithm of the softmax's
    /// denominator, so of scores as `softcap` leaves them, and of the sink with them. Parts of a row that are merged by
    /// their log-sum-exps must have the sinks in one part alone.
    pub lse: Option<T>,
}
