//! Response loss of a plan, and of many plans that differ from it in one layer, without running the
//! layers below that one again.

use moa_core::{LayerLayout, Plan, SparseAttentionBackend};

use crate::llama::Llama;
use crate::objective::cross_entropy;
use crate::ops::Ops;
use crate::profile::Item;
use crate::{Error, Result};

/// One item under one plan, in a single chunk.
struct Pass<'a, O: Ops> {
    item: &'a Item,
    capacity: usize,
    rotations: O::Rotations,
}

impl<O: Ops> Llama<O> {
    /// Mean cross entropy of an item's response, in nats per token, in a sequence opened for
    /// `capacity` tokens.
    ///
    /// # Errors
    /// If the plan is for another model or the item is longer than `capacity`.
    pub fn response_loss(&self, item: &Item, plan: &Plan, capacity: usize) -> Result<f64> {
        let pass = self.pass(item, plan, capacity)?;
        let x = self.ops.embed(&self.embedding, item.inputs())?;
        self.upwards(&pass, plan, 0, x, None)
    }

    /// [`Llama::response_loss`] of `plan`, and of each of `variants`: plans that differ from it only
    /// in the layer given.
    pub(crate) fn variant_losses(
        &self,
        item: &Item,
        plan: &Plan,
        variants: &[(usize, Plan)],
        capacity: usize,
    ) -> Result<(f64, Vec<f64>)> {
        let pass = self.pass(item, plan, capacity)?;
        let mut inputs = Vec::with_capacity(self.layers.len());
        let x = self.ops.embed(&self.embedding, item.inputs())?;
        let base = self.upwards(&pass, plan, 0, x, Some(&mut inputs))?;
        let losses = variants.iter().map(|(layer, variant)| {
            self.upwards(&pass, variant, *layer, inputs[*layer].clone(), None)
        });
        Ok((base, losses.collect::<Result<_>>()?))
    }

    fn pass<'a>(&self, item: &'a Item, plan: &Plan, capacity: usize) -> Result<Pass<'a, O>> {
        plan.check_shape(&self.shape())?;
        let tokens = item.inputs().len();
        if tokens > capacity {
            return Err(Error::ContextExceeded { asked: tokens, limit: capacity });
        }
        let rope = self.rope(capacity)?;
        let rotations = self.ops.rotations(&[(&rope, 0..tokens)])?;
        Ok(Pass { item, capacity, rotations })
    }

    /// Runs layers from `first` up on their input `x`; `keep` collects every layer's input.
    fn upwards(
        &self,
        pass: &Pass<'_, O>,
        plan: &Plan,
        first: usize,
        mut x: O::Tensor,
        mut keep: Option<&mut Vec<O::Tensor>>,
    ) -> Result<f64> {
        let (ops, attention) = (&self.ops, self.ops.attention());
        let rows: Vec<usize> = pass.item.rows().collect();
        for (index, layer) in self.layers.iter().enumerate().skip(first) {
            if let Some(keep) = &mut keep {
                keep.push(x.clone());
            }
            let spans = plan.layer_spans(index, pass.capacity);
            let layout = LayerLayout::new(&spans, pass.capacity, 0)?;
            let mut cache =
                attention.open(&layout, self.config.head_dim).map_err(Error::backend)?;
            let [q, k, v] = self.qkv(layer, &x, &pass.rotations)?;
            let tokens = [pass.item.inputs().len()];
            let (mut out, _) = attention
                .extend(&mut [&mut cache], &tokens, &q, &k, &v, self.scale(), false)
                .map_err(Error::backend)?;
            if index + 1 == self.layers.len() {
                // Nothing reads the other rows of the top layer.
                (x, out) = (ops.rows(&x, &rows)?, ops.rows(&out, &rows)?);
            }
            x = self.mlp(layer, self.after_attention(layer, x, out)?)?;
        }
        let h = ops.rms_norm(&x, &self.norm, self.eps())?;
        let logits = ops.values(ops.logits(&h, self.output_matrix())?)?;
        let response = pass.item.response();
        let losses = logits.chunks(self.config.vocab_size).zip(response);
        Ok(losses.map(|(row, y)| cross_entropy(row, *y as usize)).sum::<f64>()
            / response.len() as f64)
    }
}
