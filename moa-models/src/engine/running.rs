use crate::engine::generate::{Finish, GenerateOptions, GenerateProgress, Generated, Next};
use crate::engine::sampling::{Sampler, SamplingOptions};
use crate::{Error, Result};

/// One sequence of a batch while it runs.
pub(crate) struct Running {
    pub(crate) sampler: Sampler,
    /// Prompt and new tokens.
    history: Vec<u32>,
    prompt_len: usize,
    /// Of the last token; empty once they were sampled.
    pub(crate) logits: Vec<f32>,
    /// The token to come, where the device has chosen it.
    pub(crate) next: Option<u32>,
    pub(crate) finish: Option<Finish>,
}

impl Running {
    pub(crate) fn new(prompt: &[u32], sampling: &SamplingOptions, index: usize) -> Result<Self> {
        let seed = sampling.seed.wrapping_add(index as u64);
        Ok(Self {
            sampler: Sampler::new(SamplingOptions { seed, ..sampling.clone() })?,
            history: prompt.to_vec(),
            prompt_len: prompt.len(),
            logits: Vec::new(),
            next: None,
            finish: None,
        })
    }

    /// The token that its next step appends.
    pub(crate) fn last(&self) -> u32 {
        self.history[self.history.len() - 1]
    }

    /// Samples the next token, if the sequence still runs.
    pub(crate) fn choose(
        &mut self,
        index: usize,
        options: &GenerateOptions,
        room: usize,
        on_progress: &mut dyn FnMut(GenerateProgress) -> Next,
    ) -> Result<()> {
        if self.finish.is_some() {
            return Ok(());
        }
        if self.history.len() - self.prompt_len >= options.max_new_tokens {
            self.finish = Some(Finish::Length);
            return Ok(());
        }
        let token = match self.next.take() {
            Some(token) => token,
            None => self.sampler.sample(&mut self.logits, &self.history)?,
        };
        if options.eos_token_ids.contains(&token) {
            self.finish = Some(Finish::Eos);
            return Ok(());
        }
        self.history.push(token);
        match on_progress(GenerateProgress::Token { sequence: index, token }) {
            Next::Continue => {}
            Next::Stop => self.finish = Some(Finish::Stopped),
            Next::Cancel => return Err(Error::Cancelled),
        }
        if self.finish.is_none()
            && (room == 0 || self.history.len() - self.prompt_len >= options.max_new_tokens)
        {
            self.finish = Some(Finish::Length);
        }
        Ok(())
    }

    pub(crate) fn finish(self) -> Generated {
        Generated {
            tokens: self.history[self.prompt_len..].to_vec(),
            finish: self.finish.unwrap_or(Finish::Length),
        }
    }
}
