use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

use moa_backend_cuda::{Nccl, NcclId, PeerBuffer, PeerSums, Tensor};

use super::Cuda;
use crate::device::rank::{Brought, Communicator, PATIENCE, Rank, Wait};
use crate::device::thread_rank::ThreadRank;
use crate::{Error, Result};

/// One of several GPUs that share a model and add up over NCCL, each worked with by a thread of its own. Where they write
/// into each other's memory, they add up small tensors by that ([`PeerSums`]): those of which the others get at most 1 MiB
/// together, or as many bytes as the environment variable `MOA_PEER_BYTES` says, or [`with_peer_bytes`](Self::with_peer_bytes).
///
/// A GPU that waits for another one's part of a sum would wait for ever if that rank is gone or hangs. So the host
/// watches its waits: it gives up once a rank has failed, or once a rank is behind it and has not moved for longer
/// than the group's patience. How long a GPU computes does not matter.
#[derive(Debug)]
pub struct NcclRank {
    id: NcclId,
    rank: usize,
    ranks: usize,
    /// Ranks of this process: they wait for each other before NCCL does, which could not be told that
    /// one of them has failed by then.
    threads: Arc<ThreadRank>,
    own: Mutex<Option<Joined>>,
    /// Of all ranks of this process.
    joined: Arc<Mutex<Vec<Joined>>>,
    progress: Arc<Progress>,
    /// The rank that this one gave up, and after how long.
    silent: Arc<Mutex<Option<(usize, f64)>>>,
    peer_bytes: usize,
}

/// A rank that has joined its group.
#[derive(Clone, Debug)]
struct Joined {
    nccl: Arc<Nccl>,
    /// How it adds up small tensors.
    peers: Option<Arc<PeerSums>>,
}

impl Joined {
    /// Sums under way and later ones end with whatever numbers.
    fn abort(&self) {
        if let Some(peers) = &self.peers {
            peers.abort();
        }
        self.nccl.abort();
    }
}

/// Bytes that a GPU sends of a small sum at most, where nothing else is said: up to there it is faster than NCCL and a norm.
const PEER_BYTES: usize = 1 << 20;

/// Those that the environment says, or [`PEER_BYTES`]; none if it says what is no number.
fn peer_bytes() -> usize {
    let Ok(said) = std::env::var("MOA_PEER_BYTES") else { return PEER_BYTES };
    said.parse().unwrap_or_else(|_| {
        tracing::warn!(
            "MOA_PEER_BYTES: expected a number of bytes, got {said:?}: NCCL adds up all"
        );
        0
    })
}

/// How long a rank that fails leaves it to the others to give up their sums.
const GRACE: Duration = Duration::from_secs(2);

/// How far each rank of a process is: steps and sums that its host has begun.
#[derive(Debug)]
struct Progress {
    begun: Vec<AtomicU64>,
    patience: Duration,
}

impl Progress {
    /// A rank that is behind `of`.
    fn behind(&self, of: usize) -> Option<(usize, u64)> {
        let own = self.begun[of].load(Ordering::Acquire);
        let begun = self.begun.iter().map(|begun| begun.load(Ordering::Acquire)).enumerate();
        begun.min_by_key(|(_, begun)| *begun).filter(|(_, begun)| *begun < own)
    }
}

/// What a rank that waits knows of the one that is behind it.
#[derive(Debug, Default)]
struct Behind(Option<((usize, u64), Instant)>);

impl Behind {
    /// The rank that has not moved for as long as it may, after a wait of `waited`.
    fn look(&mut self, progress: &Progress, own: usize, waited: Duration) -> Option<usize> {
        let now = Instant::now();
        let Some(behind) = progress.behind(own) else {
            self.0 = None;
            return None;
        };
        let since = match self.0 {
            Some((seen, since)) if seen == behind => since,
            _ => self.0.insert((behind, now)).1,
        };
        // What was seen in an earlier wait counts from the beginning of this one.
        let silent = (now - since).min(waited);
        (silent >= progress.patience).then_some(behind.0)
    }
}

impl NcclRank {
    /// The ranks of a group of so many GPUs, all of them in this process, which wait for each other for [`PATIENCE`].
    ///
    /// # Errors
    /// [`Error::Invalid`] if `ranks` is 0, [`Error::Backend`] if NCCL cannot be loaded or refuses.
    pub fn group(ranks: usize) -> Result<Vec<Self>> {
        Self::group_with(ranks, PATIENCE)
    }

    /// [`group`](Self::group) with another patience: a rank that is behind and does not move for so long is given up.
    ///
    /// # Errors
    /// As [`group`](Self::group).
    pub fn group_with(ranks: usize, patience: Duration) -> Result<Vec<Self>> {
        let threads = ThreadRank::group_with(ranks, patience)?;
        let id = NcclId::new()?;
        let joined = Arc::default();
        let begun = (0..ranks).map(|_| AtomicU64::new(0)).collect();
        let progress = Arc::new(Progress { begun, patience });
        let rank = |threads: ThreadRank| Self {
            id,
            rank: threads.rank(),
            ranks,
            threads: Arc::new(threads),
            own: Mutex::default(),
            joined: Arc::clone(&joined),
            progress: Arc::clone(&progress),
            silent: Arc::default(),
            peer_bytes: peer_bytes(),
        };
        Ok(threads.into_iter().map(rank).collect())
    }

    /// The only rank of this process, in a group of processes that have the same `id`. What fails in
    /// another process is noticed here only where NCCL does: whoever started them has to end them all.
    ///
    /// # Errors
    /// [`Error::Invalid`] if `rank` is not below `ranks`.
    pub fn of_process(id: NcclId, rank: usize, ranks: usize) -> Result<Self> {
        if rank >= ranks {
            return Err(crate::Error::invalid("rank", format!("below {ranks}"), rank));
        }
        let threads = Arc::new(ThreadRank::group(1)?.swap_remove(0));
        let (own, joined, silent) = (Mutex::default(), Arc::default(), Arc::default());
        let progress = Arc::new(Progress { begun: vec![AtomicU64::new(0)], patience: PATIENCE });
        let peer_bytes = peer_bytes();
        Ok(Self { id, rank, ranks, threads, own, joined, progress, silent, peer_bytes })
    }

    /// Adds up tensors without NCCL of which a GPU sends at most so many bytes to all others; 0 for none. The same on all
    /// ranks.
    #[must_use]
    pub fn with_peer_bytes(mut self, bytes: usize) -> Self {
        self.peer_bytes = bytes;
        self
    }

    /// Joins the group, once all ranks do: to be called before memory is measured, as NCCL takes some.
    /// The first sum calls it otherwise. The waits for the device are watched from then on.
    ///
    /// # Errors
    /// [`Error::Rank`] if another rank of this process has failed, [`Error::RankSilent`] if one does not come,
    /// [`Error::Backend`] with what NCCL or the driver says.
    pub fn connect(&self, device: &Cuda) -> Result<()> {
        self.connected(device).map(drop)
    }

    fn connected(&self, device: &Cuda) -> Result<Joined> {
        // No other thread works with this rank.
        if let Some(joined) = &*lock(&self.own) {
            return Ok(joined.clone());
        }
        self.threads.gather(Arc::new(()), Wait::Step)?;
        let nccl = Arc::new(Nccl::new(device.gpu(), &self.id, self.rank, self.ranks)?);
        let joined = Joined { peers: self.peers(device)?.map(Arc::new), nccl };
        lock(&self.joined).push(joined.clone());
        // Who failed meanwhile has not seen it in the list.
        if let Some(rank) = self.failed() {
            joined.abort();
            return Err(Error::Rank { rank });
        }
        self.watch(&joined);
        Ok(lock(&self.own).insert(joined).clone())
    }

    /// Opens the memory of the other GPUs; `None` unless each can write into that of all.
    fn peers(&self, device: &Cuda) -> Result<Option<PeerSums>> {
        if self.peer_bytes == 0 || self.ranks == 1 || self.threads.ranks() != self.ranks {
            return Ok(None);
        }
        let gpu = device.gpu();
        let own = Arc::new(PeerBuffer::new(gpu, self.ranks)?);
        let all = self.threads.gather(own, Wait::Step)?;
        let buffers = all.iter().map(|own| Arc::clone(own).downcast::<PeerBuffer>());
        let buffers: Vec<_> = buffers.filter_map(std::result::Result::ok).collect();
        // The host notices sooner, where it waits: this ends kernels that nobody waits for.
        let deadline = 2 * self.progress.patience + Duration::from_secs(5);
        let sums = PeerSums::new(gpu, device.dtype(), self.rank, &buffers, deadline);
        let sums = sums.unwrap_or_else(|error| {
            tracing::warn!(%error, "no sums over the memory of other GPUs, but over NCCL alone");
            None
        });
        let can = self.threads.gather(Arc::new(sums.is_some()), Wait::Step)?;
        let all_can = can.iter().all(|can| can.downcast_ref() == Some(&true));
        Ok(sums.filter(|_| all_can))
    }

    /// How small tensors are added up, if this one is.
    fn small<'a>(&self, joined: &'a Joined, x: &Tensor) -> Option<&'a PeerSums> {
        let bytes = x.shape().iter().product::<usize>().saturating_mul(size_of::<f32>());
        let sent = bytes.saturating_mul(self.ranks - 1);
        joined.peers.as_deref().filter(|peers| sent <= self.peer_bytes && peers.fits(x))
    }

    /// Has the waits for the device watched, which holds what is watched: no more than it needs.
    fn watch(&self, joined: &Joined) {
        let (threads, progress) = (Arc::downgrade(&self.threads), Arc::clone(&self.progress));
        let (silent, behind) = (Arc::clone(&self.silent), Mutex::new(Behind::default()));
        let own: Weak<Nccl> = Arc::downgrade(&joined.nccl);
        let peers = joined.peers.as_ref().map(Arc::downgrade);
        joined.nccl.device().set_watch(Some(Arc::new(move |waited| {
            let (Some(nccl), Some(threads)) = (own.upgrade(), threads.upgrade()) else {
                return true;
            };
            let late = lock(&behind).look(&progress, threads.rank(), waited);
            if let Some(rank) = late {
                lock(&silent).get_or_insert((rank, progress.patience.as_secs_f64()));
            }
            let goes_on = late.is_none() && threads.failed().is_none() && !nccl.has_failed();
            if !goes_on {
                threads.fail();
                // The sum that the device waits in ends by this.
                let peers = peers.as_ref().and_then(Weak::upgrade);
                Joined { nccl, peers }.abort();
            }
            goes_on
        })));
    }

    /// The rank that a kernel gave up.
    fn missing(&self) -> Option<Error> {
        let own = lock(&self.own);
        let peers = own.as_ref()?.peers.as_ref()?;
        let seconds = peers.deadline().as_secs_f64();
        peers.missing().map(|rank| Error::RankSilent { rank, seconds })
    }

    /// Begins a sum once all hosts of this process have come to it: one that has no memory for its part says so before the
    /// other GPUs wait for it.
    fn begin_sum(&self, device: &Cuda) -> Result<Joined> {
        let joined = self.connected(device)?;
        self.threads.gather(Arc::new(()), Wait::Step)?;
        self.counts();
        Ok(joined)
    }

    /// Counts what the host begins: steps and sums.
    fn counts(&self) {
        self.progress.begun[self.threads.rank()].fetch_add(1, Ordering::Release);
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
        if let Some(own) = &*lock(&self.own) {
            own.abort();
        }
        let joined = lock(&self.joined).clone();
        joined.iter().filter_map(|other| other.peers.as_ref()).for_each(|peers| peers.abort());
        // Kernels of the other GPUs wait for this one. Their own threads give them up where they watch a wait; for
        // those that wait elsewhere it is done here.
        let begin = Instant::now();
        while begin.elapsed() < GRACE && !joined.iter().all(|other| other.nccl.is_aborted()) {
            std::thread::sleep(Duration::from_millis(5));
        }
        joined.iter().for_each(|other| other.nccl.abort_from_outside());
    }

    fn failed(&self) -> Option<usize> {
        let own = self.threads.failed()?;
        Some(if self.threads.ranks() == self.ranks { own } else { self.rank })
    }

    fn reason(&self) -> Option<Error> {
        match *lock(&self.silent) {
            Some((rank, seconds)) => Some(Error::RankSilent { rank, seconds }),
            None => self.missing().or(self.failed().map(|rank| Error::Rank { rank })),
        }
    }

    fn meets(&self) -> bool {
        self.threads.ranks() == self.ranks
    }

    fn gather(&self, own: Brought, wait: Wait) -> Result<Arc<[Brought]>> {
        if !self.meets() {
            let got = format!("rank {} of {}", self.rank, self.ranks);
            return Err(Error::invalid("ranks", "of one process, to tell each other values", got));
        }
        self.threads.gather(own, wait)
    }
}

impl Communicator<Cuda> for NcclRank {
    fn all_reduce(&self, device: &Cuda, x: &mut Tensor) -> Result<()> {
        let joined = self.begin_sum(device)?;
        match self.small(&joined, x) {
            Some(peers) => peers.all_reduce(x)?,
            None => joined.nccl.all_reduce(x)?,
        }
        Ok(())
    }

    fn all_reduce_norm(
        &self,
        device: &Cuda,
        x: &mut Tensor,
        norm: &Tensor,
        eps: f32,
    ) -> Result<Option<Tensor>> {
        let joined = self.begin_sum(device)?;
        match self.small(&joined, x) {
            Some(peers) => Ok(Some(peers.all_reduce_norm(x, norm, eps)?)),
            None => Ok(joined.nccl.all_reduce(x).map(|()| None)?),
        }
    }

    fn begins(&self) {
        self.counts();
    }

    fn only_launches(&self) -> bool {
        true
    }
}

impl Drop for NcclRank {
    /// The list that all ranks share must not keep this one's communicator alive.
    fn drop(&mut self) {
        if let Some(own) = lock(&self.own).take() {
            own.nccl.device().set_watch(None);
            lock(&self.joined).retain(|other| !Arc::ptr_eq(&other.nccl, &own.nccl));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rank_is_given_up_once_it_is_behind_and_does_not_move() {
        const PATIENCE: Duration = Duration::from_millis(60);
        let begun = [5, 5, 4].map(AtomicU64::new).into();
        let progress = Progress { begun, patience: PATIENCE };
        let mut behind = Behind::default();
        // Who is last, or as far as all others, waits for its own device alone.
        assert_eq!(behind.look(&progress, 2, PATIENCE * 9), None);
        assert_eq!(behind.look(&progress, 0, PATIENCE * 9), None, "seen for the first time");
        std::thread::sleep(PATIENCE);
        // A wait that has just begun knows nothing yet.
        assert_eq!(behind.look(&progress, 0, PATIENCE / 2), None);
        assert_eq!(behind.look(&progress, 0, PATIENCE), Some(2));
        progress.begun[0].store(7, Ordering::Release);
        progress.begun[2].store(6, Ordering::Release);
        assert_eq!(behind.look(&progress, 0, PATIENCE * 9), None, "another one is last now");
        std::thread::sleep(PATIENCE);
        assert_eq!(behind.look(&progress, 0, PATIENCE * 9), Some(1));
    }
}
