//! The CPU backend against the conformance suite, and what is particular to it.

use std::process::ExitCode;

use half::{bf16, f16};
use moa_backend_cpu::{Cache, CpuBackend, Error, Tensor};
use moa_conformance::{Stop, Subject, Verdict, World, normal, run, suite, trials};
use moa_core::{
    Append, Dtype, ExtendInputs, InfluenceInputs, InfluenceSign, LayerLayout, Span,
    SparseAttentionBackend,
};

fn main() -> ExitCode {
    let suites = [
        suite("f32_cache", || Ok(Cpu::new(Dtype::F32))),
        suite("f16_cache", || Ok(Cpu::new(Dtype::F16))),
        suite("bf16_cache", || Ok(Cpu::new(Dtype::Bf16))),
        trials![
            number_of_threads_does_not_change_output,
            number_of_threads_does_not_change_influence,
            trap_09_offsets_beyond_2_to_the_31_elements,
            every_error_variant_says_what_came,
            influence_refuses_wrong_shapes,
            decode_seconds_are_measured,
            reset_forgets_everything,
        ],
    ];
    run(suites.into_iter().flatten())
}

struct Cpu(CpuBackend);

impl Cpu {
    fn new(dtype: Dtype) -> Self {
        Self(CpuBackend::new(dtype))
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

    fn round(&self, x: f32) -> f32 {
        match self.0.cache_dtype() {
            Dtype::F32 => x,
            Dtype::F16 => f16::from_f32(x).to_f32(),
            _ => bf16::from_f32(x).to_f32(),
        }
    }

    fn tolerance(&self) -> f64 {
        1e-5
    }

    fn core_error<'e>(&self, error: &'e Error) -> Option<&'e moa_core::Error> {
        match error {
            Error::Core(error) => Some(error),
            _ => None,
        }
    }
}

fn number_of_threads_does_not_change_output() {
    let cpu = Cpu::new(Dtype::Bf16);
    let world = World::new(4, 2, 32, &[(0, 4000), (4, 300)], 1300);
    let run = |threads: usize| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| world.run(&cpu, &[1200, 1, 1, 2, 96]))
    };
    let one = run(1);
    assert!(one == run(2) && one == run(5), "bitwise different");
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
        let inputs = ExtendInputs { q: &x, k: &x, v, scale: 1.0, lse: false };
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
