use moa_core::{CacheState, check_batch, check_softcap};

use super::step::Batch;
use crate::{Cache, Error, Result};

const OP: &str = "Step::prepare";

/// Checks that the parts of a batch fit together; returns its first cache.
pub(crate) fn check<'a>(batch: &Batch<'a>) -> Result<&'a Cache> {
    let Batch { caches, tokens, query_heads, softcap, .. } = *batch;
    if caches.len() != tokens.len() {
        let expected = format_args!("{} entries, one per cache", caches.len()).to_string();
        return Err(Error::argument(OP, "tokens", expected, tokens.len()));
    }
    if caches.len() > usize::from(u16::MAX) {
        return Err(Error::argument(OP, "batch", "fewer than 2^16 sequences", caches.len()));
    }
    let states = caches.iter().map(|cache| -> &CacheState { (*cache).as_ref() });
    check_softcap(OP, softcap).map_err(moa_core::Error::from)?;
    check_batch(OP, states.zip(tokens.iter().copied()), query_heads)?;
    let first = caches[0];
    for cache in caches {
        if cache.dtype() != first.dtype() {
            return Err(Error::argument(OP, "cache dtype", first.dtype(), cache.dtype()));
        }
        if !cache.device().is_same(first.device()) {
            return Err(Error::argument(OP, "cache device", "the same for all", "another"));
        }
    }
    Ok(first)
}
