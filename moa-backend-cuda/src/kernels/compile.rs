//! From a kernel's source to machine code, through NVRTC.

use std::ffi::{CString, c_char, c_int};

use cudarc::nvrtc::{result, sys};

use super::cubin_cache;
use crate::attention::schedule::{MIN_NARROW_SPLIT_KEYS, MIN_SPLIT_KEYS};
use crate::kernels::source::{HEADERS, Source};
use crate::{Error, Result, library};
use moa_core::Dtype;

/// Head dimensions that the kernels are written for.
pub const HEAD_DIMS: [usize; 4] = [64, 96, 128, 256];

/// A GPU architecture by its compute capability.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Architecture {
    /// Before the dot.
    pub major: u32,
    /// After the dot.
    pub minor: u32,
}

impl Architecture {
    /// Whether it has warp-group matrix instructions (Hopper alone).
    pub fn has_wgmma(self) -> bool {
        (self.major, self.minor) == (9, 0)
    }

    /// Whether it rounds to and multiplies 8-bit floats (Ada and later).
    pub fn has_e4m3(self) -> bool {
        (self.major, self.minor) >= (8, 9)
    }
}

/// The name that compilers use, such as `sm_90a`.
impl std::fmt::Display for Architecture {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let suffix = if self.has_wgmma() { "a" } else { "" };
        write!(f, "sm_{}{}{suffix}", self.major, self.minor)
    }
}

/// What a kernel is compiled for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Variant {
    /// Elements per head, one of [`HEAD_DIMS`].
    pub head_dim: usize,
    /// Type of q, k, v, output and cache.
    pub dtype: Dtype,
}

impl Variant {
    /// # Errors
    /// [`Error::Argument`] if the kernels are not written for it.
    pub(crate) fn check(self, op: &'static str) -> Result<()> {
        if !HEAD_DIMS.contains(&self.head_dim) {
            let expected = format_args!("one of {HEAD_DIMS:?}").to_string();
            return Err(Error::argument(op, "head_dim", expected, self.head_dim));
        }
        check_half(op, self.dtype)
    }
}

/// Checks that kernels compute with this type; f32 is for sums and logits.
///
/// # Errors
/// [`Error::Argument`] unless it is f16 or bf16.
pub(crate) fn check_half(op: &'static str, dtype: Dtype) -> Result<()> {
    match dtype {
        Dtype::F16 | Dtype::Bf16 => Ok(()),
        _ => Err(Error::argument(op, "dtype", "f16 or bf16", dtype)),
    }
}

/// Compiles a source to machine code (a cubin), or takes it from the cache on disk.
///
/// Needs NVRTC but no GPU, so that a cache can be filled elsewhere; where there is no NVRTC, any
/// version's code is taken from it. The cache is `MOA_CACHE_DIR`, or `moa/kernels` in
/// `XDG_CACHE_HOME` or `~/.cache`.
///
/// # Errors
/// [`Error::Argument`], [`Error::NoNvrtc`], [`Error::Compile`].
pub fn compile(source: Source, variant: Variant, architecture: Architecture) -> Result<Vec<u8>> {
    compile_anew(source, variant, architecture, false)
}

/// [`compile`], without what is stored where the driver refused that.
pub(crate) fn compile_anew(
    source: Source,
    variant: Variant,
    architecture: Architecture,
    was_refused: bool,
) -> Result<Vec<u8>> {
    variant.check("compile")?;
    let options = options(source, variant, architecture);
    let name = format!("{}-{}-{}-{architecture}", source.name(), variant.dtype, variant.head_dim);
    let key = cubin_cache::Key::new(&name, &key_parts(source, &options));
    if was_refused {
        key.forget();
    }
    let compiler = library::nvrtc().map(|()| version());
    if let Some(cubin) = key.load(compiler.as_ref().ok().copied()) {
        return Ok(cubin);
    }
    let compiler = compiler?;
    let cubin = run(source, &options).map_err(|log| Error::Compile {
        kernel: source.name(),
        architecture: architecture.to_string(),
        log,
    })?;
    key.store(compiler, &cubin);
    Ok(cubin)
}

fn options(source: Source, variant: Variant, architecture: Architecture) -> Vec<String> {
    let least = if source.is_narrow() { MIN_NARROW_SPLIT_KEYS } else { MIN_SPLIT_KEYS };
    vec![
        format!("--gpu-architecture={architecture}"),
        "--std=c++17".into(),
        "-default-device".into(),
        // For profilers and sanitizers; costs nothing at run time.
        "--generate-line-info".into(),
        "--extra-device-vectorization".into(),
        format!("-DHEAD_DIM={}", variant.head_dim),
        format!("-DMIN_SPLIT_KEYS={least}"),
        format!("-DSOFTCAP={}", u8::from(source.has_softcap())),
        match variant.dtype {
            Dtype::Bf16 => "-DDTYPE_BF16=1".into(),
            _ => "-DDTYPE_F16=1".into(),
        },
    ]
}

fn version() -> (u32, u32) {
    let (mut major, mut minor): (c_int, c_int) = (0, 0);
    // SAFETY: both point to integers.
    unsafe { sys::nvrtcVersion(&mut major, &mut minor) };
    (major.unsigned_abs(), minor.unsigned_abs())
}

/// Everything that the machine code depends on, but the compiler.
fn key_parts(source: Source, options: &[String]) -> Vec<String> {
    let headers = HEADERS.iter().flat_map(|(name, text)| [(*name).into(), (*text).into()]);
    std::iter::once(source.text().into()).chain(headers).chain(options.iter().cloned()).collect()
}

/// An NVRTC program, destroyed when it is dropped.
struct Program(sys::nvrtcProgram);

impl Drop for Program {
    fn drop(&mut self) {
        // SAFETY: it was created and is not used any more. There is nothing to do about a failure.
        unsafe { sys::nvrtcDestroyProgram(&mut self.0) };
    }
}

/// The cubin, or what NVRTC has to say.
fn run(source: Source, options: &[String]) -> std::result::Result<Vec<u8>, String> {
    let c_string = |text: &str| CString::new(text).map_err(|error| error.to_string());
    let text = c_string(source.text())?;
    let name = c_string(source.name())?;
    let headers =
        HEADERS.iter().map(|(_, text)| c_string(text)).collect::<Result<Vec<_>, String>>()?;
    let names =
        HEADERS.iter().map(|(name, _)| c_string(name)).collect::<Result<Vec<_>, String>>()?;
    let pointers = |strings: &[CString]| -> Vec<*const c_char> {
        strings.iter().map(|s| s.as_ptr()).collect()
    };
    let (header_pointers, name_pointers) = (pointers(&headers), pointers(&names));
    let failed = |call: &str, error: result::NvrtcError| format!("{call}: {error}");

    let mut program = Program(std::ptr::null_mut());
    // SAFETY: the strings and the arrays of pointers to them outlive the program.
    unsafe {
        sys::nvrtcCreateProgram(
            &mut program.0,
            text.as_ptr(),
            name.as_ptr(),
            HEADERS.len() as c_int,
            header_pointers.as_ptr(),
            name_pointers.as_ptr(),
        )
    }
    .result()
    .map_err(|error| failed("nvrtcCreateProgram", error))?;
    // SAFETY: the program was created above.
    if let Err(error) = unsafe { result::compile_program(program.0, options) } {
        return Err(log(&program).unwrap_or_else(|| failed("nvrtcCompileProgram", error)));
    }
    let mut size = 0;
    // SAFETY: the program was compiled to a real architecture; the buffer has the size it says.
    unsafe {
        sys::nvrtcGetCUBINSize(program.0, &mut size)
            .result()
            .map_err(|error| failed("nvrtcGetCUBINSize", error))?;
        let mut cubin = vec![0u8; size];
        sys::nvrtcGetCUBIN(program.0, cubin.as_mut_ptr().cast())
            .result()
            .map_err(|error| failed("nvrtcGetCUBIN", error))?;
        Ok(cubin)
    }
}

fn log(program: &Program) -> Option<String> {
    let mut size = 0;
    // SAFETY: the program was created; the buffer has the size it says.
    unsafe {
        sys::nvrtcGetProgramLogSize(program.0, &mut size).result().ok()?;
        let mut log = vec![0u8; size];
        sys::nvrtcGetProgramLog(program.0, log.as_mut_ptr().cast()).result().ok()?;
        let log = String::from_utf8_lossy(&log);
        Some(log.trim_end_matches('\0').trim().to_owned()).filter(|log| !log.is_empty())
    }
}
