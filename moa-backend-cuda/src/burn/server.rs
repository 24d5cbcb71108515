//! Work on a stream of CubeCL's server, which runs burn's kernels.

use std::fmt;

use burn_backend::{Device as _, DeviceHandle, StreamId};
use cubecl::cuda::{CudaDevice, CudaRuntime};
use cubecl::device_handle::CallError;
use cubecl::server::{BufferBinding, Handle};
use cubecl_server::runtime::Runtime;
use cubecl_server::stream::{FailureStore, WriteScoped};
use cudarc::driver::{CudaEvent, sys};

use crate::kernels::tables::DevicePointer;
use crate::{Device, Error, RawStream, Result};

type CudaServer = <CudaRuntime as Runtime>::Server;

/// The server of one device. It lives on a thread of its own, to which work is sent; while that runs,
/// nothing else reaches the server's streams and memory.
pub(super) struct Server {
    handle: DeviceHandle<CudaServer>,
    device: Device,
    /// Recorded on this crate's own stream, then on burn's, in every call anew.
    events: [CudaEvent; 2],
}

impl Server {
    /// The server that burn uses too, or will.
    pub(super) fn new(device: &Device, cuda: &CudaDevice) -> Result<Self> {
        let event = || device.context().new_event(None).map_err(Error::driver("cuEventCreate"));
        let events = [event()?, event()?];
        Ok(Self { handle: DeviceHandle::new(cuda.to_id()), device: device.clone(), events })
    }

    /// Whether this memory is the server's.
    pub(super) fn owns(&self, memory: &Handle) -> bool {
        memory.service == self.handle.service_id()
    }

    /// Runs `launch` with a stream of the server and the addresses of `buffers`, on the server's
    /// thread; returns when it has.
    ///
    /// On the stream, what `launch` puts there comes after what burn did to the buffers on any stream
    /// and before what it does to them later, after everything on this crate's own stream so far, and
    /// before what comes onto that one: caches are allocated, forked and freed there, and calls on
    /// different streams of burn follow each other through it.
    ///
    /// # Errors
    /// That of `launch`; [`Error::Burn`] if a buffer was never written, because of an error in what
    /// should have, or not allocated; [`moa_core::Error::Unsupported`] while the stream records a graph.
    pub(super) fn run(
        &self,
        op: &'static str,
        stream: StreamId,
        buffers: Vec<BufferBinding>,
        launch: impl FnOnce(RawStream, &[DevicePointer]) -> Result<()> + Send,
    ) -> Result<()> {
        let (device, [own, burns]) = (&self.device, &self.events);
        let work = move |server: &mut CudaServer| {
            device.bind()?;
            let streams = server.write_streams();
            streams.ensure_written(buffers.iter()).map_err(|error| refused(op, error))?;
            let records = streams.try_stream_mut(&stream).map(|s| s.capturing.is_recording());
            if records == Some(true) {
                let operation = "running inside a graph capture of burn";
                return Err(moa_core::Error::Unsupported { backend: "cuda", operation }.into());
            }
            // Makes the stream wait for the others that made the buffers; when dropped, at the end, it
            // lends those buffers to the stream until it has passed this call.
            let mut streams =
                streams.resolve(stream, buffers.iter()).map_err(|error| refused(op, error))?;
            let mut addresses = Vec::with_capacity(buffers.len());
            for buffer in buffers {
                let memory = &mut streams.get(&buffer.stream).memory_management_gpu;
                let memory =
                    memory.get_resource(buffer.memory, buffer.offset_start, buffer.offset_end);
                addresses.push(memory.map_err(|error| refused(op, error))?.ptr);
            }
            let raw: RawStream = streams.current().sys.cast();
            wait(own, device.stream(), raw)?;
            let launched = launch(raw, &addresses);
            // Also after an error: some of it may be on its way.
            wait(burns, raw, device.stream()).and(launched)
        };
        let panicked = |error: CallError| refused(op, error.message().unwrap_or("it stopped"));
        self.handle.submit_blocking(work).map_err(panicked)?
    }
}

impl fmt::Debug for Server {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Server").field("device", &self.device).finish_non_exhaustive()
    }
}

/// Makes `second` wait for what is on `first` now.
fn wait(event: &CudaEvent, first: RawStream, second: RawStream) -> Result<()> {
    // SAFETY: both are streams of the event's context: this crate's own, and one of the server, whose
    // context is the device's primary one too. The wait refers to this recording of the event, also
    // when it is recorded again.
    unsafe {
        sys::cuEventRecord(event.cu_event(), first.cast())
            .result()
            .map_err(Error::driver("cuEventRecord"))?;
        sys::cuStreamWaitEvent(second.cast(), event.cu_event(), 0)
            .result()
            .map_err(Error::driver("cuStreamWaitEvent"))
    }
}

fn refused(op: &'static str, message: impl fmt::Display) -> Error {
    Error::Burn { op, message: message.to_string() }
}
