//! New keys and values on their way into the cache.

use moa_core::{Append, AttentionShape};

use crate::Result;
use crate::cache::{Cache, Pair, with_store};
use crate::element::Element;
use crate::pool::{self, SharedMut};

/// Bytes that a cache may keep for staging between calls, so that decoding does not allocate.
const KEPT_BYTES: usize = 1 << 12;

/// Brings the new keys and values to their caches' element type and to `[kv_heads, tokens,
/// head_dim]`. Attention reads them from there, so that a key is the same number whether a query
/// sees it in its own chunk or later.
pub(super) fn stage(batch: &mut [Append<'_, Cache>], shape: &AttentionShape, k: &[f32], v: &[f32]) {
    let mut row = 0;
    for Append { cache, tokens } in batch {
        let tokens = *tokens;
        let start = row * shape.kv_heads * shape.head_dim;
        with_store!(&mut cache.store, pair => {
            transpose(tokens, shape, &k[start..], &mut pair.staged_keys);
            transpose(tokens, shape, &v[start..], &mut pair.staged_values);
        });
        row += tokens;
    }
}

fn transpose<E: Element>(tokens: usize, shape: &AttentionShape, from: &[f32], to: &mut Vec<E>) {
    let &AttentionShape { kv_heads, head_dim, .. } = shape;
    to.clear();
    to.resize(kv_heads * tokens * head_dim, E::zeroed());
    let work = to.len() as u64;
    let to = SharedMut::new(to);
    pool::for_each(kv_heads, work, |head| {
        // SAFETY: each task has a head of its own.
        let to = unsafe { to.slice(head * tokens * head_dim, tokens * head_dim) };
        let from = from[head * head_dim..].chunks(kv_heads * head_dim);
        for (to, from) in to.chunks_exact_mut(head_dim).zip(from) {
            E::narrow_slice(&from[..head_dim], to);
        }
    });
}

/// Appends what was staged to caches that have room for it.
pub(super) fn commit(batch: &mut [Append<'_, Cache>]) -> Result<()> {
    for Append { cache, tokens } in batch {
        let Cache { state, store } = &mut **cache;
        let (len, head_dim) = (state.len(), state.head_dim());
        for (kv_head, head) in state.layout().heads().iter().enumerate() {
            for run in head.append(len, *tokens) {
                let from = kv_head * *tokens + run.position.0 - len;
                with_store!(store, pair => copy(pair, from, run.slot.0, run.len, head_dim));
            }
        }
        with_store!(store, pair => release(pair));
        state.append(*tokens)?;
    }
    Ok(())
}

fn copy<E: Element>(pair: &mut Pair<E>, from: usize, to: usize, rows: usize, dim: usize) {
    let (from, to) = (from * dim..(from + rows) * dim, to * dim..(to + rows) * dim);
    pair.keys[to.clone()].copy_from_slice(&pair.staged_keys[from.clone()]);
    pair.values[to].copy_from_slice(&pair.staged_values[from]);
}

fn release<E: Element>(pair: &mut Pair<E>) {
    if size_of_val(&pair.staged_keys[..]) > KEPT_BYTES {
        pair.staged_keys = Vec::new();
        pair.staged_values = Vec::new();
    }
}
