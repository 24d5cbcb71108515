//! Requests that come and go at random, against as many that come at once: times of decode steps of an engine on one GPU.
//!
//! `cargo bench -p moa-models --features cuda --bench cuda_arrivals -- benches/shapes/llama-3-8b 1,8,32`

use std::sync::Arc;
use std::time::{Duration, Instant};

use moa_core::{Plan, SplitMix64};
use moa_models::{
    Cuda, Decoder, Dtype, Engine, EngineOptions, GenerateOptions, ModelConfig, RandomTensors,
};
use serde_json::{Value, json};

type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

/// New tokens of a request, and of its prompt, at least and at most.
const NEW_TOKENS: [usize; 2] = [32, 256];
const PROMPT: [usize; 2] = [64, 512];

fn main() -> Result<()> {
    let args: Vec<String> = std::env::args().skip(1).filter(|arg| arg != "--bench").collect();
    let [folder, batches] = args.as_slice() else {
        return Err("a folder with a config.json, and mean numbers of running requests".into());
    };
    let device = match Cuda::new(0, Dtype::Bf16) {
        Ok(device) => device,
        Err(error) => {
            eprintln!("skipped: {error}");
            return Ok(());
        }
    };
    let config = ModelConfig::from_file(format!("{folder}/config.json"))?;
    let weights = RandomTensors::new(&config, 0)?;
    let model = Arc::new(Decoder::load(device, config, &weights)?);
    for batch in batches.split(',') {
        let batch = batch.parse()?;
        // The first run loads what the device loads when it first needs it.
        run(&model, batch, true)?;
        for arrives in [false, true, false, true] {
            let name = if arrives { "arrivals" } else { "at once" };
            println!("{batch} {name} {}", run(&model, batch, arrives)?);
        }
    }
    Ok(())
}

/// Runs `4 * batch` requests or 64, of which `batch` run at a time on average, or groups of so many at once.
fn run(model: &Arc<Decoder<Cuda>>, batch: usize, arrives: bool) -> Result<Value> {
    let plan = Plan::full(model.shape())?;
    let mut random = SplitMix64::new(batch as u64);
    let mut engine = Engine::new(Arc::clone(model), EngineOptions::default());
    let (mut left, vocab) = ((4 * batch).max(64), model.config().vocab_size);
    let mean = (NEW_TOKENS[0] + NEW_TOKENS[1]) / 2;
    let (mut steps, mut tokens, mut reads) = (Vec::new(), 0, Duration::ZERO);
    let begin = Instant::now();
    while left > 0 || !engine.is_idle() {
        let come = match arrives {
            true => usize::from(random.below(mean) < batch || engine.is_idle()),
            false if engine.is_idle() => batch,
            false => 0,
        };
        for _ in 0..come.min(left) {
            left -= 1;
            let mut between = |[least, most]: [usize; 2]| least + random.below(most - least + 1);
            let (prompt, new) = (between(PROMPT), between(NEW_TOKENS));
            let prompt: Vec<u32> = (0..prompt).map(|_| random.below(vocab) as u32).collect();
            let max_new_tokens = if arrives { new } else { mean };
            let eos_token_ids = Some(Vec::new());
            let options =
                GenerateOptions { max_new_tokens, eos_token_ids, ..GenerateOptions::default() };
            engine.submit(prompt, &plan, options);
        }
        engine.step()?;
        while engine.poll().is_some() {}
        let usage = engine.take_usage();
        tokens += usage.decoded_tokens;
        reads += usage.prefill;
        if !usage.decode.is_zero() {
            steps.push(usage.decode.as_secs_f64() * 1e3);
        }
    }
    let seconds = begin.elapsed().as_secs_f64();
    steps.sort_by(f64::total_cmp);
    let at = |share: f64| steps[((steps.len() - 1) as f64 * share) as usize];
    let all: f64 = steps.iter().sum();
    Ok(json!({
        "steps": steps.len(),
        "requests_a_step": tokens as f64 / steps.len() as f64,
        "mean_ms": all / steps.len() as f64,
        "median_ms": at(0.5),
        "p90_ms": at(0.9),
        "most_ms": at(1.0),
        "decode_seconds": all / 1e3,
        "recordings": engine.recordings(),
        "read_seconds": reads.as_secs_f64(),
        "seconds": seconds,
    }))
}
