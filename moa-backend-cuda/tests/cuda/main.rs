//! The CUDA backend against the conformance suite, and what is particular to it.
//!
//! Without a GPU trials are ignored; with `MOA_REQUIRE_GPU=1` they fail then.

mod blocks;
mod e4m3;
#[path = "../gpu/mod.rs"]
mod gpu;
mod gradients;
mod graph;
mod hazards;
mod ops;
mod peers;
mod sample;
mod step;

use std::process::ExitCode;

use gpu::{device, round};
use moa_backend_cuda::{CudaBackend, Dtype, Error, HEAD_DIMS, Tensor};
use moa_conformance::{Stop, Subject, run, suite};

fn main() -> ExitCode {
    let suites = [
        suite("f16", || Cuda::new(Dtype::F16)),
        suite("bf16", || Cuda::new(Dtype::Bf16)),
        blocks::trials(),
        e4m3::trials(),
        gradients::trials(),
        graph::trials(),
        hazards::trials(),
        ops::trials(),
        peers::trials(),
        sample::trials(),
        step::trials(),
    ];
    run(suites.into_iter().flatten())
}

struct Cuda(CudaBackend);

impl Cuda {
    fn new(dtype: Dtype) -> Result<Self, Stop> {
        Ok(Self(CudaBackend::new(device()?, dtype)?))
    }
}

impl Subject for Cuda {
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
    fn core_error<'e>(&self, error: &'e Error) -> Option<&'e moa_core::Error> {
        match error {
            Error::Core(error) => Some(error),
            _ => None,
        }
    }
}
