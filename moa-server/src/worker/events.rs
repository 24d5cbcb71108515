//! What the engine says of the sequences that run.

use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Instant;

use moa_models::{Event, Math, RequestId, Sequence};

use super::{Active, Update, Worker, tell};
use crate::http::error::ApiError;

impl<D: Math + 'static> Worker<D> {
    pub(super) fn handle(&mut self, event: Event) {
        let id = event.id();
        let Some(active) = self.active.get_mut(&id) else {
            // Its client has left.
            drop(self.engine.reclaim(id));
            return;
        };
        let choice = active.job.first_choice + active.choice;
        match event {
            Event::Prefill { done, total, .. } => self.has_read(id, done, total),
            Event::Token { token, logprobs, .. } => {
                let (metrics, now) = (&self.state.metrics, Instant::now());
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
                let Some(active) = self.leave(id) else { return };
                self.state.metrics.completed.fetch_add(1, Relaxed);
                let (finish, tokens) = (completion.finish, completion.tokens.len());
                tell(&active.job, Update::Done { choice, finish, tokens });
                if let Some(sequence) = sequence
                    && active.choice == 0
                {
                    self.keep_turn(&active.job.prompt, &completion.tokens, sequence);
                }
            }
            Event::Failed { error, .. } => self.end(id, Some(ApiError::of_model(&error))),
            _ => {}
        }
    }

    /// So much of a prompt is read: other choices can go on from there.
    fn has_read(&mut self, id: RequestId, done: usize, total: usize) {
        let Some(active) = self.active.get_mut(&id) else { return };
        let (job, capacity) = (Arc::clone(&active.job), active.capacity);
        let (bytes, dense_bytes) = (active.bytes, active.dense_bytes);
        let (at_fork, at_mark) = (active.fork == Some(done), active.marks.contains(&done));
        let is_first_end = done == total && active.choice == 0;
        let followers = if is_first_end { std::mem::take(&mut active.followers) } else { 0 };
        if (at_fork || at_mark || is_first_end)
            && self.prefix.takes(done, bytes)
            && !self.prefix.has(&job.prompt[..done], capacity)
        {
            self.copies.push((id, done, !at_fork && !is_first_end));
        }
        for choice in 1..=followers {
            // The last token is read again, for its logits.
            let copy = self.engine.snapshot(id).and_then(|copy| match copy {
                Some(mut copy) => {
                    self.checkpoint.model.truncate(&mut copy, total - 1)?;
                    Ok(copy)
                }
                None => self.checkpoint.model.open(&self.plan, capacity, self.slack()),
            });
            match copy {
                Ok(copy) => {
                    let active = Active {
                        job: Arc::clone(&job),
                        choice,
                        capacity,
                        bytes,
                        dense_bytes,
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
                    self.bytes -= bytes * rest;
                    self.dense_bytes -= dense_bytes * rest;
                    return self.end(id, Some(ApiError::of_model(&error)));
                }
            }
        }
    }

    /// Copies the prompts that the last step has read, now that clients were told what it chose.
    pub(super) fn keep_copies(&mut self) {
        for (id, read, is_mark) in std::mem::take(&mut self.copies) {
            // A copy that cannot be had is not needed.
            if let Some(active) = self.active.get(&id)
                && let Ok(Some(copy)) = self.engine.snapshot(id)
            {
                let (tokens, model) = (active.job.prompt[..read].to_vec(), &self.checkpoint.model);
                let bytes = model.kv_bytes(&copy);
                self.prefix.insert(model, tokens, copy, bytes, is_mark);
            }
        }
    }

    /// Keeps the sequence of a turn, which the next one may begin with.
    fn keep_turn(&mut self, prompt: &[u32], answer: &[u32], sequence: Sequence<D>) {
        let len = sequence.len();
        let mut tokens = [prompt, answer].concat();
        // The last token need not be in the sequence.
        tokens.truncate(len);
        if tokens.len() == len {
            let model = &self.checkpoint.model;
            let bytes = model.kv_bytes(&sequence);
            self.prefix.insert(model, tokens, sequence, bytes, false);
        }
    }
}
