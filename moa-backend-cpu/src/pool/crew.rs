//! Threads that stay awake between the calls of one step.
//!
//! A step of decode is hundreds of calls of some microseconds each. Waking a thread for each of them costs more
//! than many of them take, so whoever has helped with a call looks out for the next one for a while.

use std::any::Any;
use std::cell::{Cell, UnsafeCell};
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// How long a helper looks out for work: longer than what a step does between two calls.
const STAY: Duration = Duration::from_micros(200);
/// Looks without a look at the clock.
const LOOKS: u32 = 64;

/// Helpers may join: the highest bit of their count, which is the low half of the state. The high half is the
/// number of the call.
const OPEN: u64 = 1 << 31;
const COUNT: u64 = OPEN - 1;

type Work<'a> = dyn Fn() + Sync + 'a;

thread_local! {
    /// Helpers of calls that this thread makes. They are threads of the pool that it belongs to.
    static CREW: Arc<Crew> = Arc::default();
    /// A call of this thread is running: one inside of it has no helpers.
    static BUSY: Cell<bool> = const { Cell::new(false) };
}

/// Runs `work` on this thread and on up to `others` more of its pool, and returns when all are done.
pub(super) fn together(others: usize, work: &Work<'_>) {
    if BUSY.replace(true) {
        return rayon::scope(|scope| {
            (0..others).for_each(|_| scope.spawn(|_| work()));
            work();
        });
    }
    struct Free;
    impl Drop for Free {
        fn drop(&mut self) {
            BUSY.set(false);
        }
    }
    let _free = Free;
    CREW.with(|crew| crew.run(others, work));
}

#[derive(Default)]
struct Crew {
    state: AtomicU64,
    /// Threads that look out for work, or will.
    members: AtomicUsize,
    /// Written while nobody has joined, read by those who have.
    work: UnsafeCell<Option<*const Work<'static>>>,
    panic: Mutex<Option<Box<dyn Any + Send>>>,
}

// SAFETY: `work` is written by the crew's own thread, while the state is closed and nobody has joined, and read by
// those who joined an open state, which happens after.
unsafe impl Sync for Crew {}
// SAFETY: the pointer is only followed by those who have joined, while its owner waits for them.
unsafe impl Send for Crew {}

impl Crew {
    fn run(self: &Arc<Self>, others: usize, work: &Work<'_>) {
        // SAFETY: only the lifetime is changed. Nobody follows the pointer after `Close` is dropped, which
        // happens before this function ends, by a panic too.
        let work_pointer: *const Work<'static> =
            unsafe { std::mem::transmute::<&Work<'_>, &'static Work<'static>>(work) };
        // SAFETY: the last call closed the state and waited for all.
        unsafe { *self.work.get() = Some(work_pointer) };
        let call = (self.state.load(Ordering::Relaxed) >> 32).wrapping_add(1);
        // Where the caller itself failed, a helper's panic was left behind.
        drop(self.panic.lock().unwrap_or_else(PoisonError::into_inner).take());
        self.state.store(call << 32 | OPEN, Ordering::Release);
        let close = Close(self);
        for _ in self.members.load(Ordering::Relaxed)..others {
            self.members.fetch_add(1, Ordering::Relaxed);
            let crew = Arc::clone(self);
            rayon::spawn(move || crew.serve());
        }
        work();
        drop(close);
        if let Some(panic) = self.panic.lock().unwrap_or_else(PoisonError::into_inner).take() {
            resume_unwind(panic);
        }
    }

    /// Helps with calls until there have been none for a while.
    fn serve(&self) {
        let (mut last, mut looks, mut since) = (None, 0u32, Instant::now());
        loop {
            let state = self.state.load(Ordering::Acquire);
            if state & OPEN != 0 && last != Some(state >> 32) {
                let joined = self.state.compare_exchange_weak(
                    state,
                    state + 1,
                    Ordering::AcqRel,
                    Ordering::Relaxed,
                );
                if joined.is_ok() {
                    last = Some(state >> 32);
                    self.help();
                    (looks, since) = (0, Instant::now());
                }
                continue;
            }
            looks = looks.wrapping_add(1);
            std::hint::spin_loop();
            if looks.is_multiple_of(LOOKS) {
                if since.elapsed() > STAY {
                    break;
                }
                // Where there are more threads than cores, another one may have what this one waits for.
                std::thread::yield_now();
            }
        }
        self.members.fetch_sub(1, Ordering::Relaxed);
    }

    fn help(&self) {
        // SAFETY: this thread has joined an open call, whose owner waits for it below.
        let work = unsafe { (*self.work.get()).map(|work| &*work) };
        if let Some(work) = work
            && let Err(panic) = catch_unwind(AssertUnwindSafe(work))
        {
            *self.panic.lock().unwrap_or_else(PoisonError::into_inner) = Some(panic);
        }
        self.state.fetch_sub(1, Ordering::Release);
    }
}

/// Lets nobody join any more, and waits for those who have.
struct Close<'a>(&'a Crew);

impl Drop for Close<'_> {
    fn drop(&mut self) {
        self.0.state.fetch_and(!OPEN, Ordering::AcqRel);
        let mut looks = 0u32;
        while self.0.state.load(Ordering::Acquire) & COUNT != 0 {
            looks = looks.wrapping_add(1);
            std::hint::spin_loop();
            if looks.is_multiple_of(LOOKS) {
                std::thread::yield_now();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pool() -> rayon::ThreadPool {
        rayon::ThreadPoolBuilder::new().num_threads(3).build().unwrap()
    }

    #[test]
    fn every_call_is_done_when_it_returns_and_calls_may_nest() {
        pool().install(|| {
            for _ in 0..2000 {
                let next = AtomicUsize::new(0);
                let done = AtomicUsize::new(0);
                together(2, &|| {
                    while next.fetch_add(1, Ordering::Relaxed) < 5 {
                        done.fetch_add(1, Ordering::Relaxed);
                    }
                });
                assert_eq!(done.load(Ordering::Relaxed), 5);
            }
            let inner = AtomicUsize::new(0);
            together(2, &|| {
                together(1, &|| {
                    inner.fetch_add(1, Ordering::Relaxed);
                })
            });
            assert!(inner.load(Ordering::Relaxed) >= 2);
        });
    }

    #[test]
    fn a_panic_of_any_thread_reaches_the_caller_and_the_crew_lives_on() {
        pool().install(|| {
            let caller = std::thread::current().id();
            for _ in 0..50 {
                let helped = AtomicUsize::new(0);
                let result = catch_unwind(AssertUnwindSafe(|| {
                    together(1, &|| {
                        if std::thread::current().id() != caller {
                            helped.store(1, Ordering::Relaxed);
                            panic!("on purpose");
                        }
                        // A helper may come too late, or have left just now.
                        let since = Instant::now();
                        while helped.load(Ordering::Relaxed) == 0
                            && since.elapsed() < Duration::from_millis(5)
                        {
                            std::thread::yield_now();
                        }
                    });
                }));
                assert_eq!(result.is_err(), helped.load(Ordering::Relaxed) == 1);
                assert!(catch_unwind(|| together(1, &|| panic!("on purpose"))).is_err());
                let count = AtomicUsize::new(0);
                together(1, &|| {
                    count.fetch_add(1, Ordering::Relaxed);
                });
                assert!(count.load(Ordering::Relaxed) >= 1);
            }
        });
    }
}
