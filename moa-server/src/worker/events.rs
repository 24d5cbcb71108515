//! What the engine says of the sequences that run.

use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Instant;

use moa_models::{Error, Event, Math, RequestId, Sequence};

use super::{Active, Update, Worker, tell};
use crate::http::error::ApiError;

impl<D: Math + 'static> Worker<D> {
    /// Tells handlers of an event, and does what follows from it.
    ///
    /// # Errors
    /// That of another rank, where several share the model.
    pub(super) fn handle(&mut self, event: Event) -> Result<(), Error> {
        let id = event.id();
        let Some(active) = self.active.get_mut(&id) else {
            // Its client has left.
            drop(self.engine.reclaim(id));
            return Ok(());
        };
        let choice = active.job.first_choice + active.choice;
        match event {
            Event::Prefill { done, total, .. } => return self.has_read(id, done, total),
            Event::PromptToken { token, logprobs, .. } => {
                let job = &active.job;
                let choices = job.first_choice..job.first_choice + job.choices;
                tell(job, Update::PromptToken { choices, token, logprobs });
            }
            Event::Token { token, logprobs, .. } => {
                let (metrics, now) = (&self.metrics, Instant::now());
                let times =
                    if active.tokens == 0 { &metrics.first_token } else { &metrics.per_token };
                times.observe(now.saturating_duration_since(active.last_token));
                (active.last_token, active.tokens) = (now, active.tokens + 1);
                metrics.generated_tokens.fetch_add(1, Relaxed);
                if let Some(logprobs) = logprobs {
                    tell(&active.job, Update::Token { choice, token, logprobs });
                }
            }
            Event::Text { piece, .. } => tell(&active.job, Update::Text { choice, piece }),
            Event::Done { completion, .. } => {
                let sequence = self.engine.reclaim(id);
                let Some(active) = self.leave(id) else { return Ok(()) };
                self.metrics.completed.fetch_add(1, Relaxed);
                // As many bytes again may run beside those that do, up to what there was before a step had no memory.
                let room = self.room.saturating_add(active.sizes.bytes);
                self.room = room.min(self.options.kv_memory);
                self.tell_gauges();
                let (finish, tokens) = (completion.finish, completion.tokens.len());
                tell(&active.job, Update::Done { choice, finish, tokens });
                if let Some(sequence) = sequence
                    && active.choice == 0
                {
                    self.keep_turn(&active, &completion.tokens, sequence);
                }
            }
            Event::Failed { error, .. } => self.end(id, Some(ApiError::of_model(&error))),
            _ => {}
        }
        Ok(())
    }

    /// So much of a prompt is read: other choices can go on from there.
    fn has_read(&mut self, id: RequestId, done: usize, total: usize) -> Result<(), Error> {
        let Some(active) = self.active.get_mut(&id) else { return Ok(()) };
        let (job, capacity, sizes) = (Arc::clone(&active.job), active.capacity, active.sizes);
        let (at_fork, at_mark) = (active.fork == Some(done), active.marks.contains(&done));
        let is_first_end = done == total && active.choice == 0;
        let followers = if is_first_end { std::mem::take(&mut active.followers) } else { 0 };
        if (at_fork || at_mark || is_first_end)
            && self.prefix.takes(done, sizes.kept_bytes)
            && !self.prefix.has(&job.prompt[..done], capacity)
        {
            self.copies.push((id, done, !at_fork && !is_first_end));
        }
        for choice in 1..=followers {
            // The last token is read again, for its logits.
            let model = &self.checkpoint.model;
            let copy = model.together(|| match self.engine.snapshot(id)? {
                Some(mut copy) => {
                    model.truncate(&mut copy, total - 1)?;
                    Ok(copy)
                }
                None => model.open(&self.plan, capacity, self.slack()),
            });
            match copy {
                Ok(copy) => {
                    let active = Active {
                        job: Arc::clone(&job),
                        choice,
                        capacity,
                        sizes,
                        followers: 0,
                        fork: None,
                        marks: Vec::new(),
                        last_token: job.came,
                        tokens: 0,
                    };
                    self.start(copy, active);
                }
                Err(error) => {
                    let rest = (followers - choice + 1) as u64;
                    self.bytes -= sizes.bytes * rest;
                    self.dense_bytes -= sizes.dense_bytes * rest;
                    self.end(id, Some(ApiError::of_model(&error)));
                    return self.go_on_after(error);
                }
            }
        }
        Ok(())
    }

    /// Copies the prompts that the last step has read, now that clients were told what it chose.
    ///
    /// # Errors
    /// That of another rank, where several share the model.
    pub(super) fn keep_copies(&mut self) -> Result<(), Error> {
        for (id, read, is_mark) in std::mem::take(&mut self.copies) {
            let Some(active) = self.active.get(&id) else { continue };
            let model = &self.checkpoint.model;
            match model.together(|| self.engine.snapshot(id)) {
                Ok(Some(copy)) => {
                    let tokens = active.job.prompt[..read].to_vec();
                    self.prefix.insert(model, tokens, copy, active.sizes.kept_bytes, is_mark);
                }
                Ok(None) => {}
                // A copy that cannot be had is not needed.
                Err(error) => self.go_on_after(error)?,
            }
        }
        Ok(())
    }

    /// Keeps the sequence of a turn, which the next one may begin with.
    fn keep_turn(&mut self, active: &Active, answer: &[u32], sequence: Sequence<D>) {
        let len = sequence.len();
        let mut tokens = [&active.job.prompt[..], answer].concat();
        // The last token need not be in the sequence.
        tokens.truncate(len);
        if tokens.len() == len {
            let (model, bytes) = (&self.checkpoint.model, active.sizes.kept_bytes);
            self.prefix.insert(model, tokens, sequence, bytes, false);
        }
    }
}
