use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use moa_core::{BlockType, DEFAULT_SINK, Plan, SparseAttentionBackend};
use moa_models::{
    Backward, BenchOptions, BenchReport, Decoder, Math, ModelConfig, OpenOptions,
    ProfileBenchReport, RandomTensors, Shard, Tensors,
};
use serde::Serialize;

use crate::args::{parse_count, parse_density};
use crate::error::{Error, Result};
use crate::model::{self, on_device};
use crate::output::{Context, bytes, percent, table};
use crate::progress::Progress;

/// Measure speed and memory: prefill, first token, decode, by context and batch, dense and plan
///
/// A prompt of random tokens is read, its sequence is copied to the whole batch, and tokens are decoded
/// greedily. GB/s are the bytes that a step has to read, weights and visible keys and values, over the
/// median time of a step.
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Examples:\n  moa bench --model assets/moa-tiny --plan plan.json --prompts 1024,4096\n  moa bench --device cuda --config config.json --random-weights 0 --uniform 0.5 --prompts 3072 --new-tokens 1024 --batches 1,8,max"
)]
pub(crate) struct Args {
    #[command(flatten)]
    source: SourceArgs,
    /// Plan file; dense attention is measured too
    #[arg(long, value_name = "FILE", conflicts_with = "uniform")]
    plan: Option<PathBuf>,
    /// Every head sees the sink and a window, together this share of the context
    #[arg(long, value_name = "DENSITY", value_parser = parse_density)]
    uniform: Option<f64>,
    /// Leave dense attention out, beside --plan or --uniform
    #[arg(long)]
    no_dense: bool,
    /// Read the weights into memory instead of mapping their files
    #[arg(long, conflicts_with_all = ["config", "random_weights"])]
    no_mmap: bool,
    /// Seed of random weights made on the device, in place of those of a model
    #[arg(long, value_name = "SEED", requires = "config")]
    random_weights: Option<u32>,
    /// Random matrices lie in quantised blocks, as GGUF has them: q4_0, q4_1, q5_0, q5_1, q8_0, q4_k, q5_k or q6_k
    #[arg(long, value_name = "TYPE", conflicts_with = "model")]
    blocks: Option<BlockType>,
    /// Tokens of each prompt; several lengths are measured one after another
    #[arg(long, default_value = "1024", value_delimiter = ',', value_name = "TOKENS,..", value_parser = parse_count)]
    prompts: Vec<usize>,
    /// Sequences that decode together; `max` for as many as the memory of the device holds
    #[arg(long, default_value = "1", value_delimiter = ',', value_name = "N,..|max")]
    batches: Vec<Batch>,
    /// Tokens to decode, at least 6, of which the first 5 are not timed; caches are as large as prompt and new tokens
    /// need
    #[arg(long, default_value_t = 64, value_name = "N", value_parser = parse_count)]
    new_tokens: usize,
    /// Time only so many steps, in the middle of the new tokens [default: all of them]
    #[arg(long, value_name = "N", value_parser = parse_count)]
    steps: Option<usize>,
    /// Prompt tokens per forward step
    #[arg(long, default_value_t = 2048, value_name = "N", value_parser = parse_count)]
    prefill_chunk: usize,
    /// Measure profiling one item as long as each prompt, in place of generation
    #[arg(long, conflicts_with_all = ["plan", "uniform", "no_dense"])]
    profile: bool,
}

#[derive(Debug, clap::Args)]
#[group(required = true, multiple = false)]
struct SourceArgs {
    /// Model folder (config.json and *.safetensors), a GGUF file, or a model of the hub
    #[arg(
        long,
        value_name = "DIR|FILE.gguf|OWNER/NAME[/FILE.gguf][@REVISION]",
        conflicts_with = "random_weights"
    )]
    model: Option<PathBuf>,
    /// config.json of a model whose weights are made up
    #[arg(long, value_name = "FILE", requires = "random_weights")]
    config: Option<PathBuf>,
}

/// How many sequences decode together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Batch {
    Of(usize),
    Largest,
}

impl FromStr for Batch {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        match text {
            "max" => Ok(Self::Largest),
            number => parse_count(number).map(Self::Of),
        }
    }
}

pub(crate) fn run(args: &Args, context: &Context) -> Result<()> {
    if args.no_dense && args.plan.is_none() && args.uniform.is_none() {
        return Err(Error::argument("--no-dense", "given with --plan or --uniform", "neither"));
    }
    if args.profile {
        model::check_gradients(context)?;
        context.check_one_device("--device with --profile")?;
    }
    #[cfg(feature = "cuda")]
    if let crate::args::Device::CudaGroup(gpus) = context.device {
        let source = match (&args.source.model, &args.source.config) {
            (Some(model), _) => model::folder(model, context)?,
            (None, config) => config.clone().unwrap_or_default(),
        };
        let config = ModelConfig::from_file(source)?;
        let length = args.prompts.iter().max().unwrap_or(&0).saturating_add(args.new_tokens);
        return gpus.run(
            &config,
            args.plan.as_deref(),
            length,
            context,
            |device, shard, context| with_ops(args, device, Some(shard), context),
        );
    }
    on_device!(context, |device| with_ops(args, device, None, context))
}

fn with_ops<D: Backward>(
    args: &Args,
    device: D,
    shard: Option<Shard<D>>,
    context: &Context,
) -> Result<()> {
    let (config, weights): (_, Box<dyn Tensors>) =
        match (&args.source.model, &args.source.config, args.random_weights) {
            (Some(model), ..) => {
                let folder = model::folder(model, context)?;
                (
                    ModelConfig::from_file(&folder)?,
                    OpenOptions::default().mmap(!args.no_mmap).open_tensors(&folder)?,
                )
            }
            (_, Some(config), Some(seed)) => {
                let config = ModelConfig::from_file(config)?;
                let weights = match args.blocks {
                    Some(blocks) => RandomTensors::in_blocks(&config, seed, blocks)?,
                    None => RandomTensors::new(&config, seed)?,
                };
                (config, Box::new(weights))
            }
            _ => {
                return Err(Error::argument(
                    "model",
                    "--model, or --config and --random-weights",
                    "none",
                ));
            }
        };
    let model = match shard {
        Some(shard) => Decoder::load_shard(device, config, &*weights, shard)?,
        None => Decoder::load(device, config, &*weights)?,
    };
    model.all_loaded()?;
    if args.profile {
        return profile(args, &model, context);
    }
    let mut plans: Vec<(String, Plan)> = Vec::new();
    if !args.no_dense {
        plans.push(("dense".into(), Plan::full(model.shape())?));
    }
    if let Some(path) = &args.plan {
        let plan = Plan::load(path)?;
        let shape = plan.check_shape(&model.shape());
        shape.map_err(|e| Error::from(e).at(path.display().to_string()))?;
        plans.push((path.display().to_string(), plan));
    }
    if let Some(density) = args.uniform {
        let plan = model::uniform(model.shape(), DEFAULT_SINK, density)?;
        plans.push((format!("uniform {density}"), plan));
    }
    let total = plans.len() * args.prompts.len() * args.batches.len();
    let bar = Progress::new(context, "bench", total);
    let mut measurements = Vec::new();
    for &prompt in &args.prompts {
        for (name, plan) in &plans {
            for &batch in &args.batches {
                let options = BenchOptions {
                    prompt,
                    new_tokens: args.new_tokens,
                    steps: args.steps,
                    batch: 1,
                    prefill_chunk: args.prefill_chunk,
                    seed: context.seed,
                };
                let report =
                    measure(&model, plan, batch, &options).map_err(|error| match error {
                        Error::Model(moa_models::Error::Invalid { what: "new tokens", .. }) => {
                            error.at(if args.steps.is_some() {
                                "--new-tokens, --steps"
                            } else {
                                "--new-tokens"
                            })
                        }
                        Error::Model(moa_models::Error::ContextExceeded { .. }) => {
                            error.at("--prompts, --new-tokens")
                        }
                        error => error,
                    })?;
                measurements.push(Measurement { plan: name.clone(), report });
                bar.step();
            }
        }
    }
    drop(bar);
    context.result(&Outcome::new(&model, Measured::Measurements(measurements)))
}

/// Profiles one item of each length.
fn profile<D: Backward>(args: &Args, model: &Decoder<D>, context: &Context) -> Result<()> {
    let bar = Progress::new(context, "bench", args.prompts.len());
    let mut profiles = Vec::new();
    for &tokens in &args.prompts {
        let profile = model.bench_profile(tokens, context.seed);
        profiles.push(profile.map_err(|error| Error::from(error).at("--prompts"))?);
        bar.step();
    }
    drop(bar);
    context.result(&Outcome::new(model, Measured::Profiles(profiles)))
}

/// What was measured of a model.
#[derive(Debug, Serialize)]
struct Outcome {
    device: &'static str,
    layers: usize,
    parameters: u64,
    ranks: usize,
    #[serde(flatten)]
    measured: Measured,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "snake_case")]
enum Measured {
    Measurements(Vec<Measurement>),
    Profiles(Vec<ProfileBenchReport>),
}

/// Generation with one plan.
#[derive(Debug, Serialize)]
struct Measurement {
    plan: String,
    #[serde(flatten)]
    report: BenchReport,
}

impl Outcome {
    fn new<D: Math>(model: &Decoder<D>, measured: Measured) -> Self {
        Self {
            device: model.device().attention().name(),
            layers: model.config().num_hidden_layers,
            parameters: model.config().parameters(),
            ranks: model.ranks(),
            measured,
        }
    }
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let peak = |peak: Option<u64>| peak.map_or_else(|| "-".to_string(), bytes);
        let text = match &self.measured {
            Measured::Measurements(measurements) => {
                let row = |Measurement { plan, report }: &Measurement| {
                    vec![
                        plan.clone(),
                        report.prompt.to_string(),
                        report.batch.to_string(),
                        format!("{:.3} s", report.first_token_seconds),
                        format!("{:.0}", report.prefill_tokens_per_second),
                        format!("{:.1}", report.decode_tokens_per_second),
                        format!("{:.3}", report.step_seconds * 1e3),
                        format!("{:.0}", report.step_bytes_per_second / 1e9),
                        bytes(report.kv_bytes),
                        percent(report.kv_bytes as f64 / report.kv_bytes_dense.max(1) as f64),
                        peak(report.peak_bytes),
                    ]
                };
                table(&HEAD, &measurements.iter().map(row).collect::<Vec<_>>())
            }
            Measured::Profiles(profiles) => {
                let row = |of: &ProfileBenchReport| {
                    let seconds = format!("{:.3} s", of.seconds);
                    vec![of.tokens.to_string(), seconds, peak(of.peak_bytes)]
                };
                let rows: Vec<_> = profiles.iter().map(row).collect();
                table(&["tokens", "profiling an item", "peak"], &rows)
            }
        };
        f.write_str(&text)
    }
}

fn measure<D: Math>(
    model: &Decoder<D>,
    plan: &Plan,
    batch: Batch,
    options: &BenchOptions,
) -> Result<BenchReport> {
    match batch {
        Batch::Of(batch) => Ok(model.bench(plan, &BenchOptions { batch, ..*options })?),
        Batch::Largest => {
            let missing = || Error::argument("--batches", "numbers on this device", "max");
            model.bench_largest(plan, options)?.ok_or_else(missing)
        }
    }
}

const HEAD: [&str; 11] = [
    "cache",
    "prompt",
    "batch",
    "first token",
    "prefill tok/s",
    "decode tok/s",
    "ms/step",
    "GB/s",
    "KV bytes",
    "of dense",
    "peak",
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn batches_are_counts_or_the_largest() {
        assert_eq!("max".parse::<Batch>().unwrap(), Batch::Largest);
        assert_eq!("8".parse::<Batch>().unwrap(), Batch::Of(8));
        for text in ["0", "-1", "all", ""] {
            assert!(text.parse::<Batch>().is_err(), "{text}");
        }
    }
}
