//! `candle-llama`: prefill and decode of candle's Llama and of moa, dense and with a plan, in one
//! process on the same token ids, in f32 on the CPU.
//!
//! ```text
//! cargo run --release -- --model ../../../assets/moa-tiny --tokens 4096 --decode 32 --repeat 3
//! ```
//!
//! Prints one JSON object: per engine the fastest of the repetitions, in which the engines take
//! turns, and moa's time for one profiling item against its forward pass. `argmax` and `max_logit`
//! describe the prefill's last logits: candle's and moa's dense ones must agree.
//!
//! candle allocates every intermediate afresh: with glibc, about half of its processor time at 4096
//! tokens is page faults, which `MALLOC_MMAP_THRESHOLD_=8589934592` and
//! `MALLOC_TRIM_THRESHOLD_=17179869184` in the environment avoid. Its own kernels are compiled for the
//! target named at build time (`RUSTFLAGS="-C target-cpu=native"`); its `gemm` gets AVX-512 here, as
//! moa's does.

mod candle;
mod checkpoint;
mod moa;

use std::path::PathBuf;

use clap::Parser;

/// Times candle's Llama on a checkpoint folder.
#[derive(Parser)]
struct Args {
    /// Folder with `config.json` and safetensors, single or sharded.
    #[arg(long)]
    model: PathBuf,
    /// Length of the prompt, prefilled in one call.
    #[arg(long, default_value_t = 1024, value_parser = clap::value_parser!(u32).range(32..))]
    tokens: u32,
    /// Decode steps of one token after the prompt.
    #[arg(long, default_value_t = 32)]
    decode: u32,
    /// Plan to run besides dense attention; else a uniform window of a quarter of the context.
    #[arg(long)]
    plan: Option<PathBuf>,
    /// Leave candle out, to time moa alone.
    #[arg(long)]
    no_candle: bool,
    /// Repetitions; the fastest of each time is printed.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..))]
    repeat: u32,
}

/// What one engine did with one prompt.
struct Run {
    prefill_seconds: f64,
    decode_seconds: f64,
    argmax: u32,
    max_logit: f32,
}

impl Run {
    /// The faster time of each part; the logits are those of `self`.
    fn best(self, other: &Self) -> Self {
        Self {
            prefill_seconds: self.prefill_seconds.min(other.prefill_seconds),
            decode_seconds: self.decode_seconds.min(other.decode_seconds),
            ..self
        }
    }
}

impl Run {
    fn report(&self, tokens: usize, decode: usize) -> serde_json::Value {
        serde_json::json!({
            "prefill_seconds": self.prefill_seconds,
            "prefill_tok_s": tokens as f64 / self.prefill_seconds,
            "decode_tok_s": (decode > 0).then(|| decode as f64 / self.decode_seconds),
            "argmax": self.argmax,
            "max_logit": self.max_logit,
        })
    }
}

/// Token ids of the prompt: position `i` holds `(i * 7919) % vocab`.
fn prompt(tokens: usize, vocab: usize) -> Vec<u32> {
    (0..tokens).map(|i| ((i * 7919) % vocab) as u32).collect()
}

fn main() -> candle_core::Result<()> {
    let args = Args::parse();
    let (tokens, decode) = (args.tokens as usize, args.decode as usize);
    let llama = candle::CandleLlama::open(&args.model)?;
    let moa = moa::Moa::open(&args.model, args.plan.as_deref())?;
    // moa hands work over faster from inside the pool; its documentation says to do so.
    let pool = rayon::ThreadPoolBuilder::new().build().map_err(candle_core::Error::wrap)?;

    // Engines take turns inside this loop, so that a busy machine slows all of them.
    let mut best: [Option<Run>; 3] = [None, None, None];
    for _ in 0..args.repeat {
        let runs = [
            if args.no_candle { None } else { Some(candle::run_candle(&llama, tokens, decode)?) },
            Some(pool.install(|| moa.run(tokens, decode, false))?),
            Some(pool.install(|| moa.run(tokens, decode, true))?),
        ];
        for (best, run) in best.iter_mut().zip(runs) {
            *best = match (best.take(), run) {
                (Some(old), Some(new)) => Some(old.best(&new)),
                (old, new) => new.or(old),
            };
        }
    }
    let [candle, dense, plan] = best.map(|run| run.map(|run| run.report(tokens, decode)));
    let report = serde_json::json!({
        "tokens": tokens,
        "decode": decode,
        "threads": candle_core::utils::get_num_threads(),
        "density": moa.density(tokens + decode),
        "candle": candle,
        "moa_dense": dense,
        "moa_plan": plan,
        "moa_profile": pool.install(|| moa.profile(tokens))?,
    });
    println!("{report:#}");
    Ok(())
}
