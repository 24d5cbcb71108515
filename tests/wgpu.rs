//! The WGPU backend against the conformance suite, and what is particular to it.
//!
//! Without a GPU each test says that it is skipped; with `MOA_REQUIRE_WGPU=1` it fails then. A
//! software Vulkan driver is a GPU. Tests run one at a time: such a driver uses all cores itself.

mod conformance;

use std::sync::{Mutex, MutexGuard, PoisonError};

use conformance::{TestBackend, conformance};
use half::{bf16, f16};
use moa_backend_wgpu::{CacheDtype, Device, Tensor, WgpuBackend};

struct Wgpu {
    backend: WgpuBackend,
    _alone: MutexGuard<'static, ()>,
}

impl Wgpu {
    fn new(dtype: CacheDtype) -> Option<Self> {
        static ALONE: Mutex<()> = Mutex::new(());
        let alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
        match Device::open() {
            Ok(device) => Some(Self { backend: WgpuBackend::new(&device, dtype), _alone: alone }),
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
        match self.backend.cache_dtype() {
            CacheDtype::F16 => f16::from_f32(x).to_f32(),
            CacheDtype::Bf16 => bf16::from_f32(x).to_f32(),
            _ => x,
        }
    }

    // Vectors of 1, 2 and 4 elements, and few of each: every size is a set of kernels to compile.
    fn dims(&self) -> &'static [usize] {
        match self.backend.cache_dtype() {
            CacheDtype::F32 => &[7, 64, 72],
            CacheDtype::F16 => &[72],
            _ => &[10, 72],
        }
    }
}

conformance!(f32_cache, Wgpu::new(CacheDtype::F32));

/// What 16-bit caches could get wrong: rounding, and reading both halves of a word.
macro_rules! sixteen_bits {
    ($name:ident, $dtype:expr) => {
        mod $name {
            use super::*;
            conformance!(@tests Wgpu::new($dtype); laws:
                output_equals_the_reference chunking_does_not_change_output fork_is_independent
                truncate_then_extend_equals_never_having_extended
            );
            conformance!(@tests Wgpu::new($dtype); traps:
                trap_01_window_counts_the_query_itself
                trap_02_chunk_sees_keys_that_it_pushes_out
                trap_04_speculative_rollback_of_a_wrapped_ring
                trap_06_memory_is_as_small_as_the_spans
                trap_12_result_does_not_depend_on_the_batch
            );
        }
    };
}

sixteen_bits!(f16_cache, CacheDtype::F16);
sixteen_bits!(bf16_cache, CacheDtype::Bf16);
