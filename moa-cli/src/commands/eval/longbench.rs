use std::fmt;
use std::path::PathBuf;

use moa_models::{
    Checkpoint, LongBenchCase, LongBenchDataset, Math, RetrievalReport, SizedQuestion,
};
use serde::Serialize;

use super::evicting::EvictingArgs;
use super::questions::{ItemArgs, file_fingerprint};
use super::summary::Scores;
use crate::args::{ModelArg, PlanArgs, parse_count};
use crate::error::{Error, Result};
use crate::files::Files;
use crate::model::{self, on_model};
use crate::output::{Context, table};
use crate::progress::Progress;
use crate::style::StyleArgs;

/// Ask the questions of LongBench and LV-Eval, from files in their format
///
/// The dataset decides about the prompt, the length of answers and the metric: those of LongBench
/// (LongBench-E too) and of LV-Eval. Prompts that are too long lose tokens in their middle. Scores are means times
/// 100, as the benchmarks give them; but Chinese answers are compared by characters, not by the words of a
/// dictionary, so that their scores are comparable with each other only.
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Example:\n  moa eval longbench --model DIR --plan plan.json --data hotpotqa.jsonl qasper.jsonl --limit 50"
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
    /// Files, one {"input", "context", "answers", ..} a line
    #[arg(long, value_name = "FILE.jsonl", required = true, num_args = 1..)]
    data: Vec<PathBuf>,
    /// The dataset of all files [default: as they say it, or by their names]
    #[arg(long, value_name = "NAME")]
    dataset: Option<String>,
    /// Ask only the first cases of a file
    #[arg(long, value_name = "M", value_parser = parse_count)]
    limit: Option<usize>,
    /// Most tokens of a prompt with its answer [default: the model's context]
    #[arg(long, value_name = "TOKENS", value_parser = parse_count)]
    max_length: Option<usize>,
    #[command(flatten)]
    items: ItemArgs,
}

/// A file with its dataset.
struct Set<'a> {
    path: &'a PathBuf,
    dataset: &'static LongBenchDataset,
    cases: Vec<LongBenchCase>,
}

pub(crate) fn run(args: &Args, context: &Context) -> Result<()> {
    let inputs =
        Files::default().reads([&args.model.model]).reads(&args.plan.plan).reads(&args.data);
    args.items.check(inputs.reads(&args.style.template))?;
    if args.data.len() > 1 {
        args.items.check_unused("given with one file of --data")?;
    }
    let sets = args.data.iter().map(|path| load(args, path)).collect::<Result<Vec<_>>>()?;
    on_model!(context, &args.model, args.plan.plan.as_deref(), |model, context| with_model(
        args, &sets, model, context
    ))
}

fn load<'a>(args: &Args, path: &'a PathBuf) -> Result<Set<'a>> {
    let mut cases = LongBenchCase::load(path)?;
    cases.truncate(args.limit.unwrap_or(usize::MAX));
    let stem = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
    let own = cases.first().and_then(|case| case.dataset.clone()).unwrap_or(stem);
    let name = args.dataset.as_ref().unwrap_or(&own);
    let dataset = LongBenchDataset::named(name)
        .map_err(|e| Error::from(e).at(format!("{} (see --dataset)", path.display())))?;
    Ok(Set { path, dataset, cases })
}

fn with_model<D: Math>(
    args: &Args,
    sets: &[Set<'_>],
    mut model: Checkpoint<D>,
    context: &Context,
) -> Result<()> {
    args.style.apply(&mut model)?;
    let model = &model;
    let plan = args.rival.over(model::choose_plan(&args.plan, model, context)?);
    let limit = model.model.config().context_length();
    let length = args.max_length.unwrap_or(limit);
    if length > limit {
        let error = moa_models::Error::ContextExceeded { asked: length, limit };
        return Err(Error::from(error).at("--max-length"));
    }
    let mut rows = Vec::new();
    for Set { path, dataset, cases } in sets {
        let new = dataset.max_new_tokens;
        let mut questions = Vec::new();
        for (case, of) in cases.iter().enumerate() {
            let place = format!("{}, case {}", path.display(), case + 1);
            let question = model.fitted(&dataset.question(of), new, length);
            let question = question.map_err(|error| {
                let is_short = matches!(error, moa_models::Error::ContextExceeded { .. });
                let error = Error::from(error).at(&place);
                if is_short && args.max_length.is_some() { error.at("--max-length") } else { error }
            })?;
            questions.push(SizedQuestion { size: None, case, question, place });
        }
        let own = [
            ("evaluation", dataset.name.to_string()),
            ("data", file_fingerprint(path)?),
            ("max_length", length.to_string()),
        ];
        let evaluation = args.items.evaluation(model, &plan, new, own, context);
        let mut bar = Progress::new(context, "evaluate", questions.len());
        let report = model.evaluate(&questions, &evaluation, &mut bar)?;
        rows.push(Row::new(dataset.name, &report));
    }
    let average = rows.iter().map(|row| row.score).sum::<f64>() / rows.len() as f64;
    context.result(&Outcome { plan: &plan.name, average, datasets: rows })
}

/// Scores of datasets under a plan.
#[derive(Debug, Serialize)]
struct Outcome<'a> {
    plan: &'a str,
    /// Mean over datasets.
    average: f64,
    datasets: Vec<Row>,
}

#[derive(Debug, Serialize)]
struct Row {
    dataset: &'static str,
    /// Mean times 100.
    score: f64,
    #[serde(flatten)]
    scores: Scores,
}

impl Row {
    fn new(dataset: &'static str, report: &RetrievalReport) -> Self {
        Self { dataset, score: 100.0 * report.accuracy, scores: Scores::from(report) }
    }
}

impl fmt::Display for Outcome<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut head = Scores::HEAD.to_vec();
        head[0] = "dataset";
        head.insert(1, "score");
        let row = |row: &Row| {
            let mut cells = row.scores.row(row.dataset);
            cells.insert(1, format!("{:.2}", row.score));
            cells
        };
        let rows: Vec<_> = self.datasets.iter().map(row).collect();
        write!(f, "Cache: {}\n\n{}", self.plan, table(&head, &rows))?;
        match self.datasets.len() {
            1 => Ok(()),
            _ => write!(f, "\n\nMean of the datasets: {:.2}", self.average),
        }
    }
}
