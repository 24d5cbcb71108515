use std::fmt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use moa_core::search::{Options, Solution};
use moa_core::{AtLength, CacheType, Plan, Profile, Space};
use moa_models::{CompressOptions, bound_decode_time, profile_warnings};
use serde::Serialize;

use crate::args::{SpanArgs, parse_count, space_parser};
use crate::budget::BudgetArgs;
use crate::calibration;
use crate::error::{Error, Result};
use crate::files::{Files, OutputFolder};
use crate::model::on_device;
use crate::output::{Context, percent, shown, table};
use crate::plans;

/// Search the Pareto set of plans for a memory budget
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Examples:\n  moa search --profile profile.safetensors --density 0.25 --out plans\n  moa search --profile profile.safetensors --space per-layer --bound-lengths 4096 --out rival"
)]
pub(crate) struct Args {
    /// Profile of `moa profile`
    #[arg(long, value_name = "FILE")]
    profile: PathBuf,
    #[command(flatten)]
    budget: BudgetArgs,
    /// Profiled lengths whose losses count [default: all, and the longest bound length, extended
    /// from the longest profiled]
    #[arg(long, value_delimiter = ',', value_name = "TOKENS,..", value_parser = parse_count)]
    lengths: Vec<usize>,
    #[command(flatten)]
    span: SpanArgs,
    #[command(flatten)]
    solver: SolverArgs,
    /// Folder for plan-00.json, plan-01.json, ...
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// Replace the plans of an earlier run
    #[arg(long)]
    force: bool,
}

/// What to search, and how.
#[derive(Debug, clap::Args)]
pub(crate) struct SolverArgs {
    /// Kind of plan: a rule per KV head that grows with the context (elastic), a span per KV head
    /// (fixed) or per layer (per-layer), or heads that keep everything or the smallest span (duo).
    /// Fixed spans are best bounded at one length
    #[arg(long, default_value = "elastic", value_name = "KIND", value_parser = space_parser())]
    pub(crate) space: Space,
    /// At most this many distinct rules in one layer; `moa compress` then exchanges no spans of single heads
    #[arg(long, value_name = "K", value_parser = parse_count)]
    pub(crate) max_rules_per_layer: Option<usize>,
    /// Most plans to keep
    #[arg(long, default_value_t = 10, value_name = "N", value_parser = parse_count)]
    pub(crate) max_plans: usize,
    /// Seconds after which the search refines no further
    #[arg(long, default_value_t = 60, value_name = "SECONDS", value_parser = clap::value_parser!(u64).range(1..))]
    pub(crate) time_limit: u64,
}

impl SolverArgs {
    pub(crate) fn options(&self, context: &Context) -> Options {
        Options {
            max_rules_per_layer: self.max_rules_per_layer,
            max_plans: self.max_plans,
            time_limit: Duration::from_secs(self.time_limit),
            threads: context.threads,
            ..Options::default()
        }
    }
}

/// Names of plans that could be the profile's.
const MOST_CHECKED: usize = 1000;

fn file_name(index: usize) -> String {
    format!("plan-{index:02}.json")
}

pub(crate) fn run(args: &Args, context: &Context) -> Result<()> {
    // Again once the plans are there: another search may have written some meanwhile.
    let old = |folder: &Path| match plans::names(folder)? {
        old if !old.is_empty() && !args.force => {
            Err(Error::PlansExist { path: args.out.clone(), count: old.len() })
        }
        old => Ok(old),
    };
    if args.out.is_dir() {
        old(&args.out)?;
    }
    // The names that plans will have.
    let mut files = Files::default().reads([&args.profile]);
    for plan in
        (0..args.solver.max_plans.min(MOST_CHECKED)).map(|index| args.out.join(file_name(index)))
    {
        if plan.exists() {
            files = files.writes("--out", &plan)?;
        }
    }
    let profile = Profile::load(&args.profile)?;
    let mut lengths = args.lengths.clone();
    lengths.sort_unstable();
    lengths.dedup();
    if lengths.is_empty() {
        lengths = profile.lengths();
    }
    for &length in &lengths {
        profile.at(length).map_err(|e| Error::from(e).at(args.profile.display().to_string()))?;
    }
    let types = args.budget.cache_types(context);
    let options = CompressOptions {
        lengths: lengths.clone(),
        sink: args.span.sink,
        min_span: args.span.min_span,
        space: args.solver.space,
        solver: args.solver.options(context),
        ..args.budget.options(profile.shape(), types, context)?
    };
    // A profile does not say how long the model's context is; a bound beyond it does no harm.
    let mut request = options.request(usize::MAX)?;
    let context = &context.for_types(types);
    if let Some(share) = options.decode_time {
        on_device!(context, |device| bound_decode_time(
            &mut request,
            &device,
            profile.shape(),
            share
        ))?;
    }
    if matches!(request.space, Space::Fixed | Space::PerLayer) && request.bounds.len() > 1 {
        let shortest = request.bounds.iter().map(|b| b.length).min().unwrap_or(0);
        context.note(format_args!(
            "fixed spans: the bound at {shortest} tokens decides, plans are smaller than asked for at \
             greater lengths; name one length with --bound-lengths to use the room there"
        ));
    }
    let mut folder = OutputFolder::create(&args.out)?;
    // As `moa compress` does: rules that stop growing beyond the profile lose there.
    let objectives = match args.lengths.is_empty() {
        true => request.objective_lengths(&profile),
        false => lengths,
    };
    let mut found = request.search_profile(&profile, &objectives)?;
    for plan in &mut found.plans {
        *plan = types.first_of(plan)?;
        plan.provenance.method = Some("moa search".to_string());
    }
    let mut files = Vec::new();
    for (index, plan) in found.plans.iter().enumerate() {
        files.push(folder.add(&file_name(index), plan.to_file_json()?.into_bytes()));
    }
    folder.write(old)?;
    let plan = |(plan, (solution, file)): (&Plan, (&Solution, PathBuf))| {
        let from = &plan.provenance;
        let density = |b: &AtLength| BoundDensity {
            length: b.length,
            bound: b.value,
            value: plan.density(b.length),
        };
        SearchedPlan {
            file,
            predicted_losses: from.predicted_losses.clone(),
            densities: from.density_bounds.iter().map(density).collect(),
            gap: solution.gap.relative,
        }
    };
    let solutions = found.set.solutions.iter().zip(files);
    context.result(&Outcome {
        out: &args.out,
        density: request.bounds.iter().map(|b| b.max).fold(0.0, f64::max),
        space: args.solver.space.name(),
        cache_type: types.first(),
        worst_gap: found.set.worst_gap,
        seconds: found.set.seconds,
        plans: found.plans.iter().zip(solutions).map(plan).collect(),
        warnings: calibration::tell(profile_warnings(&profile)?, context),
    })
}

/// The plans that were found.
#[derive(Debug, Serialize)]
struct Outcome<'a> {
    #[serde(serialize_with = "shown")]
    out: &'a Path,
    /// Largest of the bounds.
    density: f64,
    space: &'static str,
    /// That the plans say for all of their heads, for which spans are found.
    cache_type: Option<CacheType>,
    worst_gap: f64,
    seconds: f64,
    plans: Vec<SearchedPlan>,
    warnings: Vec<String>,
}

#[derive(Debug, Serialize)]
struct SearchedPlan {
    #[serde(serialize_with = "shown")]
    file: PathBuf,
    predicted_losses: Vec<AtLength>,
    densities: Vec<BoundDensity>,
    /// Gap to the proven bound, as a share of the loss.
    gap: f64,
}

#[derive(Debug, Serialize)]
struct BoundDensity {
    length: usize,
    bound: f64,
    value: f64,
}

impl SearchedPlan {
    fn row(&self) -> Vec<String> {
        let mut row = vec![self.file.file_name().unwrap_or_default().display().to_string()];
        row.extend(self.predicted_losses.iter().map(|loss| format!("{:.4}", loss.value)));
        row.extend(self.densities.iter().map(|density| percent(density.value)));
        row.push(percent(self.gap));
        row
    }
}

impl fmt::Display for Outcome<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(first) = self.plans.first() {
            let mut head = vec!["plan".to_string()];
            head.extend(first.predicted_losses.iter().map(|l| format!("loss at {}", l.length)));
            head.extend(first.densities.iter().map(|d| format!("density at {}", d.length)));
            head.push("gap".to_string());
            let head: Vec<&str> = head.iter().map(String::as_str).collect();
            let rows: Vec<_> = self.plans.iter().map(SearchedPlan::row).collect();
            writeln!(f, "{}", table(&head, &rows))?;
        }
        write!(
            f,
            "\n{} plans in {}{}; gap to the proven bound at most {} ({:.1} s)",
            self.plans.len(),
            self.out.display(),
            self.cache_type.map(|own| format!(", keys and values in {own}")).unwrap_or_default(),
            percent(self.worst_gap),
            self.seconds,
        )
    }
}
