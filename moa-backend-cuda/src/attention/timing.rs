//! How long a decode step takes, for searches whose budget is time.

use cudarc::driver::{CudaEvent, result, sys};
use moa_core::{CacheType, LayerLayout, Span};

use super::step::{Batch, Step, Tensors};
use crate::kernels::compile::Variant;
use crate::memory::Workspace;
use crate::{Cache, Device, Error, Result, Tensor};

const OP: &str = "decode_seconds";

/// Steps timed for one measurement, of which the median counts.
const RUNS: usize = 15;

/// Most memory that a measurement takes.
const BYTES: usize = 2 << 30;

/// Seconds of one decode step of one KV head with `span` keys, on a device that is full of such
/// heads: alone, a head's step is all latency.
pub(crate) fn decode_seconds(
    device: &Device,
    variant: Variant,
    own: CacheType,
    span: usize,
    group: usize,
) -> Result<f64> {
    variant.check(OP)?;
    let window = Span::new(0, span)?;
    if group == 0 {
        return Err(Error::argument(OP, "group", "at least 1 query head", 0));
    }
    let head_bytes = span.saturating_mul(own.slot_bytes(variant.head_dim) as usize);
    let heads = (BYTES / head_bytes.max(1)).clamp(1, device.multiprocessors());
    let layout = LayerLayout::new(&vec![window; heads], span, 0)?;
    let mut cache = Cache::open(device, layout, variant, own)?;
    let stream = device.stream();
    // SAFETY: these are the cache's bytes, on the stream that it was allocated on.
    unsafe { result::memset_d8_async(cache.keys(), 0, cache.bytes() as usize, stream.cast()) }
        .map_err(Error::driver("cuMemsetD8Async"))?;
    cache.advance(span - 1)?;

    let tensor = |heads| Tensor::zeros(device, &[1, heads, variant.head_dim], variant.dtype);
    let (q, out, k) = (tensor(heads * group)?, tensor(heads * group)?, tensor(heads)?);
    let tensors = Tensors {
        q: q.packed(),
        k: k.packed(),
        v: k.packed(),
        out: out.packed(),
        lse: 0,
        scale: 1.0,
        sinks: 0,
        key_feedback: 0,
        rope: None,
    };
    let (mut step, mut workspace) = (Step::new(device), Workspace::new(device));
    let batch = Batch {
        caches: &[&cache],
        tokens: &[1],
        query_heads: heads * group,
        grows: false,
        softcap: None,
    };
    // SAFETY: everything is on the device's own stream, and no cache is freed before it is done.
    unsafe { step.prepare(&mut workspace, &batch, stream) }?;
    let mut events = Vec::with_capacity(RUNS + 2);
    // The first run warms up.
    for _ in 0..RUNS + 2 {
        events.push(event(device)?);
        // SAFETY: as above.
        unsafe { step.run(&workspace, &tensors, stream) }?;
    }
    device.synchronize()?;
    let mut seconds = events[1..]
        .windows(2)
        .map(|pair| pair[0].elapsed_ms(&pair[1]).map(|ms| f64::from(ms) / 1e3 / heads as f64))
        .collect::<std::result::Result<Vec<f64>, _>>()
        .map_err(Error::driver("cuEventElapsedTime"))?;
    seconds.sort_by(f64::total_cmp);
    Ok(seconds[seconds.len() / 2])
}

/// An event with a time, recorded now.
fn event(device: &Device) -> Result<CudaEvent> {
    let flags = sys::CUevent_flags::CU_EVENT_DEFAULT;
    let event = device.context().new_event(Some(flags)).map_err(Error::driver("cuEventCreate"))?;
    event.record(device.cuda_stream()).map_err(Error::driver("cuEventRecord"))?;
    Ok(event)
}
