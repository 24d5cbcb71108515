//! What goes wrong on GPUs: unwritten memory, races, large offsets; and every refusal.

use cudarc::driver::sys;
use moa_backend_cuda::{Cache, CudaBackend, Device, Dtype, Error, Operations, Tensor};
use moa_conformance::{Output, Stop, Subject, Trial, Verdict, World, trials};
use moa_core::{Append, ArgumentError, ExtendInputs, LayerLayout, Span, SparseAttentionBackend};

use super::Cuda;
use super::gpu::{device, poison};

pub(crate) fn trials() -> Vec<Trial> {
    trials![
        trap_10_slots_that_nobody_wrote_are_never_read,
        fifty_repeats_are_bitwise_equal,
        trap_09_offsets_beyond_2_to_the_31_elements,
        reset_forgets_everything,
        decode_seconds_are_measured_and_grow_with_the_span,
        what_cannot_be_done_is_an_error_that_says_why,
        a_caller_that_fills_an_upload_sees_nothing_of_others,
    ]
}

/// Chunks that take each of the kernels.
const CHUNKS: [usize; 15] = [1, 2, 90, 1, 3, 1, 700, 1, 15, 1, 300, 5, 1, 1, 40];

fn run(cuda: &Cuda, world: &World, cache: &mut Cache) -> Output {
    world.run_in(cuda, cache, 0, &CHUNKS)
}

/// Long enough to wrap and to split.
fn worlds() -> Vec<World> {
    [(64, 1), (96, 2), (128, 4), (256, 3)]
        .into_iter()
        .map(|(dim, group)| {
            let spans = [(0, 2000), (3, 20), (64, 600), (0, 150)];
            World::new(4 * group, 4, dim, &spans, 1163)
        })
        .collect()
}

// 10. Reading slots nobody wrote (vLLM's tests fill them with NaN).
fn trap_10_slots_that_nobody_wrote_are_never_read() -> Verdict {
    for dtype in [Dtype::F16, Dtype::Bf16] {
        let cuda = Cuda::new(dtype)?;
        for world in worlds() {
            let mut clean = world.open(&cuda, 1500, 7);
            let mut poisoned = world.open(&cuda, 1500, 7);
            poison(&poisoned);
            let output = run(&cuda, &world, &mut poisoned);
            assert!(output.out.iter().chain(&output.lse).all(|x| x.is_finite()), "read a NaN");
            assert!(output == run(&cuda, &world, &mut clean), "memory's contents matter");
        }
    }
    Ok(())
}

fn fifty_repeats_are_bitwise_equal() -> Verdict {
    for dtype in [Dtype::F16, Dtype::Bf16] {
        let cuda = Cuda::new(dtype)?;
        for world in worlds() {
            let [q, k, v] = [world.q(), world.k(), world.v()];
            let mut at = 0;
            let chunks = CHUNKS.map(|tokens| {
                let tensor = |x: &[f32], heads: usize| {
                    let row = heads * world.heads.dim;
                    let part = &x[at * row..(at + tokens) * row];
                    cuda.tensor(part, &[tokens, heads, world.heads.dim])
                };
                let (query, kv) = (world.heads.query, world.heads.kv);
                let inputs = (tokens, tensor(&q, query), tensor(&k, kv), tensor(&v, kv));
                at += tokens;
                inputs
            });
            let mut cache = world.open(&cuda, 1163, 0);
            let mut repeat = || {
                cache.reset();
                let outputs = chunks.each_ref().map(|(tokens, q, k, v)| {
                    let inputs =
                        ExtendInputs { lse: true, ..ExtendInputs::new(q, k, v, world.scale()) };
                    let batch = &mut [Append { cache: &mut cache, tokens: *tokens }];
                    cuda.0.extend(batch, &inputs).unwrap()
                });
                // Bits, as a NaN would not equal itself.
                outputs.map(|output| [output.out, output.lse.unwrap()].map(|x| bits(&x)))
            };
            let first = repeat();
            for at in 1..50 {
                assert!(first == repeat(), "repeat {at} differs: a race");
            }
        }
    }
    Ok(())
}

fn bits(tensor: &Tensor) -> Vec<u32> {
    tensor.to_f32().unwrap().into_iter().map(f32::to_bits).collect()
}

// 9. Integer overflow past 2^31 elements: the second head starts there.
fn trap_09_offsets_beyond_2_to_the_31_elements() -> Verdict {
    let cuda = Cuda::new(Dtype::Bf16)?;
    let capacity = 1 << 25;
    let world = World::new(2, 2, 64, &[(0, capacity), (0, 5)], 400);
    let mut cache = match world_cache(&cuda, &world, capacity) {
        Ok(cache) => cache,
        Err(Error::OutOfMemory { bytes, free, .. }) => {
            let reason =
                format!("{bytes} bytes of device memory could not be had, {free} are free");
            return Err(Stop::ignored(reason));
        }
        Err(error) => return Err(error.into()),
    };
    assert!(cache.as_ref().layout().head(1).offset().0 * 64 >= 1 << 31);
    let chunks = [190, 1, 9, 1, 120, 1];
    assert!(world.run_in(&cuda, &mut cache, 0, &chunks) == world.run(&cuda, &chunks));
    Ok(())
}

fn world_cache(cuda: &Cuda, world: &World, capacity: usize) -> Result<Cache, Error> {
    cuda.0.open(&world.layout(capacity, 0), 64)
}

fn reset_forgets_everything() -> Verdict {
    let cuda = Cuda::new(Dtype::F16)?;
    let world = World::new(2, 1, 64, &[(1, 4)], 20);
    let mut cache = world.open(&cuda, 20, 0);
    world.extend(&cuda, &mut cache, 0..20).unwrap();
    cache.reset();
    assert!(cache.as_ref().is_empty());
    assert!(world.run_in(&cuda, &mut cache, 0, &[15, 5]) == world.run(&cuda, &[15, 5]));
    Ok(())
}

fn decode_seconds_are_measured_and_grow_with_the_span() -> Verdict {
    let device = device()?;
    let backend = CudaBackend::new(device, Dtype::Bf16).unwrap();
    let [short, long] = [1024, 16_384].map(|span| backend.decode_seconds(span, 4, 128).unwrap());
    assert!(short > 0.0 && short < long && long < 1e-2, "{short} {long}");
    assert!(matches!(
        backend.decode_seconds(0, 1, 64),
        Err(Error::Core(moa_core::Error::Invalid { .. }))
    ));
    assert!(matches!(
        backend.decode_seconds(64, 0, 64),
        Err(Error::Argument(ArgumentError { argument: "group", .. }))
    ));
    Ok(())
}

fn what_cannot_be_done_is_an_error_that_says_why() -> Verdict {
    // With or without a driver.
    assert!(matches!(
        Device::open(usize::MAX),
        Err(Error::NoDevice { ordinal: usize::MAX, .. } | Error::NoDriver { .. })
    ));
    let device = device()?;
    assert!(matches!(
        CudaBackend::new(device, Dtype::F32),
        Err(Error::Argument(ArgumentError { argument: "dtype", .. }))
    ));
    let backend = CudaBackend::new(device, Dtype::F16).unwrap();
    let layout = LayerLayout::new(&[Span::full(4)], 4, 0).unwrap();
    for dim in [0, 63, 72, usize::MAX / 2] {
        assert!(matches!(
            backend.open(&layout, dim),
            Err(Error::Argument(ArgumentError { argument: "head_dim", .. }))
        ));
    }
    let long = LayerLayout::new(&[Span::full(1 << 40)], 1 << 40, 0).unwrap();
    assert!(matches!(backend.open(&long, 64), Err(Error::Core(moa_core::Error::Invalid { .. }))));
    let large = LayerLayout::new(&[Span::full(1 << 29); 8], 1 << 29, 0).unwrap();
    assert!(matches!(
        backend.open(&large, 256),
        Err(Error::OutOfMemory { bytes, free, .. }) if bytes == 1 << 42 && free > 0
    ));

    assert!(matches!(
        Tensor::from_f32(device, &[0.0; 5], &[2, 3], Dtype::F16),
        Err(Error::Argument(ArgumentError { got, .. })) if got == "shape [5]"
    ));
    assert!(matches!(Tensor::zeros(device, &[], Dtype::F16), Err(Error::Argument(_))));
    assert!(matches!(Tensor::zeros(device, &[1; 4], Dtype::F16), Err(Error::Argument(_))));

    let mut cache = backend.open(&layout, 64).unwrap();
    let mut extend = |dtype, tokens: usize, rows: usize| {
        let x = Tensor::zeros(device, &[rows, 1, 64], dtype).unwrap();
        let inputs = ExtendInputs::new(&x, &x, &x, 1.0);
        backend.extend(&mut [Append { cache: &mut cache, tokens }], &inputs).map(drop)
    };
    assert!(matches!(
        extend(Dtype::F16, 5, 5),
        Err(Error::Core(moa_core::Error::CapacityExceeded { len: 0, more: 5, capacity: 4 }))
    ));
    assert!(matches!(
        extend(Dtype::Bf16, 2, 2),
        Err(Error::Argument(ArgumentError { argument: "q", .. }))
    ));
    assert!(matches!(
        extend(Dtype::F16, 2, 3),
        Err(Error::Argument(ArgumentError { argument: "q", .. }))
    ));
    extend(Dtype::F16, 4, 4).unwrap();
    let x = Tensor::zeros(device, &[1, 1, 64], Dtype::F16).unwrap();
    let inputs = ExtendInputs::new(&x, &x, &x, 1.0);
    let none = backend.extend(&mut [], &inputs);
    assert!(matches!(none, Err(Error::Argument(ArgumentError { argument: "batch", .. }))));
    assert!(matches!(
        backend.truncate(&mut cache, 5),
        Err(Error::Core(moa_core::Error::Invalid { .. }))
    ));
    Ok(())
}

/// Page-locked memory that others have written and given back.
fn a_caller_that_fills_an_upload_sees_nothing_of_others() -> Verdict {
    const BYTES: usize = 1 << 16;
    let operations = Operations::new(device()?, Dtype::Bf16)?;
    // Makes the context this thread's.
    operations.device().synchronize()?;
    let mut recycled = 0;
    let mut used = [std::ptr::null_mut(); 16];
    for _ in 0..2 {
        for place in &mut used {
            // SAFETY: the memory is as large, and given back once, below.
            let bytes = unsafe {
                sys::cuMemHostAlloc(place, BYTES, 0).result()?;
                std::slice::from_raw_parts_mut(place.cast::<u8>(), BYTES)
            };
            recycled += usize::from(bytes.contains(&0xa5));
            bytes.fill(0xa5);
        }
        for place in used {
            // SAFETY: see above; nobody uses it any more.
            unsafe { sys::cuMemFreeHost(place) }.result()?;
        }
    }
    eprintln!("{recycled} of 32 pieces of page-locked memory held what was there before");
    for number in 1..=4u8 {
        let tensor = operations.upload(&[BYTES / 4], Dtype::F32, |_, staged| {
            assert_eq!(staged.len(), BYTES);
            assert!(staged.iter().all(|byte| *byte == 0), "memory of others");
            staged[..4].copy_from_slice(&f32::from(number).to_ne_bytes());
        })?;
        let values = tensor.to_f32()?;
        assert!(values[0] == f32::from(number) && values[1..].iter().all(|x| *x == 0.0));
    }
    Ok(())
}
