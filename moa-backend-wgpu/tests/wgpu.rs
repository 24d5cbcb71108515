//! The WGPU backend against the conformance suite, and what is particular to it.
//!
//! Without a GPU trials are ignored; with `MOA_REQUIRE_WGPU=1` they fail then. A software Vulkan driver
//! is a GPU. Trials run one at a time: such a driver uses all cores itself.

mod gpu;

use std::process::ExitCode;
use std::sync::MutexGuard;

use half::{bf16, f16};
use moa_backend_wgpu::{Dtype, Error, MAX_HEAD_DIM, MatrixUnits, Tensor, WgpuBackend};
use moa_conformance::{Stop, Subject, Verdict, World, error, part, run, suite, trials};
use moa_core::{Append, ArgumentError, ExtendInputs, LayerLayout, Span, SparseAttentionBackend};

struct Wgpu {
    backend: WgpuBackend,
    /// Of tests of the kernel with matrix units.
    fragments: Option<MatrixUnits>,
    _alone: MutexGuard<'static, ()>,
}

fn main() -> ExitCode {
    let suites = [
        suite("f32_cache", || Wgpu::new(Dtype::F32)),
        // What 16-bit caches could get wrong: rounding, and reading both halves of a word.
        part("f16_cache", &F16_CACHE, || Wgpu::new(Dtype::F16)),
        // What differs from other kernels: products of matrices, and what is rounded for them.
        part("f16_matrix_units", &MATRIX_UNITS, || Wgpu::fragments(MatrixUnits::WhereOffered)),
        // The same kernel, so that it is tested without them.
        part("f16_matrix_units_emulated", &EMULATED, || Wgpu::fragments(MatrixUnits::Emulated)),
        // Differs from f16 in how a word is taken apart alone.
        part("bf16_cache", &BF16_CACHE, || Wgpu::new(Dtype::Bf16)),
        trials![
            decode_of_f32_equals_the_reference,
            decode_of_f16_equals_the_reference,
            decode_of_large_groups_equals_the_reference,
            decode_of_groups_of_three_equals_the_reference,
            decode_of_bf16_equals_the_reference,
            every_error_variant_says_what_came,
            reset_forgets_everything,
            decode_seconds_are_measured,
        ],
    ];
    run(suites.into_iter().flatten())
}

const F16_CACHE: [&str; 4] = [
    "trap_01_window_counts_the_query_itself",
    "trap_02_chunk_sees_keys_that_it_pushes_out",
    "trap_06_memory_is_as_small_as_the_spans",
    "trap_12_result_does_not_depend_on_the_batch",
];

const MATRIX_UNITS: [&str; 12] = [
    "output_equals_the_reference",
    "chunking_does_not_change_output",
    "batch_composition_does_not_change_output",
    "spare_capacity_does_not_change_output",
    "a_group_equals_repeated_heads",
    "truncate_then_extend_equals_never_having_extended",
    "fork_is_independent",
    "trap_01_window_counts_the_query_itself",
    "trap_02_chunk_sees_keys_that_it_pushes_out",
    "trap_04_speculative_rollback_of_a_wrapped_ring",
    "trap_07_length_equal_to_window",
    "trap_12_result_does_not_depend_on_the_batch",
];

const EMULATED: [&str; 4] = [
    "output_equals_the_reference",
    "chunking_does_not_change_output",
    "trap_01_window_counts_the_query_itself",
    "trap_02_chunk_sees_keys_that_it_pushes_out",
];

const BF16_CACHE: [&str; 9] = [
    "output_equals_the_reference",
    "chunking_does_not_change_output",
    "fork_is_independent",
    "truncate_then_extend_equals_never_having_extended",
    "trap_01_window_counts_the_query_itself",
    "trap_02_chunk_sees_keys_that_it_pushes_out",
    "trap_04_speculative_rollback_of_a_wrapped_ring",
    "trap_06_memory_is_as_small_as_the_spans",
    "trap_12_result_does_not_depend_on_the_batch",
];

impl Wgpu {
    fn new(dtype: Dtype) -> Result<Self, Stop> {
        let (device, alone) = gpu::device()?;
        let backend = WgpuBackend::new(&device, dtype).with_matrix_units(MatrixUnits::Unused);
        Ok(Self { backend, fragments: None, _alone: alone })
    }

    /// f16 caches with matrix units, if the device has them, or with the same kernel without.
    fn fragments(matrix_units: MatrixUnits) -> Result<Self, Stop> {
        let Self { backend, _alone, .. } = Self::new(Dtype::F16)?;
        let backend = backend.with_matrix_units(matrix_units);
        if !backend.has_matrix_units(64) {
            let name = backend.device().name();
            return Err(Stop::ignored(format_args!("{name} has no matrix units for f16")));
        }
        Ok(Self { backend, fragments: Some(matrix_units), _alone })
    }
}

impl Subject for Wgpu {
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
            Dtype::F16 => f16::from_f32(x).to_f32(),
            Dtype::Bf16 => bf16::from_f32(x).to_f32(),
            _ => x,
        }
    }

    // Few rows keep the bits of a query.
    fn round_tensor(&self, x: f32) -> f32 {
        if self.fragments.is_some() { f16::from_f32(x).to_f32() } else { x }
    }

    fn tolerance(&self) -> f64 {
        if self.fragments.is_some() { 1e-3 } else { 1e-4 }
    }

    fn same(&self) -> f64 {
        if self.fragments.is_some() { 2e-3 } else { 1e-5 }
    }

    fn dim(&self, wanted: usize) -> usize {
        if self.fragments.is_some() { 64 } else { wanted }
    }

    // Vectors of 1, 2 and 4 elements, and few of each: every size is a set of kernels to compile.
    fn dims(&self) -> &'static [usize] {
        match self.fragments {
            Some(MatrixUnits::Emulated) => return &[96],
            Some(_) => return &[64, 96, 128],
            None => {}
        }
        match self.backend.cache_dtype() {
            Dtype::F32 => &[7, 72],
            _ => &[10, 72],
        }
    }

    fn core_error<'e>(&self, error: &'e Error) -> Option<&'e moa_core::Error> {
        match error {
            Error::Core(error) => Some(error),
            _ => None,
        }
    }
}

/// Steps of one token at sizes of real models: several splits, rows of whole loads, both for f32 and for pairs.
/// Few, as each is a set of kernels to compile.
fn decode_equals_the_reference(dtype: Dtype, query_heads: usize, dim: usize) -> Verdict {
    let t = Wgpu::new(dtype)?;
    let world = World::new(query_heads, 2, dim, &[(0, 4000), (4, 300)], 303);
    let output = world.run(&t, &[300, 1, 1, 1]);
    let (out, lse) = world.reference(&t);
    let errors = [error(&output.out, &out), error(&output.lse, &lse)];
    assert!(errors.iter().all(|&e| e <= t.tolerance()), "{errors:?}");
    Ok(())
}

fn decode_of_f32_equals_the_reference() -> Verdict {
    decode_equals_the_reference(Dtype::F32, 8, 128)
}

fn decode_of_f16_equals_the_reference() -> Verdict {
    decode_equals_the_reference(Dtype::F16, 8, 128)
}

fn decode_of_large_groups_equals_the_reference() -> Verdict {
    decode_equals_the_reference(Dtype::F16, 16, 64)
}

/// No power of two: every unit of a row adds every score.
fn decode_of_groups_of_three_equals_the_reference() -> Verdict {
    decode_equals_the_reference(Dtype::F16, 6, 64)
}

fn decode_of_bf16_equals_the_reference() -> Verdict {
    decode_equals_the_reference(Dtype::Bf16, 2, 64)
}

fn every_error_variant_says_what_came() -> Verdict {
    let t = Wgpu::new(Dtype::Bf16)?;
    let backend = &t.backend;
    let layout = LayerLayout::new(&[Span::full(4)], 4, 0).unwrap();
    for head_dim in [0, MAX_HEAD_DIM + 2, 7] {
        let error = backend.open(&layout, head_dim).unwrap_err();
        assert!(
            matches!(error, Error::Argument(ArgumentError { argument: "head_dim", .. })),
            "{error}"
        );
    }
    let huge = LayerLayout::new(&[Span::full(1 << 29); 3], 1 << 29, 0).unwrap();
    assert!(matches!(backend.open(&huge, 256), Err(Error::TooLarge { .. })));
    let long = LayerLayout::new(&[Span::new(0, 5).unwrap()], 1 << 30, 0).unwrap();
    assert!(matches!(backend.open(&long, 8), Err(Error::Core(moa_core::Error::Invalid { .. }))));

    let mut cache = backend.open(&layout, 8).unwrap();
    let x = t.tensor(&[0.0; 40], &[5, 1, 8]);
    let inputs = ExtendInputs { q: &x, k: &x, v: &x, scale: 1.0, lse: false };
    let batch = &mut [Append { cache: &mut cache, tokens: 5 }];
    let error = backend.extend(batch, &inputs).unwrap_err();
    assert!(matches!(
        error,
        Error::Core(moa_core::Error::CapacityExceeded { len: 0, more: 5, capacity: 4 })
    ));
    let mut other = WgpuBackend::new(backend.device(), Dtype::F32).open(&layout, 8).unwrap();
    let x = t.tensor(&[0.0; 16], &[2, 1, 8]);
    let inputs = ExtendInputs { q: &x, k: &x, v: &x, scale: 1.0, lse: false };
    let batch = &mut [&mut cache, &mut other].map(|cache| Append { cache, tokens: 1 });
    let mixed = backend.extend(batch, &inputs);
    assert!(matches!(mixed, Err(Error::Argument(ArgumentError { argument: "cache dtype", .. }))));
    let none = backend.decode_seconds(0, 1, 8);
    assert!(matches!(none, Err(Error::Core(moa_core::Error::Invalid { .. }))));
    Ok(())
}

fn reset_forgets_everything() -> Verdict {
    let t = Wgpu::new(Dtype::F32)?;
    let world = World::new(2, 1, 8, &[(1, 4)], 20);
    let mut cache = world.open(&t, 20, 0);
    world.extend(&t, &mut cache, 0..20).unwrap();
    cache.reset();
    assert!(cache.as_ref().is_empty());
    assert!(world.run_in(&t, &mut cache, 0, &[15, 5]) == world.run(&t, &[15, 5]));
    Ok(())
}

fn decode_seconds_are_measured() -> Verdict {
    let t = Wgpu::new(Dtype::Bf16)?;
    let seconds = t.backend.decode_seconds(2048, 2, 64).unwrap();
    assert!(seconds > 0.0 && seconds < 1.0, "{seconds}");
    Ok(())
}
