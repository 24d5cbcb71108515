//! The same kernels on a foreign stream and foreign memory: fused RoPE, and a captured step that is
//! replayed while its sequences grow.

use std::sync::Arc;

use cudarc::driver::{CudaContext, CudaStream, result, sys};
use moa_backend_cuda::tables::Packed;
use moa_backend_cuda::{Batch, Cache, Dtype, Rope, Step, Tensor, Tensors, Workspace};
use moa_conformance::{Subject, Trial, Verdict, World, close, trials};
use moa_core::{Append, CacheType, ExtendInputs, SparseAttentionBackend};

use super::Cuda;

pub(crate) fn trials() -> Vec<Trial> {
    trials![
        rope_in_the_append_equals_rope_before_it,
        a_captured_step_replays_while_its_sequences_grow,
        strides_of_foreign_tensors_are_respected,
    ]
}

/// A stream as another library would have it.
fn stream() -> Arc<CudaStream> {
    let context = CudaContext::new(0).unwrap();
    // SAFETY: nothing is allocated through this handle.
    unsafe { context.disable_event_tracking() };
    context.new_stream().unwrap()
}

fn tensor(cuda: &Cuda, data: &[f32], heads: usize, dim: usize) -> Tensor {
    cuda.tensor(data, &[data.len() / heads / dim, heads, dim])
}

fn io(q: &Tensor, k: &Tensor, v: &Tensor, out: &Tensor, scale: f32) -> Tensors {
    let (q, k, v, out) = (q.packed(), k.packed(), v.packed(), out.packed());
    Tensors { q, k, v, out, lse: 0, scale, sinks: 0, key_feedback: 0, rope: None }
}

/// Rotates `[tokens, heads, dim]` on the host, positions from `first`.
fn rotate(x: &mut [f32], heads: usize, dim: usize, first: usize, interleaved: bool) {
    for (row, head) in x.chunks_exact_mut(dim).enumerate() {
        for i in 0..dim / 2 {
            let (sin, cos) = angle(first + row / heads, i, dim).sin_cos();
            let (a, b) = if interleaved { (2 * i, 2 * i + 1) } else { (i, i + dim / 2) };
            let (x, y) = (f64::from(head[a]), f64::from(head[b]));
            head[a] = (x * cos - y * sin) as f32;
            head[b] = (y * cos + x * sin) as f32;
        }
    }
}

fn angle(position: usize, i: usize, dim: usize) -> f64 {
    position as f64 * 10_000f64.powf(-2.0 * i as f64 / dim as f64)
}

fn rope_in_the_append_equals_rope_before_it() -> Verdict {
    let (int8, k8v4) = (Some(CacheType::Int8), Some(CacheType::K8V4));
    for (dtype, dim, interleaved, types) in [
        (Dtype::F16, 64, false, vec![]),
        (Dtype::Bf16, 128, true, vec![]),
        (Dtype::F16, 96, true, vec![]),
        (Dtype::F16, 64, false, vec![None, int8]),
        (Dtype::F16, 128, true, vec![int8, k8v4]),
        (Dtype::F16, 96, false, vec![k8v4, None]),
    ] {
        let cuda = Cuda::new(dtype)?;
        let device = cuda.0.device();
        // Wrapped rings, so that some chunks are written before attention and some after.
        let is_narrow = !types.is_empty();
        let world = World { types, ..World::new(8, 2, dim, &[(0, 400), (4, 50)], 300) };
        // A code may turn out one larger where what it rounds differs by its last bit.
        let same = if is_narrow { 0.05 } else { cuda.same() };
        let rounded = |x: Vec<f32>| x.iter().map(|&x| cuda.round(x)).collect::<Vec<_>>();
        let (q, k, v) = (rounded(world.q()), rounded(world.k()), rounded(world.v()));
        let table: Vec<f32> = (0..300 * dim / 2)
            .flat_map(|at| {
                let (sin, cos) = angle(at / (dim / 2), at % (dim / 2), dim).sin_cos();
                [cos as f32, sin as f32]
            })
            .collect();
        let table = Tensor::from_f32(device, &table, &[300, dim], Dtype::F32).unwrap();

        let stream = stream();
        let raw = stream.cu_stream().cast();
        let (mut step, mut workspace) = (Step::new(device), Workspace::new(device));
        let mut fused = world.open(&cuda, 300, 0);
        let mut plain = world.open(&cuda, 300, 0);
        let mut at = 0;
        for tokens in [150, 1, 2, 90, 1, 55, 1] {
            let part =
                |x: &[f32], heads: usize| x[at * heads * dim..(at + tokens) * heads * dim].to_vec();
            let (mut q, mut k, v) = (part(&q, 8), part(&k, 2), part(&v, 2));
            let inputs = [tensor(&cuda, &q, 8, dim), tensor(&cuda, &k, 2, dim)];
            let (v, out) = (tensor(&cuda, &v, 2, dim), tensor(&cuda, &q, 8, dim));
            let [q_rotated, k_rotated] =
                [8, 2].map(|heads| Tensor::zeros(device, &[tokens, heads, dim], dtype).unwrap());
            let rope = Rope {
                table: table.pointer(),
                interleaved,
                q: q_rotated.packed(),
                k: k_rotated.packed(),
                scratch: at > 200,
                key_shift: 0,
            };
            let io = io(&inputs[0], &inputs[1], &v, &out, world.scale());
            let io = Tensors { rope: Some(rope), ..io };
            let caches: &[&Cache] = &[&fused];
            let batch =
                Batch { caches, tokens: &[tokens], query_heads: 8, grows: false, softcap: None };
            device.synchronize().unwrap();
            // SAFETY: the streams are ordered by synchronisation, and everything outlives both.
            unsafe {
                step.prepare(&mut workspace, &batch, raw).unwrap();
                step.run(&workspace, &io, raw).unwrap();
            }
            stream.synchronize().unwrap();
            fused.advance(tokens).unwrap();

            rotate(&mut q, 8, dim, at, interleaved);
            rotate(&mut k, 2, dim, at, interleaved);
            let (q, k) = (tensor(&cuda, &q, 8, dim), tensor(&cuda, &k, 2, dim));
            let inputs = ExtendInputs::new(&q, &k, &v, world.scale());
            let batch = &mut [Append { cache: &mut plain, tokens }];
            let expected = cuda.0.extend(batch, &inputs).unwrap().out;
            close(&out.to_f32().unwrap(), &expected.to_f32().unwrap(), same);
            if !rope.scratch {
                close(&q_rotated.to_f32().unwrap(), &q.to_f32().unwrap(), cuda.same());
            }
            at += tokens;
        }
    }
    Ok(())
}

fn a_captured_step_replays_while_its_sequences_grow() -> Verdict {
    let _undisturbed = crate::graph::undisturbed();
    let narrow = [Some(CacheType::Int8), Some(CacheType::Int4)];
    for (dtype, tokens, types) in [
        (Dtype::F16, 1, vec![]),
        (Dtype::Bf16, 2, vec![]),
        (Dtype::F16, 1, narrow.to_vec()),
        (Dtype::Bf16, 2, vec![Some(CacheType::Fp8), None]),
        // Too many rows for codes: copies in 16 bits.
        (Dtype::Bf16, 5, narrow.to_vec()),
    ] {
        let cuda = Cuda::new(dtype)?;
        let device = cuda.0.device();
        // Two sequences that reach the next split, and wrap, while the step is replayed.
        let starts = [500, 20];
        let replays = 30;
        let worlds = [1, 2].map(|seed| World {
            seed,
            types: types.clone(),
            ..World::new(8, 2, 128, &[(0, 1000), (4, 505)], 500 + replays * tokens)
        });
        let open = || {
            [0, 1].map(|i| {
                let mut cache = worlds[i].open(&cuda, 900, tokens - 1);
                worlds[i].extend(&cuda, &mut cache, 0..starts[i]).unwrap();
                cache
            })
        };
        let (grown, mut expected) = (open(), open());
        let batch_input = |replay: usize, all: fn(&World) -> Vec<f32>, heads: usize| {
            let parts = [0, 1].map(|i| {
                let from = (starts[i] + replay * tokens) * heads * 128;
                all(&worlds[i])[from..from + tokens * heads * 128].to_vec()
            });
            tensor(&cuda, &parts.concat(), heads, 128)
        };
        let inputs = |replay| {
            [(World::q as fn(&World) -> _, 8), (World::k, 2), (World::v, 2)]
                .map(|(all, heads)| batch_input(replay, all, heads))
        };
        let [q, k, v] = inputs(0);
        let out = Tensor::zeros(device, &[2 * tokens, 8, 128], dtype).unwrap();

        let stream = stream();
        let raw = stream.cu_stream().cast();
        let (mut step, mut workspace) = (Step::new(device), Workspace::new(device));
        let caches = [&grown[0], &grown[1]];
        let batch = Batch {
            caches: &caches,
            tokens: &[tokens; 2],
            query_heads: 8,
            grows: true,
            softcap: None,
        };
        let io = io(&q, &k, &v, &out, worlds[0].scale());
        device.synchronize().unwrap();
        // SAFETY: the streams are ordered by synchronisation, and everything outlives both.
        let graph = unsafe {
            step.prepare(&mut workspace, &batch, raw).unwrap();
            let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
            stream.begin_capture(mode).unwrap();
            step.run(&workspace, &io, raw).unwrap();
            step.advance(raw).unwrap();
            stream.end_capture(sys::CUgraphInstantiate_flags(0)).unwrap().unwrap()
        };
        for replay in 0..replays {
            let fresh = inputs(replay);
            device.synchronize().unwrap();
            for (to, from) in [&q, &k, &v].into_iter().zip(&fresh) {
                let bytes = from.shape().iter().product::<usize>() * 2;
                // SAFETY: both tensors have these bytes.
                unsafe {
                    result::memcpy_dtod_async(
                        to.pointer(),
                        from.pointer(),
                        bytes,
                        stream.cu_stream(),
                    )
                }
                .unwrap();
            }
            graph.launch().unwrap();
            stream.synchronize().unwrap();
            let [q, k, v] = &fresh;
            let inputs = ExtendInputs::new(q, k, v, worlds[0].scale());
            let batch = &mut expected.each_mut().map(|cache| Append { cache, tokens });
            let step_out = cuda.0.extend(batch, &inputs).unwrap().out;
            assert!(
                out.to_f32().unwrap() == step_out.to_f32().unwrap(),
                "replay {replay} differs from a step of its own"
            );
        }
    }
    Ok(())
}

fn strides_of_foreign_tensors_are_respected() -> Verdict {
    let cuda = Cuda::new(Dtype::Bf16)?;
    let device = cuda.0.device();
    // q, k and v of each token in one row, as a fused projection writes them.
    for tokens in [1, 5, 40, 200] {
        let world = World::new(4, 2, 64, &[(0, 300), (2, 30)], tokens);
        let (q, k, v) = (world.q(), world.k(), world.v());
        let row =
            |x: &[f32], heads: usize, t: usize| x[t * heads * 64..(t + 1) * heads * 64].to_vec();
        let fused: Vec<f32> = (0..tokens)
            .flat_map(|t| [row(&q, 4, t), row(&k, 2, t), row(&v, 2, t)].concat())
            .collect();
        let fused = tensor(&cuda, &fused, 8, 64);
        let at =
            |head: u64| Packed { data: fused.pointer() + head * 64 * 2, token: 8 * 64, head: 64 };
        let out = Tensor::zeros(device, &[tokens, 4, 64], Dtype::Bf16).unwrap();
        let cache = world.open(&cuda, 400, 0);
        let (mut step, mut workspace) = (Step::new(device), Workspace::new(device));
        let io = Tensors {
            q: at(0),
            k: at(4),
            v: at(6),
            out: out.packed(),
            lse: 0,
            scale: world.scale(),
            sinks: 0,
            key_feedback: 0,
            rope: None,
        };
        let batch = Batch {
            caches: &[&cache],
            tokens: &[tokens],
            query_heads: 4,
            grows: false,
            softcap: None,
        };
        // SAFETY: all of it is on the device's own stream.
        unsafe {
            step.prepare(&mut workspace, &batch, device.stream()).unwrap();
            step.run(&workspace, &io, device.stream()).unwrap();
        }
        assert!(out.to_f32().unwrap() == world.run(&cuda, &[tokens]).out);
    }
    Ok(())
}
