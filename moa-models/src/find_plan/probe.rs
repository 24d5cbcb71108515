//! Response loss of a plan, and of many plans that differ from it in one layer, without running the
//! layers below that one again. Items that begin alike, as questions about one text do, share what
//! they have in common.

use moa_core::{Append, LayerLayout, Plan, SparseAttentionBackend};

use crate::decoder::model::Decoder;
use crate::device::Math;
use crate::find_plan::objective::cross_entropy;
use crate::find_plan::profile::Item;
use crate::{Error, Result};

/// Items under one plan: a chunk of what they share, then a chunk with the rest of each.
struct Pass<'a, D: Math> {
    items: &'a [Item],
    capacity: usize,
    /// Tokens that all items begin with; 0 or most of each.
    shared: usize,
    /// `None` if nothing is shared.
    shared_rotations: Option<D::Rotations>,
    rest_rotations: D::Rotations,
    /// Rows of the rest that predict responses.
    rows: Vec<usize>,
}

/// Hidden states of a pass.
#[derive(Clone)]
struct Hidden<T> {
    shared: Option<T>,
    rest: T,
}

/// Consecutive items that share at least three quarters of their tokens.
pub(crate) fn groups(items: &[Item]) -> impl Iterator<Item = &[Item]> {
    items.chunk_by(|a, b| {
        let most = a.inputs().len().max(b.inputs().len());
        4 * common_prefix(a, b) >= 3 * most
    })
}

/// Tokens that two prompts begin with alike; a last row of each is left to ask.
pub(crate) fn common_prefix(a: &Item, b: &Item) -> usize {
    let equal = a.prompt().iter().zip(b.prompt()).take_while(|(a, b)| a == b).count();
    equal.min(a.prompt().len() - 1).min(b.prompt().len() - 1)
}

impl<D: Math> Decoder<D> {
    /// Mean cross entropy of items' responses, in nats per token, in sequences opened for
    /// `capacity` tokens: the mean over items of each one's mean. Consecutive items that begin alike
    /// are computed together.
    ///
    /// # Errors
    /// [`Error::Invalid`] if `items` is empty, [`Error::Core`] with
    /// [`ShapeMismatch`](moa_core::Error::ShapeMismatch) if the plan is for a model of other
    /// dimensions, [`Error::ContextExceeded`] if an item is longer than `capacity`, or `capacity`
    /// than the model's context; [`Error::OutOfMemory`] or [`Error::Backend`] if the device fails.
    pub fn response_loss(&self, items: &[Item], plan: &Plan, capacity: usize) -> Result<f64> {
        Ok(self.variant_losses(items, plan, &[], capacity)?.0)
    }

    /// [`Decoder::response_loss`] of `plan`, and of each of `variants`: plans that differ from it only
    /// in the layer given.
    pub(crate) fn variant_losses(
        &self,
        items: &[Item],
        plan: &Plan,
        variants: &[(usize, Plan)],
        capacity: usize,
    ) -> Result<(f64, Vec<f64>)> {
        if items.is_empty() {
            return Err(Error::invalid("items", "at least one", 0));
        }
        let (mut base, mut losses) = (0.0, vec![0.0; variants.len()]);
        for group in groups(items) {
            let pass = self.pass(group, plan, capacity)?;
            let mut inputs = Vec::with_capacity(self.layers.len());
            let x = self.embed_pass(&pass)?;
            let keep = (!variants.is_empty()).then_some(&mut inputs);
            base += self.upwards(&pass, plan, 0, x, keep)?;
            for (loss, (layer, variant)) in losses.iter_mut().zip(variants) {
                *loss += self.upwards(&pass, variant, *layer, inputs[*layer].clone(), None)?;
            }
        }
        let count = items.len() as f64;
        losses.iter_mut().for_each(|loss| *loss /= count);
        Ok((base / count, losses))
    }

    fn pass<'a>(&self, items: &'a [Item], plan: &Plan, capacity: usize) -> Result<Pass<'a, D>> {
        plan.check_shape(&self.shape())?;
        let tokens = items.iter().map(|item| item.inputs().len()).max().unwrap_or(0);
        if tokens > capacity {
            return Err(Error::ContextExceeded { asked: tokens, limit: capacity });
        }
        let shared = match items.split_first() {
            Some((first, others)) if !others.is_empty() => {
                others.iter().map(|item| common_prefix(first, item)).min().unwrap_or(0)
            }
            _ => 0,
        };
        let table = self.rope(capacity)?;
        let shared_rotations = match shared {
            0 => None,
            _ => Some(self.device.rotations(&[(&table, 0..shared)])?),
        };
        let rests: Vec<_> = items.iter().map(|i| (&table, shared..i.inputs().len())).collect();
        let rest_rotations = self.device.rotations(&rests)?;
        let mut rows = Vec::new();
        let mut before = 0;
        for item in items {
            rows.extend(item.rows().map(|row| before + row - shared));
            before += item.inputs().len() - shared;
        }
        Ok(Pass { items, capacity, shared, shared_rotations, rest_rotations, rows })
    }

    fn embed_pass(&self, pass: &Pass<'_, D>) -> Result<Hidden<D::Tensor>> {
        let embed = |ids: &[u32]| self.device.embed(&self.embedding, ids);
        let shared = match pass.shared {
            0 => None,
            n => Some(embed(&pass.items[0].inputs()[..n])?),
        };
        let rest: Vec<&[u32]> = pass.items.iter().map(|i| &i.inputs()[pass.shared..]).collect();
        Ok(Hidden { shared, rest: embed(&rest.concat())? })
    }

    /// Runs layers from `first` up on their input `x`; `keep` collects every layer's input. Returns
    /// the sum of the items' losses.
    fn upwards(
        &self,
        pass: &Pass<'_, D>,
        plan: &Plan,
        first: usize,
        mut x: Hidden<D::Tensor>,
        mut keep: Option<&mut Vec<Hidden<D::Tensor>>>,
    ) -> Result<f64> {
        let (device, attention) = (&self.device, self.device.attention());
        let plan = self.own_plan(plan)?;
        let counts: Vec<usize> =
            pass.items.iter().map(|i| i.inputs().len() - pass.shared).collect();
        for (index, layer) in self.layers.iter().enumerate().skip(first) {
            if let Some(keep) = &mut keep {
                keep.push(x.clone());
            }
            let is_top = index + 1 == self.layers.len();
            let spans = plan.layer_spans(index, pass.capacity);
            let layout = LayerLayout::new(&spans, pass.capacity, 0)?;
            let mut cache = self.open_cache(&layout)?;
            if let (Some(shared), Some(rotations)) = (x.shared.take(), &pass.shared_rotations) {
                let mut attend = |qkv| {
                    let batch = &mut [Append { cache: &mut cache, tokens: pass.shared }];
                    Ok(self.extend(attention, batch, qkv, rotations, false)?.out)
                };
                // Nothing reads these rows of the top layer but the keys and values.
                match is_top {
                    true => drop(attend(self.qkv(layer, &shared)?)?),
                    false => x.shared = Some(self.block(layer, shared, attend)?),
                }
            }
            let mut caches = Vec::with_capacity(counts.len());
            for _ in 1..counts.len() {
                caches.push(attention.fork(&cache).map_err(Into::into)?);
            }
            caches.push(cache);
            let appends = caches.iter_mut().zip(&counts);
            let mut appends: Vec<_> =
                appends.map(|(cache, &tokens)| Append { cache, tokens }).collect();
            let mut attend = |qkv| {
                let rotations = &pass.rest_rotations;
                Ok(self.extend(attention, &mut appends, qkv, rotations, false)?.out)
            };
            x.rest = match is_top {
                true => {
                    let out = attend(self.qkv(layer, &x.rest)?)?;
                    let (x, out) =
                        (device.rows(&x.rest, &pass.rows)?, device.rows(&out, &pass.rows)?);
                    self.finish_block(layer, x, out)?
                }
                false => self.block(layer, x.rest, attend)?,
            };
        }
        let h = device.rms_norm(&x.rest, &self.norm, self.eps())?;
        let logits = self.values(self.output(&h)?)?;
        let mut rows = logits.chunks(self.config.vocab_size);
        let losses = pass.items.iter().map(|item| {
            let response = item.response();
            let loss = |(row, y): (&[f32], &u32)| cross_entropy(row, *y as usize);
            rows.by_ref().zip(response).map(loss).sum::<f64>() / response.len() as f64
        });
        Ok(losses.sum())
    }
}
