use std::ffi::CStr;

use cudarc::driver::DriverError;
use cudarc::driver::sys::CUresult as Code;
use moa_core::ArgumentError;

use crate::library;

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
    /// The memory could not be had on the host.
    #[error("cannot allocate {bytes} bytes of the host's memory for {what}")]
    HostMemory {
        /// What the memory was for.
        what: &'static str,
        /// How much was asked for.
        bytes: u64,
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
    /// The device, or the cuBLASLt of this machine, does not multiply e4m3 by e4m3 with a factor for each row.
    #[error(
        "{name}, compute capability {major}.{minor}, has no products of e4m3 activations: {reason}"
    )]
    NoE4m3Products {
        /// Name of the device.
        name: String,
        /// Its compute capability.
        major: u32,
        /// Its compute capability, after the dot.
        minor: u32,
        /// What is missing.
        reason: String,
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
    /// The host no longer waits for the device: whoever watches the wait ([`Device::set_watch`](crate::Device::set_watch))
    /// has ended it.
    #[error("the wait for the device was given up: another GPU of its group failed or hangs")]
    GivenUp,
    /// A capture ended without a graph: another thread waited for the whole GPU meanwhile, as freeing a library's handle does.
    /// Nothing has run; the same work can be captured again.
    #[error(
        "what was captured is void: another thread of this process waited for the whole GPU meanwhile"
    )]
    CaptureInvalidated,
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
    /// The device, or its context in this process, is gone: after a fault of the hardware, or after a kernel that
    /// went astray. The driver refuses all later calls too; only a new process has the device again.
    #[error("the device is lost: {call} failed: {message} (CUDA error {code})")]
    DeviceLost {
        /// What was attempted.
        call: &'static str,
        /// The driver's error number.
        code: u32,
        /// The driver's text for it.
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

    /// `len` zeros of the host's memory.
    pub(crate) fn host_zeros<T: bytemuck::Zeroable + Clone>(
        what: &'static str,
        len: usize,
    ) -> Result<Vec<T>> {
        let mut all = Vec::new();
        let bytes = (len as u64).saturating_mul(size_of::<T>() as u64);
        all.try_reserve_exact(len).map_err(|_| Self::HostMemory { what, bytes })?;
        all.resize(len, T::zeroed());
        Ok(all)
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
        move |error| {
            // The text is the driver's, which may be what is missing.
            let text = library::driver().ok().and_then(|()| error.error_string().ok());
            let message = text.map_or_else(|| "no description".into(), CStr::to_string_lossy);
            let (code, message) = (error.0 as u32, message.into_owned());
            match is_lost(error.0) {
                true => Self::DeviceLost { call, code, message },
                false => Self::Driver { call, code, message },
            }
        }
    }
}

/// Errors of the hardware, errors after which the driver's header wants the process to be relaunched, and those of a
/// context that is gone. A busy device and errors that the driver does not know are none of them.
fn is_lost(code: Code) -> bool {
    matches!(
        code,
        Code::CUDA_ERROR_DEINITIALIZED
            | Code::CUDA_ERROR_ECC_UNCORRECTABLE
            | Code::CUDA_ERROR_NVLINK_UNCORRECTABLE
            | Code::CUDA_ERROR_ILLEGAL_ADDRESS
            | Code::CUDA_ERROR_LAUNCH_TIMEOUT
            | Code::CUDA_ERROR_CONTEXT_IS_DESTROYED
            | Code::CUDA_ERROR_ASSERT
            | Code::CUDA_ERROR_HARDWARE_STACK_ERROR
            | Code::CUDA_ERROR_ILLEGAL_INSTRUCTION
            | Code::CUDA_ERROR_MISALIGNED_ADDRESS
            | Code::CUDA_ERROR_INVALID_ADDRESS_SPACE
            | Code::CUDA_ERROR_INVALID_PC
            | Code::CUDA_ERROR_LAUNCH_FAILED
            | Code::CUDA_ERROR_EXTERNAL_DEVICE
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The numbers stand for what the driver would answer: no device is there to be lost.
    #[test]
    fn a_lost_device_is_told_from_a_refused_call_at_every_call() {
        use Code::*;
        for code in
            [CUDA_ERROR_ECC_UNCORRECTABLE, CUDA_ERROR_ILLEGAL_ADDRESS, CUDA_ERROR_LAUNCH_FAILED]
        {
            // The driver repeats the error at each later call, also at those that only ask.
            for call in ["cuLaunchKernel", "cuStreamSynchronize", "cuMemGetInfo", "cuMemAllocAsync"]
            {
                let error = Error::driver(call)(DriverError(code));
                let Error::DeviceLost { call: at, code: number, .. } = &error else {
                    panic!("{error}")
                };
                assert_eq!((*at, *number), (call, code as u32));
                assert!(error.to_string().contains("lost"), "{error}");
            }
        }
        for code in [CUDA_ERROR_UNKNOWN, CUDA_ERROR_DEVICE_UNAVAILABLE, CUDA_ERROR_OUT_OF_MEMORY] {
            let error = Error::driver("cuMemAllocAsync")(DriverError(code));
            assert!(matches!(error, Error::Driver { .. }), "{error}");
        }
    }
}
