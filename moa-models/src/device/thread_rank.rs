use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use crate::device::Device;
use crate::device::rank::{Communicator, Rank};
use crate::{Error, Result};

/// A rank that is a thread of one process and adds up over its memory: for tests, and for devices that have
/// no faster way. Works on every device, at the price of a copy to the host and back.
///
/// It leaves its group when it is dropped; who waits for it then fails.
#[derive(Debug)]
pub struct ThreadRank {
    group: Arc<ThreadGroup>,
    rank: usize,
}

#[derive(Debug)]
struct ThreadGroup {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    /// What each rank has brought to the sum under way.
    parts: Vec<Option<Vec<f32>>>,
    /// The last sum.
    sum: Arc<Vec<f32>>,
    /// Sums made so far.
    sums: u64,
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
    /// All ranks of a group.
    ///
    /// # Errors
    /// [`Error::Invalid`] if `ranks` is 0.
    pub fn group(ranks: usize) -> Result<Vec<Self>> {
        if ranks == 0 {
            return Err(Error::invalid("ranks", "at least 1", ranks));
        }
        let state = State { parts: vec![None; ranks], ..State::default() };
        let group = Arc::new(ThreadGroup { state: Mutex::new(state), changed: Condvar::new() });
        Ok((0..ranks).map(|rank| Self { group: Arc::clone(&group), rank }).collect())
    }

    /// Waits until all ranks do.
    #[cfg(feature = "cuda")]
    pub(crate) fn wait(&self) -> Result<()> {
        self.sum(Vec::new()).map(drop)
    }

    /// The sum of what all ranks bring, in the order of ranks.
    fn sum(&self, values: Vec<f32>) -> Result<Arc<Vec<f32>>> {
        let mut state = self.group.state();
        if let Some(rank) = state.failed.or(state.left) {
            return Err(Error::Rank { rank });
        }
        let other = state.parts.iter().flatten().find(|part| part.len() != values.len());
        if let Some(other) = other {
            let (expected, got) =
                (format!("{} values, as on another rank", other.len()), values.len());
            drop(state);
            self.fail();
            return Err(Error::invalid("sum over ranks", expected, got));
        }
        state.parts[self.rank] = Some(values);
        if state.parts.iter().all(Option::is_some) {
            let mut parts = state.parts.iter_mut().filter_map(Option::take);
            let mut sum = parts.next().unwrap_or_default();
            for part in parts {
                sum.iter_mut().zip(part).for_each(|(sum, x)| *sum += x);
            }
            // Nobody brings a next part before it has this sum: the one before is not needed.
            state.sum = Arc::new(sum);
            state.sums += 1;
            self.group.changed.notify_all();
            return Ok(Arc::clone(&state.sum));
        }
        let before = state.sums;
        loop {
            // A sum that was made is good, whoever has left since.
            if state.sums > before {
                return Ok(Arc::clone(&state.sum));
            }
            if let Some(rank) = state.failed.or(state.left) {
                return Err(Error::Rank { rank });
            }
            state = self.group.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
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
        let sum = self.sum(device.values(x.clone())?)?;
        *x = device.tensor(sum.to_vec(), &shape)?;
        Ok(())
    }
}
