use std::borrow::Cow;
use std::io;
use std::path::PathBuf;

use crate::terminal::to_stderr;

/// Everything that makes the command end with an error.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub(crate) enum Error {
    /// The model or what belongs to it.
    #[error(transparent)]
    Model(#[from] moa_models::Error),

    /// A plan, a profile or the search.
    #[error(transparent)]
    Core(#[from] moa_core::Error),

    /// A report or what it is made from.
    #[error(transparent)]
    Report(#[from] moa_report::Error),

    /// The server.
    #[cfg(feature = "serve")]
    #[error(transparent)]
    Server(#[from] moa_server::Error),

    /// An error with the place in the user's input that it comes from.
    #[error("{place}: {source}")]
    At {
        /// A file with a line, a prompt, an option.
        place: String,
        /// What is wrong there.
        source: Box<Error>,
    },

    /// A device that this build does not have.
    #[error("no device `{got}` in this build; available: {available}")]
    Device {
        /// The name given.
        got: String,
        /// The names that exist.
        available: &'static str,
    },

    /// A model of the hub, in a build that cannot reach it.
    #[cfg(not(feature = "hub"))]
    #[error(
        "{id}: no such folder, and models of the Hugging Face hub need a build with `--features hub` \
         (cargo install --path moa-cli --features hub)"
    )]
    Hub {
        /// The model.
        id: String,
    },

    /// A configuration file says what it cannot.
    #[cfg(feature = "serve")]
    #[error("`{key}` must be {expected}, got {got}")]
    Config {
        /// The key.
        key: String,
        /// What would have been accepted.
        expected: String,
        /// What came.
        got: String,
    },

    /// An argument is outside its domain.
    #[error("{what} must be {expected}, got {got}")]
    Argument {
        /// The argument.
        what: &'static str,
        /// What would have been accepted.
        expected: String,
        /// What came.
        got: String,
    },

    /// A file could not be read.
    #[error("{}: {source}", path.display())]
    Read {
        /// The file or folder.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },

    /// An output file or folder cannot be written.
    #[error("{}: cannot be written: {source}", path.display())]
    Output {
        /// The file or folder.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },

    /// A folder for new plans holds those of an earlier run.
    #[error("{}: holds {count} plans of an earlier run; name another folder or give --force", path.display())]
    PlansExist {
        /// The folder.
        path: PathBuf,
        /// `plan-*.json` files in it.
        count: usize,
    },

    /// A folder that should hold plans holds none.
    #[error("{}: no plan-*.json in this folder", path.display())]
    NoPlans {
        /// The folder.
        path: PathBuf,
    },

    /// Plans do not say what the command has to know of their search.
    #[error("{}: the plan does not say its {missing}; {remedy}", path.display())]
    Provenance {
        /// The plan file.
        path: PathBuf,
        /// What is not there.
        missing: &'static str,
        /// The option that says it instead.
        remedy: &'static str,
    },

    /// The quickstart's model was not found.
    #[error("assets/moa-tiny not found (looked in {}); name a model folder with --model", looked.display())]
    NoTinyModel {
        /// The last folder looked at.
        looked: PathBuf,
    },

    /// Standard input or output failed.
    #[error("{stream}: {source}")]
    Stream {
        /// `stdin`, with the line, or `stdout`.
        stream: Cow<'static, str>,
        /// Why.
        source: io::Error,
    },

    /// The thread pool could not be made.
    #[error("--threads: {0}")]
    Threads(rayon::ThreadPoolBuildError),
}

/// Result of this crate.
pub(crate) type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    /// Builds [`Error::Argument`].
    pub(crate) fn argument(
        what: &'static str,
        expected: impl Into<String>,
        got: impl std::fmt::Display,
    ) -> Self {
        Self::Argument { what, expected: expected.into(), got: got.to_string() }
    }

    /// The same error with the place it comes from.
    pub(crate) fn at(self, place: impl Into<String>) -> Self {
        Self::At { place: place.into(), source: Box::new(self) }
    }

    /// 130 when the user cancelled, as after an interrupt; 2 for everything else.
    pub(crate) fn exit_code(&self) -> u8 {
        match self {
            Self::Model(moa_models::Error::Cancelled) => 130,
            Self::At { source, .. } => source.exit_code(),
            _ => 2,
        }
    }

    /// Whether a plan is for other weights of the same dimensions.
    pub(crate) fn is_of_other_weights(&self) -> bool {
        use moa_core::Error::FingerprintMismatch;
        matches!(
            self,
            Self::Core(FingerprintMismatch { .. })
                | Self::Model(moa_models::Error::Core(FingerprintMismatch { .. }))
        )
    }

    /// Whether stdout was closed by its reader.
    pub(crate) fn is_broken_pipe(&self) -> bool {
        matches!(self, Self::Stream { source, .. } if source.kind() == io::ErrorKind::BrokenPipe)
    }

    /// Writes the error and its causes to stderr.
    pub(crate) fn report(&self) {
        let mut said = self.to_string();
        to_stderr(format_args!("error: {said}"));
        let mut cause = std::error::Error::source(self);
        while let Some(error) = cause {
            let text = error.to_string();
            // Most messages hold their cause's already.
            if !said.contains(&text) {
                to_stderr(format_args!("  caused by: {text}"));
                said = text;
            }
            cause = error.source();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_cancelled_run_has_another_exit_code() {
        let cancelled = Error::from(moa_models::Error::Cancelled);
        assert_eq!(cancelled.exit_code(), 130);
        assert_eq!(cancelled.at("case 3").exit_code(), 130);
        assert_eq!(Error::argument("density", "above 0", 0).exit_code(), 2);
    }

    #[test]
    fn place_comes_first() {
        let error = Error::argument("density", "above 0", 0).at("line 3");
        assert_eq!(error.to_string(), "line 3: density must be above 0, got 0");
    }
}
