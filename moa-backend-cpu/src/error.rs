use moa_core::ArgumentError;

/// Everything that can go wrong in this crate. A failing call leaves every cache as it was.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// An operation refuses an argument: its shape or its value.
    #[error(transparent)]
    Argument(#[from] ArgumentError),
    /// From the core: capacity, rollback, invalid spans.
    #[error(transparent)]
    Core(moa_core::Error),
    /// The memory could not be had.
    #[error("cannot allocate {bytes} bytes for {what}")]
    OutOfMemory {
        /// What the memory was for.
        what: &'static str,
        /// How much was asked for.
        bytes: u64,
    },
}

/// Result of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl From<moa_core::Error> for Error {
    fn from(error: moa_core::Error) -> Self {
        match error {
            moa_core::Error::Argument(error) => Self::Argument(error),
            other => Self::Core(other),
        }
    }
}

impl Error {
    pub(crate) fn shape(
        op: &'static str,
        what: &'static str,
        expected: impl std::fmt::Display,
        got: &[usize],
    ) -> Self {
        ArgumentError::shape(op, what, expected, got).into()
    }

    pub(crate) fn argument(
        op: &'static str,
        what: &'static str,
        expected: impl std::fmt::Display,
        got: impl std::fmt::Display,
    ) -> Self {
        ArgumentError::new(op, what, expected, got).into()
    }
}
