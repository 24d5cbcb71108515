use crate::attention::step::Batch;
use crate::{Cache, Error, Result};

const OP: &str = "Step::prepare";

/// Checks that the parts of a batch fit together; returns its first cache.
pub(crate) fn check<'a>(batch: &Batch<'a>) -> Result<&'a Cache> {
    let Batch { caches, tokens, query_heads, .. } = *batch;
    if caches.len() != tokens.len() {
        let expected = format_args!("{} entries, one per cache", caches.len()).to_string();
        return Err(Error::argument(OP, "tokens", expected, tokens.len()));
    }
    if caches.len() > usize::from(u16::MAX) {
        return Err(Error::argument(OP, "caches", "fewer than 2^16", caches.len()));
    }
    if tokens.contains(&0) {
        return Err(Error::argument(OP, "tokens", "at least 1 per sequence", 0));
    }
    let Some(&first) = caches.first() else {
        return Err(Error::argument(OP, "caches", "at least 1", 0));
    };
    let kv_heads = first.layout().heads().len();
    if query_heads == 0 || !query_heads.is_multiple_of(kv_heads) {
        let expected = format_args!("a multiple of {kv_heads}").to_string();
        return Err(Error::argument(OP, "query heads", expected, query_heads));
    }
    for (cache, &tokens) in caches.iter().zip(tokens) {
        let has = [cache.layout().heads().len(), cache.head_dim()];
        if has != [kv_heads, first.head_dim()] {
            let expected = format_args!("[{kv_heads}, {}]", first.head_dim()).to_string();
            return Err(Error::shape(OP, "cache [kv heads, head dim]", expected, &has));
        }
        if cache.dtype() != first.dtype() {
            return Err(Error::argument(OP, "cache dtype", first.dtype(), cache.dtype()));
        }
        if cache.device().context() != first.device().context() {
            return Err(Error::argument(OP, "cache device", "the same for all", "another"));
        }
        cache.extent().check_append(cache.layout(), tokens)?;
    }
    Ok(first)
}
