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

use crate::error::Result;
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
