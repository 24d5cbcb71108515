use cubecl::prelude::*;

use super::keys::{head, slot};

/// Writes one sequence's new keys and values into its cache, after attention has read what they
/// overwrite. `k` and `v` are `[batch tokens, kv_heads, vectors]`, of which `tokens` from `first` on
/// are the sequence's, in the words of the cache; units: their vectors.
#[allow(clippy::too_many_arguments)]
#[cube(launch_unchecked)]
pub(crate) fn append<M: Size>(
    k: &[Vector<u32, M>],
    v: &[Vector<u32, M>],
    table: &[u32],
    cached_k: &mut [Vector<u32, M>],
    cached_v: &mut [Vector<u32, M>],
    first: u32,
    tokens: u32,
    len: u32,
    kv_heads: u32,
    vectors: u32,
) {
    let vectors = vectors as usize;
    let row = ABSOLUTE_POS / vectors;
    let column = ABSOLUTE_POS % vectors;
    if row >= (tokens * kv_heads) as usize {
        terminate!();
    }
    let position = len + row as u32 / kv_heads;
    let head = head(table, row as u32 % kv_heads);
    // What the same append would overwrite again is left out.
    if position < head.sink_slots || position + head.ring >= len + tokens {
        let from = ((first * kv_heads) as usize + row) * vectors + column;
        let to = slot(&head, position) as usize * vectors + column;
        cached_k[to] = k[from];
        cached_v[to] = v[from];
    }
}
