//! moa's attention beside burn's own in one run: whole prompts, and steps of one token, by the wall clock.
//!
//! ```sh
//! cargo run --release -p moa-burn --features autotune --example speed -- [DEVICE] [f16|f32] [TOKENS..]
//! ```
//!
//! `autotune` lets burn choose its best kernel. DEVICE is `wgpu`, or `cuda` with `cuda` or `cuda-cpp` among the
//! features; burn's default one without. burn knows no grouped queries: it is given KV heads that are repeated
//! already, in place of a cache.

use std::error::Error;
use std::time::Instant;

use burn::tensor::module::attention;
use burn::tensor::ops::AttentionModuleOptions;
use burn::tensor::{DType, Device, Distribution, FloatDType, Tensor};
use moa_burn::SparseAttention;
use moa_core::{ElasticRule, ModelShape, Plan};

/// A layer of Llama-3-8B.
const SHAPE: ModelShape = ModelShape { layers: 1, query_heads: 32, kv_heads: 8, head_dim: 128 };

/// Calls between two looks at the clock, and how often that is done.
const CALLS: usize = 5;
const ROUNDS: usize = 5;

type Result<T> = std::result::Result<T, Box<dyn Error>>;

fn main() -> Result<()> {
    let (mut lengths, mut device) = (Vec::new(), None);
    let mut dtypes = vec![FloatDType::F16, FloatDType::F32];
    for argument in std::env::args().skip(1) {
        match &*argument {
            "wgpu" => device = Some(Device::wgpu(Default::default())),
            #[cfg(feature = "cuda")]
            "cuda" => device = Some(Device::cuda(0)),
            "f16" => dtypes = vec![FloatDType::F16],
            "f32" => dtypes = vec![FloatDType::F32],
            tokens => lengths.push(tokens.parse::<usize>()?),
        }
    }
    if lengths.is_empty() {
        lengths = vec![1024, 2048, 4096, 8192];
    }
    let device = device.unwrap_or_default();
    println!("{device:?}; microseconds of a call, the best of {ROUNDS} times {CALLS}");
    for dtype in dtypes {
        if !device.supports_dtype(dtype) {
            println!("{dtype:?}: not on this device");
            continue;
        }
        for &tokens in &lengths {
            row(&device, dtype, tokens)?;
        }
    }
    Ok(())
}

fn row(device: &Device, dtype: FloatDType, tokens: usize) -> Result<()> {
    let ModelShape { query_heads, kv_heads, head_dim, .. } = SHAPE;
    let random = |heads, tokens| {
        let all = [1, heads, tokens, head_dim];
        Tensor::<4>::random(all, Distribution::Normal(0.0, 1.0), device).cast(dtype)
    };
    let (q, k, v) =
        (random(query_heads, tokens), random(kv_heads, tokens), random(kv_heads, tokens));
    let (q1, k1, v1) = (random(query_heads, 1), random(kv_heads, 1), random(kv_heads, 1));
    let repeat = |x: &Tensor<4>| {
        let x = x.clone().reshape([1, kv_heads, 1, tokens, head_dim]);
        x.repeat_dim(2, SHAPE.group()).reshape([1, query_heads, tokens, head_dim])
    };
    let (all_k, all_v) = (repeat(&k), repeat(&v));
    let burns = |q: &Tensor<4>, is_causal| {
        let options = AttentionModuleOptions { scale: None, softcap: None, is_causal };
        attention(q.clone(), all_k.clone(), all_v.clone(), None, None, options)
    };
    println!("{dtype:?}, {tokens} tokens:");
    let caches = if dtype == FloatDType::F16 { DType::F16 } else { DType::F32 };
    let ours = SparseAttention::new(device, caches)?;
    let scale = 1. / (head_dim as f32).sqrt();
    let quarter = Plan::uniform(SHAPE, 64, ElasticRule::new(0.0, 0.25)?)?;
    let mut times = Vec::new();
    let mut outputs = Vec::new();
    for (name, plan) in [("quarter", quarter), ("dense", Plan::full(SHAPE)?)] {
        let mut cache = ours.open(&plan, tokens + (ROUNDS + 1) * CALLS)?.remove(0);
        let prompt = time(device, || {
            cache.reset();
            outputs.truncate(0);
            outputs.push(ours.forward(
                &mut [&mut cache],
                q.clone(),
                k.clone(),
                v.clone(),
                scale,
            )?);
            Ok(())
        })?;
        let step = time(device, || {
            let (q, k, v) = (q1.clone(), k1.clone(), v1.clone());
            drop(ours.forward(&mut [&mut cache], q, k, v, scale)?);
            Ok(())
        })?;
        println!("  moa, {name:<8} prompt {prompt:>9.0}   step {step:>7.0}");
        times.push([prompt, step]);
    }
    // The dense output, of which burn's is the measure.
    let expected = outputs.pop().ok_or("no call")?;
    let mut difference = f32::NAN;
    let prompt = time(device, || {
        outputs = vec![burns(&q, true)];
        Ok(())
    })?;
    if let Some(out) = outputs.pop() {
        let apart = out.cast(FloatDType::F32) - expected.cast(FloatDType::F32);
        difference = apart.abs().max().into_scalar::<f32>();
    }
    let step = time(device, || {
        drop(burns(&q1, false));
        Ok(())
    })?;
    let [quarter, dense] = [0, 1].map(|i| [prompt / times[i][0], step / times[i][1]]);
    println!(
        "  burn          prompt {prompt:>9.0}   step {step:>7.0}   outputs apart by {difference:.1e}\n  \
         times burn's speed, prompt: dense {:.2}x, quarter {:.2}x; step: {:.2}x, {:.2}x",
        dense[0], quarter[0], dense[1], quarter[1]
    );
    if difference.is_nan() | (difference > 2e-2) {
        return Err(format!("expected burn's output within 2e-2, got {difference}").into());
    }
    Ok(())
}

/// Microseconds of a call. The first ones, which compile kernels and let burn choose, are not counted.
fn time(device: &Device, mut call: impl FnMut() -> Result<()>) -> Result<f64> {
    let mut best = f64::INFINITY;
    for round in 0..=ROUNDS {
        let start = Instant::now();
        for _ in 0..CALLS {
            call()?;
        }
        device.sync()?;
        if round > 0 {
            best = best.min(start.elapsed().as_secs_f64() / CALLS as f64);
        }
    }
    Ok(best * 1e6)
}
