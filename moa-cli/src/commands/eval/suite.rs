use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::fs;
use std::iter::once;
use std::path::PathBuf;
use std::str::FromStr;

use moa_core::{MAX_LENGTH, Plan};
use moa_models::{
    Agreement, Checkpoint, Evaluation, Eviction, HELD_OUT_TEXT, Math, RetrievalReport,
    SizedQuestion, Task, TaskSources,
};
use serde::Serialize;
use serde_json::json;

use super::evicting::continuation;
use super::rivals::{Cache, RivalArgs};
use super::sources::SourceArgs;
use crate::args::{ModelArg, distinct, parse_count, parse_size, task_parser};
use crate::calibration;
use crate::error::{Error, Result};
use crate::files::{Files, OutputFolder};
use crate::model::{self, on_model};
use crate::output::{Context, bytes, percent, table};
use crate::plans::PlanFile;
use crate::progress::Progress;
use crate::style::StyleArgs;

/// Ask a set of tasks of dense attention, of plans and of rivals: a row of scores for each
///
/// ruler-4k, ruler-8k, ..: RULER's 13 tasks at so many tokens, qa_1 and qa_2 where their files are given.
/// recall-2k, ..: pass key, multi-key, associative recall and paraphrased needle. Scores are means times
/// 100. A row also has what the cache costs (density, KV footprint, bytes, peak of memory, seconds) and how near
/// it is to dense attention on a text; beside rivals that evict keys, on the end of each window, before which they
/// do. They hold the whole prompt first: their footprint and peak say so.
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Example:\n  moa eval suite --preset ruler-4k --model DIR --plan plan.json --profile profile.safetensors --samples 100"
)]
pub(crate) struct Args {
    #[command(flatten)]
    model: ModelArg,
    #[command(flatten)]
    style: StyleArgs,
    /// What to ask, and at how many tokens: `ruler-Nk` or `recall-Nk`, such as ruler-4k
    #[arg(long, default_value = "ruler-4k", value_name = "NAME")]
    preset: Preset,
    /// Ask these tasks instead of the preset's
    #[arg(long, value_delimiter = ',', value_name = "TASK,..", value_parser = task_parser())]
    tasks: Vec<Task>,
    /// Plans
    #[arg(long, value_name = "[NAME=]FILE", num_args = 1..)]
    plan: Vec<String>,
    /// Take plans that were made for other weights of the same dimensions
    #[arg(long, requires = "plan")]
    any_weights: bool,
    #[command(flatten)]
    rivals: RivalArgs,
    /// Questions per task
    #[arg(long, default_value_t = 20, value_name = "N", value_parser = parse_count)]
    samples: usize,
    #[command(flatten)]
    sources: SourceArgs,
    /// Text on which agreement with dense attention is measured [default: a built-in essay]
    #[arg(long, value_name = "FILE")]
    text: Option<PathBuf>,
    /// Windows of the text, of the preset's length but at most 4096 tokens; 0 leaves agreement out
    #[arg(long, default_value_t = 2, value_name = "W", value_parser = parse_size)]
    windows: usize,
    /// Folder for every answer, a file for each row and task; a run with the same settings goes on
    /// where the files end
    #[arg(long, value_name = "DIR")]
    items: Option<PathBuf>,
}

/// Longest window of text: the built-in one is not much longer.
const LONGEST_WINDOW: usize = 4096;

/// A set of tasks at a length.
#[derive(Clone, Debug)]
struct Preset {
    name: String,
    is_ruler: bool,
    length: usize,
}

impl FromStr for Preset {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        let fault = || Error::argument("preset", "ruler-Nk or recall-Nk, such as ruler-4k", name);
        let (kind, length) = name.split_once('-').ok_or_else(fault)?;
        let is_ruler = match kind {
            "ruler" => true,
            "recall" => false,
            _ => return Err(fault()),
        };
        let k: usize = length.strip_suffix('k').and_then(|k| k.parse().ok()).ok_or_else(fault)?;
        let length = k.checked_mul(1024).filter(|length| (1..=MAX_LENGTH).contains(length));
        let length = length.ok_or_else(fault)?;
        Ok(Self { name: name.to_string(), is_ruler, length })
    }
}

impl Args {
    /// The tasks, and those that are left out because their file is not there.
    fn tasks(&self) -> (Vec<Task>, Vec<Task>) {
        const RECALL: [Task; 4] =
            [Task::Passkey, Task::MultiKey, Task::Mqar, Task::ParaphrasedNeedle];
        if !self.tasks.is_empty() {
            return (distinct(&self.tasks), Vec::new());
        }
        match self.preset.is_ruler {
            true => Task::RULER.into_iter().partition(|task| self.sources.has(*task)),
            false => (RECALL.to_vec(), Vec::new()),
        }
    }
}

pub(crate) fn run(args: &Args, context: &Context) -> Result<()> {
    args.rivals.check(!args.plan.is_empty())?;
    args.sources.check(&args.tasks)?;
    let sources = args.sources.load()?;
    let text = match &args.text {
        Some(path) => moa_core::read_text_file(path)
            .map_err(|source| Error::Read { path: path.clone(), source })?,
        None => HELD_OUT_TEXT.to_string(),
    };
    let plans = args.plan.iter().map(|plan| PlanFile::load(plan)).collect::<Result<Vec<_>>>()?;
    check_names(once(DENSE).chain(plans.iter().map(|file| &*file.label)))?;
    if let Some(folder) = &args.items {
        OutputFolder::create(folder)?;
        let inputs = || {
            Files::default()
                .reads([&args.model.model])
                .reads(args.sources.files())
                .reads(&args.text)
                .reads(&args.style.template)
                .reads(args.rivals.files())
                .reads(plans.iter().map(|file| &file.path))
        };
        for file in fs::read_dir(folder).into_iter().flatten().flatten() {
            if file.path().extension().is_some_and(|end| end == "jsonl") {
                inputs().writes("--items", &file.path())?;
            }
        }
    }
    let inputs = Inputs { sources, text, plans };
    let first = inputs.plans.first().map(|file| &*file.path);
    on_model!(context, &args.model, first, |model, context| with_model(
        args, &inputs, model, context
    ))
}

/// What the command reads before it opens the model.
struct Inputs {
    sources: TaskSources,
    text: String,
    plans: Vec<PlanFile>,
}

fn with_model<D: Math>(
    args: &Args,
    Inputs { sources, text, plans }: &Inputs,
    mut model: Checkpoint<D>,
    context: &Context,
) -> Result<()> {
    args.style.apply(&mut model)?;
    let model = &model;
    let length = args.preset.length;
    let limit = model.model.config().context_length();
    if length > limit {
        let error = moa_models::Error::ContextExceeded { asked: length, limit };
        return Err(Error::from(error).at("--preset"));
    }
    for file in plans {
        model::check_plan(&file.plan, &file.path, model, args.any_weights)?;
    }
    let shape = model.model.shape();
    let mut caches = vec![Cache::of_plan(DENSE.to_string(), Plan::full(shape)?)];
    let first = plans.first().map(|file| file.plan.clone());
    caches.extend(plans.iter().map(|file| Cache::of_plan(file.label.clone(), file.plan.clone())));
    // Searches end by the clock: several GPUs compare what one of them found.
    let rivals = || args.rivals.caches(shape, first.as_ref(), length, context);
    caches.extend(model.model.agree(rivals)?);
    check_names(caches.iter().map(|cache| &*cache.name))?;

    let (tasks, missing) = args.tasks();
    if !missing.is_empty() {
        let names: Vec<_> = missing.iter().map(|task| task.name()).collect();
        let names = names.join(", ");
        context.note(format_args!("{names} left out: no --squad or --hotpotqa was given"));
    }
    let folder = args.items.as_ref().filter(|_| model.model.is_first());
    // A run that ends before its first answer leaves no folder.
    folder.map(|folder| OutputFolder::create(folder)).transpose()?;
    let asked = questions(args, &tasks, sources, model, context)?;
    let mut possible = Vec::new();
    for cache in caches {
        match check_rival(&cache, &asked, model) {
            Err(error) if args.rivals.is_given() => return Err(error.at(cache.name)),
            Err(error) => context.note(format_args!("{} left out: {error}", cache.name)),
            Ok(()) => possible.push(cache),
        }
    }
    let caches = possible;
    let warnings = caches.iter().filter_map(|cache| cache.warning.clone()).collect();
    let warnings = calibration::tell(warnings, context);
    let window = length.min(LONGEST_WINDOW);
    let mut agreements = agreements(args, text, &caches, window, model, context)?.into_iter();
    if let Some(folder) = folder {
        fs::create_dir_all(folder)
            .map_err(|source| Error::Output { path: folder.clone(), source })?;
    }
    let has_memory = model.model.device().memory()?.is_some();
    let mut rows = Vec::new();
    for Cache { name, plan, eviction, .. } in &caches {
        let mut reports = Vec::new();
        for (task, questions) in &asked {
            let path = args.items.as_ref().map(|folder| folder.join(file_name(name, *task)));
            let mut evaluation = Evaluation::new(plan, task.max_new_tokens());
            evaluation.items = path.as_deref();
            evaluation.eviction = *eviction;
            let settings = &mut evaluation.settings;
            settings.insert("cache_dtype".into(), json!(format!("{:?}", context.cache)));
            settings.insert("seed".into(), json!(context.seed));
            settings.insert("evaluation".into(), json!(task.name()));
            settings.insert("device".into(), json!(format!("{:?}", context.device)));
            let own = args.sources.settings()?;
            settings.extend(own.into_iter().map(|(name, of)| (name.to_string(), json!(of))));
            let label = format!("{name} {}", task.name());
            let mut bar = Progress::new(context, &label, questions.len());
            reports.push((*task, model.evaluate(questions, &evaluation, &mut bar)?));
        }
        let agreement = agreements.next();
        let mut row = Row::new(name, plan, &reports, agreement);
        if !has_memory {
            row.peak_bytes = None;
        }
        rows.push(row);
    }
    context.result(&Board {
        preset: &args.preset.name,
        length,
        samples: args.samples,
        agreement_length: (args.windows > 0).then_some(window),
        tasks: tasks.iter().map(|task| task.name()).collect(),
        rows,
        warnings,
    })
}

/// Checks that a rival can be asked every question, before the first of another row is.
fn check_rival<D: Math>(
    cache: &Cache,
    asked: &[(Task, Vec<SizedQuestion>)],
    model: &Checkpoint<D>,
) -> Result<()> {
    let Some(eviction) = &cache.eviction else { return Ok(()) };
    for (task, questions) in asked {
        for question in questions {
            model
                .check_evicting(&question.question, eviction, task.max_new_tokens())
                .map_err(|e| Error::from(e).at(&question.place))?;
        }
    }
    Ok(())
}

/// The questions of every task.
fn questions<D: Math>(
    args: &Args,
    tasks: &[Task],
    sources: &TaskSources,
    model: &Checkpoint<D>,
    context: &Context,
) -> Result<Vec<(Task, Vec<SizedQuestion>)>> {
    let length = args.preset.length;
    let bar = Progress::new(context, "make", tasks.len() * args.samples);
    let mut asked = Vec::new();
    for &task in tasks {
        let mut questions = Vec::new();
        for case in 0..args.samples {
            let place = format!("{}, question {}", task.name(), case + 1);
            let draw = (context.seed, case);
            let question =
                model.task_question_from(sources, task, length, task.max_new_tokens(), draw);
            let question = question.map_err(|e| Error::from(e).at(&place))?;
            questions.push(SizedQuestion { size: Some(length), case, question, place });
            bar.step();
        }
        asked.push((task, questions));
    }
    Ok(asked)
}

/// How near each cache is to dense attention on the text; nothing where no window is asked for. Where a rival evicts
/// keys, all are compared on the end of each window alone, before which it does.
fn agreements<D: Math>(
    args: &Args,
    text: &str,
    caches: &[Cache],
    window: usize,
    model: &Checkpoint<D>,
    context: &Context,
) -> Result<Vec<Agreement>> {
    if args.windows == 0 {
        return Ok(Vec::new());
    }
    let items = model.text_windows(text, window, args.windows);
    let mut items = items.map_err(|e| Error::from(e).at("--text"))?;
    let evictions: Vec<_> = caches.iter().filter_map(|cache| cache.eviction).collect();
    if let Some(least) = evictions.iter().map(|of| of.density).reduce(f64::min) {
        let predicted = continuation(window, least);
        items = items.iter().map(|item| item.continued(predicted)).collect::<Result<_, _>>()?;
    }
    let plans = caches.iter().filter(|cache| cache.eviction.is_none());
    let plans: Vec<&Plan> = plans.map(|cache| &cache.plan).collect();
    let mut bar = Progress::new(context, "agreement", items.len());
    let mut of_plans = model.model.agreements(&items, &plans, window, &mut bar)?.into_iter();
    let mut all = Vec::with_capacity(caches.len());
    for cache in caches {
        match cache.eviction {
            None => all.extend(of_plans.next()),
            Some(eviction) => {
                // Text has no question to wait for.
                let eviction = Eviction { before_question: false, ..eviction };
                all.push(model.agreement_evicting(&items, &eviction, &mut bar)?);
            }
        }
    }
    Ok(all)
}

/// The row of dense attention.
const DENSE: &str = "dense";

/// Checks that rows have names, and files of answers, of their own.
fn check_names<'a>(names: impl Iterator<Item = &'a str>) -> Result<()> {
    let mut seen = BTreeSet::new();
    for name in names {
        if !seen.insert(file_stem(name)) {
            let expected = "plans and rivals of different names (NAME=FILE gives one)";
            return Err(Error::argument("--plan", expected, format!("`{name}` twice")));
        }
    }
    Ok(())
}

/// A file of a folder of answers.
fn file_name(cache: &str, task: Task) -> PathBuf {
    PathBuf::from(format!("{}-{}.jsonl", file_stem(cache), task.name()))
}

/// What files of a row's answers begin with.
fn file_stem(cache: &str) -> String {
    let plain = |c: char| if c.is_alphanumeric() || "-_.".contains(c) { c } else { '-' };
    cache.chars().map(plain).collect()
}

/// What a set of tasks says about caches.
#[derive(Debug, Serialize)]
struct Board<'a> {
    preset: &'a str,
    length: usize,
    samples: usize,
    /// Tokens of the windows of text.
    agreement_length: Option<usize>,
    tasks: Vec<&'static str>,
    rows: Vec<Row>,
    /// Rivals that keep clearly less than they might.
    warnings: Vec<String>,
}

#[derive(Debug, Serialize)]
struct Row {
    cache: String,
    /// Means times 100, by task.
    scores: BTreeMap<&'static str, Score>,
    /// Mean over tasks.
    average: f64,
    density: f64,
    kv_footprint: f64,
    /// Mean bytes that a sequence held.
    kv_bytes: u64,
    kv_bytes_dense: u64,
    /// Most bytes of the device in use at once; `None` on the host, whose process holds on to what
    /// earlier rows needed.
    peak_bytes: Option<u64>,
    seconds: f64,
    agreement: Option<Agreement>,
}

#[derive(Debug, Serialize)]
struct Score {
    score: f64,
    standard_error: f64,
}

impl Row {
    fn new(
        cache: &str,
        plan: &Plan,
        reports: &[(Task, RetrievalReport)],
        agreement: Option<Agreement>,
    ) -> Self {
        let count = reports.len().max(1) as f64;
        let mean = |of: &dyn Fn(&RetrievalReport) -> f64| {
            reports.iter().map(|(_, report)| of(report)).sum::<f64>() / count
        };
        let score = |report: &RetrievalReport| Score {
            score: 100.0 * report.accuracy,
            standard_error: 100.0 * report.standard_error,
        };
        Self {
            cache: cache.to_string(),
            scores: reports.iter().map(|(task, report)| (task.name(), score(report))).collect(),
            average: mean(&|report| 100.0 * report.accuracy),
            density: mean(&|report| report.density),
            kv_footprint: mean(&|report| {
                report.kv_footprint.unwrap_or(plan.kv_footprint(report.context_mean as usize))
            }),
            kv_bytes: mean(&|report| report.kv_bytes as f64) as u64,
            kv_bytes_dense: mean(&|report| report.kv_bytes_dense as f64) as u64,
            peak_bytes: reports.iter().filter_map(|(_, report)| report.peak_bytes).max(),
            seconds: reports.iter().map(|(_, report)| report.seconds).sum(),
            agreement,
        }
    }

    fn cells(&self, tasks: &[&'static str], with_agreement: bool) -> Vec<String> {
        let mut cells = vec![self.cache.clone()];
        let score = |task: &&str| self.scores.get(*task).map_or(0.0, |of| of.score);
        cells.extend(tasks.iter().map(|task| format!("{:.1}", score(task))));
        cells.extend([
            format!("{:.1}", self.average),
            percent(self.density),
            percent(self.kv_footprint),
            bytes(self.kv_bytes),
            self.peak_bytes.map_or("-".to_string(), bytes),
            format!("{:.1}", self.seconds),
        ]);
        if with_agreement {
            let of = self.agreement.as_ref();
            let cell = |number: fn(&Agreement) -> String| of.map_or("-".to_string(), number);
            cells.extend([
                cell(|of| percent(of.equal_greedy)),
                cell(|of| format!("{:.4}", of.kl_mean)),
                cell(|of| format!("{:.3}", of.kl_worst)),
                cell(|of| format!("{:.4}", of.perplexity_ratio)),
            ]);
        }
        cells
    }
}

impl fmt::Display for Board<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut head = vec!["cache"];
        head.extend(self.tasks.iter().map(|task| task.trim_start_matches("niah_")));
        head.extend(["mean", "density", "footprint", "KV bytes", "peak memory", "seconds"]);
        if self.agreement_length.is_some() {
            head.extend(["equal greedy", "KL mean", "KL worst 1 %", "ppl ratio"]);
        }
        let rows: Vec<_> = self
            .rows
            .iter()
            .map(|row| row.cells(&self.tasks, self.agreement_length.is_some()))
            .collect();
        write!(f, "{}: {} questions a task, {} tokens", self.preset, self.samples, self.length)?;
        if let Some(length) = self.agreement_length {
            let tokens = self.rows.first().and_then(|row| row.agreement).map_or(0, |of| of.tokens);
            write!(f, "; agreement on {tokens} tokens of text in windows of {length} tokens")?;
        }
        write!(f, "\n\n{}", table(&head, &rows))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn presets_are_a_set_and_a_length() {
        let preset: Preset = "ruler-128k".parse().unwrap();
        assert_eq!((preset.is_ruler, preset.length), (true, 131_072));
        assert!(!"recall-2k".parse::<Preset>().unwrap().is_ruler);
        for name in ["ruler", "ruler-4", "ruler-0k", "needle-4k", "ruler--1k", ""] {
            let message = name.parse::<Preset>().unwrap_err().to_string();
            assert!(message.contains("ruler-4k"), "{message}");
        }
    }

    #[test]
    fn files_of_answers_have_plain_names() {
        let name = file_name("uniform 0.25 a/b", Task::Vt);
        assert_eq!(name, PathBuf::from("uniform-0.25-a-b-vt.jsonl"));
    }
}
