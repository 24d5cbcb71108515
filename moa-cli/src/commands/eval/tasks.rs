use moa_models::{Checkpoint, Math, SizedQuestion, Task, TaskSources};

use super::evicting::EvictingArgs;
use super::questions::ItemArgs;
use super::sources::SourceArgs;
use super::summary::{Size, Summary};
use crate::args::{ModelArg, PlanArgs, parse_count, task_parser};
use crate::error::{Error, Result};
use crate::files::Files;
use crate::model::{self, on_model};
use crate::output::Context;
use crate::progress::Progress;
use crate::style::StyleArgs;

/// Ask generated questions: RULER's 13 tasks, pass key, multi-key, associative recall, paraphrased needle
///
/// niah_*, vt, cwe, fwe, qa_1 and qa_2 are RULER's, with its wording, its beginning of the answer and its
/// scores: the share of the right strings that the answers contain, for qa_* whether there is any. qa_1
/// and qa_2 need a file in SQuAD's or HotpotQA's format. passkey: the one number in prose. multi-key: one
/// of 8 record lines in prose. mqar: 4 of many record lines, asked one after another in one conversation.
/// paraphrased-needle: a fact that is asked for in other words, as in NoLiMa. multi-key and mqar are worded
/// as LongEval is; the others need a model that understands plain English.
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Example:\n  moa eval tasks --model assets/moa-tiny --plan plan.json --task mqar --lengths 1024,2048 --samples 20"
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
    /// What to ask
    #[arg(long, value_parser = task_parser())]
    task: Task,
    /// Context lengths, messages and answers together
    #[arg(long, default_value = "1024,2048", value_delimiter = ',', value_name = "TOKENS,..", value_parser = parse_count)]
    lengths: Vec<usize>,
    /// Questions per length
    #[arg(long, default_value_t = 20, value_name = "N", value_parser = parse_count)]
    samples: usize,
    /// Most tokens of an answer [default: RULER's for its tasks, else 48]
    #[arg(long, value_name = "N", value_parser = parse_count)]
    max_new_tokens: Option<usize>,
    #[command(flatten)]
    sources: SourceArgs,
    #[command(flatten)]
    items: ItemArgs,
}

pub(crate) fn run(args: &Args, context: &Context) -> Result<()> {
    let inputs = Files::default()
        .reads([&args.model.model])
        .reads(&args.plan.plan)
        .reads(args.sources.files());
    args.items.check(inputs.reads(&args.style.template))?;
    args.sources.check(&[args.task])?;
    let sources = args.sources.load()?;
    on_model!(context, &args.model, args.plan.plan.as_deref(), |model, context| with_model(
        args, &sources, model, context
    ))
}

fn with_model<D: Math>(
    args: &Args,
    sources: &TaskSources,
    mut model: Checkpoint<D>,
    context: &Context,
) -> Result<()> {
    args.style.apply(&mut model)?;
    let plan = args.rival.over(model::choose_plan(&args.plan, &model, context)?);
    let max_new_tokens = args.max_new_tokens.unwrap_or(args.task.max_new_tokens());
    let mut lengths = args.lengths.clone();
    lengths.sort_unstable();
    lengths.dedup();
    let limit = model.model.config().context_length();
    if let Some(&asked) = lengths.iter().find(|length| **length > limit) {
        let error = moa_models::Error::ContextExceeded { asked, limit };
        return Err(Error::from(error).at("--lengths"));
    }
    let bar = Progress::new(context, "make", lengths.len() * args.samples);
    let mut questions = Vec::new();
    for &length in &lengths {
        for case in 0..args.samples {
            let draw = (context.seed, case);
            let question =
                model.task_question_from(sources, args.task, length, max_new_tokens, draw);
            let question = question.map_err(|e| Error::from(e).at("--lengths"))?;
            let place = format!("{} at {length} tokens", args.task.name());
            questions.push(SizedQuestion { size: Some(length), case, question, place });
            bar.step();
        }
    }
    drop(bar);
    let mut own = args.sources.settings()?;
    own.push(("evaluation", args.task.name().to_string()));
    let evaluation = args.items.evaluation(&model, &plan, max_new_tokens, own, context);
    let mut bar = Progress::new(context, "evaluate", questions.len());
    let report = model.evaluate(&questions, &evaluation, &mut bar)?;
    drop(bar);
    let depth_bins = args.items.depth_bins;
    context.result(&Summary::new(&plan.name, &report, Size::Tokens, depth_bins))
}
