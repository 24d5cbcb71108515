//! How work is spread over threads.

mod crew;

use std::sync::OnceLock;
use std::sync::atomic::{AtomicUsize, Ordering};

use crate::Result;

/// Multiply-adds below which handing work to other threads costs more than it saves: under a microsecond where
/// they are awake, 2 to 18 where they sleep. A core does 2^20 multiply-adds in 25 to 40.
const INLINE_WORK: u64 = 1 << 16;

/// Calls `body(i)` once for each `i < tasks`, in order of `i` as threads become free.
///
/// `work` is an estimate of all tasks together in multiply-adds. Tasks that are pulled one by one
/// need no better estimate of their own: put the long ones first.
pub(crate) fn for_each(tasks: usize, work: u64, body: impl Fn(usize) + Sync) {
    let threads = threads_for(tasks, work);
    if threads < 2 {
        return (0..tasks).for_each(body);
    }
    let run = Run { next: AtomicUsize::new(0), end: tasks };
    crew::together(threads - 1, &|| run.work(&body));
}

/// [`for_each`] of tasks that lie one after the other in memory: each thread begins with a run of them, and takes
/// those of other threads when its own are done.
pub(crate) fn for_each_in_runs(tasks: usize, work: u64, body: impl Fn(usize) + Sync) {
    let threads = threads_for(tasks, work);
    if threads < 2 {
        return (0..tasks).for_each(body);
    }
    let longest = tasks.div_ceil(threads);
    let run = |thread: usize| Run {
        next: AtomicUsize::new(thread * longest),
        end: tasks.min((thread + 1) * longest),
    };
    let (runs, joined): (Vec<Run>, _) = ((0..threads).map(run).collect(), AtomicUsize::new(0));
    let worker = || {
        let own = joined.fetch_add(1, Ordering::Relaxed);
        for run in runs.iter().cycle().skip(own % threads).take(threads) {
            run.work(&body);
        }
    };
    crew::together(threads - 1, &worker);
}

/// Tasks that follow each other. A line of memory of its own, as another thread counts in the next one.
#[repr(align(64))]
struct Run {
    next: AtomicUsize,
    end: usize,
}

impl Run {
    fn work(&self, body: impl Fn(usize)) {
        loop {
            let task = self.next.fetch_add(1, Ordering::Relaxed);
            if task >= self.end {
                return;
            }
            body(task);
        }
    }
}

/// Threads that share so many tasks.
fn threads_for(tasks: usize, work: u64) -> usize {
    if tasks < 2 || work < INLINE_WORK { 1 } else { rayon::current_num_threads().min(tasks) }
}

/// [`for_each`] of tasks that can fail.
///
/// # Errors
/// One of those of the tasks. Those that had not begun are left out.
pub(crate) fn try_for_each(
    tasks: usize,
    work: u64,
    body: impl Fn(usize) -> Result<()> + Sync,
) -> Result<()> {
    let failure = OnceLock::new();
    for_each(tasks, work, |task| {
        if failure.get().is_none()
            && let Err(error) = body(task)
        {
            let _ = failure.set(error);
        }
    });
    failure.into_inner().map_or(Ok(()), Err)
}

/// A buffer that several tasks write, each at places of its own.
pub(crate) struct SharedMut<'a, T> {
    pointer: *mut T,
    len: usize,
    lifetime: std::marker::PhantomData<&'a mut [T]>,
}

// SAFETY: it is a `&mut [T]` whose disjoint parts are handed to several threads, see `slice`.
unsafe impl<T: Send> Sync for SharedMut<'_, T> {}
// SAFETY: as above.
unsafe impl<T: Send> Send for SharedMut<'_, T> {}

impl<'a, T> SharedMut<'a, T> {
    pub(crate) fn new(data: &'a mut [T]) -> Self {
        Self { pointer: data.as_mut_ptr(), len: data.len(), lifetime: std::marker::PhantomData }
    }

    /// Elements `start..start + len`.
    ///
    /// # Safety
    /// No other slice that is alive at the same time may overlap these elements.
    ///
    /// # Panics
    /// If the range lies outside the buffer.
    #[allow(clippy::mut_from_ref)]
    pub(crate) unsafe fn slice(&self, start: usize, len: usize) -> &mut [T] {
        assert!(start <= self.len && len <= self.len - start);
        // SAFETY: inside the buffer by the assertion, exclusive by the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(self.pointer.add(start), len) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_task_is_done_once_by_any_number_of_threads() {
        for threads in [1, 2, 3, 8] {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            for tasks in [0, 1, 2, 5, 97] {
                let counts: Vec<AtomicUsize> =
                    (0..2 * tasks).map(|_| AtomicUsize::new(0)).collect();
                let count = |task: usize| {
                    counts[task].fetch_add(1, Ordering::Relaxed);
                };
                pool.install(|| {
                    for_each(tasks, u64::MAX, count);
                    for_each_in_runs(tasks, u64::MAX, |task| count(tasks + task));
                });
                assert!(counts.iter().all(|count| count.load(Ordering::Relaxed) == 1));
            }
        }
    }
}
