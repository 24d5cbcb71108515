use cubecl::prelude::*;

use super::keys::{head, slot};

/// Writes one sequence's new rows into a store of its cache, after attention has read what they overwrite. `k` and
/// `v` are rows of `[batch tokens, kv_heads]`, of which `tokens` from `first` on are the sequence's, in the words of
/// the cache; `scales` is the word of `k` where scales start. Units: vectors of the keys, of the values, and where the
/// type has scales a word of them.
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
    heads: u32,
    key_vectors: u32,
    value_vectors: u32,
    scales: u32,
    #[comptime] has_scales: bool,
) {
    let (key_vectors, value_vectors) = (key_vectors as usize, value_vectors as usize);
    let columns = key_vectors + value_vectors + comptime!(has_scales as usize);
    let row = (ABSOLUTE_POS / columns) as u32;
    let column = ABSOLUTE_POS % columns;
    if row >= tokens * heads {
        terminate!();
    }
    let position = len + row / heads;
    let head = head(table, row % heads);
    // What the same append would overwrite again is left out.
    if position < head.sink_slots || position + head.ring >= len + tokens {
        let from = (first + row / heads) * kv_heads + head.number;
        let to = slot(&head, position);
        if column < key_vectors {
            cached_k[to as usize * key_vectors + column] = k[from as usize * key_vectors + column];
        } else if column < key_vectors + value_vectors {
            let column = column - key_vectors;
            cached_v[to as usize * value_vectors + column] =
                v[from as usize * value_vectors + column];
        } else if comptime!(has_scales) {
            cached_k[(head.scales + to - head.offset) as usize] = k[(scales + from) as usize];
        }
    }
}
