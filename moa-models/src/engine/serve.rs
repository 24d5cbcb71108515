use std::collections::{BTreeMap, HashMap, VecDeque};
use std::sync::Arc;

use moa_core::Plan;
use serde::{Deserialize, Serialize};

use crate::checkpoint::Checkpoint;
use crate::checkpoint::prompt_style::PromptStyle;
use crate::decoder::model::Decoder;
use crate::decoder::sequence::Sequence;
use crate::decoder::session::Recordings;
use crate::device::Math;
use crate::engine::batch::Batch;
use crate::engine::constraint::Constraint;
use crate::engine::draft_model::Guesser;
use crate::engine::pace::Pace;
use crate::engine::request::{
    Completion, Event, Finish, GenerateOptions, Prompt, RequestId, Usage,
};
use crate::engine::running::{Answers, Running};
use crate::engine::speculate::Speculation;
use crate::engine::step::{Ahead, GoesOn};
use crate::{Error, Result};

/// The limits of one step of an [`Engine`]; no option changes the answer to a request but by the rounding that the engine
/// tells of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct EngineOptions {
    /// Most prompt tokens that a step reads, of all requests together; 0 counts as 1. It bounds the
    /// memory of activations. A device may want more of a prompt at once ([`Device::many_rows`](crate::Device::many_rows)).
    pub prefill_chunk: usize,
    /// Most requests that run together; 0 counts as 1. Others wait, and take no memory for keys and
    /// values.
    pub max_batch: usize,
    /// Where guesses of the next tokens come from, several of which one step checks. Sequences that are
    /// [submitted](Engine::submit) get the slack for it; others are [opened](Decoder::open) with it. No other model guesses for
    /// one that several devices share.
    pub speculation: Speculation,
}

impl Default for EngineOptions {
    fn default() -> Self {
        Self { prefill_chunk: 2048, max_batch: 256, speculation: Speculation::Off }
    }
}

/// Runs requests in one batch, into which they come and from which they go between steps.
///
/// Nothing happens but in [`step`](Self::step), which the caller calls for as long as it wants events:
/// there are no callbacks, threads or lifetimes, so that an engine can live in the struct of a server.
/// A step reads a stretch of new prompts, half of it of the oldest and half of the shortest, together
/// with the last tokens of the requests that decode. Each request gets the tokens that it would get alone,
/// with one exception. The last digits of logits may depend on the number of rows of a step, in bf16 where activations
/// are rounded to that, so that a token which is drawn, whatever the seed, or two likeliest ones that are all but equal,
/// may fall the other way in other company; with a `max_batch` of 1 and without guesses there is none.
///
/// Where several devices share a model, each rank has an engine, and all are called alike.
///
/// ```no_run
/// use moa_core::Plan;
/// use moa_models::{Checkpoint, Cpu, EngineOptions, Event, GenerateOptions, Message, Prompt};
///
/// let checkpoint = Checkpoint::open(Cpu::default(), "model")?;
/// let plan = Plan::load("plan.json")?;
/// let mut engine = checkpoint.engine(EngineOptions::default());
/// let options = GenerateOptions { max_new_tokens: 64, ..GenerateOptions::default() };
/// let hello = engine.submit(Prompt::chat(&[Message::user("Hello!")]), &plan, options.clone());
/// engine.submit("Once upon a time", &plan, options);
/// while let Some(event) = engine.step()? {
///     match event {
///         Event::Text { id, piece } if id == hello => print!("{piece}"),
///         Event::Done { id, completion } => println!("{id}: {:?}", completion.finish),
///         Event::Failed { id, error } => eprintln!("{id}: {error}"),
///         _ => {}
///     }
/// }
/// # Ok::<(), moa_models::Error>(())
/// ```
pub struct Engine<D: Math> {
    pub(super) model: Arc<Decoder<D>>,
    /// Turns text into tokens and back.
    checkpoint: Option<Checkpoint<D>>,
    eos_token_ids: Vec<u32>,
    pub(super) options: EngineOptions,
    /// Fewest tokens of a prompt that a step reads, unless fewer are left.
    pub(super) many_rows: usize,
    waiting: VecDeque<Waiting<D>>,
    /// The first that waits had no memory, and none has been freed since.
    is_full: bool,
    pub(super) running: Vec<Running>,
    pub(super) batch: Batch<D>,
    pub(super) events: VecDeque<Event>,
    /// Sequences of resumed requests that have ended.
    ended: HashMap<RequestId, Sequence<D>>,
    next_id: u64,
    pub(super) usage: Usage,
    /// Times of steps, where tokens are guessed.
    pub(super) pace: Pace,
    /// Lengths of answers, likewise.
    pub(super) answers: Answers,
    /// Another model that guesses.
    pub(super) guesser: Option<Guesser<D>>,
    pub(super) ahead: Option<Ahead>,
}

/// A request that does not run yet.
struct Waiting<D: Math> {
    run: Running,
    place: Place<D>,
}

/// Where a request runs.
enum Place<D: Math> {
    /// In a sequence that is opened when it begins.
    Open { plan: Box<Plan>, capacity: usize },
    /// In the caller's sequence.
    Resume(Sequence<D>),
}

impl<D: Math> std::fmt::Debug for Engine<D> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let (running, waiting) = (self.running.len(), self.waiting.len());
        write!(f, "Engine({running} requests run, {waiting} wait)")
    }
}

impl<D: Math> Engine<D> {
    /// An engine for prompts of tokens: it has no tokenizer, and makes no text. See
    /// [`Checkpoint::engine`] for one that does.
    pub fn new(model: Arc<Decoder<D>>, options: EngineOptions) -> Self {
        let eos_token_ids = model.config().eos_token_ids.clone();
        Self::build(model, None, eos_token_ids, options)
    }

    pub(crate) fn with_text(checkpoint: Checkpoint<D>, options: EngineOptions) -> Self {
        let (model, eos) = (Arc::clone(&checkpoint.model), checkpoint.eos_token_ids());
        Self::build(model, Some(checkpoint), eos, options)
    }

    fn build(
        model: Arc<Decoder<D>>,
        checkpoint: Option<Checkpoint<D>>,
        eos_token_ids: Vec<u32>,
        options: EngineOptions,
    ) -> Self {
        let many_rows = model.device().many_rows().max(1);
        // A model that guesses is whole on one device.
        let speculation = match options.speculation {
            Speculation::Draft { .. } if model.ranks() > 1 => Speculation::Off,
            speculation => speculation,
        };
        let draft = checkpoint.as_ref().and_then(|checkpoint| checkpoint.draft.clone());
        let guesser = match speculation {
            Speculation::Draft { .. } => draft.map(Guesser::new),
            _ => None,
        };
        Self {
            model,
            checkpoint,
            eos_token_ids,
            options: EngineOptions {
                // Twice a stretch with a rest that is too short to be one.
                prefill_chunk: options.prefill_chunk.max(2 * (2 * many_rows - 1)),
                max_batch: options.max_batch.max(1),
                speculation,
            },
            many_rows,
            pace: Pace::default(),
            answers: Answers::default(),
            guesser,
            waiting: VecDeque::new(),
            is_full: false,
            running: Vec::new(),
            batch: Batch::new(),
            events: VecDeque::new(),
            ended: HashMap::new(),
            next_id: 0,
            usage: Usage::default(),
            ahead: None,
        }
    }

    /// Adds a request that runs in a sequence of its own, opened with the spans of `plan` for the
    /// prompt and all new tokens, or the model's context if that is shorter. What is wrong with the
    /// request comes as [`Event::Failed`].
    pub fn submit(
        &mut self,
        prompt: impl Into<Prompt>,
        plan: &Plan,
        options: GenerateOptions,
    ) -> RequestId {
        self.enqueue(prompt.into(), options, |model, prompt, new| {
            let limit = model.config().context_length();
            check_length(prompt, limit)?;
            let capacity = prompt.saturating_add(new).min(limit);
            Ok((Place::Open { plan: Box::new(plan.clone()), capacity }, capacity))
        })
    }

    /// Adds a request that goes on in a sequence which may hold tokens already. Whatever becomes of
    /// the request, [`reclaim`](Self::reclaim) gives the sequence back, unless the device failed.
    /// A new token enters the sequence with the next step, so the last one made is not in it.
    pub fn resume(
        &mut self,
        sequence: Sequence<D>,
        prompt: impl Into<Prompt>,
        options: GenerateOptions,
    ) -> RequestId {
        let (len, capacity) = (sequence.len(), sequence.capacity());
        let mut sequence = Some(sequence);
        let id = self.enqueue(prompt.into(), options, |_, prompt, _| {
            check_length(len + prompt, capacity)?;
            let sequence = sequence.take().ok_or(Error::Cancelled)?;
            Ok((Place::Resume(sequence), capacity - len))
        });
        match sequence {
            Some(sequence) => drop(self.ended.insert(id, sequence)),
            None => {
                self.waiting.back_mut().into_iter().for_each(|waiting| waiting.run.before = len)
            }
        }
        id
    }

    /// Adds a request in a sequence that holds the beginning of its prompt already, such as a
    /// [`snapshot`](Self::snapshot) or what an earlier turn of a conversation left: only the rest of the
    /// prompt is read. All else is as in [`resume`](Self::resume), but that penalties count the whole
    /// prompt.
    pub fn submit_in(
        &mut self,
        sequence: Sequence<D>,
        prompt: impl Into<Prompt>,
        options: GenerateOptions,
    ) -> RequestId {
        let (held, capacity) = (sequence.len(), sequence.capacity());
        let mut sequence = Some(sequence);
        let id = self.enqueue(prompt.into(), options, |_, prompt, _| {
            check_length(prompt, capacity)?;
            if prompt <= held {
                let expected = format!("longer than what the sequence holds ({held} tokens)");
                return Err(Error::invalid("prompt", expected, format!("{prompt} tokens")));
            }
            let sequence = sequence.take().ok_or(Error::Cancelled)?;
            Ok((Place::Resume(sequence), capacity - held))
        });
        match sequence {
            Some(sequence) => drop(self.ended.insert(id, sequence)),
            None => self.waiting.back_mut().into_iter().for_each(|waiting| waiting.run.read = held),
        }
        id
    }

    /// Restricts what a request that waits, such as one that was just added, is continued with; the host then chooses
    /// its tokens. Returns whether the request waits.
    pub fn constrain(&mut self, id: RequestId, constraint: Box<dyn Constraint>) -> bool {
        let Some(waiting) = self.waiting.iter_mut().find(|waiting| waiting.run.id == id) else {
            return false;
        };
        waiting.run.constraint = Some(constraint);
        true
    }

    /// A copy of the sequence of a request that runs, as it is after the last step: after an
    /// [`Event::Prefill`] of that step it holds the tokens of the prompt which that event tells of.
    /// `None` if the request does not run.
    ///
    /// # Errors
    /// As [`Decoder::fork`].
    pub fn snapshot(&self, id: RequestId) -> Result<Option<Sequence<D>>> {
        let at = self.running.iter().position(|run| run.id == id);
        let sequence = at.and_then(|at| self.batch.get(at));
        sequence.map(|sequence| self.model.fork(sequence)).transpose()
    }

    /// The next event of the steps that were run; runs none.
    pub fn poll(&mut self) -> Option<Event> {
        self.events.pop_front()
    }

    /// What happened next; runs steps until something did. `None` if no request is left.
    ///
    /// # Errors
    /// [`Error::Backend`] or [`Error::OutOfMemory`] if the device failed in a step, [`Error::Rank`] if another rank
    /// failed, [`Error::RankOutOfMemory`] on all ranks if the memory of one was too short. (Logits that are no numbers end
    /// the request alone that they are of.) The requests that ran have ended then, each of which gets an [`Event::Failed`]
    /// with [`Error::Step`] by the next calls; those that wait, and new ones, go on. A model that several devices share is
    /// of no use after another error than `RankOutOfMemory`.
    pub fn step(&mut self) -> Result<Option<Event>> {
        self.step_with(None)
    }

    /// [`step`](Self::step) that does not let the device wait for the caller: where the next step is one of the same
    /// requests that the device has recorded, and `goes_on` says that nothing else is to come before it, the device
    /// begins it before this returns. So what the caller does with events takes no time of the device's.
    ///
    /// A request that is [cancelled](Self::cancel), and a [`snapshot`](Self::snapshot), may then hold one token more than
    /// after `step`: the last one that was told. Where several devices share a model, all call this, and the `goes_on` of
    /// rank 0 alone is asked.
    ///
    /// # Errors
    /// As [`step`](Self::step).
    pub fn step_ahead(&mut self, mut goes_on: impl FnMut() -> bool) -> Result<Option<Event>> {
        self.step_with(Some(&mut goes_on))
    }

    fn step_with(&mut self, mut goes_on: GoesOn<'_>) -> Result<Option<Event>> {
        while self.events.is_empty() && !self.is_idle() {
            if self.ahead.is_none() {
                self.admit()?;
            }
            // A step may be one of several before something happens.
            let goes_on: GoesOn<'_> = match &mut goes_on {
                Some(asked) => Some(&mut **asked),
                None => None,
            };
            self.advance(goes_on)?;
            self.retire();
        }
        Ok(self.events.pop_front())
    }

    /// Ends a request, of which no event follows: what it was continued with so far. `None` if it has
    /// failed, or its end was told already. The memory of its keys and values is free then, unless
    /// the request was resumed: see [`reclaim`](Self::reclaim).
    pub fn cancel(&mut self, id: RequestId) -> Option<Completion> {
        let mut ended = None;
        if let Some(at) = self.waiting.iter().position(|waiting| waiting.run.id == id) {
            let Waiting { run, place } = self.waiting.remove(at)?;
            if let Place::Resume(sequence) = place {
                self.ended.insert(id, sequence);
            }
            ended = Some(run.completion(Finish::Stopped));
        } else if let Some(at) = self.running.iter().position(|run| run.id == id) {
            ended = Some(self.leave(at).completion(Finish::Stopped));
        }
        for event in std::mem::take(&mut self.events) {
            match event {
                Event::Done { id: of, completion } if of == id => ended = Some(completion),
                event if event.id() != id => self.events.push_back(event),
                _ => {}
            }
        }
        ended
    }

    /// The sequence of a resumed request that has ended. The engine keeps it until it is asked for.
    pub fn reclaim(&mut self, id: RequestId) -> Option<Sequence<D>> {
        self.ended.remove(&id)
    }

    /// Runs until no request is left. Returns what those were continued with whose end was not told
    /// yet, in the order in which they were added.
    ///
    /// # Errors
    /// [`Error::Backend`], [`Error::OutOfMemory`] or [`Error::Rank`] as [`step`](Self::step), and the error of the
    /// first [`Event::Failed`]; the other requests stay.
    pub fn complete_all(&mut self) -> Result<Vec<Completion>> {
        let mut completions = BTreeMap::new();
        while let Some(event) = self.step()? {
            match event {
                Event::Done { id, completion } => {
                    completions.insert(id, completion);
                }
                Event::Failed { error, .. } => return Err(error),
                _ => {}
            }
        }
        Ok(completions.into_values().collect())
    }

    /// Whether no request is left, so that [`step`](Self::step) has nothing to tell but what it told
    /// of the last ones.
    pub fn is_idle(&self) -> bool {
        self.running.is_empty() && self.waiting.is_empty()
    }

    /// Requests that run.
    pub fn running(&self) -> usize {
        self.running.len()
    }

    /// Requests that wait for a place in the batch, or for memory.
    pub fn waiting(&self) -> usize {
        self.waiting.len()
    }

    /// How often the device has recorded a decode step since the engine was made, or a step failed: few times, whatever
    /// requests come and go. Those of [recordings](Self::set_recordings) that it was given count too.
    pub fn recordings(&self) -> usize {
        self.batch.recordings()
    }

    /// What the device has recorded of decode steps, for [`set_recordings`](Self::set_recordings) of another engine; this
    /// one records anew what it needs.
    pub fn take_recordings(&mut self) -> Recordings<D> {
        self.batch.take_recordings()
    }

    /// Has requests run what the device has recorded of others, in place of what this engine has recorded so far.
    ///
    /// # Errors
    /// [`Error::Invalid`] if another model recorded it.
    pub fn set_recordings(&mut self, recordings: Recordings<D>) -> Result<()> {
        self.model.check_recordings(&recordings)?;
        self.batch.set_recordings(recordings);
        Ok(())
    }

    /// What was done since the engine was made, or since this was last asked.
    pub fn take_usage(&mut self) -> Usage {
        std::mem::take(&mut self.usage)
    }

    /// Adds a request; `place` is told the tokens of its prompt and the most new ones, and says where it
    /// runs and how many tokens have room there.
    fn enqueue(
        &mut self,
        prompt: Prompt,
        options: GenerateOptions,
        place: impl FnOnce(&Decoder<D>, usize, usize) -> Result<(Place<D>, usize)>,
    ) -> RequestId {
        let id = RequestId(self.next_id);
        self.next_id += 1;
        // A text is continued with the space that it needs, an answer begins without one.
        let continues = match &prompt {
            Prompt::Text(_) => true,
            Prompt::Chat(_) => false,
            Prompt::Tokens(_) => options.continues_prompt.unwrap_or_else(|| {
                let style = self.checkpoint.as_ref().map(Checkpoint::prompt_style);
                style == Some(PromptStyle::Raw)
            }),
        };
        let prepare = || {
            let prompt = self.tokens(prompt)?;
            if prompt.is_empty() {
                return Err(Error::invalid("prompt", "at least 1 token", 0));
            }
            self.model.check_tokens(&prompt)?;
            let (len, new) = (prompt.len(), options.max_new_tokens);
            let tokenizer = self.checkpoint.as_ref().map(|checkpoint| &checkpoint.tokenizer);
            let text = tokenizer.map(|tokenizer| (tokenizer, continues));
            let mut run = Running::new(id, prompt, options, &self.eos_token_ids, text)?;
            // Last: it takes the sequence.
            let (place, room) = place(&self.model, len, new)?;
            run.room = room;
            run.is_resumed = matches!(place, Place::Resume(_));
            Ok(Waiting { run, place })
        };
        match prepare() {
            Ok(waiting) => self.waiting.push_back(waiting),
            Err(error) => self.events.push_back(Event::Failed { id, error }),
        }
        id
    }

    fn tokens(&self, prompt: Prompt) -> Result<Vec<u32>> {
        let limit = self.model.config().context_length();
        let no_text = || Error::invalid("prompt", "tokens, as there is no tokenizer", "a text");
        match (prompt, &self.checkpoint) {
            (Prompt::Tokens(tokens), _) => Ok(tokens),
            (Prompt::Text(text), Some(checkpoint)) => {
                checkpoint.tokenizer.encode_within(&text, true, limit)
            }
            (Prompt::Chat(messages), Some(checkpoint)) => {
                checkpoint.chat_tokens_within(&messages, limit)
            }
            (Prompt::Text(_) | Prompt::Chat(_), None) => Err(no_text()),
        }
    }

    /// Lets requests begin that there is a place for.
    fn admit(&mut self) -> Result<()> {
        let slack = self.options.speculation.draft_tokens();
        while self.may_admit() {
            let Some(Waiting { run, place }) = self.waiting.pop_front() else { return Ok(()) };
            let opened = match place {
                Place::Resume(sequence) => Ok(sequence),
                Place::Open { plan, capacity } => match self.open(&plan, capacity, slack) {
                    // Those that run will free some.
                    Err(error) if error.is_out_of_memory() && !self.running.is_empty() => {
                        let place = Place::Open { plan, capacity };
                        self.waiting.push_front(Waiting { run, place });
                        self.is_full = true;
                        return Ok(());
                    }
                    opened => opened,
                },
            };
            match opened {
                Ok(sequence) => {
                    self.batch.apart().push(sequence);
                    self.running.push(run);
                }
                Err(error) => {
                    // What is wrong with a request is so on all ranks, as is memory; a device's failure is not.
                    let is_alike = error.is_of_request() || error.is_out_of_memory();
                    if self.model.ranks() > 1 && !is_alike {
                        self.running.push(run);
                        self.fail(&error);
                        return Err(error);
                    }
                    self.events.push_back(Event::Failed { id: run.id, error });
                }
            }
        }
        Ok(())
    }

    /// A sequence, for which recorded steps leave their memory where that is short.
    fn open(&mut self, plan: &Plan, capacity: usize, slack: usize) -> Result<Sequence<D>> {
        let model = &self.model;
        match model.together(|| model.open(plan, capacity, slack)) {
            Err(error) if error.is_out_of_memory() && self.batch.forget() => {
                model.together(|| model.open(plan, capacity, slack))
            }
            opened => opened,
        }
    }

    /// Whether a request that waits is to be tried.
    pub(super) fn may_admit(&self) -> bool {
        let has_place = !self.is_full && self.running.len() < self.options.max_batch;
        has_place && !self.waiting.is_empty()
    }

    /// Takes out the requests that have ended.
    fn retire(&mut self) {
        let mut at = 0;
        while at < self.running.len() {
            match self.running[at].has_ended() {
                true => self.leave(at).finish(&mut self.events),
                false => at += 1,
            }
        }
    }

    /// Takes a running request out of the batch.
    fn leave(&mut self, at: usize) -> Running {
        self.is_full = false;
        self.settle();
        if let Some(Ahead::Ended(Ok(tokens))) = &mut self.ahead {
            tokens.remove(at);
        }
        let run = self.running.remove(at);
        if self.running.is_empty() {
            self.ahead = None;
        }
        self.answers.learn(&run);
        if let Some(guesser) = &mut self.guesser {
            guesser.forget(&run);
        }
        let sequence = self.batch.apart().remove(at);
        if run.is_resumed {
            self.ended.insert(run.id, sequence);
        }
        run
    }

    /// Ends all running requests, whose sequences are of no use after a step that failed.
    pub(super) fn fail(&mut self, error: &Error) {
        self.is_full = false;
        self.ahead = None;
        self.batch.clear();
        if let Some(guesser) = &mut self.guesser {
            guesser.clear();
        }
        let out_of_memory = error.is_out_of_memory();
        for run in self.running.drain(..) {
            let error = Error::Step { reason: error.to_string(), out_of_memory };
            self.events.push_back(Event::Failed { id: run.id, error });
        }
    }
}

fn check_length(asked: usize, limit: usize) -> Result<()> {
    if asked > limit { Err(Error::ContextExceeded { asked, limit }) } else { Ok(()) }
}
