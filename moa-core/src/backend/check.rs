//! What can be wrong with a call, checked once for all backends before anything is computed.

use super::{Append, ExtendInputs, InfluenceInputs, Scores};
use crate::{ArgumentError, CacheState, Result};

/// Dimensions of one layer's attention in a call whose arguments fit together.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct AttentionShape {
    /// Tokens of all sequences together, at least 1.
    pub tokens: usize,
    /// Query heads: a multiple of `kv_heads`.
    pub query_heads: usize,
    /// KV heads, at least 1.
    pub kv_heads: usize,
    /// Elements of one row of a head, at least 1.
    pub head_dim: usize,
}

impl AttentionShape {
    /// Query heads per KV head.
    pub fn group(&self) -> usize {
        self.query_heads / self.kv_heads
    }
}

/// Checks the arguments of [`SparseAttentionBackend::extend`]: that the tensors, whose shapes `shape`
/// tells, fit the caches and that every cache has room. What only a backend knows, such as the device
/// on which a tensor lies, is left to it.
///
/// # Errors
/// [`Error::Argument`] if the arguments do not fit together, [`Error::CapacityExceeded`] if a cache
/// has no room.
///
/// [`SparseAttentionBackend::extend`]: crate::SparseAttentionBackend::extend
/// [`Error::Argument`]: crate::Error::Argument
/// [`Error::CapacityExceeded`]: crate::Error::CapacityExceeded
pub fn check_extend<C: AsRef<CacheState>, T>(
    batch: &[Append<'_, C>],
    inputs: &ExtendInputs<'_, T>,
    shape: impl Fn(&T) -> &[usize],
) -> Result<AttentionShape> {
    const OP: &str = "extend";
    let batch = batch.iter().map(|append| {
        let state: &CacheState = append.cache.as_ref();
        (state, append.tokens)
    });
    let [tokens, kv_heads, head_dim] = common(OP, batch.clone())?;
    let query_heads = match *shape(inputs.q) {
        [rows, heads, dim]
            if [rows, dim] == [tokens, head_dim] && heads > 0 && heads.is_multiple_of(kv_heads) =>
        {
            heads
        }
        ref other => {
            let expected = format!("[{tokens}, a multiple of {kv_heads}, {head_dim}]");
            return Err(ArgumentError::shape(OP, "q", expected, other).into());
        }
    };
    let of_kv = [tokens, kv_heads, head_dim];
    expect(OP, "k", shape(inputs.k), &of_kv)?;
    expect(OP, "v", shape(inputs.v), &of_kv)?;
    if let Some(sinks) = inputs.scores.sinks {
        expect(OP, "sinks", shape(sinks), &[query_heads])?;
    }
    if let Some(feedback) = inputs.key_feedback {
        expect(OP, "key_feedback", shape(feedback), &[kv_heads, head_dim, head_dim])?;
    }
    check_softcap(OP, inputs.scores.softcap)?;
    room(batch)?;
    Ok(AttentionShape { tokens, query_heads, kv_heads, head_dim })
}

/// The part of [`check_extend`] that looks at the softcap, for engines that hand a backend addresses.
///
/// # Errors
/// [`ArgumentError`] if it is outside of its domain.
pub fn check_softcap(operation: &'static str, softcap: Option<f32>) -> Result<(), ArgumentError> {
    let (least, most) = (Scores::<()>::LEAST_SOFTCAP, Scores::<()>::MOST_SOFTCAP);
    match softcap {
        Some(cap) if !(least..=most).contains(&cap) => {
            let expected = format_args!("{least:e} to {most:e}, or none").to_string();
            Err(ArgumentError::new(operation, "softcap", expected, cap))
        }
        _ => Ok(()),
    }
}

/// The part of [`check_extend`] that needs no tensors, for engines that hand a backend addresses.
///
/// # Errors
/// As [`check_extend`].
pub fn check_batch<'a>(
    operation: &'static str,
    batch: impl Iterator<Item = (&'a CacheState, usize)> + Clone,
    query_heads: usize,
) -> Result<AttentionShape> {
    let [tokens, kv_heads, head_dim] = common(operation, batch.clone())?;
    if query_heads == 0 || !query_heads.is_multiple_of(kv_heads) {
        let expected = format!("a multiple of {kv_heads}");
        return Err(ArgumentError::new(operation, "query heads", expected, query_heads).into());
    }
    room(batch)?;
    Ok(AttentionShape { tokens, query_heads, kv_heads, head_dim })
}

/// Checks the arguments of [`SparseAttentionBackend::influence`], as [`check_extend`] does.
///
/// # Errors
/// [`Error::Argument`] if the arguments do not fit together.
///
/// [`SparseAttentionBackend::influence`]: crate::SparseAttentionBackend::influence
/// [`Error::Argument`]: crate::Error::Argument
pub fn check_influence<T>(
    inputs: &InfluenceInputs<'_, T>,
    shape: impl Fn(&T) -> &[usize],
) -> Result<AttentionShape> {
    const OP: &str = "influence";
    let refused = |argument, expected: &str, got: &[usize]| -> Result<AttentionShape> {
        Err(ArgumentError::shape(OP, argument, expected, got).into())
    };
    let (q, k) = (shape(inputs.q), shape(inputs.k));
    let &[tokens, query_heads, head_dim] = q else {
        return refused("q", "[tokens, query heads, head dim]", q);
    };
    let &[_, kv_heads, _] = k else {
        return refused("k", "[tokens, KV heads, head dim]", k);
    };
    if q.contains(&0) {
        return refused("q", "no empty axis", q);
    }
    if kv_heads == 0 || !query_heads.is_multiple_of(kv_heads) {
        return refused("k", &format!("[{tokens}, a divisor of {query_heads}, {head_dim}]"), k);
    }
    let (of_q, of_kv) = ([tokens, query_heads, head_dim], [tokens, kv_heads, head_dim]);
    expect(OP, "k", k, &of_kv)?;
    expect(OP, "v", shape(inputs.v), &of_kv)?;
    expect(OP, "out", shape(inputs.out), &of_q)?;
    expect(OP, "d_out", shape(inputs.d_out), &of_q)?;
    expect(OP, "lse", shape(inputs.lse), &of_q[..2])?;
    if inputs.block == 0 {
        return Err(ArgumentError::new(OP, "block", "at least 1 token", 0).into());
    }
    if inputs.window == 0 {
        return Err(ArgumentError::new(OP, "window", "at least 1 key", 0).into());
    }
    Ok(AttentionShape { tokens, query_heads, kv_heads, head_dim })
}

/// What a batch has in common: all its tokens, KV heads, head dim.
fn common<'a>(
    op: &'static str,
    batch: impl Iterator<Item = (&'a CacheState, usize)> + Clone,
) -> Result<[usize; 3], ArgumentError> {
    let dims = |state: &CacheState| [state.layout().heads().len(), state.head_dim()];
    let Some((first, _)) = batch.clone().next() else {
        return Err(ArgumentError::new(op, "batch", "at least 1 sequence", 0));
    };
    let [kv_heads, head_dim] = dims(first);
    let mut total = 0usize;
    for (state, tokens) in batch {
        if dims(state) != [kv_heads, head_dim] {
            let expected = format!("[{kv_heads}, {head_dim}] as in the first");
            return Err(ArgumentError::shape(
                op,
                "cache [KV heads, head dim]",
                expected,
                &dims(state),
            ));
        }
        if tokens == 0 {
            return Err(ArgumentError::new(op, "tokens", "at least 1 per sequence", 0));
        }
        total = total
            .checked_add(tokens)
            .ok_or_else(|| ArgumentError::new(op, "tokens", "a sum below 2^64", "more"))?;
    }
    Ok([total, kv_heads, head_dim])
}

fn room<'a>(mut batch: impl Iterator<Item = (&'a CacheState, usize)>) -> Result<()> {
    batch.try_for_each(|(state, tokens)| state.check_append(tokens))
}

fn expect(
    op: &'static str,
    argument: &'static str,
    got: &[usize],
    expected: &[usize],
) -> Result<(), ArgumentError> {
    match got == expected {
        true => Ok(()),
        false => Err(ArgumentError::shape(op, argument, format_args!("{expected:?}"), got)),
    }
}
