use std::ops::Range;
use std::sync::Arc;

use cudarc::driver::{CudaSlice, result};
use moa_core::{CacheState, Dtype, LayerLayout};

use crate::kernels::compile::Variant;
use crate::kernels::tables::{DevicePointer, Geometry};
use crate::memory::address;
use crate::{Device, Error, Result};

/// Keys and values of one sequence in one layer, in one piece of device memory: keys
/// `[slots, head_dim]` as its [`LayerLayout`] says, then values.
#[derive(Debug)]
pub struct Cache {
    device: Device,
    geometry: Arc<Geometry>,
    variant: Variant,
    state: CacheState,
    /// 16-bit elements.
    data: CudaSlice<u16>,
}

impl AsRef<CacheState> for Cache {
    fn as_ref(&self) -> &CacheState {
        &self.state
    }
}

impl Cache {
    /// An empty one for sequences of this layout.
    pub(crate) fn open(device: &Device, layout: LayerLayout, variant: Variant) -> Result<Self> {
        Self::new(device, Arc::new(Geometry::new(layout)?), variant)
    }

    fn new(device: &Device, geometry: Arc<Geometry>, variant: Variant) -> Result<Self> {
        variant.check("open")?;
        let elements = geometry.layout.slots().checked_mul(2 * variant.head_dim);
        let data = device.alloc("cached keys and values", elements.unwrap_or(usize::MAX))?;
        let state = CacheState::new(Arc::clone(&geometry.layout), variant.head_dim);
        Ok(Self { device: device.clone(), geometry, variant, state, data })
    }

    /// Element type of keys and values.
    pub fn dtype(&self) -> Dtype {
        self.variant.dtype
    }

    /// Forgets all tokens and keeps the memory.
    pub fn reset(&mut self) {
        self.state.reset();
    }

    /// Bytes of device memory.
    pub fn bytes(&self) -> u64 {
        self.data.num_bytes() as u64
    }

    /// Address of the keys, `[slots, head_dim]`.
    pub fn keys(&self) -> DevicePointer {
        address(&self.data)
    }

    /// Address of the values, `[slots, head_dim]`.
    pub fn values(&self) -> DevicePointer {
        self.keys() + self.bytes() / 2
    }

    /// Records `tokens` tokens that a [`Step`](crate::Step) has appended, run or replayed.
    ///
    /// # Errors
    /// [`moa_core::Error::CapacityExceeded`].
    pub fn advance(&mut self, tokens: usize) -> Result<()> {
        Ok(self.state.append(tokens)?)
    }

    pub(crate) fn truncate(&mut self, len: usize) -> Result<()> {
        Ok(self.state.truncate(len)?)
    }

    pub(crate) fn geometry(&self) -> &Geometry {
        &self.geometry
    }

    pub(crate) fn variant(&self) -> Variant {
        self.variant
    }

    pub(crate) fn device(&self) -> &Device {
        &self.device
    }

    /// An independent copy, made on the device's stream.
    pub(crate) fn fork(&self) -> Result<Self> {
        let mut fork = Self::new(&self.device, Arc::clone(&self.geometry), self.variant)?;
        let slot_bytes = (self.variant.head_dim * self.variant.dtype.bytes()) as u64;
        let stream = self.device.cuda_stream();
        self.device.bind()?;
        for slots in self.written_slots() {
            let (first, bytes) = (slots.start as u64 * slot_bytes, slots.len() as u64 * slot_bytes);
            for (from, to) in [(self.keys(), fork.keys()), (self.values(), fork.values())] {
                // SAFETY: both buffers have the same layout, which contains these slots.
                unsafe {
                    result::memcpy_dtod_async(
                        to + first,
                        from + first,
                        bytes as usize,
                        stream.cu_stream(),
                    )
                }
                .map_err(Error::driver("cuMemcpyDtoDAsync"))?;
            }
        }
        fork.state = self.state.clone();
        Ok(fork)
    }

    /// Slots that were written since the cache was empty, neighbours joined.
    fn written_slots(&self) -> Vec<Range<usize>> {
        let written = self.state.extent().high_water;
        let mut runs: Vec<Range<usize>> = Vec::new();
        for head in self.geometry.layout.heads() {
            let first = head.offset().0;
            let slots = first..first + head.slots().min(written);
            match runs.last_mut() {
                Some(last) if last.end == slots.start => last.end = slots.end,
                _ if slots.is_empty() => {}
                _ => runs.push(slots),
            }
        }
        runs
    }
}
