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
        let stream = self.device.cuda_stream();
        self.device.bind()?;
        for Range { start, end } in self.written_bytes(&self.state) {
            let (to, from, bytes) = (fork.keys() + start, self.keys() + start, end - start);
            // SAFETY: both buffers have the same layout, which contains these bytes.
            unsafe { result::memcpy_dtod_async(to, from, bytes as usize, stream.cu_stream()) }
                .map_err(Error::driver("cuMemcpyDtoDAsync"))?;
        }
        fork.state = self.state.clone();
        Ok(fork)
    }

    /// The bytes of all slots that were written since the cache was empty, keys before values, once the device has
    /// computed them. [`CudaBackend::restore`](crate::CudaBackend::restore) makes the cache of them.
    ///
    /// # Errors
    /// [`Error::Driver`], also for what went wrong in an earlier kernel.
    pub fn to_bytes(&self) -> Result<Vec<u8>> {
        let ranges = self.written_bytes(&self.state);
        let mut bytes = vec![0u8; total(&ranges) as usize];
        let (stream, mut rest) = (self.device.cuda_stream(), &mut bytes[..]);
        self.device.bind()?;
        let mut copied = Ok(());
        for Range { start, end } in ranges {
            let (own, others) = rest.split_at_mut((end - start) as usize);
            // SAFETY: the buffer contains these bytes, and the host's outlive the copy, which is waited for below.
            copied = copied.and(
                unsafe { result::memcpy_dtoh_async(own, self.keys() + start, stream.cu_stream()) }
                    .map_err(Error::driver("cuMemcpyDtoHAsync")),
            );
            rest = others;
        }
        self.device.synchronize()?;
        copied.map(|()| bytes)
    }

    /// Takes the state and the [bytes](Self::to_bytes) of another cache of this layout.
    pub(crate) fn load(&mut self, state: CacheState, bytes: &[u8]) -> Result<()> {
        let ranges = self.written_bytes(&state);
        let expected = total(&ranges);
        if bytes.len() as u64 != expected {
            let expected = format!("{expected} bytes");
            return Err(Error::argument("restore", "bytes", expected, bytes.len()));
        }
        let (stream, mut rest) = (self.device.cuda_stream(), bytes);
        self.device.bind()?;
        let mut copied = Ok(());
        for Range { start, end } in ranges {
            let (own, others) = rest.split_at((end - start) as usize);
            // SAFETY: as in `to_bytes`.
            copied = copied.and(
                unsafe { result::memcpy_htod_async(self.keys() + start, own, stream.cu_stream()) }
                    .map_err(Error::driver("cuMemcpyHtoDAsync")),
            );
            rest = others;
        }
        self.device.synchronize()?;
        copied?;
        self.state = state;
        Ok(())
    }

    /// Bytes of the buffer that hold what was written since a cache of this layout in that state was empty: of keys,
    /// then of values, neighbours joined.
    fn written_bytes(&self, state: &CacheState) -> Vec<Range<u64>> {
        let written = state.extent().high_water;
        let slot = (self.variant.head_dim * self.variant.dtype.bytes()) as u64;
        let mut ranges: Vec<Range<u64>> = Vec::new();
        for base in [0, self.bytes() / 2] {
            for head in self.geometry.layout.heads() {
                let first = head.offset().0;
                let [start, end] = [first, first + head.slots().min(written)]
                    .map(|slots| base + slots as u64 * slot);
                match ranges.last_mut() {
                    Some(last) if last.end == start => last.end = end,
                    _ if start == end => {}
                    _ => ranges.push(start..end),
                }
            }
        }
        ranges
    }
}

fn total(ranges: &[Range<u64>]) -> u64 {
    ranges.iter().map(|range| range.end - range.start).sum()
}
