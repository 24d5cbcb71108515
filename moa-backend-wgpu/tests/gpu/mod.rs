//! The GPU that trials run on.

use std::sync::{Mutex, MutexGuard, PoisonError};

use moa_backend_wgpu::Device;
use moa_conformance::{Stop, Trial};

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

/// A trial that shows on a software driver little that others have not, and has it compile kernels for 20 to 90 seconds:
/// it is ignored there, unless `MOA_WGPU_WHOLE` is `1`.
#[allow(dead_code, reason = "only some of the tests have such trials")]
pub(crate) fn on_hardware(trial: Trial) -> Trial {
    Trial::new(trial.name().to_string(), move || {
        let is_whole = std::env::var_os("MOA_WGPU_WHOLE").is_some_and(|value| value == "1");
        let (device, alone) = device()?;
        if device.client().properties().identity.physical.is_none() && !is_whole {
            return Err(Stop::ignored("a software driver takes long for it (MOA_WGPU_WHOLE=1)"));
        }
        drop(alone);
        trial.check()
    })
}
