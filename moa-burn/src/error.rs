use burn::tensor::DType;

/// Everything that can go wrong in this crate, known when a call returns. A failing call leaves every cache as it
/// was.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// From the kernels and the core: shapes, capacity, rollback, memory, the device.
    #[error(transparent)]
    Attention(moa_backend_wgpu::Error),
    /// A tensor of an autodiff device. The kernels have no gradients: run them on `tensor.inner()`, or on a model
    /// after `valid()`.
    #[error(
        "{argument}: expected a tensor without gradients (`inner()`), got one of an autodiff device"
    )]
    Gradients {
        /// Which one.
        argument: &'static str,
    },
    /// A device or tensor of a backend whose memory CubeCL does not hold, such as flex.
    #[error(
        "{argument}: expected one of a CubeCL backend (wgpu, vulkan, metal, cuda, ..), got {got}"
    )]
    Backend {
        /// Which one.
        argument: &'static str,
        /// What came.
        got: String,
    },
    /// Elements of another type.
    #[error("{argument}: expected {expected}, got {got:?}")]
    Elements {
        /// Which tensor, or the caches.
        argument: &'static str,
        /// The types that there are.
        expected: &'static str,
        /// What came.
        got: DType,
    },
}

/// Result of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl From<moa_backend_wgpu::Error> for Error {
    fn from(error: moa_backend_wgpu::Error) -> Self {
        Self::Attention(error)
    }
}

impl From<moa_core::Error> for Error {
    fn from(error: moa_core::Error) -> Self {
        Self::Attention(error.into())
    }
}

impl From<moa_core::ArgumentError> for Error {
    fn from(error: moa_core::ArgumentError) -> Self {
        Self::Attention(error.into())
    }
}
