//! What is decided between two steps. Where several devices share the model, each runs the same loop, and the first one
//! decides for all what depends on clients and on time.

use std::sync::Arc;
use std::sync::mpsc;
use std::time::Instant;

use moa_models::{Error, Math, RequestId};

use super::job::Gone;
use super::queue::{Queued, enqueue};
use super::{Command, Job, Worker};

/// What comes and goes before a step.
#[derive(Default)]
pub(super) struct Turn {
    /// Jobs that have come.
    pub(super) new: Vec<Arc<Job>>,
    /// Places in the queue of those that nobody waits for.
    pub(super) waiting_gone: Vec<(usize, Gone)>,
    /// Sequences of such jobs.
    pub(super) running_gone: Vec<(RequestId, Gone)>,
    pub(super) end: End,
}

/// Whether the loop ends.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum End {
    #[default]
    NotYet,
    /// Nothing is left to do.
    Idle,
    /// What is left has had its time.
    Late,
}

impl<D: Math + 'static> Worker<D> {
    /// What is to be done before the next step; waits where there is none.
    ///
    /// # Errors
    /// That of another rank, where several share the model.
    pub(super) fn next_turn(&mut self) -> Result<Arc<Turn>, Error> {
        let model = Arc::clone(&self.checkpoint.model);
        model.agree(|| Ok(Arc::new(self.decide())))
    }

    fn decide(&mut self) -> Turn {
        let mut turn = Turn::default();
        turn.end = self.take_commands(&mut turn.new);
        let now = Instant::now();
        let waiting = self.queue.iter().enumerate();
        turn.waiting_gone =
            waiting.filter_map(|(at, queued)| Some((at, queued.job.gone(now)?))).collect();
        let running = self.active.iter();
        turn.running_gone =
            running.filter_map(|(id, active)| Some((*id, active.job.gone(now)?))).collect();
        turn
    }

    /// Takes what has come, and waits where nothing else is to be done.
    fn take_commands(&mut self, new: &mut Vec<Arc<Job>>) -> End {
        loop {
            let is_idle = self.queue.is_empty() && self.active.is_empty() && new.is_empty();
            let command = match is_idle {
                true if self.stops_at.is_some() => return End::Idle,
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
                Some(Command::Job(job)) => new.push(Arc::from(job)),
                Some(Command::Stop) | None => {
                    let ends = Instant::now() + self.options.grace;
                    self.stops_at.get_or_insert(ends);
                    if command.is_none() {
                        break;
                    }
                }
            }
        }
        match self.stops_at.is_some_and(|at| Instant::now() >= at) {
            true => End::Late,
            false => End::NotYet,
        }
    }

    /// Puts those that have come into the queue.
    pub(super) fn take_in(&mut self, turn: &Turn) {
        for job in &turn.new {
            let job = match self.checkpoint.model.is_first() {
                true => Arc::clone(job),
                false => Arc::new(job.unheard()),
            };
            enqueue(&mut self.queue, Queued { job, overtaken: 0 });
        }
    }
}
