//! Sequences that come and go while others run.

use crate::decoder::llama::{Llama, LogitRows, Sequence};
use crate::device::Ops;
use crate::engine::generate::{GenerateOptions, GenerateProgress, Generated, Next};
use crate::engine::running::Running;
use crate::{Error, Result};

/// A prompt to continue, in a sequence of its own.
#[derive(Debug)]
pub struct Request<O: Ops> {
    /// The caller's name for it.
    pub id: u64,
    /// Where it runs; may already hold tokens.
    pub sequence: Sequence<O>,
    /// Tokens to read first.
    pub prompt: Vec<u32>,
    /// How to go on; the seed is this request's own, and `prefill_chunk` the most tokens of its
    /// prompt that a step reads.
    pub options: GenerateOptions,
}

/// What [`Llama::serve`] tells.
#[derive(Debug)]
pub enum Served<O: Ops> {
    /// A request has a new token; never an end-of-sequence token. [`Next::Stop`] ends that request.
    Token {
        /// The request.
        id: u64,
        /// Token id.
        token: u32,
    },
    /// A request has ended.
    Finished {
        /// The request.
        id: u64,
        /// Its new tokens, and why it ended.
        generated: Generated,
        /// Its sequence, for a next turn.
        sequence: Sequence<O>,
    },
    /// A request was refused; the others go on.
    Refused {
        /// The request.
        id: u64,
        /// What is wrong with it.
        error: Error,
    },
}

/// A request that runs.
struct Slot<O: Ops> {
    id: u64,
    sequence: Sequence<O>,
    options: GenerateOptions,
    run: Running,
    /// Prompt tokens that are not read yet.
    unread: Vec<u32>,
}

impl<O: Ops> Slot<O> {
    fn new(model: &Llama<O>, request: Request<O>) -> Result<Self> {
        let Request { id, sequence, prompt, options } = request;
        options.sampling.validate()?;
        model.check_prompt(&sequence, &prompt)?;
        if options.prefill_chunk == 0 {
            return Err(Error::invalid("prefill chunk", "at least 1 token", 0));
        }
        let run = Running::new(&prompt, &options.sampling, 0)?;
        Ok(Self { id, sequence, options, run, unread: prompt })
    }

    /// Whether its token can be chosen by the device, with those of all others.
    fn is_greedy(&self) -> bool {
        let sampling = &self.options.sampling;
        sampling.temperature == 0.0 && sampling.repetition_penalty == 1.0
    }
}

impl<O: Ops> Llama<O> {
    /// Runs requests in one batch, into which they come and from which they go between steps without
    /// stopping the others; each one's tokens are those that it would get alone.
    ///
    /// Before every step `next` is asked for requests, with how many run, until it has none; when none
    /// run either, this returns, so `next` may wait where it is told of 0. A step reads a stretch of each
    /// new prompt together with the others' next tokens. `on_event` may break off with
    /// [`Next::Cancel`].
    ///
    /// # Errors
    /// If the device fails, or [`Error::Cancelled`]; what is wrong with a request is told as
    /// [`Served::Refused`].
    pub fn serve(
        &self,
        next: &mut dyn FnMut(usize) -> Option<Request<O>>,
        on_event: &mut dyn FnMut(Served<O>) -> Next,
    ) -> Result<()> {
        let mut slots: Vec<Slot<O>> = Vec::new();
        let mut waiting = None;
        loop {
            while let Some(request) = waiting.take().or_else(|| next(slots.len())) {
                let id = request.id;
                match Slot::new(self, request) {
                    Ok(slot) => slots.push(slot),
                    Err(error) => tell(on_event, Served::Refused { id, error })?,
                }
            }
            if slots.is_empty() {
                return Ok(());
            }
            match slots.iter().any(|slot| !slot.unread.is_empty()) {
                true => self.mixed_step(&mut slots)?,
                false => waiting = self.decode_steps(&mut slots, next, on_event)?,
            }
            choose(&mut slots, on_event)?;
            retire(&mut slots, on_event)?;
        }
    }

    /// One step that reads a stretch of every unread prompt, and the last token of the others.
    fn mixed_step(&self, slots: &mut [Slot<O>]) -> Result<()> {
        let parts: Vec<Vec<u32>> = slots
            .iter_mut()
            .map(|slot| match slot.unread.len().min(slot.options.prefill_chunk) {
                0 => vec![slot.run.last()],
                some => slot.unread.drain(..some).collect(),
            })
            .collect();
        let mut rows = Vec::new();
        let mut end = 0;
        for (slot, part) in slots.iter().zip(&parts) {
            end += part.len();
            if slot.unread.is_empty() {
                rows.push(end - 1);
            }
        }
        let tokens: Vec<&[u32]> = parts.iter().map(Vec::as_slice).collect();
        let mut batch: Vec<_> = slots.iter_mut().map(|slot| &mut slot.sequence).collect();
        let logits = self.forward(&mut batch, &tokens, LogitRows::Rows(&rows))?;
        let values = self.values(logits)?;
        let read = slots.iter_mut().filter(|slot| slot.unread.is_empty());
        for (slot, row) in read.zip(values.chunks(self.config().vocab_size)) {
            slot.run.logits = row.to_vec();
        }
        Ok(())
    }

    /// Decode steps until a request ends or another comes; the last step's tokens are not chosen yet.
    fn decode_steps(
        &self,
        slots: &mut [Slot<O>],
        next: &mut dyn FnMut(usize) -> Option<Request<O>>,
        on_event: &mut dyn FnMut(Served<O>) -> Next,
    ) -> Result<Option<Request<O>>> {
        let greedy = slots.iter().all(Slot::is_greedy);
        let count = slots.len();
        let mut room: Vec<usize> =
            slots.iter().map(|slot| slot.sequence.capacity() - slot.sequence.len()).collect();
        // The decoder has the sequences, so what else a slot is must be apart from them.
        let (mut sequences, mut others) = (Vec::new(), Vec::new());
        for Slot { id, sequence, options, run, .. } in slots {
            sequences.push(sequence);
            others.push((*id, &*options, run));
        }
        let mut decoder = self.decoder(sequences)?;
        loop {
            let tokens: Vec<u32> = others.iter().map(|(.., run)| run.last()).collect();
            if greedy {
                for ((.., run), token) in others.iter_mut().zip(decoder.step_greedy(&tokens)?) {
                    run.next = Some(token);
                }
            } else {
                let logits = decoder.step(&tokens)?;
                let rows = logits.chunks(self.config().vocab_size);
                for ((.., run), row) in others.iter_mut().zip(rows) {
                    run.logits = row.to_vec();
                }
            }
            room.iter_mut().for_each(|room| *room -= 1);
            let request = next(count);
            if request.is_some() {
                return Ok(request);
            }
            for ((id, options, run), room) in others.iter_mut().zip(&room) {
                choose_one(*id, options, run, *room, on_event)?;
            }
            if others.iter().any(|(.., run)| run.finish.is_some()) {
                return Ok(None);
            }
        }
    }
}

/// Chooses the token of every slot that has one to choose.
fn choose<O: Ops>(
    slots: &mut [Slot<O>],
    on_event: &mut dyn FnMut(Served<O>) -> Next,
) -> Result<()> {
    for Slot { id, sequence, options, run, unread } in slots {
        let has_token = run.next.is_some() || !run.logits.is_empty();
        if unread.is_empty() && has_token {
            choose_one(*id, options, run, sequence.capacity() - sequence.len(), on_event)?;
        }
    }
    Ok(())
}

fn choose_one<O: Ops>(
    id: u64,
    options: &GenerateOptions,
    run: &mut Running,
    room: usize,
    on_event: &mut dyn FnMut(Served<O>) -> Next,
) -> Result<()> {
    let tell = &mut |progress| match progress {
        GenerateProgress::Token { token, .. } => on_event(Served::Token { id, token }),
        GenerateProgress::Prefill { .. } => Next::Continue,
    };
    run.choose(0, options, room, tell)?;
    run.logits.clear();
    Ok(())
}

/// Gives back the slots that have ended.
fn retire<O: Ops>(
    slots: &mut Vec<Slot<O>>,
    on_event: &mut dyn FnMut(Served<O>) -> Next,
) -> Result<()> {
    let has_ended = |slot: &mut Slot<O>| slot.run.finish.is_some();
    let ended: Vec<Slot<O>> = slots.extract_if(.., has_ended).collect();
    for Slot { id, sequence, run, .. } in ended {
        tell(on_event, Served::Finished { id, generated: run.finish(), sequence })?;
    }
    Ok(())
}

fn tell<O: Ops>(on_event: &mut dyn FnMut(Served<O>) -> Next, event: Served<O>) -> Result<()> {
    match on_event(event) {
        Next::Cancel => Err(Error::Cancelled),
        Next::Continue | Next::Stop => Ok(()),
    }
}
