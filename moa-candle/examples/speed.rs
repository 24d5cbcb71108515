//! moa's attention beside candle's own in one run: whole prompts, and steps of one token, by the wall clock.
//!
//! ```sh
//! cargo run --release -p moa-candle --example speed -- [cuda] [f32|f16|bf16] [TOKENS..]
//! CUDA_COMPUTE_CAP=90 cargo run --release -p moa-candle --features cuda --example speed -- cuda bf16 4096 16384
//! ```
//!
//! candle's own is that of the Llama of candle-transformers without its flash attention: it appends to its cache by `cat`, repeats
//! KV heads, widens to f32, masks, and multiplies.

use std::error::Error;
use std::time::Instant;

use candle_core::{DType, Device, Tensor};
use moa_candle::SparseAttention;
use moa_core::{ElasticRule, ModelShape, Plan};

/// A layer of Llama-3-8B.
const SHAPE: ModelShape = ModelShape { layers: 1, query_heads: 32, kv_heads: 8, head_dim: 128 };

/// How often a prompt and a step are timed; the first time is not counted.
const PROMPTS: usize = 4;
const STEPS: usize = 20;

type Result<T> = std::result::Result<T, Box<dyn Error>>;

fn main() -> Result<()> {
    let (mut lengths, mut device, mut dtype) = (Vec::new(), Device::Cpu, None);
    for argument in std::env::args().skip(1) {
        match &*argument {
            // A stream of its own: the default one waits for all others.
            "cuda" => device = Device::new_cuda_with_stream(0)?,
            "f32" => dtype = Some(DType::F32),
            "f16" => dtype = Some(DType::F16),
            "bf16" => dtype = Some(DType::BF16),
            tokens => lengths.push(tokens.parse::<usize>()?),
        }
    }
    if lengths.is_empty() {
        lengths = vec![1024, 2048];
    }
    let dtype = dtype.unwrap_or(if device.is_cpu() { DType::F32 } else { DType::BF16 });
    println!("{:?}, {dtype:?}; microseconds of a call, the best of several", device.location());
    lengths.into_iter().try_for_each(|tokens| row(&device, dtype, tokens))
}

fn row(device: &Device, dtype: DType, tokens: usize) -> Result<()> {
    let random = |heads, tokens| {
        let all = (1, tokens, heads, SHAPE.head_dim);
        Tensor::randn(0f32, 1., all, device)?.to_dtype(dtype)?.transpose(1, 2)
    };
    let qkv = |tokens| -> Result<[Tensor; 3]> {
        let ModelShape { query_heads, kv_heads, .. } = SHAPE;
        Ok([random(query_heads, tokens)?, random(kv_heads, tokens)?, random(kv_heads, tokens)?])
    };
    let (prompt, step) = (qkv(tokens)?, qkv(1)?);
    println!("{tokens} tokens:");
    let attention = SparseAttention::new(device, dtype)?;
    let scale = 1. / (SHAPE.head_dim as f32).sqrt();
    let quarter = Plan::uniform(SHAPE, 64, ElasticRule::new(0.0, 0.25)?)?;
    let (mut times, mut dense) = (Vec::new(), None);
    for (name, plan) in [("quarter", quarter), ("dense", Plan::full(SHAPE)?)] {
        let mut cache = attention.open(&plan, tokens + STEPS)?.remove(0);
        let whole = time(device, PROMPTS, || {
            attention.truncate(&mut cache, 0)?;
            let [q, k, v] = &prompt;
            dense = Some(attention.forward(&mut [&mut cache], q, k, v, scale)?);
            Ok(())
        })?;
        let one = time(device, STEPS, || {
            let [q, k, v] = &step;
            attention.forward(&mut [&mut cache], q, k, v, scale)?;
            Ok(())
        })?;
        println!("  moa, {name:<8} prompt {whole:>9.0}   step {one:>7.0}");
        times.push([whole, one]);
    }
    let mut outputs = Vec::new();
    let whole = time(device, PROMPTS, || {
        outputs = vec![own(&prompt, true)?];
        Ok(())
    });
    let whole = match whole {
        Ok(whole) => whole,
        // Scores of all pairs in f32, several times.
        Err(error) => {
            println!("  candle        prompt: {error}");
            return Ok(());
        }
    };
    let [q, k, v] = &step;
    let (mut all_k, mut all_v) = (prompt[1].contiguous()?, prompt[2].contiguous()?);
    let one = time(device, STEPS, || {
        (all_k, all_v) = (Tensor::cat(&[&all_k, k], 2)?, Tensor::cat(&[&all_v, v], 2)?);
        own(&[q.clone(), all_k.clone(), all_v.clone()], false)?;
        Ok(())
    })?;
    let dense = dense.ok_or("no call")?.to_dtype(DType::F32)?;
    let apart = (outputs.remove(0).to_dtype(DType::F32)?.sub(&dense)?).abs()?;
    let apart = apart.flatten_all()?.max(0)?.to_scalar::<f32>()?;
    let [quarter, dense] = [0, 1].map(|i| [whole / times[i][0], one / times[i][1]]);
    println!(
        "  candle        prompt {whole:>9.0}   step {one:>7.0}   outputs apart by {apart:.1e}\n  \
         times candle's speed, prompt: dense {:.2}x, quarter {:.2}x; step: {:.2}x, {:.2}x",
        dense[0], quarter[0], dense[1], quarter[1]
    );
    if apart.is_nan() || apart > 2e-2 {
        return Err(format!("expected candle's output within 2e-2, got {apart}").into());
    }
    Ok(())
}

/// As the block of candle-transformers' Llama attends.
fn own([q, k, v]: &[Tensor; 3], causal: bool) -> Result<Tensor> {
    let dtype = q.dtype();
    let repeat = |x: &Tensor| candle_transformers::utils::repeat_kv(x.clone(), SHAPE.group());
    let wide = |x: Tensor| x.contiguous()?.to_dtype(DType::F32);
    let (q, k, v) = (wide(q.clone())?, wide(repeat(k)?)?, wide(repeat(v)?)?);
    let scores = (q.matmul(&k.t()?)? / (SHAPE.head_dim as f64).sqrt())?;
    let scores = if causal {
        let tokens = q.dim(2)?;
        let at = Tensor::arange(0u32, tokens as u32, q.device())?;
        let hidden = at.unsqueeze(0)?.broadcast_gt(&at.unsqueeze(1)?)?;
        let minus = Tensor::new(f32::NEG_INFINITY, q.device())?.broadcast_as(scores.shape())?;
        hidden.broadcast_as(scores.shape())?.where_cond(&minus, &scores)?
    } else {
        scores
    };
    Ok(candle_nn::ops::softmax_last_dim(&scores)?.matmul(&v.contiguous()?)?.to_dtype(dtype)?)
}

/// Microseconds of the fastest call. The first one, which compiles kernels, is not counted.
fn time(device: &Device, times: usize, mut call: impl FnMut() -> Result<()>) -> Result<f64> {
    let mut best = f64::INFINITY;
    for round in 0..times {
        device.synchronize()?;
        let start = Instant::now();
        call()?;
        device.synchronize()?;
        if round > 0 {
            best = best.min(start.elapsed().as_secs_f64());
        }
    }
    Ok(best * 1e6)
}
