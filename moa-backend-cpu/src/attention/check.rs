use super::Inputs;
use crate::cache::Cache;
use crate::{Error, Result, Tensor};

const OP: &str = "extend";

/// Dimensions of one call, checked.
#[derive(Debug)]
pub(crate) struct Shape {
    pub(crate) tokens: usize,
    pub(crate) query_heads: usize,
    pub(crate) kv_heads: usize,
    /// Query heads per KV head.
    pub(crate) group: usize,
    pub(crate) head_dim: usize,
}

impl Shape {
    /// Row of each sequence's first token in the packed tensors.
    pub(crate) fn first_rows(&self, tokens: &[usize]) -> Vec<usize> {
        tokens.iter().scan(0, |next, n| Some(std::mem::replace(next, *next + n))).collect()
    }
}

/// Everything that can be wrong with a call is found here, before anything is computed or changed.
pub(crate) fn check(caches: &[&mut Cache], tokens: &[usize], inputs: &Inputs<'_>) -> Result<Shape> {
    if caches.len() != tokens.len() {
        return Err(Error::argument(
            OP,
            "tokens",
            format_args!("{} entries, one per cache", caches.len()),
            tokens.len(),
        ));
    }
    if tokens.contains(&0) {
        return Err(Error::argument(OP, "tokens", "at least 1 per sequence", 0));
    }
    let total = tokens
        .iter()
        .try_fold(0usize, |sum, &n| sum.checked_add(n))
        .ok_or_else(|| Error::argument(OP, "tokens", "a sum below 2^64", "more"))?;
    let &[q_tokens, query_heads, head_dim] = inputs.q.shape() else {
        return Err(Error::shape(OP, "q", "[tokens, query heads, head dim]", inputs.q.shape()));
    };
    let &[_, kv_heads, _] = inputs.k.shape() else {
        return Err(Error::shape(OP, "k", "[tokens, kv heads, head dim]", inputs.k.shape()));
    };
    if q_tokens != total || query_heads == 0 || head_dim == 0 {
        return Err(Error::shape(
            OP,
            "q",
            format_args!("[{total}, query heads, head dim]"),
            inputs.q.shape(),
        ));
    }
    if kv_heads == 0 || !query_heads.is_multiple_of(kv_heads) {
        let expected =
            format_args!("[{total}, a divisor of {query_heads}, {head_dim}]").to_string();
        return Err(Error::shape(OP, "k", expected, inputs.k.shape()));
    }
    let expect = |what, tensor: &Tensor| {
        let expected = [total, kv_heads, head_dim];
        if tensor.shape() == expected {
            return Ok(());
        }
        Err(Error::shape(OP, what, format_args!("{expected:?}"), tensor.shape()))
    };
    expect("k", inputs.k)?;
    expect("v", inputs.v)?;
    for (cache, &tokens) in caches.iter().zip(tokens) {
        let has = [cache.layout.heads().len(), cache.head_dim];
        if has != [kv_heads, head_dim] {
            return Err(Error::shape(
                OP,
                "cache [kv heads, head dim]",
                format_args!("[{kv_heads}, {head_dim}]"),
                &has,
            ));
        }
        cache.extent.check_append(&cache.layout, tokens)?;
    }
    Ok(Shape { tokens: total, query_heads, kv_heads, group: query_heads / kv_heads, head_dim })
}
