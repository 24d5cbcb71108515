//! Rows of gradients that products of whole tiles brought hidden pairs into: 0 times infinity is no number.

use std::ops::Range;

use moa_core::{Gradients, InfluenceInputs};

use super::Shape;
use crate::Tensor;

/// Computes anew, pair by pair, the rows of gradients that hold something that is not finite. They stay so if a pair
/// that the mask keeps makes them so.
pub(super) fn mend(
    shape: &Shape,
    inputs: &InfluenceInputs<'_, Tensor>,
    scale: f32,
    gradients: &mut Gradients<Tensor>,
) {
    let Gradients { d_q, d_k, d_v } = gradients;
    let pairs = Pairs { shape, inputs, scale };
    let heads = shape.kv_heads;
    for (at, row) in d_q.data_mut().chunks_exact_mut(shape.dim).enumerate() {
        let (query, head) = (at / shape.query_heads, at % shape.query_heads);
        let seen = (query + 1).saturating_sub(shape.window)..query + 1;
        let key = |key| (pairs.weights(query, head, key).1, pairs.key(key, head));
        mend_row(row, || seen.clone().map(key));
    }
    for (at, (by_key, by_value)) in rows(d_k, shape).zip(rows(d_v, shape)).enumerate() {
        let (key, group) = (at / heads, at % heads * shape.group..(at % heads + 1) * shape.group);
        let seeing = pairs.seeing(key, group);
        let seeing = || seeing.clone();
        mend_row(by_key, || {
            let query = |(query, head)| {
                (pairs.weights(query, head, key).1, pairs.row(inputs.q, query, head))
            };
            seeing().map(query)
        });
        mend_row(by_value, || {
            let query = |(query, head)| {
                (pairs.weights(query, head, key).0, pairs.row(inputs.d_out, query, head))
            };
            seeing().map(query)
        });
    }
}

fn rows<'a>(tensor: &'a mut Tensor, shape: &Shape) -> impl Iterator<Item = &'a mut [f32]> {
    tensor.data_mut().chunks_exact_mut(shape.dim)
}

/// Sums weighted rows, if the sum that is there is not finite.
fn mend_row<'a, I: Iterator<Item = (f32, &'a [f32])>>(sum: &mut [f32], terms: impl FnOnce() -> I) {
    if sum.iter().all(|x| x.is_finite()) {
        return;
    }
    sum.fill(0.0);
    for (weight, row) in terms() {
        sum.iter_mut().zip(row).for_each(|(sum, x)| *sum += weight * x);
        // Nothing makes it finite again.
        if sum.iter().all(|x| !x.is_finite()) {
            return;
        }
    }
}

/// The pairs of a query and a key of one call.
struct Pairs<'a> {
    shape: &'a Shape,
    inputs: &'a InfluenceInputs<'a, Tensor>,
    scale: f32,
}

impl<'a> Pairs<'a> {
    fn row(&self, tensor: &'a Tensor, query: usize, head: usize) -> &'a [f32] {
        let Shape { query_heads, dim, .. } = *self.shape;
        &tensor.data()[(query * query_heads + head) * dim..][..dim]
    }

    fn of_key(&self, tensor: &'a Tensor, key: usize, head: usize) -> &'a [f32] {
        let Shape { kv_heads, group, dim, .. } = *self.shape;
        &tensor.data()[(key * kv_heads + head / group) * dim..][..dim]
    }

    fn key(&self, key: usize, head: usize) -> &'a [f32] {
        self.of_key(self.inputs.k, key, head)
    }

    /// Queries of these heads that see a key.
    fn seeing(
        &self,
        key: usize,
        heads: Range<usize>,
    ) -> impl Iterator<Item = (usize, usize)> + Clone {
        let end = self.shape.tokens.min(key + self.shape.window);
        (key..end).flat_map(move |query| heads.clone().map(move |head| (query, head)))
    }

    /// Probability of a pair, and the gradient by its product of query and key.
    fn weights(&self, query: usize, head: usize, key: usize) -> (f32, f32) {
        let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(x, y)| x * y).sum::<f32>();
        let row = |tensor| self.row(tensor, query, head);
        let lse = self.inputs.lse.data()[query * self.shape.query_heads + head];
        let d_out = row(self.inputs.d_out);
        let p = (self.scale * dot(row(self.inputs.q), self.key(key, head)) - lse).exp();
        let gain = dot(d_out, self.of_key(self.inputs.v, key, head));
        (p, self.scale * p * (gain - dot(d_out, row(self.inputs.out))))
    }
}
