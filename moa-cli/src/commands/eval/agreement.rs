use std::fmt;
use std::path::PathBuf;

use moa_models::{
    Agreement, CalibrationData, CalibrationOptions, Checkpoint, HELD_OUT_TEXT, Item, Math,
};
use serde::Serialize;

use super::evicting::{EvictingArgs, continuation};
use crate::args::{ModelArg, PlanArgs, parse_count};
use crate::calibration;
use crate::error::{Error, Result};
use crate::model::{self, on_model};
use crate::output::{Context, bytes, percent, table};
use crate::progress::Progress;
use crate::style::StyleArgs;

/// Compare a plan's next-token distributions with those of dense attention
///
/// Dense attention and the plan read the same tokens: those of texts, and with --data the answers
/// to prompts. Given are the share of tokens whose likeliest successor is the same, the mean of
/// KL(dense || plan) in nats, its 99th percentile and its mean over the worst 1 % of tokens, and the perplexity of both.
/// Rivals that evict keys do so once the first part of a window, or the prompt of an answer, is read,
/// and are compared on what follows; give --continuation for a plan on the same tokens.
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Example:\n  moa eval agreement --model assets/moa-tiny --plan plan.json --text book.txt --data records --lengths 1024,2048"
)]
pub(crate) struct Args {
    #[command(flatten)]
    model: ModelArg,
    #[command(flatten)]
    style: StyleArgs,
    #[command(flatten)]
    plan: PlanArgs,
    #[command(flatten)]
    rival: EvictingArgs,
    /// Predict only the last tokens of each window of text: those before are read, and where --rival is given,
    /// evicted after that [default: all, or with --rival an eighth of the window, and no more than half of the
    /// density]
    #[arg(long, value_name = "TOKENS", value_parser = parse_count)]
    continuation: Option<usize>,
    /// Texts [default: a built-in essay]
    #[arg(long, value_name = "FILE", num_args = 1..)]
    text: Vec<PathBuf>,
    /// Prompts whose answers are compared too: `tasks` or `records` for built-in ones, or a file as
    /// `moa compress --data` takes; dense attention writes the answers that are not given
    #[arg(long, value_name = "tasks|records|FILE")]
    data: Option<String>,
    /// Tokens of a window of text, and of a prompt with its answer
    #[arg(long, default_value = "1024,2048", value_delimiter = ',', value_name = "TOKENS,..", value_parser = parse_count)]
    lengths: Vec<usize>,
    /// Most windows of a text
    #[arg(long, default_value_t = 4, value_name = "W", value_parser = parse_count)]
    windows: usize,
    /// Prompts per length
    #[arg(long, default_value_t = 8, value_name = "N", value_parser = parse_count)]
    samples: usize,
    /// Most tokens of an answer that dense attention writes, and tokens to predict at the end of a window of
    /// running text
    #[arg(long, default_value_t = 48, value_name = "TOKENS", value_parser = parse_count)]
    max_response: usize,
}

pub(crate) fn run(args: &Args, context: &Context) -> Result<()> {
    let mut texts = Vec::new();
    for path in &args.text {
        let text = moa_core::read_text_file(path)
            .map_err(|source| Error::Read { path: path.clone(), source })?;
        texts.push((path.display().to_string(), text));
    }
    if texts.is_empty() {
        texts.push(("built-in essay".to_string(), HELD_OUT_TEXT.to_string()));
    }
    let data = args.data.as_deref().map(calibration::load).transpose()?;
    on_model!(context, &args.model, args.plan.plan.as_deref(), |model, context| with_model(
        args,
        (&texts, data.as_ref()),
        model,
        context
    ))
}

fn with_model<D: Math>(
    args: &Args,
    (texts, data): (&[(String, String)], Option<&CalibrationData>),
    mut model: Checkpoint<D>,
    context: &Context,
) -> Result<()> {
    args.style.apply(&mut model)?;
    let model = &model;
    let chosen = args.rival.over(model::choose_plan(&args.plan, model, context)?);
    let mut lengths = args.lengths.clone();
    lengths.sort_unstable();
    lengths.dedup();
    super::check_lengths(&lengths, model)?;
    let mut sets: Vec<(usize, &'static str, Vec<Item>)> = Vec::new();
    for &length in &lengths {
        let mut items = Vec::new();
        for (name, text) in texts {
            let windows = model.text_windows(text, length, args.windows);
            let windows = windows.map_err(|e| Error::from(e).at(name))?;
            let evicted = chosen.eviction.map(|of| continuation(length, of.density));
            match args.continuation.or(evicted) {
                None => items.extend(windows),
                Some(predicted) => {
                    for window in windows {
                        items.push(window.continued(predicted)?);
                    }
                }
            }
        }
        sets.push((length, "text", items));
    }
    if let Some(data) = data {
        let options = CalibrationOptions {
            lengths,
            samples: args.samples,
            max_response: args.max_response,
            // Other records than those that a plan was found on by the same seed.
            seed: context.seed ^ HELD_OUT_SEED,
            ..CalibrationOptions::default()
        };
        let made =
            calibration::items(model, data, &options, &[("--lengths", &args.lengths)], context)?;
        sets.extend(made.items.into_iter().map(|(length, items)| (length, "answers", items)));
    }
    let mut rows = Vec::new();
    for (length, of, items) in &sets {
        let mut bar = Progress::new(context, "evaluate", items.len());
        let agreement = match &chosen.eviction {
            None => model.model.agreement(items, &chosen.plan, *length, &mut bar)?,
            Some(eviction) => model.agreement_evicting(items, eviction, &mut bar)?,
        };
        rows.push(Row { of, length: *length, items: items.len(), agreement });
    }
    context.result(&Outcome { plan: &chosen.name, rows })
}

/// Set apart from the seeds of `compress`, which are small numbers and those that it derives.
const HELD_OUT_SEED: u64 = 0x4e1d_0000;

/// Agreement of a plan with dense attention: of texts and of answers, at each length.
#[derive(Debug, Serialize)]
struct Outcome<'a> {
    plan: &'a str,
    rows: Vec<Row>,
}

#[derive(Debug, Serialize)]
struct Row {
    of: &'static str,
    length: usize,
    items: usize,
    #[serde(flatten)]
    agreement: Agreement,
}

impl fmt::Display for Outcome<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let head = [
            "of",
            "length",
            "tokens",
            "equal greedy",
            "KL mean",
            "KL 99th pct",
            "KL worst 1 %",
            "dense ppl",
            "plan ppl",
            "ratio",
            "density",
            "KV bytes",
            "dense",
        ];
        let row = |row: &Row| {
            let of = &row.agreement;
            vec![
                row.of.to_string(),
                row.length.to_string(),
                of.tokens.to_string(),
                percent(of.equal_greedy),
                format!("{:.5}", of.kl_mean),
                format!("{:.4}", of.kl_p99),
                format!("{:.4}", of.kl_worst),
                format!("{:.4}", of.dense_perplexity),
                format!("{:.4}", of.plan_perplexity),
                format!("{:.4}", of.perplexity_ratio),
                percent(of.density),
                bytes(of.kv_bytes),
                bytes(of.kv_bytes_dense),
            ]
        };
        let rows: Vec<_> = self.rows.iter().map(row).collect();
        write!(f, "Cache: {}\n\n{}", self.plan, table(&head, &rows))
    }
}
