//! Response loss of a plan, and of many plans that differ from it in one layer. Items that begin alike, as questions
//! about one text do, share what they have in common, and an item's own shared part is what stands before its question.
//! A plan that differs in one layer leaves all other layers' keys and values of what is shared as they are: the rest
//! alone is read again, from that layer up. Of the tokens before the first prediction a layer computes those alone that the
//! layers above it see from there: above the last head that sees far, these are few.

use moa_core::{Append, Plan, SparseAttentionBackend};
use rayon::prelude::*;

use crate::decoder::block::Cache;
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

/// What a layer read under a plan: its input, and keys and values of what is shared.
struct Read<D: Math> {
    x: Hidden<D::Tensor>,
    cache: Cache<D>,
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

/// Tokens that items begin with alike, all of them before the `first` row that is asked for.
fn shared_tokens(items: &[Item], first: usize) -> usize {
    match items {
        // Enough rows after it for the kernels of many.
        [one] => one.inputs().len().saturating_sub(REST).min(first),
        [one, others @ ..] => others.iter().map(|item| common_prefix(one, item)).min().unwrap_or(0),
        [] => 0,
    }
}

/// Work in tokens that go through all layers: of measuring a plan, and of one of its variants in the mean over layers.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Work {
    pub(crate) plan: f64,
    pub(crate) variant: f64,
}

impl Work {
    /// Of items that begin alike.
    pub(crate) fn of_responses(items: &[Item], layers: usize) -> Self {
        let first = items.iter().map(|item| item.rows().start).min().unwrap_or(0);
        Self::new(items, first, layers)
    }

    pub(crate) fn of_text(text: &Text, layers: usize) -> Self {
        let first = text_rows(&text.item).first().copied().unwrap_or(0);
        Self::new(std::slice::from_ref(&text.item), first, layers)
    }

    fn new(items: &[Item], first: usize, layers: usize) -> Self {
        let shared = shared_tokens(items, first);
        let rest: usize = items.iter().map(|item| item.inputs().len() - shared).sum();
        let (shared, rest) = (shared as f64, rest as f64);
        // A variant reads what is shared in one layer, and the rest from there up.
        Self { plan: shared + rest, variant: shared / layers.max(1) as f64 + 0.5 * rest }
    }
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
    /// in the layer given. To a variant's other layers what is shared is what `plan` makes of it.
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
                let dense_logits = self.upwards(&pass, &dense, x, &tails, None)?;
                let rows = dense_logits.par_chunks(self.config.vocab_size);
                let dense_sums = rows.map(log_sum_exp).collect();
                Ok(Text { item: item.clone(), dense_logits, dense_sums })
            })
            .collect()
    }

    /// Mean Kullback-Leibler divergence, in nats per token, of the predictions under `plan` from the
    /// dense model's, and those of each of `variants`, as [`variant_losses`](Self::variant_losses) has them; what is
    /// shared is the first half of a text. It is measured without the noise of labels, so that single heads can be told apart.
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
        let mut of_variants = Vec::with_capacity(variants.len());
        for (layer, variant) in variants {
            of_variants.push(pass.tail(pass.shared, self.window(pass, variant, *layer)?));
        }
        // What the plan's own run keeps is enough for each variant.
        let mut kept = self.tails(pass, plan)?;
        for layer in (0..self.layers.len()).rev() {
            let tail = pass.tail(kept[layer + 1], self.window(pass, plan, layer)?);
            let of_layer = variants.iter().zip(&of_variants).filter(|((at, _), _)| *at == layer);
            kept[layer] = of_layer.fold(tail, |least, (_, tail)| least.min(*tail));
        }
        let mut read = Vec::with_capacity(self.layers.len());
        let keep = (!variants.is_empty()).then_some(&mut read);
        let x = self.embed_pass(pass, kept[0])?;
        let base = loss(&self.upwards(pass, plan, x, &kept, keep)?);
        for ((sum, (layer, variant)), tail) in losses.iter_mut().zip(variants).zip(of_variants) {
            let logits =
                self.variant_logits(pass, (*layer, variant), &read, (kept[*layer], tail))?;
            *sum += loss(&logits);
        }
        Ok(base)
    }

    /// Logits of a pass's rows under a plan changed in a layer. `read` is what the plan left in each layer; that of the
    /// changed one has the rows from `kept` on, of which those from `tail` on are needed.
    fn variant_logits(
        &self,
        pass: &Pass<'_, D>,
        (changed, variant): (usize, &Plan),
        read: &[Read<D>],
        (kept, tail): (usize, usize),
    ) -> Result<Vec<f32>> {
        let attention = self.device.attention();
        let variant = self.own_plan(variant)?;
        let Hidden { shared, rest } = &read[changed].x;
        let shared = match (shared, pass.kept(kept, tail)) {
            (Some(shared), Some(rows)) => Some(self.device.rows(shared, &rows)?),
            (shared, _) => shared.clone(),
        };
        let (cache, _) =
            self.read_shared(pass, &variant, changed, shared, (tail, None), &mut None)?;
        let mut rest = self.read_rest(pass, changed, rest.clone(), cache)?;
        for (index, above) in read.iter().enumerate().skip(changed + 1) {
            let cache = attention.fork(&above.cache).map_err(Into::into)?;
            rest = self.read_rest(pass, index, rest, cache)?;
        }
        self.asked_logits(&rest)
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
        let shared = shared_tokens(items, first);
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

    /// Runs all layers on `x`, whose tails begin where `tails` says; `keep` collects what each layer read. Returns
    /// logits `[rows, vocab]` of the pass's rows.
    fn upwards(
        &self,
        pass: &Pass<'_, D>,
        plan: &Plan,
        mut x: Hidden<D::Tensor>,
        tails: &[usize],
        mut keep: Option<&mut Vec<Read<D>>>,
    ) -> Result<Vec<f32>> {
        let plan = self.own_plan(plan)?;
        let mut rotations = None;
        for index in 0..self.layers.len() {
            let input = keep.as_ref().map(|_| x.clone());
            // Nothing reads the shared rows of the top layer but its keys and values.
            let next = (index + 1 < self.layers.len()).then(|| tails[index + 1]);
            let ends = (tails[index], next);
            let (cache, shared) =
                self.read_shared(pass, &plan, index, x.shared, ends, &mut rotations)?;
            if let (Some(keep), Some(x)) = (&mut keep, input) {
                let cache = self.device.attention().fork(&cache).map_err(Into::into)?;
                keep.push(Read { x, cache });
            }
            x = Hidden { shared, rest: self.read_rest(pass, index, x.rest, cache)? };
        }
        self.asked_logits(&x.rest)
    }

    /// A layer's cache with what is shared, `x` being the layer's input from `tail` on; and what the layer makes of it
    /// from `next` on, unless that is `None`. `rotations` are the last layer's, which this one's often are.
    ///
    /// To attention the sinks' rows and those of the tail are one sequence. Distances in the tail are what they are
    /// in the whole one, and rows whose windows would begin before it are left out of the layer's output.
    fn read_shared(
        &self,
        pass: &Pass<'_, D>,
        plan: &Plan,
        index: usize,
        x: Option<D::Tensor>,
        (tail, next): (usize, Option<usize>),
        rotations: &mut Option<(usize, Rotations<D>)>,
    ) -> Result<(Cache<D>, Option<D::Tensor>)> {
        let (device, attention, layer) =
            (&self.device, self.device.attention(), &self.layers[index]);
        let mut cache = self.open_cache(&plan.layout(index, pass.capacity, 0)?)?;
        let Some(x) = x else { return Ok((cache, None)) };
        let rotations = match rotations.take().filter(|(of, _)| *of == tail) {
            Some(known) => &rotations.insert(known).1,
            None => {
                let table = &pass.table;
                let positions = [(table, 0..pass.sinks), (table, tail..pass.shared)];
                let positions: Vec<_> =
                    positions.into_iter().filter(|(_, rows)| !rows.is_empty()).collect();
                &rotations.insert((tail, self.rotations(&positions)?)).1
            }
        };
        let tokens = pass.sinks + pass.shared - tail;
        let batch = &mut [Append { cache: &mut cache, tokens }];
        let qkv = self.qkv(layer, &x)?;
        let out = self.extend(layer, attention, batch, qkv, rotations, false)?.out;
        let Some(next) = next else { return Ok((cache, None)) };
        let (x, out) = match pass.kept(tail, next) {
            None => (x, out),
            Some(rows) => (device.rows(&x, &rows)?, device.rows(&out, &rows)?),
        };
        Ok((cache, Some(self.finish_block(layer, x, out)?)))
    }

    /// What a layer makes of the rest of each item, `cache` being what it has of the tokens before them; of the top
    /// layer at the rows that are asked for.
    fn read_rest(
        &self,
        pass: &Pass<'_, D>,
        index: usize,
        x: D::Tensor,
        cache: Cache<D>,
    ) -> Result<D::Tensor> {
        let (device, attention, layer) =
            (&self.device, self.device.attention(), &self.layers[index]);
        let counts = pass.items.iter().map(|item| item.inputs().len() - pass.shared);
        let mut caches = Vec::with_capacity(pass.items.len());
        for _ in 1..pass.items.len() {
            caches.push(attention.fork(&cache).map_err(Into::into)?);
        }
        caches.push(cache);
        let appends = caches.iter_mut().zip(counts);
        let mut appends: Vec<_> = appends.map(|(cache, tokens)| Append { cache, tokens }).collect();
        let rotations = &pass.rest_rotations;
        let qkv = self.qkv(layer, &x)?;
        let out = self.extend(layer, attention, &mut appends, qkv, rotations, false)?.out;
        let (x, out) = match index + 1 == self.layers.len() {
            true => (device.rows(&x, &pass.rows)?, device.rows(&out, &pass.rows)?),
            false => (x, out),
        };
        self.finish_block(layer, x, out)
    }

    fn asked_logits(&self, x: &D::Tensor) -> Result<Vec<f32>> {
        let h = self.device.rms_norm(x, &self.norm, self.eps())?;
        self.values(self.output(&h)?)
    }
}

#[cfg(test)]
mod tests {
    use moa_core::ElasticRule;

    use super::*;
    use crate::checkpoint::Checkpoint;
    use crate::device::Device;
    use crate::device::cpu::Cpu;

    /// Loss of an item under a plan changed in a layer: each layer above it reads the tokens before `shared` as the plan
    /// leaves them, all in one sequence.
    fn naive(
        model: &Decoder<Cpu>,
        item: &Item,
        (plan, changed): (&Plan, (usize, &Plan)),
        (shared, capacity): (usize, usize),
    ) -> Result<f64> {
        let (device, tokens) = (&model.device, item.inputs());
        let rotations = model.rotations(&[(&model.rope(capacity)?, 0..tokens.len())])?;
        let [before, rest]: [Vec<usize>; 2] =
            [(0..shared).collect(), (shared..tokens.len()).collect()];
        let mut x = model.embed(tokens)?;
        let mut own = device.rows(&x, &rest)?;
        for (index, layer) in model.layers.iter().enumerate() {
            let block = |plan: &Plan, x| {
                let mut cache = model.open_cache(&plan.layout(index, capacity, 0)?)?;
                model.block(layer, x, |qkv| {
                    let batch = &mut [Append { cache: &mut cache, tokens: tokens.len() }];
                    Ok(model.extend(layer, device.attention(), batch, qkv, &rotations, false)?.out)
                })
            };
            let both = [device.rows(&x, &before)?, own].map(|x| device.values(x));
            let both = both.into_iter().collect::<Result<Vec<_>>>()?.concat();
            let both = device.tensor(both, &device.shape(&x))?;
            let plan_here = if index == changed.0 { changed.1 } else { plan };
            own = device.rows(&block(plan_here, both)?, &rest)?;
            x = block(plan, x)?;
        }
        let rows: Vec<usize> = item.rows().map(|row| row - shared).collect();
        let logits = model.asked_logits(&device.rows(&own, &rows)?)?;
        let rows = logits.chunks(model.config.vocab_size).zip(item.response()).zip(item.weights());
        Ok(rows.map(|((row, y), weight)| weight * cross_entropy(row, *y as usize)).sum())
    }

    // A variant may need more of the layer than its plan, or less.
    #[test]
    fn variants_read_what_is_shared_as_their_plan_leaves_it() -> Result<()> {
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
        let mut differs = false;
        for items in [&two[..], &two[..1]] {
            let (base, losses) = model.variant_losses(items, &plan, &variants, 800)?;
            assert!(is_near(base, model.response_loss(items, &plan, 800)?));
            let shared = shared_tokens(items, items[0].rows().start);
            for (loss, (layer, variant)) in losses.iter().zip(&variants) {
                let mut expected = 0.0;
                for item in items {
                    let plans = (&plan, (*layer, variant));
                    expected += naive(&model, item, plans, (shared, 800))? / items.len() as f64;
                }
                assert!(is_near(*loss, expected), "layer {layer}: {loss}, {expected}");
                let whole = model.response_loss(items, variant, 800)?;
                differs |= !is_near(*loss, whole);
                // Nothing above the top layer reads what is shared.
                assert!(layer + 1 < model.shape().layers || is_near(*loss, whole));
            }
        }
        assert!(differs, "lower layers' changes reach what is shared of the layers above");
        let texts = model.texts(&two[..1], 800)?;
        let (_, of_text) = model.divergences(&texts, &plan, &variants, 800)?;
        for (divergence, (_, variant)) in of_text.iter().zip(&variants).rev().take(2) {
            assert!(is_near(*divergence, model.divergences(&texts, variant, &[], 800)?.0));
        }
        Ok(())
    }
}
