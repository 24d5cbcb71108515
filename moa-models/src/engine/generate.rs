use std::ops::ControlFlow;
use std::time::{Duration, Instant};

use crate::decoder::llama::{Llama, LogitRows, Sequence};
use crate::device::Ops;
use crate::engine::running::Running;
use crate::engine::sampling::SamplingOptions;
use crate::{Error, Result};

/// How to continue prompts.
#[derive(Clone, Debug, PartialEq)]
pub struct GenerateOptions {
    /// Most tokens to add to each prompt.
    pub max_new_tokens: usize,
    /// How each token is chosen; sequence `i` of a batch draws with `seed + i`.
    pub sampling: SamplingOptions,
    /// Tokens that end a sequence.
    pub eos_token_ids: Vec<u32>,
    /// Prompt tokens per forward step: bounds the memory of activations, changes no result.
    pub prefill_chunk: usize,
}

impl Default for GenerateOptions {
    fn default() -> Self {
        Self {
            max_new_tokens: 256,
            sampling: SamplingOptions::default(),
            eos_token_ids: Vec::new(),
            prefill_chunk: 2048,
        }
    }
}

/// Why a sequence ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Finish {
    /// An end-of-sequence token.
    Eos,
    /// `max_new_tokens` were made, or the sequence is full.
    Length,
    /// The caller ended this sequence, for example at a stop string.
    Stopped,
}

/// What a generation tells its caller as it goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GenerateProgress {
    /// `done` of `total` prompt tokens of the batch are read.
    Prefill {
        /// Tokens read.
        done: usize,
        /// Tokens to read.
        total: usize,
    },
    /// Sequence `sequence` got `token`.
    Token {
        /// Index in the batch.
        sequence: usize,
        /// Token id; never an end-of-sequence token.
        token: u32,
    },
}

/// What the caller wants next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Next {
    /// Go on.
    Continue,
    /// End this sequence after its token (of a prefill: go on).
    Stop,
    /// End the whole batch with [`Error::Cancelled`].
    Cancel,
}

/// Result of one sequence.
#[derive(Clone, Debug, PartialEq)]
pub struct Generated {
    /// New tokens, without the end-of-sequence token.
    pub tokens: Vec<u32>,
    /// Why it ended.
    pub finish: Finish,
}

/// Results of a batch with its times.
#[derive(Clone, Debug, PartialEq)]
pub struct Generation {
    /// One per sequence.
    pub sequences: Vec<Generated>,
    /// Prompt tokens read.
    pub prompt_tokens: usize,
    /// Time to read the prompts.
    pub prefill: Duration,
    /// Forward steps after the prompts, each one token per running sequence.
    pub decoded_tokens: usize,
    /// Time of those steps.
    pub decode: Duration,
}

impl Generation {
    /// Prompt tokens per second.
    pub fn prefill_tokens_per_second(&self) -> f64 {
        self.prompt_tokens as f64 / self.prefill.as_secs_f64().max(1e-9)
    }

    /// New tokens per second, over all sequences.
    pub fn decode_tokens_per_second(&self) -> f64 {
        self.decoded_tokens as f64 / self.decode.as_secs_f64().max(1e-9)
    }
}

impl<O: Ops> Llama<O> {
    /// Appends tokens in chunks and returns the last one's logits, `[vocab]`. `on_chunk` is told how
    /// many tokens are read and may break off.
    ///
    /// # Errors
    /// As [`Llama::forward`]; [`Error::Cancelled`] if `on_chunk` breaks off: the sequence then holds
    /// the chunks read so far.
    pub fn prefill(
        &self,
        sequence: &mut Sequence<O>,
        tokens: &[u32],
        chunk: usize,
        on_chunk: &mut dyn FnMut(usize) -> ControlFlow<()>,
    ) -> Result<Vec<f32>> {
        if tokens.is_empty() || chunk == 0 {
            return Err(Error::invalid("prompt and chunk", "at least 1 token", 0));
        }
        self.check_tokens(tokens)?;
        if tokens.len() > sequence.capacity() - sequence.len() {
            return Err(moa_core::Error::CapacityExceeded {
                len: sequence.len(),
                more: tokens.len(),
                capacity: sequence.capacity(),
            }
            .into());
        }
        let mut done = 0;
        loop {
            let part = &tokens[done..tokens.len().min(done + chunk)];
            done += part.len();
            let is_last = done == tokens.len();
            let rows = if is_last { LogitRows::Last } else { LogitRows::None };
            let logits = self.forward(&mut [sequence], &[part], rows)?;
            if on_chunk(done).is_break() {
                return Err(Error::Cancelled);
            }
            if is_last {
                return self.values(logits);
            }
        }
    }

    /// Appends each prompt to its sequence and continues all of them together. Prompts may have any
    /// lengths and sequences may already hold tokens (multi-turn). Each sequence's result is the
    /// same as alone. A new token enters the cache with the next step, so the last one made is not
    /// in it.
    ///
    /// # Errors
    /// If a prompt is empty, longer than its sequence has room for or has a token outside the
    /// vocabulary, if an option is out of range (nothing has changed then), or [`Error::Cancelled`].
    pub fn generate(
        &self,
        batch: &mut [Sequence<O>],
        prompts: &[&[u32]],
        options: &GenerateOptions,
        on_progress: &mut dyn FnMut(GenerateProgress) -> Next,
    ) -> Result<Generation> {
        if batch.len() != prompts.len() || batch.is_empty() {
            return Err(Error::invalid(
                "prompts",
                format!("one for each of {} sequences", batch.len()),
                prompts.len(),
            ));
        }
        options.sampling.validate()?;
        for (sequence, prompt) in batch.iter().zip(prompts) {
            self.check_prompt(sequence, prompt)?;
        }
        let total = prompts.iter().map(|p| p.len()).sum();
        let mut running: Vec<Running> = prompts
            .iter()
            .enumerate()
            .map(|(i, prompt)| Running::new(prompt, &options.sampling, i))
            .collect::<Result<_>>()?;
        let start = Instant::now();
        let mut before = 0;
        for ((sequence, prompt), run) in batch.iter_mut().zip(prompts).zip(&mut running) {
            let mut tell = |done| match on_progress(GenerateProgress::Prefill {
                done: before + done,
                total,
            }) {
                Next::Cancel => ControlFlow::Break(()),
                Next::Continue | Next::Stop => ControlFlow::Continue(()),
            };
            run.logits = self.prefill(sequence, prompt, options.prefill_chunk, &mut tell)?;
            before += prompt.len();
        }
        let prefill = start.elapsed();
        let start = Instant::now();
        let decoded_tokens = self.decode(batch, &mut running, options, on_progress)?;
        let sequences = running.into_iter().map(Running::finish).collect();
        Ok(Generation {
            sequences,
            prompt_tokens: total,
            prefill,
            decoded_tokens,
            decode: start.elapsed(),
        })
    }

    /// Checks that a sequence has room for a prompt of the vocabulary.
    pub(crate) fn check_prompt(&self, sequence: &Sequence<O>, prompt: &[u32]) -> Result<()> {
        if prompt.is_empty() {
            return Err(Error::invalid("prompt", "at least 1 token", 0));
        }
        if prompt.len() > sequence.capacity() - sequence.len() {
            return Err(Error::ContextExceeded {
                asked: sequence.len() + prompt.len(),
                limit: sequence.capacity(),
            });
        }
        self.check_tokens(prompt)
    }

    /// Continues sequences whose prompts are read until all have ended; how many tokens that took.
    fn decode(
        &self,
        batch: &mut [Sequence<O>],
        running: &mut [Running],
        options: &GenerateOptions,
        on_progress: &mut dyn FnMut(GenerateProgress) -> Next,
    ) -> Result<usize> {
        let mut room: Vec<usize> = batch.iter().map(|s| s.capacity() - s.len()).collect();
        // A penalty depends on all tokens so far, which the device does not know.
        let plain = options.sampling.repetition_penalty == 1.0;
        let greedy = options.sampling.temperature == 0.0;
        let mut decoded = 0;
        let mut choose = |running: &mut [Running], room: &[usize]| -> Result<Vec<usize>> {
            for (i, run) in running.iter_mut().enumerate() {
                run.choose(i, options, room[i], on_progress)?;
            }
            Ok((0..running.len()).filter(|i| running[*i].finish.is_none()).collect())
        };
        let mut going = choose(running, &room)?;
        while !going.is_empty() {
            let sequences = batch.iter_mut().zip(running.iter());
            let sequences = sequences.filter(|(_, run)| run.finish.is_none()).map(|(s, _)| s);
            let mut decoder = self.decoder(sequences.collect())?;
            // One decoder for as long as no sequence ends.
            loop {
                let tokens: Vec<u32> = going.iter().map(|i| running[*i].last()).collect();
                if plain && (greedy || decoder.can_sample()) {
                    let chosen = match greedy {
                        true => decoder.step_greedy(&tokens)?,
                        false => {
                            let units: Vec<f64> =
                                going.iter().map(|i| running[*i].sampler.unit()).collect();
                            decoder.step_sampled(&tokens, &options.sampling, &units)?
                        }
                    };
                    for (&i, token) in going.iter().zip(chosen) {
                        running[i].next = Some(token);
                    }
                } else {
                    let logits = decoder.step(&tokens)?;
                    for (&i, row) in going.iter().zip(logits.chunks(self.config().vocab_size)) {
                        running[i].logits = row.to_vec();
                    }
                }
                decoded += going.len();
                going.iter().for_each(|i| room[*i] -= 1);
                let still = choose(running, &room)?;
                let same = still == going;
                going = still;
                if !same {
                    break;
                }
            }
        }
        Ok(decoded)
    }
}
