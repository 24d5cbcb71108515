use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};

use moa_core::{AtLength, Plan, PlanRequest, Profile};
use moa_models::{
    CacheTypes, CalibrationData, Checkpoint, CompressOptions, Evidence, HeldOut, Item, Math,
    Refined, TextGoal, bound_decode_time, measured_losses, plan_warnings, profile_warnings, refine,
};
use moa_report::at_lengths;
use serde::Serialize;

use crate::args::{DataArg, ModelArg, parse_count};
use crate::calibration;
use crate::compressed;
use crate::error::{Error, Result};
use crate::files::Files;
use crate::model::{self, on_device};
use crate::output::{Context, percent, shown, table};
use crate::plans::{self, PlanFile};
use crate::progress::Progress;
use crate::style::StyleArgs;

/// Pick the plan with the lowest measured loss at a length that was not profiled
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Example:\n  moa validate --model assets/moa-tiny --plans plans --out plan.json"
)]
pub(crate) struct Args {
    #[command(flatten)]
    model: ModelArg,
    #[command(flatten)]
    style: StyleArgs,
    /// Folder of `moa search`
    #[arg(long, value_name = "DIR")]
    plans: PathBuf,
    #[command(flatten)]
    data: DataArg,
    /// Length to measure at [default: twice the longest profiled length, as far as the model's context
    /// reaches]
    #[arg(long, value_name = "TOKENS", value_parser = parse_count)]
    length: Option<usize>,
    /// Contexts to measure on; where all have several questions, half as many
    #[arg(long, default_value_t = 8, value_name = "N", value_parser = parse_count)]
    samples: usize,
    /// Improve on the best plan with so many measurements beside those of the given plans, of the limit of text and of
    /// dense attention, as `moa compress` does: text suffers no more than under a uniform window of the same size, in
    /// what the plan is refined on and in held-out text, for which up to half as many more are made
    #[arg(long, value_name = "N", requires = "profile", value_parser = parse_count)]
    refine: Option<usize>,
    /// The profile that the plans were searched on, for --refine
    #[arg(long, value_name = "FILE", requires = "refine")]
    profile: Option<PathBuf>,
    /// Most tokens of a response that the dense model writes, and tokens to predict at the end of a window of
    /// running text
    #[arg(long, default_value_t = 48, value_name = "TOKENS", value_parser = parse_count)]
    max_response: usize,
    /// Take plans that were made for other weights of the same dimensions
    #[arg(long)]
    any_weights: bool,
    /// Plan to write
    #[arg(long, value_name = "FILE")]
    out: PathBuf,
}

pub(crate) fn run(args: &Args, context: &Context) -> Result<()> {
    // A place that cannot be written comes up before anything is read.
    Files::default().writes("--out", &args.out)?;
    let files = plans::load_folder(&args.plans)?;
    Files::default()
        .reads([&args.model.model])
        .reads([&args.data.data])
        .reads(&args.profile)
        .reads(&args.style.template)
        .reads(files.iter().map(|file| &file.path))
        .writes("--out", &args.out)?;
    let data = calibration::load(&args.data.data)?;
    let profile = args.profile.as_ref().map(Profile::load).transpose()?;
    let lengths = profile_lengths(args, &files)?;
    let inputs = Inputs { data, files, profile, lengths };
    on_device!(context, |device| {
        let mut model = model::open(device, &args.model, context)?;
        args.style.apply(&mut model)?;
        with_model(args, inputs, &model, context)
    })
}

/// What the command reads before it opens the model.
struct Inputs {
    data: CalibrationData,
    files: Vec<PlanFile>,
    profile: Option<Profile>,
    lengths: Vec<usize>,
}

fn with_model<D: Math>(
    args: &Args,
    Inputs { data, files, profile, lengths }: Inputs,
    model: &Checkpoint<D>,
    context: &Context,
) -> Result<()> {
    for file in &files {
        model::check_plan(&file.plan, &file.path, model, args.any_weights)?;
        if args.refine.is_some() {
            let place = |e: moa_models::Error| Error::from(e).at(file.path.display().to_string());
            let (own, first) = (CacheTypes::of(&file.plan).map_err(place)?, &files[0].plan);
            if own != CacheTypes::of(first).map_err(place)? {
                return Err(place(moa_models::Error::Invalid {
                    what: "cache types",
                    expected: "those of the first plan, as all that are refined have the same"
                        .into(),
                    got: "others".into(),
                }));
            }
        }
    }
    let limit = model.model.config().context_length();
    let options = CompressOptions {
        lengths,
        validation_length: args.length,
        validation_samples: args.samples,
        max_response: args.max_response,
        seed: context.seed,
        ..CompressOptions::default()
    };
    let length = options.validation_length(limit);
    let mut calibration = options.validation_calibration(limit);
    if args.refine.is_none() {
        calibration.lengths = vec![length];
    }
    let of_flag: Vec<usize> = args.length.into_iter().collect();
    let flags = [("--length", &of_flag[..])];
    let items = calibration::items(model, &data, &calibration, &flags, context)?.items;

    let losses = measure(model, &items, &files, length, context)?;
    let dense = loss_at(model, &items, &Plan::full(model.model.shape())?, length)?;
    let best = (0..files.len()).min_by(|a, b| losses[*a].total_cmp(&losses[*b])).unwrap_or(0);
    let mut plan = files[best].plan.clone();
    let (mut refined, mut warnings) = (None, Vec::new());
    if let (Some(evaluations), Some(profile)) = (args.refine, &profile) {
        let mut bar = Progress::of_stages(context);
        let starts: Vec<Plan> = files.iter().map(|f| f.plan.clone()).collect();
        let request = request(&files[best], model)?;
        let texts = options.texts(model, &data)?;
        let text_limit = options.text_limit(&request, profile)?;
        let text_goal = text_limit.as_ref().map_or(TextGoal::Weight(1.0), TextGoal::NoWorseThan);
        let held_out = options.held_out_texts(model, &data)?;
        let evidence = Evidence { items: &items, texts: &texts, text_goal, held_out: &held_out };
        let found =
            refine(&model.model, evidence, &starts, &request, profile, evaluations, &mut bar)?;
        plan = found.plan.clone();
        warnings = profile_warnings(profile)?;
        warnings.extend(found.lost_for_text());
        refined = Some(found);
    }
    let (growth, held_out) = match &refined {
        Some(found) => (found.loss - found.dense_loss, &*found.held_out),
        None => (losses[best] - dense, &[][..]),
    };
    let request = PlanRequest::from_plan(&plan)
        .map_err(|e| Error::from(e).at(files[best].path.display().to_string()))?;
    let device = model.model.device().default_cache_type();
    warnings.extend(plan_warnings(&plan, growth, held_out, request.as_ref(), device)?);
    plan.provenance.measured_losses = measured_losses(&model.model, &items, &plan)?;
    let measured = files.iter().zip(&losses);
    plan.provenance
        .trials
        .extend(measured.filter_map(|(file, &value)| {
            file.plan.provenance.trial(0, AtLength { length, value })
        }));
    plan.provenance.method = Some("moa validate".to_string());
    plan.save(&args.out)?;

    let measured = |(file, &loss): (&PlanFile, &f64)| {
        let density = model.model.config().windowed(&file.plan)?.density(length);
        Ok(MeasuredPlan { file: file.path.clone(), loss, density })
    };
    context.result(&Outcome {
        out: &args.out,
        length,
        plans: files.iter().zip(&losses).map(measured).collect::<Result<_>>()?,
        best: &files[best].path,
        dense_loss: dense,
        refined_from: refined.as_ref().map(|r| r.start_loss),
        refined_to: refined.as_ref().map(|r| r.loss),
        refined_divergence_from: refined.as_ref().and_then(|r| r.start_divergence),
        refined_divergence_to: refined.as_ref().and_then(|r| r.divergence),
        held_out,
        measured_losses: &plan.provenance.measured_losses,
        warnings: calibration::tell(warnings, context),
        refined: refined.as_ref(),
    })
}

/// Measured losses of the plans, and the one that was chosen.
#[derive(Debug, Serialize)]
struct Outcome<'a> {
    #[serde(serialize_with = "shown")]
    out: &'a Path,
    length: usize,
    plans: Vec<MeasuredPlan>,
    #[serde(serialize_with = "shown")]
    best: &'a Path,
    dense_loss: f64,
    refined_from: Option<f64>,
    refined_to: Option<f64>,
    refined_divergence_from: Option<f64>,
    refined_divergence_to: Option<f64>,
    held_out: &'a [HeldOut],
    measured_losses: &'a [AtLength],
    warnings: Vec<String>,
    #[serde(skip)]
    refined: Option<&'a Refined>,
}

#[derive(Debug, Serialize)]
struct MeasuredPlan {
    #[serde(serialize_with = "shown")]
    file: PathBuf,
    loss: f64,
    density: f64,
}

impl fmt::Display for Outcome<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let row = |name: String, loss, density| vec![name, format!("{loss:.4}"), percent(density)];
        let name = |path: &Path| path.file_name().unwrap_or_default().display().to_string();
        let plans = self.plans.iter().map(|plan| row(name(&plan.file), plan.loss, plan.density));
        let dense = row("dense".to_string(), self.dense_loss, 1.0);
        let rows: Vec<_> = plans.chain([dense]).collect();
        let head = format!("loss at {}", self.length);
        writeln!(f, "{}", table(&["plan", &head, "density"], &rows))?;
        writeln!(f, "\nLowest loss: {}", name(self.best))?;
        if let Some(refined) = self.refined {
            write!(f, "Refined: mean loss {:.4} -> {:.4}", refined.start_loss, refined.loss)?;
            if let Some((start, own)) = refined.start_divergence.zip(refined.divergence) {
                write!(f, ", divergence on text {start:.4} -> {own:.4}")?;
            }
            writeln!(
                f,
                " nats per token, in {} measurements, those of the given plans and of dense attention included",
                refined.evaluations,
            )?;
        }
        if !self.held_out.is_empty() {
            writeln!(f, "\n{}\n", compressed::held_out(self.held_out))?;
        }
        let losses = at_lengths(self.measured_losses);
        write!(f, "Plan: {} (loss {losses})", self.out.display())
    }
}

/// The search that a plan came out of.
fn request<D: Math>(file: &PlanFile, model: &Checkpoint<D>) -> Result<PlanRequest> {
    let in_file = |e| Error::from(e).at(file.path.display().to_string());
    let request = PlanRequest::from_plan(&file.plan).map_err(in_file)?;
    let mut request = request.ok_or_else(|| Error::Provenance {
        path: file.path.clone(),
        missing: "density bounds",
        remedy: "refine only plans of `moa search`",
    })?;
    if let Some(share) = file.plan.provenance.decode_time {
        let model = &model.model;
        bound_decode_time(&mut request, model.device(), model.shape(), share)?;
    }
    Ok(request)
}

/// Profiled lengths of the plans; with `--length` they need not say them.
fn profile_lengths(args: &Args, files: &[PlanFile]) -> Result<Vec<usize>> {
    let mut lengths: Vec<usize> =
        files.iter().flat_map(|f| f.plan.provenance.profile_lengths.iter().copied()).collect();
    if lengths.is_empty() {
        lengths.extend(args.length);
    }
    lengths.sort_unstable();
    lengths.dedup();
    match lengths.is_empty() {
        false => Ok(lengths),
        true => Err(Error::Provenance {
            path: files[0].path.clone(),
            missing: "profiled lengths",
            remedy: "give --length",
        }),
    }
}

/// Mean response loss of every plan at the validation length.
fn measure<D: Math>(
    model: &Checkpoint<D>,
    items: &BTreeMap<usize, Vec<Item>>,
    files: &[PlanFile],
    length: usize,
    context: &Context,
) -> Result<Vec<f64>> {
    let bar = Progress::new(context, "validate", files.len());
    files
        .iter()
        .map(|file| {
            let loss = loss_at(model, items, &file.plan, length)?;
            bar.step();
            Ok(loss)
        })
        .collect()
}

fn loss_at<D: Math>(
    model: &Checkpoint<D>,
    items: &BTreeMap<usize, Vec<Item>>,
    plan: &Plan,
    length: usize,
) -> Result<f64> {
    let own = items.iter().filter(|(l, _)| **l == length).map(|(l, i)| (*l, i.clone())).collect();
    let losses = measured_losses(&model.model, &own, plan)?;
    Ok(losses.iter().map(|l| l.value).sum::<f64>() / losses.len().max(1) as f64)
}
