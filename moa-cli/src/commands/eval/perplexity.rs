use std::fmt;
use std::ops::ControlFlow;
use std::path::PathBuf;

use moa_models::{Checkpoint, Math, PerplexityReport, PooledPerplexity, read_text};
use serde::Serialize;

use crate::args::{ModelArg, PlanArgs, parse_count};
use crate::error::{Error, Result};
use crate::model::{self, on_model};
use crate::output::{Context, bytes, percent, table};
use crate::progress::Progress;

/// Perplexity of texts, cut into windows
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Example:\n  moa eval perplexity --model assets/moa-tiny --plan plan.json --text book.txt --lengths 2048,4096"
)]
pub(crate) struct Args {
    #[command(flatten)]
    model: ModelArg,
    #[command(flatten)]
    plan: PlanArgs,
    /// The texts
    #[arg(long, value_name = "FILE", required = true, num_args = 1..)]
    text: Vec<PathBuf>,
    /// Tokens of a window; several lengths are measured one after another
    #[arg(long, alias = "length", required = true, value_delimiter = ',', value_name = "TOKENS,..", value_parser = parse_count)]
    lengths: Vec<usize>,
    /// Most windows of a text
    #[arg(long, default_value_t = 8, value_name = "W", value_parser = parse_count)]
    windows: usize,
}

pub(crate) fn run(args: &Args, context: &Context) -> Result<()> {
    let mut texts = Vec::new();
    for path in &args.text {
        let text = read_text(path)?;
        texts.push((path.display().to_string(), text));
    }
    let mut lengths = args.lengths.clone();
    lengths.sort_unstable();
    lengths.dedup();
    on_model!(context, &args.model, args.plan.plan.as_deref(), |model, context| with_model(
        args,
        (&texts, &lengths),
        &model,
        context
    ))
}

fn with_model<D: Math>(
    args: &Args,
    (texts, lengths): (&[(String, String)], &[usize]),
    model: &Checkpoint<D>,
    context: &Context,
) -> Result<()> {
    let chosen = model::choose_plan(&args.plan, model, context)?;
    let longest = lengths.last().copied().unwrap_or(0);
    // Before texts are cut into tokens, which takes long ones a while.
    super::check_lengths(lengths, model)?;
    let tokens = texts
        .iter()
        .map(|(name, text)| Ok((name, model.tokenizer.encode(text, false)?)))
        .collect::<Result<Vec<_>>>()?;
    let bos = model.model.config().bos_token_id;
    for (name, tokens) in &tokens {
        check(tokens.len() + usize::from(bos.is_some()), longest).map_err(|e| e.at(*name))?;
    }
    let total = lengths.len() * tokens.len() * args.windows;
    let bar = Progress::new(context, "windows", total);
    let (mut all, mut measured) = (Vec::new(), Vec::new());
    for &length in lengths {
        let mut own = Vec::new();
        for (name, tokens) in &tokens {
            let mut step = |_, _, _| {
                bar.step();
                ControlFlow::Continue(())
            };
            let report = model
                .model
                .perplexity(tokens, bos, length, args.windows, &chosen.plan, &mut step)
                .map_err(|e| Error::from(e).at(*name))?;
            own.push(report);
        }
        let names = tokens.iter().map(|(name, _)| *name);
        let texts = names.zip(&own).map(|(text, &report)| OfText { text, report }).collect();
        measured.push(OfLength { length, pooled: pooled(&own)?, texts });
        all.extend(own);
    }
    drop(bar);
    context.result(&Outcome { plan: &chosen.name, pooled: pooled(&all)?, lengths: measured })
}

fn pooled(reports: &[PerplexityReport]) -> Result<PooledPerplexity> {
    PooledPerplexity::new(reports).ok_or_else(|| Error::argument("text", "at least one", "none"))
}

/// Perplexity under a plan: of all texts, of each length, of each text.
#[derive(Debug, Serialize)]
struct Outcome<'a> {
    plan: &'a str,
    #[serde(flatten)]
    pooled: PooledPerplexity,
    lengths: Vec<OfLength<'a>>,
}

#[derive(Debug, Serialize)]
struct OfLength<'a> {
    length: usize,
    #[serde(flatten)]
    pooled: PooledPerplexity,
    texts: Vec<OfText<'a>>,
}

#[derive(Debug, Serialize)]
struct OfText<'a> {
    text: &'a str,
    #[serde(flatten)]
    report: PerplexityReport,
}

impl OfLength<'_> {
    fn row(&self) -> Vec<String> {
        let of = &self.pooled;
        vec![
            self.length.to_string(),
            format!("{:.4}", of.perplexity),
            of.tokens.to_string(),
            of.windows.to_string(),
            percent(of.density),
            bytes(of.kv_bytes),
            bytes(of.kv_bytes_dense),
            format!("{:.1}", of.seconds),
        ]
    }
}

impl fmt::Display for Outcome<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let head = [
            "length",
            "perplexity",
            "tokens",
            "windows",
            "density",
            "KV bytes",
            "dense",
            "seconds",
        ];
        let rows: Vec<_> = self.lengths.iter().map(OfLength::row).collect();
        write!(f, "Cache: {}\n\n{}", self.plan, table(&head, &rows))
    }
}

/// Checks that a text fills a window of the greatest length, before the shorter ones are measured.
fn check(tokens: usize, longest: usize) -> Result<()> {
    match tokens < longest {
        true => Err(Error::argument("text", format!("at least {longest} tokens"), tokens)),
        false => Ok(()),
    }
}
