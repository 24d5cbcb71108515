use std::fmt;
use std::path::PathBuf;

use crate::cache::CacheType;
use crate::plan::ModelShape;

/// Everything that can go wrong in this crate. A failing call leaves its arguments unchanged.
#[derive(Debug)]
#[non_exhaustive]
pub enum Error {
    /// An argument is outside its domain.
    Invalid {
        /// Name of the argument or field.
        what: String,
        /// What would have been accepted.
        expected: String,
        /// What came.
        got: String,
    },
    /// An operation of a backend refuses an argument.
    Argument(ArgumentError),
    /// A plan or profile was made for a model of other dimensions.
    ShapeMismatch {
        /// "plan" or "profile".
        what: &'static str,
        /// Dimensions of the model at hand.
        expected: ModelShape,
        /// Dimensions in the file.
        got: ModelShape,
    },
    /// A plan or profile was made for other weights of the same dimensions.
    FingerprintMismatch {
        /// "plan" or "profile".
        what: &'static str,
        /// Fingerprint of the model at hand.
        expected: String,
        /// Fingerprint in the file.
        got: String,
    },
    /// A length that the profile does not hold was asked for.
    UnknownLength {
        /// The length asked for.
        length: usize,
        /// The lengths that exist.
        available: Vec<usize>,
    },
    /// No choice of rules meets every bound.
    Infeasible {
        /// Length whose bound cannot be met.
        length: usize,
        /// Smallest reachable value against the bound.
        reason: String,
    },
    /// More tokens than the sequence was opened for.
    CapacityExceeded {
        /// Tokens already held.
        len: usize,
        /// Tokens that were to be added.
        more: usize,
        /// Context length the sequence was opened for.
        capacity: usize,
    },
    /// A rollback would need keys that a ring has already overwritten.
    Evicted {
        /// Length asked for.
        to: usize,
        /// Oldest position that the next query would have to see.
        needed: usize,
        /// Oldest position that the head still holds outside the sink.
        oldest_held: usize,
    },
    /// A backend does not offer an optional operation.
    Unsupported {
        /// Name of the backend.
        backend: &'static str,
        /// Name of the operation.
        operation: &'static str,
    },
    /// A backend cannot hold keys and values in a type.
    CacheType {
        /// Name of the backend.
        backend: &'static str,
        /// The type asked for.
        cache_type: CacheType,
        /// The KV head of a layer whose type it is, or none where it is that of all heads.
        head: Option<usize>,
    },
    /// A file could not be read or written.
    Io {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// A file was read but does not hold what it should.
    Format {
        /// The file.
        path: PathBuf,
        /// What is wrong, with the place where it is known.
        reason: String,
    },
}

/// An argument that an operation of a backend refuses, in the same words for all of them.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
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
        expected: impl fmt::Display,
        got: impl fmt::Display,
    ) -> Self {
        Self { operation, argument, expected: expected.to_string(), got: got.to_string() }
    }

    /// A tensor of another shape than the operation needs.
    pub fn shape(
        operation: &'static str,
        argument: &'static str,
        expected: impl fmt::Display,
        got: &[usize],
    ) -> Self {
        Self::new(operation, argument, expected, format_args!("shape {got:?}"))
    }
}

impl fmt::Display for ArgumentError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { operation, argument, expected, got } = self;
        write!(f, "{operation}: {argument}: expected {expected}, got {got}")
    }
}

impl std::error::Error for ArgumentError {}

/// Result of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    /// Builds [`Error::Invalid`].
    pub fn invalid(
        what: impl Into<String>,
        expected: impl Into<String>,
        got: impl fmt::Display,
    ) -> Self {
        Self::Invalid { what: what.into(), expected: expected.into(), got: got.to_string() }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Invalid { what, expected, got } => {
                write!(f, "{what}: expected {expected}, got {got}")
            }
            Self::Argument(argument) => argument.fmt(f),
            Self::ShapeMismatch { what, expected, got } => {
                write!(f, "{what} is for a model of {got}, but the model has {expected}")
            }
            Self::FingerprintMismatch { what, expected, got } => {
                write!(f, "{what} was made for weights {got}, but the model has weights {expected}")
            }
            Self::UnknownLength { length, available } => {
                write!(f, "length {length} is not in the profile; it holds {available:?}")
            }
            Self::Infeasible { length, reason } => {
                write!(f, "no plan meets the bound at length {length}: {reason}")
            }
            Self::CapacityExceeded { len, more, capacity } => write!(
                f,
                "sequence holds {len} tokens and was opened for {capacity}; {more} more do not fit"
            ),
            Self::Evicted { to, needed, oldest_held } => write!(
                f,
                "cannot truncate to {to} tokens: key {needed} is needed again, but keys before \
                 {oldest_held} were evicted (open the sequence with more slack to roll back further)"
            ),
            Self::Unsupported { backend, operation } => {
                write!(f, "{backend} does not support {operation}")
            }
            Self::CacheType { backend, cache_type, head } => {
                write!(f, "{backend} has no caches in {cache_type}")?;
                match head {
                    Some(head) => write!(f, ", which the plan wants for KV head {head}"),
                    None => Ok(()),
                }
            }
            Self::Io { path, source } => write!(f, "{}: {source}", path.display()),
            Self::Format { path, reason } => write!(f, "{}: {reason}", path.display()),
        }
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Self::Io { source, .. } => Some(source),
            // The argument's words are the error's own; what is behind them is not.
            Self::Argument(argument) => argument.source(),
            _ => None,
        }
    }
}

impl From<ArgumentError> for Error {
    fn from(error: ArgumentError) -> Self {
        Self::Argument(error)
    }
}
