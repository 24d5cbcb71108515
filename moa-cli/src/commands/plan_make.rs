//! Plans that come from elsewhere or from a formula: import, export, uniform, retrieval-heads.

use std::fmt;
use std::path::{Path, PathBuf};

use clap::ValueEnum;
use moa_core::{DEFAULT_SINK, ElasticRule, FullHeads, HeadScores, ModelShape, Plan, write_atomic};
use moa_report::{PlanSummary, lengths_of};
use serde::{Deserialize, Serialize};

use crate::args::{parse_count, parse_density, parse_head, parse_size};
use crate::error::{Error, Result};
use crate::files::Files;
use crate::model;
use crate::output::{Context, shown};

/// Dimensions of the model that a plan is made for.
#[derive(Debug, clap::Args)]
#[group(required = true, multiple = false)]
pub(crate) struct ShapeArgs {
    /// Model folder, a GGUF file, or a model of the hub
    #[arg(long, value_name = "DIR|FILE.gguf|OWNER/NAME[/FILE.gguf][@REVISION]")]
    model: Option<PathBuf>,
    /// The model's config.json, where its weights are not at hand
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
}

impl ShapeArgs {
    fn files(&self) -> impl Iterator<Item = &PathBuf> {
        self.model.iter().chain(&self.config)
    }

    fn shape(&self, context: &Context) -> Result<ModelShape> {
        match (&self.model, &self.config) {
            (Some(model), _) => model::shape(&model::folder(model, context)?),
            (None, config) => model::shape(config.as_deref().unwrap_or(Path::new("."))),
        }
    }
}

/// Read a plan of another method: the original code's alphas and betas, or scores of heads
///
/// Scores are DuoAttention's full_attention_heads.tsv, a learned mask of 0 and 1 (PruLong), or any table
/// of a line for each layer and a number for each KV or query head, or lines `layer,head,score`. Heads of
/// the highest scores see everything, the others the sink and a window: those of at least --threshold, all
/// but a share --sparsity, or as many as --density allows --at a length, where what is left widens the
/// windows.
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Examples:\n  moa plan import --published moa_alpha_beta.json --config config.json --out plan.json\n  moa plan import --head-scores full_attention_heads.tsv --density 0.25 --at 4096 --model DIR --out duo.json"
)]
pub(crate) struct ImportArgs {
    #[command(flatten)]
    from: ImportFrom,
    #[command(flatten)]
    shape: ShapeArgs,
    #[command(flatten)]
    full: FullArgs,
    /// Most recent keys of heads that do not see everything, besides the sink [default: the
    /// recent_size of a config.json beside the scores, else 256]
    #[arg(long, value_name = "TOKENS", conflicts_with = "published", value_parser = parse_count)]
    window: Option<usize>,
    /// First positions of the context that every head sees [default: the sink_size of a config.json
    /// beside the scores, else 64]
    #[arg(long, value_name = "TOKENS", value_parser = parse_size)]
    sink: Option<usize>,
    /// Smallest span of any head, sink included, of a published plan
    #[arg(long, default_value_t = 128, value_name = "TOKENS", conflicts_with = "head_scores", value_parser = parse_size)]
    min_span: usize,
    /// Plan to write
    #[arg(long, value_name = "FILE")]
    out: PathBuf,
}

#[derive(Debug, clap::Args)]
#[group(required = true, multiple = false)]
struct ImportFrom {
    /// The original's file, one rule per query head
    #[arg(long, value_name = "FILE")]
    published: Option<PathBuf>,
    /// Scores of heads, as tab- or comma-separated text
    #[arg(long, visible_aliases = ["duo", "mask"], value_name = "FILE")]
    head_scores: Option<PathBuf>,
}

#[derive(Debug, clap::Args)]
struct FullArgs {
    /// Heads of at least this score see everything [default: 0.5]
    #[arg(long, value_name = "SCORE", conflicts_with_all = ["published", "sparsity", "density"])]
    threshold: Option<f64>,
    /// This share of the heads does not see everything
    #[arg(long, value_name = "SHARE", conflicts_with_all = ["published", "density"])]
    sparsity: Option<f64>,
    /// Largest mean share of the context that heads keep at the length --at
    #[arg(long, value_name = "DENSITY", requires = "at", conflicts_with = "published", value_parser = parse_density)]
    density: Option<f64>,
    /// Length at which the density is kept
    #[arg(long, value_name = "TOKENS", requires = "density", conflicts_with_all = ["published", "threshold", "sparsity"], value_parser = parse_count)]
    at: Option<usize>,
}

impl FullArgs {
    fn full(&self) -> FullHeads {
        match (self.sparsity, self.density, self.at) {
            (Some(sparsity), ..) => FullHeads::Sparsity(sparsity),
            (None, Some(max), Some(length)) => FullHeads::Density { max, length },
            _ => FullHeads::Threshold(self.threshold.unwrap_or(0.5)),
        }
    }
}

/// What DuoAttention keeps beside its scores.
#[derive(Default, Deserialize)]
struct DuoConfig {
    sink_size: Option<usize>,
    recent_size: Option<usize>,
}

impl DuoConfig {
    /// Of the folder of a file of scores; nothing where there is none, or a file of another kind.
    fn beside(scores: &Path) -> Self {
        let text = moa_core::read_text_file(&scores.with_file_name("config.json"));
        text.ok().and_then(|text| serde_json::from_str(&text).ok()).unwrap_or_default()
    }
}

/// Write a plan for other engines
///
/// published: the original code's alphas and betas. The others are the plan at one context length. json:
/// tables of sink, window and compression ratio by layer and KV head, for engines such as vLLM and kvpress.
/// safetensors: the same as tensors, which PyTorch reads. tsv: the share of the context that each head keeps,
/// as DuoAttention's full_attention_heads.tsv.
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Examples:\n  moa plan export plan.json --out moa_alpha_beta.json\n  moa plan export plan.json --format safetensors --at 8192 --out mask.safetensors"
)]
pub(crate) struct ExportArgs {
    /// Plan file
    #[arg(value_name = "PLAN")]
    plan: PathBuf,
    /// What to write
    #[arg(long, value_enum, default_value = "published")]
    format: ExportFormat,
    /// Context length of json, safetensors and tsv
    #[arg(long, value_name = "TOKENS", value_parser = parse_count, required_if_eq_any([("format", "json"), ("format", "safetensors"), ("format", "tsv")]))]
    at: Option<usize>,
    /// File to write
    #[arg(long, value_name = "FILE")]
    out: PathBuf,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum ExportFormat {
    Published,
    Json,
    Safetensors,
    Tsv,
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
    #[arg(long, default_value_t = DEFAULT_SINK, value_name = "TOKENS", value_parser = parse_size)]
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
    #[arg(long, default_value_t = DEFAULT_SINK, value_name = "TOKENS", value_parser = parse_size)]
    sink: usize,
    /// Plan to write
    #[arg(long, value_name = "FILE")]
    out: PathBuf,
}

/// DuoAttention's usual window, where nothing says another one.
const DUO_WINDOW: usize = 256;

pub(super) fn import(args: &ImportArgs, context: &Context) -> Result<()> {
    let beside = args.from.head_scores.as_ref().map(|path| path.with_file_name("config.json"));
    Files::default()
        .reads(args.shape.files())
        .reads(&args.from.published)
        .reads(&args.from.head_scores)
        .reads(&beside)
        .writes("--out", &args.out)?;
    let shape = args.shape.shape(context)?;
    let plan = match (&args.from.published, &args.from.head_scores) {
        (None, Some(path)) => {
            let beside = DuoConfig::beside(path);
            let sink = args.sink.or(beside.sink_size).unwrap_or(DEFAULT_SINK);
            let window = args.window.or(beside.recent_size).unwrap_or(DUO_WINDOW);
            HeadScores::load(path, shape)?.plan(sink, window, args.full.full())?
        }
        (published, _) => {
            let path = published.as_deref().unwrap_or(Path::new("."));
            let sink = args.sink.unwrap_or(DEFAULT_SINK);
            Plan::load_published(path, shape, sink, args.min_span)?
        }
    };
    save(plan, "import", &args.out, context)
}

pub(super) fn uniform(args: &UniformArgs, context: &Context) -> Result<()> {
    Files::default().reads(args.shape.files()).writes("--out", &args.out)?;
    let shape = args.shape.shape(context)?;
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
    Files::default().reads(args.shape.files()).writes("--out", &args.out)?;
    let shape = args.shape.shape(context)?;
    let is_there = |(layer, head): &(usize, usize)| *layer < shape.layers && *head < shape.kv_heads;
    if let Some((layer, head)) = args.heads.iter().find(|head| !is_there(head)) {
        let expected =
            format!("layers below {} with KV heads below {}", shape.layers, shape.kv_heads);
        return Err(Error::argument("--heads", expected, format!("layer {layer}, KV head {head}")));
    }
    let plan = Plan::retrieval_heads(shape, args.sink, args.window, &args.heads)?;
    save(plan, "retrieval-heads", &args.out, context)
}

pub(super) fn export(args: &ExportArgs, context: &Context) -> Result<()> {
    Files::default().reads([&args.plan]).writes("--out", &args.out)?;
    if let (ExportFormat::Published, Some(at)) = (args.format, args.at) {
        let expected =
            "with --format json, safetensors or tsv alone: published files hold all lengths";
        return Err(Error::argument("--at", expected, at));
    }
    let plan = Plan::load(&args.plan)?;
    let at = args.at.unwrap_or(1);
    let bytes = match args.format {
        ExportFormat::Published => {
            let json = plan.to_published_json().map_err(|error| {
                let place = format!("{} (see --format json)", args.plan.display());
                Error::from(error).at(place)
            })?;
            json.into_bytes()
        }
        ExportFormat::Json => plan.to_span_json(at).into_bytes(),
        ExportFormat::Safetensors => plan.to_span_safetensors(at)?,
        ExportFormat::Tsv => plan.to_head_scores(at).into_bytes(),
    };
    write_atomic(&args.out, &bytes)?;
    if !plan.cache_types().is_empty() {
        context.note(
            "the file says spans alone: the plan's bytes are those of its cache types, which another engine has to \
             bring itself",
        );
    }
    context.result(&Exported { plan: &args.plan, out: &args.out })
}

/// A plan that was written for another engine.
#[derive(Debug, Serialize)]
struct Exported<'a> {
    #[serde(serialize_with = "shown")]
    plan: &'a Path,
    #[serde(serialize_with = "shown")]
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
    #[serde(serialize_with = "shown")]
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
