use std::io;
use std::path::PathBuf;

/// Everything that keeps a report from being made.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A file of answers could not be read.
    #[error("{}: {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A line of a file of answers is not what it should be.
    #[error("{}, line {line}: {what} must be {expected}, got {got}", path.display())]
    Line {
        /// The file.
        path: PathBuf,
        /// The line, from 1.
        line: usize,
        /// The field, or the line as a whole.
        what: &'static str,
        /// What would have been accepted.
        expected: &'static str,
        /// What came.
        got: String,
    },
    /// A file of answers holds no answer.
    #[error("{}: items must be at least one question, got none", path.display())]
    NoAnswers {
        /// The file.
        path: PathBuf,
    },
    /// Answers of one report are to other questions.
    #[error("{name}: answers must be to the evaluation of the first, {expected}, got {got}")]
    OtherEvaluation {
        /// Name of the answers.
        name: String,
        /// What the first answers are to.
        expected: String,
        /// What these are to.
        got: String,
    },
    /// Plans of one report are for models of different dimensions.
    #[error("{name}: {source}")]
    OtherModel {
        /// Index of the plan that is not for the model of the first.
        index: usize,
        /// Its name.
        name: String,
        /// Both dimensions.
        source: moa_core::Error,
    },
}

/// Result of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;
