use std::path::PathBuf;

use moa_core::{DEFAULT_SINK, ElasticRule, HeadRule, Profile};
use moa_models::{
    Backward, CalibrationData, CalibrationOptions, Checkpoint, DEFAULT_BLOCK, WeightedObjective,
    describe,
};
use serde_json::json;

use crate::args::{DataArg, ModelArg, ObjectiveArgs, parse_count};
use crate::calibration;
use crate::error::Result;
use crate::files::check_file;
use crate::model::{self, on_device};
use crate::output::{Context, table};
use crate::progress::Progress;

/// Measure how much each head needs each part of the context
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Example:\n  moa profile --model assets/moa-tiny --lengths 1024,2048 --out profile.safetensors"
)]
pub(crate) struct Args {
    #[command(flatten)]
    model: ModelArg,
    #[command(flatten)]
    data: DataArg,
    /// Context lengths to measure at, prompt and response together
    #[arg(long, default_value = "1024,2048", value_delimiter = ',', value_name = "TOKENS,..", value_parser = parse_count)]
    lengths: Vec<usize>,
    /// Most calibration items per length
    #[arg(long, default_value_t = 8, value_name = "N", value_parser = parse_count)]
    samples: usize,
    #[command(flatten)]
    objective: ObjectiveArgs,
    /// Tokens per side of an influence block
    #[arg(long, default_value_t = DEFAULT_BLOCK, value_name = "TOKENS", value_parser = parse_count)]
    block: usize,
    /// Most tokens of a response that the dense model writes
    #[arg(long, default_value_t = 48, value_name = "TOKENS", value_parser = parse_count)]
    max_response: usize,
    /// Profile to write
    #[arg(long, value_name = "FILE")]
    out: PathBuf,
}

/// Heads named in the summary.
const TOP_HEADS: usize = 5;

pub(crate) fn run(args: &Args, context: &Context) -> Result<()> {
    model::check_gradients(context)?;
    check_file(&args.out)?;
    let data = calibration::load(&args.data.data)?;
    on_device!(context, |device| with_model(
        args,
        &data,
        &model::open(device, &args.model.model)?,
        context
    ))
}

fn with_model<D: Backward>(
    args: &Args,
    data: &CalibrationData,
    model: &Checkpoint<D>,
    context: &Context,
) -> Result<()> {
    let options = CalibrationOptions {
        lengths: args.lengths.clone(),
        samples: args.samples,
        questions: 1,
        max_response: args.max_response,
        seed: context.seed,
    };
    let items = calibration::items(model, data, &options, context)?;
    let mut bar = Progress::new(context, "profile", 1);
    let description = format!("{}, seed {}", describe(data), context.seed);
    let ObjectiveArgs { objective, token_weight } = args.objective;
    let objective = WeightedObjective { objective, weight: token_weight };
    let profile = model.model.profile_all(&items, objective, args.block, &description, &mut bar)?;
    drop(bar);
    profile.save(&args.out)?;

    let mut rows = Vec::new();
    let mut at = Vec::new();
    for length in profile.lengths() {
        let influence = profile.at(length)?;
        let (samples, far) = (influence.samples(), influence.far_losses());
        let heads = ranked_heads(&profile, length)?;
        let names: Vec<_> = heads
            .iter()
            .take(TOP_HEADS)
            .map(|(layer, head, _)| format!("{layer}:{head}"))
            .collect();
        let growth = format!("{:.3} +- {:.3}", far.mean(), far.standard_error());
        rows.push(vec![length.to_string(), samples.to_string(), growth, names.join(" ")]);
        let heads: Vec<_> = heads
            .iter()
            .map(|(layer, head, loss)| json!({ "layer": layer, "kv_head": head, "loss": loss }))
            .collect();
        at.push(json!({
            "length": length,
            "samples": samples,
            "far_loss": far.mean(),
            "far_loss_standard_error": far.standard_error(),
            "heads": heads,
        }));
    }
    context.print(table(
        &[
            "length",
            "samples",
            "loss without the far context",
            "heads that need the context most (layer:KV head)",
        ],
        &rows,
    ))?;
    context.print(format_args!("\nProfile: {}", args.out.display()))?;
    let warnings = calibration::warnings(&profile, context)?;
    context.json(&json!({
        "out": args.out,
        "objective": profile.info.objective,
        "data": profile.info.data,
        "lengths": at,
        "warnings": warnings,
    }))
}

/// Heads by the predicted loss of leaving them the shortest span, largest first.
fn ranked_heads(profile: &Profile, length: usize) -> Result<Vec<(usize, usize, f64)>> {
    let influence = profile.at(length)?;
    let shortest =
        HeadRule::from(ElasticRule::fixed(DEFAULT_SINK + 16)).span(length, DEFAULT_SINK, 1);
    let mut heads = Vec::new();
    for layer in 0..profile.shape.layers {
        for head in 0..profile.shape.kv_heads {
            heads.push((layer, head, influence.loss(layer, head, shortest)));
        }
    }
    heads.sort_by(|a, b| b.2.total_cmp(&a.2));
    Ok(heads)
}
