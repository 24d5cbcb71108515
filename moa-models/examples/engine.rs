//! What an engine adds to the steps of a batch: requests that all come at once, as a server has them at its largest
//! load, against steps of a session that decodes as many sequences (`moa bench`).
//!
//! ```sh
//! cargo run --release -p moa-models --example engine -- [options] assets/moa-tiny
//! ```
//! `--requests 128` of `--prompt 64` random tokens get `--tokens 448` each, at most `--batch 64` together; `--uniform 0.25`
//! sees a share of the context, `--random` makes weights up, `--cuda` runs on a GPU (feature `cuda`). Requests are run
//! as tokens alone and as text; with `--drawn` also where all draw alike, and where each draws by options of its own.

mod measured;

use std::sync::Arc;
use std::time::{Duration, Instant};

use measured::{Measure, Model};
use moa_core::{Plan, SplitMix64};
use moa_models::{
    BenchOptions, Checkpoint, Engine, EngineOptions, Event, GenerateOptions, Math, Result,
    SamplingOptions,
};

struct Options {
    requests: usize,
    prompt: usize,
    tokens: usize,
    batch: usize,
    model: Model,
    drawn: bool,
    folder: String,
}

/// What requests are.
#[derive(Clone, Copy, Debug)]
enum Kind {
    Tokens,
    Text,
    /// Drawn by the same options.
    Alike,
    /// Each by its own.
    Mixed,
}

/// Steps after which a batch that has changed is recorded, where a device records steps.
const CHANGED: usize = 4;

/// Steps of one kind.
#[derive(Default)]
struct Steps(Vec<f64>);

impl Steps {
    fn push(&mut self, time: Duration) {
        self.0.push(time.as_secs_f64());
    }

    fn told(&mut self) -> String {
        self.0.sort_by(f64::total_cmp);
        let median = self.0.get(self.0.len() / 2).copied().unwrap_or(0.0);
        let all = self.0.iter().sum::<f64>();
        format!("{:4} of {:6.3} ms, {all:5.3} s", self.0.len(), 1e3 * median)
    }
}

fn main() -> Result<()> {
    let mut arguments = std::env::args().skip(1);
    let mut options = Options {
        requests: 128,
        prompt: 64,
        tokens: 448,
        batch: 64,
        model: Model::default(),
        drawn: false,
        folder: "assets/moa-tiny".into(),
    };
    while let Some(argument) = arguments.next() {
        let mut number = || arguments.next().and_then(|number| number.parse::<f64>().ok());
        let count = |number: Option<f64>, default| number.map_or(default, |number| number as usize);
        match argument.as_str() {
            "--drawn" => options.drawn = true,
            "--requests" => options.requests = count(number(), options.requests),
            "--prompt" => options.prompt = count(number(), options.prompt),
            "--tokens" => options.tokens = count(number(), options.tokens),
            "--batch" => options.batch = count(number(), options.batch),
            _ if options.model.takes(&argument, &mut number) => {}
            _ => options.folder = argument,
        }
    }
    options.model.measure(&options.folder, &options)
}

impl Measure for Options {
    fn measure<D: Math>(&self, checkpoint: Checkpoint<D>) -> Result<()> {
        measure(&checkpoint, self)
    }
}

fn measure<D: Math>(checkpoint: &Checkpoint<D>, options: &Options) -> Result<()> {
    let plan = options.model.plan(checkpoint.model.shape())?;
    let bench = checkpoint.model.bench(
        &plan,
        &BenchOptions {
            prompt: options.prompt,
            new_tokens: options.tokens,
            batch: options.batch,
            ..BenchOptions::default()
        },
    )?;
    println!(
        "session: {:.0} tokens/s, {:.3} ms a step",
        bench.decode_tokens_per_second,
        1e3 * bench.step_seconds
    );
    let engine = EngineOptions { max_batch: options.batch, ..EngineOptions::default() };
    let kinds = [Kind::Tokens, Kind::Text, Kind::Alike, Kind::Mixed];
    for kind in &kinds[..if options.drawn { 4 } else { 2 }] {
        let engine = match kind {
            Kind::Tokens => Engine::new(Arc::clone(&checkpoint.model), engine),
            _ => checkpoint.engine(engine),
        };
        let rate = run(checkpoint, engine, &plan, *kind, options)?;
        println!("  {:.2} of the session", rate / bench.decode_tokens_per_second);
    }
    Ok(())
}

/// Tokens a second of all requests.
fn run<D: Math>(
    checkpoint: &Checkpoint<D>,
    mut engine: Engine<D>,
    plan: &Plan,
    kind: Kind,
    options: &Options,
) -> Result<f64> {
    let vocab = checkpoint.model.config().vocab_size;
    let mut random = SplitMix64::new(1);
    for request in 0..options.requests {
        let prompt: Vec<u32> = (0..options.prompt).map(|_| random.below(vocab) as u32).collect();
        let warm = SamplingOptions {
            temperature: 0.8,
            top_p: 0.95,
            seed: request as u64,
            ..SamplingOptions::default()
        };
        let sampling = match kind {
            Kind::Tokens | Kind::Text => SamplingOptions::default(),
            Kind::Alike => warm,
            Kind::Mixed => SamplingOptions {
                temperature: [0.0, 0.7, 1.0][request % 3],
                top_k: (request % 2 == 1).then_some(40),
                top_p: 0.9 + 0.02 * (request % 5) as f32,
                ..warm
            },
        };
        let how = GenerateOptions {
            max_new_tokens: options.tokens,
            eos_token_ids: Some(Vec::new()),
            sampling,
            ..GenerateOptions::default()
        };
        engine.submit(prompt, plan, how);
    }
    let [mut reading, mut changed, mut steady, mut between] = [(); 4].map(|()| Steps::default());
    let (begin, mut tokens, mut last) = (Instant::now(), 0, Instant::now());
    let mut since_change = 0;
    loop {
        between.push(last.elapsed());
        let step = Instant::now();
        let Some(first) = engine.step()? else { break };
        let time = step.elapsed();
        last = Instant::now();
        let (mut reads, mut ends) = (false, false);
        let rest = std::iter::from_fn(|| engine.poll());
        for event in std::iter::once(first).chain(rest) {
            match event {
                Event::Prefill { .. } => reads = true,
                Event::Token { .. } => tokens += 1,
                Event::Done { .. } => ends = true,
                Event::Failed { error, .. } => return Err(error),
                _ => {}
            }
        }
        let steps = match (reads, since_change < CHANGED) {
            (true, _) => &mut reading,
            (false, true) => &mut changed,
            (false, false) => &mut steady,
        };
        steps.push(time);
        since_change = if reads || ends { 0 } else { since_change + 1 };
    }
    let rate = tokens as f64 / begin.elapsed().as_secs_f64();
    println!("{kind:?}: {rate:.0} tokens/s with prompts");
    println!("  steps that read       {}", reading.told());
    println!("  first after a change  {}", changed.told());
    println!("  others                {}", steady.told());
    println!("  between steps         {}", between.told());
    Ok(rate)
}
