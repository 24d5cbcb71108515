/// Everything that can go wrong in this crate. A failing call leaves every cache as it was.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// From the core: capacity, rollback, invalid spans.
    #[error(transparent)]
    Core(#[from] moa_core::Error),
    /// An argument has another shape than the operation needs.
    #[error("{op}: {what} has shape {got:?}, expected {expected}")]
    Shape {
        /// The operation.
        op: &'static str,
        /// The argument.
        what: &'static str,
        /// What would have been accepted.
        expected: String,
        /// What came.
        got: Vec<usize>,
    },
    /// An argument is outside its domain.
    #[error("{op}: {what} is {got}, expected {expected}")]
    Argument {
        /// The operation.
        op: &'static str,
        /// The argument.
        what: &'static str,
        /// What would have been accepted.
        expected: String,
        /// What came.
        got: String,
    },
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
    /// There is no device, or it refused to be opened.
    #[error("no GPU: {message}")]
    NoDevice {
        /// What was found instead.
        message: String,
    },
    /// The device failed: out of memory, a kernel refused, the device lost.
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

impl Error {
    pub(crate) fn shape(
        op: &'static str,
        what: &'static str,
        expected: impl std::fmt::Display,
        got: &[usize],
    ) -> Self {
        Self::Shape { op, what, expected: expected.to_string(), got: got.to_vec() }
    }

    pub(crate) fn argument(
        op: &'static str,
        what: &'static str,
        expected: impl std::fmt::Display,
        got: impl std::fmt::Display,
    ) -> Self {
        Self::Argument { op, what, expected: expected.to_string(), got: got.to_string() }
    }

    /// For `map_err` on CubeCL's calls.
    pub(crate) fn device<E: std::fmt::Display>(op: &'static str) -> impl Fn(E) -> Self {
        move |error| Self::Device { op, message: error.to_string() }
    }
}
