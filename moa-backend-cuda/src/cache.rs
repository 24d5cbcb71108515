use std::ops::Range;
use std::sync::Arc;

use cudarc::driver::{CudaSlice, result};
use moa_core::{Extent, LayerLayout};

use crate::kernels::compile::Variant;
use crate::kernels::tables::{DevicePointer, Geometry};
use crate::memory::address;
use crate::{Device, Dtype, Error, Result};

/// Keys and values of one sequence in one layer, in one piece of device memory: keys
/// `[slots, head_dim]` as its [`LayerLayout`] says, then values.
#[derive(Debug)]
pub struct Cache {
    device: Device,
    geometry: Arc<Geometry>,
    variant: Variant,
    extent: Extent,
    /// Longest the sequence has been since it was opened: what a fork must copy.
    written: usize,
    /// 16-bit elements.
    data: CudaSlice<u16>,
}

impl Cache {
    /// An empty one for sequences of this layout.
    pub(crate) fn open(device: &Device, layout: &LayerLayout, variant: Variant) -> Result<Self> {
        let geometry = Geometry::new(layout.clone()).ok_or_else(|| {
            Error::argument("open", "capacity", "fewer than 2^30 tokens", layout.capacity())
        })?;
        Self::new(device, Arc::new(geometry), variant)
    }

    pub(crate) fn new(device: &Device, geometry: Arc<Geometry>, variant: Variant) -> Result<Self> {
        variant.check("open")?;
        let elements = geometry.layout.slots().checked_mul(2 * variant.head_dim);
        let data = device.alloc("cached keys and values", elements.unwrap_or(usize::MAX))?;
        let device = device.clone();
        Ok(Self { device, geometry, variant, extent: Extent::default(), written: 0, data })
    }

    /// Where each head keeps which position.
    pub fn layout(&self) -> &LayerLayout {
        &self.geometry.layout
    }

    /// Elements per key.
    pub fn head_dim(&self) -> usize {
        self.variant.head_dim
    }

    /// Element type of keys and values.
    pub fn dtype(&self) -> Dtype {
        self.variant.dtype
    }

    /// Tokens held.
    pub fn len(&self) -> usize {
        self.extent.len()
    }

    /// Whether no token is held.
    pub fn is_empty(&self) -> bool {
        self.extent.is_empty()
    }

    /// Forgets all tokens and keeps the memory.
    pub fn reset(&mut self) {
        self.extent.reset();
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
        self.extent.check_append(&self.geometry.layout, tokens)?;
        self.extent.advance(tokens);
        self.written = self.written.max(self.extent.len());
        Ok(())
    }

    pub(crate) fn truncate(&mut self, len: usize) -> Result<()> {
        Ok(self.extent.truncate(&self.geometry.layout, len)?)
    }

    pub(crate) fn extent(&self) -> &Extent {
        &self.extent
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
        fork.extent = self.extent;
        fork.written = self.written;
        Ok(fork)
    }

    /// Slots that were ever written, neighbours joined.
    fn written_slots(&self) -> Vec<Range<usize>> {
        let mut runs: Vec<Range<usize>> = Vec::new();
        for head in self.geometry.layout.heads() {
            let first = head.offset().0;
            let slots = first..first + head.slots().min(self.written);
            match runs.last_mut() {
                Some(last) if last.end == slots.start => last.end = slots.end,
                _ if slots.is_empty() => {}
                _ => runs.push(slots),
            }
        }
        runs
    }
}
