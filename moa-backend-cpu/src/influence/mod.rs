//! Influence of every attention value on the objective, and the gradients of attention, without
//! ever storing anything of size tokens x tokens.

mod mend;
mod stripe;
mod sweep;

use moa_core::{AttentionShape, Gradients, InfluenceInputs, InfluenceOutput, check_influence};

use self::stripe::{Stripe, StripeSums};
use crate::pool::{self, SharedMut};
use crate::simd::outer::PANEL;
use crate::zeroed::zeroed;
use crate::{Result, Tensor, workspace};

/// Most independent stripes of query tiles when gradients are wanted: each has sums of its own for
/// the gradients by keys and values. A fixed number, so that results do not depend on the machine.
const GRADIENT_STRIPES: usize = 16;

/// What sums of influence are called where there is no memory for them.
const BLOCKS: &str = "sums of influence";

/// Dimensions of one call, and how they are cut.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Shape {
    tokens: usize,
    query_heads: usize,
    kv_heads: usize,
    group: usize,
    dim: usize,
    block: usize,
    window: usize,
}

impl Shape {
    fn new(shape: AttentionShape, block: usize, window: usize) -> Self {
        let AttentionShape { tokens, query_heads, kv_heads, head_dim: dim } = shape;
        let (group, window) = (shape.group(), window.min(tokens));
        Self { tokens, query_heads, kv_heads, group, dim, block, window }
    }

    fn tiles(&self) -> usize {
        self.tokens.div_ceil(PANEL)
    }

    fn blocks(&self) -> usize {
        self.tokens.div_ceil(self.block)
    }

    /// Register panels of one row of `dim` elements.
    fn dim_panels(&self) -> usize {
        self.dim.div_ceil(PANEL)
    }
}

/// See [`moa_core::SparseAttentionBackend::influence`].
pub(crate) fn influence(
    inputs: &InfluenceInputs<'_, Tensor>,
    scale: f32,
) -> Result<InfluenceOutput<Tensor>> {
    let shape = Shape::new(check_influence(inputs, Tensor::shape)?, inputs.block, inputs.window);
    let stripes = match inputs.gradients {
        true => GRADIENT_STRIPES.div_ceil(shape.kv_heads).min(shape.tiles()),
        false => shape.tiles(),
    };
    let mut d_q = match inputs.gradients {
        true => Some(Tensor::zeros(inputs.q.shape())?),
        false => None,
    };

    let keys = by_head(&shape, inputs.k)?;
    let values = by_head(&shape, inputs.v)?;

    // Stripe `s` has the query tiles s, s + stripes, ...: all stripes of a head are about equally
    // long; where they are single tiles, the longest come first.
    let mut results: Vec<Option<Result<StripeSums>>> = Vec::new();
    results.resize_with(shape.kv_heads * stripes, || None);
    {
        let d_q = d_q.as_mut().map(|d_q| SharedMut::new(d_q.data_mut()));
        let slots = SharedMut::new(&mut results);
        let pairs = (shape.tokens as u64).pow(2) / 2 * shape.query_heads as u64;
        pool::for_each(shape.kv_heads * stripes, pairs * 2 * shape.dim as u64, |task| {
            let (stripe, kv_head) = (stripes - 1 - task / shape.kv_heads, task % shape.kv_heads);
            let result = workspace::run(Stripe {
                inputs,
                shape,
                scale,
                kv_head,
                keys: &keys[kv_head * shape.tokens * shape.dim..],
                values: &values[kv_head * shape.tokens * shape.dim..],
                tiles: (stripe..shape.tiles()).step_by(stripes),
                d_q: d_q.as_ref(),
            });
            // SAFETY: each task has a slot of its own.
            unsafe { slots.slice(kv_head * stripes + stripe, 1)[0] = Some(result) };
        });
    }
    let sums = results.into_iter().flatten().collect::<Result<Vec<_>>>()?;
    let gradients = match d_q {
        Some(d_q) => {
            let mut gradients = Gradients {
                d_q,
                d_k: reduce(&shape, &sums, stripes, |s| &s.d_k)?,
                d_v: reduce(&shape, &sums, stripes, |s| &s.d_v)?,
            };
            mend::mend(&shape, inputs, scale, &mut gradients);
            Some(gradients)
        }
        None => None,
    };
    Ok(InfluenceOutput { blocks: blocks(&shape, &sums, stripes)?, gradients })
}

/// `[tokens, kv_heads, dim]` as `[kv_heads, tokens, dim]`.
fn by_head(shape: &Shape, from: &Tensor) -> Result<Vec<f32>> {
    let Shape { tokens, kv_heads, dim, .. } = *shape;
    let mut to: Vec<f32> = zeroed(from.data().len(), "keys and values")?;
    {
        let to = SharedMut::new(&mut to);
        pool::for_each(kv_heads, from.data().len() as u64, |head| {
            // SAFETY: each task has a head of its own.
            let to = unsafe { to.slice(head * tokens * dim, tokens * dim) };
            for (to, from) in to.chunks_exact_mut(dim).zip(from.data().chunks_exact(kv_heads * dim))
            {
                to.copy_from_slice(&from[head * dim..][..dim]);
            }
        });
    }
    Ok(to)
}

/// Adds the tiles' block sums in a fixed order.
fn blocks(shape: &Shape, sums: &[StripeSums], stripes: usize) -> Result<Vec<f64>> {
    let n = shape.blocks();
    let mut blocks: Vec<f64> = zeroed(shape.kv_heads * n * n, BLOCKS)?;
    for (i, stripe) in sums.iter().enumerate() {
        let head = &mut blocks[i / stripes * n * n..][..n * n];
        for (first_row, rows) in &stripe.blocks {
            let to = &mut head[first_row * n..][..rows.len()];
            to.iter_mut().zip(rows).for_each(|(to, x)| *to += x);
        }
    }
    Ok(blocks)
}

/// Adds the stripes' gradients by keys or values and brings them to `[tokens, kv_heads, dim]`.
fn reduce(
    shape: &Shape,
    sums: &[StripeSums],
    stripes: usize,
    part: impl Fn(&StripeSums) -> &Vec<f32> + Sync,
) -> Result<Tensor> {
    let Shape { tokens, kv_heads, dim, .. } = *shape;
    let mut total = Tensor::zeros(&[tokens, kv_heads, dim])?;
    {
        let rows = SharedMut::new(total.data_mut());
        let work = (sums.len() * tokens * dim) as u64;
        pool::for_each(tokens.div_ceil(PANEL), work, |tile| {
            for token in tile * PANEL..tokens.min((tile + 1) * PANEL) {
                // SAFETY: each task has tokens of its own.
                let row = unsafe { rows.slice(token * kv_heads * dim, kv_heads * dim) };
                for (i, stripe) in sums.iter().enumerate() {
                    let head = &mut row[i / stripes * dim..][..dim];
                    for (p, to) in head.chunks_mut(PANEL).enumerate() {
                        let from = &part(stripe)[(p * tokens + token) * PANEL..];
                        to.iter_mut().zip(from).for_each(|(to, x)| *to += x);
                    }
                }
            }
        });
    }
    Ok(total)
}

#[cfg(test)]
mod tests {
    use moa_core::InfluenceSign;

    use super::*;

    #[test]
    fn every_instruction_set_gives_the_same_influence() {
        let tensor = |heads: usize, by: usize| {
            let data = (0..40 * heads * 20).map(|i| (i * by % 101) as f32 / 50.0 - 1.0).collect();
            Tensor::new(data, &[40, heads, 20]).unwrap()
        };
        let (q, k, v, out, d_out) =
            (tensor(4, 37), tensor(2, 41), tensor(2, 43), tensor(4, 47), tensor(4, 53));
        let lse = Tensor::new(vec![4.0; 160], &[40, 4]).unwrap();
        let inputs = InfluenceInputs {
            q: &q,
            k: &k,
            v: &v,
            out: &out,
            lse: &lse,
            d_out: &d_out,
            window: 17,
            block: 7,
            sign: InfluenceSign::Signed,
            gradients: true,
        };
        let results = crate::simd::tests::on_every_arch(|| {
            let output = influence(&inputs, 0.1).unwrap();
            let gradients = output.gradients.unwrap();
            let parts = [gradients.d_q, gradients.d_k, gradients.d_v].map(Tensor::into_data);
            (output.blocks, parts.concat())
        });
        for (blocks, gradients) in &results[1..] {
            let differences = blocks.iter().zip(&results[0].0).map(|(a, b)| (a - b).abs());
            assert!(differences.fold(0.0, f64::max) < 1e-3);
            let differences = gradients.iter().zip(&results[0].1).map(|(a, b)| (a - b).abs());
            assert!(differences.fold(0.0, f32::max) < 1e-3);
        }
    }
}
