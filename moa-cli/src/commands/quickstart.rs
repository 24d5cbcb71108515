use std::fmt;
use std::path::{Path, PathBuf};
use std::time::Instant;

use moa_core::{DEFAULT_SINK, Plan};
use moa_models::{
    Backward, CalibrationData, Checkpoint, CompressOptions, Compressed, Math, RetrievalCase,
    compress,
};
use moa_report::{HeadMap, PlanSummary, figure};
use serde::Serialize;

use super::eval::Scores;
use crate::args::{ModelArg, parse_count, parse_density, parse_size};
use crate::calibration;
use crate::compressed::Losses;
use crate::error::{Error, Result};
use crate::files::{OutputFolder, is_same};
use crate::model::{self, on_device};
use crate::output::{Context, shown, table, value_of};
use crate::progress::Progress;

/// From a checkpoint to a plan to answers, on a small model, in a minute or two
#[derive(Debug, clap::Args)]
#[command(after_help = "Example:\n  moa quickstart --out moa-quickstart")]
pub(crate) struct Args {
    /// Model folder, or a model of the hub [default: assets/moa-tiny of this project]
    #[arg(long, value_name = "DIR|OWNER/NAME[@REVISION]")]
    model: Option<PathBuf>,
    /// Folder for plan.json, profile.safetensors, heads.svg and results.json
    #[arg(long, default_value = "moa-quickstart", value_name = "DIR")]
    out: PathBuf,
    /// Largest mean share of the context that heads keep
    #[arg(long, default_value = "0.25", value_parser = parse_density)]
    density: f64,
    /// Lengths to profile
    #[arg(long, default_value = "1024,2048", value_delimiter = ',', value_name = "TOKENS,..", value_parser = parse_count)]
    lengths: Vec<usize>,
    /// Calibration items per length
    #[arg(long, default_value_t = 6, value_name = "N", value_parser = parse_count)]
    samples: usize,
    /// Plans to measure while refining
    #[arg(long, default_value_t = 40, value_name = "N", value_parser = parse_size)]
    evaluations: usize,
    /// Tokens of a held-out question with its answer
    #[arg(long, default_value_t = 4096, value_name = "TOKENS", value_parser = parse_count)]
    length: usize,
    /// Held-out questions
    #[arg(long, default_value_t = 16, value_name = "N", value_parser = parse_count)]
    questions: usize,
}

const ANSWER_TOKENS: usize = 32;
/// Below this a question holds no record worth asking about.
const SHORTEST: usize = 256;

pub(crate) fn run(args: &Args, context: &Context) -> Result<()> {
    model::check_gradients(context)?;
    on_device!(context, |device| with_ops(args, device, context))
}

fn with_ops<D: Backward>(args: &Args, device: D, context: &Context) -> Result<()> {
    let begin = Instant::now();
    if args.length < SHORTEST {
        return Err(Error::argument(
            "--length",
            format!("at least {SHORTEST} tokens"),
            args.length,
        ));
    }
    let model_path = match &args.model {
        Some(path) => path.clone(),
        None => tiny_model()?,
    };
    let mut folder = OutputFolder::create(&args.out)?;
    if is_same(&model_path, &args.out) {
        return Err(Error::argument(
            "--out",
            "another folder than the model's",
            args.out.display(),
        ));
    }
    let of = ModelArg { model: model_path, ignore_extra_tensors: false, no_mmap: false };
    let model = model::open(device, &of, context)?;
    let limit = model.model.config().context_length();
    if args.length > limit {
        let error = moa_models::Error::ContextExceeded { asked: args.length, limit };
        return Err(Error::from(error).at("--length"));
    }
    let shape = model.model.shape();
    context.print(format_args!("Model: {} ({shape})", of.model.display()))?;

    let found = find_plan(args, &model, context)?;
    let mut lengths = args.lengths.clone();
    lengths.push(args.length);
    lengths.sort_unstable();
    lengths.dedup();
    let summary = PlanSummary::new(
        &found.plan,
        &lengths,
        context.cache.slot_bytes(found.plan.shape().head_dim),
    );
    let maps = summary.maps();
    let losses = Losses::from(&found);
    context.print(format_args!("{losses}\n"))?;
    context.print(HeadMap::draw(&maps))?;

    context.print(format_args!(
        "\n{} held-out questions of {} tokens, answered with three caches:",
        args.questions, args.length
    ))?;
    let cases = model.held_out_cases(args.length, ANSWER_TOKENS, args.questions, context.seed)?;
    let results = answer(&model, &found.plan, &cases, context)?;

    folder.add("plan.json", found.plan.to_file_json()?.into_bytes());
    folder.add("profile.safetensors", found.profile.to_bytes()?);
    let title = format!("Span of each KV head at density {}", args.density);
    let figure = figure::head_map(&title, &[("", maps)]);
    folder.add("heads.svg", figure.svg().into_bytes());
    let seconds = begin.elapsed().as_secs_f64();
    let outcome =
        Outcome { model: &of.model, out: &args.out, losses, plan: summary, results, seconds };
    folder.add("results.json", format!("{:#}\n", value_of(&outcome)?).into_bytes());
    folder.write(|_| Ok(Vec::new()))?;
    context.result(&outcome)
}

/// All that the quickstart found, as `results.json` holds it.
#[derive(Debug, Serialize)]
struct Outcome<'a> {
    #[serde(serialize_with = "shown")]
    model: &'a Path,
    #[serde(serialize_with = "shown")]
    out: &'a Path,
    losses: Losses,
    plan: PlanSummary,
    results: Vec<OfCache>,
    seconds: f64,
}

/// Answers to the held-out questions with one kind of cache.
#[derive(Debug, Serialize)]
struct OfCache {
    cache: &'static str,
    #[serde(flatten)]
    scores: Scores,
}

/// The last line alone: the others were written when they were known.
impl fmt::Display for Outcome<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "\nplan.json, profile.safetensors, heads.svg and results.json are in {} ({:.0} s)",
            self.out.display(),
            self.seconds
        )
    }
}

fn find_plan<D: Backward>(
    args: &Args,
    model: &Checkpoint<D>,
    context: &Context,
) -> Result<Compressed> {
    let options = CompressOptions {
        density: args.density,
        lengths: args.lengths.clone(),
        samples: args.samples,
        validation_samples: 4,
        // What is shown is retrieval, in a minute.
        text_samples: 0,
        evaluations: Some(args.evaluations),
        seed: context.seed,
        ..CompressOptions::default()
    };
    context.print(format_args!(
        "Profiling at {:?} tokens, searching at density {}, measuring at {} ...",
        args.lengths,
        args.density,
        options.validation_length(model.model.config().context_length()),
    ))?;
    let mut bar = Progress::of_stages(context);
    compress(model, &CalibrationData::Records, &options, &mut bar)
        .map_err(|error| calibration::by_flag(error, &[("--lengths", &args.lengths)]))
}

/// Answers the questions with the dense cache, a uniform window of the plan's bytes, and the plan.
fn answer<D: Math>(
    model: &Checkpoint<D>,
    plan: &Plan,
    cases: &[RetrievalCase],
    context: &Context,
) -> Result<Vec<OfCache>> {
    let shape = model.model.shape();
    let ask = |plan: &Plan| {
        let mut bar = Progress::new(context, "evaluate", cases.len());
        model.retrieval(cases, plan, ANSWER_TOKENS, &mut bar)
    };
    let dense = ask(&Plan::full(shape)?)?;
    let planned = ask(plan)?;
    // As dense as the plan was at the lengths of these very questions.
    let uniform = ask(&model::uniform(shape, DEFAULT_SINK, planned.density)?)?;
    let reports = [("dense", &dense), ("uniform window", &uniform), ("plan", &planned)];
    let results = reports.map(|(cache, report)| OfCache { cache, scores: Scores::from(report) });
    let rows: Vec<_> = results.iter().map(|of| of.scores.row(of.cache)).collect();
    context.print(table(&Scores::HEAD, &rows))?;
    Ok(results.into())
}

/// `assets/moa-tiny` in the current folder or one above it, else beside this crate's sources.
fn tiny_model() -> Result<PathBuf> {
    const NAME: &str = "assets/moa-tiny";
    let here = std::env::current_dir()
        .map_err(|source| Error::Read { path: PathBuf::from("."), source })?;
    let sources = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut looked = sources.join("..").join(NAME);
    for folder in here.ancestors() {
        let path = folder.join(NAME);
        if path.join("config.json").is_file() {
            // Short where the command is run from the project's folder, as it should be.
            return Ok(path.strip_prefix(&here).map_or(path.clone(), Path::to_path_buf));
        }
    }
    if looked.join("config.json").is_file() {
        return Ok(looked);
    }
    looked = here.join(NAME);
    Err(Error::NoTinyModel { looked })
}
