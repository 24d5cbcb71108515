use std::ops::Range;
use std::sync::Arc;

use cudarc::driver::{CudaSlice, result};
use moa_core::{CacheState, CacheType, Dtype, LayerLayout};

use crate::kernels::compile::Variant;
use crate::kernels::tables::{DevicePointer, Geometry};
use crate::memory::address;
use crate::{Device, Error, Result};

/// Keys and values of one sequence in one layer, in one piece of device memory: keys `[slots, head_dim]` of all
/// heads of 16-bit rows, as the [`LayerLayout`] says, and their values; then, head after head, the codes of all keys of
/// narrow heads, `[slots, bytes]`, the codes of all values, and bf16 pairs `[slots, 2]` of the scales of a slot's key and
/// value.
#[derive(Debug)]
pub struct Cache {
    device: Device,
    geometry: Arc<Geometry>,
    variant: Variant,
    state: CacheState,
    data: CudaSlice<u8>,
}

impl AsRef<CacheState> for Cache {
    fn as_ref(&self) -> &CacheState {
        &self.state
    }
}

impl Cache {
    /// An empty one for sequences of this layout, whose heads have `own` where it does not say another type.
    pub(crate) fn open(
        device: &Device,
        layout: LayerLayout,
        variant: Variant,
        own: CacheType,
    ) -> Result<Self> {
        variant.check("open")?;
        Self::new(device, Arc::new(Geometry::new(layout, own, variant.head_dim)?), variant)
    }

    fn new(device: &Device, geometry: Arc<Geometry>, variant: Variant) -> Result<Self> {
        let bytes = usize::try_from(geometry.bytes).unwrap_or(usize::MAX);
        let data = device.alloc("cached keys and values", bytes)?;
        let state = CacheState::new(Arc::clone(&geometry.layout), variant.head_dim);
        Ok(Self { device: device.clone(), geometry, variant, state, data })
    }

    /// Element type of tensors, and of keys and values of heads that are not narrow.
    pub fn dtype(&self) -> Dtype {
        self.variant.dtype
    }

    /// Forgets all tokens and keeps the memory.
    pub fn reset(&mut self) {
        self.state.reset();
    }

    /// Bytes of device memory.
    pub fn bytes(&self) -> u64 {
        self.geometry.bytes
    }

    /// Address of the memory, and so of the keys of heads of 16-bit rows, `[slots, head_dim]`.
    pub fn keys(&self) -> DevicePointer {
        address(&self.data)
    }

    /// Address of the values of heads of 16-bit rows, `[slots, head_dim]`.
    pub fn values(&self) -> DevicePointer {
        self.keys() + self.geometry.plain_key_bytes
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
        for bytes in joined(self.geometry.written(self.state.extent().high_water)) {
            let (to, from) = (fork.keys() + bytes.start, self.keys() + bytes.start);
            let len = (bytes.end - bytes.start) as usize;
            // SAFETY: both pieces of memory have the same layout, which contains these bytes.
            unsafe { result::memcpy_dtod_async(to, from, len, stream.cu_stream()) }
                .map_err(Error::driver("cuMemcpyDtoDAsync"))?;
        }
        fork.state = self.state.clone();
        Ok(fork)
    }

    /// The bytes of all slots that were written since the cache was empty, as they lie in its memory, once the device has
    /// computed them. [`CudaBackend::restore`](crate::CudaBackend::restore) makes the cache of them.
    ///
    /// # Errors
    /// [`Error::Driver`], also for what went wrong in an earlier kernel; [`Error::HostMemory`].
    pub fn to_bytes(&self) -> Result<Vec<u8>> {
        let ranges = self.geometry.written(self.state.extent().high_water);
        let piece = |Range { start, end }| (self.keys() + start, (end - start) as usize);
        let pieces: Vec<_> = ranges.into_iter().map(piece).collect();
        // SAFETY: the memory contains these bytes, and whoever changes this cache has to wait for this borrow.
        unsafe { self.device.download(&pieces) }
    }

    /// Takes the state and the [bytes](Self::to_bytes) of another cache of this layout.
    pub(crate) fn load(&mut self, state: CacheState, bytes: &[u8]) -> Result<()> {
        let ranges = self.geometry.written(state.extent().high_water);
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
}

/// Bytes between two pieces that are copied with them: the device copies as many in the time that the host takes to ask
/// for one more copy.
const GAP: u64 = 4 << 20;

/// Neighbours among pieces of memory as one piece.
fn joined(pieces: Vec<Range<u64>>) -> Vec<Range<u64>> {
    let mut joined: Vec<Range<u64>> = Vec::new();
    for piece in pieces {
        match joined.last_mut() {
            Some(last) if (last.end..=last.end + GAP).contains(&piece.start) => {
                last.end = piece.end;
            }
            _ => joined.push(piece),
        }
    }
    joined
}

fn total(ranges: &[Range<u64>]) -> u64 {
    ranges.iter().map(|range| range.end - range.start).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn neighbours_are_copied_at_once_and_all_pieces_are() {
        assert!(joined(Vec::new()).is_empty());
        let one: Range<u64> = 0..12;
        assert_eq!(joined(vec![0..5, 9..10, 10..12]), std::slice::from_ref(&one));
        let near: Range<u64> = 0..6 + GAP;
        assert_eq!(joined(vec![0..5, 5 + GAP..6 + GAP]), std::slice::from_ref(&near));
        assert_eq!(
            joined(vec![0..5, 6 + GAP..7 + GAP, 8 + GAP..9 + GAP]),
            [0..5, 6 + GAP..9 + GAP]
        );
        // Never backwards.
        assert_eq!(joined(vec![50..60, 0..5]), [50..60, 0..5]);
    }
}
