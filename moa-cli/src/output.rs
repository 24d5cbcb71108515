use std::borrow::Cow;
use std::fmt::Display;
use std::io::{self, IsTerminal, Write};
use std::path::Path;

use moa_models::{CacheType, CacheTypes};
pub(crate) use moa_report::{bytes, percent, table};
use serde::{Serialize, Serializer};
use serde_json::Value;

use crate::args::{self, ActivationType, Device, Global, WeightType};
use crate::error::{Error, Result};
use crate::terminal::{plain, to_stderr};

/// What all commands share: where results go, and the global options.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Context {
    pub(crate) json: bool,
    pub(crate) quiet: bool,
    pub(crate) seed: u64,
    pub(crate) device: Device,
    /// Type of caches where a plan says none.
    pub(crate) cache: CacheType,
    /// What was said of it.
    pub(crate) cache_dtype: Option<args::CacheType>,
    pub(crate) weights: Option<WeightType>,
    pub(crate) activations: Option<ActivationType>,
    /// Threads of the search; 0 for all.
    pub(crate) threads: usize,
    /// Nothing is written at all: another GPU's thread writes the same.
    muted: bool,
}

impl Context {
    pub(crate) fn new(global: &Global) -> Self {
        Self {
            json: global.json,
            quiet: global.quiet,
            seed: global.seed,
            device: global.device,
            cache: global.cache_dtype.unwrap_or(args::CacheType::Bf16).into(),
            cache_dtype: global.cache_dtype,
            weights: global.weights,
            activations: global.activations,
            threads: global.threads.unwrap_or(0),
            muted: false,
        }
    }

    /// One that writes nothing.
    #[cfg(feature = "cuda")]
    pub(crate) fn muted(&self) -> Self {
        Self { json: false, quiet: true, muted: true, ..*self }
    }

    /// The same for plans whose heads have these types: narrow types belong to the plan, and what it loses is measured
    /// against a dense cache of 16 bits.
    pub(crate) fn for_types(&self, types: CacheTypes) -> Self {
        let cache = if types == CacheTypes::Device { self.cache } else { CacheType::Bf16 };
        Self { cache, ..*self }
    }

    /// Checks that the model runs on one device.
    pub(crate) fn check_one_device(&self, what: &'static str) -> Result<()> {
        match self.device {
            #[cfg(feature = "cuda")]
            Device::CudaGroup(gpus) => {
                Err(Error::argument(what, "one device", format!("GPUs {gpus:?}")))
            }
            _ => {
                let _ = what;
                Ok(())
            }
        }
    }

    /// Writes a result for people to stdout, with a line end; nothing with `--json`.
    pub(crate) fn print(&self, text: impl Display) -> Result<()> {
        self.stream(format_args!("{text}\n"))
    }

    /// Writes a part of a line to stdout at once; nothing with `--json`.
    pub(crate) fn stream(&self, text: impl Display) -> Result<()> {
        if self.json || self.muted { Ok(()) } else { to_stdout(&text) }
    }

    /// Writes the result of a command: as text, or with `--json` as one object on one line.
    pub(crate) fn result(&self, result: &(impl Serialize + Display)) -> Result<()> {
        if self.json { self.json(&value_of(result)?) } else { self.print(result) }
    }

    /// Writes the result for programs, with `--json` only.
    pub(crate) fn json(&self, value: &Value) -> Result<()> {
        if self.json { to_stdout(&format_args!("{value}\n")) } else { Ok(()) }
    }

    /// Writes a remark to stderr, unless `--quiet` or `--json`.
    pub(crate) fn note(&self, text: impl Display) {
        if !self.quiet && !self.json {
            to_stderr(text);
        }
    }
}

/// A result as JSON, its keys in the order of the alphabet.
pub(crate) fn value_of(result: &impl Serialize) -> Result<Value> {
    serde_json::to_value(result)
        .map_err(|source| Error::Stream { stream: "stdout".into(), source: source.into() })
}

/// Serialises a path as people see it: JSON has no bytes that are not UTF-8, and a result is not lost for
/// their sake.
pub(crate) fn shown<S: Serializer>(
    path: &impl AsRef<Path>,
    serializer: S,
) -> std::result::Result<S::Ok, S::Error> {
    serializer.collect_str(&path.as_ref().display())
}

fn to_stdout(text: &dyn Display) -> Result<()> {
    let mut out = io::stdout().lock();
    let text = text.to_string();
    // Whoever reads a pipe gets what was said, byte by byte.
    let text = if out.is_terminal() { plain(&text) } else { Cow::Borrowed(&*text) };
    out.write_all(text.as_bytes())
        .and_then(|()| out.flush())
        .map_err(|source| Error::Stream { stream: "stdout".into(), source })
}
