//! Steps of one token per sequence, of a batch that stays the same.

use crate::decoder::model::{Decoder, LogitRows, Sequence};
use crate::device::Math;
use crate::engine::sampling::{SamplingOptions, check_logits, likeliest};
use crate::{Error, Result};

/// Decode steps of one batch; see [`Decoder::decoder`].
pub trait Decode {
    /// Appends one token to each sequence; the logits of the tokens after them, `[sequences, vocab]`.
    ///
    /// # Errors
    /// As [`Decoder::forward`].
    fn step(&mut self, tokens: &[u32]) -> Result<Vec<f32>>;

    /// [`step`](Self::step), but only the likeliest token of each; the lowest of equals.
    ///
    /// # Errors
    /// As [`Decoder::forward`], and [`Error::Logits`] if a logit is infinite or not a number.
    fn step_greedy(&mut self, tokens: &[u32]) -> Result<Vec<u32>>;

    /// Whether the device draws tokens itself.
    fn can_sample(&self) -> bool {
        false
    }

    /// [`step`](Self::step), but only a token of each, drawn by `sampling` (its temperature and
    /// restrictions) with a uniform number in [0, 1) for each sequence. A device need not choose as
    /// another does with the same numbers, but equal inputs give equal tokens.
    ///
    /// # Errors
    /// As [`step_greedy`](Self::step_greedy); [`Error::Invalid`] where the device cannot sample.
    fn step_sampled(
        &mut self,
        tokens: &[u32],
        sampling: &SamplingOptions,
        units: &[f64],
    ) -> Result<Vec<u32>> {
        let _ = (tokens, sampling, units);
        Err(Error::invalid("decoder", "one that can sample", "one that cannot"))
    }
}

/// [`Decoder::forward`], step by step.
pub(crate) struct Stepwise<'a, D: Math> {
    model: &'a Decoder<D>,
    batch: Vec<&'a mut Sequence<D>>,
}

impl<'a, D: Math> Stepwise<'a, D> {
    pub(crate) fn new(model: &'a Decoder<D>, batch: Vec<&'a mut Sequence<D>>) -> Self {
        Self { model, batch }
    }
}

impl<D: Math> Decode for Stepwise<'_, D> {
    fn step(&mut self, tokens: &[u32]) -> Result<Vec<f32>> {
        let tokens: Vec<&[u32]> = tokens.chunks(1).collect();
        let logits = self.model.forward(&mut self.batch, &tokens, LogitRows::Last)?;
        self.model.values(logits)
    }

    fn step_greedy(&mut self, tokens: &[u32]) -> Result<Vec<u32>> {
        let logits = self.step(tokens)?;
        let rows = logits.chunks(self.model.config().vocab_size);
        rows.map(|row| check_logits(row).map(|()| likeliest(row).0)).collect()
    }
}

impl<D: Math> Decoder<D> {
    /// Decode steps of a batch that stays the same from step to step: faster than
    /// [`forward`](Self::forward) where the device can prepare them.
    ///
    /// # Errors
    /// If there is no sequence, or the device cannot prepare them.
    pub fn decoder<'a>(&'a self, batch: Vec<&'a mut Sequence<D>>) -> Result<Box<dyn Decode + 'a>> {
        match batch.is_empty() {
            true => Err(Error::invalid("batch", "at least 1 sequence", 0)),
            false => D::decoder(self, batch),
        }
    }
}

/// Decode steps of sequences that it owns.
pub struct Session<D: Math> {
    sequences: Vec<Sequence<D>>,
    can_sample: bool,
}

impl<D: Math> Session<D> {
    fn decoder<'a>(&'a mut self, model: &'a Decoder<D>) -> Result<Box<dyn Decode + 'a>> {
        model.decoder(self.sequences.iter_mut().collect())
    }

    /// Whether the device draws tokens itself.
    pub fn can_sample(&self) -> bool {
        self.can_sample
    }

    /// As [`Decode::step`].
    pub fn step(&mut self, model: &Decoder<D>, tokens: &[u32]) -> Result<Vec<f32>> {
        self.decoder(model)?.step(tokens)
    }

    /// As [`Decode::step_greedy`].
    pub fn step_greedy(&mut self, model: &Decoder<D>, tokens: &[u32]) -> Result<Vec<u32>> {
        self.decoder(model)?.step_greedy(tokens)
    }

    /// As [`Decode::step_sampled`].
    pub fn step_sampled(
        &mut self,
        model: &Decoder<D>,
        tokens: &[u32],
        sampling: &SamplingOptions,
        units: &[f64],
    ) -> Result<Vec<u32>> {
        self.decoder(model)?.step_sampled(tokens, sampling, units)
    }

    /// The sequences, as after the last step.
    pub fn into_sequences(self) -> Vec<Sequence<D>> {
        self.sequences
    }
}

impl<D: Math> Decoder<D> {
    /// Decode steps of sequences that stay the same from step to step.
    pub fn session(&self, sequences: Vec<Sequence<D>>) -> Result<Session<D>> {
        let mut session = Session { sequences, can_sample: false };
        let can_sample = session.decoder(self)?.can_sample();
        session.can_sample = can_sample;
        Ok(session)
    }
}
