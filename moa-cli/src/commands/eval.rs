use clap::Subcommand;

use super::{eval_perplexity, eval_retrieval};
use crate::error::Result;
use crate::output::Context;

/// Measure what a plan does to a model
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Example:\n  moa eval retrieval --model assets/moa-tiny --plan plan.json --data 200_lines.jsonl --lines 90"
)]
pub(crate) struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    Retrieval(eval_retrieval::Args),
    Perplexity(eval_perplexity::Args),
}

pub(crate) fn run(args: &Args, context: &Context) -> Result<()> {
    match &args.command {
        Command::Retrieval(args) => eval_retrieval::run(args, context),
        Command::Perplexity(args) => eval_perplexity::run(args, context),
    }
}
