mod agreement;
mod evicting;
mod longbench;
mod perplexity;
mod questions;
mod retrieval;
mod rivals;
mod sources;
mod suite;
mod summary;
mod tasks;

use clap::Subcommand;
use moa_models::{Checkpoint, Item, Math};

use crate::error::{Error, Result};
use crate::output::Context;

pub(super) use summary::Scores;

/// Measure what a plan does to a model
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Example:\n  moa eval retrieval --model assets/moa-tiny --plan plan.json --data 200_lines.jsonl --lines 40,90,200"
)]
pub(crate) struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    Retrieval(retrieval::Args),
    Tasks(tasks::Args),
    Perplexity(perplexity::Args),
    Agreement(agreement::Args),
    #[command(visible_alias = "lv-eval")]
    Longbench(longbench::Args),
    Suite(suite::Args),
}

/// Checks that windows of so many tokens can be read, whatever the texts.
fn check_lengths<D: Math>(lengths: &[usize], model: &Checkpoint<D>) -> Result<()> {
    let config = model.model.config();
    let (least, limit) = (Item::shortest_window(config.bos_token_id), config.context_length());
    for &length in lengths {
        if length > limit {
            let error = moa_models::Error::ContextExceeded { asked: length, limit };
            return Err(Error::from(error).at("--lengths"));
        }
        if length < least {
            return Err(Error::argument("--lengths", format!("at least {least} tokens"), length));
        }
    }
    Ok(())
}

pub(crate) fn run(args: &Args, context: &Context) -> Result<()> {
    match &args.command {
        Command::Retrieval(args) => retrieval::run(args, context),
        Command::Tasks(args) => tasks::run(args, context),
        Command::Perplexity(args) => perplexity::run(args, context),
        Command::Agreement(args) => agreement::run(args, context),
        Command::Longbench(args) => longbench::run(args, context),
        Command::Suite(args) => suite::run(args, context),
    }
}
