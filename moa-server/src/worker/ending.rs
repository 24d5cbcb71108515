//! Jobs that end before their answers do.

use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Instant;

use moa_models::{Math, RequestId};

use super::queue::Queued;
use super::{Active, Update, Worker, tell};
use crate::http::error::ApiError;

impl<D: Math + 'static> Worker<D> {
    /// Ends everything.
    pub(super) fn end_all(&mut self, error: &ApiError) {
        for queued in std::mem::take(&mut self.queue) {
            self.state.metrics.queued.fetch_sub(1, Relaxed);
            tell(&queued.job, Update::Failed(error.clone()));
        }
        let ids: Vec<RequestId> = self.active.keys().copied().collect();
        for id in ids {
            self.end(id, Some(error.clone()));
        }
    }

    /// Ends what nobody waits for any more, or not any longer.
    pub(super) fn drop_those_that_left(&mut self) {
        let (now, metrics) = (Instant::now(), Arc::clone(&self.state.metrics));
        self.queue.retain(|Queued { job, .. }| {
            let has_left = job.out.is_closed();
            let is_late = now >= job.deadline;
            if is_late {
                tell(job, Update::Failed(ApiError::timeout("the request waited too long")));
            }
            if has_left || is_late {
                let counter = if has_left { &metrics.cancelled } else { &metrics.failed };
                counter.fetch_add(1, Relaxed);
                metrics.queued.fetch_sub(1, Relaxed);
            }
            !has_left && !is_late
        });
        let ended: Vec<(RequestId, bool)> = self
            .active
            .iter()
            .filter(|(_, active)| active.job.out.is_closed() || now >= active.job.deadline)
            .map(|(id, active)| (*id, active.job.out.is_closed()))
            .collect();
        for (id, has_left) in ended {
            let late = || ApiError::timeout("the request took longer than it may");
            self.end(id, (!has_left).then(late));
        }
    }

    /// Ends a sequence that runs, and where there is an error its job.
    pub(super) fn end(&mut self, id: RequestId, error: Option<ApiError>) {
        self.engine.cancel(id);
        // Its memory is free with it.
        drop(self.engine.reclaim(id));
        let Some(active) = self.leave(id) else { return };
        let metrics = &self.state.metrics;
        let counter = if error.is_some() { &metrics.failed } else { &metrics.cancelled };
        counter.fetch_add(1, Relaxed);
        if let Some(error) = error {
            tell(&active.job, Update::Failed(error));
        }
    }

    pub(super) fn leave(&mut self, id: RequestId) -> Option<Active> {
        let active = self.active.remove(&id)?;
        let sequences = 1 + active.followers as u64;
        self.bytes -= active.bytes * sequences;
        self.dense_bytes -= active.dense_bytes * sequences;
        Some(active)
    }
}
