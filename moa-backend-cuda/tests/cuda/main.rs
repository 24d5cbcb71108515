//! The CUDA backend against the conformance suite, and what is particular to it.
//!
//! Without a GPU each test says that it is skipped; with `MOA_REQUIRE_GPU=1` it fails then.

mod conformance;
#[path = "gpu/e4m3.rs"]
mod e4m3;
mod gpu;
#[path = "gpu/gradients.rs"]
mod gradients;
#[path = "gpu/graph.rs"]
mod graph;
#[path = "gpu/hazards.rs"]
mod hazards;
#[path = "gpu/ops.rs"]
mod ops;
#[path = "gpu/sample.rs"]
mod sample;
#[path = "gpu/step.rs"]
mod step;

use conformance::{TestBackend, conformance};
use gpu::{device, round};
use moa_backend_cuda::{CudaBackend, Dtype, HEAD_DIMS, Tensor};

struct Cuda(CudaBackend);

impl Cuda {
    fn new(dtype: Dtype) -> Option<Self> {
        device().map(|device| Self(CudaBackend::new(device, dtype).unwrap()))
    }
}

impl TestBackend for Cuda {
    type Backend = CudaBackend;
    type Tensor = Tensor;

    fn backend(&self) -> &CudaBackend {
        &self.0
    }

    fn tensor(&self, data: &[f32], shape: &[usize]) -> Tensor {
        Tensor::from_f32(self.0.device(), data, shape, self.0.dtype()).unwrap()
    }

    fn lse(&self, data: &[f32], shape: &[usize]) -> Tensor {
        Tensor::from_f32(self.0.device(), data, shape, Dtype::F32).unwrap()
    }

    fn host(&self, tensor: &Tensor) -> Vec<f32> {
        tensor.to_f32().unwrap()
    }

    fn round(&self, x: f32) -> f32 {
        round(self.0.dtype(), x)
    }

    fn round_tensor(&self, x: f32) -> f32 {
        round(self.0.dtype(), x)
    }

    fn dims(&self) -> &'static [usize] {
        &HEAD_DIMS
    }

    fn dim(&self, _wanted: usize) -> usize {
        64
    }

    fn tolerance(&self) -> f64 {
        match self.0.dtype() {
            Dtype::F16 => 1e-3,
            _ => 1e-2,
        }
    }

    // Each of the two ways is as far from the truth as it may.
    fn same(&self) -> f64 {
        2.0 * self.tolerance()
    }

    // `D = dO . O` is of an output that is rounded, and `A / (1 - A)` magnifies its error.
    fn influence_tolerance(&self) -> f64 {
        50.0 * self.tolerance()
    }

    fn influence_blocks(&self) -> &'static [usize] {
        &[320, 64, 128]
    }
}

conformance!(f16, Cuda::new(Dtype::F16));
conformance!(bf16, Cuda::new(Dtype::Bf16));
