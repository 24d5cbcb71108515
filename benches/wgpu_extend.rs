//! Prefill against burn's dense attention, and decode against the copy rate, on one device through one
//! API.
//!
//! `cargo bench -p moa-backend-wgpu --features peer,vulkan --bench wgpu_extend -- --contexts 4096,8192
//! --json out.json`; `--test` measures tiny sizes; on a software driver leave out the
//! feature `vulkan`.

use std::cell::RefCell;
use std::collections::HashSet;

use burn_cubecl::CubeDevice;
use cubecl::wgpu::WgpuDevice;
use moa_backend_wgpu::{Cache, Device, Dtype, Tensor, WgpuBackend};
use moa_core::{Append, ExtendInputs, LayerLayout, Span, SparseAttentionBackend};
use serde_json::{Map, Value, json};

#[path = "wgpu_extend/options.rs"]
mod options;
#[path = "wgpu_extend/peer.rs"]
mod peer;
#[path = "wgpu_extend/timing.rs"]
mod timing;

use options::Options;
use peer::Peer;
use timing::{MOST, Time, copy_rate, time};

type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

/// Tokens that a history is read by.
const CHUNK: usize = 2048;

struct Bench {
    options: Options,
    burns: CubeDevice,
    device: Device,
    /// Bytes read and written per second.
    copy_rate: f64,
    /// Strategies of burn that take seconds.
    slow: RefCell<HashSet<String>>,
}

fn main() -> Result<()> {
    let options = Options::parse()?;
    if let Err(error) = Device::open() {
        eprintln!("skipped: {error}");
        return Ok(());
    }
    let burns = CubeDevice::Wgpu(WgpuDevice::default());
    let device = Device::from_client(burns.client());
    let client = device.client();
    let features = client.features();
    let matrices: Vec<String> =
        features.matmul.cmma.iter().map(|config| format!("{config:?}")).collect();
    println!(
        "{} over {}: {} kinds of cooperative matrices",
        device.name(),
        client.name(),
        matrices.len()
    );
    let copy_rate = copy_rate(&device, options.copy_bytes, options.seconds)?;
    println!("copy: {:.1} GB/s read and written", copy_rate / 1e9);
    let mut all = Map::new();
    all.insert("device".into(), json!(device.name()));
    all.insert("runtime".into(), json!(client.name()));
    all.insert("cooperative_matrices".into(), json!(matrices));
    all.insert("hardware".into(), json!(format!("{:?}", client.properties().hardware)));
    all.insert("copy_GB_s".into(), json!(copy_rate / 1e9));
    let bench = Bench { options, burns, device, copy_rate, slow: RefCell::default() };
    let mut show = |name: String, row: Result<Value>| {
        // One size that a device has no memory for does not hide the others.
        let row = row.unwrap_or_else(|error| {
            println!("{name}: {error}");
            json!({ "error": error.to_string() })
        });
        all.insert(name, row);
    };
    for &dtype in &bench.options.dtypes {
        for &tokens in &bench.options.contexts {
            show(format!("prefill {dtype} {tokens}"), bench.prefill(dtype, tokens));
        }
        for &(batch, tokens) in &bench.options.decode {
            show(format!("decode {dtype} {batch}x{tokens}"), bench.decode(dtype, batch, tokens));
        }
    }
    if let Some(path) = &bench.options.json {
        std::fs::write(path, serde_json::to_string_pretty(&Value::Object(all))?)?;
    }
    Ok(())
}

/// Numbers of about unit variance, as activations have.
fn numbers(len: usize, seed: u32) -> Vec<f32> {
    let hash = |i: u32| (i ^ seed).wrapping_mul(2_654_435_761).rotate_left(13).wrapping_mul(40_503);
    (0..len as u32).map(|i| ((hash(i) >> 8) as f32 / (1 << 23) as f32 - 1.0) * 1.732).collect()
}

impl Bench {
    /// A whole prompt with the plan's spans, without, and by burn.
    fn prefill(&self, dtype: Dtype, tokens: usize) -> Result<Value> {
        let Options { heads, kv_heads, head_dim, seconds, .. } = self.options;
        let io = Inputs::new(self, 0..tokens)?;
        let (plan, layer) = self.options.plan()?;
        let dense = vec![Span::full(tokens); kv_heads];
        let all: f64 = dense.iter().map(|span| span.kept_pairs(tokens) as f64).sum();
        let mut row = Map::new();
        println!("prefill {tokens}, {dtype}:");
        let mut times = Vec::new();
        let (mut expected, mut clock) = (Vec::new(), false);
        for (name, spans) in [("plan", plan.layer_spans(layer, tokens)), ("dense", dense)] {
            let backend = WgpuBackend::new(&self.device, dtype);
            let mut cache = backend.open(&LayerLayout::new(&spans, tokens, 0)?, head_dim)?;
            let taken = time(&self.device, seconds, || {
                cache.reset();
                io.extend(&backend, &mut [Append { cache: &mut cache, tokens }]).map(drop)
            })?;
            if name == "dense" {
                cache.reset();
                let out = io.extend(&backend, &mut [Append { cache: &mut cache, tokens }])?;
                expected = out.to_vec()?;
                clock = taken.device.is_some();
            }
            let pairs: f64 = spans.iter().map(|span| span.kept_pairs(tokens) as f64).sum();
            let operations = 4.0 * pairs * (heads / kv_heads * head_dim) as f64;
            let rate = operations / taken.wall;
            show(&format!("ours, {name}"), &taken, format!("{:.2} TFLOP/s", rate / 1e12));
            let mut value = taken.json();
            value["TFLOP_s"] = json!(rate / 1e12);
            value["pairs_of_dense"] = json!(pairs / all);
            row.insert(name.into(), value);
            times.push(taken.wall);
        }
        if self.options.alone {
            return Ok(Value::Object(row));
        }
        let peer = Peer::new(&self.burns, [tokens, heads, kv_heads, head_dim], dtype);
        let mut best = f64::INFINITY;
        let mut values = Map::new();
        let slow = &mut self.slow.borrow_mut();
        peer.times(&self.device, seconds, &expected, clock, slow, |name, taken| match taken {
            Ok(taken) => {
                show(&format!("burn, {name}"), &taken, String::new());
                best = best.min(taken.wall);
                values.insert(name, taken.json());
            }
            Err(error) => {
                let error = error.to_string();
                let error: String = error.split_whitespace().collect::<Vec<_>>().join(" ");
                let error: String = error.chars().take(600).collect();
                println!("  burn, {name}: {error}");
                values.insert(name, json!({ "error": error }));
            }
        });
        row.insert("burn".into(), Value::Object(values));
        let [faster, dense_faster] = [best / times[0], best / times[1]];
        row.insert("times_burn".into(), json!({ "plan": faster, "dense": dense_faster }));
        println!(
            "  ours is {faster:.2}x as fast as burn at its best with the plan, {dense_faster:.2}x dense"
        );
        Ok(Value::Object(row))
    }

    /// One token for each of `batch` sequences that hold `tokens`. Several batches take turns, as the
    /// layers of a model do, so that the device's cache does not keep what is read.
    fn decode(&self, dtype: Dtype, batch: usize, tokens: usize) -> Result<Value> {
        let Options { head_dim, kv_heads, seconds, turn_bytes, .. } = self.options;
        let (plan, layer) = self.options.plan()?;
        let mut row = Map::new();
        println!("decode {batch}x{tokens}, {dtype}:");
        let spans = [
            ("plan", plan.layer_spans(layer, tokens)),
            ("dense", vec![Span::full(tokens + MOST); kv_heads]),
        ];
        for (name, spans) in spans {
            let backend = WgpuBackend::new(&self.device, dtype);
            let layout = LayerLayout::new(&spans, tokens + MOST, 0)?;
            let mut first = backend.open(&layout, head_dim)?;
            for at in (0..tokens).step_by(CHUNK) {
                let io = Inputs::new(self, at..tokens.min(at + CHUNK))?;
                io.extend(&backend, &mut [Append { cache: &mut first, tokens: io.tokens }])?;
            }
            let keys: usize = spans.iter().map(|span| span.total().min(tokens + 1)).sum();
            let bytes = keys * batch * head_dim * 2 * dtype.bytes();
            let turns = turn_bytes.div_ceil(bytes.max(1)).clamp(1, 16);
            let mut caches: Vec<Cache> = Vec::new();
            for _ in 0..turns * batch {
                caches.push(backend.fork(&first)?);
            }
            let held = backend.bytes(&first);
            drop(first);
            let io = Inputs::new(self, 0..batch)?;
            let mut turn = 0;
            let taken = time(&self.device, seconds, || {
                let part = caches.iter_mut().skip(turn * batch).take(batch);
                let mut part: Vec<_> = part.map(|cache| Append { cache, tokens: 1 }).collect();
                turn = (turn + 1) % turns;
                io.extend(&backend, &mut part).map(drop)
            })?;
            let rate = bytes as f64 / taken.wall;
            let on_device = taken.device.map(|seconds| bytes as f64 / seconds / self.copy_rate);
            let by_device =
                on_device.map_or_else(|| "-".to_string(), |x| format!("{:.0}", 100.0 * x));
            show(
                &format!("ours, {name}"),
                &taken,
                format!(
                    "{:.1} MB, {:.0} GB/s, {:.0} % of copy ({by_device} % by the device's clock)",
                    bytes as f64 / 1e6,
                    rate / 1e9,
                    100.0 * rate / self.copy_rate,
                ),
            );
            let mut value = taken.json();
            value["MB"] = json!(bytes as f64 / 1e6);
            value["GB_s"] = json!(rate / 1e9);
            value["of_copy"] = json!(rate / self.copy_rate);
            value["of_copy_by_device"] = json!(on_device);
            value["turns"] = json!(turns);
            // Slots that the layout says, times their bytes.
            value["cache_bytes"] = json!(held);
            value["promised_bytes"] = json!(layout.slots() * head_dim * 2 * dtype.bytes());
            row.insert(name.into(), value);
        }
        Ok(Value::Object(row))
    }
}

fn show(name: &str, taken: &Time, more: String) {
    let device = taken.device.map_or_else(|| "-".to_string(), |s| format!("{:.1}", s * 1e6));
    println!("  {name:<38} {:>11.1} us, device {device:>11} us  {more}", taken.wall * 1e6);
}

/// Random q, k and v.
struct Inputs {
    tokens: usize,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: f32,
}

impl Inputs {
    fn new(bench: &Bench, tokens: std::ops::Range<usize>) -> Result<Self> {
        let Options { heads, kv_heads, head_dim, .. } = bench.options;
        let len = tokens.len();
        let tensor = |heads: usize, seed: u32| {
            // The first tokens' numbers are the same in every length.
            let data = numbers(len * heads * head_dim, seed.wrapping_add(tokens.start as u32));
            Tensor::new(&bench.device, &data, &[len, heads, head_dim])
        };
        let (q, k, v) = (tensor(heads, 1)?, tensor(kv_heads, 2)?, tensor(kv_heads, 3)?);
        Ok(Self { tokens: len, q, k, v, scale: 1.0 / (head_dim as f32).sqrt() })
    }

    fn extend(&self, backend: &WgpuBackend, batch: &mut [Append<'_, Cache>]) -> Result<Tensor> {
        let Self { q, k, v, scale, .. } = self;
        let inputs = ExtendInputs::new(q, k, v, *scale);
        Ok(backend.extend(batch, &inputs)?.out)
    }
}
