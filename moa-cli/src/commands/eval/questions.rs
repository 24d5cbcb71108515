use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};

use moa_core::{Plan, SparseAttentionBackend};
use moa_models::{
    Checkpoint, ItemLog, Math, Question, RetrievalCase, RetrievalItem, RetrievalReport, fingerprint,
};
use serde_json::{Value, json};

use crate::args::Device;
use crate::args::parse_depth_bins;
use crate::error::{Error, Result};
use crate::files::check_optional;
use crate::model::ChosenPlan;
use crate::output::Context;
use crate::progress::Progress;

/// What the evaluations with questions have in common.
#[derive(Debug, clap::Args)]
pub(super) struct ItemArgs {
    /// File for every answer, one object a line, written as they come; a run with the same settings
    /// goes on where the file ends
    #[arg(long, value_name = "FILE.jsonl")]
    items: Option<PathBuf>,
    /// Stretches of the context to count apart, 1 to 10
    #[arg(long, default_value_t = 5, value_name = "BINS", value_parser = parse_depth_bins)]
    pub(super) depth_bins: usize,
}

/// One question of an evaluation.
pub(super) struct Asked {
    /// What it was made for: record lines or tokens.
    pub(super) size: Option<usize>,
    /// Index in the file, or of the draw.
    pub(super) case: usize,
    pub(super) question: Question,
    /// Where it comes from, for messages.
    pub(super) place: String,
}

/// An evaluation: who answers, and how.
pub(super) struct Evaluation<'a, D: Math> {
    pub(super) model: &'a Checkpoint<D>,
    pub(super) plan: &'a ChosenPlan,
    pub(super) max_new_tokens: usize,
    /// What else an answer depends on, with a name for each.
    pub(super) settings: Value,
}

impl ItemArgs {
    /// Checks that the file of items can be written, before any work.
    pub(super) fn check(&self, context: &Context) -> Result<()> {
        if self.items.is_some() {
            // Each rank would have to leave out the same questions.
            context.check_one_device("--device with --items")?;
        }
        check_optional(self.items.as_deref())
    }

    /// Asks all questions but those that the file of items has the answers of.
    pub(super) fn ask<D: Math>(
        &self,
        evaluation: &Evaluation<'_, D>,
        questions: &[Asked],
        context: &Context,
    ) -> Result<RetrievalReport> {
        let Evaluation { model, plan, max_new_tokens, .. } = *evaluation;
        let (mut log, mut known) = (None, HashMap::new());
        if let Some(path) = &self.items {
            let (opened, items) = ItemLog::open(path, &evaluation.settings(context))?;
            known = items.into_iter().map(|i: RetrievalItem| ((i.size, i.case), i)).collect();
            log = Some(opened);
        }
        let missing = |asked: &&Asked| !known.contains_key(&(asked.size, asked.case));
        // All of them before the first is asked, which may take hours.
        for asked in questions.iter().filter(missing) {
            let checked = model.check_question(&asked.question, max_new_tokens);
            checked.map_err(|e| Error::from(e).at(&asked.place))?;
        }
        let bar = Progress::new(context, "ask", questions.len());
        let (mut items, mut score) = (Vec::with_capacity(questions.len()), 0.0);
        for asked in questions {
            let Asked { size, case, .. } = *asked;
            let item = match known.remove(&(size, case)) {
                Some(item) => item,
                None => {
                    let item = model.ask(&asked.question, &plan.plan, max_new_tokens);
                    let item = item.map_err(|e| Error::from(e).at(&asked.place))?;
                    let item = RetrievalItem { size, case, ..item };
                    if let Some(log) = &mut log {
                        log.push(&item)?;
                    }
                    item
                }
            };
            score += item.score;
            items.push(item);
            bar.message(format!("{score:.4} right"));
            bar.step();
        }
        Ok(RetrievalReport::new(items)?)
    }
}

impl<D: Math> Evaluation<'_, D> {
    fn settings(&self, context: &Context) -> Value {
        let mut settings = json!({
            "model": self.model.model.fingerprint(),
            "plan": fingerprint(self.plan.plan.to_json().as_bytes()),
            "max_new_tokens": self.max_new_tokens,
            "cache_dtype": format!("{:?}", context.cache),
            "seed": context.seed,
        });
        // Logs of before there was a choice say nothing.
        if context.device != Device::Cpu {
            settings["device"] = json!(self.model.model.device().attention().name());
        }
        if let (Some(all), Some(own)) = (settings.as_object_mut(), self.settings.as_object()) {
            all.extend(own.clone());
        }
        settings
    }
}

/// Reads a file and says which it was, for [`Evaluation::settings`].
pub(super) fn file_fingerprint(path: &Path) -> Result<String> {
    let bytes =
        fs::read(path).map_err(|source| Error::Read { path: path.to_path_buf(), source })?;
    Ok(fingerprint(&bytes))
}

/// Asks LongEval cases under a progress bar.
pub(in crate::commands) fn ask<D: Math>(
    model: &Checkpoint<D>,
    cases: &[RetrievalCase],
    plan: &Plan,
    max_new_tokens: usize,
    context: &Context,
) -> Result<RetrievalReport> {
    let bar = Progress::new(context, "ask", cases.len());
    let mut correct = 0;
    Ok(model.retrieval(cases, plan, max_new_tokens, &mut |_, right| {
        correct += usize::from(right);
        bar.message(format!("{correct} right"));
        bar.step()
    })?)
}
