use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Instant;

use crate::Result;
use crate::decoder::logits::LogitRows;
use crate::decoder::model::Decoder;
use crate::decoder::sequence::Sequence;
use crate::device::Math;
use crate::engine::choice::{Choices, Chosen};
use crate::engine::draft_model::{Limits, Place};
use crate::engine::logprobs::Logprobs;
use crate::engine::pace::{Candidate, ROWS, all_that_fit};
use crate::engine::request::Event;
use crate::engine::running::Running;
use crate::engine::serve::Engine;
use crate::engine::speculate::{Draft, Speculation};

impl<D: Math> Engine<D> {
    /// One step of the running requests: the whole loop of generation. Where the batch stays as it is and `goes_on` says
    /// so, the device has begun the next one when this returns.
    pub(super) fn advance(&mut self, goes_on: GoesOn<'_>) -> Result<()> {
        if self.running.is_empty() {
            return Ok(());
        }
        let begin = Instant::now();
        let reads = self.running.iter().any(Running::is_reading);
        let speculates = self.options.speculation != Speculation::Off;
        let step = match (reads, speculates) {
            (true, _) => self.read(),
            (false, true) => self.speculate(),
            (false, false) => self.decode(goes_on),
        };
        if let Err(error) = step {
            self.fail(&error);
            return Err(error);
        }
        let time = if reads { &mut self.usage.prefill } else { &mut self.usage.decode };
        *time += begin.elapsed();
        Ok(())
    }

    /// How many tokens of their prompts the running requests read in the next step.
    ///
    /// Half of a step is for the oldest prompt, so that none waits forever, and the other half for those
    /// of which least is left, so that a short one need not wait for a long one before it.
    fn shares(&self) -> Vec<usize> {
        let mut shares = vec![0; self.running.len()];
        let mut left = self.options.prefill_chunk;
        let mut give = |at: usize, most: usize| {
            let most = shares[at] + most.min(left);
            let share = self.running[at].stretch(most, self.many_rows).max(shares[at]);
            left -= share - shares[at];
            shares[at] = share;
        };
        let mut order: Vec<usize> =
            (0..self.running.len()).filter(|at| self.running[*at].is_reading()).collect();
        if let Some(oldest) = order.first() {
            give(*oldest, self.options.prefill_chunk.div_ceil(2));
        }
        order.sort_by_key(|at| self.running[*at].unread());
        for at in order {
            give(at, usize::MAX);
        }
        shares
    }

    /// Reads a stretch of unread prompts, and the last token of the others.
    fn read(&mut self) -> Result<()> {
        let shares = self.shares();
        let part = |(run, share): (&Running, &usize)| run.part(*share).to_vec();
        let parts: Vec<Vec<u32>> = self.running.iter().zip(&shares).map(part).collect();
        let (mut batch, mut tokens) = (Vec::new(), Vec::new());
        for (sequence, part) in self.batch.apart().iter_mut().zip(&parts) {
            // A prompt may have to wait for those before it.
            if !part.is_empty() {
                batch.push(sequence);
                tokens.push(part.as_slice());
            }
        }
        let (mut rows, mut end) = (Vec::new(), 0);
        // Rows that tokens of prompts follow which are told, each with the number of likeliest ones.
        let mut told = Vec::new();
        for (run, part) in self.running.iter().zip(&parts) {
            let start = end;
            end += part.len();
            let is_last = run.is_read_after(part.len());
            if is_last {
                rows.push(end - 1);
            }
            if let Some(most) = run.prompt_logprobs() {
                told.extend((start..end - usize::from(is_last)).map(|row| (row, most)));
            }
        }
        let (logits, prompts) = match told.is_empty() {
            true => {
                let rows = LogitRows::Rows(&rows);
                (self.model.forward(&mut batch, &tokens, rows)?, Vec::new())
            }
            false => {
                let all = [&rows[..], &told.iter().map(|own| own.0).collect::<Vec<_>>()].concat();
                let hidden =
                    self.model.hidden_states(&mut batch, &tokens, LogitRows::Rows(&all))?;
                let most = told.into_iter().map(|own| own.1);
                let prompts = prompt_logprobs(&self.model, &hidden, rows.len(), most)?;
                (self.model.logits_of(&hidden, 0..rows.len())?, prompts)
            }
        };
        let mut prompts = prompts.into_iter();
        let mut took_part: Vec<_> =
            self.running.iter_mut().zip(&parts).filter(|(_, part)| !part.is_empty()).collect();
        // Without rows the device need not be waited for.
        let mut chosen = match rows.is_empty() {
            true => Chosen::by_device(Vec::new()),
            false => {
                let choose = took_part.iter_mut().filter(|own| own.0.is_read_after(own.1.len()));
                Chosen::from_logits(&self.model, logits, choose.map(|own| &mut *own.0))?
            }
        };
        self.model.all_done()?;
        let mut row = 0;
        for (run, part) in took_part {
            if run.is_reading() {
                self.usage.prompt_tokens += part.len();
            }
            if run.prompt_logprobs().is_some() {
                run.tell_prompt(part.len(), &mut prompts, &mut self.events);
            }
            run.took_in(part.len(), &mut self.events);
            if !run.is_reading() {
                chosen.tell(row, run, &mut self.events);
                row += 1;
            }
        }
        Ok(())
    }

    /// A decode step in which guesses are checked, if that is expected to be faster.
    fn speculate(&mut self) -> Result<()> {
        let model = Arc::clone(&self.model);
        let plain = self.running.len();
        let most = self.options.speculation.draft_tokens();
        let wide = self.batch.session(&model)?.wide(most + 1);
        self.pace.wide = wide;
        let (most, room) = match wide {
            Some(wide) => {
                // All requests are given as many tokens.
                let fits = |at| self.batch.can_check(at, wide - 1) == wide - 1;
                let fits = plain * wide < ROWS && (0..plain).all(fits);
                (wide - 1, if fits { plain * (wide - 1) } else { 0 })
            }
            None => {
                // Every token is to have the bits that a plain step gives it.
                let device = model.device();
                let most = most.min(device.few_rows(1).saturating_sub(1));
                let room = device.few_rows(plain).saturating_sub(plain);
                (most, room.min(most.saturating_mul(plain)))
            }
        };
        let (drafts, shares) = match self.guesser.is_some() {
            true => self.ask(most, room)?,
            false => self.look_up(most, room)?,
        };
        let begin = Instant::now();
        let checked: usize = shares.iter().sum();
        let rows = match wide {
            _ if checked == 0 => plain,
            Some(wide) => plain * wide,
            None => plain + checked,
        };
        if checked > 0 {
            self.check(&drafts, &shares, wide)?;
        } else {
            self.decode(None)?;
            for (run, draft) in self.running.iter_mut().zip(&drafts) {
                run.compare(draft);
            }
        }
        if self.batch.session(&model)?.is_steady() {
            self.pace.observe(rows, begin.elapsed().as_secs_f64());
        }
        Ok(())
    }

    /// Guesses from the requests' own tokens, and how many of them are checked.
    fn look_up(&mut self, most: usize, room: usize) -> Result<(Vec<Draft>, Vec<usize>)> {
        let mut drafts: Vec<Draft> = self.running.iter().map(|run| run.draft(most)).collect();
        if self.pace.wide.is_none() {
            for (at, draft) in drafts.iter_mut().enumerate() {
                draft.tokens.truncate(self.batch.can_check(at, draft.tokens.len()));
            }
        }
        let candidates: Vec<_> = drafts.iter().map(Draft::candidate).collect();
        if !self.options.speculation.is_adaptive() {
            return Ok((drafts, all_that_fit(&candidates, room)));
        }
        // Ranks measure different times.
        let model = Arc::clone(&self.model);
        let shares = model.agree(|| self.shares_that_pay(&candidates, room))?;
        Ok((drafts, shares))
    }

    /// How many guesses of each request to check, by measured times.
    fn shares_that_pay(&mut self, candidates: &[Candidate], room: usize) -> Result<Vec<usize>> {
        let (mut shares, speed) = self.pace.shares(candidates, room, |_| 0.0);
        let session = self.batch.session(&self.model)?;
        if shares.iter().any(|share| *share > 0) {
            let seconds = self.pace.seconds(candidates.len()).unwrap_or(0.0);
            // The batch changes when the first request ends.
            let steps = self.running.iter().map(|run| self.answers.left(run));
            let gain = steps.fold(f64::INFINITY, f64::min) * seconds * (1.0 - 1.0 / speed);
            if !session.is_worth_recording((speed - 1.0) * seconds, gain) {
                shares.fill(0);
            }
        }
        Ok(shares)
    }

    /// Guesses of another model, all of which are checked.
    fn ask(&mut self, most: usize, room: usize) -> Result<(Vec<Draft>, Vec<usize>)> {
        let Some(guesser) = &mut self.guesser else { return Ok((Vec::new(), Vec::new())) };
        let speculation = self.options.speculation;
        let place = |(at, run): (usize, &'_ Running)| {
            let most = most.min(run.left().saturating_sub(1));
            self.batch.can_check(at, most)
        };
        let most: Vec<usize> = self.running.iter().enumerate().map(place).collect();
        let places: Vec<_> = self
            .running
            .iter()
            .zip(most)
            .enumerate()
            .map(|(at, (run, most))| Place {
                run,
                most,
                capacity: self.batch.get(at).map_or(0, Sequence::capacity),
            })
            .collect();
        let limits = Limits {
            room,
            slack: speculation.draft_tokens(),
            chunk: self.options.prefill_chunk,
            pace: speculation.is_adaptive().then_some(&self.pace),
            answers: self.answers,
        };
        let mut drafts = guesser.guess(&places, limits)?;
        let vocab = self.model.config().vocab_size;
        for draft in &mut drafts {
            // The other model's embedding may have rows that stand for nothing.
            let known = draft.tokens.iter().take_while(|token| (**token as usize) < vocab).count();
            draft.tokens.truncate(known);
        }
        let shares = drafts.iter().map(|draft| draft.tokens.len()).collect();
        Ok((drafts, shares))
    }

    /// A step of each request's last token and so many of its guesses, filled up to `wide` tokens.
    fn check(&mut self, drafts: &[Draft], shares: &[usize], wide: Option<usize>) -> Result<()> {
        let (model, events) = (&*self.model, &mut self.events);
        let part = |((run, draft), share): ((&Running, &Draft), &usize)| {
            let mut part = [run.part(0), &draft.tokens[..*share]].concat();
            part.resize(wide.unwrap_or(part.len()), run.last());
            part
        };
        let parts: Vec<Vec<u32>> = self.running.iter().zip(drafts).zip(shares).map(part).collect();
        let session = self.batch.session(model)?;
        let lens: Vec<usize> = session.sequences().iter().map(Sequence::len).collect();
        let mut chosen = match session.can_sample() {
            true => {
                let mut choices = Choices::default();
                for (run, part) in self.running.iter().zip(&parts) {
                    // Those that are not used are drawn again.
                    let mut sampler = run.sampler();
                    part.iter().for_each(|_| choices.push(run.draw(), || sampler.unit()));
                }
                let (logits, tokens) =
                    session.check_chosen(model, &parts, &choices.draws, &choices.units)?;
                choices.with(model, logits, tokens)?
            }
            false => Chosen::by_host(model, session.check(model, &parts)?),
        };
        model.all_done()?;
        let mut first = 0;
        for (at, run) in self.running.iter_mut().enumerate() {
            let known = run.history().len();
            let choose = |run: &mut Running, row: usize, events: &mut VecDeque<Event>| {
                let row = first + row;
                if chosen.is_by_device(row) && run.draw().is_some_and(|own| own.temperature != 0.0)
                {
                    run.unit();
                }
                chosen.tell(row, run, events);
            };
            let (share, part) = (shares[at], parts[at].len());
            let right = run.check(&drafts[at], share, choose, events);
            if 1 + right < part {
                session.truncate(model, at, lens[at] + 1 + right)?;
            }
            if let Some(guesser) = &mut self.guesser {
                guesser.settle(run.id, known, right, share);
            }
            first += part;
            self.usage.decoded_tokens += 1 + right;
            self.usage.drafted_tokens += share;
            self.usage.accepted_tokens += right;
        }
        Ok(())
    }

    /// A token for every request.
    fn decode(&mut self, goes_on: GoesOn<'_>) -> Result<()> {
        let chosen = match self.ahead.take() {
            Some(Ahead::Runs) => {
                Chosen::by_device(self.batch.session(&self.model)?.fetch(&self.model)?)
            }
            Some(Ahead::Ended(tokens)) => Chosen::by_device(tokens?),
            None if self.model.device().can_sample() => {
                let (choices, logits) = self.begin()?;
                let tokens = self.batch.session(&self.model)?.fetch(&self.model)?;
                choices.with(&self.model, logits, tokens)?
            }
            None => {
                let tokens: Vec<u32> = self.running.iter().map(Running::last).collect();
                let logits = self.batch.session(&self.model)?.step(&self.model, &tokens)?;
                Chosen::by_host(&self.model, logits)
            }
        };
        self.usage.decoded_tokens += self.running.len();
        self.running.iter_mut().for_each(|run| run.took_in(1, &mut self.events));
        let told = chosen.note(&mut self.running);
        let begun = match self.goes_ahead(goes_on)? {
            true => self.begin().map(|_| self.ahead = Some(Ahead::Runs)),
            false => Ok(()),
        };
        told.say(&mut self.running, &mut self.events);
        begun
    }

    /// Has the device decode each request's last token and choose the next one.
    fn begin(&mut self) -> Result<(Choices, D::Tensor)> {
        let tokens: Vec<u32> = self.running.iter().map(Running::last).collect();
        let choices = Choices::of(&mut self.running);
        let session = self.batch.session(&self.model)?;
        let logits = session.begin(&self.model, &tokens, &choices.draws, &choices.units)?;
        Ok((choices, logits))
    }

    /// Whether the next step begins before the tokens of the last one are told, now that all ranks have ended that. Clients of
    /// ranks come to the first one, which says it to all.
    fn goes_ahead(&self, goes_on: GoesOn<'_>) -> Result<bool> {
        match goes_on {
            Some(goes_on) => self.model.agree(|| Ok(self.may_go_ahead() && goes_on())),
            None => self.model.all_done().map(|()| false),
        }
    }

    /// Whether the next step is known before the tokens of the last one are told: it is recorded, of the same
    /// requests, and none of them looks at logits or waits for guesses.
    fn may_go_ahead(&self) -> bool {
        let is_alike = |run: &Running| !run.has_ended() && run.draw().is_some();
        self.options.speculation == Speculation::Off
            && !self.may_admit()
            && self.batch.is_recorded()
            && self.running.iter().all(is_alike)
    }

    /// Waits for the step that the device has begun, if it has; its tokens are told by the next call.
    pub(super) fn settle(&mut self) {
        if let Some(Ahead::Runs) = self.ahead {
            let session = self.batch.session(&self.model);
            self.ahead = Some(Ahead::Ended(session.and_then(|own| own.fetch(&self.model))));
        }
    }
}

/// Rows whose logits are on the host at once: they are as wide as the vocabulary.
const ROWS_TOLD: usize = 64;

/// What follows hidden states from row `first` on, each with so many of the likeliest tokens.
fn prompt_logprobs<D: Math>(
    model: &Decoder<D>,
    hidden: &D::Tensor,
    first: usize,
    most: impl Iterator<Item = usize>,
) -> Result<Vec<Logprobs>> {
    let (most, vocab): (Vec<usize>, _) = (most.collect(), model.config().vocab_size);
    let mut all = Vec::with_capacity(most.len());
    for (at, most) in most.chunks(ROWS_TOLD).enumerate() {
        let start = first + at * ROWS_TOLD;
        let logits = model.values(model.logits_of(hidden, start..start + most.len())?)?;
        all.extend(logits.chunks(vocab).zip(most).map(|(row, most)| Logprobs::of(row, *most)));
    }
    Ok(all)
}

/// Asked, where somebody is to be, whether nothing else is to come before the next step.
pub(super) type GoesOn<'a> = Option<&'a mut dyn FnMut() -> bool>;

/// A step that the device began before the tokens of the last one were told.
#[derive(Debug)]
pub(super) enum Ahead {
    Runs,
    /// Its tokens, one for each request that runs.
    Ended(Result<Vec<Option<u32>>>),
}
