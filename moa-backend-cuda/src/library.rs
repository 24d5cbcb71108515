//! Whether the driver, NVRTC, cuBLASLt and NCCL are there, asked before anything calls into them.

use std::path::PathBuf;
use std::sync::OnceLock;

use libloading::Library;

use crate::{Error, Result};

const DRIVER: &[&str] =
    if cfg!(windows) { &["nvcuda.dll"] } else { &["libcuda.so.1", "libcuda.so"] };
const NVRTC: &[&str] = if cfg!(windows) {
    &["nvrtc64_130_0.dll", "nvrtc64_120_0.dll"]
} else {
    &["libnvrtc.so", "libnvrtc.so.13", "libnvrtc.so.12"]
};

const CUBLASLT: &[&str] = if cfg!(windows) {
    &["cublasLt64_13.dll", "cublasLt64_12.dll"]
} else {
    &["libcublasLt.so", "libcublasLt.so.13", "libcublasLt.so.12"]
};

pub(crate) const NCCL: &[&str] =
    if cfg!(windows) { &["nccl.dll"] } else { &["libnccl.so", "libnccl.so.2"] };

/// # Errors
/// [`Error::NoDriver`].
pub(crate) fn driver() -> Result<()> {
    static FOUND: OnceLock<bool> = OnceLock::new();
    let found = || DRIVER.iter().any(|name| load(name.into()).map(std::mem::forget).is_some());
    match FOUND.get_or_init(found) {
        true => Ok(()),
        false => Err(Error::NoDriver { searched: DRIVER }),
    }
}

/// # Errors
/// [`Error::NoNvrtc`].
pub(crate) fn nvrtc() -> Result<()> {
    static FOUND: OnceLock<bool> = OnceLock::new();
    match FOUND.get_or_init(|| open(NVRTC).map(std::mem::forget).is_some()) {
        true => Ok(()),
        false => Err(Error::NoNvrtc { searched: NVRTC }),
    }
}

/// # Errors
/// [`Error::NoCublasLt`].
pub(crate) fn cublaslt() -> Result<()> {
    static FOUND: OnceLock<bool> = OnceLock::new();
    match FOUND.get_or_init(|| open(CUBLASLT).map(std::mem::forget).is_some()) {
        true => Ok(()),
        false => Err(Error::NoCublasLt { searched: CUBLASLT }),
    }
}

/// Loads a library by its name, or from the toolkit's folder, which is often not on the loader's
/// path. Once loaded from there, and not dropped, it answers to its bare name too.
pub(crate) fn open(names: &[&str]) -> Option<Library> {
    let toolkit = || {
        let roots = ["CUDA_HOME", "CUDA_PATH"].into_iter().filter_map(std::env::var_os);
        let mut roots = roots.map(PathBuf::from).chain([PathBuf::from("/usr/local/cuda")]);
        roots.find_map(|root| names.iter().find_map(|name| load(root.join("lib64").join(name))))
    };
    names.iter().find_map(|name| load(name.into())).or_else(toolkit)
}

fn load(path: PathBuf) -> Option<Library> {
    // SAFETY: these libraries' initialisers may run at any time, on any thread.
    unsafe { Library::new(path) }.ok()
}
