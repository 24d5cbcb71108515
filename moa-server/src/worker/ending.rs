//! Jobs that end before their answers do.

use std::sync::atomic::Ordering::Relaxed;

use moa_models::{Math, RequestId};

use super::job::Gone;
use super::queue::Queued;
use super::turn::Turn;
use super::{Active, Update, Worker, tell};
use crate::http::error::ApiError;

impl<D: Math + 'static> Worker<D> {
    /// Ends everything.
    pub(super) fn end_all(&mut self, error: &ApiError) {
        for queued in std::mem::take(&mut self.queue) {
            self.metrics.queued.fetch_sub(1, Relaxed);
            tell(&queued.job, Update::Failed(error.clone()));
        }
        let ids: Vec<RequestId> = self.active.keys().copied().collect();
        for id in ids {
            self.end(id, Some(error.clone()));
        }
    }

    /// Ends what nobody waits for any more, or not any longer.
    pub(super) fn drop_those_that_left(&mut self, turn: &Turn) {
        // From the last place on, so that the others stay what they are.
        for (at, gone) in turn.waiting_gone.iter().rev() {
            let Some(Queued { job, .. }) = self.queue.remove(*at) else { continue };
            let metrics = &self.metrics;
            let counter = if *gone == Gone::Left { &metrics.cancelled } else { &metrics.failed };
            counter.fetch_add(1, Relaxed);
            metrics.queued.fetch_sub(1, Relaxed);
            if *gone == Gone::Late {
                tell(&job, Update::Failed(ApiError::timeout("the request waited too long")));
            }
        }
        for (id, gone) in &turn.running_gone {
            let late = || ApiError::timeout("the request took longer than it may");
            self.end(*id, (*gone == Gone::Late).then(late));
        }
    }

    /// Ends a sequence that runs, and where there is an error its job.
    pub(super) fn end(&mut self, id: RequestId, error: Option<ApiError>) {
        self.engine.cancel(id);
        // Its memory is free with it.
        drop(self.engine.reclaim(id));
        let Some(active) = self.leave(id) else { return };
        let metrics = &self.metrics;
        let counter = if error.is_some() { &metrics.failed } else { &metrics.cancelled };
        counter.fetch_add(1, Relaxed);
        self.tell_gauges();
        if let Some(error) = error {
            tell(&active.job, Update::Failed(error));
        }
    }

    pub(super) fn leave(&mut self, id: RequestId) -> Option<Active> {
        let active = self.active.remove(&id)?;
        let sequences = 1 + active.followers as u64;
        self.bytes -= active.sizes.bytes * sequences;
        self.dense_bytes -= active.sizes.dense_bytes * sequences;
        Some(active)
    }
}
