//! The GPU that trials run on.

use std::sync::OnceLock;

use cudarc::driver::sys;
use half::{bf16, f16};
use moa_backend_cuda::{Cache, Device, Dtype};
use moa_conformance::Stop;

/// The first device, one for all trials, as kernels are loaded per device. Trials without it are
/// ignored; with `MOA_REQUIRE_GPU=1` they fail.
pub(crate) fn device() -> Result<&'static Device, Stop> {
    static DEVICE: OnceLock<Result<Device, String>> = OnceLock::new();
    let open = || {
        let device = Device::open(0).map_err(|error| error.to_string())?;
        eprintln!("on {} ({})", device.name(), device.architecture());
        Ok(device)
    };
    let device = DEVICE.get_or_init(open).as_ref();
    device.map_err(|error| {
        Stop::unless_required("MOA_REQUIRE_GPU", format_args!("no CUDA device ({error})"))
    })
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
