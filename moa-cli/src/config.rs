//! `moa serve --config FILE`: flags from a TOML file, under the flags' own names.
//!
//! The file's values become flags and go through the same parser. What the command line or the environment
//! says already, the file does not say again.

use std::any::TypeId;
use std::ffi::OsString;
use std::fs;
use std::ops::Range;
use std::path::{Path, PathBuf};

use clap::error::ErrorKind;
use clap::parser::ValueSource;
use clap::{Arg, ArgAction, ArgMatches, Command};
use toml::de::{DeInteger, DeTable, DeValue};

use crate::error::{Error, Result};

/// The flags of a command line and of the file that `serve --config` names on it.
///
/// # Errors
/// [`Error::Read`] if the file cannot be read, and with its line, [`Error::Config`] for what is not TOML, a key
/// that is no flag, and a value that its flag does not take.
pub(crate) fn expand(argv: Vec<OsString>, command: Command) -> Result<Vec<OsString>> {
    // What a flag must have may be in the file.
    let mut command =
        command.mut_subcommand("serve", |serve| serve.mut_args(|arg| arg.required(false)));
    // A command line that is wrong is reported by whoever parses it in earnest.
    let Ok(matches) = command.clone().try_get_matches_from(&argv) else { return Ok(argv) };
    let Some(("serve", given)) = matches.subcommand() else { return Ok(argv) };
    let Some(path) = given.get_one::<PathBuf>("config") else { return Ok(argv) };
    command.build();
    let text =
        fs::read_to_string(path).map_err(|source| Error::Read { path: path.clone(), source })?;
    with_file(argv, &command, given, path, &text)
}

fn with_file(
    argv: Vec<OsString>,
    command: &Command,
    given: &ArgMatches,
    path: &Path,
    text: &str,
) -> Result<Vec<OsString>> {
    let at = |span: Range<usize>, key: &str, expected: String, got: String| {
        let line = 1 + text.bytes().take(span.start).filter(|byte| *byte == b'\n').count();
        let fault = Error::Config { key: key.to_owned(), expected, got };
        fault.at(format!("{}:{line}", path.display()))
    };
    let table = DeTable::parse(text).map_err(|error| {
        at(error.span().unwrap_or_default(), "the file", "TOML".into(), error.message().into())
    })?;
    let Some(serve) = command.find_subcommand("serve") else { return Ok(argv) };
    let mut all = argv.clone();
    let mut entries: Vec<_> = table.get_ref().iter().collect();
    entries.sort_by_key(|(key, _)| key.span().start);
    for (key, value) in entries {
        let name = key.get_ref().as_ref();
        let Some(arg) = serve.get_arguments().find(|arg| is_named(arg, name)) else {
            let known = serve.get_arguments().filter_map(Arg::get_long);
            let close = known.into_iter().find(|flag| *flag == name.replace('_', "-"));
            let expected = match close {
                Some("config") => "on the command line".into(),
                Some(flag) => format!("written `{flag}`"),
                None => "the name of a flag of `moa serve` without its dashes".into(),
            };
            return Err(at(key.span(), name, expected, "no such flag".into()));
        };
        let Some(flags) = flags(arg, name, value.get_ref()) else {
            let got = format!("{} {}", value.get_ref().type_str(), &text[value.span()]);
            return Err(at(value.span(), name, expected(arg).into(), got));
        };
        let source = given.value_source(arg.get_id().as_str());
        if matches!(source, Some(ValueSource::CommandLine | ValueSource::EnvVariable)) {
            continue;
        }
        let alone: Vec<OsString> = argv.iter().cloned().chain(flags.iter().cloned()).collect();
        match command.clone().try_get_matches_from(alone).map_err(|error| (error.kind(), error)) {
            // The command line says the opposite.
            Err((ErrorKind::ArgumentConflict, _)) => {}
            // Another key of the file may say what is missing; the whole is parsed again.
            Ok(_) | Err((ErrorKind::MissingRequiredArgument, _)) => all.extend(flags),
            Err((_, error)) => {
                let told = error.to_string();
                let first = told.lines().next().unwrap_or_default();
                let reason = first.trim_start_matches("error: ").to_owned();
                return Err(at(value.span(), name, "what its flag takes".into(), reason));
            }
        }
    }
    Ok(all)
}

/// Whether a key of the file can be this flag.
fn is_named(arg: &Arg, name: &str) -> bool {
    use ArgAction::{Append, Count, Set, SetTrue};
    let takes = matches!(arg.get_action(), Set | Append | SetTrue | Count);
    takes && arg.get_long() == Some(name) && name != "config"
}

fn is_number(arg: &Arg) -> bool {
    let own = arg.get_value_parser().type_id();
    [TypeId::of::<u16>(), TypeId::of::<u64>(), TypeId::of::<usize>(), TypeId::of::<f64>()]
        .iter()
        .any(|number| own == *number)
}

fn is_bytes(arg: &Arg) -> bool {
    arg.get_value_names().is_some_and(|names| names.iter().any(|name| name == "BYTES"))
}

/// What the value of a flag must be in the file.
fn expected(arg: &Arg) -> &'static str {
    match arg.get_action() {
        ArgAction::SetTrue => "true or false",
        ArgAction::Count => "a number up to 255",
        ArgAction::Append => "a text or an array of texts",
        _ if is_bytes(arg) => "a number of bytes or a text such as \"4GiB\"",
        _ if is_number(arg) => "a number",
        _ => "a text",
    }
}

/// The flags that a value stands for; `None` if it is of another type.
fn flags(arg: &Arg, name: &str, value: &DeValue<'_>) -> Option<Vec<OsString>> {
    let flag = |text: &str| vec![OsString::from(format!("--{name}={text}"))];
    let (number, bytes) = (is_number(arg), is_bytes(arg));
    match (arg.get_action(), value) {
        (ArgAction::SetTrue, DeValue::Boolean(true)) => Some(vec![format!("--{name}").into()]),
        (ArgAction::SetTrue, DeValue::Boolean(false)) => Some(Vec::new()),
        (ArgAction::SetTrue, _) => None,
        (ArgAction::Count, DeValue::Integer(times)) => {
            let times = whole(times)?.parse::<u8>().ok()?;
            Some(vec![format!("--{name}").into(); times.into()])
        }
        (ArgAction::Count, _) => None,
        (ArgAction::Append, DeValue::Array(items)) => {
            let texts: Option<Vec<&str>> =
                items.iter().map(|item| item.get_ref().as_str()).collect();
            Some(texts?.into_iter().flat_map(flag).collect())
        }
        (_, DeValue::String(text)) if bytes || !number => Some(flag(text)),
        (_, DeValue::Integer(value)) if number => Some(flag(&whole(value)?)),
        (_, DeValue::Float(value)) if number => Some(flag(value.as_str())),
        _ => None,
    }
}

fn whole(value: &DeInteger<'_>) -> Option<String> {
    i128::from_str_radix(value.as_str(), value.radix()).ok().map(|n| n.to_string())
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    /// The command line that a file makes of `moa serve` with these flags.
    fn read(text: &str, flags: &[&str]) -> Result<Vec<String>> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("serve.toml");
        fs::write(&path, text).unwrap();
        let config = format!("--config={}", path.display());
        let argv = ["moa", "serve", &config].iter().chain(flags).map(OsString::from).collect();
        let all = expand(argv, crate::Cli::command())?;
        Ok(all.into_iter().skip(3).map(|arg| arg.into_string().unwrap()).collect())
    }

    #[test]
    fn a_file_says_what_the_flags_do_not() {
        let text = "model = \"m\"\nport = 9000 # comment\nkv-memory = \"4GiB\"\nprefix-cache = 0\n\
            api-key = [\"a\", \"b\"]\nuniform = 0.25\nignore-extra-tensors = true\ndevice = \"cpu\"\n\
            verbose = 2\nmax-queue = 1_000\n";
        let all = [
            "--model=m",
            "--port=9000",
            "--kv-memory=4GiB",
            "--prefix-cache=0",
            "--api-key=a",
            "--api-key=b",
            "--uniform=0.25",
            "--ignore-extra-tensors",
            "--device=cpu",
            "--verbose",
            "--verbose",
            "--max-queue=1000",
        ];
        assert_eq!(read(text, &[]).unwrap(), all);
        let mine = ["--port=1", "--api-key=c", "--plan=p", "-v"];
        let mut expected: Vec<&str> = mine.to_vec();
        expected.extend([
            "--model=m",
            "--kv-memory=4GiB",
            "--prefix-cache=0",
            "--ignore-extra-tensors",
            "--device=cpu",
            "--max-queue=1000",
        ]);
        assert_eq!(read(text, &mine).unwrap(), expected);
    }

    #[test]
    fn faults_name_file_line_and_key() {
        for (text, line, told) in [
            ("port = 1\nports = 2", 2, "no such flag"),
            ("kv_memory = 1", 1, "written `kv-memory`"),
            ("\n\nport = \"8080\"", 3, "must be a number"),
            ("model = 5", 1, "must be a text, got integer 5"),
            ("api-key = [1]", 1, "an array of texts"),
            ("ignore-extra-tensors = \"yes\"", 1, "true or false"),
            ("model = \"m\"\nport = 99999", 2, "99999"),
            ("kv-memory = \"4 trucks\"", 1, "KiB"),
            ("max-batch = 0", 1, "from 1"),
            ("config = \"other.toml\"", 1, "must be on the command line"),
            ("verbose = true", 1, "must be a number up to 255, got boolean true"),
            ("verbose = -1", 1, "got integer -1"),
            ("port.x = 1", 1, "must be a number"),
            ("[[port]]", 1, "must be a number"),
            ("max-queue = 1.5", 1, "1.5"),
            ("uniform = nan", 1, "nan"),
            ("[server]\nport = 1", 1, "no such flag"),
            ("port = 1\nport = 2", 2, "TOML"),
            ("port = ", 1, "TOML"),
        ] {
            let error = read(text, &[]).unwrap_err().to_string();
            assert!(error.contains(&format!("serve.toml:{line}: ")), "{text}: {error}");
            assert!(error.contains(told), "{text}: {error}");
        }
        let argv = ["moa", "serve", "--config=/nowhere.toml"].map(OsString::from).to_vec();
        assert!(matches!(expand(argv, crate::Cli::command()), Err(Error::Read { .. })));
    }
}
