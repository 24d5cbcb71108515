//! The GPU that tests run on.

use std::sync::OnceLock;

use half::{bf16, f16};
use moa_backend_cuda::{Device, Dtype};

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
        Dtype::F32 => x,
    }
}
