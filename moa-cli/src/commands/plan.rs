use std::fmt;
use std::path::{Path, PathBuf};

use clap::Subcommand;
use moa_core::{Plan, write_atomic};
use moa_report::{HeadMap, PlanSummary, at_lengths, figure, lengths_of};
use serde::Serialize;

use super::plan_make;
use crate::args::{distinct, parse_count};
use crate::error::Result;
use crate::files::Files;
use crate::output::{Context, shown, table};
use crate::terminal::plain;

/// Inspect, convert and make plans
#[derive(Debug, clap::Args)]
#[command(after_help = "Example:\n  moa plan show plan.json --at 1024,8192 --svg heads.svg")]
pub(crate) struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    Show(ShowArgs),
    Import(plan_make::ImportArgs),
    Export(plan_make::ExportArgs),
    Uniform(plan_make::UniformArgs),
    RetrievalHeads(plan_make::RetrievalHeadsArgs),
}

/// Show a plan's spans, sizes and origin
#[derive(Debug, clap::Args)]
#[command(after_help = "Example:\n  moa plan show plan.json --at 1024,8192 --svg heads.svg")]
struct ShowArgs {
    /// Plan file
    #[arg(value_name = "PLAN")]
    plan: PathBuf,
    /// Context lengths to look at [default: those of the plan's search]
    #[arg(long, value_delimiter = ',', value_name = "TOKENS,..", value_parser = parse_count)]
    at: Vec<usize>,
    /// Picture to write: layer x KV head, coloured by span / N
    #[arg(long, value_name = "FILE")]
    svg: Option<PathBuf>,
}

pub(crate) fn run(args: &Args, context: &Context) -> Result<()> {
    match &args.command {
        Command::Show(args) => show(args, context),
        Command::Import(args) => plan_make::import(args, context),
        Command::Export(args) => plan_make::export(args, context),
        Command::Uniform(args) => plan_make::uniform(args, context),
        Command::RetrievalHeads(args) => plan_make::retrieval_heads(args, context),
    }
}

/// Widest layer whose spans are listed head by head.
const LISTED_HEADS: usize = 8;

fn show(args: &ShowArgs, context: &Context) -> Result<()> {
    Files::default().reads([&args.plan]).may_write("--svg", args.svg.as_deref())?;
    let plan = Plan::load(&args.plan)?;
    let lengths = if args.at.is_empty() { lengths_of(&plan) } else { distinct(&args.at) };
    let summary =
        PlanSummary::new(&plan, &lengths, context.cache.slot_bytes(plan.shape().head_dim));
    if let Some(path) = &args.svg {
        let title = format!("Span of each KV head, {}", plan.shape());
        let figure = figure::head_map(&title, &[("", summary.maps())]);
        write_atomic(path, figure.svg().as_bytes())?;
    }
    context.result(&Shown { file: &args.plan, summary, plan: &plan })
}

/// A plan as it is shown.
#[derive(Debug, Serialize)]
struct Shown<'a> {
    #[serde(serialize_with = "shown")]
    file: &'a Path,
    #[serde(flatten)]
    summary: PlanSummary,
    #[serde(skip)]
    plan: &'a Plan,
}

impl fmt::Display for Shown<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let plan = self.plan;
        writeln!(f, "{}", plan.shape())?;
        writeln!(f, "sink {}, smallest span {}", plan.sink(), plan.min_span())?;
        for line in origin(plan) {
            writeln!(f, "{line}")?;
        }
        write!(f, "\n{}", self.summary)?;
        if plan.shape().kv_heads <= LISTED_HEADS {
            write!(f, "\n\n{}", span_table(plan, &self.summary.maps()))?;
        }
        Ok(())
    }
}

/// Where the plan came from, as far as it says.
fn origin(plan: &Plan) -> Vec<String> {
    let from = &plan.provenance;
    let mut lines = Vec::new();
    let mut say = |label: &str, value: Option<String>| {
        let value = value.filter(|v| !v.is_empty());
        lines.extend(value.map(|v| format!("{label}: {}", plain(&v).replace('\n', " "))));
    };
    say("weights", plan.fingerprint().map(str::to_string));
    say("made by", from.method.clone());
    say("kind", from.space.clone());
    say("objective", from.objective.clone());
    say("data", from.data.clone());
    say("predicted loss", Some(at_lengths(&from.predicted_losses)));
    say("measured loss", Some(at_lengths(&from.measured_losses)));
    lines
}

/// Spans in tokens, a row per head.
fn span_table(plan: &Plan, maps: &[HeadMap]) -> String {
    let heads: Vec<String> = maps.iter().map(|m| format!("span at {}", m.length)).collect();
    let mut head = vec!["layer:head", "alpha + beta N"];
    head.extend(heads.iter().map(String::as_str));
    let kv_heads = plan.shape().kv_heads;
    let rows: Vec<Vec<String>> = plan
        .rules()
        .iter()
        .enumerate()
        .map(|(index, rule)| {
            let lines: Vec<_> =
                rule.lines().iter().map(|l| format!("{:.0} + {:.3} N", l.alpha, l.beta)).collect();
            let mut row =
                vec![format!("{}:{}", index / kv_heads, index % kv_heads), lines.join(" | ")];
            row.extend(maps.iter().map(|m| m.spans[index].to_string()));
            row
        })
        .collect();
    table(&head, &rows)
}
