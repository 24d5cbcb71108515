use cudarc::driver::{CudaGraph, sys};

use crate::{Arena, Device, Error, Result};

/// Work on a device's own stream, captured once and launched as one.
pub struct Graph {
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

impl Device {
    /// Captures what `work` launches on the device's stream, without running it. Tensors that it
    /// makes lie in `arena`, where the same work was rehearsed.
    ///
    /// # Errors
    /// What `work` returns, [`Error::Argument`] if it makes other tensors than in the rehearsal or
    /// launches nothing, [`Error::Driver`]. The stream is then as before.
    ///
    /// # Safety
    /// `work` neither waits for the device nor copies from or to the host. It drops every tensor that
    /// it makes and none that was made before. No other thread uses this device's stream meanwhile (one
    /// opened by itself has its own). Everything else that the captured kernels read and
    /// write lives as long as the graph is launched, and no other graph of this arena is.
    pub unsafe fn capture<E: From<Error>>(
        &self,
        arena: &Arena,
        work: impl FnOnce() -> Result<(), E>,
    ) -> Result<Graph, E> {
        let stream = self.cuda_stream();
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        stream.begin_capture(mode).map_err(Error::driver("cuStreamBeginCapture"))?;
        let done = arena.enter(false, work);
        // Also after a failure: the stream must not stay in capture.
        let graph = stream.end_capture(sys::CUgraphInstantiate_flags(0));
        done?;
        let graph = graph.map_err(Error::driver("cuGraphInstantiate"))?;
        let empty = || Error::argument("capture", "work", "at least one launch", "none");
        Ok(Graph { graph: graph.ok_or_else(empty)?, _arena: arena.clone() })
    }
}

impl Graph {
    /// Launches it on the stream that it was captured on.
    ///
    /// # Errors
    /// [`Error::Driver`].
    ///
    /// # Safety
    /// As [`Device::capture`].
    pub unsafe fn launch(&mut self) -> Result<()> {
        self.graph.launch().map_err(Error::driver("cuGraphLaunch"))
    }
}
