use std::time::Instant;

use moa_core::{Append, ExtendInputs, LayerLayout, Span, SparseAttentionBackend};

use crate::{Error, Result, Tensor, WgpuBackend};

/// Steps queued before their end is awaited: one wait costs as much as many short steps.
const STEPS: usize = 8;

/// KV heads that run at once: alone, a head's step is all latency. Its time is their share of it.
const HEADS: usize = 16;

/// Fastest of so many measurements, as others may use the device too.
const ROUNDS: usize = 3;

/// Seconds of one decode step of one KV head that sees `span` keys; what they are does not matter.
pub(crate) fn decode_seconds(
    backend: &WgpuBackend,
    span: usize,
    group: usize,
    head_dim: usize,
) -> Result<f64> {
    if group == 0 || group > 1 << 16 {
        return Err(Error::argument("decode_seconds", "group", "1 to 65536 query heads", group));
    }
    let capacity = span.saturating_add(STEPS * (ROUNDS + 1));
    let layout = LayerLayout::new(&[Span::new(0, span)?; HEADS], capacity, 0)?;
    let mut cache = backend.open(&layout, head_dim)?;
    cache.state_mut().append(span)?;
    let device = backend.device();
    let zeros =
        |heads: usize| Tensor::new(device, &vec![0.0; heads * head_dim], &[1, heads, head_dim]);
    let (q, kv) = (zeros(HEADS * group)?, zeros(HEADS)?);
    let inputs = ExtendInputs::new(&q, &kv, &kv, 1.0);
    let mut fastest = f64::INFINITY;
    for round in 0..=ROUNDS {
        let start = Instant::now();
        let mut last = None;
        for _ in 0..STEPS {
            last =
                Some(backend.extend(&mut [Append { cache: &mut cache, tokens: 1 }], &inputs)?.out);
        }
        last.map(|out| out.to_vec()).transpose()?;
        // The first round compiles.
        if round > 0 {
            fastest = fastest.min(start.elapsed().as_secs_f64() / (STEPS * HEADS) as f64);
        }
    }
    Ok(fastest)
}
