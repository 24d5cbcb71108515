//! Decode steps of a batch that stays the same.

use std::time::{Duration, Instant};

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
    /// Of one token; dropped before the sequences, to whose caches it refers.
    replay: Option<Box<dyn Replay<D>>>,
    /// Of [`wide`](Self::wide) tokens a sequence, likewise.
    wide_replay: Option<Box<dyn Replay<D>>>,
    /// What was recorded of other batches and does not fit this one.
    kept: Recordings<D>,
    sequences: Vec<Sequence<D>>,
    /// [`Decoder::id`] of the model whose weights a replay refers to.
    model: u64,
    steps: usize,
    /// Whether the device may be asked for a replay.
    can_replay: bool,
    can_sample: bool,
    /// Most tokens of a sequence in recorded steps that check guesses; 1 where none is recorded.
    widest: usize,
    /// Tokens of a sequence in this session's.
    wide: usize,
    /// Whether the last step took what all such steps take, and prepared nothing.
    is_steady: bool,
    /// Seconds that steps which check guesses would have saved so far, had they been recorded.
    missed: f64,
    /// What [`begin`](Self::begin) had chosen where no recorded step does it.
    chosen: Option<Vec<Option<u32>>>,
}

/// What a device has recorded of decode steps, kept from one [`Session`] or [`Engine`](crate::Engine) to the next: a batch that a sequence joins or
/// leaves runs what was recorded of another one, where that fits it.
pub struct Recordings<D: Device> {
    plain: Option<Box<dyn Replay<D>>>,
    /// Of so many tokens a sequence.
    wide: Option<(usize, Box<dyn Replay<D>>)>,
    /// [`Decoder::id`] of the model whose weights they refer to.
    model: Option<u64>,
    /// What it took to prepare a replay of one token, its first runs included.
    preparation: Option<Duration>,
}

impl<D: Device> Default for Recordings<D> {
    fn default() -> Self {
        Self { plain: None, wide: None, model: None, preparation: None }
    }
}

impl<D: Device> std::fmt::Debug for Recordings<D> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Recordings({})", self.count())
    }
}

impl<D: Device> Recordings<D> {
    /// How often a step was recorded by what is kept, steps included that were dropped since.
    pub fn count(&self) -> usize {
        let wide = self.wide.as_ref().map(|(_, replay)| replay);
        let all = self.plain.iter().chain(wide);
        all.map(|replay| replay.recordings()).sum()
    }

    /// Whether nothing is kept.
    pub(crate) fn is_empty(&self) -> bool {
        self.plain.is_none() && self.wide.is_none()
    }
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
        self.session_with(sequences, Recordings::default())
    }

    /// [`session`](Self::session) with what sessions before it have [recorded](Session::into_parts): what fits is run from the
    /// first step on.
    ///
    /// # Errors
    /// As [`session`](Self::session); [`Error::Invalid`] if another model recorded them; [`Error::Backend`] if the device
    /// fails.
    pub fn session_with(
        &self,
        sequences: Vec<Sequence<D>>,
        kept: Recordings<D>,
    ) -> Result<Session<D>> {
        self.check_recordings(&kept)?;
        let Some(first) = sequences.first() else {
            return Err(Error::invalid("batch", "at least 1 sequence", 0));
        };
        sequences.iter().try_for_each(|sequence| self.check_owner(sequence))?;
        // Sequences that were opened with different rotary frequencies have no table in common, and
        // sums over the host cannot be recorded.
        let launches = self.shard.as_ref().is_none_or(|shard| shard.only_launches());
        // Nor can steps of sequences whose heads have caches of their own, or whose queries are scaled by their position.
        let alike = |s: &Sequence<D>| {
            let is_plain = s.evicted.is_none() && !s.rope.scales_queries(s.capacity());
            s.rope.turns_like(&first.rope) && is_plain
        };
        let records = self.device.replayed_tokens(1) > 1;
        let can_replay = records && launches && sequences.iter().all(alike);
        let widest = match can_replay {
            true => {
                self.device.replayed_tokens(self.local.query_heads / self.local.kv_heads).max(1)
            }
            false => 1,
        };
        let mut session = Session {
            replay: None,
            wide_replay: None,
            // Ranks would not agree on which steps fit.
            kept: match self.shard {
                None => Recordings { model: Some(self.id), ..kept },
                Some(_) => Recordings::default(),
            },
            sequences,
            model: self.id,
            steps: 0,
            can_replay,
            can_sample: self.device.can_sample(),
            widest,
            wide: widest,
            is_steady: false,
            missed: 0.0,
            chosen: None,
        };
        if can_replay {
            session.replay = self.record(&session.sequences, 1, &mut session.kept.plain, false)?;
            if let Some((tokens, kept)) = session.kept.wide.take() {
                let mut kept = Some(kept);
                session.wide_replay = self.record(&session.sequences, tokens, &mut kept, false)?;
                session.wide = if session.wide_replay.is_some() { tokens } else { widest };
                session.kept.wide = kept.map(|kept| (tokens, kept));
            }
        }
        Ok(session)
    }

    /// Whether they are of this model.
    pub(crate) fn check_recordings(&self, kept: &Recordings<D>) -> Result<()> {
        match kept.model {
            Some(model) if model != self.id => {
                Err(Error::invalid("recordings", "the model's", "another model's"))
            }
            _ => Ok(()),
        }
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

    /// Ends the session and keeps what was recorded, for [`Decoder::session_with`].
    pub fn into_parts(self) -> (Vec<Sequence<D>>, Recordings<D>) {
        let Self { replay, wide_replay, kept, sequences, wide, .. } = self;
        let wide_replay = wide_replay.filter(|replay| replay.serves_others());
        let wide = wide_replay.map(|replay| (wide, replay)).or(kept.wide);
        let plain = replay.filter(|replay| replay.serves_others()).or(kept.plain);
        (sequences, Recordings { plain, wide, ..kept })
    }

    /// How often a step was recorded, as [`Recordings::count`].
    pub fn recordings(&self) -> usize {
        let own = self.replay.iter().chain(&self.wide_replay);
        own.map(|replay| replay.recordings()).sum::<usize>() + self.kept.count()
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
        all(self.likeliest(model, tokens)?)
    }

    /// [`step_greedy`](Self::step_greedy), with `None` for a sequence whose logits are infinite or not numbers.
    pub(crate) fn likeliest(
        &mut self,
        model: &Decoder<D>,
        tokens: &[u32],
    ) -> Result<Vec<Option<u32>>> {
        let logits = self.advance(model, tokens)?;
        likeliest_of(model, logits, self.replay.as_deref())
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
        let draws = vec![draw.into(); tokens.len()];
        self.begin(model, tokens, &draws, units)?;
        all(self.fetch(model)?)
    }

    /// Appends one token to each sequence and has the next ones chosen on the device, which [`fetch`](Self::fetch) waits
    /// for where a recorded step [runs](Self::is_recorded); the logits, which the next step may overwrite.
    pub(crate) fn begin(
        &mut self,
        model: &Decoder<D>,
        tokens: &[u32],
        draws: &[Draw],
        units: &[f64],
    ) -> Result<D::Tensor> {
        self.chosen = None;
        let logits = self.advance(model, tokens)?;
        match &self.replay {
            Some(replay) => {
                if draws.iter().any(|draw| draw.temperature != 0.0) {
                    let asked = replay.sample(&model.device, draws, units);
                    asked.map_err(|error| model.recorded_failure(error))?;
                }
            }
            None => self.chosen = Some(drawn_of(model, &logits, draws, units)?),
        }
        Ok(logits)
    }

    /// The tokens of the step that [began](Self::begin), with `None` as in [`likeliest`](Self::likeliest).
    pub(crate) fn fetch(&mut self, model: &Decoder<D>) -> Result<Vec<Option<u32>>> {
        match (self.chosen.take(), &self.replay) {
            (Some(chosen), _) => Ok(chosen),
            (None, Some(replay)) => chosen_of(model, &**replay),
            (None, None) => Err(Error::Cancelled),
        }
    }

    /// Whether steps of one token are recorded, which only [`fetch`](Self::fetch) waits for.
    pub(crate) fn is_recorded(&self) -> bool {
        self.replay.is_some()
    }

    /// Appends several tokens to each sequence, of which all but the first may be guesses; the logits after each of
    /// them, `[tokens, vocab]`. [`truncate`](Self::truncate) forgets those that were wrong.
    ///
    /// # Errors
    /// As [`step`](Self::step).
    pub fn check(&mut self, model: &Decoder<D>, parts: &[Vec<u32>]) -> Result<Vec<f32>> {
        let logits = self.advance_by(model, parts)?;
        model.values(logits)
    }

    /// [`check`](Self::check), but only the likeliest token after each; `None` where a logit is infinite or not a
    /// number, which does not matter after a guess that was wrong.
    ///
    /// # Errors
    /// As [`step`](Self::step).
    pub fn check_greedy(
        &mut self,
        model: &Decoder<D>,
        parts: &[Vec<u32>],
    ) -> Result<Vec<Option<u32>>> {
        let logits = self.advance_by(model, parts)?;
        likeliest_of(model, logits, self.wide_replay.as_deref().filter(|_| self.is_wide(parts)))
    }

    /// [`check`](Self::check) with tokens that the device chooses, with `None` as in
    /// [`check_greedy`](Self::check_greedy); the logits too, which the next step may overwrite.
    pub(crate) fn check_chosen(
        &mut self,
        model: &Decoder<D>,
        parts: &[Vec<u32>],
        draws: &[Draw],
        units: &[f64],
    ) -> Result<(D::Tensor, Vec<Option<u32>>)> {
        let logits = self.advance_by(model, parts)?;
        let chosen = match self.wide_replay.as_deref().filter(|_| self.is_wide(parts)) {
            Some(replay) if draws.iter().all(|draw| draw.temperature == 0.0) => {
                chosen_of(model, replay)
            }
            _ => drawn_of(model, &logits, draws, units),
        };
        Ok((logits, chosen?))
    }

    /// Forgets all tokens of sequence `at` after the first `len`.
    ///
    /// # Errors
    /// As [`Decoder::truncate`]; [`Error::Invalid`] if there is no such sequence.
    pub fn truncate(&mut self, model: &Decoder<D>, at: usize, len: usize) -> Result<()> {
        let all = self.sequences.len();
        let missing = || Error::invalid("sequence", format!("below {all}"), at);
        model.truncate(self.sequences.get_mut(at).ok_or_else(missing)?, len)
    }

    /// Tokens that [`check`](Self::check) is to be given for each sequence, at most `most`, so that the device can record
    /// its steps (or as many as recorded ones have); `None` where it does not, and any number will do.
    pub fn wide(&mut self, most: usize) -> Option<usize> {
        if self.wide_replay.is_none() {
            self.wide = self.widest.min(most);
        }
        (self.wide > 1).then_some(self.wide)
    }

    /// Whether steps that check guesses are to be recorded, if they are not yet: where what was missed without
    /// them, `missed` seconds more by the next step, is what it took to record plain ones, and twice as much is
    /// expected of the rest. So a text has shown that it is worth it, and mostly goes on for long enough.
    pub(crate) fn is_worth_recording(&mut self, missed: f64, gain: f64) -> bool {
        if self.wide <= 1 || self.wide_replay.is_some() {
            return true;
        }
        self.missed += missed;
        let is_recorded = self.replay.as_ref().is_some_and(|own| own.is_recorded());
        let cost = self.kept.preparation.filter(|_| is_recorded).map(|cost| cost.as_secs_f64());
        cost.is_some_and(|cost| self.missed >= cost && gain >= 2.0 * cost)
    }

    /// Whether the last step took what all such steps take, and prepared nothing.
    pub(crate) fn is_steady(&self) -> bool {
        self.is_steady
    }

    /// Appends tokens; logits on the device, which the next step may overwrite.
    fn advance(&mut self, model: &Decoder<D>, tokens: &[u32]) -> Result<D::Tensor> {
        let each: Vec<&[u32]> = tokens.chunks(1).collect();
        self.check_step(model, &each)?;
        let begin = Instant::now();
        // Whether this step has prepared a recorded one in vain.
        let mut in_vain = false;
        if self.replay.is_none() && self.can_replay && self.steps >= PLAIN_STEPS {
            let recorded = model.record(&self.sequences, 1, &mut self.kept.plain, true);
            self.replay = model.unless_short(recorded)?.flatten();
            self.can_replay = self.replay.is_some();
            in_vain = !self.can_replay;
            self.kept.preparation = self.can_replay.then(|| begin.elapsed());
        }
        let mut logits = None;
        if let Some(replay) = &mut self.replay {
            let begin = Instant::now();
            self.is_steady = replay.is_recorded();
            logits = match model.replay(&mut **replay, &mut self.sequences, tokens) {
                Ok(logits) => logits,
                Err(error) => return Err(self.failure(model, error)),
            };
            if let (false, Some(preparation)) = (self.is_steady, &mut self.kept.preparation) {
                *preparation += begin.elapsed();
            }
        }
        let logits = match logits {
            Some(logits) => logits,
            None => {
                if self.replay.take().is_some() {
                    (self.can_replay, in_vain) = (false, true);
                }
                self.is_steady = !self.can_replay && !in_vain;
                let mut batch: Vec<_> = self.sequences.iter_mut().collect();
                model.forward(&mut batch, &each, LogitRows::Last)?
            }
        };
        self.steps += 1;
        Ok(logits)
    }

    /// Appends tokens to each sequence; logits of all on the device, which the next step may overwrite. Where steps are
    /// recorded, each has [as many](Self::wide) tokens.
    fn advance_by(&mut self, model: &Decoder<D>, parts: &[Vec<u32>]) -> Result<D::Tensor> {
        let each: Vec<&[u32]> = parts.iter().map(Vec::as_slice).collect();
        self.check_step(model, &each)?;
        let is_wide = self.is_wide(parts);
        if self.wide_replay.is_none() && is_wide {
            let (tokens, mut kept) = (self.wide, self.kept.wide.take());
            let mut kept = kept.take_if(|(of, _)| *of == tokens).map(|(_, replay)| replay);
            let recorded = model.record(&self.sequences, tokens, &mut kept, true);
            self.wide_replay = model.unless_short(recorded)?.flatten();
        }
        let mut logits = None;
        if let Some(replay) = self.wide_replay.as_mut().filter(|_| is_wide) {
            self.is_steady = replay.is_recorded();
            let tokens = each.concat();
            logits = match model.replay(&mut **replay, &mut self.sequences, &tokens) {
                Ok(logits) => logits,
                Err(error) => return Err(self.failure(model, error)),
            };
        }
        let logits = match logits {
            Some(logits) => logits,
            None => {
                if is_wide {
                    self.wide_replay = None;
                    (self.widest, self.wide) = (1, 1);
                }
                self.is_steady = !is_wide;
                let rows: Vec<usize> = (0..each.iter().map(|part| part.len()).sum()).collect();
                let mut batch: Vec<_> = self.sequences.iter_mut().collect();
                model.forward(&mut batch, &each, LogitRows::Rows(&rows))?
            }
        };
        self.steps += 1;
        Ok(logits)
    }

    /// Whether a step of these tokens is one that is recorded.
    fn is_wide(&self, parts: &[Vec<u32>]) -> bool {
        self.wide > 1 && parts.iter().all(|part| part.len() == self.wide)
    }

    fn check_step(&mut self, model: &Decoder<D>, tokens: &[&[u32]]) -> Result<()> {
        if model.id != self.model {
            return Err(Error::invalid("model", "the one that made the session", "another"));
        }
        model.check_ranks()?;
        let batch: Vec<_> = self.sequences.iter_mut().collect();
        model.check_step(&batch, tokens)
    }

    /// A replay has failed: nothing recorded is launched again.
    fn failure(&mut self, model: &Decoder<D>, error: Error) -> Error {
        (self.replay, self.wide_replay, self.kept) = (None, None, Recordings::default());
        model.recorded_failure(error)
    }
}

/// The tokens of all sequences, where all have one.
fn all(chosen: Vec<Option<u32>>) -> Result<Vec<u32>> {
    let token = |(row, token): (usize, Option<u32>)| {
        token.ok_or_else(|| Error::Logits { got: format!("a NaN or infinity, sequence {row}") })
    };
    chosen.into_iter().enumerate().map(token).collect()
}

/// Tokens that the device chooses by the logits of a step.
pub(crate) fn drawn_of<D: Math>(
    model: &Decoder<D>,
    logits: &D::Tensor,
    draws: &[Draw],
    units: &[f64],
) -> Result<Vec<Option<u32>>> {
    let chosen = model.device.sample(logits, draws, units).map_err(|error| model.failure(error));
    model.check_ranks()?;
    chosen
}

/// Tokens that a recorded step has chosen, which is waited for.
fn chosen_of<D: Math>(model: &Decoder<D>, replay: &dyn Replay<D>) -> Result<Vec<Option<u32>>> {
    let chosen = replay.chosen().map_err(|error| model.recorded_failure(error));
    model.check_ranks()?;
    chosen
}

/// The likeliest tokens by the logits of a step, which the device knows already if a replay ran it.
fn likeliest_of<D: Math>(
    model: &Decoder<D>,
    logits: D::Tensor,
    replay: Option<&dyn Replay<D>>,
) -> Result<Vec<Option<u32>>> {
    if let Some(replay) = replay {
        return chosen_of(model, replay);
    }
    let logits = model.values(logits)?;
    let rows = logits.chunks(model.config.vocab_size);
    Ok(rows.map(|row| check_logits(row).ok().map(|()| likeliest(row).0)).collect())
}

impl<D: Math> Decoder<D> {
    /// A replay of so many tokens for each sequence, if the device records steps: what is `kept` of other batches where it
    /// fits, else one that is to be prepared, if `prepares` says so.
    fn record(
        &self,
        sequences: &[Sequence<D>],
        tokens: usize,
        kept: &mut Option<Box<dyn Replay<D>>>,
        prepares: bool,
    ) -> Result<Option<Box<dyn Replay<D>>>> {
        if kept.is_none() && !prepares {
            return Ok(None);
        }
        let Some(first) = sequences.first() else { return Ok(None) };
        let (mut key_shifts, mut key_feedback) = (Vec::new(), Vec::new());
        for (index, layer) in self.layers.iter().enumerate() {
            let caches = sequences.iter().map(|sequence| &sequence.caches[index]);
            let keys = match self.narrow_keys(index, caches)? {
                None => None,
                // Keys of some sequences are less their mean and those of others are not.
                Some((_, places)) if !layer.kind.rotary || places.contains(&0) => return Ok(None),
                Some((keys, _)) => Some(keys),
            };
            key_shifts.push(keys.map(|keys| &keys.shifts));
            key_feedback.push(keys.map(|keys| &keys.feedback));
        }
        let of_layer = |layer| sequences.iter().map(|s| &s.caches[layer]).collect();
        let batch = ReplayBatch {
            caches: (0..self.layers.len()).map(of_layer).collect(),
            tokens,
            changes: self.shard.is_none(),
            query_heads: self.local.query_heads,
            head_dim: self.config.head_dim,
            scale: self.scale(),
            rope: &first.rope,
            rotary: self.layers.iter().map(|layer| layer.kind.rotary).collect(),
            key_shifts,
            key_feedback,
            capacity: sequences.iter().map(Sequence::capacity).max().unwrap_or(0),
            vocab_size: self.config.vocab_size,
        };
        if let Some(mut replay) = kept.take() {
            // SAFETY: as below.
            let replaced = unsafe { replay.replace(&self.device, &batch, prepares) };
            match replaced? {
                true => return Ok(Some(replay)),
                false if !prepares => {
                    *kept = Some(replay);
                    return Ok(None);
                }
                false => {}
            }
        }
        // SAFETY: a session owns the caches, in the `Vec`s of sequences that it does not move out of while it has
        // the replay. What it appends otherwise and forgets changes their lengths, which `replay` tells. Weights
        // are those of this model, whose id sessions and steps compare; each step is checked for room first. `replay`
        // describes a step by operations on tensors that it drops.
        unsafe { self.device.replay(&batch) }
    }

    /// `None` where memory was short, of several ranks that of any: a recorded step saves time alone.
    fn unless_short<T>(&self, recorded: Result<T>) -> Result<Option<T>> {
        match self.together(|| recorded) {
            Err(Error::OutOfMemory { .. }) if self.ranks() == 1 => Ok(None),
            Err(Error::RankOutOfMemory { .. }) => Ok(None),
            recorded => recorded.map(Some),
        }
    }

    /// A step of all sequences by `replay`: [`Decoder::forward`], described once; `None` where memory was short for it, and
    /// the same step can be run in another way.
    fn replay(
        &self,
        replay: &mut dyn Replay<D>,
        batch: &mut [Sequence<D>],
        tokens: &[u32],
    ) -> Result<Option<D::Tensor>> {
        let (device, config) = (&self.device, &self.config);
        let lens: Vec<usize> = batch.iter().map(Sequence::len).collect();
        batch.iter_mut().for_each(|sequence| sequence.broken = true);
        self.begins();
        // Of several ranks none can leave what is launched as a whole: from the second run on.
        let is_whole = self.shard.is_some() && replay.is_rehearsed();
        let ran = replay.run(device, tokens, &lens, &|step| {
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
        });
        let has_run = match is_whole {
            true => ran.map(|()| true)?,
            false => self.unless_short(ran)?.is_some(),
        };
        if !has_run {
            // Another way writes the same slots.
            let count = tokens.len() / batch.len().max(1);
            let again = batch.iter().map(|sequence| sequence.can_append_again(count)).collect();
            // Rings of one rank may reach back less far than those of another.
            let again = self.on_all_ranks(again)?;
            batch.iter_mut().zip(again).for_each(|(sequence, again)| sequence.broken = !again);
            return Ok(None);
        }
        for sequence in batch {
            for cache in &mut sequence.caches {
                replay.advance(cache)?;
            }
            sequence.broken = false;
        }
        Ok(Some(replay.logits().clone()))
    }
}
