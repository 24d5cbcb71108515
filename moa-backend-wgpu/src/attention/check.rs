use super::OP;
use crate::{Cache, Device, Error, Result, Tensor};

/// Everything about a call that can be wrong. Returns the number of query heads.
pub(crate) fn check(
    device: &Device,
    caches: &[&mut Cache],
    tokens: &[usize],
    [q, k, v]: [&Tensor; 3],
) -> Result<usize> {
    if caches.len() != tokens.len() {
        let expected = format_args!("{} entries, one per cache", caches.len()).to_string();
        return Err(Error::argument(OP, "tokens", expected, tokens.len()));
    }
    if tokens.contains(&0) {
        return Err(Error::argument(OP, "tokens", "at least 1 per sequence", 0));
    }
    let total = tokens.iter().try_fold(0usize, |sum, &n| sum.checked_add(n));
    let total = total.ok_or_else(|| Error::argument(OP, "tokens", "a sum below 2^64", "more"))?;
    let Some(first) = caches.first() else {
        return Err(Error::argument(OP, "caches", "at least 1", 0));
    };
    let (kv_heads, head_dim) = (first.layout().heads().len(), first.head_dim());
    let &[q_tokens, query_heads, q_dim] = q.shape() else {
        return Err(Error::shape(OP, "q", "[tokens, query heads, head dim]", q.shape()));
    };
    if [q_tokens, q_dim] != [total, head_dim]
        || query_heads == 0
        || !query_heads.is_multiple_of(kv_heads)
    {
        let expected = format!("[{total}, a multiple of {kv_heads}, {head_dim}]");
        return Err(Error::shape(OP, "q", expected, q.shape()));
    }
    let kv_shape = [total, kv_heads, head_dim];
    for (what, tensor) in [("k", k), ("v", v)] {
        if tensor.shape() != kv_shape {
            return Err(Error::shape(OP, what, format_args!("{kv_shape:?}"), tensor.shape()));
        }
    }
    for (what, tensor) in [("q", q), ("k", k), ("v", v)] {
        if !tensor.device().is(device) {
            return Err(Error::argument(OP, what, "on the backend's device", "on another"));
        }
    }
    for (cache, &tokens) in caches.iter().zip(tokens) {
        let has = [cache.layout().heads().len(), cache.head_dim()];
        if has != [kv_heads, head_dim] {
            let expected = format_args!("[{kv_heads}, {head_dim}]").to_string();
            return Err(Error::shape(OP, "cache [kv heads, head dim]", expected, &has));
        }
        if cache.dtype() != first.dtype() {
            return Err(Error::argument(OP, "cache dtype", first.dtype(), cache.dtype()));
        }
        if !cache.device().is(device) {
            return Err(Error::argument(OP, "cache", "on the backend's device", "on another"));
        }
        cache.check_append(tokens)?;
    }
    Ok(query_heads)
}
