//! Prefill, chunked prefill and decode on a GPU, timed with CUDA events; beside them the device's copy
//! rate and the host's time per step.
//!
//! `cargo bench -p moa-backend-cuda --bench cuda_extend -- --plan moa_alpha_beta.json --layer 5 \
//!  --heads 32 --kv-heads 8 --json out.json`; the same sizes as `benches/peers/attention.py`. Between
//! repeats the L2 cache is overwritten, as triton's `do_bench` does. With `--test` tiny sizes, once.

use std::time::Instant;

use cudarc::driver::{CudaContext, CudaEvent, CudaGraph, result, sys};
use moa_backend_cuda::tables::InfluenceArgs;
use moa_backend_cuda::{
    Batch, Cache, CudaBackend, Device, Dtype, Step, Tensor, Tensors, Variant, Workspace,
};
use moa_core::{LayerLayout, Span, SparseAttentionBackend};
use serde_json::{Value, json};

#[path = "cuda_extend/options.rs"]
mod options;

use options::Options;

type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

const FLUSH_BYTES: usize = 256 << 20;

struct Bench {
    options: Options,
    device: Device,
    backend: CudaBackend,
    context: std::sync::Arc<CudaContext>,
    step: Step,
    workspace: Workspace,
    flush: Tensor,
}

fn main() -> Result<()> {
    let options = Options::parse()?;
    let device = match Device::open(0) {
        Ok(device) => device,
        Err(error) => {
            eprintln!("skipped: {error}");
            return Ok(());
        }
    };
    let context = CudaContext::new(0)?;
    let backend = CudaBackend::new(&device, options.dtype)?;
    let mut bench = Bench {
        backend: match options.cache_type {
            Some(own) => backend.with_cache_type(own)?,
            None => backend,
        },
        step: Step::new(&device),
        workspace: Workspace::new(&device),
        flush: Tensor::zeros(&device, &[FLUSH_BYTES / 4], Dtype::F32)?,
        options,
        device,
        context,
    };
    bench.backend.warm_up(bench.options.head_dim)?;
    let mut all = serde_json::Map::new();
    let mut show = |name: String, row: Value| {
        println!("{name} {row}");
        all.insert(name, row);
    };
    show("device".into(), json!(bench.device.name()));
    show("copy_TB_s".into(), json!(bench.copy_rate()?));
    for tokens in bench.options.prefill.clone() {
        show(format!("prefill {tokens}"), bench.prefill(tokens)?);
    }
    show(format!("chunked {}", bench.options.history), bench.chunked()?);
    for (batch, tokens) in bench.options.decode.clone() {
        show(format!("decode {batch}x{tokens}"), bench.decode(batch, tokens)?);
    }
    for tokens in bench.options.influence.clone() {
        show(format!("influence {tokens}"), bench.influence(tokens)?);
    }
    if let Some(path) = &bench.options.json {
        std::fs::write(path, serde_json::to_string_pretty(&Value::Object(all))?)?;
    }
    Ok(())
}

impl Bench {
    /// Reading and writing, TB/s.
    fn copy_rate(&self) -> Result<f64> {
        const BYTES: usize = 1 << 30;
        let from = Tensor::zeros(&self.device, &[BYTES / 4], Dtype::F32)?;
        let to = Tensor::zeros(&self.device, &[BYTES / 4], Dtype::F32)?;
        let ms = self.median_ms(|| {
            let stream = self.device.stream().cast();
            // SAFETY: both tensors have these bytes.
            unsafe { result::memcpy_dtod_async(to.pointer(), from.pointer(), BYTES, stream) }?;
            Ok(())
        })?;
        Ok(2.0 * BYTES as f64 / f64::from(ms) / 1e9)
    }

    /// Whole prompts with the plan's spans, and without: milliseconds with writing the caches, and for
    /// attention alone, which is what the peers do; TFLOP/s of attention on kept pairs.
    fn prefill(&mut self, tokens: usize) -> Result<Value> {
        let spans = self.options.spans(tokens)?;
        let dense = vec![Span::full(tokens); self.options.kv_heads];
        let io = Inputs::new(self, tokens)?;
        let mut row = serde_json::Map::new();
        let causal = dense[0].kept_pairs(tokens) as f64 * dense.len() as f64;
        for (name, spans) in [("moa", spans), ("dense", dense)] {
            let layout = LayerLayout::new(&spans, tokens, 0)?;
            let cache = self.backend.open(&layout, self.options.head_dim)?;
            self.prepare(&[&cache], &[tokens])?;
            let ms = self.median_ms(|| self.run(&io))?;
            let tensors = io.from(0, self.options.head_dim);
            // SAFETY: as in `prepare`.
            let attention_ms = self.median_ms(|| unsafe {
                Ok(self.step.attend(&self.workspace, &tensors, self.device.stream())?)
            })?;
            let pairs: u128 = spans.iter().map(|span| span.kept_pairs(tokens)).sum();
            let group = self.options.heads / self.options.kv_heads;
            let operations = 4.0 * pairs as f64 * (group * self.options.head_dim) as f64;
            row.insert(format!("{name}_ms"), json!(ms));
            row.insert(format!("{name}_attention_ms"), json!(attention_ms));
            row.insert(
                format!("{name}_TFLOP_s"),
                json!(operations / f64::from(attention_ms) / 1e9),
            );
            row.insert(format!("{name}_kept"), json!(pairs as f64 / causal));
        }
        Ok(Value::Object(row))
    }

    /// One prompt of `history` tokens, whole and in chunks: microseconds per token.
    fn chunked(&mut self) -> Result<Value> {
        let tokens = self.options.history;
        let layout = LayerLayout::new(&self.options.spans(tokens)?, tokens, 0)?;
        let mut cache = self.backend.open(&layout, self.options.head_dim)?;
        let io = Inputs::new(self, tokens)?;
        let mut row = serde_json::Map::new();
        for chunk in [vec![tokens], self.options.chunks.clone()].concat() {
            let mut times = Vec::new();
            for _ in 0..5 {
                cache.reset();
                self.device.synchronize()?;
                let start = self.event()?;
                for at in (0..tokens).step_by(chunk) {
                    let size = chunk.min(tokens - at);
                    self.prepare(&[&cache], &[size])?;
                    self.run_tensors(&io.from(at, self.options.head_dim))?;
                    cache.advance(size)?;
                }
                times.push(start.elapsed_ms(&self.event()?)?);
            }
            times.sort_by(f32::total_cmp);
            row.insert(
                format!("chunk_{chunk}_us_per_token"),
                json!(times[2] * 1e3 / tokens as f32),
            );
        }
        Ok(Value::Object(row))
    }

    /// One token for each of `batch` sequences that then hold `tokens`.
    fn decode(&mut self, batch: usize, tokens: usize) -> Result<Value> {
        let spans = self.options.spans(tokens)?;
        let head_dim = self.options.head_dim;
        let layout = LayerLayout::new(&spans, tokens, 0)?;
        let mut caches: Vec<Cache> = (0..batch)
            .map(|_| self.backend.open(&layout, head_dim))
            .collect::<std::result::Result<_, _>>()?;
        let history = Inputs::new(self, tokens - 1)?;
        for cache in &mut caches {
            self.prepare(&[cache], &[tokens - 1])?;
            self.run(&history)?;
            cache.advance(tokens - 1)?;
        }
        drop(history);
        let io = Inputs::new(self, batch)?;
        let shared: Vec<&Cache> = caches.iter().collect();
        let ones = vec![1; batch];
        self.prepare(&shared, &ones)?;
        let ms = self.median_ms(|| self.run(&io))?;
        let keys = spans.iter().map(|span| span.total().min(tokens)).sum::<usize>() * batch;
        let bytes = keys as u64 * self.backend.slot_bytes(head_dim);

        let graph = self.capture(&io, 1)?;
        let replayed_ms = self.median_ms(|| Ok(graph.launch()?))?;
        let layers = 32;
        let graph = self.capture(&io, layers)?;
        let layers_ms = self.median_ms(|| Ok(graph.launch()?))?;

        // The host alone: the queue is never full, as each step is short.
        let steps = 50;
        let host_us = |run: &mut dyn FnMut(&mut Self) -> Result<()>, bench: &mut Self| {
            bench.device.synchronize()?;
            let start = Instant::now();
            for _ in 0..steps {
                run(bench)?;
            }
            let us = start.elapsed().as_secs_f64() * 1e6 / f64::from(steps);
            bench.device.synchronize()?;
            Result::Ok(us)
        };
        let planned = host_us(
            &mut |bench| {
                bench.prepare(&shared, &ones)?;
                bench.run(&io)
            },
            self,
        )?;
        let launched = host_us(&mut |bench| bench.run(&io), self)?;
        Ok(json!({
            "us": ms * 1e3,
            "graph_us": replayed_ms * 1e3,
            "graph_of_32_us_per_layer": layers_ms * 1e3 / layers as f32,
            "sparse_MB": bytes as f64 / 1e6,
            "TB_s": bytes as f64 / f64::from(ms) / 1e9,
            "launches": self.step.launches(),
            "host_prepare_and_run_us": planned,
            "host_run_us": launched,
        }))
    }

    /// Influence of a whole prompt: milliseconds, and memory beside its inputs.
    fn influence(&mut self, tokens: usize) -> Result<Value> {
        let Options { heads, kv_heads, head_dim, dtype, .. } = self.options;
        let io = Inputs::new(self, tokens)?;
        let lse = Tensor::zeros(&self.device, &[tokens, heads], Dtype::F32)?;
        let mut tensors = io.from(0, head_dim);
        tensors.lse = lse.pointer();
        let layout = LayerLayout::new(&vec![Span::full(tokens); kv_heads], tokens, 0)?;
        let cache = self.backend.open(&layout, head_dim)?;
        self.prepare(&[&cache], &[tokens])?;
        self.run_tensors(&tensors)?;
        drop(cache);

        let side = tokens.div_ceil(64);
        let blocks = Tensor::zeros(&self.device, &[kv_heads, side, side], Dtype::F32)?;
        let args = InfluenceArgs {
            q: tensors.q,
            k: tensors.k,
            v: tensors.v,
            out: tensors.out,
            // Any gradient takes as long.
            d_out: tensors.q,
            lse: tensors.lse,
            blocks: blocks.pointer(),
            tokens: tokens as i32,
            query_heads: heads as i32,
            kv_heads: kv_heads as i32,
            absolute: 0,
            scale: tensors.scale,
            window: tokens as i32,
        };
        let kernels = self.device.kernels(Variant { head_dim, dtype })?;
        // SAFETY: everything is on the device's own stream, and of these sizes.
        let ms =
            self.median_ms(|| Ok(unsafe { kernels.influence(self.device.stream(), &args) }?))?;
        // Two products per pair.
        let pairs = Span::full(tokens).kept_pairs(tokens) as f64;
        let operations = 4.0 * pairs * (heads * head_dim) as f64;
        Ok(json!({
            "ms": ms,
            "TFLOP_s": operations / f64::from(ms) / 1e9,
            "MB_beside_inputs": (kv_heads * side * side * 4) as f64 / 1e6,
        }))
    }

    fn prepare(&mut self, caches: &[&Cache], tokens: &[usize]) -> Result<()> {
        let batch =
            Batch { caches, tokens, query_heads: self.options.heads, grows: false, softcap: None };
        // SAFETY: everything here is on the device's own stream.
        Ok(unsafe { self.step.prepare(&mut self.workspace, &batch, self.device.stream()) }?)
    }

    fn run(&self, io: &Inputs) -> Result<()> {
        self.run_tensors(&io.from(0, self.options.head_dim))
    }

    fn run_tensors(&self, tensors: &Tensors) -> Result<()> {
        // SAFETY: as in `prepare`; the tensors outlive the synchronisation after a measurement.
        Ok(unsafe { self.step.run(&self.workspace, tensors, self.device.stream()) }?)
    }

    fn capture(&self, io: &Inputs, layers: usize) -> Result<CudaGraph> {
        // SAFETY: the device outlives the graph, which is launched on this stream alone.
        let stream = unsafe { self.context.wrap_borrowed_stream(self.device.stream().cast()) };
        stream.begin_capture(sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL)?;
        for _ in 0..layers {
            self.run(io)?;
        }
        let graph = stream.end_capture(sys::CUgraphInstantiate_flags(0))?;
        graph.ok_or_else(|| "nothing was captured".into())
    }

    fn event(&self) -> Result<CudaEvent> {
        let event = self.context.new_event(Some(sys::CUevent_flags::CU_EVENT_DEFAULT))?;
        // SAFETY: the device's stream and the event are of the same context.
        unsafe { sys::cuEventRecord(event.cu_event(), self.device.stream().cast()) }.result()?;
        Ok(event)
    }

    fn flush(&self) -> Result<()> {
        let stream = self.device.stream().cast();
        // SAFETY: the tensor has these bytes.
        Ok(unsafe { result::memset_d8_async(self.flush.pointer(), 0, FLUSH_BYTES, stream) }?)
    }

    /// Median time of what `run` puts on the stream, with a cold L2 cache.
    fn median_ms(&self, run: impl Fn() -> Result<()>) -> Result<f32> {
        self.device.synchronize()?;
        let start = self.event()?;
        run()?;
        let first = start.elapsed_ms(&self.event()?)?;
        let repeats = (self.options.repeat_ms / first.max(0.01)).clamp(1.0, 500.0) as usize;
        for _ in 0..repeats.min(5) {
            run()?;
        }
        let mut pairs = Vec::with_capacity(repeats);
        for _ in 0..repeats {
            self.flush()?;
            let start = self.event()?;
            run()?;
            pairs.push((start, self.event()?));
        }
        self.device.synchronize()?;
        let mut times =
            pairs.iter().map(|(a, b)| Ok(a.elapsed_ms(b)?)).collect::<Result<Vec<f32>>>()?;
        times.sort_by(f32::total_cmp);
        Ok(times[times.len() / 2])
    }
}

/// Random q, k, v and a place for the output.
struct Inputs {
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
}

impl Inputs {
    fn new(bench: &Bench, tokens: usize) -> Result<Self> {
        let Options { heads, kv_heads, head_dim, dtype, .. } = bench.options;
        let tensor = |heads: usize, seed: u32| {
            let hash = |i: u32| {
                (i ^ seed).wrapping_mul(2_654_435_761).rotate_left(13).wrapping_mul(40_503)
            };
            // About unit variance, as activations have.
            let data = (0..(tokens * heads * head_dim) as u32)
                .map(|i| ((hash(i) >> 8) as f32 / (1 << 23) as f32 - 1.0) * 1.732);
            let data: Vec<f32> = data.collect();
            Tensor::from_f32(&bench.device, &data, &[tokens, heads, head_dim], dtype)
        };
        let out = Tensor::zeros(&bench.device, &[tokens, heads, head_dim], dtype)?;
        Ok(Self { q: tensor(heads, 1)?, k: tensor(kv_heads, 2)?, v: tensor(kv_heads, 3)?, out })
    }

    /// From a token on.
    fn from(&self, token: usize, head_dim: usize) -> Tensors {
        let at = |tensor: &Tensor| {
            let mut packed = tensor.packed();
            packed.data += token as u64 * packed.token as u64 * tensor.dtype().bytes() as u64;
            packed
        };
        let scale = 1.0 / (head_dim as f32).sqrt();
        let [q, k, v, out] = [&self.q, &self.k, &self.v, &self.out].map(at);
        Tensors { q, k, v, out, lse: 0, scale, sinks: 0, key_feedback: 0, rope: None }
    }
}
