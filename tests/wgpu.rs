//! The WGPU backend against the conformance suite, and what is particular to it.
//!
//! Without a GPU each test says that it is skipped; with `MOA_REQUIRE_WGPU=1` it fails then. A
//! software Vulkan driver is a GPU. Tests run one at a time: such a driver uses all cores itself.

mod conformance;

use std::sync::{Mutex, MutexGuard, PoisonError};

use conformance::{TestBackend, conformance};
use moa_backend_wgpu::{Device, Tensor, WgpuBackend};

struct Wgpu {
    backend: WgpuBackend,
    _alone: MutexGuard<'static, ()>,
}

impl Wgpu {
    fn new() -> Option<Self> {
        static ALONE: Mutex<()> = Mutex::new(());
        let alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
        match Device::open() {
            Ok(device) => Some(Self { backend: WgpuBackend::new(&device), _alone: alone }),
            Err(error) if std::env::var_os("MOA_REQUIRE_WGPU").is_some_and(|v| v == "1") => {
                panic!("MOA_REQUIRE_WGPU is set: {error}")
            }
            Err(error) => {
                eprintln!("SKIPPED: {error}");
                None
            }
        }
    }
}

impl TestBackend for Wgpu {
    type Backend = WgpuBackend;
    type Tensor = Tensor;

    fn backend(&self) -> &WgpuBackend {
        &self.backend
    }

    fn tensor(&self, data: &[f32], shape: &[usize]) -> Tensor {
        Tensor::new(self.backend.device(), data, shape).unwrap()
    }

    fn host(&self, tensor: &Tensor) -> Vec<f32> {
        tensor.to_vec().unwrap()
    }

    fn round(&self, x: f32) -> f32 {
        x
    }
}

conformance!(f32_cache, Wgpu::new());
