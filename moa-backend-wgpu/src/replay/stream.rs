use std::sync::{Mutex, PoisonError};

use cubecl::config::{CubeClRuntimeConfig, RuntimeConfig};
use cubecl_environment::stream::StreamId;

use crate::device::the_stream;

/// Most recorded steps at once: each has a stream of CubeCL's, which has a thread and memory.
const MOST: u64 = 4;

static TAKEN: Mutex<Vec<StreamId>> = Mutex::new(Vec::new());

/// A stream of CubeCL's that nothing else in the process works on: what is queued on a stream while it is recorded does not
/// happen, and is recorded with the rest.
#[derive(Debug)]
pub(crate) struct OwnStream(pub(crate) StreamId);

impl OwnStream {
    /// `None` where all are taken. CubeCL has a few streams, on which ids fall by their remainder; those of threads are counted
    /// from 0, so these are the last ones.
    pub(crate) fn take() -> Option<Self> {
        let most = u64::from(CubeClRuntimeConfig::get().streaming.max_streams);
        if most < 4 * MOST {
            return None;
        }
        let shared = the_stream().value % most;
        let mut taken = TAKEN.lock().unwrap_or_else(PoisonError::into_inner);
        let ids = (1..=MOST).map(|place| most - place).filter(|id| *id != shared);
        let id = ids.map(|value| StreamId { value }).find(|id| !taken.contains(id))?;
        taken.push(id);
        Some(Self(id))
    }
}

impl Drop for OwnStream {
    fn drop(&mut self) {
        TAKEN.lock().unwrap_or_else(PoisonError::into_inner).retain(|id| *id != self.0);
    }
}
