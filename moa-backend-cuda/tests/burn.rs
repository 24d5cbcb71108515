//! The CUDA backend on burn's tensors against the conformance suite, and its order with burn's work.
//!
//! Needs the feature `burn`; the crate's DECISIONS.md says how to build it without internet. Without a GPU trials are
//! ignored; with `MOA_REQUIRE_GPU=1` they fail then.

mod gpu;

use std::process::ExitCode;
use std::sync::OnceLock;

use burn_backend::ops::FloatTensorOps;
use burn_backend::{DType, TensorData};
use burn_cubecl::tensor::CubeTensor;
use burn_cubecl::{CubeBackend, CubeDevice, ops};
use cubecl::device::{CpuDevice, CudaDevice};
use gpu::{device, poison, round};
use moa_backend_cuda::burn::BurnCuda;
use moa_backend_cuda::{CudaBackend, Dtype, Error, HEAD_DIMS, Tensor};
use moa_conformance::{Stop, Subject, Verdict, World, run, suite, trials};
use moa_core::{Append, ArgumentError, ExtendInputs, LayerLayout, Span, SparseAttentionBackend};

fn burns() -> CubeDevice {
    CubeDevice::Cuda(CudaDevice::new(0))
}

fn burn_tensor(data: &[f32], shape: &[usize], dtype: DType) -> CubeTensor {
    let data = TensorData::new(data.to_vec(), shape.to_vec()).convert_dtype(dtype);
    CubeBackend::float_from_data(data, &burns())
}

/// One backend of a type for all tests, which run on threads, and so on streams, of their own.
#[derive(Clone, Copy)]
struct Burn(&'static BurnCuda);

impl Burn {
    fn new(dtype: Dtype) -> Result<Self, Stop> {
        static BACKENDS: [OnceLock<BurnCuda>; 2] = [OnceLock::new(), OnceLock::new()];
        device()?;
        let backend = &BACKENDS[usize::from(dtype == Dtype::F16)];
        Ok(Self(backend.get_or_init(|| BurnCuda::new(&burns(), dtype).unwrap())))
    }
}

impl Subject for Burn {
    type Backend = BurnCuda;
    type Tensor = CubeTensor;

    fn backend(&self) -> &BurnCuda {
        self.0
    }

    fn tensor(&self, data: &[f32], shape: &[usize]) -> CubeTensor {
        burn_tensor(
            data,
            shape,
            if self.0.dtype() == Dtype::F16 { DType::F16 } else { DType::BF16 },
        )
    }

    fn lse(&self, data: &[f32], shape: &[usize]) -> CubeTensor {
        burn_tensor(data, shape, DType::F32)
    }

    fn host(&self, tensor: &CubeTensor) -> Vec<f32> {
        ops::into_data_sync(tensor.clone()).convert::<f32>().try_to_vec().unwrap()
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

    fn same(&self) -> f64 {
        2.0 * self.tolerance()
    }

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

fn main() -> ExitCode {
    let suites = [
        suite("f16", || Burn::new(Dtype::F16)),
        suite("bf16", || Burn::new(Dtype::Bf16)),
        trials![
            runs_in_order_with_burns_work,
            threads_share_a_backend_and_each_has_its_stream,
            tensors_and_caches_of_another_thread_are_waited_for,
            trap_10_slots_that_nobody_wrote_are_never_read,
            a_device_that_is_not_cuda_is_refused,
            tensors_that_kernels_cannot_read_are_refused,
        ],
    ];
    run(suites.into_iter().flatten())
}

/// The tokens of a world in chunks, with work of burn before and after each that the result depends on.
fn between_burns_work(burn: &Burn, world: &World, chunks: &[usize]) -> Vec<f32> {
    let mut cache = world.open(burn, world.tokens, 0);
    let (heads, mut at, mut all) = (world.heads, 0, Vec::new());
    for &chunk in chunks {
        let tensor = |data: Vec<f32>, heads_of: usize| {
            let row = heads_of * heads.dim;
            let part = &data[at * row..(at + chunk) * row];
            // Powers of two: exact in any type.
            let mut tensor = burn.tensor(part, &[chunk, heads_of, heads.dim]);
            for factor in [4.0, 0.5, 8.0, 0.0625] {
                tensor = CubeBackend::float_mul_scalar(tensor, factor.into());
            }
            tensor
        };
        let (q, k) = (tensor(world.q(), heads.query), tensor(world.k(), heads.kv));
        let v = tensor(world.v(), heads.kv);
        let inputs = ExtendInputs { q: &q, k: &k, v: &v, scale: world.scale(), lse: false };
        let batch = &mut [Append { cache: &mut cache, tokens: chunk }];
        let out = burn.0.extend(batch, &inputs).unwrap().out;
        // Its memory is burn's again, and may be what the next tensor is made in.
        drop((q, k, v));
        let out = CubeBackend::float_mul_scalar(out, 2.0.into());
        all.extend(burn.host(&CubeBackend::float_mul_scalar(out, 0.5.into())));
        at += chunk;
    }
    all
}

fn world() -> World {
    World::new(8, 2, 64, &[(4, 300), (0, 60)], 930)
}

const CHUNKS: [usize; 6] = [700, 1, 200, 1, 27, 1];

/// The same on tensors and the stream of this crate.
fn alone(world: &World, dtype: Dtype) -> Result<Vec<f32>, Stop> {
    let device = device()?;
    let backend = CudaBackend::new(device, dtype).unwrap();
    let mut cache = backend.open(&world.layout(world.tokens, 0), world.heads.dim).unwrap();
    let (heads, mut at, mut all) = (world.heads, 0, Vec::new());
    for chunk in CHUNKS {
        let tensor = |data: Vec<f32>, heads_of: usize| {
            let row = heads_of * heads.dim;
            let part = &data[at * row..(at + chunk) * row];
            Tensor::from_f32(device, part, &[chunk, heads_of, heads.dim], dtype).unwrap()
        };
        let (q, k) = (tensor(world.q(), heads.query), tensor(world.k(), heads.kv));
        let v = tensor(world.v(), heads.kv);
        let inputs = ExtendInputs { q: &q, k: &k, v: &v, scale: world.scale(), lse: false };
        let batch = &mut [Append { cache: &mut cache, tokens: chunk }];
        let out = backend.extend(batch, &inputs).unwrap().out;
        all.extend(out.to_f32().unwrap());
        at += chunk;
    }
    Ok(all)
}

fn runs_in_order_with_burns_work() -> Verdict {
    let world = world();
    for dtype in [Dtype::F16, Dtype::Bf16] {
        let (burn, expected) = (Burn::new(dtype)?, alone(&world, dtype)?);
        for _ in 0..10 {
            assert!(between_burns_work(&burn, &world, &CHUNKS) == expected, "{dtype}");
        }
    }
    Ok(())
}

fn threads_share_a_backend_and_each_has_its_stream() -> Verdict {
    let worlds = [1, 2, 3, 4].map(|seed| World { seed, ..world() });
    let burn = Burn::new(Dtype::Bf16)?;
    let expected = worlds.clone().map(|world| alone(&world, Dtype::Bf16).unwrap());
    for _ in 0..5 {
        std::thread::scope(|scope| {
            for (world, expected) in worlds.iter().zip(&expected) {
                scope.spawn(move || {
                    assert!(between_burns_work(&burn, world, &CHUNKS) == *expected);
                });
            }
        });
    }
    Ok(())
}

fn tensors_and_caches_of_another_thread_are_waited_for() -> Verdict {
    let world = world();
    let (burn, expected) = (Burn::new(Dtype::Bf16)?, alone(&world, Dtype::Bf16)?);
    let (heads, scale) = (world.heads, world.scale());
    for _ in 0..10 {
        let mut cache = world.open(&burn, world.tokens, 0);
        let (mut at, mut all) = (0, Vec::new());
        for chunk in CHUNKS {
            let made = std::thread::scope(|scope| {
                let make = || {
                    [(world.q(), heads.query), (world.k(), heads.kv), (world.v(), heads.kv)].map(
                        |(data, heads_of)| {
                            let row = heads_of * heads.dim;
                            let part = &data[at * row..(at + chunk) * row];
                            let tensor = burn.tensor(part, &[chunk, heads_of, heads.dim]);
                            CubeBackend::float_mul_scalar(tensor, 1.0.into())
                        },
                    )
                };
                scope.spawn(make).join().unwrap()
            });
            let cache = &mut cache;
            // Each step on a stream of its own too.
            all.extend(std::thread::scope(|scope| {
                let step = move || {
                    let [q, k, v] = made;
                    let inputs = ExtendInputs { q: &q, k: &k, v: &v, scale, lse: false };
                    let batch = &mut [Append { cache, tokens: chunk }];
                    burn.host(&burn.0.extend(batch, &inputs).unwrap().out)
                };
                scope.spawn(step).join().unwrap()
            }));
            at += chunk;
        }
        assert!(all == expected);
    }
    Ok(())
}

// 10. Reading slots nobody wrote.
fn trap_10_slots_that_nobody_wrote_are_never_read() -> Verdict {
    let world = world();
    let burn = Burn::new(Dtype::Bf16)?;
    let mut cache = world.open(&burn, world.tokens, 0);
    poison(&cache);
    let output = world.run_in(&burn, &mut cache, 0, &CHUNKS);
    assert!(output.out.iter().chain(&output.lse).all(|x| x.is_finite()), "read a NaN");
    Ok(())
}

fn a_device_that_is_not_cuda_is_refused() {
    let error = BurnCuda::new(&CubeDevice::Cpu(CpuDevice), Dtype::Bf16).unwrap_err();
    assert!(matches!(error, Error::Argument(ArgumentError { argument: "device", .. })), "{error}");
    let error = BurnCuda::new(&burns(), Dtype::F32).unwrap_err();
    assert!(matches!(error, Error::Argument(ArgumentError { argument: "dtype", .. })), "{error}");
}

fn tensors_that_kernels_cannot_read_are_refused() -> Verdict {
    let burn = Burn::new(Dtype::Bf16)?;
    let layout = LayerLayout::new(&[Span::new(0, 64).unwrap(); 64], 64, 0).unwrap();
    let mut cache = burn.0.open(&layout, 64).unwrap();
    let good = burn.tensor(&vec![0.5; 8 * 64 * 64], &[8, 64, 64]);
    let mut refused = |q: &CubeTensor| {
        let inputs = ExtendInputs { q, k: &good, v: &good, scale: 1.0, lse: false };
        burn.0.extend(&mut [Append { cache: &mut cache, tokens: 8 }], &inputs).unwrap_err()
    };
    // Same shape, scattered rows.
    let error = refused(&CubeBackend::float_swap_dims(good.clone(), 1, 2));
    assert!(matches!(error, Error::Argument(ArgumentError { argument: "strides", .. })), "{error}");
    let wide = CubeBackend::float_cast(good.clone(), burn_backend::FloatDType::F32);
    let error = refused(&wide);
    assert!(matches!(error, Error::Argument(ArgumentError { argument: "q", .. })), "{error}");
    let error = refused(&burn.tensor(&vec![0.5; 8 * 64 * 64], &[8, 64 * 64]));
    assert!(matches!(error, Error::Argument(ArgumentError { argument: "q", .. })), "{error}");
    assert_eq!(cache.as_ref().len(), 0);
    Ok(())
}
