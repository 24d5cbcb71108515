use std::path::PathBuf;

use moa_core::write_atomic;
use moa_models::{RetrievalCase, RetrievalReport};
use serde_json::{Value, json};

use crate::args::{ModelArg, PlanArgs, parse_count};
use crate::error::{Error, Result};
use crate::files::check_optional;
use crate::model::{self, Model};
use crate::output::{Context, bytes, percent, table};
use crate::progress::Progress;
use moa_core::Plan;

/// Ask LongEval cases: the last integer of the answer must be the expected number
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Example:\n  moa eval retrieval --model assets/moa-tiny --plan plan.json --data 200_lines.jsonl --lines 90 --limit 20"
)]
pub(crate) struct Args {
    #[command(flatten)]
    model: ModelArg,
    #[command(flatten)]
    plan: PlanArgs,
    /// Cases, one {"prompt", "expected_number"} a line
    #[arg(long, value_name = "FILE.jsonl")]
    data: PathBuf,
    /// Shorten each case to this many record lines around the right one
    #[arg(long, value_name = "K", value_parser = parse_count)]
    lines: Option<usize>,
    /// Ask only the first cases
    #[arg(long, value_name = "M", value_parser = parse_count)]
    limit: Option<usize>,
    /// Most tokens of an answer
    #[arg(long, default_value_t = 100, value_name = "N", value_parser = parse_count)]
    max_new_tokens: usize,
    /// File for every case's answer, one object a line
    #[arg(long, value_name = "FILE.jsonl")]
    items: Option<PathBuf>,
}

pub(crate) fn run(args: &Args, context: &Context) -> Result<()> {
    check_optional(args.items.as_deref())?;
    let mut cases = RetrievalCase::load(&args.data)?;
    cases.truncate(args.limit.unwrap_or(usize::MAX));
    let place = |index: usize| format!("{}, case {}", args.data.display(), index + 1);
    if let Some(lines) = args.lines {
        for (index, case) in cases.iter_mut().enumerate() {
            let seed = context.seed.rotate_left(32) ^ index as u64;
            *case = case.shorten(lines, seed).map_err(|e| Error::from(e).at(place(index)))?;
        }
    }
    let model = model::open(&args.model.model, context)?;
    let chosen = model::choose_plan(&args.plan, &model)?;
    let mut asked = 0;
    let report = ask(&model, &cases, &chosen.plan, args.max_new_tokens, &mut asked, context)
        .map_err(|error| error.at(place(asked)))?;
    if let Some(path) = &args.items {
        let lines: String =
            report.items.iter().map(|item| json!(item).to_string() + "\n").collect();
        write_atomic(path, lines.as_bytes())?;
    }
    context.print(table(&HEAD, &[row(&chosen.name, &report)]))?;
    let mut value = report_json(&report);
    value["plan"] = json!(chosen.name);
    context.json(&value)
}

/// Asks the cases under a progress bar; `asked` counts those answered.
pub(super) fn ask(
    model: &Model,
    cases: &[RetrievalCase],
    plan: &Plan,
    max_new_tokens: usize,
    asked: &mut usize,
    context: &Context,
) -> Result<RetrievalReport> {
    let bar = Progress::new(context, "ask", cases.len());
    let mut correct = 0;
    Ok(model.retrieval(cases, plan, max_new_tokens, &mut |_, right| {
        *asked += 1;
        correct += usize::from(right);
        bar.message(format!("{correct} right"));
        bar.step()
    })?)
}

/// Columns of [`row`].
pub(super) const HEAD: [&str; 8] = [
    "cache",
    "right",
    "accuracy",
    "prompt tokens",
    "density",
    "KV bytes",
    "prefill tok/s",
    "decode tok/s",
];

/// A report as a row of a table.
pub(super) fn row(name: &str, report: &RetrievalReport) -> Vec<String> {
    vec![
        name.to_string(),
        format!("{}/{}", report.correct, report.cases),
        percent(report.accuracy),
        format!("{:.0}", report.prompt_tokens_mean),
        percent(report.density),
        bytes(report.kv_bytes),
        format!("{:.0}", report.prefill_tokens_per_second),
        format!("{:.1}", report.decode_tokens_per_second),
    ]
}

/// A report without its items.
pub(super) fn report_json(report: &RetrievalReport) -> Value {
    json!({
        "cases": report.cases,
        "correct": report.correct,
        "accuracy": report.accuracy,
        "prompt_tokens_mean": report.prompt_tokens_mean,
        "density": report.density,
        "kv_bytes": report.kv_bytes,
        "kv_bytes_dense": report.kv_bytes_dense,
        "prefill_tokens_per_second": report.prefill_tokens_per_second,
        "decode_tokens_per_second": report.decode_tokens_per_second,
        "seconds": report.seconds,
    })
}
