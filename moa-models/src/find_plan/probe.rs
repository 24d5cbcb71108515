//! Response loss of a plan, and of many plans that differ from it in one layer, without running the
//! layers below that one again. Items that begin alike, as questions about one text do, share what
//! they have in common. Of the tokens before the first prediction a layer computes those alone that the
//! layers above it see from there: above the last head that sees far, these are few.

use moa_core::{Append, Plan, SparseAttentionBackend};
use rayon::prelude::*;

use crate::decoder::model::Decoder;
use crate::decoder::rotations::Rotations;
use crate::device::Math;
use crate::device::rope_table::RopeTable;
use crate::find_plan::objective::{cross_entropy, divergence, log_sum_exp};
use crate::find_plan::profile::Item;
use crate::{Error, Result};

/// A running text with the dense model's predictions at some of its positions.
#[derive(Clone, Debug)]
pub(crate) struct Text {
    item: Item,
    /// `[rows, vocab]`.
    dense_logits: Vec<f32>,
    /// Logarithms of the rows' sums of exponentials.
    dense_sums: Vec<f64>,
}

/// Positions of a text that predictions are compared at, spread over its second half: logits of many
/// are large.
const TEXT_ROWS: usize = 64;

fn text_rows(item: &Item) -> Vec<usize> {
    let tokens = item.inputs().len();
    let (first, rows) = (tokens / 2, TEXT_ROWS.min(tokens - tokens / 2));
    (0..rows).map(|row| first + (row + 1) * (tokens - first) / rows - 1).collect()
}

/// Items under one plan: a chunk of what they share, then a chunk with the rest of each. Of the first, rows
/// `0..sinks` and those from a layer's tail on are computed.
struct Pass<'a, D: Math> {
    items: &'a [Item],
    capacity: usize,
    /// Tokens that all items begin with, before the first row that is asked for.
    shared: usize,
    /// Rows that any head's sink lies in, a multiple of [`TILE`] unless that is more than is shared.
    sinks: usize,
    table: RopeTable,
    rest_rotations: Rotations<D>,
    /// Rows of the rest whose logits are wanted.
    rows: Vec<usize>,
}

/// Tails begin at so many tokens' multiples after the sinks, where the CPU's tiles of keys do: left out rows then change
/// no bit of the others.
const TILE: usize = 128;

impl<D: Math> Pass<'_, D> {
    /// Where the rows begin that a layer's input needs, if its output needs those from `output` on and its longest
    /// window has `window` keys.
    fn tail(&self, output: usize, window: usize) -> usize {
        let seen = output.saturating_sub(window.saturating_sub(1)).saturating_sub(self.sinks);
        self.sinks + seen / TILE * TILE
    }

    /// The rows of hidden states that begin at `tail` which those that begin at `other` have too; `None` for all.
    fn kept(&self, tail: usize, other: usize) -> Option<Vec<usize>> {
        let rows = self.sinks + self.shared - tail;
        (other > tail).then(|| (0..self.sinks).chain(self.sinks + other - tail..rows).collect())
    }
}

/// Hidden states of a pass.
#[derive(Clone)]
struct Hidden<T> {
    /// `None` if nothing is shared.
    shared: Option<T>,
    rest: T,
}

/// Least tokens of the rest of an item that shares nothing with another.
const REST: usize = 64;

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

/// What was measured of a plan and of its variants, if all of it are numbers.
fn finite(
    what: &str,
    base: f64,
    variants: Vec<f64>,
    of: &[(usize, Plan)],
) -> Result<(f64, Vec<f64>)> {
    let bad = |got: f64, place: String| {
        Err(Error::NotFinite { what: format!("{what}{place}"), got: got.to_string() })
    };
    if !base.is_finite() {
        return bad(base, " of a plan".to_string());
    }
    match variants.iter().zip(of).find(|(value, _)| !value.is_finite()) {
        Some((value, (layer, _))) => bad(*value, format!(" of a plan changed in layer {layer}")),
        None => Ok((base, variants)),
    }
}

impl<D: Math> Decoder<D> {
    /// Mean cross entropy of items' responses, in nats per token, in sequences opened for
    /// `capacity` tokens: the mean over items of each one's mean, half of it by the tokens of its answer
    /// ([`Item::with_answer`]). Consecutive items that begin alike
    /// are computed together.
    ///
    /// # Errors
    /// [`Error::Invalid`] if `items` is empty or a token is not in the vocabulary, [`Error::NotFinite`] if the loss
    /// is no number, [`Error::Core`] with
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
        items.iter().try_for_each(|item| self.check_tokens(item.tokens()))?;
        let vocab = self.config.vocab_size;
        let (mut base, mut losses) = (0.0, vec![0.0; variants.len()]);
        for group in groups(items) {
            let rows: Vec<_> = group.iter().map(|item| item.rows().collect()).collect();
            let weights: Vec<f64> = group.iter().flat_map(Item::weights).collect();
            let pass = self.pass(group, &rows, plan, capacity)?;
            let loss = |logits: &[f32]| {
                let targets = group.iter().flat_map(Item::response).zip(&weights);
                let rows: Vec<_> = logits.chunks(vocab).zip(targets).collect();
                let loss = |(row, (y, weight)): &(&[f32], (&u32, &f64))| {
                    *weight * cross_entropy(row, **y as usize)
                };
                rows.par_iter().map(loss).collect::<Vec<f64>>().iter().sum::<f64>()
            };
            base += self.with_variants(&pass, plan, variants, loss, &mut losses)?;
        }
        let count = items.len() as f64;
        losses.iter_mut().for_each(|loss| *loss /= count);
        finite("response loss", base / count, losses, variants)
    }

    /// Texts with the dense model's predictions, for [`divergences`](Self::divergences), in sequences
    /// opened for `capacity` tokens.
    pub(crate) fn texts(&self, items: &[Item], capacity: usize) -> Result<Vec<Text>> {
        let dense = Plan::full(self.shape())?;
        items
            .iter()
            .map(|item| {
                let pass =
                    self.pass(std::slice::from_ref(item), &[text_rows(item)], &dense, capacity)?;
                let tails = self.tails(&pass, &dense)?;
                let x = self.embed_pass(&pass, tails[0])?;
                let dense_logits = self.upwards(&pass, &dense, 0, x, &tails, None)?;
                let rows = dense_logits.par_chunks(self.config.vocab_size);
                let dense_sums = rows.map(log_sum_exp).collect();
                Ok(Text { item: item.clone(), dense_logits, dense_sums })
            })
            .collect()
    }

    /// Mean Kullback-Leibler divergence, in nats per token, of the predictions under `plan` from the
    /// dense model's, and those of each of `variants`: plans that differ from it only in the layer
    /// given. It is measured without the noise of labels, so that single heads can be told apart.
    pub(crate) fn divergences(
        &self,
        texts: &[Text],
        plan: &Plan,
        variants: &[(usize, Plan)],
        capacity: usize,
    ) -> Result<(f64, Vec<f64>)> {
        if texts.is_empty() {
            return Err(Error::invalid("texts", "at least one", 0));
        }
        let vocab = self.config.vocab_size;
        let (mut base, mut all) = (0.0, vec![0.0; variants.len()]);
        for Text { item, dense_logits, dense_sums } in texts {
            let rows = text_rows(item);
            let count = rows.len() as f64;
            let pass = self.pass(std::slice::from_ref(item), &[rows], plan, capacity)?;
            let mean = |logits: &[f32]| {
                let dense = dense_logits.par_chunks(vocab).zip(dense_sums);
                let one = |((dense, sum), row): ((&[f32], &f64), &[f32])| {
                    divergence(dense, row, (*sum, log_sum_exp(row)))
                };
                let rows = dense.zip(logits.par_chunks(vocab));
                rows.map(one).collect::<Vec<f64>>().iter().sum::<f64>() / count
            };
            base += self.with_variants(&pass, plan, variants, mean, &mut all)?;
        }
        let count = texts.len() as f64;
        all.iter_mut().for_each(|divergence| *divergence /= count);
        finite("divergence on text", base / count, all, variants)
    }

    /// `loss` of a pass's logits under `plan`; adds those of `variants` to `losses`.
    fn with_variants(
        &self,
        pass: &Pass<'_, D>,
        plan: &Plan,
        variants: &[(usize, Plan)],
        loss: impl Fn(&[f32]) -> f64,
        losses: &mut [f64],
    ) -> Result<f64> {
        let own = self.tails(pass, plan)?;
        let mut of_variants = Vec::with_capacity(variants.len());
        for (layer, variant) in variants {
            of_variants.push(pass.tail(own[layer + 1], self.window(pass, variant, *layer)?));
        }
        // What the plan's own run keeps is enough for each variant.
        let mut kept = own.clone();
        for layer in (0..self.layers.len()).rev() {
            let tail = pass.tail(kept[layer + 1], self.window(pass, plan, layer)?);
            let of_layer = variants.iter().zip(&of_variants).filter(|((at, _), _)| *at == layer);
            kept[layer] = of_layer.fold(tail, |least, (_, tail)| least.min(*tail));
        }
        let mut inputs = Vec::with_capacity(self.layers.len());
        let keep = (!variants.is_empty()).then_some(&mut inputs);
        let x = self.embed_pass(pass, kept[0])?;
        let base = loss(&self.upwards(pass, plan, 0, x, &kept, keep)?);
        for ((sum, (layer, variant)), tail) in losses.iter_mut().zip(variants).zip(of_variants) {
            let mut tails = own.clone();
            tails[*layer] = tail;
            let Hidden { shared, rest } = &inputs[*layer];
            let shared = match (shared, pass.kept(kept[*layer], tail)) {
                (Some(shared), Some(rows)) => Some(self.device.rows(shared, &rows)?),
                (shared, _) => shared.clone(),
            };
            let x = Hidden { shared, rest: rest.clone() };
            *sum += loss(&self.upwards(pass, variant, *layer, x, &tails, None)?);
        }
        Ok(base)
    }

    /// Where the tails of the layers' inputs begin, and that of the top layer's output, which has none.
    fn tails(&self, pass: &Pass<'_, D>, plan: &Plan) -> Result<Vec<usize>> {
        let mut tails = vec![pass.shared; self.layers.len() + 1];
        for layer in (0..self.layers.len()).rev() {
            tails[layer] = pass.tail(tails[layer + 1], self.window(pass, plan, layer)?);
        }
        Ok(tails)
    }

    /// The longest window of a layer's heads.
    fn window(&self, pass: &Pass<'_, D>, plan: &Plan, layer: usize) -> Result<usize> {
        let spans = self.config.windowed(plan)?.layer_spans(layer, pass.capacity);
        Ok(spans.iter().map(|span| span.window()).max().unwrap_or(0))
    }

    /// `asked` are the rows of each item's inputs whose logits are wanted.
    fn pass<'a>(
        &self,
        items: &'a [Item],
        asked: &[Vec<usize>],
        plan: &Plan,
        capacity: usize,
    ) -> Result<Pass<'a, D>> {
        plan.check_shape(&self.shape())?;
        let tokens = items.iter().map(|item| item.inputs().len()).max().unwrap_or(0);
        if tokens > capacity {
            return Err(Error::ContextExceeded { asked: tokens, limit: capacity });
        }
        let first = asked.iter().flatten().copied().min().unwrap_or(0);
        let shared = match items.split_first() {
            Some((one, others)) if !others.is_empty() => {
                others.iter().map(|item| common_prefix(one, item)).min().unwrap_or(0)
            }
            // Enough rows after it for the kernels of many.
            _ => tokens.saturating_sub(REST).min(first),
        };
        let table = self.rope(capacity)?;
        let rests: Vec<_> = items.iter().map(|i| (&table, shared..i.inputs().len())).collect();
        let rest_rotations = self.rotations(&rests)?;
        let mut rows = Vec::new();
        let mut before = 0;
        for (item, asked) in items.iter().zip(asked) {
            rows.extend(asked.iter().map(|row| before + row - shared));
            before += item.inputs().len() - shared;
        }
        let sinks = plan.sink().next_multiple_of(TILE).min(shared);
        Ok(Pass { items, capacity, shared, sinks, table, rest_rotations, rows })
    }

    /// `tail` is that of the lowest layer's input.
    fn embed_pass(&self, pass: &Pass<'_, D>, tail: usize) -> Result<Hidden<D::Tensor>> {
        let shared = match pass.shared {
            0 => None,
            shared => {
                let tokens = pass.items[0].inputs();
                let tokens = [&tokens[..pass.sinks], &tokens[tail..shared]].concat();
                Some(self.embed(&tokens)?)
            }
        };
        let rest: Vec<&[u32]> = pass.items.iter().map(|i| &i.inputs()[pass.shared..]).collect();
        Ok(Hidden { shared, rest: self.embed(&rest.concat())? })
    }

    /// Runs layers from `first` up on their input `x`, whose tails begin where `tails` says; `keep` collects every
    /// layer's input. Returns logits `[rows, vocab]` of the pass's rows.
    ///
    /// To attention the sinks' rows and those of the tail are one sequence. Distances in the tail are what they are
    /// in the whole one, and rows whose windows would begin before it are left out of the layer's output.
    fn upwards(
        &self,
        pass: &Pass<'_, D>,
        plan: &Plan,
        first: usize,
        mut x: Hidden<D::Tensor>,
        tails: &[usize],
        mut keep: Option<&mut Vec<Hidden<D::Tensor>>>,
    ) -> Result<Vec<f32>> {
        let (device, attention) = (&self.device, self.device.attention());
        let plan = self.own_plan(plan)?;
        let counts: Vec<usize> =
            pass.items.iter().map(|i| i.inputs().len() - pass.shared).collect();
        let mut rotations: Option<(usize, Rotations<D>)> = None;
        for (index, layer) in self.layers.iter().enumerate().skip(first) {
            if let Some(keep) = &mut keep {
                keep.push(x.clone());
            }
            let is_top = index + 1 == self.layers.len();
            let mut cache = self.open_cache(&plan.layout(index, pass.capacity, 0)?)?;
            if let Some(shared) = x.shared.take() {
                let (tail, table) = (tails[index], &pass.table);
                let rotations = match rotations.take().filter(|(of, _)| *of == tail) {
                    Some(known) => &rotations.insert(known).1,
                    None => {
                        let positions = [(table, 0..pass.sinks), (table, tail..pass.shared)];
                        let positions: Vec<_> =
                            positions.into_iter().filter(|(_, rows)| !rows.is_empty()).collect();
                        &rotations.insert((tail, self.rotations(&positions)?)).1
                    }
                };
                let tokens = pass.sinks + pass.shared - tail;
                let batch = &mut [Append { cache: &mut cache, tokens }];
                let qkv = self.qkv(layer, &shared)?;
                let out = self.extend(layer, attention, batch, qkv, rotations, false)?.out;
                // Nothing reads these rows of the top layer but the keys and values.
                if !is_top {
                    let (shared, out) = match pass.kept(tail, tails[index + 1]) {
                        None => (shared, out),
                        Some(rows) => (device.rows(&shared, &rows)?, device.rows(&out, &rows)?),
                    };
                    x.shared = Some(self.finish_block(layer, shared, out)?);
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
                Ok(self.extend(layer, attention, &mut appends, qkv, rotations, false)?.out)
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
        self.values(self.output(&h)?)
    }
}

#[cfg(test)]
mod tests {
    use moa_core::ElasticRule;

    use super::*;
    use crate::checkpoint::Checkpoint;
    use crate::device::cpu::Cpu;

    // A variant may need more of the lower layers than its plan, or less.
    #[test]
    fn variants_lose_what_they_lose_as_plans() -> Result<()> {
        let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../assets/moa-tiny");
        let model = Checkpoint::open(Cpu::default(), folder)?.model;
        let tokens: Vec<u32> = (0..800).map(|i| 300 + i * i % 991).collect();
        let item = |at: usize| Item::new(&tokens[..at], &tokens[at..at + 20]);
        let two = [item(700)?, item(720)?];
        let rules = vec![ElasticRule::fixed(90).into(); model.shape().total_kv_heads()];
        let plan = Plan::new(model.shape(), 8, 24, rules)?;
        let plan = plan.with_rule(2, 0, ElasticRule::fixed(300).into())?;
        let mut variants = Vec::new();
        for layer in 0..model.shape().layers {
            for rule in [ElasticRule::FULL, ElasticRule::fixed(40)] {
                variants.push((layer, plan.clone().with_rule(layer, 1, rule.into())?));
            }
        }
        let is_near = |a: f64, b: f64| (a - b).abs() < 1e-4;
        for items in [&two[..], &two[..1]] {
            let (base, losses) = model.variant_losses(items, &plan, &variants, 800)?;
            assert!(is_near(base, model.response_loss(items, &plan, 800)?));
            for (loss, (_, variant)) in losses.iter().zip(&variants) {
                assert!(is_near(*loss, model.response_loss(items, variant, 800)?));
            }
        }
        let texts = model.texts(&two[..1], 800)?;
        let (_, of_text) = model.divergences(&texts, &plan, &variants, 800)?;
        for (loss, (_, variant)) in of_text.iter().zip(&variants) {
            assert!(is_near(*loss, model.divergences(&texts, variant, &[], 800)?.0));
        }
        Ok(())
    }
}
