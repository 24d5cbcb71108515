//! Decode steps of a batch that stays the same.

use crate::decoder::logits::{LogitRows, check_logits, likeliest};
use crate::decoder::model::Decoder;
use crate::decoder::sequence::Sequence;
use crate::device::replay::{Replay, ReplayBatch};
use crate::device::{Device, Draw, Math};
use crate::{Error, Result};

/// Steps before a replay is worth its preparation: many answers are shorter.
const PLAIN_STEPS: usize = 2;

/// Sequences that decode together, one token each per step, for as long as the batch stays the same.
///
/// A session owns its sequences, and works with the model that made it. The first steps are those of
/// [`Decoder::forward`]; later ones are what the device recorded of a step, where it can do that, which
/// computes the same.
///
/// ```no_run
/// use moa_core::Plan;
/// use moa_models::{Checkpoint, Cpu, Error};
///
/// let model = Checkpoint::open(Cpu::default(), "model")?.model;
/// let plan = Plan::full(model.shape())?;
/// let mut session = model.session(vec![model.open(&plan, 100, 0)?, model.open(&plan, 100, 0)?])?;
/// let mut tokens = vec![1, 1];
/// for _ in 0..100 {
///     tokens = session.step_greedy(&model, &tokens)?;
/// }
/// assert_eq!(session.into_sequences()[0].len(), 100);
/// # Ok::<(), Error>(())
/// ```
pub struct Session<D: Device> {
    /// Dropped before the sequences, to whose caches it refers.
    replay: Option<Box<dyn Replay<D>>>,
    sequences: Vec<Sequence<D>>,
    /// [`Decoder::id`] of the model whose weights a replay refers to.
    model: u64,
    steps: usize,
    /// Whether the device may be asked for a replay.
    can_replay: bool,
    can_sample: bool,
}

impl<D: Device> std::fmt::Debug for Session<D> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_list().entries(&self.sequences).finish()
    }
}

impl<D: Math> Decoder<D> {
    /// Decode steps of a batch that stays the same from step to step: faster than
    /// [`forward`](Self::forward) where the device can record them.
    ///
    /// # Errors
    /// [`Error::Invalid`] if there is no sequence, or another model opened one.
    pub fn session(&self, sequences: Vec<Sequence<D>>) -> Result<Session<D>> {
        let Some(first) = sequences.first() else {
            return Err(Error::invalid("batch", "at least 1 sequence", 0));
        };
        sequences.iter().try_for_each(|sequence| self.check_owner(sequence))?;
        // Sequences that were opened with different rotary frequencies have no table in common, and
        // sums over the host cannot be recorded.
        let launches = self.shard.as_ref().is_none_or(|shard| shard.only_launches());
        // Nor can steps of sequences whose heads have caches of their own.
        let alike = |s: &Sequence<D>| s.rope.turns_like(&first.rope) && s.evicted.is_none();
        let can_replay = launches && sequences.iter().all(alike);
        let can_sample = self.device.can_sample();
        Ok(Session { replay: None, sequences, model: self.id, steps: 0, can_replay, can_sample })
    }
}

impl<D: Device> Session<D> {
    /// The sequences, in the order of their tokens.
    pub fn sequences(&self) -> &[Sequence<D>] {
        &self.sequences
    }

    /// Ends the session.
    pub fn into_sequences(self) -> Vec<Sequence<D>> {
        self.sequences
    }
}

impl<D: Math> Session<D> {
    /// Appends one token to each sequence; the logits of the tokens after them, `[sequences, vocab]`.
    ///
    /// # Errors
    /// As [`Decoder::forward`]; [`Error::Invalid`] if another model made the session.
    pub fn step(&mut self, model: &Decoder<D>, tokens: &[u32]) -> Result<Vec<f32>> {
        let logits = self.advance(model, tokens)?;
        model.values(logits)
    }

    /// [`step`](Self::step), but only the likeliest token of each; the lowest of equals.
    ///
    /// # Errors
    /// As [`step`](Self::step), and [`Error::Logits`] if a logit is infinite or not a number.
    pub fn step_greedy(&mut self, model: &Decoder<D>, tokens: &[u32]) -> Result<Vec<u32>> {
        let logits = self.advance(model, tokens)?;
        let Some(replay) = &self.replay else {
            let logits = model.values(logits)?;
            let rows = logits.chunks(model.config.vocab_size);
            return rows.map(|row| check_logits(row).map(|()| likeliest(row).0)).collect();
        };
        let chosen = replay.likeliest().map_err(|error| model.failure(error));
        model.check_ranks()?;
        chosen
    }

    /// Whether [`step_sampled`](Self::step_sampled) works: the device draws tokens itself.
    pub fn can_sample(&self) -> bool {
        self.can_sample
    }

    /// [`step`](Self::step), but only a token of each, drawn on the device with a uniform number in
    /// [0, 1) for each sequence. A device need not choose as another does with the same numbers, but
    /// equal inputs give equal tokens.
    ///
    /// # Errors
    /// As [`step_greedy`](Self::step_greedy); [`Error::Invalid`] where the device cannot sample.
    pub fn step_sampled(
        &mut self,
        model: &Decoder<D>,
        tokens: &[u32],
        draw: impl Into<Draw>,
        units: &[f64],
    ) -> Result<Vec<u32>> {
        let logits = self.advance(model, tokens)?;
        let chosen = model.device.sample(&logits, &draw.into(), units);
        let chosen = chosen.map_err(|error| model.failure(error));
        model.check_ranks()?;
        chosen
    }

    /// Appends tokens; logits on the device, which the next step may overwrite.
    fn advance(&mut self, model: &Decoder<D>, tokens: &[u32]) -> Result<D::Tensor> {
        if model.id != self.model {
            return Err(Error::invalid("model", "the one that made the session", "another"));
        }
        model.check_ranks()?;
        let each: Vec<&[u32]> = tokens.chunks(1).collect();
        let mut batch: Vec<_> = self.sequences.iter_mut().collect();
        model.check_step(&batch, &each)?;
        if self.replay.is_none() && self.can_replay && self.steps >= PLAIN_STEPS {
            let replay = model.prepare(&self.sequences);
            self.replay = replay.map_err(|error| model.failure(error))?;
            self.can_replay = self.replay.is_some();
            batch = self.sequences.iter_mut().collect();
        }
        let logits = match &mut self.replay {
            None => model.forward(&mut batch, &each, LogitRows::Last)?,
            Some(replay) => match model.replay(&mut **replay, &mut batch, tokens) {
                Ok(logits) => logits,
                Err(error) => {
                    self.replay = None;
                    return Err(model.failure(error));
                }
            },
        };
        self.steps += 1;
        Ok(logits)
    }
}

impl<D: Math> Decoder<D> {
    fn prepare(&self, sequences: &[Sequence<D>]) -> Result<Option<Box<dyn Replay<D>>>> {
        let Some(first) = sequences.first() else { return Ok(None) };
        let of_layer = |layer| sequences.iter().map(|s| &s.caches[layer]).collect();
        let batch = ReplayBatch {
            caches: (0..self.layers.len()).map(of_layer).collect(),
            query_heads: self.local.query_heads,
            head_dim: self.config.head_dim,
            scale: self.scale(),
            rope: &first.rope,
            rotary: self.layers.iter().map(|layer| layer.kind.rotary).collect(),
            capacity: sequences.iter().map(Sequence::capacity).max().unwrap_or(0),
            vocab_size: self.config.vocab_size,
        };
        // SAFETY: a session owns the caches, in the `Vec`s of sequences that it neither moves out of nor
        // lends for change while it has the replay. Weights are those of this model, whose id every
        // step compares; each step is checked for room first. `replay` describes a step by
        // operations on tensors that it drops.
        unsafe { self.device.replay(&batch) }
    }

    /// A step of all sequences by `replay`: [`Decoder::forward`], described once.
    fn replay(
        &self,
        replay: &mut dyn Replay<D>,
        batch: &mut [&mut Sequence<D>],
        tokens: &[u32],
    ) -> Result<D::Tensor> {
        let (device, config) = (&self.device, &self.config);
        batch.iter_mut().for_each(|sequence| sequence.broken = true);
        self.begins();
        replay.run(device, tokens, &|step| {
            let x = step.embed(device, &self.embedding, self.embedding_factor())?;
            let x = self.blocks(x, |layer, qkv| step.attend(device, layer, qkv))?;
            let h = device.rms_norm(&x, &self.norm, self.eps())?;
            let columns = match &self.shard {
                Some(shard) => shard.vocabulary(config),
                None => 0..config.vocab_size,
            };
            step.write_logits(device, &h, self.output_matrix(), columns)?;
            if let Some(shard) = &self.shard {
                shard.all_reduce(device, &mut step.logits().clone())?;
            }
            step.finish(device)
        })?;
        for sequence in batch {
            for cache in &mut sequence.caches {
                replay.advance(cache)?;
            }
            sequence.broken = false;
        }
        Ok(replay.logits().clone())
    }
}
