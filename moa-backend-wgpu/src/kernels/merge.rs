use cubecl::prelude::*;

use super::keys::{head, keys, split_keys};

/// Joins the partial results of [`super::attend`]; `partial`, `partial_stats`, `out` and `lse` as
/// there, with room for `splits` splits of each of the store's `heads`. Units: vectors of their rows.
#[allow(clippy::too_many_arguments)]
#[cube(launch_unchecked)]
pub(crate) fn merge<N: Size>(
    partial: &[Vector<f32, N>],
    partial_stats: &[f32],
    table: &[u32],
    out: &mut [Vector<f32, N>],
    lse: &mut [f32],
    first: u32,
    tokens: u32,
    len: u32,
    query_heads: u32,
    kv_heads: u32,
    heads: u32,
    splits: u32,
    vectors: u32,
) {
    let vectors = vectors as usize;
    let at = (ABSOLUTE_POS / vectors) as u32;
    let column = ABSOLUTE_POS % vectors;
    let group = query_heads / kv_heads;
    let token = at / (heads * group);
    if token >= tokens {
        terminate!();
    }
    let own = at % (heads * group) / group;
    let rows = tokens * group;
    let row = token * group + at % group;
    let head = head(table, own);
    let count = keys(&head, len, len + tokens).count;
    let used = count.div_ceil(split_keys(count));

    let mut largest = partial_stats[2 * (own * splits * rows + row) as usize];
    for split in 1..used {
        largest = largest.max(partial_stats[2 * ((own * splits + split) * rows + row) as usize]);
    }
    let mut sum = 0.0f32;
    let mut output = Vector::<f32, N>::new(0.0);
    for split in 0..used {
        let from = ((own * splits + split) * rows + row) as usize;
        let factor = (partial_stats[2 * from] - largest).exp();
        sum += partial_stats[2 * from + 1] * factor;
        output += partial[from * vectors + column] * Vector::new(factor);
    }
    let to = ((first + token) * query_heads + head.number * group + at % group) as usize;
    out[to * vectors + column] = output * Vector::new(1.0 / sum);
    if column == 0 {
        lse[to] = largest + sum.ln();
    }
}
