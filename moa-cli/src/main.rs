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
mod interrupt;
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

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use clap::error::{ContextKind, ContextValue, ErrorKind};
    use clap::{Arg, Command, CommandFactory};

    /// The commands that have no subcommands, where nothing has to be given.
    fn leaves(command: &Command) -> Vec<Command> {
        let below: Vec<Command> = command.get_subcommands().flat_map(leaves).collect();
        if !below.is_empty() || command.get_name() == "help" {
            return below;
        }
        let groups: Vec<_> = command.get_groups().map(|group| group.get_id().clone()).collect();
        let leaf = command.clone().no_binary_name(true).mut_args(|arg| arg.required(false));
        vec![groups.iter().fold(leaf, |leaf, id| leaf.mut_group(id, |group| group.required(false)))]
    }

    /// What is missing of a command line, or why else it is refused.
    fn missing(leaf: &Command, line: &[String]) -> Result<BTreeSet<String>, ErrorKind> {
        match leaf.clone().try_get_matches_from(line) {
            Ok(_) => Ok(BTreeSet::new()),
            Err(error) if error.kind() == ErrorKind::MissingRequiredArgument => {
                match error.get(ContextKind::InvalidArg) {
                    Some(ContextValue::Strings(names)) => Ok(names.iter().cloned().collect()),
                    other => panic!("{error}: {other:?}"),
                }
            }
            Err(error) => Err(error.kind()),
        }
    }

    /// A flag with a value that it takes.
    fn given(leaf: &Command, arg: &Arg) -> Vec<String> {
        const VALUES: [&str; 9] =
            ["1", "a", "1:0", "10%", "q4_0", "ruler-4k", "127.0.0.1", "cpu", "mqar"];
        let possible = arg.get_possible_values();
        let values = possible.iter().map(|value| value.get_name()).chain(VALUES);
        let word = |value: &str| match arg.get_long() {
            Some(long) if arg.get_action().takes_values() => format!("--{long}={value}"),
            Some(long) => format!("--{long}"),
            None => value.to_string(),
        };
        let is_taken = |word: &String| {
            let kind = missing(leaf, std::slice::from_ref(word)).err();
            !matches!(kind, Some(ErrorKind::InvalidValue | ErrorKind::ValueValidation))
        };
        let words = values.map(word).find(is_taken);
        vec![words.unwrap_or_else(|| panic!("{}: no value for {arg}", leaf.get_name()))]
    }

    /// clap forgets that a flag requires another one where that conflicts with what is given, so that the flag would
    /// be without effect.
    #[test]
    fn what_a_flag_requires_it_requires_beside_every_other_flag() {
        let mut root = super::Cli::command();
        root.build();
        let (mut required, mut faults) = (0, Vec::new());
        for leaf in leaves(&root) {
            let is_own = |arg: &&Arg| {
                !arg.is_global_set() && !["help", "version"].contains(&arg.get_id().as_str())
            };
            let args: Vec<&Arg> = leaf.get_arguments().filter(is_own).collect();
            let words: Vec<_> = args.iter().map(|arg| given(&leaf, arg)).collect();
            let always = missing(&leaf, &[]).unwrap();
            for (arg, own) in args.iter().zip(&words) {
                let needs = missing(&leaf, own).unwrap();
                let needs: BTreeSet<_> = needs.difference(&always).collect();
                required += needs.len();
                for (beside, others) in args.iter().zip(&words) {
                    let Ok(still) = missing(&leaf, &[&own[..], others].concat()) else { continue };
                    for need in &needs {
                        let name = leaf.get_name();
                        let is_met = still.contains(*need) || **need == beside.to_string();
                        if !is_met {
                            faults
                                .push(format!("{name}: {arg} goes without {need} beside {beside}"));
                        }
                    }
                }
            }
        }
        assert!(faults.is_empty(), "{faults:#?}");
        // The test sees what is required at all.
        assert!(required > 5, "{required}");
    }
}
