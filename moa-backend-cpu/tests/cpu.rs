//! The CPU backend against the conformance suite, and what is particular to it.

use std::process::ExitCode;

use half::{bf16, f16};
use moa_backend_cpu::ops::{WeightData, WeightRef, linear};
use moa_backend_cpu::{Cache, CpuBackend, Error, Tensor};
use moa_conformance::{
    BlockProducts, Stop, Subject, Verdict, World, block_products, normal, part, run, suite, trials,
};
use moa_core::{
    Append, BlockType, CacheType, Dtype, ExtendInputs, InfluenceInputs, InfluenceSign, LayerLayout,
    RowType, Span, SparseAttentionBackend,
};

/// What could differ between types that share their code with the others.
const FEW: [&str; 4] = [
    "output_equals_the_reference",
    "chunking_does_not_change_output",
    "batch_composition_does_not_change_output",
    "trap_02_chunk_sees_keys_that_it_pushes_out",
];

fn main() -> ExitCode {
    let suites = [
        suite("f32_cache", || Ok(Cpu::new(Dtype::F32))),
        suite("f16_cache", || Ok(Cpu::new(Dtype::F16))),
        suite("bf16_cache", || Ok(Cpu::new(Dtype::Bf16))),
        suite("bf16_products", || Ok(Cpu::narrow())),
        suite("int8_cache", || Ok(Cpu::new(CacheType::Int8))),
        part("fp8_cache", &FEW, || Ok(Cpu::new(CacheType::Fp8))),
        part("k8v4_cache", &FEW, || Ok(Cpu::new(CacheType::K8V4))),
        suite("int4_cache", || Ok(Cpu::new(CacheType::Int4))),
        block_products("blocks", || Ok(OfBlocks { narrow: false })),
        block_products("narrow_blocks", || Ok(OfBlocks { narrow: true })),
        trials![
            number_of_threads_does_not_change_output,
            number_of_threads_does_not_change_influence,
            the_cut_changes_no_bit_within_a_kernel,
            a_product_of_few_or_many_rows_has_the_bits_of_each,
            trap_09_offsets_beyond_2_to_the_31_elements,
            every_error_variant_says_what_came,
            influence_refuses_wrong_shapes,
            decode_seconds_are_measured,
            reset_forgets_everything,
        ],
    ];
    run(suites.into_iter().flatten())
}

struct OfBlocks {
    narrow: bool,
}

impl BlockProducts for OfBlocks {
    fn product(
        &self,
        kind: BlockType,
        blocks: &[u8],
        [n, k]: [usize; 2],
        x: &[f32],
    ) -> Option<Vec<f32>> {
        let weight = WeightRef::new(WeightData::Blocks(kind, blocks), n, k).unwrap();
        let weight = weight.narrow_activations(self.narrow);
        let x = Tensor::new(x.to_vec(), &[x.len() / k, k]).unwrap();
        Some(linear(&x, weight, None).unwrap().into_data())
    }

    /// A model's embedding is widened, which is the specification.
    fn rows(
        &self,
        kind: BlockType,
        blocks: &[u8],
        [_, k]: [usize; 2],
        rows: &[u32],
    ) -> Option<Vec<f32>> {
        let mut all = vec![0.0; rows.len() * k];
        for (row, to) in rows.iter().zip(all.chunks_mut(k)) {
            kind.widen(blocks, *row as usize * k, to);
        }
        Some(all)
    }

    /// A code of 15 bits is half a step from its activation, which is 1/16256 of the largest of 32. Where both are rounded
    /// to bf16 a term is off by 2^-9 of itself twice; what sums of f32 and the product of both errors add is the rest.
    fn share(&self, rows: usize) -> f64 {
        if self.narrow && rows >= moa_backend_cpu::MANY_ROWS { 2f64.powi(-8) + 1e-5 } else { 1e-4 }
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

/// Queries of few tokens are rounded to 16 bits where keys are codes of whole numbers, and those of many are not: scores
/// differ by 2^-16 of the product of their lengths, of which the cases have up to 16 after scaling.
const WHOLE_QUERIES: f64 = 2.5e-4;

/// Chunks that round queries and weights to bf16 differ by that from what one to a few tokens give, who round nothing.
const PAIRS: f64 = 1e-2;

/// A backend, and whether its products may be of bf16.
#[derive(Clone, Copy)]
struct Cpu(CpuBackend, bool);

impl Cpu {
    fn new(cache: impl Into<CacheType>) -> Self {
        Self(CpuBackend::new(cache), false)
    }

    fn narrow() -> Self {
        Self(CpuBackend::new(Dtype::Bf16).narrow_products(true), true)
    }
}

impl Subject for Cpu {
    type Backend = CpuBackend;
    type Tensor = Tensor;

    fn backend(&self) -> &CpuBackend {
        &self.0
    }

    fn tensor(&self, data: &[f32], shape: &[usize]) -> Tensor {
        Tensor::new(data.to_vec(), shape).unwrap()
    }

    fn host(&self, tensor: &Tensor) -> Vec<f32> {
        tensor.data().to_vec()
    }

    fn round_key(&self, row: &[f32]) -> Vec<f64> {
        round(self.0.cache_type(), self.0.cache_type().keys(), row)
    }

    fn round_value(&self, row: &[f32]) -> Vec<f64> {
        round(self.0.cache_type(), self.0.cache_type().values(), row)
    }

    fn cache_types(&self) -> &'static [CacheType] {
        &CacheType::ALL
    }

    fn tolerance(&self) -> f64 {
        match self.0.cache_type().keys().rotates() {
            _ if self.1 => PAIRS,
            true => WHOLE_QUERIES,
            false => 1e-5,
        }
    }

    fn same(&self) -> f64 {
        self.tolerance()
    }

    fn typed_tolerance(&self) -> Option<f64> {
        Some(if self.1 { PAIRS } else { WHOLE_QUERIES })
    }

    fn core_error<'e>(&self, error: &'e Error) -> Option<&'e moa_core::Error> {
        match error {
            Error::Core(error) => Some(error),
            _ => None,
        }
    }
}

fn number_of_threads_does_not_change_output() {
    for cpu in [Cpu::new(Dtype::Bf16), Cpu::narrow()] {
        let types = vec![Some(CacheType::Int4), None];
        let world = World { types, ..World::new(4, 2, 32, &[(0, 4000), (4, 300)], 1300) };
        let run = |threads: usize| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| world.run(&cpu, &[1200, 1, 1, 2, 96]))
        };
        let one = run(1);
        assert!(one == run(2) && one == run(5), "bitwise different");
    }
}

/// Rings that wrap, heads that see all, groups, head dimensions that are no whole vectors, spans that begin at odd
/// positions.
fn the_cut_changes_no_bit_within_a_kernel() {
    let both = [[(0, 4000), (4, 150)], [(3, 41), (1, 130)]];
    let backends = || Dtype::ALL.map(Cpu::new).into_iter().chain([Cpu::narrow()]);
    for (cpu, spans) in backends().flat_map(|cpu| both.map(|spans| (cpu, spans))) {
        for (query_heads, dim) in [(4, 32), (6, 20), (2, 7)] {
            let world = World::new(query_heads, 2, dim, &spans, 900);
            let whole = world.run(&cpu, &[850]);
            for cut in [&[16, 834][..], &[300, 17, 533], &[128, 128, 594], &[801, 16, 33]] {
                assert!(world.run(&cpu, cut) == whole, "{:?} {spans:?} {cut:?}", cpu.0);
            }
            let one_by_one = [&[600][..], &[1; 60]].concat();
            let one_by_one = world.run(&cpu, &one_by_one);
            for drafts in 2..=moa_backend_cpu::FEW_ROWS {
                let mut cut = vec![600];
                cut.extend(std::iter::repeat_n(drafts, 60 / drafts));
                cut.extend(std::iter::repeat_n(1, 60 % drafts));
                assert!(world.run(&cpu, &cut) == one_by_one, "{:?} {spans:?} {drafts}", cpu.0);
            }
        }
    }
}

fn a_product_of_few_or_many_rows_has_the_bits_of_each() {
    let (n, k) = (70, 512);
    let w = normal(n * k, 3);
    let half: Vec<bf16> = w.iter().map(|w| bf16::from_f32(*w)).collect();
    let halves: Vec<f16> = w.iter().map(|w| f16::from_f32(*w)).collect();
    let blocks = [BlockType::Q8_0, BlockType::Q4_0, BlockType::Q4K, BlockType::Q6K].map(|kind| {
        let mut bytes = Vec::new();
        kind.narrow(&w, &mut bytes);
        (kind, bytes)
    });
    let mut weights = vec![(WeightData::F32(&w), false)];
    // Where the machine does not multiply pairs of bf16, both are the same.
    weights.extend([false, true].map(|narrow| (WeightData::Bf16(&half), narrow)));
    weights.push((WeightData::F16(&halves), true));
    for narrow in [false, true] {
        let blocks = blocks.iter().map(|(kind, bytes)| WeightData::Blocks(*kind, bytes));
        weights.extend(blocks.map(|data| (data, narrow)));
    }
    let x = normal(200 * k, 4);
    for (data, narrow) in weights {
        let product = |rows: std::ops::Range<usize>| {
            let x =
                Tensor::new(x[rows.start * k..rows.end * k].to_vec(), &[rows.len(), k]).unwrap();
            let weight = WeightRef::new(data, n, k).unwrap().narrow_activations(narrow);
            linear(&x, weight, None).unwrap().into_data()
        };
        let few = moa_backend_cpu::FEW_ROWS;
        let each: Vec<f32> = (0..few).flat_map(|row| product(row..row + 1)).collect();
        for rows in 2..=few {
            assert!(product(0..rows) == each[..rows * n], "{rows} rows of {}", name(data));
        }
        let all = product(0..200);
        for rows in [0..16, 16..32, 3..27, 100..163, 150..200] {
            let of = rows.start * n..rows.end * n;
            assert!(product(rows.clone()) == all[of], "rows {rows:?} of {}", name(data));
        }
    }
}

fn name(data: WeightData<'_>) -> String {
    match data {
        WeightData::F32(_) => "f32".into(),
        WeightData::F16(_) => "f16".into(),
        WeightData::Bf16(_) => "bf16".into(),
        WeightData::Blocks(kind, _) => format!("{kind:?}"),
    }
}

fn number_of_threads_does_not_change_influence() {
    let pools = [1, 3].map(|n| rayon::ThreadPoolBuilder::new().num_threads(n).build().unwrap());
    let tensor = |heads, seed| {
        let data = normal(400 * heads * 32, seed);
        Tensor::new(data, &[400, heads, 32]).unwrap()
    };
    let (q, k, v, out, d_out) =
        (tensor(4, 1), tensor(2, 2), tensor(2, 3), tensor(4, 4), tensor(4, 5));
    let lse = Tensor::new(vec![6.0; 1600], &[400, 4]).unwrap();
    let inputs = InfluenceInputs {
        q: &q,
        k: &k,
        v: &v,
        out: &out,
        lse: &lse,
        d_out: &d_out,
        window: usize::MAX,
        block: 64,
        sign: InfluenceSign::Signed,
        gradients: true,
    };
    let [one, three] =
        pools.map(|pool| pool.install(|| CpuBackend::default().influence(&inputs, 0.2).unwrap()));
    assert_eq!(one.blocks, three.blocks);
    let (one, three) = (one.gradients.unwrap(), three.gradients.unwrap());
    assert_eq!((one.d_q, one.d_k, one.d_v), (three.d_q, three.d_k, three.d_v));
}

// 9. Integer overflow past 2^31 elements: the second head starts there.
fn trap_09_offsets_beyond_2_to_the_31_elements() -> Verdict {
    let cpu = Cpu::new(Dtype::Bf16);
    let capacity = 1 << 25;
    let world = World::new(2, 2, 64, &[(0, capacity), (0, 5)], 200);
    let mut cache = match cpu.0.open(&world.layout(capacity, 0), 64) {
        Ok(cache) => cache,
        Err(Error::OutOfMemory { .. }) => {
            return Err(Stop::ignored("8 GiB of address space could not be had"));
        }
        Err(error) => return Err(error.into()),
    };
    assert!(cache.as_ref().layout().head(1).offset().0 * 64 >= 1 << 31);
    let expected = world.run(&cpu, &[190, 1, 9]);
    assert!(world.run_in(&cpu, &mut cache, 0, &[190, 1, 9]) == expected);
    Ok(())
}

fn every_error_variant_says_what_came() {
    let backend = CpuBackend::default();
    let layout = LayerLayout::new(&[Span::full(4)], 4, 0).unwrap();
    let names = |error: Error, argument: &str| match error {
        Error::Argument(error) => assert_eq!(error.argument, argument, "{error}"),
        other => panic!("{other}"),
    };
    names(backend.open(&layout, 0).unwrap_err(), "head_dim");
    assert!(matches!(backend.open(&layout, usize::MAX / 8), Err(Error::OutOfMemory { .. })));
    let huge = LayerLayout::new(&[Span::full(1 << 55)], 1 << 55, 0).unwrap();
    assert!(matches!(backend.open(&huge, 64), Err(Error::OutOfMemory { .. })));
    let error = Tensor::new(vec![0.0; 5], &[2, 3]).unwrap_err();
    assert!(error.to_string().contains("[5]"), "{error}");
    names(error, "data");
    names(Tensor::new(vec![], &[]).unwrap_err(), "shape");
    names(Tensor::zeros(&[1, 1, 1, 1]).unwrap_err(), "shape");
    names(Tensor::zeros(&[usize::MAX, 3]).unwrap_err(), "shape");
    assert!(matches!(
        backend.decode_seconds(0, 1, 8),
        Err(Error::Core(moa_core::Error::Invalid { .. }))
    ));

    let mut cache = backend.open(&layout, 8).unwrap();
    let (x, flat) = (Tensor::zeros(&[5, 1, 8]).unwrap(), Tensor::zeros(&[5, 8]).unwrap());
    let mut extend = |v: &Tensor| {
        let inputs = ExtendInputs::new(&x, &x, v, 1.0);
        backend.extend(&mut [Append { cache: &mut cache, tokens: 5 }], &inputs).unwrap_err()
    };
    assert!(matches!(
        extend(&x),
        Error::Core(moa_core::Error::CapacityExceeded { len: 0, more: 5, capacity: 4 })
    ));
    let error = extend(&flat);
    assert!(error.to_string().starts_with("extend: v: "), "{error}");
    names(error, "v");
    assert!(matches!(
        backend.truncate(&mut cache, 1),
        Err(Error::Core(moa_core::Error::Invalid { .. }))
    ));
}

fn influence_refuses_wrong_shapes() {
    let zeros = |shape: &[usize]| Tensor::zeros(shape).unwrap();
    let (q, k, lse) = (zeros(&[5, 4, 8]), zeros(&[5, 2, 8]), zeros(&[5, 4]));
    let base = || InfluenceInputs {
        q: &q,
        k: &k,
        v: &k,
        out: &q,
        lse: &lse,
        d_out: &q,
        window: usize::MAX,
        block: 2,
        sign: InfluenceSign::Signed,
        gradients: true,
    };
    let run = |inputs: &InfluenceInputs<'_, Tensor>| {
        CpuBackend::default().influence(inputs, 1.0).map(|o| o.blocks)
    };
    assert_eq!(run(&base()).unwrap(), vec![0.0; 2 * 9]);
    for (what, bad) in [
        ("block", InfluenceInputs { block: 0, ..base() }),
        ("window", InfluenceInputs { window: 0, ..base() }),
        ("q", InfluenceInputs { q: &lse, ..base() }),
        ("k", InfluenceInputs { k: &lse, ..base() }),
        ("v", InfluenceInputs { v: &q, ..base() }),
        ("out", InfluenceInputs { out: &k, ..base() }),
        ("lse", InfluenceInputs { lse: &q, ..base() }),
        ("d_out", InfluenceInputs { d_out: &k, ..base() }),
    ] {
        let refused = run(&bad).unwrap_err();
        assert!(
            matches!(&refused, Error::Argument(error) if error.argument == what),
            "{what}: {refused}"
        );
    }
}

fn decode_seconds_are_measured() {
    let seconds = CpuBackend::new(Dtype::Bf16).decode_seconds(2048, 2, 64).unwrap();
    assert!(seconds > 0.0 && seconds < 1.0);
}

fn reset_forgets_everything() {
    let cpu = Cpu::new(Dtype::F32);
    let world = World::new(2, 1, 8, &[(1, 4)], 20);
    let mut cache: Cache = world.open(&cpu, 20, 0);
    world.extend(&cpu, &mut cache, 0..20).unwrap();
    cache.reset();
    assert!(cache.as_ref().is_empty());
    assert!(world.run_in(&cpu, &mut cache, 0, &[15, 5]) == world.run(&cpu, &[15, 5]));
}
