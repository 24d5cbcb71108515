//! The GPU that trials run on.

use std::sync::{Mutex, MutexGuard, PoisonError};

use moa_backend_wgpu::Device;
use moa_conformance::Stop;

/// The first device, for one trial at a time. Trials without it are ignored; with
/// `MOA_REQUIRE_WGPU=1` they fail.
pub(crate) fn device() -> Result<(Device, Alone), Stop> {
    static ALONE: Mutex<()> = Mutex::new(());
    let lock = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    match Device::open() {
        Ok(device) => Ok((device.clone(), Alone { device, _lock: lock })),
        Err(error) => Err(Stop::unless_required("MOA_REQUIRE_WGPU", error)),
    }
}

/// No other trial has the device, nor does the process end, before what this one queued is done: Mesa's drivers corrupt the
/// heap where their threads are ended while another thread calls them.
pub(crate) struct Alone {
    device: Device,
    _lock: MutexGuard<'static, ()>,
}

impl Drop for Alone {
    fn drop(&mut self) {
        let _ = self.device.synchronize();
    }
}
