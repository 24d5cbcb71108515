use std::path::{Path, PathBuf};

use moa_core::SparseAttentionBackend;
use moa_models::{Checkpoint, Evaluation, Math, fingerprint};
use serde_json::json;

use crate::args::{Device, parse_depth_bins};
use crate::error::{Error, Result};
use crate::files::Files;
use crate::model::ChosenPlan;
use crate::output::Context;

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

impl ItemArgs {
    /// Checks that the file of items can be written and is none of the inputs, before any work.
    pub(super) fn check(&self, inputs: Files<'_>) -> Result<()> {
        inputs.may_write("--items", self.items.as_deref()).map(drop)
    }

    /// Refuses a file of items where one cannot hold what the command asks.
    pub(super) fn check_unused(&self, expected: &'static str) -> Result<()> {
        match &self.items {
            Some(path) => Err(Error::argument("--items", expected, path.display())),
            None => Ok(()),
        }
    }

    /// The evaluation that the flags ask for; `own` is what its questions depend on.
    pub(super) fn evaluation<'a, D: Math>(
        &'a self,
        model: &Checkpoint<D>,
        plan: &'a ChosenPlan,
        max_new_tokens: usize,
        own: impl IntoIterator<Item = (&'static str, String)>,
        context: &Context,
    ) -> Evaluation<'a> {
        let mut evaluation = Evaluation::new(&plan.plan, max_new_tokens);
        evaluation.items = self.items.as_deref();
        evaluation.eviction = plan.eviction;
        let settings = &mut evaluation.settings;
        settings.insert("cache_dtype".into(), json!(format!("{:?}", context.cache)));
        settings.insert("seed".into(), json!(context.seed));
        // Logs of before there was a choice say nothing.
        if context.device != Device::Cpu {
            settings.insert("device".into(), json!(model.model.device().attention().name()));
        }
        settings.extend(own.into_iter().map(|(name, value)| (name.to_string(), json!(value))));
        evaluation
    }
}

/// Reads a file and says which it was, for [`Evaluation::settings`].
pub(super) fn file_fingerprint(path: &Path) -> Result<String> {
    let bytes = moa_core::read_file(path)
        .map_err(|source| Error::Read { path: path.to_path_buf(), source })?;
    Ok(fingerprint(&bytes))
}
