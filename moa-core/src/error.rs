use std::path::PathBuf;

use crate::plan::ModelShape;

/// Everything that can go wrong in this crate. A failing call leaves its arguments unchanged.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// An argument is outside its domain.
    #[error("{what}: expected {expected}, got {got}")]
    Invalid {
        /// Name of the argument or field.
        what: String,
        /// What would have been accepted.
        expected: String,
        /// What came.
        got: String,
    },
    /// An operation of a backend refuses an argument.
    #[error(transparent)]
    Argument(#[from] ArgumentError),
    /// A plan or profile was made for a model of other dimensions.
    #[error("{what} is for a model of {got}, but the model has {expected}")]
    ShapeMismatch {
        /// "plan" or "profile".
        what: &'static str,
        /// Dimensions of the model at hand.
        expected: ModelShape,
        /// Dimensions in the file.
        got: ModelShape,
    },
    /// A plan or profile was made for other weights of the same dimensions.
    #[error("{what} was made for weights {got}, but the model has weights {expected}")]
    FingerprintMismatch {
        /// "plan" or "profile".
        what: &'static str,
        /// Fingerprint of the model at hand.
        expected: String,
        /// Fingerprint in the file.
        got: String,
    },
    /// A length that the profile does not hold was asked for.
    #[error("length {length} is not in the profile; it holds {available:?}")]
    UnknownLength {
        /// The length asked for.
        length: usize,
        /// The lengths that exist.
        available: Vec<usize>,
    },
    /// No choice of rules meets every bound.
    #[error("no plan meets the bound at length {length}: {reason}")]
    Infeasible {
        /// Length whose bound cannot be met.
        length: usize,
        /// Smallest reachable value against the bound.
        reason: String,
    },
    /// More tokens than the sequence was opened for.
    #[error("sequence holds {len} tokens and was opened for {capacity}; {more} more do not fit")]
    CapacityExceeded {
        /// Tokens already held.
        len: usize,
        /// Tokens that were to be added.
        more: usize,
        /// Context length the sequence was opened for.
        capacity: usize,
    },
    /// A rollback would need keys that a ring has already overwritten.
    #[error(
        "cannot truncate to {to} tokens: key {needed} is needed again, but keys before {oldest_held} \
         were evicted (open the sequence with more slack to roll back further)"
    )]
    Evicted {
        /// Length asked for.
        to: usize,
        /// Oldest position that the next query would have to see.
        needed: usize,
        /// Oldest position that the head still holds outside the sink.
        oldest_held: usize,
    },
    /// A backend does not offer an optional operation.
    #[error("{backend} does not support {operation}")]
    Unsupported {
        /// Name of the backend.
        backend: &'static str,
        /// Name of the operation.
        operation: &'static str,
    },
    /// A file could not be read or written.
    #[error("{path}: {source}")]
    Io {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// A file was read but does not hold what it should.
    #[error("{path}: {reason}")]
    Format {
        /// The file.
        path: PathBuf,
        /// What is wrong, with the place where it is known.
        reason: String,
    },
}

/// An argument that an operation of a backend refuses, in the same words for all of them.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{operation}: {argument}: expected {expected}, got {got}")]
#[non_exhaustive]
pub struct ArgumentError {
    /// The operation, such as `"extend"`.
    pub operation: &'static str,
    /// The argument, such as `"q"`.
    pub argument: &'static str,
    /// What would have been accepted.
    pub expected: String,
    /// What came.
    pub got: String,
}

impl ArgumentError {
    /// An argument outside of its domain.
    pub fn new(
        operation: &'static str,
        argument: &'static str,
        expected: impl std::fmt::Display,
        got: impl std::fmt::Display,
    ) -> Self {
        Self { operation, argument, expected: expected.to_string(), got: got.to_string() }
    }

    /// A tensor of another shape than the operation needs.
    pub fn shape(
        operation: &'static str,
        argument: &'static str,
        expected: impl std::fmt::Display,
        got: &[usize],
    ) -> Self {
        Self::new(operation, argument, expected, format_args!("shape {got:?}"))
    }
}

/// Result of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    /// Builds [`Error::Invalid`].
    pub fn invalid(
        what: impl Into<String>,
        expected: impl Into<String>,
        got: impl std::fmt::Display,
    ) -> Self {
        Self::Invalid { what: what.into(), expected: expected.into(), got: got.to_string() }
    }
}
