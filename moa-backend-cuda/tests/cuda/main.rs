//! The CUDA backend against the conformance suite, and what is particular to it.
//!
//! Without a GPU trials are ignored; with `MOA_REQUIRE_GPU=1` they fail then.

mod blocks;
mod e4m3;
mod e4m3_rows;
#[path = "../gpu/mod.rs"]
mod gpu;
mod gradients;
mod graph;
mod hazards;
mod narrow;
mod ops;
mod peers;
mod sample;
mod step;

use std::process::ExitCode;

use gpu::{device, round};
use moa_backend_cuda::{CudaBackend, Dtype, Error, HEAD_DIMS, Tensor};
use moa_conformance::{Stop, Subject, part, run, suite};
use moa_core::{CacheType, RowType};

fn main() -> ExitCode {
    let suites = [
        suite("f16", || Cuda::new(Dtype::F16)),
        suite("bf16", || Cuda::new(Dtype::Bf16)),
        // What rounds, reads and writes differs from 16-bit caches, and which kernels run.
        part("int8", &NARROW, || Cuda::of_type(Dtype::Bf16, CacheType::Int8)),
        part("fp8", &NARROW, || Cuda::of_type(Dtype::F16, CacheType::Fp8)),
        part("k8v4", &NARROW, || Cuda::of_type(Dtype::Bf16, CacheType::K8V4)),
        part("int4", &NARROW, || Cuda::of_type(Dtype::F16, CacheType::Int4)),
        blocks::trials(),
        e4m3::trials(),
        e4m3_rows::trials(),
        gradients::trials(),
        graph::trials(),
        hazards::trials(),
        narrow::trials(),
        ops::trials(),
        peers::trials(),
        sample::trials(),
        step::trials(),
    ];
    run(suites.into_iter().flatten())
}

const NARROW: [&str; 15] = [
    "output_equals_the_reference",
    "chunking_does_not_change_output",
    "batch_composition_does_not_change_output",
    "spare_capacity_does_not_change_output",
    "a_group_equals_repeated_heads",
    "truncate_then_extend_equals_never_having_extended",
    "fork_is_independent",
    "failed_call_leaves_state_unchanged",
    "truncate_to_nothing_equals_a_new_cache",
    "trap_02_chunk_sees_keys_that_it_pushes_out",
    "trap_03_prefix_reuse_of_a_wrapped_ring",
    "trap_04_speculative_rollback_of_a_wrapped_ring",
    "trap_06_memory_is_as_small_as_the_spans",
    "trap_11_every_row_of_a_batch_has_its_own_length",
    "trap_12_result_does_not_depend_on_the_batch",
];

struct Cuda(CudaBackend);

impl Cuda {
    fn new(dtype: Dtype) -> Result<Self, Stop> {
        Ok(Self(CudaBackend::new(device()?, dtype)?))
    }

    /// With caches of this type.
    fn of_type(dtype: Dtype, own: CacheType) -> Result<Self, Stop> {
        Ok(Self(CudaBackend::new(device()?, dtype)?.with_cache_type(own)?))
    }

    /// A row of tensors as caches hold it.
    fn stored(&self, own: RowType, row: &[f32]) -> Vec<f64> {
        own.round(&row.iter().map(|&x| self.round_tensor(x)).collect::<Vec<_>>())
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

    fn round_key(&self, row: &[f32]) -> Vec<f64> {
        self.stored(self.0.cache_type().keys(), row)
    }

    fn round_value(&self, row: &[f32]) -> Vec<f64> {
        self.stored(self.0.cache_type().values(), row)
    }

    fn cache_types(&self) -> &'static [CacheType] {
        &[CacheType::Int8, CacheType::Fp8, CacheType::K8V4, CacheType::Int4]
    }

    fn round_tensor(&self, x: f32) -> f32 {
        round(self.0.dtype(), x)
    }

    // What comes out is a sum of rounded weights, so next to the number that is nearest.
    fn output_rounding(&self) -> f64 {
        match self.0.dtype() {
            Dtype::F16 => 1.0 / 1024.0,
            _ => 1.0 / 128.0,
        }
    }

    fn dims(&self) -> &'static [usize] {
        &HEAD_DIMS
    }

    fn dim(&self, _wanted: usize) -> usize {
        64
    }

    fn tolerance(&self) -> f64 {
        let of_type = match self.0.dtype() {
            Dtype::F16 => 1e-3,
            _ => 1e-2,
        };
        // Copies of narrow heads are rounded to 16 bits.
        if self.0.cache_type().dtype().is_none() { 2.0 * of_type } else { of_type }
    }

    fn typed_tolerance(&self) -> Option<f64> {
        Some(if self.0.dtype() == Dtype::F16 { 2e-3 } else { 2e-2 })
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
