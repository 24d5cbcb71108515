//! Another model that guesses what the one that answers is going to say.
//!
//! The other model has a sequence of its own for each request, and chooses as the request does: with its random
//! numbers, temperature and penalties. Two models that agree on the probabilities then agree on the token too, drawn
//! ones included, and no answer ever depends on a guess.

use std::sync::Arc;
use std::time::Instant;

use moa_core::Plan;

use crate::Result;
use crate::decoder::logits::LogitRows;
use crate::decoder::model::Decoder;
use crate::decoder::sequence::Sequence;
use crate::device::Math;
use crate::engine::pace::{Candidate, Pace, WORTH, all_that_fit};
use crate::engine::request::RequestId;
use crate::engine::running::{Answers, Running};
use crate::engine::sampling::Sampler;
use crate::engine::speculate::{Draft, learned};

/// A model with the plan of its sequences.
#[derive(Debug)]
pub(crate) struct DraftModel<D: Math> {
    pub(crate) model: Arc<Decoder<D>>,
    pub(crate) plan: Plan,
}

impl<D: Math> Clone for DraftModel<D> {
    /// The network is shared, not copied.
    fn clone(&self) -> Self {
        Self { model: Arc::clone(&self.model), plan: self.plan.clone() }
    }
}

impl<D: Math> DraftModel<D> {
    /// Tokens that its sequence beside one of `capacity` tokens has room for.
    pub(crate) fn capacity(&self, capacity: usize) -> usize {
        capacity.min(self.model.config().context_length())
    }
}

/// How likely a guess is taken to be right before any was seen.
const FIRST_RATE: f64 = 0.7;
/// A step of the other model before one was measured, in steps of the model that answers.
const FIRST_COST: f64 = 0.25;
/// Tokens that a guess may have to be preceded by.
const NEAR: usize = 16;
/// The part of the time that finding out again may take, where guesses do not pay.
const TRIES: f64 = 0.01;

/// The other model at work for the requests of an engine.
pub(crate) struct Guesser<D: Math> {
    draft: DraftModel<D>,
    beside: Vec<Beside<D>>,
    /// How likely guesses are right for a request that has had none.
    rate: f64,
    /// Times of steps that guess.
    pace: Pace,
    /// Time of a token of a prompt.
    read_seconds: Option<f64>,
    /// Time that may be spent on finding out whether guesses pay again.
    credit: f64,
}

/// The other model's side of a request.
struct Beside<D: Math> {
    id: RequestId,
    /// Holds the beginning of the request's tokens; `None` if it cannot be had.
    sequence: Option<Sequence<D>>,
}

/// Where a request is.
pub(crate) struct Place<'a> {
    pub(crate) run: &'a Running,
    /// Most tokens that may be guessed, 0 for none.
    pub(crate) most: usize,
    /// Of its sequence.
    pub(crate) capacity: usize,
}

/// The limits of a step.
#[derive(Clone, Copy)]
pub(crate) struct Limits<'a> {
    /// Tokens that may be checked beside those that are known.
    pub(crate) room: usize,
    /// Slots of rings by which guesses are forgotten again.
    pub(crate) slack: usize,
    /// Most tokens of prompts that are read.
    pub(crate) chunk: usize,
    /// Times of the steps that check, to leave out guesses that do not pay; `None` guesses always.
    pub(crate) pace: Option<&'a Pace>,
    pub(crate) answers: Answers,
}

impl<D: Math> Guesser<D> {
    pub(crate) fn new(draft: DraftModel<D>) -> Self {
        Self {
            draft,
            beside: Vec::new(),
            rate: FIRST_RATE,
            pace: Pace::default(),
            read_seconds: None,
            credit: 0.0,
        }
    }

    /// Drops what belongs to a request that has ended.
    pub(crate) fn forget(&mut self, run: &Running) {
        self.beside.retain(|one| one.id != run.id);
    }

    pub(crate) fn clear(&mut self) {
        self.beside.clear();
    }

    /// Guesses for the next step, for each request in their order, and how many of them are to be checked: all.
    ///
    /// # Errors
    /// Those of the device.
    pub(crate) fn guess(&mut self, places: &[Place<'_>], limits: Limits<'_>) -> Result<Vec<Draft>> {
        let rate = |place: &Place<'_>| place.run.rate_of_model().unwrap_or(self.rate);
        let mut candidates: Vec<Candidate> = places
            .iter()
            .map(|place| Candidate { rate: rate(place), most: self.most(place) })
            .collect();
        self.open(places, &candidates, limits.slack);
        // The one that is nearest to its end is read first.
        let unread: Vec<usize> = places.iter().map(|place| self.unread(place.run)).collect();
        let far = (0..places.len()).filter(|at| candidates[*at].most > 0 && unread[*at] > NEAR);
        let next = far.min_by_key(|at| unread[*at]);
        if let Some(at) = next
            && self.is_worth_reading(at, places, &candidates, unread[at], limits)
        {
            self.read(places[at].run, limits.chunk)?;
        }
        for (candidate, place) in candidates.iter_mut().zip(places) {
            if self.unread(place.run) > NEAR {
                candidate.most = 0;
            }
        }
        let shares = self.shares(&candidates, limits);
        self.propose(places, &candidates, &shares)
    }

    /// Most guesses for a request by the lengths of its sequences.
    fn most(&self, place: &Place<'_>) -> usize {
        let known = place.run.history().len();
        let room = self.draft.capacity(place.capacity).saturating_sub(known);
        if place.run.before > 0 { 0 } else { place.most.min(room) }
    }

    /// Opens sequences for requests that are new.
    fn open(&mut self, places: &[Place<'_>], candidates: &[Candidate], slack: usize) {
        let DraftModel { model, plan } = &self.draft;
        for (place, candidate) in places.iter().zip(candidates) {
            let id = place.run.id;
            if candidate.most > 0 && self.beside.iter().all(|one| one.id != id) {
                // Where there is no memory for guesses there are none.
                let capacity = self.draft.capacity(place.capacity);
                let sequence = model.open(plan, capacity, slack).ok();
                self.beside.push(Beside { id, sequence });
            }
        }
    }

    fn sequence(&self, run: &Running) -> Option<&Sequence<D>> {
        self.beside.iter().find(|one| one.id == run.id)?.sequence.as_ref()
    }

    /// Tokens of a request before its last one that its sequence here does not hold.
    fn unread(&self, run: &Running) -> usize {
        let held = self.sequence(run).map(Sequence::len);
        held.map_or(usize::MAX, |held| (run.history().len() - 1).saturating_sub(held))
    }

    /// What guesses take to make, in plain steps of these many requests.
    fn cost<'a>(&'a self, plain: usize, pace: &Pace) -> impl Fn(&[usize]) -> f64 + 'a {
        let seconds = pace.seconds(plain);
        move |shares: &[usize]| {
            let rounds = 0..shares.iter().copied().max().unwrap_or(0);
            let rows = |round: usize| shares.iter().filter(|share| **share > round).count();
            let cost = |rows: usize| match (self.pace.nearest(rows), seconds) {
                (Some(own), Some(plain)) => own / plain,
                _ => FIRST_COST,
            };
            rounds.map(|round| cost(rows(round))).sum()
        }
    }

    /// Whether the rest of a prompt is to be read, for guesses that will then be made.
    fn is_worth_reading(
        &self,
        at: usize,
        places: &[Place<'_>],
        candidates: &[Candidate],
        unread: usize,
        limits: Limits<'_>,
    ) -> bool {
        if unread == usize::MAX {
            return false;
        }
        let Some(pace) = limits.pace else { return true };
        let Some(plain) = pace.seconds(places.len()) else { return false };
        // As if the others had no guesses.
        let mut alone = vec![Candidate::default(); places.len()];
        alone[at] = candidates[at];
        let cost = self.read_seconds.unwrap_or(0.0) * unread as f64;
        let (_, speed) = pace.shares(&alone, limits.room, self.cost(places.len(), pace));
        let steps = limits.answers.left(places[at].run);
        let gained = if speed > WORTH { steps * plain * (1.0 - 1.0 / speed) } else { 0.0 };
        gained > cost || (self.read_seconds.is_some() && self.credit > cost)
    }

    /// Reads more of a prompt.
    fn read(&mut self, run: &Running, chunk: usize) -> Result<()> {
        let begin = Instant::now();
        let model = Arc::clone(&self.draft.model);
        let Some(one) = self.beside.iter_mut().find(|one| one.id == run.id) else { return Ok(()) };
        let Some(sequence) = &mut one.sequence else { return Ok(()) };
        let from = sequence.len();
        let tokens = &run.history()[from..(from + chunk).min(run.history().len() - 1)];
        if model.check_tokens(tokens).is_err() {
            // It does not know one of them.
            one.sequence = None;
            return Ok(());
        }
        model.forward(&mut [sequence], &[tokens], LogitRows::None)?;
        model.device().synchronize()?;
        let seconds = begin.elapsed().as_secs_f64();
        self.credit = (self.credit - seconds).max(0.0);
        let own = seconds / tokens.len() as f64;
        self.read_seconds = Some(self.read_seconds.map_or(own, |known| (known + own) / 2.0));
        Ok(())
    }

    /// How many tokens to guess for each.
    fn shares(&mut self, candidates: &[Candidate], limits: Limits<'_>) -> Vec<usize> {
        let Some(pace) = limits.pace else { return all_that_fit(candidates, limits.room) };
        let plain = candidates.len();
        // What is to be faster is measured first.
        let Some(seconds) = pace.seconds(plain) else { return vec![0; plain] };
        let (shares, spent) = {
            let cost = self.cost(plain, pace);
            let (shares, _) = pace.shares(candidates, limits.room, &cost);
            let mut one = vec![0; plain];
            let first = candidates.iter().position(|one| one.most > 0).filter(|_| limits.room > 0);
            first.into_iter().for_each(|first| one[first] = 1);
            // The token, and a row more to check it.
            (shares, first.map(|_| (one, (cost(&[1]) + pace.cost(plain, 1) - 1.0) * seconds)))
        };
        if shares.iter().any(|share| *share > 0) {
            return shares;
        }
        self.credit += TRIES * seconds;
        match spent {
            Some((one, spent)) if self.credit > spent => {
                self.credit = 0.0;
                one
            }
            _ => shares,
        }
    }

    /// Makes so many guesses for each request.
    fn propose(
        &mut self,
        places: &[Place<'_>],
        candidates: &[Candidate],
        shares: &[usize],
    ) -> Result<Vec<Draft>> {
        let model = Arc::clone(&self.draft.model);
        let vocab = model.config().vocab_size;
        let mut drafts: Vec<Draft> =
            candidates.iter().map(|candidate| Draft::of_model(candidate.rate)).collect();
        let mut samplers: Vec<Option<Sampler>> = places
            .iter()
            .zip(shares)
            .map(|(place, share)| (*share > 0).then(|| place.run.sampler()))
            .collect();
        for round in 0..shares.iter().copied().max().unwrap_or(0) {
            let (mut at, mut batch, mut tokens) = (Vec::new(), Vec::new(), Vec::new());
            for one in &mut self.beside {
                let Some(own) = places.iter().position(|place| place.run.id == one.id) else {
                    continue;
                };
                let guesses = &drafts[own].tokens;
                if shares[own] <= round || samplers[own].is_none() || guesses.len() < round {
                    continue;
                }
                let Some(held) = one.sequence.as_ref().map(Sequence::len) else { continue };
                let new = match guesses.last() {
                    Some(last) => vec![*last],
                    None => places[own].run.history()[held..].to_vec(),
                };
                if model.check_tokens(&new).is_err() {
                    one.sequence = None;
                }
                let Some(sequence) = &mut one.sequence else { continue };
                at.push(own);
                batch.push(sequence);
                tokens.push(new);
            }
            if batch.is_empty() {
                break;
            }
            let begin = Instant::now();
            let tokens: Vec<&[u32]> = tokens.iter().map(Vec::as_slice).collect();
            let logits = model.forward(&mut batch, &tokens, LogitRows::Last)?;
            let mut logits = model.values(logits)?;
            let rows = tokens.iter().map(|new| new.len()).sum();
            self.pace.observe(rows, begin.elapsed().as_secs_f64());
            for (own, row) in at.into_iter().zip(logits.chunks_mut(vocab)) {
                let Some(sampler) = &mut samplers[own] else { continue };
                // What it cannot choose from, it does not guess from.
                match places[own].run.guess(sampler, &drafts[own].tokens, row) {
                    Ok(token) => drafts[own].tokens.push(token),
                    Err(_) => samplers[own] = None,
                }
            }
        }
        Ok(drafts)
    }

    /// Forgets the guesses that were wrong: a request that had `len` tokens was right so many times.
    pub(crate) fn settle(&mut self, id: RequestId, len: usize, right: usize, checked: usize) {
        self.rate = learned(self.rate, right, right < checked);
        let Some(one) = self.beside.iter_mut().find(|one| one.id == id) else { return };
        if let Some(sequence) = &mut one.sequence
            && sequence.len() > len + right
            && self.draft.model.truncate(sequence, len + right).is_err()
        {
            one.sequence = None;
        }
    }
}
