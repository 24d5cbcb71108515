//! Jobs that begin, when there is memory for them.

use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;

use moa_models::{Error, GenerateOptions, Math, Sequence};

use super::queue::{MOST_OVERTAKEN, Queued};
use super::{Active, Job, Sizes, Update, Worker, tell};
use crate::http::error::ApiError;

impl<D: Math + 'static> Worker<D> {
    /// Sequences that run or are about to.
    pub(super) fn places(&self) -> usize {
        self.active.values().map(|active| 1 + active.followers).sum()
    }

    /// Lets jobs begin that there is memory for, in their order but for small ones that may overtake.
    ///
    /// # Errors
    /// That of another rank, where several share the model.
    pub(super) fn admit(&mut self) -> Result<(), Error> {
        let mut at = 0;
        while at < self.queue.len() && self.places() < self.options.max_batch {
            let job = &self.queue[at].job;
            let length = job.prompt.len().saturating_add(job.options.max_new_tokens);
            let capacity = self.capacity(length);
            let choices = job.choices as u64;
            let limit = self.options.kv_memory;
            let sizes = self.sizes(capacity).map_err(|error| ApiError::of_model(&error));
            let fits = sizes.and_then(|sizes| match sizes.bytes.saturating_mul(choices) {
                _ if job.choices > self.options.max_batch => {
                    let most = format!("at most {}", self.options.max_batch);
                    Err(ApiError::field("n", most, job.choices))
                }
                all if all > limit => {
                    let message = format!(
                        "the request needs {all} bytes of keys and values, and the server has {limit}"
                    );
                    Err(ApiError { code: Some("kv_memory"), ..ApiError::invalid(message) })
                }
                // One that is alone may have what there is.
                all => Ok((sizes, self.bytes + all <= self.room || self.active.is_empty())),
            });
            let has_place = self.places() + job.choices <= self.options.max_batch;
            match fits {
                Ok((sizes, true)) if has_place => {
                    let Some(queued) = self.queue.remove(at) else { return Ok(()) };
                    match self.begin(queued.job, capacity, sizes)? {
                        None => {
                            self.metrics.queued.fetch_sub(1, Relaxed);
                            let before = self.queue.iter_mut().take(at);
                            before.for_each(|queued| queued.overtaken += 1);
                        }
                        Some(job) => {
                            // Those that run will free some memory.
                            self.queue.insert(at, Queued { job, overtaken: queued.overtaken });
                            return Ok(());
                        }
                    }
                }
                Ok(_) if self.queue[at].overtaken >= MOST_OVERTAKEN => return Ok(()),
                Ok(_) => at += 1,
                Err(error) => {
                    if let Some(queued) = self.queue.remove(at) {
                        self.metrics.queued.fetch_sub(1, Relaxed);
                        self.metrics.failed.fetch_add(1, Relaxed);
                        tell(&queued.job, Update::Failed(error));
                    }
                }
            }
        }
        Ok(())
    }

    /// A sequence for a prompt, with what is known of its beginning, and where it is to be copied.
    fn open(&mut self, job: &Job, capacity: usize) -> Result<(Sequence<D>, Option<usize>), Error> {
        let (model, slack) = (&self.checkpoint.model, self.slack());
        model.together(|| {
            // What is told of all tokens of a prompt has to be computed.
            if job.options.prompt_logprobs {
                return Ok((model.open(&self.plan, capacity, slack)?, None));
            }
            let beginning = self.prefix.find(model, &job.prompt, capacity)?;
            let sequence = match beginning.sequence {
                Some(sequence) => sequence,
                None => model.open(&self.plan, capacity, slack)?,
            };
            Ok((sequence, beginning.fork))
        })
    }

    /// Begins a job; gives it back where it has to wait for memory.
    fn begin(
        &mut self,
        job: Arc<Job>,
        capacity: usize,
        sizes: Sizes,
    ) -> Result<Option<Arc<Job>>, Error> {
        let mut opened = self.open(&job, capacity);
        if opened.as_ref().is_err_and(Error::is_out_of_memory) {
            // What is kept for others is not worth a request.
            self.prefix.clear();
            opened = self.open(&job, capacity);
        }
        let (sequence, fork) = match opened {
            Ok(opened) => opened,
            Err(error) if error.is_out_of_memory() && !self.active.is_empty() => {
                return Ok(Some(job));
            }
            Err(error) => {
                self.metrics.failed.fetch_add(1, Relaxed);
                tell(&job, Update::Failed(ApiError::of_model(&error)));
                return self.go_on_after(error).map(|()| None);
            }
        };
        // It was tried twice where memory was short, and begins once.
        self.prefix.remember(&job.prompt, capacity);
        let (cached, metrics) = (sequence.len(), Arc::clone(&self.metrics));
        let counter = if cached > 0 { &metrics.prefix_hits } else { &metrics.prefix_misses };
        counter.fetch_add(1, Relaxed);
        metrics.prefix_tokens.fetch_add(cached as u64, Relaxed);
        metrics.prompt_tokens.fetch_add((job.prompt.len() - cached) as u64, Relaxed);
        tell(&job, Update::Begun { cached_tokens: cached });
        let sequences = job.choices as u64;
        self.bytes += sizes.bytes * sequences;
        self.dense_bytes += sizes.dense_bytes * sequences;
        // Without rings a sequence can be cut anywhere.
        let marks = match sizes.has_rings {
            true => {
                let (every, len) = (self.options.prefix_every, job.prompt.len());
                // A step ends only where a whole stretch of the prompt is left.
                let last = len.saturating_sub(self.checkpoint.model.device().many_rows());
                let shared = job.shared.map(|shared| shared.min(last));
                self.prefix.marks(cached, len, every, shared, sizes.kept_bytes)
            }
            false => Vec::new(),
        };
        let active = Active {
            choice: 0,
            capacity,
            sizes,
            followers: job.choices - 1,
            fork,
            marks,
            last_token: job.came,
            tokens: 0,
            job,
        };
        self.start(sequence, active);
        Ok(None)
    }

    /// Gives a choice to the engine.
    pub(super) fn start(&mut self, sequence: Sequence<D>, active: Active) {
        let job = Arc::clone(&active.job);
        let mut options: GenerateOptions = job.options.clone();
        options.sampling.seed = options.sampling.seed.wrapping_add(active.choice as u64);
        // Others go on from where the first has read the prompt.
        options.prompt_logprobs &= active.choice == 0;
        options.prefill_stops =
            active.fork.into_iter().chain(active.marks.iter().copied()).collect();
        let id = self.engine.submit_in(sequence, job.prompt.clone(), options);
        self.active.insert(id, active);
        if let Some(grammar) = &job.grammar {
            match grammar.constraint() {
                Ok(constraint) => {
                    self.engine.constrain(id, constraint);
                }
                Err(error) => self.end(id, Some(error)),
            }
        }
    }
}
