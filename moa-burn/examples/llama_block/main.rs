//! A Llama block of burn's parts: with burn's own attention, with moa's under a dense plan, which must agree, and under
//! a plan of a quarter of the cache.
//!
//! ```sh
//! cargo run --release -p moa-burn --example llama_block -- [TOKENS]
//! ```
//!
//! On any GPU, also Mesa's software driver.

mod block;

use std::error::Error;
use std::time::Instant;

use block::{Block, dense};
use burn::tensor::{DType, Device, Distribution, Tensor};
use moa_burn::SparseAttention;
use moa_core::{ElasticRule, ModelShape, Plan};

const SHAPE: ModelShape = ModelShape { layers: 1, query_heads: 8, kv_heads: 2, head_dim: 64 };

/// Prompt and steps of one token each.
const STEPS: usize = 4;

fn main() -> Result<(), Box<dyn Error>> {
    let tokens = std::env::args().nth(1).map_or(Ok(256), |n| n.parse::<usize>())?;
    let all = tokens + STEPS;
    let device = Device::default();
    let block = Block::new(SHAPE, all, &device);
    let x = Tensor::<3>::random([1, all, SHAPE.query_heads * 64], Distribution::Default, &device);

    let expected = block.forward(x.clone(), 0, |qkv| Ok::<_, Box<dyn Error>>(dense(qkv)))?;
    let attention = SparseAttention::new(&device, DType::F32)?;
    let quarter = Plan::uniform(SHAPE, 16, ElasticRule::new(0.0, 0.25)?)?;
    for (name, plan) in [("dense", Plan::full(SHAPE)?), ("quarter", quarter)] {
        // Twice: the first run compiles the kernels.
        let mut seconds = 0.0;
        let mut out = Vec::new();
        for _ in 0..2 {
            let mut caches = attention.open(&plan, all)?;
            let start = Instant::now();
            out.clear();
            let mut at = 0;
            for chunk in std::iter::once(tokens).chain([1; STEPS]) {
                let x = x.clone().narrow(1, at, chunk);
                out.push(block.forward(x, at, |[q, k, v]| {
                    attention.forward(&mut [&mut caches[0]], q, k, v, 1. / 8.)
                })?);
                at += chunk;
            }
            device.sync()?;
            seconds = start.elapsed().as_secs_f64();
        }
        let difference = (Tensor::cat(out, 1) - expected.clone()).abs().max().into_scalar::<f32>();
        let density = plan.density(all);
        println!(
            "{name:<8} density {density:.2}   {seconds:.3} s   difference from burn's {difference:.1e}"
        );
        if name == "dense" && difference.is_nan() | (difference > 1e-3) {
            return Err(format!("expected burn's output within 1e-3, got {difference}").into());
        }
    }
    Ok(())
}
