use cudarc::driver::DriverError;
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
    /// An element of a weight that is to be rounded is infinite or not a number.
    #[error("cannot round a weight to e4m3: the element of row {row}, column {column} is {value}")]
    NotFinite {
        /// Its row, from 0; that of an output.
        row: usize,
        /// Its column, from 0.
        column: usize,
        /// What it is.
        value: f32,
    },
    /// The device memory could not be had.
    #[error("cannot allocate {bytes} bytes of device memory for {what}, {free} are free")]
    OutOfMemory {
        /// What the memory was for.
        what: &'static str,
        /// How much was asked for.
        bytes: u64,
        /// How much the device had left.
        free: u64,
    },
    /// The NVIDIA driver's library is not on this machine.
    #[error("no CUDA driver: none of {searched:?} could be loaded")]
    NoDriver {
        /// Library names that were tried.
        searched: &'static [&'static str],
    },
    /// There is no such device.
    #[error("no CUDA device {ordinal}: the driver knows {count}")]
    NoDevice {
        /// The device asked for, from 0.
        ordinal: usize,
        /// Devices that exist.
        count: usize,
    },
    /// The device is older than the kernels need.
    #[error("{name} is of compute capability {major}.{minor}, expected at least 8.0")]
    OldDevice {
        /// Name of the device.
        name: String,
        /// Its compute capability.
        major: u32,
        /// Its compute capability, after the dot.
        minor: u32,
    },
    /// NVRTC, which compiles the kernels, is not on this machine.
    #[error(
        "no NVRTC: none of {searched:?} could be loaded; install the CUDA toolkit or the package \
         nvidia-cuda-nvrtc and put its folder on LD_LIBRARY_PATH"
    )]
    NoNvrtc {
        /// Library names that were tried.
        searched: &'static [&'static str],
    },
    /// cuBLASLt, which computes matrix products, is not on this machine.
    #[error(
        "no cuBLASLt: none of {searched:?} could be loaded; install the CUDA toolkit or the package \
         nvidia-cublas and put its folder on LD_LIBRARY_PATH"
    )]
    NoCublasLt {
        /// Library names that were tried.
        searched: &'static [&'static str],
    },
    /// NCCL, which adds up over several GPUs, is not on this machine.
    #[error(
        "no NCCL: none of {searched:?} could be loaded; install libnccl2 or the package nvidia-nccl and \
         put its folder on LD_LIBRARY_PATH"
    )]
    NoNccl {
        /// Library names that were tried.
        searched: &'static [&'static str],
    },
    /// NCCL refused a call.
    #[error("{call} failed: {status}")]
    Nccl {
        /// What was attempted.
        call: &'static str,
        /// NCCL's text and number.
        status: String,
    },
    /// cuBLASLt refused a call.
    #[error("{call} failed{product}: {status}")]
    Blas {
        /// What was attempted.
        call: &'static str,
        /// cuBLASLt's status.
        status: String,
        /// The matrix product, with a word before it, or nothing.
        product: String,
    },
    /// NVRTC refused a kernel.
    #[error("cannot compile {kernel} for {architecture}: {log}")]
    Compile {
        /// The source file.
        kernel: &'static str,
        /// The architecture, such as `sm_90a`.
        architecture: String,
        /// NVRTC's log.
        log: String,
    },
    /// The driver refused a call.
    #[error("{call} failed: {message} (CUDA error {code})")]
    Driver {
        /// What was attempted.
        call: &'static str,
        /// The driver's error number.
        code: u32,
        /// The driver's text for it.
        message: String,
    },
    /// burn's server refused: a tensor was never written, or memory could not be had.
    #[cfg(feature = "burn")]
    #[error("{op}: burn's server refused: {message}")]
    Burn {
        /// The operation.
        op: &'static str,
        /// What it said.
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

    /// The same of another row.
    pub(crate) fn in_row(self, row: usize) -> Self {
        match self {
            Self::NotFinite { column, value, .. } => Self::NotFinite { row, column, value },
            other => other,
        }
    }

    /// For `map_err` on driver calls.
    pub(crate) fn driver(call: &'static str) -> impl Fn(DriverError) -> Self {
        move |error| Self::Driver {
            call,
            code: error.0 as u32,
            message: error
                .error_string()
                .map_or_else(|_| "no description".into(), |s| s.to_string_lossy().into_owned()),
        }
    }
}
