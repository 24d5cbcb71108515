//! Buffers that are kept from call to call.

use std::sync::Arc;

use cudarc::driver::{
    CudaContext, CudaEvent, CudaSlice, CudaStream, DevicePtr, DeviceRepr, PinnedHostSlice, result,
    sys,
};

use crate::attention::schedule::{Launch, Schedule};
use crate::kernels::tables::DevicePointer;
use crate::{Device, Error, RawStream, Result};

/// Address of a slice. Ordering between streams is up to the caller, as nothing is tracked.
pub(crate) fn address<T>(slice: &CudaSlice<T>) -> DevicePointer {
    slice.device_ptr(slice.stream()).0
}

/// A buffer that grows and forgets its contents when it does. Returns whether it did.
///
/// # Safety
/// `stream`, on which the buffer was and will be used, is a stream of the device.
pub(crate) unsafe fn grow<T: DeviceRepr>(
    device: &Device,
    stream: RawStream,
    what: &'static str,
    buffer: &mut Option<CudaSlice<T>>,
    len: usize,
) -> Result<bool> {
    if buffer.as_ref().is_some_and(|buffer| buffer.len() >= len) {
        return Ok(false);
    }
    // Memory is taken and given back on the device's own stream.
    let foreign = stream != device.stream();
    if foreign && buffer.is_some() {
        device.bind()?;
        // SAFETY: as the caller promises.
        unsafe { result::stream::synchronize(stream.cast()) }
            .map_err(Error::driver("cuStreamSynchronize"))?;
    }
    let grown = device.alloc(what, len.saturating_add(len / 2))?;
    *buffer = Some(grown);
    if foreign {
        device.synchronize()?;
    }
    Ok(true)
}

/// Scratch memory of the attention kernels. One per stream; steps that run one after the other on the
/// same stream share it.
#[derive(Debug)]
pub struct Workspace {
    device: Device,
    partial: Option<CudaSlice<f32>>,
    /// Tickets, then splits finished.
    counters: Option<CudaSlice<i32>>,
    /// Copies of narrow heads, 16-bit elements.
    copies: Option<CudaSlice<u16>>,
}

/// Addresses of a workspace's parts.
pub(crate) struct Scratch {
    pub(crate) partial: DevicePointer,
    pub(crate) tickets: DevicePointer,
    pub(crate) finished: DevicePointer,
    pub(crate) copies: DevicePointer,
}

/// Counters before those of the splits.
const TICKETS: usize = 2;

impl Workspace {
    /// An empty one.
    pub fn new(device: &Device) -> Self {
        Self { device: device.clone(), partial: None, counters: None, copies: None }
    }

    /// Bytes of device memory held.
    pub fn bytes(&self) -> u64 {
        let partial = self.partial.as_ref().map_or(0, CudaSlice::num_bytes);
        let copies = self.copies.as_ref().map_or(0, CudaSlice::num_bytes);
        (partial + copies + self.counters.as_ref().map_or(0, CudaSlice::num_bytes)) as u64
    }

    /// Makes room for a schedule.
    ///
    /// # Safety
    /// As [`grow`].
    pub(crate) unsafe fn reserve(
        &mut self,
        schedule: &Schedule,
        head_dim: usize,
        stream: RawStream,
    ) -> Result<()> {
        let [partial, counters, copies] = needed(schedule, head_dim);
        let device = &self.device;
        // SAFETY: as the caller promises; the memory is the buffer's.
        unsafe {
            grow(device, stream, "partial attention results", &mut self.partial, partial)?;
            if copies > 0 {
                grow(device, stream, "copies of narrow heads", &mut self.copies, copies)?;
            }
            if grow(device, stream, "counters", &mut self.counters, counters)?
                && let Some(counters) = &self.counters
            {
                let bytes = counters.num_bytes();
                result::memset_d8_async(address(counters), 0, bytes, stream.cast())
                    .map_err(Error::driver("cuMemsetD8Async"))?;
            }
        }
        Ok(())
    }

    /// Addresses of its parts.
    ///
    /// # Errors
    /// [`Error::Argument`] if there is no room for the schedule: another step's workspace.
    pub(crate) fn addresses(&self, schedule: &Schedule, head_dim: usize) -> Result<Scratch> {
        let has = [
            self.partial.as_ref().map_or(0, CudaSlice::len),
            self.counters.as_ref().map_or(0, CudaSlice::len),
            self.copies.as_ref().map_or(0, CudaSlice::len),
        ];
        let needed = needed(schedule, head_dim);
        match (&self.partial, &self.counters) {
            (Some(p), Some(c)) if has.iter().zip(&needed).all(|(has, needed)| has >= needed) => {
                Ok(Scratch {
                    partial: address(p),
                    tickets: address(c),
                    finished: address(c) + (TICKETS * size_of::<i32>()) as u64,
                    copies: self.copies.as_ref().map_or(0, address),
                })
            }
            _ => {
                let expected = format!("at least {needed:?} elements");
                Err(Error::argument("Step::run", "workspace", expected, format_args!("{has:?}")))
            }
        }
    }
}

/// Elements of partial results, counters and copies.
fn needed(schedule: &Schedule, head_dim: usize) -> [usize; 3] {
    let rows = |launch: &Launch| (launch.items.len() + launch.partials) * launch.path.tile_rows();
    let rows = schedule.launches().map(rows).max().unwrap_or(0);
    let slots = schedule.groups.iter().map(|group| group.slots).max().unwrap_or(0);
    [rows * (head_dim + 2), TICKETS + schedule.cut.splits.len(), 2 * slots * head_dim]
}

/// Page-locked copies of tables on their way to the device: copies from ordinary memory would wait
/// for the stream.
#[derive(Debug)]
pub(crate) struct Staging {
    device: Device,
    slots: [Option<(PinnedHostSlice<u8>, CudaEvent)>; SLOTS],
    next: usize,
}

/// Uploads in flight before the host waits for the oldest one: calls that it may run ahead.
const SLOTS: usize = 8;

impl Staging {
    pub(crate) fn new(device: &Device) -> Self {
        Self { device: device.clone(), slots: Default::default(), next: 0 }
    }

    /// Copies `bytes` to `to` in the order of `stream`.
    ///
    /// # Safety
    /// `to` has room for them; `stream` is a stream of the device.
    pub(crate) unsafe fn upload(
        &mut self,
        bytes: &[u8],
        to: DevicePointer,
        stream: RawStream,
    ) -> Result<()> {
        // SAFETY: as the caller promises.
        unsafe { self.fill(bytes.len(), to, stream, |staged| staged.copy_from_slice(bytes)) }
    }

    /// [`upload`](Self::upload) of `len` bytes that `fill` writes.
    ///
    /// # Safety
    /// As [`upload`](Self::upload).
    pub(crate) unsafe fn fill(
        &mut self,
        len: usize,
        to: DevicePointer,
        stream: RawStream,
        fill: impl FnOnce(&mut [u8]),
    ) -> Result<()> {
        let slot = &mut self.slots[self.next];
        self.next = (self.next + 1) % SLOTS;
        if let Some((_, event)) = slot {
            // SAFETY: the event is the slot's.
            self.device
                .watched("cuEventQuery", || unsafe { sys::cuEventQuery(event.cu_event()) })?;
            event.synchronize().map_err(Error::driver("cuEventSynchronize"))?;
        }
        if slot.as_ref().is_none_or(|(buffer, _)| buffer.len() < len) {
            let context = self.device.context();
            let room = len.next_power_of_two().max(4096);
            // SAFETY: it is written right below.
            let mut buffer = unsafe { context.alloc_pinned_with_flags(room, 0) }
                .map_err(Error::driver("cuMemHostAlloc"))?;
            // A caller's closure gets to see it, and need not write all of it.
            buffer.as_mut_slice().map_err(Error::driver("cuEventSynchronize"))?.fill(0u8);
            let event = context.new_event(None).map_err(Error::driver("cuEventCreate"))?;
            *slot = Some((buffer, event));
        }
        let Some((buffer, event)) = slot else { return Ok(()) };
        let all = buffer.as_mut_slice().map_err(Error::driver("cuEventSynchronize"))?;
        let staged = &mut all[..len];
        fill(staged);
        // SAFETY: as the caller promises; the slot is not touched before its event has passed.
        unsafe {
            result::memcpy_htod_async(to, staged, stream.cast())
                .map_err(Error::driver("cuMemcpyHtoDAsync"))?;
            sys::cuEventRecord(event.cu_event(), stream.cast())
                .result()
                .map_err(Error::driver("cuEventRecord"))
        }
    }
}

impl Drop for Staging {
    fn drop(&mut self) {
        for (_, event) in self.slots.iter().flatten() {
            // A failure here is the stream's, and whoever waits for that learns of it.
            let _ = event.synchronize();
        }
    }
}

/// Copies of device memory in the host's, on a stream of their own: what is launched meanwhile does not wait for them,
/// nor does a thread that launches it.
#[derive(Debug)]
pub(crate) struct Downloads {
    stream: Arc<CudaStream>,
    /// Page-locked, as the driver copies to other memory by a buffer of its own, while everybody waits.
    slots: [(PinnedHostSlice<u8>, CudaEvent); 2],
}

/// Bytes of a page-locked buffer.
const DOWNLOAD_BYTES: usize = 4 << 20;

impl Downloads {
    pub(crate) fn new(context: &Arc<CudaContext>) -> Result<Self> {
        let slot = || {
            // SAFETY: what is read of it was copied there before.
            let buffer = unsafe { context.alloc_pinned_with_flags(DOWNLOAD_BYTES, 0) }
                .map_err(Error::driver("cuMemHostAlloc"))?;
            let event = context.new_event(None).map_err(Error::driver("cuEventCreate"))?;
            Ok::<_, Error>((buffer, event))
        };
        let stream = context.new_stream().map_err(Error::driver("cuStreamCreate"))?;
        Ok(Self { stream, slots: [slot()?, slot()?] })
    }

    /// Pieces of memory one after the other, as they are when `after` has come here.
    ///
    /// # Safety
    /// They are memory of the context, and nobody writes or frees them until this returns.
    pub(crate) unsafe fn read(
        &mut self,
        after: &CudaStream,
        pieces: &[(DevicePointer, usize)],
    ) -> Result<Vec<u8>> {
        // SAFETY: as the caller promises.
        let read = unsafe { self.copy(after, pieces) };
        if read.is_err() {
            // No copy may be on its way to a buffer that is used again.
            let _ = self.stream.synchronize();
        }
        read
    }

    /// # Safety
    /// As [`read`](Self::read).
    unsafe fn copy(
        &mut self,
        after: &CudaStream,
        pieces: &[(DevicePointer, usize)],
    ) -> Result<Vec<u8>> {
        self.stream.join(after).map_err(Error::driver("cuStreamWaitEvent"))?;
        let (mut bytes, len): (_, usize) = (Vec::new(), pieces.iter().map(|(_, len)| len).sum());
        let shortage =
            |_| Error::HostMemory { what: "a copy of the device's memory", bytes: len as u64 };
        bytes.try_reserve_exact(len).map_err(shortage)?;
        let (mut filled, mut slot) = ([0; 2], 0);
        for &(mut from, mut len) in pieces {
            while len > 0 {
                if filled[slot] == DOWNLOAD_BYTES {
                    slot = 1 - slot;
                    self.take(slot, &mut filled, &mut bytes)?;
                }
                let (buffer, event) = &mut self.slots[slot];
                let all = buffer.as_mut_slice().map_err(Error::driver("cuEventSynchronize"))?;
                let room = len.min(DOWNLOAD_BYTES - filled[slot]);
                let to = &mut all[filled[slot]..][..room];
                // SAFETY: as the caller promises; the buffer is not read before the event has passed.
                unsafe { result::memcpy_dtoh_async(to, from, self.stream.cu_stream()) }
                    .map_err(Error::driver("cuMemcpyDtoHAsync"))?;
                event.record(&self.stream).map_err(Error::driver("cuEventRecord"))?;
                filled[slot] += room;
                from += room as DevicePointer;
                len -= room;
            }
        }
        self.take(1 - slot, &mut filled, &mut bytes)?;
        self.take(slot, &mut filled, &mut bytes)?;
        Ok(bytes)
    }

    /// Waits for a buffer and empties it.
    fn take(&mut self, slot: usize, filled: &mut [usize; 2], bytes: &mut Vec<u8>) -> Result<()> {
        let (buffer, event) = &self.slots[slot];
        event.synchronize().map_err(Error::driver("cuEventSynchronize"))?;
        let all = buffer.as_slice().map_err(Error::driver("cuEventSynchronize"))?;
        bytes.extend_from_slice(&all[..std::mem::take(&mut filled[slot])]);
        Ok(())
    }
}
