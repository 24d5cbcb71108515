//! Speed and memory of a model under a plan.

use std::time::Instant;

use moa_core::{Influence, Plan};
use serde::Serialize;

use crate::decoder::model::Decoder;
use crate::decoder::sequence::Sequence;
use crate::decoder::shard::Shard;
use crate::device::{Backward, Math};
use crate::find_plan::objective::Objective;
use crate::find_plan::profile::Item;
use crate::{Error, Result};
use moa_core::SplitMix64;

/// One measurement of speed: lengths, batch and steps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BenchOptions {
    /// Tokens of every prompt.
    pub prompt: usize,
    /// Tokens that caches have room for beside the prompt.
    pub new_tokens: usize,
    /// Steps to time, in the middle of the new tokens; all of them if `None`. The bytes that a step
    /// reads grow with every token, so the middle is the average.
    pub steps: Option<usize>,
    /// Sequences that decode together.
    pub batch: usize,
    /// Prompt tokens per forward step.
    pub prefill_chunk: usize,
    /// Seed of the random tokens of the prompt.
    pub seed: u64,
}

impl Default for BenchOptions {
    fn default() -> Self {
        let (prompt, new_tokens, batch, prefill_chunk) = (1024, 64, 1, 2048);
        Self { prompt, new_tokens, steps: None, batch, prefill_chunk, seed: 0 }
    }
}

/// The speed and memory of one measurement; where several devices share the model, bytes are those
/// of one of them.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct BenchReport {
    /// Tokens of every prompt.
    pub prompt: usize,
    /// Sequences that decoded together.
    pub batch: usize,
    /// Tokens that each sequence was opened for.
    pub context: usize,
    /// Keys kept, as a share of dense attention's.
    pub density: f64,
    /// Seconds from one prompt to its first new token; the second of two times.
    pub first_token_seconds: f64,
    /// Prompt tokens per second in that time.
    pub prefill_tokens_per_second: f64,
    /// Decode steps that were timed, after those that warm up.
    pub steps: usize,
    /// Median of their times.
    pub step_seconds: f64,
    /// New tokens per second of the batch, over the whole time of those steps.
    pub decode_tokens_per_second: f64,
    /// Bytes that a step has to read: weights, and the keys and values that queries see.
    pub step_bytes: u64,
    /// Those bytes over the median time.
    pub step_bytes_per_second: f64,
    /// Bytes of keys and values of the batch.
    pub kv_bytes: u64,
    /// Bytes of a dense cache for the same batch.
    pub kv_bytes_dense: u64,
    /// Most bytes of the device in use at once, weights included; where it has memory of its own.
    pub peak_bytes: Option<u64>,
}

/// The time and memory that profiling one item took.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct ProfileBenchReport {
    /// Tokens of the item.
    pub tokens: usize,
    /// Tokens of them that the objective looks at.
    pub response: usize,
    /// Seconds of its forward and backward pass; the second of two times.
    pub seconds: f64,
    /// Most bytes of the device in use at once, weights included; where it has memory of its own.
    pub peak_bytes: Option<u64>,
}

/// Steps before those that are timed: plain ones, preparation and capture of a decoder.
const WARM_UP: usize = 5;
/// Batches tried in place of the largest that was computed, each a little smaller.
const RETRIES: usize = 12;

impl<D: Math> Decoder<D> {
    /// Reads a prompt of random tokens, copies its sequence to the whole batch and decodes greedily.
    ///
    /// # Errors
    /// [`Error::Invalid`] if the prompt, the batch or the chunk is 0, or there are too few new
    /// tokens for the steps that warm up and those that are timed; [`Error::ContextExceeded`] if
    /// prompt and new tokens are more than the model's context; [`Error::Core`] with
    /// [`ShapeMismatch`](moa_core::Error::ShapeMismatch) if the plan is for a model of other
    /// dimensions; [`Error::OutOfMemory`] or [`Error::Backend`] if the device has not enough memory
    /// or fails.
    pub fn bench(&self, plan: &Plan, options: &BenchOptions) -> Result<BenchReport> {
        let BenchOptions { prompt, new_tokens, steps, batch, prefill_chunk, seed } = *options;
        if prompt.min(batch).min(prefill_chunk) == 0 {
            return Err(Error::invalid("prompt, batch and chunk", "at least 1", 0));
        }
        let run = steps.map_or(new_tokens, |steps| steps.saturating_add(WARM_UP));
        if run <= WARM_UP || run > new_tokens {
            let expected = format!("more than the {WARM_UP} that warm up and those that are timed");
            return Err(Error::invalid("new tokens", expected, new_tokens));
        }
        let context = prompt.saturating_add(new_tokens);
        self.config.check_context(context)?;
        let mut random = SplitMix64::new(seed);
        let vocab = self.config.vocab_size;
        let skipped = (new_tokens - run) / 2;
        let tokens: Vec<u32> = (0..prompt + skipped).map(|_| random.below(vocab) as u32).collect();
        let (tokens, middle) = tokens.split_at(prompt);
        self.device.reset_peak()?;

        // A rank has only a part of them, which `open` checks sequence by sequence.
        if self.ranks() == 1 {
            let each = self.config.windowed(plan)?.kv_bytes(context, self.slot_bytes());
            self.device.check_room("keys and values", each.saturating_mul(batch as u64))?;
        }
        let mut sequence = self.open(plan, context, 0)?;
        let read = |sequence: &mut Sequence<D>, tokens: &[u32]| -> Result<f64> {
            self.device.synchronize()?;
            let begin = Instant::now();
            self.prefill(sequence, tokens, prefill_chunk)?;
            Ok(begin.elapsed().as_secs_f64())
        };
        read(&mut sequence, tokens)?;
        self.truncate(&mut sequence, 0)?;
        let first_token_seconds = read(&mut sequence, tokens)?;
        if !middle.is_empty() {
            read(&mut sequence, middle)?;
        }

        let mut sequences = vec![sequence];
        while sequences.len() < batch {
            let copy = self.fork(&sequences[0])?;
            sequences.push(copy);
        }
        let kv_bytes = sequences.iter().map(|s| self.kv_bytes(s)).sum();
        let mut next: Vec<u32> = (0..batch).map(|_| random.below(vocab) as u32).collect();
        let mut times = Vec::with_capacity(run);
        let mut session = self.session(sequences)?;
        for _ in 0..run {
            let begin = Instant::now();
            next = session.step_greedy(self, &next)?;
            times.push(begin.elapsed().as_secs_f64());
        }
        drop(session);
        let timed = &mut times[WARM_UP..];
        let total: f64 = timed.iter().sum();
        timed.sort_by(f64::total_cmp);
        let step_seconds = timed[timed.len() / 2];
        let steps = timed.len();

        let len = prompt + new_tokens.div_ceil(2);
        let step_bytes =
            self.weight_bytes_read() + batch as u64 * self.kv_bytes_read(plan, context, len)?;
        Ok(BenchReport {
            prompt,
            batch,
            context,
            density: self.config.windowed(plan)?.density(context),
            first_token_seconds,
            prefill_tokens_per_second: prompt as f64 / first_token_seconds,
            steps,
            step_seconds,
            decode_tokens_per_second: (batch * steps) as f64 / total,
            step_bytes,
            step_bytes_per_second: step_bytes as f64 / step_seconds,
            kv_bytes,
            kv_bytes_dense: batch as u64 * self.dense_bytes(context)?,
            peak_bytes: self.device.memory()?.map(|memory| memory.peak_bytes),
        })
    }

    /// [`bench`](Self::bench) with the largest batch that the device has memory for, whatever the
    /// options' batch is; `None` where the device has no memory of its own.
    ///
    /// # Errors
    /// As [`Decoder::bench`].
    pub fn bench_largest(
        &self,
        plan: &Plan,
        options: &BenchOptions,
    ) -> Result<Option<BenchReport>> {
        let context = options.prompt.saturating_add(options.new_tokens);
        let Some(largest) = self.largest_batch(plan, context)? else { return Ok(None) };
        let mut batch = largest.max(1);
        for _ in 0..RETRIES {
            match self.bench(plan, &BenchOptions { batch, ..*options }) {
                // Several ranks would have to agree on it.
                Err(Error::OutOfMemory { .. }) if batch > 1 && self.ranks() == 1 => {
                    batch -= batch.div_ceil(50);
                }
                other => return other.map(Some),
            }
        }
        self.bench(plan, &BenchOptions { batch, ..*options }).map(Some)
    }

    /// The largest batch of sequences of `context` tokens that the device has memory for, by the
    /// sizes of their caches (the smallest of all ranks); `None` where it has no memory of its own.
    ///
    /// # Errors
    /// [`Error::Backend`] if the device fails, [`Error::Rank`] if another rank does,
    /// [`Error::Core`] with [`ShapeMismatch`](moa_core::Error::ShapeMismatch) if the plan is for a
    /// model of other dimensions.
    pub fn largest_batch(&self, plan: &Plan, context: usize) -> Result<Option<usize>> {
        let Some(memory) = self.device.memory()? else { return Ok(None) };
        let plan = self.own_plan(plan)?;
        let each = plan.kv_bytes(context, self.slot_bytes());
        // Activations of a chunk, logits, work space of kernels, what the driver needs for graphs.
        let chunk = 2048 * (8 * self.config.hidden_size + 6 * self.config.intermediate_size);
        let reserve = (1u64 << 30) + chunk as u64;
        // One step's logits are f32, as wide as the vocabulary.
        let each = each + 8 * self.config.vocab_size as u64;
        let own = memory.available_bytes.saturating_sub(reserve) / each.max(1);
        self.least(own as usize).map(Some)
    }

    /// Bytes of weights that a decode step reads: all but the embedding's other rows.
    fn weight_bytes_read(&self) -> u64 {
        let c = &self.config;
        let table = (c.vocab_size * c.hidden_size) as u64;
        // A part of a tied model has an output matrix of its own.
        let is_read = c.tie_word_embeddings && self.shard.is_none();
        let unread = if is_read { 0 } else { table };
        let weights = Shard::weights(self.shard.as_ref(), c);
        let rest = weights.rest - unread;
        let own = weights.linear_bytes(&self.device) + self.device.weight_bytes(rest);
        let saved = self.block_savings.all - if is_read { 0 } else { self.block_savings.embedding };
        let own = own.saturating_sub(saved);
        // Weights that stay in their file are as large as there.
        if own == 0 { self.stored_bytes } else { own }
    }

    /// Bytes of keys and values that the query of token `len` sees.
    fn kv_bytes_read(&self, plan: &Plan, context: usize, len: usize) -> Result<u64> {
        let plan = self.own_plan(plan)?;
        let (dim, slot) = (self.config.head_dim, self.slot_bytes());
        let heads = plan.layouts(context, 0)?;
        let heads = heads.iter().flat_map(|layer| layer.heads());
        let bytes = |head: &moa_core::HeadLayout| {
            let slot = head.cache_type().map_or(slot, |own| own.slot_bytes(dim));
            head.span().total().min(len) as u64 * slot
        };
        Ok(heads.map(bytes).sum())
    }
}

/// Tokens of a response to profile.
const RESPONSE: usize = 64;
/// Side of a block of influence, as by default in calibration.
const BLOCK: usize = 64;

impl<D: Backward> Decoder<D> {
    /// Profiles an item of `tokens` random tokens, of which the last 64, or half, are the response.
    ///
    /// # Errors
    /// [`Error::Invalid`] if `tokens` is less than 2, [`Error::ContextExceeded`] if it is more than
    /// the model's context, and those of [`Decoder::profile`].
    pub fn bench_profile(&self, tokens: usize, seed: u64) -> Result<ProfileBenchReport> {
        self.config.check_context(tokens)?;
        let response = RESPONSE.min(tokens / 2);
        let mut random = SplitMix64::new(seed);
        let vocab = self.config.vocab_size;
        // The last token is only predicted.
        let ids: Vec<u32> = (0..=tokens).map(|_| random.below(vocab) as u32).collect();
        let (prompt, answer) = ids.split_at(ids.len() - response);
        let item = Item::new(prompt, answer)?;
        self.device.reset_peak()?;
        let mut seconds = 0.0;
        for _ in 0..2 {
            let mut influence = Influence::new(self.shape(), tokens, BLOCK.min(tokens))?;
            self.device.synchronize()?;
            let begin = Instant::now();
            self.profile(&item, Objective::Margin, &mut influence)?;
            seconds = begin.elapsed().as_secs_f64();
        }
        let peak_bytes = self.device.memory()?.map(|memory| memory.peak_bytes);
        Ok(ProfileBenchReport { tokens, response, seconds, peak_bytes })
    }
}
