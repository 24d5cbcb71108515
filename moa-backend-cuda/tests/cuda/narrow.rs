//! Heads of 8 and 4 bits: what a cache holds to the bit, long sequences, types side by side, unwritten memory.

use cudarc::driver::result;
use moa_backend_cuda::{Cache, Dtype, Error, HEAD_DIMS};
use moa_conformance::{Subject, Trial, Verdict, World, close, error, trials};
use moa_core::{Append, CacheType, ExtendInputs, RowType, SparseAttentionBackend};

use super::Cuda;
use super::gpu::{device, poison};

pub(crate) fn trials() -> Vec<Trial> {
    trials![
        caches_hold_the_bits_of_the_specification,
        long_decodes_equal_the_reference,
        types_side_by_side_equal_the_reference,
        slots_that_nobody_wrote_are_never_read,
        repeats_are_bitwise_equal,
        queries_that_are_no_numbers_say_so,
        other_wide_types_are_refused,
    ]
}

const TYPES: [CacheType; 4] = [CacheType::Int8, CacheType::Fp8, CacheType::K8V4, CacheType::Int4];

fn memory(cache: &Cache) -> Vec<u8> {
    let mut bytes = vec![0u8; cache.bytes() as usize];
    device().map(|device| device.synchronize().unwrap()).unwrap();
    // SAFETY: the cache has these bytes.
    unsafe { result::memcpy_dtoh_sync(&mut bytes, cache.keys()) }.unwrap();
    bytes
}

/// Rows as models have them, with outliers, and at the ends of what there is.
fn rows(cuda: &Cuda, dim: usize, tokens: usize, seed: u64) -> Vec<f32> {
    let world = World { seed, ..World::new(1, 1, dim, &[(0, 1)], tokens) };
    let large = if cuda.0.dtype() == Dtype::F16 { 6e4 } else { 1e30 };
    let mut all = world.k();
    for (i, row) in all.chunks_mut(dim).enumerate() {
        match i % 11 {
            1 => row[dim / 3] *= 40.0,
            2 => row.iter_mut().for_each(|x| *x *= 1e-4),
            3 => row.fill(0.0),
            4 => row.iter_mut().for_each(|x| *x = x.signum() * large),
            // Ties between codes.
            5 => row.iter_mut().enumerate().for_each(|(i, x)| *x = (i % 16) as f32 - 7.5),
            6 => row.iter_mut().for_each(|x| *x = -0.0),
            // Rotated, all are as large as the largest, and half of them negative.
            8 => row.iter_mut().enumerate().for_each(|(i, x)| *x = if i == 1 { -3.0 } else { 0.0 }),
            9 => row.fill(-3.0),
            7 => row[1] = if i % 2 == 0 { f32::NAN } else { f32::INFINITY },
            _ => {}
        }
        row.iter_mut().for_each(|x| *x = cuda.round_tensor(*x));
    }
    all
}

/// By every way into a cache: with copies for a long chunk, and without; keys of 4 bits also with feedback.
fn caches_hold_the_bits_of_the_specification() -> Verdict {
    let tokens = 200;
    let types = TYPES.map(|own| (own, false)).into_iter().chain([(CacheType::Int4, true)]);
    for (dtype, (own, is_fed)) in [Dtype::F16, Dtype::Bf16]
        .into_iter()
        .flat_map(|dtype| types.clone().map(move |of| (dtype, of)))
    {
        let cuda = Cuda::of_type(dtype, own)?;
        for dim in HEAD_DIMS {
            let world = World::new(2, 1, dim, &[(0, tokens)], tokens);
            let feedback = is_fed.then(|| world.feedback());
            let fed = feedback.as_ref().map(|own| cuda.lse(own, &[1, dim, dim]));
            let mut cache = world.open(&cuda, tokens, 0);
            assert_eq!(cache.bytes(), tokens as u64 * own.slot_bytes(dim));
            let (k, v) = (rows(&cuda, dim, tokens, 3), rows(&cuda, dim, tokens, 4));
            let mut at = 0;
            for chunk in [100, 1, 2, 30, 1, 1, 65] {
                let part =
                    |x: &[f32]| cuda.tensor(&x[at * dim..(at + chunk) * dim], &[chunk, 1, dim]);
                let q = cuda.tensor(&vec![0.5; 2 * chunk * dim], &[chunk, 2, dim]);
                let (k, v) = (part(&k), part(&v));
                let key_feedback = fed.as_ref();
                let inputs = ExtendInputs { key_feedback, ..ExtendInputs::new(&q, &k, &v, 0.1) };
                let batch = &mut [Append { cache: &mut cache, tokens: chunk }];
                cuda.0.extend(batch, &inputs).unwrap();
                at += chunk;
            }
            let held = memory(&cache);
            let key_bytes = tokens * own.keys().code_bytes(dim);
            let (codes, scales) = held.split_at(key_bytes + tokens * own.values().code_bytes(dim));
            let (keys, values) = codes.split_at(key_bytes);
            for (what, kind, codes, rows, half) in
                [("key", own.keys(), keys, &k, 0), ("value", own.values(), values, &v, 2)]
            {
                let width = kind.code_bytes(dim);
                for (slot, row) in rows.chunks(dim).enumerate() {
                    let feedback = feedback.as_deref().filter(|_| what == "key");
                    let (expected, scale) = narrow(kind, feedback, row);
                    let found = &codes[slot * width..(slot + 1) * width];
                    let bytes = &scales[slot * 4 + half..][..2];
                    let found_scale = u16::from_le_bytes([bytes[0], bytes[1]]);
                    assert_eq!(found_scale, scale, "{own} {dtype} {dim}: scale of {what} {slot}");
                    assert_eq!(found, expected, "{own} {dtype} {dim}: {what} {slot}");
                }
            }
        }
    }
    Ok(())
}

fn narrow(kind: RowType, feedback: Option<&[f32]>, row: &[f32]) -> (Vec<u8>, u16) {
    let mut codes = vec![0; kind.code_bytes(row.len())];
    let scale = kind.narrow_with(feedback, &mut row.to_vec(), &mut codes);
    (codes, scale)
}

/// Several splits, queries of one and two tokens, groups of one to sixteen rows.
fn long_decodes_equal_the_reference() -> Verdict {
    for (dtype, most) in [(Dtype::F16, 1e-3), (Dtype::Bf16, 4e-3)] {
        for (own, group) in TYPES.into_iter().zip([1, 3, 8, 4]) {
            let cuda = Cuda::of_type(dtype, own)?;
            for dim in HEAD_DIMS {
                let spans = [(0, 4000), (3, 700)];
                let world = World::new(2 * group, 2, dim, &spans, 1300);
                let mut cache = world.open(&cuda, 1400, 2);
                world.extend(&cuda, &mut cache, 0..1280).unwrap();
                let output = world.run_in(&cuda, &mut cache, 1280, &[1, 1, 2, 1, 2, 1]);
                // All of its rows would take the reference too long.
                let late = late_reference(&cuda, &world, 1280..1288);
                let found = [error(&output.out, &late.0), error(&output.lse, &late.1)];
                println!("{own} {dtype} {dim}, group {group}: {found:?}");
                assert!(found[0] <= most && found[1] <= 1e-3, "{own} {dtype} {dim}: {found:?}");
            }
        }
    }
    Ok(())
}

/// Rows of the reference: attention over what caches hold, for these tokens alone.
fn late_reference(
    cuda: &Cuda,
    world: &World,
    tokens: std::ops::Range<usize>,
) -> (Vec<f64>, Vec<f64>) {
    let (k, v) = (world.stored_keys(cuda), world.stored_values(cuda));
    let heads = world.heads;
    let (dim, group) = (heads.dim, heads.query / heads.kv);
    let q: Vec<f64> = world.q().iter().map(|&x| f64::from(cuda.round_tensor(x))).collect();
    let (mut out, mut lse) = (Vec::new(), Vec::new());
    for token in tokens {
        for head in 0..heads.query {
            let kv = head / group;
            let query = &q[(token * heads.query + head) * dim..][..dim];
            let row = |x: &'_ [f64], key: usize| x[(key * heads.kv + kv) * dim..][..dim].to_vec();
            let seen = world.spans[kv].visible(moa_core::Position(token));
            let keys: Vec<usize> = seen.into_iter().flatten().collect();
            let scores: Vec<f64> = keys
                .iter()
                .map(|&key| {
                    let products = row(&k, key).into_iter().zip(query).map(|(a, b)| a * b);
                    products.sum::<f64>() * f64::from(world.scale())
                })
                .collect();
            let most = scores.iter().copied().fold(f64::MIN, f64::max);
            let sum: f64 = scores.iter().map(|x| (x - most).exp()).sum();
            let mut own = vec![0.0; dim];
            for (&key, score) in keys.iter().zip(&scores) {
                let weight = (score - most).exp() / sum;
                own.iter_mut().zip(row(&v, key)).for_each(|(o, v)| *o += weight * v);
            }
            out.extend(own);
            lse.push(most + sum.ln());
        }
    }
    (out, lse)
}

/// Heads of all types, wide ones among them, in every kind of chunk.
fn mixed(group: usize, dim: usize, tokens: usize) -> World {
    let spans = [(0, 2000), (3, 20), (64, 600), (0, 150), (0, 2000)];
    let types = [None, TYPES[3].into(), TYPES[0].into(), TYPES[2].into(), TYPES[1].into()];
    World { types: types.to_vec(), ..World::new(5 * group, 5, dim, &spans, tokens) }
}

/// Chunks that take each of the kernels.
const CHUNKS: [usize; 12] = [1, 2, 90, 1, 3, 1, 500, 1, 15, 1, 1, 40];

fn types_side_by_side_equal_the_reference() -> Verdict {
    for (dtype, dim, group) in
        [(Dtype::F16, 64, 1), (Dtype::Bf16, 128, 4), (Dtype::F16, 96, 2), (Dtype::Bf16, 256, 1)]
    {
        let cuda = Cuda::new(dtype)?;
        let world = mixed(group, dim, CHUNKS.iter().sum());
        let output = world.run(&cuda, &CHUNKS);
        let (out, lse) = world.reference(&cuda);
        let found = [error(&output.out, &out), error(&output.lse, &lse)];
        println!("{dtype} {dim}: {found:?}");
        let most = cuda.typed_tolerance().unwrap_or(cuda.tolerance());
        assert!(found.iter().all(|&error| error <= most), "{dtype} {dim}: {found:?}");
        close(&world.run(&cuda, &[world.tokens]).out, &output.out, 2.0 * most);
    }
    Ok(())
}

fn slots_that_nobody_wrote_are_never_read() -> Verdict {
    for (dtype, dim, group) in
        [(Dtype::Bf16, 64, 1), (Dtype::F16, 128, 4), (Dtype::Bf16, 96, 2), (Dtype::F16, 256, 3)]
    {
        let cuda = Cuda::new(dtype)?;
        let world = mixed(group, dim, CHUNKS.iter().sum());
        let [mut clean, mut poisoned] = [0; 2].map(|_| world.open(&cuda, 900, 7));
        poison(&poisoned);
        let output = world.run_in(&cuda, &mut poisoned, 0, &CHUNKS);
        assert!(output.out.iter().chain(&output.lse).all(|x| x.is_finite()), "read a NaN");
        assert!(output == world.run_in(&cuda, &mut clean, 0, &CHUNKS), "memory's contents matter");
    }
    Ok(())
}

fn repeats_are_bitwise_equal() -> Verdict {
    let cuda = Cuda::new(Dtype::Bf16)?;
    let world = mixed(4, 128, CHUNKS.iter().sum());
    let first = world.run(&cuda, &CHUNKS);
    for at in 1..20 {
        assert!(first == world.run(&cuda, &CHUNKS), "repeat {at} differs: a race");
    }
    Ok(())
}

/// Also where queries become whole numbers, which have no such thing.
fn queries_that_are_no_numbers_say_so() -> Verdict {
    let (dim, tokens) = (64, 40);
    for (own, wrong) in TYPES.into_iter().flat_map(|own| [(own, f32::NAN), (own, f32::INFINITY)]) {
        let cuda = Cuda::of_type(Dtype::Bf16, own)?;
        let world = World::new(2, 1, dim, &[(0, tokens + 1)], tokens);
        let mut cache = world.open(&cuda, tokens + 1, 0);
        world.extend(&cuda, &mut cache, 0..tokens).unwrap();
        let mut q = vec![0.5; 2 * dim];
        q[3] = wrong;
        let q = cuda.tensor(&q, &[1, 2, dim]);
        let [k, v] = [0.1, 0.2].map(|x| cuda.tensor(&vec![x; dim], &[1, 1, dim]));
        let inputs = ExtendInputs::new(&q, &k, &v, 0.1);
        let batch = &mut [Append { cache: &mut cache, tokens: 1 }];
        let out = cuda.host(&cuda.0.extend(batch, &inputs).unwrap().out);
        assert!(out[..dim].iter().all(|x| x.is_nan()), "{own}, {wrong}: {:?}", &out[..dim]);
        assert!(out[dim..].iter().all(|x| x.is_finite()), "{own}: {:?}", &out[dim..]);
    }
    Ok(())
}

fn other_wide_types_are_refused() -> Verdict {
    let cuda = Cuda::new(Dtype::F16)?;
    for wide in [CacheType::F32, CacheType::Bf16] {
        let again = moa_backend_cuda::CudaBackend::new(cuda.0.device(), Dtype::F16)?;
        assert!(matches!(
            again.with_cache_type(wide),
            Err(Error::Core(moa_core::Error::CacheType { cache_type, head: None, .. }))
                if cache_type == wide
        ));
    }
    let narrow = cuda.0.with_cache_type(CacheType::Int4)?;
    assert_eq!((narrow.cache_type(), narrow.slot_bytes(64)), (CacheType::Int4, 68));
    Ok(())
}
