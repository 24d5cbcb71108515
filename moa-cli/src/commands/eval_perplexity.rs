use std::fs;
use std::path::PathBuf;

use serde_json::json;

use crate::args::{ModelArg, PlanArgs, parse_count};
use crate::error::{Error, Result};
use crate::model;
use crate::output::{Context, bytes, percent, table};
use crate::progress::Progress;

/// Perplexity of a text, cut into windows
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Example:\n  moa eval perplexity --model assets/moa-tiny --plan plan.json --text book.txt --length 4096"
)]
pub(crate) struct Args {
    #[command(flatten)]
    model: ModelArg,
    #[command(flatten)]
    plan: PlanArgs,
    /// The text
    #[arg(long, value_name = "FILE")]
    text: PathBuf,
    /// Tokens of a window
    #[arg(long, value_name = "N", value_parser = parse_count)]
    length: usize,
    /// Most windows
    #[arg(long, default_value_t = 8, value_name = "W", value_parser = parse_count)]
    windows: usize,
}

pub(crate) fn run(args: &Args, context: &Context) -> Result<()> {
    let text = fs::read_to_string(&args.text)
        .map_err(|source| Error::Read { path: args.text.clone(), source })?;
    let model = model::open(&args.model.model, context)?;
    let chosen = model::choose_plan(&args.plan, &model)?;
    let tokens = model.tokenizer.encode(&text, false)?;
    let bar = Progress::new(context, "windows", args.windows);
    let bos = model.model.config().bos_token_id;
    let report = model
        .model
        .perplexity(&tokens, bos, args.length, args.windows, &chosen.plan, &mut || bar.step())
        .map_err(|e| Error::from(e).at(args.text.display().to_string()))?;
    drop(bar);
    let row = vec![
        chosen.name.clone(),
        format!("{:.4}", report.perplexity),
        report.tokens.to_string(),
        report.windows.to_string(),
        percent(report.density),
        bytes(report.kv_bytes),
        bytes(report.kv_bytes_dense),
        format!("{:.1}", report.seconds),
    ];
    let head =
        ["cache", "perplexity", "tokens", "windows", "density", "KV bytes", "dense", "seconds"];
    context.print(table(&head, &[row]))?;
    let mut value = json!(report);
    value["plan"] = json!(chosen.name);
    context.json(&value)
}
