use std::cell::RefCell;
use std::sync::{Arc, Mutex, PoisonError};

use cudarc::driver::CudaSlice;

use crate::kernels::tables::DevicePointer;
use crate::memory::address;
use crate::{Device, Error, Result};

/// Memory for the intermediate tensors of work that is captured: a graph that allocates for itself has
/// a node for each allocation and each release, hundreds of them in a decode step.
///
/// The work runs once by [`rehearse`](Self::rehearse), whose allocations are kept, and is then
/// captured by [`Device::capture`], where it finds them again. Clones are the same arena.
#[derive(Clone, Debug, Default)]
pub struct Arena(Arc<Blocks>);

/// Blocks that nobody uses.
type Blocks = Mutex<Vec<CudaSlice<u8>>>;

thread_local! {
    /// The arena of the work that runs on this thread, and whether it may grow.
    static CURRENT: RefCell<Option<(Arena, bool)>> = const { RefCell::new(None) };
}

impl Arena {
    /// An empty one.
    pub fn new() -> Self {
        Self::default()
    }

    /// Runs `work`, whose tensors then have their memory here.
    ///
    /// # Errors
    /// The errors of `work`.
    pub fn rehearse<T>(&self, work: impl FnOnce() -> T) -> T {
        self.enter(true, work)
    }

    /// Bytes of device memory that nobody uses at the moment: of work that has ended, all of it.
    pub fn bytes(&self) -> u64 {
        let blocks = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        blocks.iter().map(|block| block.num_bytes() as u64).sum()
    }

    pub(crate) fn enter<T>(&self, may_grow: bool, work: impl FnOnce() -> T) -> T {
        let _guard = Guard(CURRENT.replace(Some((self.clone(), may_grow))));
        work()
    }
}

/// Brings the arena before back, also when the work panics.
struct Guard(Option<(Arena, bool)>);

impl Drop for Guard {
    fn drop(&mut self) {
        CURRENT.set(self.0.take());
    }
}

/// Bytes of device memory, given back to where they came from.
#[derive(Debug)]
pub(crate) struct Memory {
    slice: Option<CudaSlice<u8>>,
    home: Option<Arena>,
}

impl Memory {
    pub(crate) fn new(device: &Device, what: &'static str, bytes: usize) -> Result<Self> {
        let Some((arena, may_grow)) = CURRENT.with_borrow(Clone::clone) else {
            return Ok(Self { slice: Some(device.alloc(what, bytes)?), home: None });
        };
        let bytes = bytes.max(1);
        let mut blocks = arena.0.lock().unwrap_or_else(PoisonError::into_inner);
        let fits = |slice: &CudaSlice<u8>| {
            slice.len() == bytes && slice.stream().context() == device.context()
        };
        let slice = match blocks.iter().position(fits) {
            Some(at) => blocks.swap_remove(at),
            None if may_grow => device.alloc(what, bytes)?,
            None => {
                let expected = "the work that was rehearsed";
                let got = format_args!("{bytes} bytes more for a {what}").to_string();
                return Err(Error::argument("capture", "work", expected, got));
            }
        };
        drop(blocks);
        Ok(Self { slice: Some(slice), home: Some(arena) })
    }

    pub(crate) fn address(&self) -> DevicePointer {
        self.slice.as_ref().map_or(0, address)
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        if let (Some(arena), Some(slice)) = (self.home.take(), self.slice.take()) {
            arena.0.lock().unwrap_or_else(PoisonError::into_inner).push(slice);
        }
    }
}
