//! Devices that share a model.

use std::any::Any;
use std::panic::resume_unwind;
use std::sync::Arc;
use std::time::Duration;

use crate::device::Device;
use crate::{Error, Result};

/// What a rank brings to a [meeting](Rank::gather): any value, shared by reference.
pub type Brought = Arc<dyn Any + Send + Sync>;

/// What a rank without memory brings to a meeting: why it has not done what all were to do.
#[derive(Debug)]
pub(crate) struct Shortage(pub(crate) String);

/// How long ranks wait for each other where nothing else is said. They do the same work, so that one comes seconds
/// after another at most.
pub const PATIENCE: Duration = Duration::from_secs(30);

/// How long ranks wait for others that load.
pub(crate) const LOAD_PATIENCE: Duration = Duration::from_secs(900);

/// How long the ranks of a [meeting](Rank::gather) wait for those that have not come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wait {
    /// As long as for a sum: [`PATIENCE`], or what the group was made with.
    Step,
    /// For minutes: until all have loaded their part of a model.
    Load,
    /// For rank 0 without end, which may be reading what a user types, and then for the others as in a step.
    First,
}

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

    /// What broke the group, if it is broken: another rank failed, or did not come in time.
    fn reason(&self) -> Option<Error> {
        self.failed().map(|rank| Error::Rank { rank })
    }

    /// Whether ranks can [bring](Self::gather) each other values: those of several processes cannot.
    fn meets(&self) -> bool {
        true
    }

    /// What all ranks bring, in their order; all of them call this alike. A rank without memory brings word of that in the
    /// place of what is expected, which [`ThreadRank`](crate::ThreadRank) knows: others have theirs met by one.
    ///
    /// # Errors
    /// [`Error::Rank`] if a rank failed or left, [`Error::RankSilent`] if one did not come in time,
    /// [`Error::RankOutOfMemory`] if one came without memory for what was to be done before,
    /// [`Error::Invalid`] unless all ranks are of this process.
    fn gather(&self, own: Brought, wait: Wait) -> Result<Arc<[Brought]>> {
        let _ = wait;
        if self.ranks() == 1 {
            return Ok(Arc::new([own]));
        }
        let got = format!("rank {} of {}", self.rank(), self.ranks());
        Err(Error::invalid("ranks", "of one process, to tell each other values", got))
    }
}

/// A [`Rank`] that can add up what all ranks have.
pub trait Communicator<D: Device>: Rank {
    /// Makes `x` the sum over all ranks, the same on each to the last bit; all of them call this as often
    /// and with the same shapes.
    ///
    /// # Errors
    /// [`Error::Rank`] if another rank failed or, over the host, left; [`Error::RankSilent`] if one did not come in
    /// time, where this waits for it; [`Error::RankOutOfMemory`] if one has no memory for its part: then no rank may have
    /// begun this sum; [`Error::Backend`] or [`Error::OutOfMemory`] if the device fails.
    fn all_reduce(&self, device: &D, x: &mut D::Tensor) -> Result<()>;

    /// [`all_reduce`](Self::all_reduce), and the [norm](crate::Math::rms_norm) of the sum's rows where that comes with
    /// it; `None` where it does not.
    ///
    /// # Errors
    /// As [`all_reduce`](Self::all_reduce).
    fn all_reduce_norm(
        &self,
        device: &D,
        x: &mut D::Tensor,
        norm: &D::Vector,
        eps: f32,
    ) -> Result<Option<D::Tensor>> {
        let _ = (norm, eps);
        self.all_reduce(device, x)?;
        Ok(None)
    }

    /// Says that a step of the model begins, captured or not: by these and by sums ranks know how far each is.
    fn begins(&self) {}

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

    fn reason(&self) -> Option<Error> {
        (**self).reason()
    }

    fn meets(&self) -> bool {
        (**self).meets()
    }

    fn gather(&self, own: Brought, wait: Wait) -> Result<Arc<[Brought]>> {
        (**self).gather(own, wait)
    }
}

impl<D: Device, C: Communicator<D>> Communicator<D> for Arc<C> {
    fn all_reduce(&self, device: &D, x: &mut D::Tensor) -> Result<()> {
        (**self).all_reduce(device, x)
    }

    fn all_reduce_norm(
        &self,
        device: &D,
        x: &mut D::Tensor,
        norm: &D::Vector,
        eps: f32,
    ) -> Result<Option<D::Tensor>> {
        (**self).all_reduce_norm(device, x, norm, eps)
    }

    fn begins(&self) {
        (**self).begins();
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
