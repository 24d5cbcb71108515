//! The loop: one thread owns the model, and jobs come and go between its steps. Of a model that several devices share each
//! has such a thread, and all do the same.

mod admission;
mod capacity;
mod copier;
mod ending;
mod events;
pub(crate) mod job;
mod prefix;
mod queue;
#[cfg(test)]
mod tests;
mod turn;

use std::cell::RefCell;
use std::collections::{HashMap, VecDeque};
use std::sync::atomic::Ordering::{Relaxed, Release};
use std::sync::{Arc, mpsc};
use std::time::Instant;

use moa_core::Plan;
use moa_models::{
    Checkpoint, Engine, EngineOptions, Error, Event, GenerateOptions, Math, RequestId,
    SamplingOptions,
};

use crate::http::error::ApiError;
use crate::metrics::Metrics;
use crate::options::ServerOptions;
use capacity::rounded;
pub(crate) use job::{Command, Job, Update};
use prefix::PrefixCache;
use queue::Queued;
use turn::End;

/// Failures of the device in a row after which the server gives up.
const MOST_FAILURES: usize = 8;

/// Owns the model and what runs on it.
pub(crate) struct Worker<D: Math> {
    checkpoint: Checkpoint<D>,
    engine: Engine<D>,
    plan: Plan,
    options: ServerOptions,
    metrics: Arc<Metrics>,
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
    /// Bytes of keys and values that may run: those of the options, but for a while after a step that had no memory.
    room: u64,
    /// Steps in a row that failed.
    failures: usize,
    /// By the capacity of a sequence.
    sizes: RefCell<HashMap<usize, Sizes>>,
    /// When those that are left have to end.
    stops_at: Option<Instant>,
}

/// What a sequence takes. Where several devices share the model, bytes are those of the one that has most of them, so that
/// all go by the same.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Sizes {
    /// Bytes of keys and values of a request, those of a model that guesses included.
    pub(crate) bytes: u64,
    /// Without those: of a sequence that is kept.
    kept_bytes: u64,
    /// What dense attention would take, in 16 bits at least.
    pub(crate) dense_bytes: u64,
    /// Some heads forget keys.
    has_rings: bool,
}

/// A sequence that runs.
struct Active {
    job: Arc<Job>,
    /// Its number in the job.
    choice: usize,
    /// Tokens that its sequence has room for.
    capacity: usize,
    sizes: Sizes,
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
        options: ServerOptions,
        metrics: Arc<Metrics>,
        commands: mpsc::Receiver<Command>,
    ) -> Self {
        Self {
            engine: checkpoint.engine(engine_options(&options)),
            checkpoint,
            plan,
            metrics,
            commands,
            arrived: VecDeque::new(),
            queue: VecDeque::new(),
            active: HashMap::new(),
            prefix: PrefixCache::new(options.prefix_cache, options.prefix_host),
            copies: Vec::new(),
            bytes: 0,
            dense_bytes: 0,
            room: options.kv_memory,
            failures: 0,
            sizes: RefCell::default(),
            stops_at: None,
            options,
        }
    }

    /// Tokens that a sequence for so many has room for.
    fn capacity(&self, length: usize) -> usize {
        rounded(length.max(self.options.min_context), self.options.context(&self.checkpoint.model))
    }

    /// Slots of rings by which guesses are forgotten again.
    fn slack(&self) -> usize {
        self.options.speculation.draft_tokens()
    }

    /// What a sequence of this length takes.
    pub(crate) fn sizes(&self, length: usize) -> Result<Sizes, Error> {
        let (checkpoint, capacity) = (&self.checkpoint, self.capacity(length));
        if let Some(sizes) = self.sizes.borrow().get(&capacity) {
            return Ok(*sizes);
        }
        let (model, plan, slack) = (&checkpoint.model, &self.plan, self.slack());
        let sizes = Sizes {
            bytes: checkpoint.request_bytes(plan, capacity, self.options.speculation)?,
            kept_bytes: model.cache_bytes(plan, capacity, slack)?,
            dense_bytes: model.dense_cache_bytes(capacity)?,
            has_rings: model.has_rings(plan, capacity, slack)?,
        };
        self.sizes.borrow_mut().insert(capacity, sizes);
        Ok(sizes)
    }

    /// Whether the loop can go on after an error of one request: devices that share the model no longer do the same after one
    /// of theirs.
    fn go_on_after(&self, error: Error) -> Result<(), Error> {
        use Error::{ContextExceeded, Core, Invalid};
        match error {
            Invalid { .. } | ContextExceeded { .. } | Core(_) => Ok(()),
            error if error.is_out_of_memory() || self.checkpoint.model.ranks() == 1 => Ok(()),
            error => Err(error),
        }
    }

    /// Runs short requests, so that the first ones that come need not wait for what a GPU loads when it first needs it, which
    /// depends on the rows of a step: as many at once as may run, and one with as long a prompt as a step reads. Decode steps
    /// that the device records for them are there for requests of that capacity then.
    fn warm_up(&mut self) -> Result<(), Error> {
        const TOKENS: usize = 64;
        const NEW_TOKENS: usize = 8;
        let model = Arc::clone(&self.checkpoint.model);
        let context = self.options.context(&model);
        if model.device().replayed_tokens(1) <= 1 || context < 2 * TOKENS {
            return Ok(());
        }
        let bytes = self.sizes(TOKENS + NEW_TOKENS)?.bytes;
        let room = usize::try_from(self.options.kv_memory / bytes.max(1)).unwrap_or(usize::MAX);
        let longest = self.options.prefill_chunk.min(context - NEW_TOKENS);
        // An engine of its own: what is learned of answers' lengths and what fails stay there.
        let mut engine = self.checkpoint.engine(engine_options(&self.options));
        for (requests, tokens) in [(self.options.max_batch.min(room), TOKENS), (1, longest)] {
            let capacity = self.capacity(tokens + NEW_TOKENS);
            let run = |engine: &mut Engine<D>| {
                let mut begun = Vec::new();
                for at in 0..requests {
                    let open = || model.open(&self.plan, capacity, self.slack());
                    let sampling = SamplingOptions {
                        // Some are drawn and some are not.
                        temperature: (at % 2) as f32,
                        top_p: 0.9,
                        ..SamplingOptions::default()
                    };
                    let options = GenerateOptions {
                        max_new_tokens: NEW_TOKENS,
                        sampling,
                        eos_token_ids: Some(Vec::new()),
                        ..GenerateOptions::default()
                    };
                    let sequence = model.together(open)?;
                    begun.push(engine.submit_in(sequence, vec![0; tokens], options));
                }
                engine.complete_all()?;
                // Their memory is for the requests that come.
                begun.into_iter().for_each(|id| drop(engine.reclaim(id)));
                Ok::<(), Error>(())
            };
            // What fails here fails again, where it is told.
            if let Err(error) = run(&mut engine) {
                tracing::warn!("the first steps failed: {error}");
            }
        }
        self.engine.set_recordings(engine.take_recordings())
    }

    /// Runs jobs until it is told to stop and none is left.
    ///
    /// # Errors
    /// That of the device, if it fails again and again; of devices that share the model, the first one.
    pub(crate) fn run(&mut self) -> Result<(), Error> {
        let ran = self.warm_up().and_then(|()| self.run_turns());
        if ran.is_err() {
            self.end_all(&ApiError::stopping());
        }
        self.tell_gauges();
        ran
    }

    fn run_turns(&mut self) -> Result<(), Error> {
        while self.run_turn()? {}
        Ok(())
    }

    /// Runs a step, and what comes before and after it. Returns whether another one follows.
    fn run_turn(&mut self) -> Result<bool, Error> {
        let turn = self.next_turn()?;
        self.drop_those_that_left(&turn);
        self.take_in(&turn);
        match turn.end {
            End::NotYet => {}
            End::Idle => return Ok(false),
            End::Late => {
                self.end_all(&ApiError::stopping());
                return Ok(false);
            }
        }
        self.prefix.collect(false);
        self.admit()?;
        self.tell_gauges();
        let begin = Instant::now();
        let is_full = self.places() >= self.options.max_batch;
        let (commands, arrived) = (&self.commands, &mut self.arrived);
        // What comes may join the next step, where there is a place.
        let goes_on = || {
            arrived.extend(commands.try_iter());
            is_full || arrived.is_empty()
        };
        let (mut event, failed) = match self.engine.step_ahead(goes_on) {
            Ok(event) => (event, None),
            Err(error) => (self.engine.poll(), Some(error)),
        };
        match &failed {
            None if event.is_some() => self.metrics.step.observe(begin.elapsed()),
            None => {}
            Some(error) => {
                tracing::error!("a step failed: {error}");
                self.prefix.clear();
                if error.is_out_of_memory() {
                    self.room = self.bytes / 2;
                }
            }
        }
        while let Some(one) = event {
            // A step that only reads prompts says nothing of one that decodes.
            if matches!(one, Event::Token { .. } | Event::Done { .. }) {
                self.failures = 0;
            }
            self.handle(one)?;
            event = self.engine.poll();
        }
        if let Some(error) = failed {
            // A device is well where fewer requests have the memory that they need.
            if !error.is_out_of_memory() {
                self.failures += 1;
                if self.checkpoint.model.ranks() > 1 || self.failures >= MOST_FAILURES {
                    return Err(error);
                }
            }
        }
        self.keep_copies()?;
        Ok(true)
    }

    /// Numbers of this moment. They are told before a client hears that its request has ended, so that it reads them without
    /// it, and that of the sequences that run last: who waits for it finds all others.
    fn tell_gauges(&self) {
        let metrics = &self.metrics;
        metrics.kv_bytes.store(self.bytes, Relaxed);
        metrics.kv_bytes_dense.store(self.dense_bytes, Relaxed);
        metrics.prefix_bytes.store(self.prefix.bytes(), Relaxed);
        metrics.prefix_host_bytes.store(self.prefix.host_bytes(), Relaxed);
        metrics.running.store(self.active.len() as u64, Release);
    }
}

fn engine_options(options: &ServerOptions) -> EngineOptions {
    EngineOptions {
        prefill_chunk: options.prefill_chunk,
        max_batch: options.max_batch,
        speculation: options.speculation,
    }
}

/// Tells a handler, if it still listens.
fn tell(job: &Job, update: Update) {
    let _ = job.out.send(update);
}
