use std::cell::Cell;

use cudarc::driver::{CudaGraph, result, sys};

use crate::{Arena, Device, Error, RawStream, Result};

/// Work on a device's own stream, captured once and launched as one.
pub struct Graph {
    device: Device,
    graph: CudaGraph,
    /// Where its intermediate tensors lie.
    _arena: Arena,
}

// SAFETY: a graph may be used from any thread, one at a time, and has no function that takes it
// shared.
unsafe impl Send for Graph {}

impl std::fmt::Debug for Graph {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Graph")
    }
}

thread_local! {
    /// A device's own stream, and the one that stands for it on this thread while it captures.
    static CAPTURING: Cell<Option<[RawStream; 2]>> = const { Cell::new(None) };
}

/// Where this thread launches what is meant for a device's `own` stream.
pub(crate) fn current(own: RawStream) -> RawStream {
    match CAPTURING.get() {
        Some([of, capturing]) if of == own => capturing,
        _ => own,
    }
}

/// Whether this thread captures, so that what it launches writes no weights.
pub(crate) fn is_capturing() -> bool {
    CAPTURING.get().is_some()
}

/// Brings the capture before back, also when the work panics.
struct Guard(Option<[RawStream; 2]>);

impl Drop for Guard {
    fn drop(&mut self) {
        CAPTURING.set(self.0.take());
    }
}

impl Device {
    /// Captures what `work` launches on the device's stream, without running it. Tensors that it
    /// makes lie in `arena`, where the same work was rehearsed.
    ///
    /// # Errors
    /// What `work` returns, [`Error::Argument`] if it makes other tensors than in the rehearsal or
    /// launches nothing, [`Error::CaptureInvalidated`] whatever `work` returns, [`Error::Driver`].
    ///
    /// # Safety
    /// `work` neither waits for the device nor copies from or to the host, and writes no weight of a matrix
    /// product or a norm, and no length or cache of a step of attention before that step: these are read ahead. It drops every tensor that
    /// it makes and none that was made before. Everything else that the captured kernels read and write
    /// lives as long as the graph is launched, and no other graph of this arena is.
    pub unsafe fn capture<E: From<Error>>(
        &self,
        arena: &Arena,
        work: impl FnOnce() -> Result<(), E>,
    ) -> Result<Graph, E> {
        // A stream of its own, as other threads may use the device's.
        let stream = self.context().new_stream().map_err(Error::driver("cuStreamCreate"))?;
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        stream.begin_capture(mode).map_err(Error::driver("cuStreamBeginCapture"))?;
        let streams = [self.cuda_stream().cu_stream().cast(), stream.cu_stream().cast()];
        let guard = Guard(CAPTURING.replace(Some(streams)));
        let done = arena.enter(false, work);
        drop(guard);
        let graph = stream.end_capture(sys::CUgraphInstantiate_flags(0));
        if let Err(error) = &graph
            && error.0 == sys::CUresult::CUDA_ERROR_STREAM_CAPTURE_INVALIDATED
        {
            return Err(Error::CaptureInvalidated.into());
        }
        done?;
        let graph = graph.map_err(Error::driver("cuGraphInstantiate"))?;
        let empty = || Error::argument("capture", "work", "at least one launch", "none");
        Ok(Graph { device: self.clone(), graph: graph.ok_or_else(empty)?, _arena: arena.clone() })
    }
}

impl Graph {
    /// Launches it on the device's own stream.
    ///
    /// # Errors
    /// [`Error::Driver`].
    ///
    /// # Safety
    /// As [`Device::capture`].
    pub unsafe fn launch(&mut self) -> Result<()> {
        self.device.bind()?;
        // SAFETY: as the caller promises; the graph is alive.
        unsafe { result::graph::launch(self.graph.cu_graph_exec(), self.device.stream().cast()) }
            .map_err(Error::driver("cuGraphLaunch"))
    }
}
