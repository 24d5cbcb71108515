//! Whether the driver, NVRTC and cuBLASLt are there, asked before anything calls into them.

use std::path::PathBuf;
use std::sync::OnceLock;

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

/// # Errors
/// [`Error::NoDriver`].
pub(crate) fn driver() -> Result<()> {
    static FOUND: OnceLock<bool> = OnceLock::new();
    match FOUND.get_or_init(|| DRIVER.iter().any(|name| load(name.into()))) {
        true => Ok(()),
        false => Err(Error::NoDriver { searched: DRIVER }),
    }
}

/// # Errors
/// [`Error::NoNvrtc`].
pub(crate) fn nvrtc() -> Result<()> {
    static FOUND: OnceLock<bool> = OnceLock::new();
    let found = FOUND.get_or_init(|| load_any(NVRTC));
    match found {
        true => Ok(()),
        false => Err(Error::NoNvrtc { searched: NVRTC }),
    }
}

/// # Errors
/// [`Error::NoCublasLt`].
pub(crate) fn cublaslt() -> Result<()> {
    static FOUND: OnceLock<bool> = OnceLock::new();
    match FOUND.get_or_init(|| load_any(CUBLASLT)) {
        true => Ok(()),
        false => Err(Error::NoCublasLt { searched: CUBLASLT }),
    }
}

/// Loads a library by its name, or from the toolkit's folder, which is often not on the loader's
/// path. Once loaded from there, it answers to its bare name too.
fn load_any(names: &[&str]) -> bool {
    let toolkit = || {
        let roots = ["CUDA_HOME", "CUDA_PATH"].into_iter().filter_map(std::env::var_os);
        let mut roots = roots.map(PathBuf::from).chain([PathBuf::from("/usr/local/cuda")]);
        roots.any(|root| names[1..].iter().any(|name| load(root.join("lib64").join(name))))
    };
    names.iter().any(|name| load(name.into())) || toolkit()
}

/// Loads a library for the life of the process.
fn load(path: PathBuf) -> bool {
    // SAFETY: these libraries' initialisers may run at any time, on any thread.
    match unsafe { libloading::Library::new(path) } {
        Ok(library) => {
            std::mem::forget(library);
            true
        }
        Err(_) => false,
    }
}
