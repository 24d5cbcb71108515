use moa_core::ArgumentError;

/// Everything that can go wrong in this crate. A failing call leaves every cache as it was.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// An operation refuses an argument: its shape, its type or its value.
    #[error(transparent)]
    Argument(#[from] ArgumentError),
    /// From the core: capacity, rollback, invalid spans, a layout that is too large.
    #[error(transparent)]
    Core(moa_core::Error),
    /// A buffer would be larger than the device can address.
    #[error("{what} would need a buffer of {bytes} bytes, the device allows {limit}")]
    TooLarge {
        /// What the buffer was for.
        what: &'static str,
        /// How much was asked for.
        bytes: u64,
        /// The device's limit for one buffer.
        limit: u64,
    },
    /// The memory could not be had on the host.
    #[error("cannot allocate {bytes} bytes for {what}")]
    OutOfMemory {
        /// What the memory was for.
        what: &'static str,
        /// How much was asked for.
        bytes: u64,
    },
    /// There is no device, or it refused to be opened.
    #[error("no GPU: {message}")]
    NoDevice {
        /// What was found instead.
        message: String,
    },
    /// The device was lost: reset by its driver, unplugged, destroyed. Nothing on it can be had back, and every
    /// later call says so too.
    #[error("{op}: the device is lost: {message}")]
    Lost {
        /// What was attempted.
        op: &'static str,
        /// CubeCL's text when it was noticed.
        message: String,
    },
    /// The device failed: out of memory, a kernel refused.
    #[error("{op}: the device failed: {message}")]
    Device {
        /// What was attempted; the failure may be of an earlier operation.
        op: &'static str,
        /// CubeCL's text.
        message: String,
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

    /// For `map_err` on CubeCL's calls.
    pub(crate) fn device<E: std::fmt::Display>(op: &'static str) -> impl Fn(E) -> Self {
        move |error| Self::Device { op, message: error.to_string() }
    }
}
