use std::collections::BTreeMap;
use std::process::ExitCode;
use std::sync::{Arc, Mutex};

use libtest_mimic::{Arguments, Completion, Failed};

use crate::Trial;
use crate::trial::Reason;

/// How often each reason was given, by trials that were ignored.
type Reasons = Arc<Mutex<BTreeMap<String, usize>>>;

/// Runs trials as `cargo test` runs tests, and then says how many were ignored and why: the `main` of
/// a test target with `harness = false`.
///
/// Takes the arguments of Rust's own test binaries: filters (any number of them), `--exact`,
/// `--skip`, `--list`, `--ignored`, `--test-threads` and so on. Nothing is captured.
pub fn run(trials: impl IntoIterator<Item = Trial>) -> ExitCode {
    let (mut arguments, filters) = arguments(std::env::args());
    let reasons = Reasons::default();
    let mut trials: Vec<_> = trials.into_iter().map(|trial| mimic(trial, &reasons)).collect();
    select(&mut arguments, &filters, &mut trials);
    let conclusion = libtest_mimic::run(&arguments, trials);
    for (reason, trials) in &*reasons.lock().expect("nothing panics with it") {
        println!("ignored {trials}: {reason}");
    }
    conclusion.exit_code()
}

fn mimic(trial: Trial, reasons: &Reasons) -> libtest_mimic::Trial {
    let reasons = reasons.clone();
    let Trial { name, run } = trial;
    libtest_mimic::Trial::ignorable_test(name, move || match run().map_err(|stop| stop.0) {
        Ok(()) => Ok(Completion::Completed),
        Err(Reason::Failed(message)) => Err(Failed::from(message)),
        Err(Reason::Ignored(reason)) => {
            *reasons.lock().expect("nothing panics with it").entry(reason.clone()).or_default() +=
                1;
            Ok(Completion::ignored_with(reason))
        }
    })
}

/// Options that may have their value in the next argument.
const WITH_VALUE: [&str; 6] =
    ["--color", "--format", "--logfile", "--skip", "--test-threads", "-Z"];

/// The arguments, and filters apart from them: libtest-mimic takes one alone.
fn arguments(all: impl Iterator<Item = String>) -> (Arguments, Vec<String>) {
    let (mut filters, mut others) = (Vec::new(), Vec::new());
    let mut all = all.peekable();
    others.extend(all.next());
    while let Some(argument) = all.next() {
        if argument == "--" {
            filters.extend(all.by_ref());
        } else if !argument.starts_with('-') {
            filters.push(argument);
        } else {
            let value = WITH_VALUE.contains(&&argument[..]).then(|| all.next()).flatten();
            others.push(argument);
            others.extend(value);
        }
    }
    (Arguments::from_iter(others), filters)
}

/// Has `arguments` select what any of the filters and none of its own skips selects.
fn select(arguments: &mut Arguments, filters: &[String], trials: &mut [libtest_mimic::Trial]) {
    if let [filter] = filters {
        arguments.filter = Some(filter.clone());
    } else if !filters.is_empty() {
        let among = |name: &str, patterns: &[String]| match arguments.exact {
            true => patterns.iter().any(|pattern| name == pattern),
            false => patterns.iter().any(|pattern| name.contains(&pattern[..])),
        };
        // Those not wanted are skipped by their whole names, so that they count as filtered out.
        let names = trials.iter().map(|trial| trial.name().to_owned());
        let unwanted = names.filter(|name| !among(name, filters) || among(name, &arguments.skip));
        arguments.skip = unwanted.collect();
        arguments.exact = true;
    }
    // As libtest does, which makes the order of output that of `--list`.
    trials.sort_by(|a, b| a.name().cmp(b.name()));
}

#[cfg(test)]
mod tests {
    use super::*;

    const NAMES: [&str; 5] = ["f16::trap_02", "f16::trap_05", "bf16::trap_02", "ops::rope", "law"];

    /// Names that run with these arguments.
    fn selected(line: &str) -> Vec<String> {
        let all = std::iter::once("binary").chain(line.split_whitespace()).map(str::to_owned);
        let (mut arguments, filters) = arguments(all);
        let mut trials: Vec<_> =
            NAMES.map(|name| libtest_mimic::Trial::test(name, || Ok(()))).into();
        select(&mut arguments, &filters, &mut trials);
        let runs = trials.iter().filter(|trial| !arguments.is_filtered_out(trial));
        runs.map(|trial| trial.name().to_owned()).collect()
    }

    #[test]
    fn filters_select_as_those_of_libtest_do() {
        assert_eq!(selected("").len(), 5);
        assert_eq!(selected("trap_02"), ["bf16::trap_02", "f16::trap_02"]);
        let several = ["bf16::trap_02", "f16::trap_02", "ops::rope"];
        assert_eq!(selected("trap_02 --test-threads 1 ops::"), several);
        assert_eq!(selected("--skip bf16 trap_02 ops::"), several[1..]);
        assert_eq!(selected("--skip=bf16 --nocapture trap_02 ops::"), several[1..]);
        assert_eq!(selected("--skip trap"), ["law", "ops::rope"]);
        assert_eq!(selected("--exact law rope"), ["law"]);
        assert_eq!(selected("nothing of these"), [""; 0]);
        assert_eq!(selected("--ignored"), [""; 0]);
        assert_eq!(selected("--include-ignored law"), ["law"]);
    }
}
