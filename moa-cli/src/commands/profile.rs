use std::fmt;
use std::path::{Path, PathBuf};

use moa_core::{DEFAULT_SINK, ElasticRule, HeadRule, Profile};
use moa_models::{
    Backward, Calibration, CalibrationData, CalibrationOptions, Checkpoint, DEFAULT_BLOCK, Part,
    WeightedObjective, profile_warnings,
};
use serde::Serialize;

use crate::args::{DataArg, ModelArg, ObjectiveArgs, parse_count};
use crate::calibration;
use crate::error::Result;
use crate::files::Files;
use crate::model::{self, on_model};
use crate::output::{Context, shown, table};
use crate::progress::Progress;
use crate::style::StyleArgs;

/// Measure how much each head needs each part of the context
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Example:\n  moa profile --model assets/moa-tiny --lengths 1024,2048 --out profile.safetensors"
)]
pub(crate) struct Args {
    #[command(flatten)]
    model: ModelArg,
    #[command(flatten)]
    style: StyleArgs,
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
    /// Most tokens of a response that the dense model writes, and tokens to predict at the end of a window of
    /// running text
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
    Files::default()
        .reads([&args.model.model])
        .reads([&args.data.data])
        .reads(&args.style.template)
        .writes("--out", &args.out)?;
    let data = calibration::load(&args.data.data)?;
    on_model!(context, &args.model, None::<&std::path::Path>, |model, context| with_model(
        args, &data, model, context
    ))
}

fn with_model<D: Backward>(
    args: &Args,
    data: &CalibrationData,
    mut model: Checkpoint<D>,
    context: &Context,
) -> Result<()> {
    args.style.apply(&mut model)?;
    let model = &model;
    let options = CalibrationOptions {
        lengths: args.lengths.clone(),
        samples: args.samples,
        questions: 1,
        max_response: args.max_response,
        part: Part::Profiled,
        seed: context.seed,
    };
    let Calibration { items, data } =
        calibration::items(model, data, &options, &[("--lengths", &args.lengths)], context)?;
    let mut bar = Progress::of_stages(context);
    let description = format!("{data}, seed {}", context.seed);
    let ObjectiveArgs { objective, token_weight } = args.objective;
    let objective = WeightedObjective { objective, weight: token_weight };
    let profile = model.model.profile_all(&items, objective, args.block, &description, &mut bar)?;
    drop(bar);
    if model.model.is_first() {
        profile.save(&args.out)?;
    }

    let lengths = profile.lengths().into_iter().map(|length| ProfiledLength::new(&profile, length));
    context.result(&Outcome {
        out: &args.out,
        objective: &profile.info.objective,
        data: &profile.info.data,
        lengths: lengths.collect::<Result<_>>()?,
        warnings: calibration::tell(profile_warnings(&profile)?, context),
    })
}

/// What a profile says.
#[derive(Debug, Serialize)]
struct Outcome<'a> {
    #[serde(serialize_with = "shown")]
    out: &'a Path,
    objective: &'a str,
    data: &'a str,
    lengths: Vec<ProfiledLength>,
    warnings: Vec<String>,
}

#[derive(Debug, Serialize)]
struct ProfiledLength {
    length: usize,
    samples: u64,
    far_loss: f64,
    /// Two samples or more show it.
    far_loss_standard_error: Option<f64>,
    heads: Vec<RankedHead>,
}

/// A head with the predicted loss of leaving it the shortest span.
#[derive(Debug, Serialize)]
struct RankedHead {
    layer: usize,
    kv_head: usize,
    loss: f64,
}

impl ProfiledLength {
    fn new(profile: &Profile, length: usize) -> Result<Self> {
        let influence = profile.at(length)?;
        let far = influence.far_losses();
        Ok(Self {
            length,
            samples: influence.samples(),
            far_loss: far.mean(),
            far_loss_standard_error: far.standard_error(),
            heads: ranked_heads(profile, length)?,
        })
    }

    fn row(&self) -> Vec<String> {
        let name = |head: &RankedHead| format!("{}:{}", head.layer, head.kv_head);
        let names: Vec<_> = self.heads.iter().take(TOP_HEADS).map(name).collect();
        vec![
            self.length.to_string(),
            self.samples.to_string(),
            match self.far_loss_standard_error {
                Some(error) => format!("{:.3} +- {error:.3}", self.far_loss),
                None => format!("{:.3}", self.far_loss),
            },
            names.join(" "),
        ]
    }
}

impl fmt::Display for Outcome<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let head = [
            "length",
            "samples",
            "loss without the far context",
            "heads that need the context most (layer:KV head)",
        ];
        let rows: Vec<_> = self.lengths.iter().map(ProfiledLength::row).collect();
        write!(f, "{}\n\nProfile: {}", table(&head, &rows), self.out.display())
    }
}

/// All heads, those that lose most by the shortest span first.
fn ranked_heads(profile: &Profile, length: usize) -> Result<Vec<RankedHead>> {
    let influence = profile.at(length)?;
    let shortest =
        HeadRule::from(ElasticRule::fixed(DEFAULT_SINK + 16)).span(length, DEFAULT_SINK, 1);
    let mut heads = Vec::new();
    for layer in 0..profile.shape().layers {
        for head in 0..profile.shape().kv_heads {
            let loss = influence.loss(layer, head, shortest);
            heads.push(RankedHead { layer, kv_head: head, loss });
        }
    }
    heads.sort_by(|a, b| b.loss.total_cmp(&a.loss));
    Ok(heads)
}
