//! The GPU that trials run on.

use std::sync::{Mutex, MutexGuard, PoisonError};

use moa_backend_wgpu::Device;
use moa_conformance::Stop;

/// The first device, for one trial at a time. Trials without it are ignored; with
/// `MOA_REQUIRE_WGPU=1` they fail.
pub(crate) fn device() -> Result<(Device, MutexGuard<'static, ()>), Stop> {
    static ALONE: Mutex<()> = Mutex::new(());
    let alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    match Device::open() {
        Ok(device) => Ok((device, alone)),
        Err(error) => Err(Stop::unless_required("MOA_REQUIRE_WGPU", error)),
    }
}
