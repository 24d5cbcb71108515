//! The loop: one thread owns the model, and jobs come and go between its steps.

mod admission;
mod capacity;
mod copier;
mod ending;
mod events;
pub(crate) mod job;
mod prefix;
mod queue;

use std::cell::RefCell;
use std::collections::{HashMap, VecDeque};
use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Arc, mpsc};
use std::time::Instant;

use moa_core::Plan;
use moa_models::{
    Checkpoint, Engine, EngineOptions, Error, Event, GenerateOptions, Math, RequestId,
};

use crate::http::error::ApiError;
use crate::state::State;
use capacity::rounded;
pub(crate) use job::{Command, Job, Update};
use prefix::PrefixCache;
use queue::{Queued, enqueue};

/// Failures of the device in a row after which the server gives up.
const MOST_FAILURES: usize = 8;

/// Owns the model and what runs on it.
pub(crate) struct Worker<D: Math> {
    checkpoint: Checkpoint<D>,
    engine: Engine<D>,
    plan: Plan,
    state: Arc<State>,
    commands: mpsc::Receiver<Command>,
    /// Those that came while a step was waited for.
    arrived: VecDeque<Command>,
    queue: VecDeque<Queued>,
    active: HashMap<RequestId, Active>,
    prefix: PrefixCache<D>,
    /// Prompts that the last step has read so far, for a copy, which may be a mark.
    copies: Vec<(RequestId, usize, bool)>,
    /// Bytes of keys and values of the jobs that run, and what dense attention would take.
    bytes: u64,
    dense_bytes: u64,
    /// Such bytes of a sequence, by its capacity.
    sizes: RefCell<HashMap<usize, (u64, u64)>>,
    /// When those that are left have to end.
    stops_at: Option<Instant>,
}

/// A sequence that runs.
struct Active {
    job: Arc<Job>,
    /// Its number in the job.
    choice: usize,
    /// Tokens that its sequence has room for.
    capacity: usize,
    bytes: u64,
    dense_bytes: u64,
    /// Choices that begin when the prompt is read.
    followers: usize,
    /// Where the prompt is to be copied, as another one parts from it there.
    fork: Option<usize>,
    /// Where else.
    marks: Vec<usize>,
    last_token: Instant,
    tokens: usize,
}

impl<D: Math + 'static> Worker<D> {
    pub(crate) fn new(
        checkpoint: Checkpoint<D>,
        plan: Plan,
        state: Arc<State>,
        commands: mpsc::Receiver<Command>,
    ) -> Self {
        let options = EngineOptions {
            prefill_chunk: state.options.prefill_chunk,
            max_batch: state.options.max_batch,
            speculation: state.options.speculation,
        };
        Self {
            engine: checkpoint.engine(options),
            checkpoint,
            plan,
            commands,
            arrived: VecDeque::new(),
            queue: VecDeque::new(),
            active: HashMap::new(),
            prefix: PrefixCache::new(state.options.prefix_cache, state.options.prefix_host),
            copies: Vec::new(),
            bytes: 0,
            dense_bytes: 0,
            sizes: RefCell::default(),
            stops_at: None,
            state,
        }
    }

    /// Tokens that a sequence for so many has room for.
    fn capacity(&self, length: usize) -> usize {
        rounded(length.max(self.state.options.min_context), self.state.model.context)
    }

    /// Slots of rings by which guesses are forgotten again.
    fn slack(&self) -> usize {
        self.state.options.speculation.draft_tokens()
    }

    /// Bytes of keys and values of a sequence of this length, and of one with dense attention.
    pub(crate) fn bytes_of(&self, length: usize) -> Result<(u64, u64), Error> {
        let (checkpoint, capacity) = (&self.checkpoint, self.capacity(length));
        if let Some(sizes) = self.sizes.borrow().get(&capacity) {
            return Ok(*sizes);
        }
        let own = checkpoint.request_bytes(&self.plan, capacity, self.state.options.speculation)?;
        let sizes = (own, checkpoint.model.dense_bytes(capacity)?);
        self.sizes.borrow_mut().insert(capacity, sizes);
        Ok(sizes)
    }

    /// Runs a short request, so that the first one that comes need not wait for what a GPU loads when it first needs it.
    fn warm_up(&self) {
        const TOKENS: usize = 64;
        let model = &self.checkpoint.model;
        if model.device().replayed_tokens(1) <= 1 || self.state.model.context < 2 * TOKENS {
            return;
        }
        let options = GenerateOptions {
            max_new_tokens: 8,
            eos_token_ids: Some(Vec::new()),
            ..GenerateOptions::default()
        };
        // An engine of its own: what is learned of answers' lengths and what fails stay there.
        let mut engine = self.checkpoint.engine(EngineOptions::default());
        for _ in 0..2 {
            engine.submit(vec![0; TOKENS], &self.plan, options.clone());
        }
        // What fails here fails again, where it is told.
        if let Err(error) = engine.complete_all() {
            tracing::warn!("the first steps failed: {error}");
        }
    }

    /// Runs jobs until it is told to stop and none is left.
    ///
    /// # Errors
    /// That of the device, if it fails again and again.
    pub(crate) fn run(&mut self) -> Result<(), Error> {
        self.warm_up();
        let mut failures = 0;
        loop {
            if !self.take_commands() {
                break;
            }
            self.drop_those_that_left();
            self.prefix.collect(false);
            self.admit();
            self.tell_gauges();
            let begin = Instant::now();
            let is_full = self.places() >= self.state.options.max_batch;
            let (commands, arrived) = (&self.commands, &mut self.arrived);
            // What comes may join the next step, where there is a place.
            let goes_on = || {
                arrived.extend(commands.try_iter());
                is_full || arrived.is_empty()
            };
            match self.engine.step_ahead(goes_on) {
                Ok(Some(event)) => {
                    self.state.metrics.step.observe(begin.elapsed());
                    // A step that only reads prompts says nothing of one that decodes.
                    if matches!(event, Event::Token { .. }) {
                        failures = 0;
                    }
                    self.handle(event);
                }
                Ok(None) => {}
                Err(error) => {
                    tracing::error!("a step failed: {error}");
                    failures += 1;
                    self.prefix.clear();
                    if failures >= MOST_FAILURES {
                        self.end_all(&ApiError::stopping());
                        self.tell_gauges();
                        return Err(error);
                    }
                }
            }
            while let Some(event) = self.engine.poll() {
                self.handle(event);
            }
            self.keep_copies();
        }
        self.tell_gauges();
        Ok(())
    }

    /// Takes what has come, and waits where nothing else is to be done. `false` when all is over.
    fn take_commands(&mut self) -> bool {
        loop {
            let is_idle = self.queue.is_empty() && self.active.is_empty();
            let command = match is_idle {
                true if self.stops_at.is_some() => return false,
                true => {
                    // So that the numbers are right while nothing happens.
                    self.tell_gauges();
                    self.arrived.pop_front().or_else(|| self.commands.recv().ok())
                }
                false => {
                    match self.arrived.pop_front().map_or_else(|| self.commands.try_recv(), Ok) {
                        Ok(command) => Some(command),
                        Err(mpsc::TryRecvError::Empty) => break,
                        Err(mpsc::TryRecvError::Disconnected) => None,
                    }
                }
            };
            match command {
                Some(Command::Job(job)) => enqueue(&mut self.queue, Queued { job, overtaken: 0 }),
                Some(Command::Stop) | None => {
                    let ends = Instant::now() + self.state.options.grace;
                    self.stops_at.get_or_insert(ends);
                }
            }
        }
        if self.stops_at.is_some_and(|at| Instant::now() >= at) {
            self.end_all(&ApiError::stopping());
            return false;
        }
        true
    }

    fn tell_gauges(&self) {
        let metrics = &self.state.metrics;
        metrics.running.store(self.active.len() as u64, Relaxed);
        metrics.kv_bytes.store(self.bytes, Relaxed);
        metrics.kv_bytes_dense.store(self.dense_bytes, Relaxed);
        metrics.prefix_bytes.store(self.prefix.bytes(), Relaxed);
        metrics.prefix_host_bytes.store(self.prefix.host_bytes(), Relaxed);
    }
}

/// Tells a handler, if it still listens.
fn tell(job: &Job, update: Update) {
    let _ = job.out.send(update);
}
