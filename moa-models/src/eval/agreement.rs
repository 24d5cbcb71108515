use moa_core::Plan;
use rayon::prelude::*;
use serde::Serialize;

use crate::checkpoint::Checkpoint;
use crate::decoder::logits::{LogitRows, check_logits, likeliest};
use crate::decoder::model::Decoder;
use crate::decoder::sequence::Sequence;
use crate::device::Math;
use crate::evict::{Eviction, EvictionKind, Method};
use crate::find_plan::objective::{divergence, log_sum_exp};
use crate::find_plan::probe::{common_prefix, groups};
use crate::find_plan::profile::Item;
use crate::progress::{Progress, Stage};
use crate::{Error, Result};

/// How near a plan's predictions of the next token are to dense attention's, on the same tokens.
///
/// Both read the same text, so that a token that one of them would not have chosen does not part
/// them for good.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Agreement {
    /// Tokens predicted.
    pub tokens: usize,
    /// Share of the tokens for which the likeliest token is the same.
    pub equal_greedy: f64,
    /// Mean over tokens of the Kullback-Leibler divergence `KL(dense || plan)`, in nats.
    pub kl_mean: f64,
    /// The divergence that the worst 1 % of tokens reach or exceed, in nats: its 99th percentile.
    pub kl_p99: f64,
    /// Mean divergence of these worst 1 % of tokens, in nats; of fewer than 100 tokens, that of the worst.
    pub kl_worst: f64,
    /// Perplexity under dense attention.
    pub dense_perplexity: f64,
    /// Perplexity under the plan.
    pub plan_perplexity: f64,
    /// `plan_perplexity / dense_perplexity`.
    pub perplexity_ratio: f64,
    /// Keys kept / context length.
    pub density: f64,
    /// Bytes of keys and values that a sequence held under the plan.
    pub kv_bytes: u64,
    /// The same under dense attention.
    pub kv_bytes_dense: u64,
}

/// One token's predictions.
struct Compared {
    is_equal: bool,
    /// Cross entropies.
    dense: f64,
    plan: f64,
    divergence: f32,
}

impl Compared {
    /// Of a token's logits under dense attention and under the plan.
    fn new(dense: &[f32], plan: &[f32], target: usize) -> Result<Self> {
        check_logits(dense)?;
        check_logits(plan)?;
        let sums = (log_sum_exp(dense), log_sum_exp(plan));
        Ok(Self {
            is_equal: likeliest(dense).0 == likeliest(plan).0,
            dense: sums.0 - f64::from(dense[target]),
            plan: sums.1 - f64::from(plan[target]),
            divergence: divergence(dense, plan, sums) as f32,
        })
    }
}

/// What is summed over tokens for one plan.
#[derive(Clone, Debug, Default)]
struct Tally {
    equal: usize,
    /// Sums of cross entropies.
    dense: f64,
    plan: f64,
    /// Of every token: 4 bytes each, where its logits would take megabytes.
    divergences: Vec<f32>,
    kv_bytes: u64,
}

impl<D: Math> Decoder<D> {
    /// Agreement of a plan with dense attention over the responses of some items, such as the
    /// answers of calibration prompts or the windows of a text ([`Item::windows`]), in sequences
    /// opened for `capacity` tokens.
    ///
    /// # Errors
    /// As [`agreements`](Self::agreements).
    pub fn agreement(
        &self,
        items: &[Item],
        plan: &Plan,
        capacity: usize,
        progress: &mut dyn Progress,
    ) -> Result<Agreement> {
        let missing = || Error::invalid("plans", "one agreement each", "none");
        self.agreements(items, &[plan], capacity, progress)?.pop().ok_or_else(missing)
    }

    /// [`agreement`](Self::agreement) of several plans, for which dense attention is computed once.
    ///
    /// Logits are compared a chunk of tokens at a time and then dropped. Consecutive items that begin
    /// alike are read once up to where they part.
    ///
    /// # Errors
    /// [`Error::Invalid`] if there is no item, [`Error::ContextExceeded`] if an item is longer than
    /// `capacity`, or `capacity` than the model's context, [`Error::Core`] with
    /// [`ShapeMismatch`](moa_core::Error::ShapeMismatch) if a plan is for a model of other
    /// dimensions, [`Error::Logits`] if a logit is not a number, [`Error::Cancelled`];
    /// [`Error::OutOfMemory`] or [`Error::Backend`] if the device fails.
    pub fn agreements(
        &self,
        items: &[Item],
        plans: &[&Plan],
        capacity: usize,
        progress: &mut dyn Progress,
    ) -> Result<Vec<Agreement>> {
        let longest = items.iter().map(|item| item.inputs().len()).max();
        let longest = longest.ok_or_else(|| Error::invalid("items", "at least one", 0))?;
        if longest > capacity {
            return Err(Error::ContextExceeded { asked: longest, limit: capacity });
        }
        let dense = Plan::full(self.shape())?;
        let mut tallies = vec![Tally::default(); plans.len()];
        let mut done = 0;
        for group in groups(items) {
            let shared = shared_tokens(group);
            let mut read = std::iter::once(&dense)
                .chain(plans.iter().copied())
                .map(|plan| self.open(plan, capacity, 0))
                .collect::<Result<Vec<_>>>()?;
            self.read_unseen(&mut read, &group[0].inputs()[..shared])?;
            for (index, item) in group.iter().enumerate() {
                let mut own = match index + 1 == group.len() {
                    true => std::mem::take(&mut read),
                    false => read.iter().map(|s| self.fork(s)).collect::<Result<_>>()?,
                };
                let rows = item.rows();
                self.read_unseen(&mut own, &item.inputs()[shared..rows.start])?;
                self.compare(&mut own, item, &mut tallies)?;
                done += 1;
                progress.advance(Stage::Evaluate, done, items.len())?;
            }
        }
        let kv_bytes_dense = self.dense_bytes(capacity)?;
        let report = |(tally, plan): (Tally, &&Plan)| {
            let density = self.config().windowed(plan)?.density(capacity);
            Ok(tally.report(density, kv_bytes_dense))
        };
        tallies.into_iter().zip(plans).map(report).collect()
    }

    /// Appends tokens to every sequence, without logits.
    fn read_unseen(&self, sequences: &mut [Sequence<D>], tokens: &[u32]) -> Result<()> {
        for chunk in tokens.chunks(READ_CHUNK) {
            for sequence in sequences.iter_mut() {
                self.forward(&mut [sequence], &[chunk], LogitRows::None)?;
            }
        }
        Ok(())
    }

    /// Compares the predictions of an item's response: dense attention is the first sequence.
    fn compare(
        &self,
        sequences: &mut [Sequence<D>],
        item: &Item,
        tallies: &mut [Tally],
    ) -> Result<()> {
        let Some((dense, others)) = sequences.split_first_mut() else { return Ok(()) };
        let (vocab, rows) = (self.config().vocab_size, item.rows());
        let chunk = self.logit_chunk();
        let inputs = item.inputs()[rows].chunks(chunk);
        for (inputs, targets) in inputs.zip(item.response().chunks(chunk)) {
            let expected = self.all_logits(dense, inputs)?;
            for (sequence, tally) in others.iter_mut().zip(&mut *tallies) {
                let got = self.all_logits(sequence, inputs)?;
                let rows = expected.par_chunks(vocab).zip(got.par_chunks(vocab)).zip(targets);
                let tokens = rows.map(|((expected, got), target)| {
                    Compared::new(expected, got, *target as usize)
                });
                tokens.collect::<Result<Vec<_>>>()?.into_iter().for_each(|token| tally.add(token));
            }
        }
        for (sequence, tally) in others.iter().zip(tallies) {
            tally.kv_bytes = self.kv_bytes(sequence);
        }
        Ok(())
    }
}

impl Item {
    /// The same tokens, of which the last `predicted` are the response.
    ///
    /// # Errors
    /// [`Error::Invalid`] if that leaves no prompt or no response.
    pub fn continued(&self, predicted: usize) -> Result<Self> {
        let tokens = self.tokens();
        match tokens.len().checked_sub(predicted).filter(|read| *read > 0 && predicted > 0) {
            Some(read) => Self::new(&tokens[..read], &tokens[read..]),
            None => {
                let expected = format!("at least 1 and less than {} tokens", tokens.len());
                Err(Error::invalid("continuation", expected, predicted))
            }
        }
    }
}

impl<D: Math> Checkpoint<D> {
    /// [`Decoder::agreement`] of a rival of plans that evicts keys: dense attention reads each item's prompt but its
    /// last token, some keys are kept, and the response is predicted from those. Slots of kept keys and of the
    /// response are the eviction's share of the item.
    ///
    /// # Errors
    /// As [`Decoder::agreement`]; [`Error::Invalid`] also if the eviction waits for a question, which texts do not
    /// have, a prompt has fewer than 2 tokens, the density leaves room for no key beside the response, or the model
    /// is one rank's part or has sliding windows shorter than the item; [`Error::ContextExceeded`] also if there
    /// is no room to repeat the prompt for KVzip.
    pub fn agreement_evicting(
        &self,
        items: &[Item],
        eviction: &Eviction,
        progress: &mut dyn Progress,
    ) -> Result<Agreement> {
        if eviction.before_question {
            return Err(Error::invalid(
                "eviction",
                "one after the prompt: running text has no question",
                "one before the question",
            ));
        }
        let model = &self.model;
        let dense = Plan::full(model.shape())?;
        let mut tally = vec![Tally::default()];
        let (mut kv_bytes, mut kv_bytes_all, mut kv_bytes_dense) = (0, 0, 0);
        for (done, item) in (1..).zip(items) {
            let (inputs, read) = (item.inputs(), item.rows().start);
            if read == 0 {
                return Err(Error::invalid("prompt", "at least 2 tokens, to evict of", 1));
            }
            let kept = eviction.budget(read, inputs.len())?;
            let repeats;
            let method = match eviction.kind {
                EvictionKind::SnapKv => Method::SnapKv,
                EvictionKind::AdaKv => Method::AdaKv,
                EvictionKind::KvZip => {
                    repeats = self.repeats(&inputs[..read])?;
                    Method::KvZip(&repeats)
                }
            };
            let mut exact = [model.open(&dense, inputs.len(), 0)?];
            model.read_unseen(&mut exact, &inputs[..read])?;
            let room = inputs.len() - read;
            let (rival, _) = model.prefill_evicting(&inputs[..read], room, kept, &method)?;
            let [exact] = exact;
            model.compare(&mut [exact, rival], item, &mut tally)?;
            kv_bytes += tally[0].kv_bytes;
            kv_bytes_all += model.unevicted_bytes(inputs.len())?;
            kv_bytes_dense += model.dense_bytes(inputs.len())?;
            progress.advance(Stage::Evaluate, done, items.len())?;
        }
        let count = items.len() as u64;
        let mut tally = tally.pop().filter(|_| count > 0);
        let tally = tally.as_mut().ok_or_else(|| Error::invalid("items", "at least one", 0))?;
        tally.kv_bytes = kv_bytes / count;
        let density = kv_bytes as f64 / kv_bytes_all.max(1) as f64;
        Ok(std::mem::take(tally).report(density, kv_bytes_dense / count))
    }

    /// The windows of a text ([`Item::windows`]), each of which begins with the model's
    /// begin-of-sequence token, if it has one.
    ///
    /// # Errors
    /// [`Error::Tokenizer`] if the tokenizer refuses the text; those of [`Item::windows`].
    pub fn text_windows(&self, text: &str, length: usize, windows: usize) -> Result<Vec<Item>> {
        let tokens = self.tokenizer.encode(text, false)?;
        Item::windows(&tokens, self.model.config().bos_token_id, length, windows)
    }
}

/// Tokens per step where no logits are wanted.
const READ_CHUNK: usize = 512;

/// Tokens that all items of a group begin with; 0 for one item.
fn shared_tokens(group: &[Item]) -> usize {
    let pairs = group.iter().skip(1).map(|item| common_prefix(&group[0], item));
    pairs.min().unwrap_or(0)
}

impl Tally {
    fn add(&mut self, token: Compared) {
        self.dense += token.dense;
        self.plan += token.plan;
        self.equal += usize::from(token.is_equal);
        self.divergences.push(token.divergence);
    }

    fn report(mut self, density: f64, kv_bytes_dense: u64) -> Agreement {
        let tokens = self.divergences.len();
        self.divergences.sort_unstable_by(f32::total_cmp);
        // Where there are fewer than 100 tokens, the worst one.
        let worst = tokens - (tokens / 100).max(1);
        let sum = |of: &[f32]| of.iter().map(|kl| f64::from(*kl)).sum::<f64>();
        let mean = |sum: f64| sum / tokens as f64;
        let (dense, plan) = (mean(self.dense), mean(self.plan));
        Agreement {
            tokens,
            equal_greedy: mean(self.equal as f64),
            kl_mean: mean(sum(&self.divergences)),
            kl_p99: f64::from(self.divergences[worst]),
            kl_worst: sum(&self.divergences[worst..]) / (tokens - worst) as f64,
            dense_perplexity: dense.exp(),
            plan_perplexity: plan.exp(),
            perplexity_ratio: (plan - dense).exp(),
            density,
            kv_bytes: self.kv_bytes,
            kv_bytes_dense,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tally(rows: &[(&[f32], &[f32], usize)]) -> Tally {
        let mut tally = Tally::default();
        rows.iter().for_each(|(dense, plan, target)| {
            tally.add(Compared::new(dense, plan, *target).unwrap());
        });
        tally
    }

    #[test]
    fn divergence_is_that_of_the_two_distributions() {
        // p = (1/2, 1/4, 1/4), q = (1/4, 1/4, 1/2): KL = ln 2 / 2 - ln 2 / 4.
        let (p, q) = ([2f32, 1.0, 1.0], [1f32, 1.0, 2.0]);
        let (p, q) = (p.map(f32::ln), q.map(|x| x.ln() + 3.0));
        let report = tally(&[(&p, &q, 0)]).report(0.5, 8);
        assert!((report.kl_mean - 2f64.ln() / 4.0).abs() < 1e-6, "{report:?}");
        assert_eq!((report.tokens, report.equal_greedy), (1, 0.0));
        assert!((report.dense_perplexity - 2.0).abs() < 1e-6);
        assert!((report.plan_perplexity - 4.0).abs() < 1e-6);
        assert!((report.perplexity_ratio - 2.0).abs() < 1e-6);
        // The same distribution by other logits, and a token that neither can choose.
        let inf = f32::NEG_INFINITY;
        let report = tally(&[(&p, &p.map(|z| z - 5.0), 1), (&[0.0, inf], &[0.0, inf], 0)]);
        let report = report.report(1.0, 8);
        assert!(report.kl_mean < 1e-6 && report.equal_greedy == 1.0, "{report:?}");
        let broken = Compared::new(&[0.0, f32::NAN], &[0.0, 0.0], 0);
        assert!(matches!(broken, Err(Error::Logits { .. })));
    }

    #[test]
    fn the_worst_hundredth_has_a_least_and_a_mean() {
        for (tokens, reached, mean) in [
            (1, 0.0, 0.0),
            (99, 98.0, 98.0),
            (100, 99.0, 99.0),
            (200, 198.0, 198.5),
            (250, 248.0, 248.5),
            (300, 297.0, 298.0),
        ] {
            let divergences = (0..tokens).map(|kl| kl as f32).rev().collect();
            let report = Tally { divergences, ..Tally::default() }.report(1.0, 0);
            assert_eq!((report.kl_p99, report.kl_worst), (reached, mean), "{tokens}");
        }
    }
}
