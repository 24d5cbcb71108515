//! A Llama of candle's parts under a moa plan, beside candle-transformers' Llama and moa's own decoder on the
//! same weights: greedy tokens must be the same and logits agree, and seconds say what attention costs.
//!
//! ```sh
//! cargo run --release -p moa-candle --example llama -- assets/moa-tiny [PLAN.json] [TOKENS]
//! ```

mod model;

use std::error::Error;
use std::path::Path;
use std::time::Instant;

use candle_core::{DType, Device, Tensor};
use candle_nn::VarBuilder;
use candle_transformers::models::llama as candle_llama;
use moa_core::{ElasticRule, Plan};
use moa_models::{Cpu, Decoder, Dtype, LogitRows, ModelConfig, Weights};

const STEPS: usize = 16;

/// Logits after the prompt and after every step, the likeliest tokens, and the seconds of prompt and steps.
struct Run {
    logits: Vec<Vec<f32>>,
    tokens: Vec<u32>,
    seconds: [f64; 2],
}

fn likeliest(logits: &[f32]) -> u32 {
    let best = logits.iter().enumerate().max_by(|a, b| a.1.total_cmp(b.1));
    best.map_or(0, |(id, _)| id as u32)
}

fn run(
    prompt: &[u32],
    mut forward: impl FnMut(&[u32], usize) -> Result<Vec<f32>, Box<dyn Error>>,
) -> Result<Run, Box<dyn Error>> {
    let start = Instant::now();
    let mut logits = vec![forward(prompt, 0)?];
    let prefill = start.elapsed().as_secs_f64();
    let mut tokens = Vec::new();
    for step in 0..STEPS {
        let token = likeliest(&logits[step]);
        tokens.push(token);
        logits.push(forward(&[token], prompt.len() + step)?);
    }
    let decode = start.elapsed().as_secs_f64() - prefill;
    Ok(Run { logits, tokens, seconds: [prefill, decode / STEPS as f64] })
}

fn report(name: &str, run: &Run, expected: &Run) -> Result<(), Box<dyn Error>> {
    let pairs = run.logits.iter().flatten().zip(expected.logits.iter().flatten());
    let worst = pairs.map(|(a, b)| (a - b).abs()).fold(0., f32::max);
    let [prefill, step] = run.seconds;
    println!(
        "{name:<34} prefill {prefill:7.3} s   step {:7.3} ms   difference {worst:.1e}",
        step * 1e3
    );
    if run.tokens != expected.tokens {
        return Err(format!("{name}: expected {:?}, got {:?}", expected.tokens, run.tokens).into());
    }
    match worst <= 1e-3 {
        true => Ok(()),
        false => Err(format!("{name}: expected logits within 1e-3, got {worst}").into()),
    }
}

fn main() -> Result<(), Box<dyn Error>> {
    let mut args = std::env::args().skip(1);
    let folder = args.next().ok_or("usage: llama FOLDER [PLAN.json] [TOKENS]")?;
    let folder = Path::new(&folder);
    let plan_file = args.next();
    let prompt = args.next().map_or(Ok(2048), |n| n.parse::<usize>())?;
    let tokens = prompt + STEPS;

    let config: candle_llama::LlamaConfig =
        serde_json::from_slice(&std::fs::read(folder.join("config.json"))?)?;
    let mut config = config.into_config(false);
    config.max_position_embeddings = config.max_position_embeddings.max(tokens);
    let tensors = candle_core::safetensors::load(folder.join("model.safetensors"), &Device::Cpu)?;
    let vb = VarBuilder::from_tensors(tensors, DType::F32, &Device::Cpu);
    let ids: Vec<u32> = (0..prompt).map(|i| ((i * i + 7 * i) % 997 + 100) as u32).collect();

    let theirs = candle_llama::Llama::load(vb.clone(), &config)?;
    let mut cache = candle_llama::Cache::new(true, DType::F32, &config, &Device::Cpu)?;
    let dense = run(&ids, |ids, at| {
        let logits =
            theirs.forward(&Tensor::new(ids, &Device::Cpu)?.unsqueeze(0)?, at, &mut cache)?;
        Ok(logits.flatten_all()?.to_vec1()?)
    })?;
    report("candle-transformers, dense", &dense, &dense)?;

    let ours = model::Llama::load(vb, &config, tokens)?;
    let plan = match plan_file {
        Some(path) => Plan::load(path)?,
        None => Plan::uniform(ours.shape, 64, ElasticRule::new(0.0, 0.25)?)?,
    };
    let with = |plan: &Plan| -> Result<Run, Box<dyn Error>> {
        let mut caches = ours.open(plan, tokens)?;
        run(&ids, |ids, _| Ok(ours.forward(ids, &mut caches)?.to_vec1()?))
    };
    report("candle with moa-candle, dense", &with(&Plan::full(ours.shape)?)?, &dense)?;

    let moa = Decoder::load(
        Cpu::new(Dtype::F32),
        ModelConfig::from_file(folder)?,
        &Weights::open(folder)?,
    )?;
    let mut sequence = moa.open(&plan, tokens, 0)?;
    let mut dense_sequence = moa.open(&Plan::full(moa.shape())?, tokens, 0)?;
    let own = run(&ids, |ids, _| {
        let batch = &mut [&mut dense_sequence];
        Ok(moa.forward(batch, &[ids], LogitRows::Last)?.data().to_vec())
    })?;
    report("moa-models, dense", &own, &dense)?;
    let own = run(&ids, |ids, _| {
        Ok(moa.forward(&mut [&mut sequence], &[ids], LogitRows::Last)?.data().to_vec())
    })?;
    report("candle with moa-candle, plan", &with(&plan)?, &own)?;
    report("moa-models, plan", &own, &own)?;
    println!("density of the plan: {:.3}", plan.density(tokens));
    Ok(())
}
