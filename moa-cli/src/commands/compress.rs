use std::fmt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use moa_core::Profile;
use moa_models::{
    Backward, CacheTypes, CalibrationData, Checkpoint, CompressOptions, HeldOut, compress,
    compress_profile,
};
use moa_report::{PlanSummary, lengths_of};
use serde::Serialize;

use super::search::SolverArgs;
use crate::args::{DataArg, ModelArg, ObjectiveArgs, SpanArgs, parse_count, parse_size};
use crate::budget::BudgetArgs;
use crate::calibration;
use crate::compressed::{self, Losses};
use crate::error::Result;
use crate::files::Files;
use crate::model::{self, on_model};
use crate::output::{Context, shown};
use crate::progress::{Progress, StageSeconds};
use crate::style::StyleArgs;

/// Find a plan in one step: profile, search, validate and refine
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Examples:\n  moa compress --model assets/moa-tiny --kv-bytes 25% --out plan.json\n  moa compress --model assets/moa-tiny --kv-bytes 4096:3MiB --out plan.json\n  moa compress --model assets/moa-tiny --density 0.25 --out plan.json\n  moa compress --model assets/moa-tiny --kv-bytes 6% --cache-dtype auto --out plan.json"
)]
pub(crate) struct Args {
    #[command(flatten)]
    model: ModelArg,
    #[command(flatten)]
    style: StyleArgs,
    #[command(flatten)]
    data: DataArg,
    #[command(flatten)]
    budget: BudgetArgs,
    /// Lengths to profile, prompt and response together
    #[arg(long, default_value = "1024,2048", value_delimiter = ',', value_name = "TOKENS,..", value_parser = parse_count)]
    lengths: Vec<usize>,
    #[command(flatten)]
    objective: ObjectiveArgs,
    #[command(flatten)]
    span: SpanArgs,
    /// Calibration items of the shortest length; half as many of longer ones
    #[arg(long, default_value_t = 12, value_name = "N", value_parser = parse_count)]
    samples: usize,
    /// Most tokens of a response that the dense model writes, and tokens to predict at the end of a window of
    /// running text
    #[arg(long, default_value_t = 48, value_name = "TOKENS", value_parser = parse_count)]
    max_response: usize,
    /// Length at which plans compete [default: twice the longest profiled length, as far as the
    /// model's context reaches]
    #[arg(long, value_name = "TOKENS", value_parser = parse_count)]
    validation_length: Option<usize>,
    /// Contexts on which plans compete, half as many of the longer length; where all have several questions, half
    /// of these numbers
    #[arg(long, default_value_t = 8, value_name = "N", value_parser = parse_count)]
    validation_samples: usize,
    /// Running texts of the shortest length whose predictions plans should leave as they are, and as many
    /// tokens of other lengths; 0 leaves text out
    #[arg(long, default_value_t = 4, value_name = "N", value_parser = parse_size)]
    text_samples: usize,
    /// How much the divergence on text counts, beside the loss of responses [default: as much as keeps it
    /// at that of a uniform window of the same size]
    #[arg(long, value_name = "WEIGHT")]
    text_weight: Option<f64>,
    /// Plans to measure while refining, single heads included, beside those that the search found, the limit of text and
    /// dense attention; 0 takes the best searched plan. Up to half as many more are measured where held-out text suffers
    /// more than it may, and all of that twice with `--cache-dtype auto` [default: 100 and six for each KV head, and as many again where `--minutes` says so]
    #[arg(long, value_name = "N", value_parser = parse_size)]
    evaluations: Option<usize>,
    /// Minutes that everything may take, the model's loading left out: after calibration, profile and the first plans,
    /// which are made in any case, as many plans are measured as there is expected to be time for, so that a slow machine
    /// may find another plan than a fast one. Where time is left and the plan loses responses, it is refined further on
    /// three times as many other contexts and texts, and so on until that finds no other plan [default: 15, and no limit
    /// with `--evaluations`]
    #[arg(long, value_name = "MINUTES", value_parser = parse_minutes)]
    minutes: Option<Duration>,
    #[command(flatten)]
    solver: SolverArgs,
    /// A profile of `moa compress --save-profile` or `moa profile` to start from, at its lengths
    #[arg(long, value_name = "FILE",
          conflicts_with_all = ["lengths", "samples", "objective", "token_weight", "save_profile"])]
    profile: Option<PathBuf>,
    /// Profile to write as well
    #[arg(long, value_name = "FILE")]
    save_profile: Option<PathBuf>,
    /// Plan to write
    #[arg(long, value_name = "FILE")]
    out: PathBuf,
}

/// The time that a plan is found in where nothing else is asked for.
const USUAL: Duration = Duration::from_secs(15 * 60);

fn parse_minutes(text: &str) -> std::result::Result<Duration, String> {
    let minutes: f64 = text.parse().map_err(|_| "not a number".to_string())?;
    let limit = Duration::try_from_secs_f64(60.0 * minutes).ok().filter(|limit| !limit.is_zero());
    limit.ok_or_else(|| "not a time above 0".to_string())
}

pub(crate) fn run(args: &Args, context: &Context) -> Result<()> {
    if args.profile.is_none() {
        model::check_gradients(context)?;
    }
    Files::default()
        .reads([&args.model.model])
        .reads([&args.data.data])
        .reads(&args.profile)
        .reads(&args.style.template)
        .writes("--out", &args.out)?
        .may_write("--save-profile", args.save_profile.as_deref())?;
    let data = calibration::load(&args.data.data)?;
    let profile = args.profile.as_ref().map(Profile::load).transpose()?;
    let types = args.budget.cache_types(context);
    let context = &context.for_types(types);
    on_model!(context, &args.model, None::<&std::path::Path>, |model, context| with_model(
        args,
        (&data, profile.as_ref()),
        types,
        model,
        context
    ))
}

fn with_model<D: Backward>(
    args: &Args,
    (data, profile): (&CalibrationData, Option<&Profile>),
    types: CacheTypes,
    mut model: Checkpoint<D>,
    context: &Context,
) -> Result<()> {
    args.style.apply(&mut model)?;
    let model = &model;
    let options = CompressOptions {
        lengths: args.lengths.clone(),
        objective: args.objective.objective,
        token_weight: args.objective.token_weight,
        sink: args.span.sink,
        min_span: args.span.min_span,
        samples: args.samples,
        max_response: args.max_response,
        validation_length: args.validation_length,
        validation_samples: args.validation_samples,
        text_samples: args.text_samples,
        text_weight: args.text_weight,
        evaluations: args.evaluations,
        time_limit: args.minutes.or(args.evaluations.is_none().then_some(USUAL)),
        space: args.solver.space,
        solver: args.solver.options(context),
        seed: context.seed,
        ..args.budget.options(model.model.shape(), types, context)?
    };
    options.validate()?;
    let mut bar = Progress::of_stages(context);
    let found = match profile {
        Some(profile) => compress_profile(model, data, profile.clone(), &options, &mut bar),
        None => compress(model, data, &options, &mut bar),
    };
    let validation: Vec<usize> = args.validation_length.into_iter().collect();
    let flags = [("--lengths", &args.lengths[..]), ("--validation-length", &validation)];
    let found = found.map_err(|error| calibration::by_flag(error, &flags))?;
    let stages = bar.seconds();
    drop(bar);
    if model.model.is_first() {
        if let Some(path) = &args.save_profile {
            found.profile.save(path)?;
        }
        found.plan.save(&args.out)?;
    }

    let lengths = lengths_of(&found.plan);
    context.result(&Outcome {
        out: &args.out,
        losses: Losses::from(&found),
        held_out: &found.refined.held_out,
        budget: args.budget.meaning(types),
        plan: PlanSummary::new(
            &found.plan,
            &lengths,
            context.cache.slot_bytes(found.plan.shape().head_dim),
        ),
        stages,
        warnings: calibration::tell(found.warnings, context),
    })
}

/// The plan that was found, and how good it is.
#[derive(Debug, Serialize)]
struct Outcome<'a> {
    #[serde(serialize_with = "shown")]
    out: &'a Path,
    losses: Losses,
    held_out: &'a [HeldOut],
    /// What --density means where heads choose their types.
    #[serde(skip_serializing_if = "Option::is_none")]
    budget: Option<String>,
    plan: PlanSummary,
    stages: Vec<StageSeconds>,
    warnings: Vec<String>,
}

impl fmt::Display for Outcome<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{}\n", self.plan)?;
        if let Some(budget) = &self.budget {
            writeln!(f, "Budget: {budget}\n")?;
        }
        writeln!(f, "{}", self.losses)?;
        if !self.held_out.is_empty() {
            writeln!(f, "\n{}\n", compressed::held_out(self.held_out))?;
        }
        writeln!(f, "{}\n", StageSeconds::table(&self.stages))?;
        write!(f, "Plan: {}", self.out.display())
    }
}
