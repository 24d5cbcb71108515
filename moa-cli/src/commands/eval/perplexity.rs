use std::fs;
use std::ops::ControlFlow;
use std::path::PathBuf;

use moa_models::{Checkpoint, Math, PerplexityReport};
use serde_json::{Value, json};

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
        let text = fs::read_to_string(path)
            .map_err(|source| Error::Read { path: path.clone(), source })?;
        texts.push((path.display().to_string(), text));
    }
    let mut lengths = args.lengths.clone();
    lengths.sort_unstable();
    lengths.dedup();
    on_model!(context, &args.model.model, args.plan, |model, context| with_model(
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
    let chosen = model::choose_plan(&args.plan, model)?;
    let tokens = texts
        .iter()
        .map(|(name, text)| Ok((name, model.tokenizer.encode(text, false)?)))
        .collect::<Result<Vec<_>>>()?;
    let bos = model.model.config().bos_token_id;
    let longest = lengths.last().copied().unwrap_or(0);
    for (name, tokens) in &tokens {
        check(model, tokens.len() + usize::from(bos.is_some()), longest)
            .map_err(|e| e.at(*name))?;
    }
    let total = lengths.len() * tokens.len() * args.windows;
    let bar = Progress::new(context, "windows", total);
    let (mut rows, mut all, mut at) = (Vec::new(), Vec::new(), Vec::new());
    for &length in lengths {
        let mut own = Vec::new();
        let mut values = Vec::new();
        for (name, tokens) in &tokens {
            let mut step = |_, _, _| {
                bar.step();
                ControlFlow::Continue(())
            };
            let report = model
                .model
                .perplexity(tokens, bos, length, args.windows, &chosen.plan, &mut step)
                .map_err(|e| Error::from(e).at(*name))?;
            let mut value = json!(report);
            value["text"] = json!(name);
            values.push(value);
            own.push(report);
        }
        rows.push(row(length, &own));
        let mut value = pooled(&own);
        value["length"] = json!(length);
        value["texts"] = json!(values);
        at.push(value);
        all.extend(own);
    }
    drop(bar);
    let head =
        ["length", "perplexity", "tokens", "windows", "density", "KV bytes", "dense", "seconds"];
    context.print(format_args!("Cache: {}\n\n{}", chosen.name, table(&head, &rows)))?;
    let mut value = pooled(&all);
    value["plan"] = json!(chosen.name);
    value["lengths"] = json!(at);
    context.json(&value)
}

/// Checks that a text fills a window of the greatest length, before the shorter ones are measured.
fn check<D: Math>(model: &Checkpoint<D>, tokens: usize, longest: usize) -> Result<()> {
    let limit = model.model.config().context_length();
    if longest > limit {
        return Err(moa_models::Error::ContextExceeded { asked: longest, limit }.into());
    }
    match tokens < longest {
        true => Err(Error::argument("text", format!("at least {longest} tokens"), tokens)),
        false => Ok(()),
    }
}

/// Several reports as one: means over tokens, and over windows for sizes.
fn pooled(reports: &[PerplexityReport]) -> Value {
    let windows: usize = reports.iter().map(|r| r.windows).sum();
    let mean = |field: &dyn Fn(&PerplexityReport) -> f64| {
        reports.iter().map(|r| field(r) * r.windows as f64).sum::<f64>() / windows as f64
    };
    let cross_entropy = cross_entropy(reports);
    json!({
        "perplexity": cross_entropy.exp(),
        "cross_entropy": cross_entropy,
        "tokens": tokens(reports),
        "windows": windows,
        "density": mean(&|r| r.density),
        "kv_bytes": mean(&|r| r.kv_bytes as f64) as u64,
        "kv_bytes_dense": mean(&|r| r.kv_bytes_dense as f64) as u64,
        "seconds": reports.iter().map(|r| r.seconds).sum::<f64>(),
    })
}

fn cross_entropy(reports: &[PerplexityReport]) -> f64 {
    let sum: f64 = reports.iter().map(|r| r.cross_entropy * r.tokens as f64).sum();
    sum / tokens(reports) as f64
}

fn tokens(reports: &[PerplexityReport]) -> usize {
    reports.iter().map(|r| r.tokens).sum()
}

/// The texts of one length as a row of the table; all have the same caches.
fn row(length: usize, reports: &[PerplexityReport]) -> Vec<String> {
    let mut row = vec![length.to_string(), format!("{:.4}", cross_entropy(reports).exp())];
    row.push(tokens(reports).to_string());
    row.push(reports.iter().map(|r| r.windows).sum::<usize>().to_string());
    row.extend(reports.first().map(|r| percent(r.density)));
    row.extend(reports.first().map(|r| bytes(r.kv_bytes)));
    row.extend(reports.first().map(|r| bytes(r.kv_bytes_dense)));
    row.push(format!("{:.1}", reports.iter().map(|r| r.seconds).sum::<f64>()));
    row
}
