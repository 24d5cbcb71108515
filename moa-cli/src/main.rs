//! The `moa` command: from a Llama checkpoint to a searched plan to generation with KV caches that
//! are really smaller.
//!
//! One file per subcommand in `commands`; everything that computes lives in `moa-models` and
//! `moa-core`, everything that draws in `moa-report`.

// Work is not lost to a message: no panic, and no print that panics where nobody reads. Tests may.
#![cfg_attr(
    not(test),
    deny(
        clippy::unwrap_used,
        clippy::expect_used,
        clippy::panic,
        clippy::print_stdout,
        clippy::print_stderr
    )
)]

mod args;
mod budget;
mod calibration;
mod commands;
mod compressed;
#[cfg(feature = "serve")]
mod config;
mod error;
mod files;
#[cfg(feature = "cuda")]
mod gpus;
mod log;
mod model;
#[cfg(feature = "cuda")]
mod on_gpus;
mod output;
mod plans;
mod progress;
mod speculate;
mod style;
mod terminal;

use std::ffi::OsString;
use std::process::ExitCode;

#[cfg(feature = "serve")]
use clap::CommandFactory;
use clap::{Parser, Subcommand};

use args::Global;
use commands::{
    bench, compress, eval, generate, plan, profile, quantize, quickstart, search, validate,
};
use error::{Error, Result};
use output::Context;

/// Finds how much each attention head of a Llama-type model needs to see, and runs the model with
/// KV caches of just that size.
#[derive(Debug, Parser)]
#[command(
    name = "moa",
    version,
    after_help = "Example:\n  moa quickstart\n\nExit codes: 0 done, 2 bad input, 130 cancelled."
)]
struct Cli {
    #[command(flatten)]
    global: Global,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    Quickstart(quickstart::Args),
    Profile(profile::Args),
    Search(search::Args),
    Validate(validate::Args),
    Compress(compress::Args),
    Plan(plan::Args),
    Generate(generate::Args),
    Eval(eval::Args),
    Bench(bench::Args),
    Quantize(quantize::Args),
    Report(commands::report::Args),
    #[cfg(feature = "serve")]
    Serve(Box<commands::serve::Args>),
}

fn main() -> ExitCode {
    let argv: Vec<OsString> = std::env::args_os().collect();
    #[cfg(feature = "serve")]
    let argv = match config::expand(argv, Cli::command()) {
        Ok(argv) => argv,
        Err(error) => {
            error.report();
            return ExitCode::from(error.exit_code());
        }
    };
    let cli = Cli::parse_from(argv);
    log::begin(cli.global.quiet, cli.global.verbose);
    match run(&cli) {
        Ok(()) => ExitCode::SUCCESS,
        // The reader has seen enough, as in `moa plan show plan.json | head`.
        Err(error) if error.is_broken_pipe() => ExitCode::SUCCESS,
        Err(error) => {
            error.report();
            ExitCode::from(error.exit_code())
        }
    }
}

fn run(cli: &Cli) -> Result<()> {
    let threads = cli.global.threads.unwrap_or(0);
    let pool =
        rayon::ThreadPoolBuilder::new().num_threads(threads).build().map_err(Error::Threads)?;
    // From inside the pool, handing work to a thread costs 2 us instead of 18: a decode step of a
    // small model does that dozens of times.
    pool.install(|| dispatch(cli))
}

fn dispatch(cli: &Cli) -> Result<()> {
    let context = Context::new(&cli.global);
    let is_auto = context.cache_dtype == Some(args::CacheType::Auto);
    if is_auto && !matches!(cli.command, Command::Compress(_)) {
        let expected = "a type but in compress: a plan says itself what it chose";
        return Err(Error::argument("--cache-dtype", expected, "auto"));
    }
    if context.activations.is_some() && context.weights.is_none() {
        return Err(Error::argument("--activations", "left out without --weights fp8", "fp8"));
    }
    match &cli.command {
        Command::Quickstart(args) => quickstart::run(args, &context),
        Command::Profile(args) => profile::run(args, &context),
        Command::Search(args) => search::run(args, &context),
        Command::Validate(args) => validate::run(args, &context),
        Command::Compress(args) => compress::run(args, &context),
        Command::Plan(args) => plan::run(args, &context),
        Command::Generate(args) => generate::run(args, &context),
        Command::Eval(args) => eval::run(args, &context),
        Command::Bench(args) => bench::run(args, &context),
        Command::Quantize(args) => quantize::run(args, &context),
        Command::Report(args) => commands::report::run(args, &context),
        #[cfg(feature = "serve")]
        Command::Serve(args) => commands::serve::run(args, &context),
    }
}
