//! Devices that share a model.

use std::panic::resume_unwind;
use std::sync::Arc;

use crate::Result;
use crate::device::Device;

/// One member of a group of devices that share a model; each has whole KV heads of every layer.
pub trait Rank: Send + Sync {
    /// This rank's number, counted from 0.
    fn rank(&self) -> usize;

    /// The number of ranks in the group.
    fn ranks(&self) -> usize;

    /// Tells the other ranks that this rank has failed, so that they fail too and do not wait for
    /// it.
    fn fail(&self);

    /// The first rank of this process that failed.
    fn failed(&self) -> Option<usize>;
}

/// A [`Rank`] that can add up what all ranks have.
pub trait Communicator<D: Device>: Rank {
    /// Makes `x` the sum over all ranks, the same on each to the last bit; all of them call this as often
    /// and with the same shapes.
    ///
    /// # Errors
    /// [`Error::Rank`](crate::Error::Rank) if another rank failed or, over the host, left;
    /// [`Error::Backend`](crate::Error::Backend) or
    /// [`Error::OutOfMemory`](crate::Error::OutOfMemory) if the device fails.
    fn all_reduce(&self, device: &D, x: &mut D::Tensor) -> Result<()>;

    /// Whether [`all_reduce`](Self::all_reduce) only launches work that writes `x` in place, so that
    /// it can be captured and launched again.
    fn only_launches(&self) -> bool {
        false
    }
}

impl<R: Rank> Rank for Arc<R> {
    fn rank(&self) -> usize {
        (**self).rank()
    }

    fn ranks(&self) -> usize {
        (**self).ranks()
    }

    fn fail(&self) {
        (**self).fail();
    }

    fn failed(&self) -> Option<usize> {
        (**self).failed()
    }
}

impl<D: Device, C: Communicator<D>> Communicator<D> for Arc<C> {
    fn all_reduce(&self, device: &D, x: &mut D::Tensor) -> Result<()> {
        (**self).all_reduce(device, x)
    }

    fn only_launches(&self) -> bool {
        (**self).only_launches()
    }
}

/// Runs the same work for each rank, on a thread of its own. A rank whose work fails or panics takes the
/// others with it; the error is that of the first.
///
/// # Errors
/// The error that `work` returned on the rank that failed first; the errors of the other ranks,
/// which fail because of it, are dropped.
///
/// # Panics
/// If `work` does.
pub fn on_ranks<R: Rank, T: Send, E: Send>(
    ranks: Vec<R>,
    work: impl Fn(Arc<R>) -> Result<T, E> + Sync,
) -> Result<Vec<T>, E> {
    /// Also while the thread panics.
    struct Leaving<'a, R: Rank>(&'a R, bool);
    impl<R: Rank> Drop for Leaving<'_, R> {
        fn drop(&mut self) {
            if !self.1 {
                self.0.fail();
            }
        }
    }
    let run = &|rank: Arc<R>| {
        let mut leaving = Leaving(&*rank, false);
        let result = work(Arc::clone(&rank));
        leaving.1 = result.is_ok();
        drop(leaving);
        (result, rank.failed())
    };
    let results: Vec<_> = std::thread::scope(|scope| {
        let ranks = ranks.into_iter().map(Arc::new);
        let threads: Vec<_> = ranks.map(|rank| scope.spawn(move || run(rank))).collect();
        threads.into_iter().map(|thread| thread.join()).collect()
    });
    let cause = results.iter().flatten().find_map(|(_, failed)| *failed);
    let mut done = Vec::with_capacity(results.len());
    let mut failed = None;
    for (rank, result) in results.into_iter().enumerate() {
        match result {
            Ok((Ok(value), _)) => done.push(value),
            Ok((Err(error), _)) if failed.is_none() || cause == Some(rank) => failed = Some(error),
            Ok((Err(_), _)) => {}
            Err(panic) => resume_unwind(panic),
        }
    }
    failed.map_or(Ok(done), Err)
}
