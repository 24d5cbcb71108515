//! Prefill, decode and influence, with what the machine can do at most measured beside them.
//!
//! `cargo bench -p moa-benches --bench extend`; `RAYON_NUM_THREADS` sets the threads.

use criterion::{
    BatchSize, BenchmarkId, Criterion, SamplingMode, Throughput, criterion_group, criterion_main,
};
use moa_backend_cpu::{Cache, CpuBackend, Tensor};
use moa_core::{
    Append, CacheType, Dtype, ExtendInputs, Extended, InfluenceInputs, InfluenceSign, LayerLayout,
    Span, SparseAttentionBackend,
};

const QUERY_HEADS: usize = 8;
const KV_HEADS: usize = 4;
const HEAD_DIM: usize = 64;
const SCALE: f32 = 0.125;

fn tensor(tokens: usize, heads: usize, seed: u32) -> Tensor {
    let hash = |i: u32| (i ^ seed).wrapping_mul(2_654_435_761).rotate_left(13).wrapping_mul(40_503);
    let data = (0..(tokens * heads * HEAD_DIM) as u32)
        .map(|i| (hash(i) >> 8) as f32 / (1 << 23) as f32 - 1.0);
    Tensor::new(data.collect(), &[tokens, heads, HEAD_DIM]).unwrap()
}

fn extend(
    backend: &CpuBackend,
    cache: &mut Cache,
    [q, k, v]: [&Tensor; 3],
    lse: bool,
) -> Extended<Tensor> {
    let inputs = ExtendInputs { lse, ..ExtendInputs::new(q, k, v, SCALE) };
    backend.extend(&mut [Append { cache, tokens: q.rows() }], &inputs).unwrap()
}

fn dense(tokens: usize) -> Vec<Span> {
    vec![Span::full(tokens); KV_HEADS]
}

/// A quarter of the dense cache, unevenly: 1/8, 1/8, 1/4 and 1/2 of the tokens, 64 of them sinks.
fn mixed(tokens: usize) -> Vec<Span> {
    [8, 8, 4, 2].map(|part| Span::new(64, tokens / part - 64).unwrap()).to_vec()
}

/// Floating-point operations of attention, 4 per kept pair, query head and element.
fn operations(spans: &[Span], tokens: usize) -> u64 {
    let pairs: u128 = spans.iter().map(|span| span.kept_pairs(tokens)).sum();
    pairs as u64 * (QUERY_HEADS / KV_HEADS * 4 * HEAD_DIM) as u64
}

fn prefill(c: &mut Criterion) {
    let backend = CpuBackend::new(Dtype::Bf16).narrow_products(true);
    let mut group = c.benchmark_group("prefill");
    group.sample_size(10).sampling_mode(SamplingMode::Flat);
    for tokens in [1024, 2048, 4096, 8192] {
        let (q, k, v) = (
            tensor(tokens, QUERY_HEADS, 1),
            tensor(tokens, KV_HEADS, 2),
            tensor(tokens, KV_HEADS, 3),
        );
        for (name, spans) in [("dense", dense(tokens)), ("mixed", mixed(tokens))] {
            let layout = LayerLayout::new(&spans, tokens, 0).unwrap();
            group.throughput(Throughput::Elements(operations(&spans, tokens)));
            group.bench_function(BenchmarkId::new(name, tokens), |b| {
                b.iter(|| {
                    let mut cache = backend.open(&layout, HEAD_DIM).unwrap();
                    extend(&backend, &mut cache, [&q, &k, &v], false)
                });
            });
        }
    }
    group.finish();
}

/// The last turn of a chat: 700 tokens after 6,400, over all of them or over 2,048, beside the same tokens alone.
fn turn(c: &mut Criterion) {
    const TOKENS: usize = 700;
    const BEFORE: usize = 6400;
    let backend = CpuBackend::new(Dtype::Bf16).narrow_products(true);
    let inputs = |tokens: usize| {
        [(QUERY_HEADS, 1), (KV_HEADS, 2), (KV_HEADS, 3)]
            .map(|(heads, seed)| tensor(tokens, heads, seed))
    };
    let (first, last) = (inputs(BEFORE), inputs(TOKENS));
    let mut group = c.benchmark_group("turn");
    let quarter = vec![Span::new(64, 1984).unwrap(); KV_HEADS];
    for (name, before, spans) in [
        ("alone", 0, quarter.clone()),
        ("quarter", BEFORE, quarter),
        ("dense", BEFORE, dense(BEFORE + TOKENS)),
    ] {
        let layout = LayerLayout::new(&spans, BEFORE + TOKENS, 0).unwrap();
        let mut filled = backend.open(&layout, HEAD_DIM).unwrap();
        if before > 0 {
            extend(&backend, &mut filled, first.each_ref(), false);
        }
        let work = operations(&spans, before + TOKENS) - operations(&spans, before);
        group.throughput(Throughput::Elements(work));
        group.bench_function(BenchmarkId::new(name, TOKENS), |b| {
            b.iter_batched_ref(
                || backend.fork(&filled).unwrap(),
                |cache| extend(&backend, cache, last.each_ref(), false),
                BatchSize::PerIteration,
            );
        });
    }
    group.finish();
}

fn decode(c: &mut Criterion) {
    const TOKENS: usize = 8192;
    let (q, k, v) =
        (tensor(TOKENS, QUERY_HEADS, 1), tensor(TOKENS, KV_HEADS, 2), tensor(TOKENS, KV_HEADS, 3));
    let (q1, k1, v1) = (tensor(1, QUERY_HEADS, 4), tensor(1, KV_HEADS, 5), tensor(1, KV_HEADS, 6));
    let mut group = c.benchmark_group("decode");
    for dtype in CacheType::ALL {
        let backend = CpuBackend::new(dtype);
        for (name, spans) in [("dense", dense(TOKENS)), ("mixed", mixed(TOKENS))] {
            let slack = 1 << 12;
            let layout = LayerLayout::new(&spans, TOKENS + slack, 0).unwrap();
            let mut filled = backend.open(&layout, HEAD_DIM).unwrap();
            extend(&backend, &mut filled, [&q, &k, &v], false);
            let read: usize = spans.iter().map(|span| span.total().min(TOKENS)).sum();
            group.throughput(Throughput::Bytes(read as u64 * dtype.slot_bytes(HEAD_DIM)));
            let mut cache = backend.fork(&filled).unwrap();
            group.bench_function(BenchmarkId::new(format!("{name}-{dtype:?}"), TOKENS), |b| {
                b.iter(|| {
                    if cache.as_ref().room() == 0 {
                        cache = backend.fork(&filled).unwrap();
                    }
                    extend(&backend, &mut cache, [&q1, &k1, &v1], false)
                });
            });
        }
    }
    group.finish();
}

fn influence(c: &mut Criterion) {
    const TOKENS: usize = 2048;
    let backend = CpuBackend::default();
    let (q, k, v) =
        (tensor(TOKENS, QUERY_HEADS, 1), tensor(TOKENS, KV_HEADS, 2), tensor(TOKENS, KV_HEADS, 3));
    let d_out = tensor(TOKENS, QUERY_HEADS, 4);
    let layout = LayerLayout::new(&dense(TOKENS), TOKENS, 0).unwrap();
    let forward = || {
        let mut cache = backend.open(&layout, HEAD_DIM).unwrap();
        extend(&backend, &mut cache, [&q, &k, &v], true)
    };
    let Extended { out, lse } = forward();
    let lse = lse.unwrap();
    let mut group = c.benchmark_group("influence");
    group.sample_size(10).sampling_mode(SamplingMode::Flat);
    group.bench_function(BenchmarkId::new("extend", TOKENS), |b| b.iter(forward));
    for gradients in [false, true] {
        let name = if gradients { "with-gradients" } else { "alone" };
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
            gradients,
        };
        group.bench_function(BenchmarkId::new(name, TOKENS), |b| {
            b.iter(|| backend.influence(&inputs, SCALE).unwrap());
        });
    }
    group.finish();
}

/// The ceilings: a matrix product of the gemm crate, and reading memory.
fn machine(c: &mut Criterion) {
    const N: usize = 1024;
    let mut group = c.benchmark_group("machine");
    group.sample_size(10).sampling_mode(SamplingMode::Flat);
    let (a, b, mut to) = (vec![0.5f32; N * N], vec![0.25f32; N * N], vec![0f32; N * N]);
    let n = N as isize;
    group.throughput(Throughput::Elements(2 * (N as u64).pow(3)));
    group.bench_function(BenchmarkId::new("sgemm", N), |bench| {
        bench.iter(|| {
            let threads = gemm::Parallelism::Rayon(0);
            // SAFETY: three dense N x N matrices.
            unsafe {
                gemm::gemm(
                    N,
                    N,
                    N,
                    to.as_mut_ptr(),
                    1,
                    n,
                    false,
                    a.as_ptr(),
                    1,
                    n,
                    b.as_ptr(),
                    1,
                    n,
                    1.0,
                    1.0,
                    false,
                    false,
                    false,
                    threads,
                );
            }
        });
    });
    let memory = vec![1u64; 32 << 20];
    group.throughput(Throughput::Bytes(size_of_val(&memory[..]) as u64));
    group.bench_function(BenchmarkId::new("read", "256MiB"), |bench| {
        bench.iter(|| {
            let sums = |part: &[u64]| {
                let mut sums = [0u64; 32];
                for chunk in part.chunks_exact(32) {
                    sums.iter_mut().zip(chunk).for_each(|(sum, x)| *sum = sum.wrapping_add(*x));
                }
                std::hint::black_box(sums);
            };
            let part = memory.len().div_ceil(rayon::current_num_threads());
            rayon::scope(|scope| {
                memory.chunks(part).for_each(|part| scope.spawn(move |_| sums(part)))
            });
        });
    });
    group.finish();
}

criterion_group!(benches, machine, prefill, turn, decode, influence);
criterion_main!(benches);
