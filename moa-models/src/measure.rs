//! What a plan really does: response loss, retrieval, perplexity.

use std::time::Instant;

use moa_core::Plan;
use serde::Serialize;

use crate::chat::Message;
use crate::checkpoint::Checkpoint;
use crate::generate::{Next, Progress};
use crate::llama::{Llama, LogitRows};
use crate::objective::cross_entropy;
use crate::ops::Ops;
use crate::retrieval::{RetrievalCase, RetrievalItem};
use crate::{Error, Result};

/// Tokens per forward step where every row's logits are wanted: bounds `[rows, vocab]`.
const LOGIT_CHUNK: usize = 512;

/// Retrieval over a set of cases.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct RetrievalReport {
    /// Cases asked.
    pub cases: usize,
    /// Cases answered right.
    pub correct: usize,
    /// `correct / cases`.
    pub accuracy: f64,
    /// Mean prompt length.
    pub prompt_tokens_mean: f64,
    /// Mean over cases of keys kept / context length.
    pub density: f64,
    /// Mean bytes of keys and values that a sequence held, read from its caches.
    pub kv_bytes: u64,
    /// The same for dense attention, computed.
    pub kv_bytes_dense: u64,
    /// Prompt tokens read per second.
    pub prefill_tokens_per_second: f64,
    /// New tokens per second, one sequence at a time.
    pub decode_tokens_per_second: f64,
    /// Time for all cases.
    pub seconds: f64,
    /// Each case.
    pub items: Vec<RetrievalItem>,
}

/// Perplexity of a text.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct PerplexityReport {
    /// `exp` of the mean cross entropy.
    pub perplexity: f64,
    /// Mean cross entropy in nats per token.
    pub cross_entropy: f64,
    /// Tokens predicted.
    pub tokens: usize,
    /// Windows of the text.
    pub windows: usize,
    /// Tokens per window.
    pub length: usize,
    /// Keys kept / context length.
    pub density: f64,
    /// Bytes of keys and values that a sequence held.
    pub kv_bytes: u64,
    /// The same for dense attention.
    pub kv_bytes_dense: u64,
    /// Time for all windows.
    pub seconds: f64,
}

impl<O: Ops> Llama<O> {
    /// Perplexity of `tokens`, cut into windows of `length` that each begin with `first`.
    ///
    /// # Errors
    /// If the text does not fill one window, or `length` is beyond the model's context.
    pub fn perplexity(
        &self,
        tokens: &[u32],
        first: Option<u32>,
        length: usize,
        windows: usize,
        plan: &Plan,
        on_window: &mut dyn FnMut() -> Next,
    ) -> Result<PerplexityReport> {
        let begin = Instant::now();
        let head: Vec<u32> = first.into_iter().collect();
        if length < head.len() + 2 || windows == 0 {
            return Err(Error::invalid(
                "length and windows",
                "at least 3 tokens and 1 window",
                length.min(windows),
            ));
        }
        let parts: Vec<&[u32]> = tokens.chunks_exact(length - head.len()).take(windows).collect();
        if parts.is_empty() {
            return Err(Error::invalid(
                "text",
                format!("at least {} tokens", length - head.len()),
                tokens.len(),
            ));
        }
        let (mut sum, mut count, mut kv_bytes) = (0.0, 0, 0);
        for part in &parts {
            let ids = [&head, *part].concat();
            let mut sequence = self.open(plan, length, 0)?;
            for (index, chunk) in ids[..length - 1].chunks(LOGIT_CHUNK).enumerate() {
                let rows: Vec<usize> = (0..chunk.len()).collect();
                let logits =
                    self.forward(&mut [&mut sequence], &[chunk], LogitRows::Rows(&rows))?;
                let logits = self.ops().values(logits)?;
                let targets = &ids[index * LOGIT_CHUNK + 1..];
                for (row, target) in logits.chunks(self.config().vocab_size).zip(targets) {
                    sum += cross_entropy(row, *target as usize);
                    count += 1;
                }
            }
            kv_bytes = self.kv_bytes(&sequence);
            if on_window() != Next::Continue {
                return Err(Error::Cancelled);
            }
        }
        let cross_entropy = sum / count as f64;
        Ok(PerplexityReport {
            perplexity: cross_entropy.exp(),
            cross_entropy,
            tokens: count,
            windows: parts.len(),
            length,
            density: plan.density(length),
            kv_bytes,
            kv_bytes_dense: self.dense_bytes(length)?,
            seconds: begin.elapsed().as_secs_f64(),
        })
    }

    /// Bytes that a dense cache of `capacity` tokens would hold.
    ///
    /// # Errors
    /// Never for a model that was loaded.
    pub fn dense_bytes(&self, capacity: usize) -> Result<u64> {
        Ok(Plan::full(self.shape())?.kv_bytes(capacity, self.ops().cache_element_bytes()))
    }
}

impl<O: Ops> Checkpoint<O> {
    /// Asks retrieval cases: each prompt, trimmed, goes through the chat template; at most
    /// `max_new_tokens` greedy tokens; the last integer must be the expected number. The plan's
    /// spans are those of a context of prompt and answer together.
    ///
    /// # Errors
    /// If a case is longer than the model's context or the plan is for another model.
    pub fn retrieval(
        &self,
        cases: &[RetrievalCase],
        plan: &Plan,
        max_new_tokens: usize,
        on_case: &mut dyn FnMut(&RetrievalItem, bool) -> Next,
    ) -> Result<RetrievalReport> {
        if cases.is_empty() {
            return Err(Error::invalid("cases", "at least 1", 0));
        }
        let begin = Instant::now();
        let options = self.greedy(max_new_tokens);
        let mut items = Vec::with_capacity(cases.len());
        let (mut correct, mut density, mut bytes, mut dense) = (0, 0.0, 0u64, 0u64);
        let (mut prompt_tokens, mut new_tokens, mut prefill, mut decode) = (0, 0, 0.0, 0.0);
        for (index, case) in cases.iter().enumerate() {
            let prompt = self.chat_tokens(&[Message::user(case.prompt.trim())])?;
            let capacity = prompt.len() + max_new_tokens;
            let mut batch = [self.model.open(plan, capacity, 0)?];
            let generation =
                self.model.generate(&mut batch, &[&prompt], &options, &mut |_: Progress| {
                    Next::Continue
                })?;
            let text = self.tokenizer.decode(&generation.sequences[0].tokens, true)?;
            let right = case.is_right(&text);
            correct += usize::from(right);
            density += plan.density(capacity);
            bytes += self.model.kv_bytes(&batch[0]);
            dense += self.model.dense_bytes(capacity)?;
            prompt_tokens += prompt.len();
            new_tokens += generation.decoded_tokens;
            prefill += generation.prefill.as_secs_f64();
            decode += generation.decode.as_secs_f64();
            items.push(RetrievalItem {
                case: index,
                expected: case.expected_number,
                got: crate::records::last_integer(&text),
                text,
                prompt_tokens: prompt.len(),
            });
            if on_case(&items[index], right) != Next::Continue {
                return Err(Error::Cancelled);
            }
        }
        let n = cases.len();
        Ok(RetrievalReport {
            cases: n,
            correct,
            accuracy: correct as f64 / n as f64,
            prompt_tokens_mean: prompt_tokens as f64 / n as f64,
            density: density / n as f64,
            kv_bytes: bytes / n as u64,
            kv_bytes_dense: dense / n as u64,
            prefill_tokens_per_second: prompt_tokens as f64 / prefill.max(1e-9),
            decode_tokens_per_second: new_tokens as f64 / decode.max(1e-9),
            seconds: begin.elapsed().as_secs_f64(),
            items,
        })
    }
}
