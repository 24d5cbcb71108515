use cudarc::driver::{CudaGraph, sys};

use crate::{Device, Error, Result};

/// Work on a device's own stream, captured once and launched as one.
pub struct Graph(CudaGraph);

// SAFETY: a graph may be used from any thread, one at a time, and has no function that takes it
// shared.
unsafe impl Send for Graph {}

impl std::fmt::Debug for Graph {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Graph")
    }
}

impl Device {
    /// Captures what `work` launches on the device's stream, without running it. Memory that is
    /// allocated and freed inside belongs to the graph.
    ///
    /// # Errors
    /// What `work` returns, or [`Error::Driver`]; the stream is then as before.
    ///
    /// # Safety
    /// `work` neither waits for the device nor copies from or to the host. It drops every tensor that
    /// it makes and none that was made before. Everything else that the captured kernels read and
    /// write lives as long as the graph is launched.
    pub unsafe fn capture<E: From<Error>>(
        &self,
        work: impl FnOnce() -> Result<(), E>,
    ) -> Result<Graph, E> {
        let stream = self.cuda_stream();
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        stream.begin_capture(mode).map_err(Error::driver("cuStreamBeginCapture"))?;
        let done = work();
        // Also after a failure: the stream must not stay in capture.
        let graph = stream.end_capture(sys::CUgraphInstantiate_flags(0));
        done?;
        let graph = graph.map_err(Error::driver("cuGraphInstantiate"))?;
        let empty = || Error::argument("capture", "work", "at least one launch", "none");
        Ok(Graph(graph.ok_or_else(empty)?))
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
        self.0.launch().map_err(Error::driver("cuGraphLaunch"))
    }
}
