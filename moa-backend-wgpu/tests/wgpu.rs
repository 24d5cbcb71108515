//! The WGPU backend against the conformance suite, and what is particular to it.
//!
//! Without a GPU trials are ignored; with `MOA_REQUIRE_WGPU=1` they fail then. A software Vulkan driver
//! is a GPU. Trials run one at a time: such a driver uses all cores itself.

mod gpu;
#[path = "gpu/lost.rs"]
mod lost;

use std::process::ExitCode;

use half::{bf16, f16};
use lost::{a_device_that_takes_no_spirv_is_refused, a_lost_device_is_an_error};
use moa_backend_wgpu::{Device, Dtype, Error, MAX_HEAD_DIM, MatrixUnits, Tensor, WgpuBackend};
use moa_conformance::{
    Entry, Stop, Subject, Verdict, World, batch, close, error, part, run, suite, trials,
};
use moa_core::{
    Append, ArgumentError, CacheType, ExtendInputs, LayerLayout, RowType, Span,
    SparseAttentionBackend,
};

struct Wgpu {
    backend: WgpuBackend,
    /// Of tests of the kernel with matrix units.
    fragments: Option<MatrixUnits>,
    _alone: gpu::Alone,
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
        // Codes with scales: all that differs is how rows are rounded, read and written.
        part("int8_cache", &NARROW, || Wgpu::new(CacheType::Int8)),
        part("int4_cache", &FEEDBACK, || Wgpu::new(CacheType::Int4)),
        trials![
            decode_of_f32_equals_the_reference,
            decode_of_f16_equals_the_reference,
            decode_of_large_groups_equals_the_reference,
            decode_of_groups_of_three_equals_the_reference,
            decode_of_bf16_equals_the_reference,
            decode_of_int8_equals_the_reference,
            emulated_matrix_units_take_softcaps_and_sinks,
            heads_of_every_narrow_type_equal_the_reference,
            every_error_variant_says_what_came,
            reset_forgets_everything,
            decode_seconds_are_measured,
            a_device_is_opened_once,
            a_device_that_takes_no_spirv_is_refused,
            a_lost_device_is_an_error,
        ],
    ];
    let mut trials: Vec<_> = suites.into_iter().flatten().collect();
    for name in ON_HARDWARE {
        let found = trials.iter().position(|trial| trial.name() == name);
        let at = found.unwrap_or_else(|| panic!("there is no trial {name:?}"));
        let trial = trials.remove(at);
        trials.insert(at, gpu::on_hardware(trial));
    }
    run(trials)
}

/// What other trials show nearly as well on a software driver: softcaps and sinks apart from each other, gradients beside values that
/// are no numbers (influence beside them stays), such values in caches of other types than f32 and bf16, and chunks and batches
/// of caches in 16 bits.
const ON_HARDWARE: [&str; 10] = [
    "f32_cache::softcap_equals_the_reference",
    "f32_cache::sinks_equal_the_reference",
    "f32_cache::hidden_pairs_have_no_gradients",
    "f16_cache::trap_12_result_does_not_depend_on_the_batch",
    "f16_cache::rows_that_hold_no_numbers_reach_no_query_that_does_not_see_them",
    "f16_matrix_units_emulated::chunking_does_not_change_output",
    "f16_matrix_units_emulated::rows_that_hold_no_numbers_reach_no_query_that_does_not_see_them",
    "bf16_cache::chunking_does_not_change_output",
    "bf16_cache::trap_12_result_does_not_depend_on_the_batch",
    "int8_cache::rows_that_hold_no_numbers_reach_no_query_that_does_not_see_them",
];

const F16_CACHE: [&str; 5] = [
    "trap_01_window_counts_the_query_itself",
    "trap_02_chunk_sees_keys_that_it_pushes_out",
    "trap_06_memory_is_as_small_as_the_spans",
    "trap_12_result_does_not_depend_on_the_batch",
    "rows_that_hold_no_numbers_reach_no_query_that_does_not_see_them",
];

const MATRIX_UNITS: [&str; 14] = [
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
    "rows_that_hold_no_numbers_reach_no_query_that_does_not_see_them",
    "softcap_and_sinks_equal_the_reference",
];

const EMULATED: [&str; 5] = [
    "output_equals_the_reference",
    "chunking_does_not_change_output",
    "trap_01_window_counts_the_query_itself",
    "trap_02_chunk_sees_keys_that_it_pushes_out",
    "rows_that_hold_no_numbers_reach_no_query_that_does_not_see_them",
];

const NARROW: [&str; 8] = [
    "output_equals_the_reference",
    "truncate_then_extend_equals_never_having_extended",
    "rounding_is_within_its_bound",
    "trap_01_window_counts_the_query_itself",
    "trap_02_chunk_sees_keys_that_it_pushes_out",
    "trap_06_memory_is_as_small_as_the_spans",
    "types_that_are_lacked_are_refused",
    "rows_that_hold_no_numbers_reach_no_query_that_does_not_see_them",
];

const FEEDBACK: [&str; 1] = ["keys_with_feedback_equal_the_reference"];

const BF16_CACHE: [&str; 10] = [
    "output_equals_the_reference",
    "chunking_does_not_change_output",
    "fork_is_independent",
    "truncate_then_extend_equals_never_having_extended",
    "trap_01_window_counts_the_query_itself",
    "trap_02_chunk_sees_keys_that_it_pushes_out",
    "trap_04_speculative_rollback_of_a_wrapped_ring",
    "trap_06_memory_is_as_small_as_the_spans",
    "trap_12_result_does_not_depend_on_the_batch",
    "rows_that_hold_no_numbers_reach_no_query_that_does_not_see_them",
];

impl Wgpu {
    fn new(cache_type: impl Into<CacheType>) -> Result<Self, Stop> {
        let (device, alone) = gpu::device()?;
        let backend = WgpuBackend::new(&device, cache_type).with_matrix_units(MatrixUnits::Unused);
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

/// The types of 16 bits by another implementation than the specification's.
fn round(own: CacheType, rows: RowType, row: &[f32]) -> Vec<f64> {
    match own {
        CacheType::F16 => row.iter().map(|x| f16::from_f32(*x).to_f64()).collect(),
        CacheType::Bf16 => row.iter().map(|x| bf16::from_f32(*x).to_f64()).collect(),
        _ => rows.round(row),
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

    fn round_key(&self, row: &[f32]) -> Vec<f64> {
        round(self.backend.cache_type(), self.backend.cache_type().keys(), row)
    }

    fn round_value(&self, row: &[f32]) -> Vec<f64> {
        round(self.backend.cache_type(), self.backend.cache_type().values(), row)
    }

    /// Asked of one suite alone.
    fn cache_types(&self) -> &'static [CacheType] {
        if self.backend.cache_type().dtype().is_none() { &NARROW_TYPES } else { &[] }
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
        match self.backend.cache_type() {
            CacheType::F32 => &[7, 72],
            CacheType::F16 | CacheType::Bf16 => &[10, 72],
            // In decode rows of whole loads alone: a word for each unit, and a unit that has none.
            CacheType::Int8 | CacheType::Fp8 => &[20, 72],
            _ => &[24, 72],
        }
    }

    fn core_error<'e>(&self, error: &'e Error) -> Option<&'e moa_core::Error> {
        match error {
            Error::Core(error) => Some(error),
            _ => None,
        }
    }
}

const NARROW_TYPES: [CacheType; 4] =
    [CacheType::Int8, CacheType::Fp8, CacheType::K8V4, CacheType::Int4];

/// Steps of one token at sizes of real models: several splits, rows of whole loads, both for f32 and for pairs.
/// Few, as each is a set of kernels to compile.
fn decode_equals_the_reference(
    cache_type: impl Into<CacheType>,
    query_heads: usize,
    dim: usize,
) -> Verdict {
    let t = Wgpu::new(cache_type)?;
    let world = World::new(query_heads, 2, dim, &[(0, 4000), (4, 300)], 303);
    let output = world.run(&t, &[300, 1, 1, 1]);
    let (out, lse) = world.reference(&t);
    let errors = [error(&output.out, &out), error(&output.lse, &lse)];
    assert!(errors.iter().all(|&e| e <= t.tolerance()), "{errors:?}");
    Ok(())
}

/// CubeCL would make, and destroy, a device for every further call.
fn a_device_is_opened_once() -> Verdict {
    let (device, _alone) = gpu::device()?;
    assert!(Device::open().unwrap() == device);
    assert!(Device::open_nth(0).unwrap() == Device::open_nth(0).unwrap());
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

fn decode_of_int8_equals_the_reference() -> Verdict {
    decode_equals_the_reference(CacheType::Int8, 8, 128)
}

/// One world of the suite's trial, which takes half a minute of kernels here.
fn emulated_matrix_units_take_softcaps_and_sinks() -> Verdict {
    let t = Wgpu::fragments(MatrixUnits::Emulated)?;
    let world = World::new(4, 2, 96, &[(0, 4000), (4, 30)], 70);
    let world = World { softcap: Some(2.0), has_sinks: true, ..world };
    let output = world.run(&t, &[40, 30]);
    let (out, lse) = world.reference(&t);
    let errors = [error(&output.out, &out), error(&output.lse, &lse)];
    assert!(errors.iter().all(|&e| e <= t.tolerance()), "{errors:?}");
    Ok(())
}

/// One layer with a head of each type, in several chunks, after a rollback, in a fork, and in a batch beside a layer
/// whose heads have other types. The steps of one token take decode, the others do not.
fn heads_of_every_narrow_type_equal_the_reference() -> Verdict {
    let t = Wgpu::new(CacheType::Bf16)?;
    let types: Vec<_> = NARROW_TYPES.into_iter().map(Some).chain([None]).collect();
    let spans = [(0, 4000), (4, 41), (0, 300), (3, 60), (0, 4000)];
    let world = World { types, ..World::new(10, 5, 72, &spans, 330) };
    let chunks = [290, 1, 1, 3, 1, 33, 1];
    let output = world.run(&t, &chunks);
    let (out, lse) = world.reference(&t);
    let errors = [error(&output.out, &out), error(&output.lse, &lse)];
    assert!(errors.iter().all(|&e| e <= t.tolerance()), "{errors:?}");
    close(&world.run(&t, &[330]).out, &output.out, t.same());

    let mut types = world.types.clone();
    types.rotate_left(2);
    let other = World { types, seed: 9, ..world.clone() };
    let drafted = World { seed: 7, ..world.clone() };
    let mut original = world.open(&t, 330, 40);
    world.run_in(&t, &mut original, 0, &chunks[..3]);
    drafted.extend(&t, &mut original, 292..320).unwrap();
    t.backend.truncate(&mut original, 292).unwrap();
    let forks = [0; 2].map(|_| t.backend.fork(&original).unwrap());
    drop(original);
    let [mut fork, mut alone] = forks;
    for range in [292..293, 293..296] {
        let alone = world.extend(&t, &mut alone, range.clone()).unwrap();
        let mut beside = other.open(&t, 330, 0);
        let mut entries = [
            Entry { world: &world, cache: &mut fork, range: range.clone() },
            Entry { world: &other, cache: &mut beside, range: 0..1 },
        ];
        let together = batch(&t, &mut entries).unwrap();
        assert!(together[0] == alone, "the batch changes a bit");
        let row = world.heads.query * world.heads.dim;
        let expected = &output.out[range.start * row..range.end * row];
        close(&alone.out, expected, t.same());
    }
    Ok(())
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
    let inputs = ExtendInputs::new(&x, &x, &x, 1.0);
    let batch = &mut [Append { cache: &mut cache, tokens: 5 }];
    let error = backend.extend(batch, &inputs).unwrap_err();
    assert!(matches!(
        error,
        Error::Core(moa_core::Error::CapacityExceeded { len: 0, more: 5, capacity: 4 })
    ));
    for (own, head_dim) in [(CacheType::Int8, 6), (CacheType::K8V4, 12), (CacheType::Int4, 12)] {
        let typed = layout.clone().with_cache_types(&[Some(own)]).unwrap();
        let error = backend.open(&typed, head_dim).unwrap_err();
        assert!(error.to_string().contains(own.name()), "{error}");
    }
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
