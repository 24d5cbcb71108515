//! moa's attention beside burn's own in one run: whole prompts, and steps of one token, by the wall clock.
//!
//! ```sh
//! cargo run --release -p moa-burn --features burn/autotune --example speed -- [TOKENS..]
//! ```
//!
//! `burn/autotune` lets burn choose its best kernel. With `cuda` or `cuda-cpp` among the features it is the first CUDA
//! device. burn knows no grouped queries: it is given KV heads that are repeated already, in place of a cache.

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
    let mut lengths = Vec::new();
    for length in std::env::args().skip(1) {
        lengths.push(length.parse::<usize>()?);
    }
    if lengths.is_empty() {
        lengths = vec![1024, 2048, 4096, 8192];
    }
    #[cfg(feature = "cuda")]
    let device = Device::cuda(0);
    #[cfg(not(feature = "cuda"))]
    let device = Device::default();
    println!("{device:?}; microseconds of a call, the best of {ROUNDS} times {CALLS}");
    for dtype in [FloatDType::F32, FloatDType::F16] {
        if !device.supports_dtype(dtype.into()) {
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
    let mut expected = None;
    let burn_prompt = time(device, || {
        expected = Some(burns(&q, true));
        Ok(())
    })?;
    let burn_step = time(device, || {
        drop(burns(&q1, false));
        Ok(())
    })?;
    let expected = expected.ok_or("no call")?.cast(FloatDType::F32);

    println!("{dtype:?}, {tokens} tokens:");
    println!("  burn            prompt {burn_prompt:>9.0}         step {burn_step:>7.0}");
    let caches = if dtype == FloatDType::F16 { DType::F16 } else { DType::F32 };
    let ours = SparseAttention::new(device, caches)?;
    let scale = 1. / (head_dim as f32).sqrt();
    let quarter = Plan::uniform(SHAPE, 64, ElasticRule::new(0.0, 0.25)?)?;
    for (name, plan) in [("dense", Plan::full(SHAPE)?), ("quarter", quarter)] {
        let mut cache = ours.open(&plan, tokens + (ROUNDS + 2) * CALLS)?.remove(0);
        let mut out = None;
        let prompt = time(device, || {
            cache.reset();
            out = Some(ours.forward(&mut [&mut cache], q.clone(), k.clone(), v.clone(), scale)?);
            Ok(())
        })?;
        let step = time(device, || {
            let (q, k, v) = (q1.clone(), k1.clone(), v1.clone());
            drop(ours.forward(&mut [&mut cache], q, k, v, scale)?);
            Ok(())
        })?;
        let [faster, step_faster] = [burn_prompt / prompt, burn_step / step];
        print!(
            "  moa, {name:<10} prompt {prompt:>9.0} {faster:>6.2}x step {step:>7.0} {step_faster:>6.2}x"
        );
        if name == "dense" {
            let out = out.ok_or("no call")?.cast(FloatDType::F32);
            let difference = (out - expected.clone()).abs().max().into_scalar::<f32>();
            print!("   difference {difference:.1e}");
            if difference.is_nan() | (difference > 2e-2) {
                return Err(format!("expected burn's output within 2e-2, got {difference}").into());
            }
        }
        println!();
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
