//! The GPU that tests run on.

use std::sync::OnceLock;

use cudarc::driver::sys;
use half::{bf16, f16};
use moa_backend_cuda::{Cache, Device, Dtype};

/// The first device, or `None` with a loud word. One for all tests, as kernels are loaded per device.
pub(crate) fn device() -> Option<&'static Device> {
    static DEVICE: OnceLock<Option<Device>> = OnceLock::new();
    let device = DEVICE.get_or_init(|| match Device::open(0) {
        Ok(device) => {
            eprintln!("on {} ({})", device.name(), device.architecture());
            Some(device)
        }
        Err(error) => {
            let required = std::env::var_os("MOA_REQUIRE_GPU").is_some_and(|value| value == "1");
            assert!(!required, "MOA_REQUIRE_GPU is set, but: {error}");
            eprintln!("skipped: no CUDA device ({error})");
            None
        }
    });
    if device.is_none() {
        let thread = std::thread::current();
        eprintln!("skipped: {}: no CUDA device", thread.name().unwrap_or("test"));
    }
    device.as_ref()
}

/// A number as a tensor of this type holds it.
pub(crate) fn round(dtype: Dtype, x: f32) -> f32 {
    match dtype {
        Dtype::F16 => f16::from_f32(x).to_f32(),
        Dtype::Bf16 => bf16::from_f32(x).to_f32(),
        _ => x,
    }
}

/// Fills a cache with NaN, which no kernel may notice.
pub(crate) fn poison(cache: &Cache) {
    // SAFETY: the addresses are the cache's, which has this many 16-bit elements.
    unsafe {
        sys::cuCtxSynchronize().result().unwrap();
        // All bits of exponent and mantissa: NaN in f16 and in bf16.
        sys::cuMemsetD16_v2(cache.keys(), 0x7fff, cache.bytes() as usize / 2).result().unwrap();
        sys::cuCtxSynchronize().result().unwrap();
    }
}
