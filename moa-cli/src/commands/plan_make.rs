//! Plans that come from elsewhere or from a formula: import, export, uniform, retrieval-heads.

use std::fmt;
use std::path::{Path, PathBuf};

use moa_core::{DEFAULT_SINK, ElasticRule, ModelShape, Plan, write_atomic};
use moa_report::{PlanSummary, lengths_of};
use serde::Serialize;

use crate::args::{parse_count, parse_density, parse_head};
use crate::error::Result;
use crate::files::check_file;
use crate::model;
use crate::output::Context;

/// Dimensions of the model that a plan is made for.
#[derive(Debug, clap::Args)]
#[group(required = true, multiple = false)]
pub(crate) struct ShapeArgs {
    /// Model folder, or a GGUF file
    #[arg(long, value_name = "DIR|FILE.gguf")]
    model: Option<PathBuf>,
    /// The model's config.json, where its weights are not at hand
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
}

impl ShapeArgs {
    fn shape(&self) -> Result<ModelShape> {
        let path = self.model.as_deref().or(self.config.as_deref());
        model::shape(path.unwrap_or(Path::new(".")))
    }
}

/// Read a plan of the original code: lists of alphas and betas per layer and query head
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Example:\n  moa plan import --published moa_alpha_beta.json --config config.json --out plan.json"
)]
pub(crate) struct ImportArgs {
    /// The original's file, one rule per query head
    #[arg(long, value_name = "FILE")]
    published: PathBuf,
    #[command(flatten)]
    shape: ShapeArgs,
    /// First positions of the context that every head sees
    #[arg(long, default_value_t = DEFAULT_SINK, value_name = "TOKENS")]
    sink: usize,
    /// Smallest span of any head, sink included
    #[arg(long, default_value_t = 128, value_name = "TOKENS")]
    min_span: usize,
    /// Plan to write
    #[arg(long, value_name = "FILE")]
    out: PathBuf,
}

/// Write a plan in the original code's format
#[derive(Debug, clap::Args)]
#[command(after_help = "Example:\n  moa plan export plan.json --out moa_alpha_beta.json")]
pub(crate) struct ExportArgs {
    /// Plan file
    #[arg(value_name = "PLAN")]
    plan: PathBuf,
    /// File to write
    #[arg(long, value_name = "FILE")]
    out: PathBuf,
}

/// Make a plan in which all heads are alike (StreamingLLM)
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Example:\n  moa plan uniform --model assets/moa-tiny --density 0.25 --out uniform.json"
)]
pub(crate) struct UniformArgs {
    #[command(flatten)]
    shape: ShapeArgs,
    #[command(flatten)]
    span: UniformSpan,
    /// First positions of the context that every head sees
    #[arg(long, default_value_t = DEFAULT_SINK, value_name = "TOKENS")]
    sink: usize,
    /// Plan to write
    #[arg(long, value_name = "FILE")]
    out: PathBuf,
}

#[derive(Debug, clap::Args)]
#[group(required = true, multiple = false)]
pub(crate) struct UniformSpan {
    /// Share of the context, sink included
    #[arg(long, value_parser = parse_density)]
    density: Option<f64>,
    /// Most recent keys, besides the sink
    #[arg(long, value_name = "TOKENS", value_parser = parse_count)]
    window: Option<usize>,
}

/// Make a plan in which some heads see everything and the others a window (DuoAttention)
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Example:\n  moa plan retrieval-heads --model assets/moa-tiny --heads 0:1,3:0 --window 192 --out duo.json"
)]
pub(crate) struct RetrievalHeadsArgs {
    #[command(flatten)]
    shape: ShapeArgs,
    /// Heads that see everything
    #[arg(long, required = true, value_delimiter = ',', value_name = "LAYER:KV_HEAD,..", value_parser = parse_head)]
    heads: Vec<(usize, usize)>,
    /// Most recent keys of the other heads, besides the sink
    #[arg(long, value_name = "TOKENS", value_parser = parse_count)]
    window: usize,
    /// First positions of the context that every head sees
    #[arg(long, default_value_t = DEFAULT_SINK, value_name = "TOKENS")]
    sink: usize,
    /// Plan to write
    #[arg(long, value_name = "FILE")]
    out: PathBuf,
}

pub(super) fn import(args: &ImportArgs, context: &Context) -> Result<()> {
    check_file(&args.out)?;
    let shape = args.shape.shape()?;
    let plan = Plan::load_published(&args.published, shape, args.sink, args.min_span)?;
    save(plan, "import", &args.out, context)
}

pub(super) fn uniform(args: &UniformArgs, context: &Context) -> Result<()> {
    check_file(&args.out)?;
    let shape = args.shape.shape()?;
    let plan = match (args.span.density, args.span.window) {
        (Some(density), _) => model::uniform(shape, args.sink, density)?,
        (None, window) => {
            let span = args.sink.saturating_add(window.unwrap_or(1));
            Plan::uniform(shape, args.sink, ElasticRule::fixed(span))?
        }
    };
    save(plan, "uniform", &args.out, context)
}

pub(super) fn retrieval_heads(args: &RetrievalHeadsArgs, context: &Context) -> Result<()> {
    check_file(&args.out)?;
    let plan = Plan::retrieval_heads(args.shape.shape()?, args.sink, args.window, &args.heads)?;
    save(plan, "retrieval-heads", &args.out, context)
}

pub(super) fn export(args: &ExportArgs, context: &Context) -> Result<()> {
    check_file(&args.out)?;
    let plan = Plan::load(&args.plan)?;
    write_atomic(&args.out, plan.to_published_json()?.as_bytes())?;
    context.result(&Exported { plan: &args.plan, out: &args.out })
}

/// A plan that was written in the original code's format.
#[derive(Debug, Serialize)]
struct Exported<'a> {
    plan: &'a Path,
    out: &'a Path,
}

impl fmt::Display for Exported<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} -> {}", self.plan.display(), self.out.display())
    }
}

/// A plan that was made.
#[derive(Debug, Serialize)]
struct Made<'a> {
    out: &'a Path,
    #[serde(flatten)]
    summary: PlanSummary,
}

impl fmt::Display for Made<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}\n\nPlan: {}", self.summary.table(), self.out.display())
    }
}

fn save(mut plan: Plan, method: &str, out: &Path, context: &Context) -> Result<()> {
    plan.provenance.method = Some(method.to_string());
    plan.save(out)?;
    let summary = PlanSummary::new(
        &plan,
        &lengths_of(&plan),
        context.cache.slot_bytes(plan.shape().head_dim),
    );
    context.result(&Made { out, summary })
}
