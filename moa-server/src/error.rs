use std::net::SocketAddr;

/// Result of everything in this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What keeps a server from running. Faults of requests are answered, and are no errors of the server.
#[non_exhaustive]
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The address cannot be listened on.
    #[error("{address}: cannot be listened on: {source}")]
    Bind {
        /// The address asked for.
        address: SocketAddr,
        /// The operating system's answer.
        source: std::io::Error,
    },

    /// The threads that serve connections cannot be made.
    #[error("no threads to serve with: {0}")]
    Runtime(std::io::Error),

    /// An option is out of its range.
    #[error("{what} must be {expected}, got {got}")]
    Option {
        /// The option.
        what: &'static str,
        /// The values it may have.
        expected: String,
        /// The value that came.
        got: String,
    },

    /// The model or its plan.
    #[error(transparent)]
    Model(#[from] moa_models::Error),

    /// The plan.
    #[error(transparent)]
    Core(#[from] moa_core::Error),
}

impl Error {
    pub(crate) fn option(
        what: &'static str,
        expected: impl Into<String>,
        got: impl std::fmt::Display,
    ) -> Self {
        Self::Option { what, expected: expected.into(), got: got.to_string() }
    }
}
