use std::path::PathBuf;

use moa_models::{Checkpoint, Math, RetrievalCase, SizedQuestion};

use super::evicting::EvictingArgs;
use super::questions::{ItemArgs, file_fingerprint};
use super::summary::{Size, Summary};
use crate::args::{ModelArg, PlanArgs, parse_count};
use crate::error::{Error, Result};
use crate::files::Files;
use crate::model::{self, on_model};
use crate::output::Context;
use crate::progress::Progress;
use crate::style::StyleArgs;

/// Ask LongEval cases: the last integer of the answer must be the expected number
///
/// Accuracy is given by length and by the depth of the right line, and for several lengths the
/// effective context: the longest with at least 90 % right, over the mean of keys that a KV head
/// keeps there.
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Example:\n  moa eval retrieval --model assets/moa-tiny --plan plan.json --data 200_lines.jsonl --lines 40,90,200 --limit 20"
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
    /// Cases, one {"prompt", "expected_number"} a line
    #[arg(long, value_name = "FILE.jsonl")]
    data: PathBuf,
    /// Shorten each case to so many record lines around the right one; several lengths are asked one
    /// after another [default: whole cases]
    #[arg(long, value_delimiter = ',', value_name = "K,..", value_parser = parse_count)]
    lines: Vec<usize>,
    /// Ask only the first cases
    #[arg(long, value_name = "M", value_parser = parse_count)]
    limit: Option<usize>,
    /// Most tokens of an answer
    #[arg(long, default_value_t = 100, value_name = "N", value_parser = parse_count)]
    max_new_tokens: usize,
    #[command(flatten)]
    items: ItemArgs,
}

pub(crate) fn run(args: &Args, context: &Context) -> Result<()> {
    let inputs =
        Files::default().reads([&args.model.model]).reads(&args.plan.plan).reads([&args.data]);
    args.items.check(inputs.reads(&args.style.template))?;
    let mut cases = RetrievalCase::load(&args.data)?;
    cases.truncate(args.limit.unwrap_or(usize::MAX));
    let mut questions = Vec::new();
    let mut lines: Vec<Option<usize>> = args.lines.iter().copied().map(Some).collect();
    lines.sort_unstable();
    lines.dedup();
    if lines.is_empty() {
        lines.push(None);
    }
    if let Some(&asked) = args.lines.iter().max() {
        let most = cases.iter().map(RetrievalCase::record_lines).max().unwrap_or(0);
        if asked > most {
            let expected = format!("at most {most}, the record lines of the longest case");
            return Err(Error::argument("--lines", expected, asked));
        }
    }
    for &size in &lines {
        for (index, case) in cases.iter().enumerate() {
            let place = format!("{}, case {}", args.data.display(), index + 1);
            let seed = context.seed.rotate_left(32) ^ index as u64;
            let question = match size {
                Some(lines) => case.shorten(lines, seed).map(|case| case.question()),
                None => Ok(case.question()),
            };
            let question = question.map_err(|e| Error::from(e).at(&place))?;
            questions.push(SizedQuestion { size, case: index, question, place });
        }
    }
    let asked = args.lines.iter().copied().max().unwrap_or(0);
    let fewer = cases.iter().filter(|case| case.record_lines() < asked).count();
    if fewer > 0 {
        context.note(format_args!(
            "warning: {fewer} of {} cases have fewer than {asked} record lines and are asked as they are",
            cases.len()
        ));
    }
    on_model!(context, &args.model, args.plan.plan.as_deref(), |model, context| with_model(
        args, &questions, model, context
    ))
}

fn with_model<D: Math>(
    args: &Args,
    questions: &[SizedQuestion],
    mut model: Checkpoint<D>,
    context: &Context,
) -> Result<()> {
    args.style.apply(&mut model)?;
    let plan = args.rival.over(model::choose_plan(&args.plan, &model, context)?);
    let own = [("evaluation", "retrieval".to_string()), ("data", file_fingerprint(&args.data)?)];
    let evaluation = args.items.evaluation(&model, &plan, args.max_new_tokens, own, context);
    let mut bar = Progress::new(context, "evaluate", questions.len());
    let report = model.evaluate(questions, &evaluation, &mut bar)?;
    drop(bar);
    let depth_bins = args.items.depth_bins;
    context.result(&Summary::new(&plan.name, &report, Size::Lines, depth_bins))
}
