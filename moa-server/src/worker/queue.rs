//! Jobs that wait, by priority.

use std::collections::VecDeque;
use std::sync::Arc;

use super::Job;

/// How often a job may be overtaken by smaller ones while it waits for memory.
pub(super) const MOST_OVERTAKEN: usize = 32;

/// A job that does not run yet.
pub(super) struct Queued {
    pub(super) job: Arc<Job>,
    /// Times that a later job began before it.
    pub(super) overtaken: usize,
}

/// What waits by priority.
pub(super) trait Waits {
    fn priority(&self) -> i64;
    /// Times that a later one went before it.
    fn overtaken(&mut self) -> &mut usize;
}

impl Waits for Queued {
    fn priority(&self) -> i64 {
        self.job.priority
    }

    fn overtaken(&mut self) -> &mut usize {
        &mut self.overtaken
    }
}

/// Puts one behind those of its priority, and before later ones that were not overtaken too often.
pub(super) fn enqueue<T: Waits>(queue: &mut VecDeque<T>, new: T) {
    let mut at = queue.len();
    while let Some(before) = at.checked_sub(1).and_then(|at| queue.get_mut(at))
        && before.priority() > new.priority()
        && *before.overtaken() < MOST_OVERTAKEN
    {
        *before.overtaken() += 1;
        at -= 1;
    }
    queue.insert(at, new);
}

#[cfg(test)]
mod tests {
    use super::*;

    impl Waits for (i64, usize) {
        fn priority(&self) -> i64 {
            self.0
        }

        fn overtaken(&mut self) -> &mut usize {
            &mut self.1
        }
    }

    #[test]
    fn lower_priorities_go_first_but_not_for_ever() {
        let mut queue = VecDeque::new();
        for priority in [0, 5, -1, 0, 5, -1] {
            enqueue(&mut queue, (priority, 0));
        }
        assert_eq!(queue.iter().map(|q| q.0).collect::<Vec<_>>(), [-1, -1, 0, 0, 5, 5]);
        let (mut queue, mut went) = (VecDeque::from([(1, 0)]), 0);
        loop {
            enqueue(&mut queue, (0, 0));
            match queue.pop_front() {
                Some((0, _)) => went += 1,
                _ => break,
            }
        }
        assert_eq!(went, MOST_OVERTAKEN);
    }
}
