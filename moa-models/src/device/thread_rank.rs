use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::device::Device;
use crate::device::rank::{Brought, Communicator, LOAD_PATIENCE, PATIENCE, Rank, Shortage, Wait};
use crate::{Error, Result, memory};

/// A rank that is a thread of one process and adds up over its memory: for tests, and for devices that have
/// no faster way. Works on every device, at the price of a copy to the host and back.
///
/// It leaves its group when it is dropped; who waits for it then fails, and so does who waits for longer than the
/// group's patience.
#[derive(Debug)]
pub struct ThreadRank {
    group: Arc<ThreadGroup>,
    rank: usize,
}

#[derive(Debug)]
struct ThreadGroup {
    state: Mutex<State>,
    changed: Condvar,
    patience: Duration,
}

#[derive(Debug, Default)]
struct State {
    /// What each rank has brought to the meeting under way.
    parts: Vec<Option<Brought>>,
    /// What all have brought to the last one. Nobody brings a next part before it has this.
    met: Option<Arc<[Brought]>>,
    /// Meetings so far.
    meetings: u64,
    failed: Option<usize>,
    left: Option<usize>,
}

impl ThreadGroup {
    fn state(&self) -> MutexGuard<'_, State> {
        // Each change is complete before anything can panic.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl ThreadRank {
    /// All ranks of a group, which wait for each other for [`PATIENCE`].
    ///
    /// # Errors
    /// [`Error::Invalid`] if `ranks` is 0.
    pub fn group(ranks: usize) -> Result<Vec<Self>> {
        Self::group_with(ranks, PATIENCE)
    }

    /// All ranks of a group; who waits for another rank for longer than `patience` fails, and with it the group.
    ///
    /// # Errors
    /// [`Error::Invalid`] if `ranks` is 0.
    pub fn group_with(ranks: usize, patience: Duration) -> Result<Vec<Self>> {
        if ranks == 0 {
            return Err(Error::invalid("ranks", "at least 1", ranks));
        }
        let state = State { parts: vec![None; ranks], ..State::default() };
        let state = Mutex::new(state);
        let group = Arc::new(ThreadGroup { state, changed: Condvar::new(), patience });
        Ok((0..ranks).map(|rank| Self { group: Arc::clone(&group), rank }).collect())
    }

    /// The sum of what all ranks bring, in the order of ranks.
    fn sum(&self, values: Vec<f32>) -> Result<Vec<f32>> {
        let len = values.len();
        let all = self.gather(Arc::new(values), Wait::Step)?;
        let mut sum = memory::filled(len, 0.0, "sum over ranks")?;
        for part in &*all {
            let part = part.downcast_ref::<Vec<f32>>();
            let Some(part) = part.filter(|part| part.len() == len) else {
                self.fail();
                let got =
                    part.map_or("something else".to_string(), |p| format!("{} values", p.len()));
                return Err(Error::invalid("sum over ranks", format!("{len} values of each"), got));
            };
            sum.iter_mut().zip(part).for_each(|(sum, x)| *sum += x);
        }
        Ok(sum)
    }

    /// What all have brought, unless one came without memory.
    fn whole(met: &Arc<[Brought]>) -> Result<Arc<[Brought]>> {
        let shortages = met.iter().map(|one| one.downcast_ref::<Shortage>()).enumerate();
        match shortages.filter_map(|(rank, shortage)| Some((rank, shortage?))).next() {
            Some((rank, Shortage(reason))) => {
                Err(Error::RankOutOfMemory { rank, reason: reason.clone() })
            }
            None => Ok(Arc::clone(met)),
        }
    }
}

impl Rank for ThreadRank {
    fn rank(&self) -> usize {
        self.rank
    }

    fn ranks(&self) -> usize {
        self.group.state().parts.len()
    }

    fn fail(&self) {
        self.group.state().failed.get_or_insert(self.rank);
        self.group.changed.notify_all();
    }

    fn failed(&self) -> Option<usize> {
        self.group.state().failed
    }

    fn gather(&self, own: Brought, wait: Wait) -> Result<Arc<[Brought]>> {
        let mut state = self.group.state();
        if let Some(rank) = state.failed.or(state.left) {
            return Err(Error::Rank { rank });
        }
        state.parts[self.rank] = Some(own);
        // Others begin to count when rank 0 is there.
        self.group.changed.notify_all();
        if state.parts.iter().all(Option::is_some) {
            let met: Arc<[Brought]> = state.parts.iter_mut().filter_map(Option::take).collect();
            state.met = Some(Arc::clone(&met));
            state.meetings += 1;
            return Self::whole(&met);
        }
        let patience = match wait {
            Wait::Load => LOAD_PATIENCE,
            Wait::Step | Wait::First => self.group.patience,
        };
        let before = state.meetings;
        let mut since = Instant::now();
        loop {
            // A meeting that took place is good, whoever has left since.
            if state.meetings > before
                && let Some(met) = &state.met
            {
                return Self::whole(met);
            }
            if let Some(rank) = state.failed.or(state.left) {
                return Err(Error::Rank { rank });
            }
            let changed = &self.group.changed;
            if wait == Wait::First && state.parts[0].is_none() {
                state = changed.wait(state).unwrap_or_else(PoisonError::into_inner);
                since = Instant::now();
                continue;
            }
            let left = patience.saturating_sub(since.elapsed());
            if left.is_zero() {
                let rank = state.parts.iter().position(Option::is_none).unwrap_or(self.rank);
                state.failed = Some(self.rank);
                changed.notify_all();
                return Err(Error::RankSilent { rank, seconds: patience.as_secs_f64() });
            }
            (state, _) = changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

impl Drop for ThreadRank {
    fn drop(&mut self) {
        self.group.state().left.get_or_insert(self.rank);
        self.group.changed.notify_all();
    }
}

impl<D: Device> Communicator<D> for ThreadRank {
    fn all_reduce(&self, device: &D, x: &mut D::Tensor) -> Result<()> {
        let shape = device.shape(x);
        // It goes, so that a tensor in host memory is not copied.
        let part = std::mem::replace(x, device.tensor(Vec::new(), &[0])?);
        *x = device.tensor(self.sum(device.values(part)?)?, &shape)?;
        Ok(())
    }
}
