use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use moa_backend_cuda::{Nccl, NcclId, Tensor};

use super::Cuda;
use crate::device::rank::{Communicator, Rank};
use crate::device::thread_rank::ThreadRank;
use crate::{Error, Result};

/// One of several GPUs that share a model and add up over NCCL, each worked with by a thread of its own.
#[derive(Debug)]
pub struct NcclRank {
    id: NcclId,
    rank: usize,
    ranks: usize,
    /// Ranks of this process: they wait for each other before NCCL does, which could not be told that
    /// one of them has failed by then.
    threads: ThreadRank,
    own: Mutex<Option<Arc<Nccl>>>,
    /// Of all ranks of this process.
    joined: Arc<Mutex<Vec<Arc<Nccl>>>>,
}

impl NcclRank {
    /// The ranks of a group of so many GPUs, all of them in this process.
    ///
    /// # Errors
    /// [`Error::Invalid`] if `ranks` is 0, [`Error::Backend`] if NCCL cannot be loaded or refuses.
    pub fn group(ranks: usize) -> Result<Vec<Self>> {
        let threads = ThreadRank::group(ranks)?;
        let id = NcclId::new()?;
        let joined = Arc::default();
        let rank = |threads: ThreadRank| Self {
            id,
            rank: threads.rank(),
            ranks,
            threads,
            own: Mutex::default(),
            joined: Arc::clone(&joined),
        };
        Ok(threads.into_iter().map(rank).collect())
    }

    /// The only rank of this process, in a group of processes that have the same `id`. What fails in
    /// another process is not noticed here: whoever started them has to end them all.
    ///
    /// # Errors
    /// [`Error::Invalid`] if `rank` is not below `ranks`.
    pub fn of_process(id: NcclId, rank: usize, ranks: usize) -> Result<Self> {
        if rank >= ranks {
            return Err(crate::Error::invalid("rank", format!("below {ranks}"), rank));
        }
        let threads = ThreadRank::group(1)?.swap_remove(0);
        let (own, joined) = (Mutex::default(), Arc::default());
        Ok(Self { id, rank, ranks, threads, own, joined })
    }

    /// Joins the group, once all ranks do: to be called before memory is measured, as NCCL takes some.
    /// The first sum calls it otherwise.
    ///
    /// # Errors
    /// [`Error::Rank`] if another rank of this process has failed, [`Error::Backend`] with what
    /// NCCL or the driver says.
    pub fn connect(&self, device: &Cuda) -> Result<()> {
        self.connected(device).map(drop)
    }

    fn connected(&self, device: &Cuda) -> Result<Arc<Nccl>> {
        // No other thread works with this rank.
        let mut own = lock(&self.own);
        if let Some(nccl) = &*own {
            return Ok(Arc::clone(nccl));
        }
        self.threads.wait()?;
        let nccl = Arc::new(Nccl::new(device.gpu(), &self.id, self.rank, self.ranks)?);
        lock(&self.joined).push(Arc::clone(&nccl));
        // Who failed meanwhile has not seen it in the list.
        if let Some(rank) = self.failed() {
            nccl.abort();
            return Err(Error::Rank { rank });
        }
        Ok(Arc::clone(own.insert(nccl)))
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Rank for NcclRank {
    fn rank(&self) -> usize {
        self.rank
    }

    fn ranks(&self) -> usize {
        self.ranks
    }

    fn fail(&self) {
        self.threads.fail();
        // Kernels of the other GPUs wait for this one; who waits for them asks `failed` afterwards.
        let joined = std::mem::take(&mut *lock(&self.joined));
        joined.iter().for_each(|nccl| nccl.abort());
    }

    fn failed(&self) -> Option<usize> {
        let own = self.threads.failed()?;
        Some(if self.threads.ranks() == self.ranks { own } else { self.rank })
    }
}

impl Communicator<Cuda> for NcclRank {
    fn all_reduce(&self, device: &Cuda, x: &mut Tensor) -> Result<()> {
        let nccl = self.connected(device)?;
        Ok(nccl.all_reduce(x)?)
    }

    fn only_launches(&self) -> bool {
        true
    }
}

impl Drop for NcclRank {
    /// The list that all ranks share must not keep this one's communicator alive.
    fn drop(&mut self) {
        if let Some(own) = lock(&self.own).take() {
            lock(&self.joined).retain(|nccl| !Arc::ptr_eq(nccl, &own));
        }
    }
}
