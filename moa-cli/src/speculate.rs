use std::path::PathBuf;

use moa_core::Plan;
use moa_models::{Checkpoint, Speculation};

use crate::error::{Error, Result};
use crate::model::{self, Reopen};
use crate::output::Context;

/// Where guesses of the next tokens come from.
#[derive(Clone, Debug, clap::Args)]
pub(crate) struct SpeculateArgs {
    /// Guess tokens and check several in one step; the answers stay the same, on a GPU up to rounding [default: off]
    #[arg(long, value_enum, value_name = "HOW", conflicts_with_all = ["draft_model", "draft_plan"])]
    speculate: Option<Speculate>,
    /// Folder or GGUF file of a smaller model of the same tokens, which guesses those that --model checks; left
    /// out where it does not pay
    #[arg(long, value_name = "PATH")]
    draft_model: Option<PathBuf>,
    /// Plan of the model that guesses; without --draft-model that is --model itself, of whose cache a plan reads less
    #[arg(long, value_name = "FILE")]
    draft_plan: Option<PathBuf>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Speculate {
    /// There are none
    Off,
    /// From the prompt and the answer so far: what followed the last few tokens before; left off where it does not
    /// pay
    Ngram,
}

impl SpeculateArgs {
    /// What is read for guesses.
    pub(crate) fn files(&self) -> impl Iterator<Item = &PathBuf> {
        self.draft_model.iter().chain(&self.draft_plan)
    }

    /// What the flags say of the engine.
    pub(crate) fn speculation(&self) -> Speculation {
        match self.speculate {
            Some(Speculate::Ngram) => Speculation::ngram(),
            None if self.draft_model.is_some() || self.draft_plan.is_some() => Speculation::draft(),
            Some(Speculate::Off) | None => Speculation::Off,
        }
    }

    /// Gives the model the one that guesses.
    pub(crate) fn apply<D: Reopen>(
        &self,
        model: &mut Checkpoint<D>,
        any_weights: bool,
        context: &Context,
    ) -> Result<()> {
        let draft = match (&self.draft_model, &self.draft_plan) {
            (None, None) => return Ok(()),
            (None, Some(_)) => model.clone(),
            (Some(path), _) => {
                let at = |error: Error| error.at(format!("--draft-model {}", path.display()));
                let folder = model::folder(path, context).map_err(at)?;
                Checkpoint::open(D::reopen(context)?, folder).map_err(|e| at(e.into()))?
            }
        };
        let plan = match &self.draft_plan {
            None => Plan::full(draft.model.shape())?,
            Some(path) if any_weights => Plan::load(path)?.with_fingerprint(None),
            Some(path) => Plan::load(path)?,
        };
        model.set_draft(&draft, &plan).map_err(|e| Error::from(e).at("the model that guesses"))
    }
}
