//! Many shapes against f64, and against how far the naive computation in the same element type is off:
//! at most twice as far, three times where keys are split.
//!
//! `MOA_CASES` is the number of cases for a quick look or for instrumented code.
//!
//! Without a GPU the trial is ignored; with `MOA_REQUIRE_GPU=1` it fails then.

mod gpu;

use std::fmt::Debug;
use std::process::ExitCode;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use gpu::{poison, round};
use half::{bf16, f16};
use moa_backend_cuda::{CudaBackend, Device, Dtype, Tensor};
use moa_conformance::{Verdict, run, trials};
use moa_core::{
    Append, ExtendInputs, Extended, LayerLayout, Position, Span, SparseAttentionBackend,
};

fn main() -> ExitCode {
    run(trials![
        errors_are_at_most_a_small_multiple_of_the_naive_ones,
        every_pair_of_values_is_among_the_cases,
    ])
}

const BATCHES: [usize; 3] = [1, 3, 13];
const LENGTHS: [usize; 8] = [1, 3, 19, 99, 199, 1177, 1999, 4097];
/// New tokens per call; 0 is the whole sequence at once.
const CHUNKS: [usize; 5] = [1, 37, 64, 128, 0];
const SINKS: [usize; 3] = [0, 4, 64];
const HEADS: [(usize, usize); 5] = [(4, 4), (8, 2), (32, 8), (28, 4), (32, 32)];
const DIMS: [usize; 4] = [64, 128, 96, 256];
const DTYPES: [Dtype; 2] = [Dtype::F16, Dtype::Bf16];
/// Of the whole product, one case in this many.
const SAMPLE: usize = 6;
/// Rows (token and query head) of a case that are compared.
const ROWS: usize = 24;

#[derive(Clone, Copy, Debug)]
struct Case {
    batch: usize,
    length: usize,
    chunk: usize,
    sink: usize,
    query: usize,
    kv: usize,
    dim: usize,
    dtype: Dtype,
    seed: usize,
}

fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    let mut index = 0usize;
    for dtype in DTYPES {
        for dim in DIMS {
            for (query, kv) in HEADS {
                for sink in SINKS {
                    for chunk in CHUNKS {
                        for length in LENGTHS {
                            for batch in BATCHES {
                                index += 1;
                                // Scattered, so that no combination of two values is left out.
                                let scattered = index.wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 40;
                                if !scattered.is_multiple_of(SAMPLE) {
                                    continue;
                                }
                                let seed = index;
                                cases.push(Case {
                                    batch,
                                    length,
                                    chunk,
                                    sink,
                                    query,
                                    kv,
                                    dim,
                                    dtype,
                                    seed,
                                });
                            }
                        }
                    }
                }
            }
        }
    }
    cases
}

/// Random numbers of unit size, rounded to the element type, repeated with a prime period.
struct Pool {
    bits: Vec<u16>,
    wide: Vec<f32>,
}

const PERIOD: usize = 1_048_573;

impl Pool {
    fn new(dtype: Dtype) -> Self {
        let mut state = 0x9E37_79B9_7F4A_7C15u64;
        let mut uniform = move || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state >> 40) as f32 / (1u64 << 24) as f32 - 0.5
        };
        let normal = (0..PERIOD).map(|_| (0..4).map(|_| uniform()).sum::<f32>() * 1.732);
        let wide: Vec<f32> = normal.map(|x| round(dtype, x)).collect();
        let bits = wide.iter().map(|&x| match dtype {
            Dtype::F16 => f16::from_f32(x).to_bits(),
            _ => bf16::from_f32(x).to_bits(),
        });
        Self { bits: bits.collect(), wide }
    }

    fn copy(&self, start: usize, len: usize) -> Vec<u16> {
        let mut out = Vec::with_capacity(len);
        let mut at = start % PERIOD;
        while out.len() < len {
            let part = (PERIOD - at).min(len - out.len());
            out.extend_from_slice(&self.bits[at..at + part]);
            at = 0;
        }
        out
    }

    fn row(&self, start: usize, dim: usize) -> impl Iterator<Item = f32> {
        (0..dim).map(move |i| self.wide[(start + i) % PERIOD])
    }
}

/// One sequence of a case: which numbers it reads, as offsets into the pool.
#[derive(Clone, Copy)]
struct Sequence {
    tokens: usize,
    chunk: usize,
    q: usize,
    k: usize,
    v: usize,
}

impl Case {
    fn sequences(&self) -> Vec<Sequence> {
        (0..self.batch)
            .map(|i| {
                // The others are shorter on the whole, and each is of another length.
                let tokens = if i == 0 { self.length } else { LENGTHS[(self.seed + i) % 6] };
                let offset = self.seed * 7919 + i * 104_729;
                Sequence {
                    tokens,
                    chunk: if self.chunk == 0 { tokens } else { self.chunk },
                    q: offset,
                    k: offset + 350_003,
                    v: offset + 700_001,
                }
            })
            .collect()
    }

    /// Wide, narrow and middling spans side by side.
    fn spans(&self) -> Vec<Span> {
        let n = self.length;
        let windows = [n, 33, n / 2, 1, 3 * n / 4, 512, n / 8, 129];
        (0..self.kv)
            .map(|head| Span::new(self.sink, windows[(head + self.seed) % 8].max(1)).unwrap())
            .collect()
    }
}

/// How a case went: largest difference to f64 of ours and of the naive computation.
#[derive(Debug)]
struct Outcome {
    ours: f64,
    naive: f64,
    lse: f64,
    split: bool,
}

fn outcome(device: &Device, pools: &[Pool; 2], case: &Case) -> Outcome {
    let pool = &pools[usize::from(case.dtype == Dtype::Bf16)];
    let backend = CudaBackend::new(device, case.dtype).unwrap();
    let sequences = case.sequences();
    let spans = case.spans();
    let (query, kv, dim) = (case.query, case.kv, case.dim);
    let scale = 1.0 / (dim as f32).sqrt();
    let mut caches: Vec<_> = sequences
        .iter()
        .map(|sequence| {
            let layout =
                LayerLayout::new(&spans, sequence.tokens + case.seed % 3, case.seed % 5).unwrap();
            let cache = backend.open(&layout, dim).unwrap();
            poison(&cache);
            cache
        })
        .collect();
    // All but the last three chunks at once, then those.
    let first = |s: &Sequence| s.tokens.saturating_sub(3 * s.chunk);
    let mut done: Vec<usize> = vec![0; sequences.len()];
    let mut checked: Vec<(usize, usize, Vec<f32>, Vec<f32>)> = Vec::new();
    let mut split = false;
    for call in 0.. {
        let sizes: Vec<usize> = sequences
            .iter()
            .zip(&done)
            .map(|(s, &done)| if call == 0 { first(s) } else { s.chunk.min(s.tokens - done) })
            .collect();
        let active: Vec<usize> = (0..sizes.len()).filter(|&i| sizes[i] > 0).collect();
        if active.is_empty() {
            if call == 0 {
                continue;
            }
            break;
        }
        let total: usize = active.iter().map(|&i| sizes[i]).sum();
        let tensor = |start: fn(&Sequence) -> usize, heads: usize| {
            let mut bits = Vec::with_capacity(total * heads * dim);
            for &i in &active {
                let from = start(&sequences[i]) + done[i] * heads * dim;
                bits.extend(pool.copy(from, sizes[i] * heads * dim));
            }
            let bytes = bytemuck::cast_slice(&bits);
            Tensor::from_bytes(device, bytes, &[total, heads, dim], case.dtype).unwrap()
        };
        let (q, k, v) = (tensor(|s| s.q, query), tensor(|s| s.k, kv), tensor(|s| s.v, kv));
        split |= active.iter().any(|&i| sizes[i] * query / kv <= 16);
        let mut part: Vec<_> = caches
            .iter_mut()
            .zip(&sizes)
            .filter(|(_, tokens)| **tokens > 0)
            .map(|(cache, &tokens)| Append { cache, tokens })
            .collect();
        let inputs = ExtendInputs { lse: true, ..ExtendInputs::new(&q, &k, &v, scale) };
        let Extended { out, lse } = backend.extend(&mut part, &inputs).unwrap();
        let (out, lse) = (out.to_f32().unwrap(), lse.unwrap().to_f32().unwrap());
        let mut row = 0;
        for &i in &active {
            let rows = row * query..(row + sizes[i]) * query;
            let out = out[rows.start * dim..rows.end * dim].to_vec();
            checked.push((i, done[i], out, lse[rows].to_vec()));
            row += sizes[i];
            done[i] += sizes[i];
        }
    }
    let mut outcome = Outcome { ours: 0.0, naive: 0.0, lse: 0.0, split };
    // Every call is looked at, spread over its rows, first and last among them.
    let per_call = (ROWS / checked.len()).max(2);
    for (i, start, out, lse) in &checked {
        for pick in 0..per_call {
            let rows = lse.len();
            let row = match pick {
                0 => rows - 1,
                1 => 0,
                _ => (case.seed * 31 + pick * 7_368_787) % rows,
            };
            let (token, head) = (start + row / query, row % query);
            let ours = &out[row * dim..(row + 1) * dim];
            let expected = attention(pool, case, &sequences[*i], &spans, token, head, scale);
            for (c, &(exact, naive)) in expected.out.iter().enumerate() {
                let difference = (f64::from(ours[c]) - exact).abs();
                // Not a number must not pass as the smaller one.
                let difference = if difference.is_nan() { f64::INFINITY } else { difference };
                outcome.ours = outcome.ours.max(difference);
                outcome.naive = outcome.naive.max((naive - exact).abs());
            }
            let difference = (f64::from(lse[row]) - expected.lse).abs();
            let difference = if difference.is_nan() { f64::INFINITY } else { difference };
            outcome.lse = outcome.lse.max(difference);
        }
    }
    outcome
}

struct Row {
    /// In f64, and by the naive computation that rounds scores, weights and output.
    out: Vec<(f64, f64)>,
    lse: f64,
}

fn attention(
    pool: &Pool,
    case: &Case,
    sequence: &Sequence,
    spans: &[Span],
    token: usize,
    head: usize,
    scale: f32,
) -> Row {
    let (dim, group) = (case.dim, case.query / case.kv);
    let kv_head = head / group;
    let q: Vec<f32> = pool.row(sequence.q + (token * case.query + head) * dim, dim).collect();
    let at = |start: usize, key: usize| start + (key * case.kv + kv_head) * dim;
    let keys: Vec<usize> = spans[kv_head].visible(Position(token)).into_iter().flatten().collect();
    let (mut exact, mut rounded) = (Vec::new(), Vec::new());
    for &key in &keys {
        let products = pool.row(at(sequence.k, key), dim).zip(&q);
        let score: f64 = products.map(|(k, &q)| f64::from(k) * f64::from(q)).sum();
        exact.push(score * f64::from(scale));
        rounded.push(round(case.dtype, round(case.dtype, score as f32) * scale));
    }
    let max = exact.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let sum: f64 = exact.iter().map(|s| (s - max).exp()).sum();
    let max_rounded = rounded.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum_rounded: f32 = rounded.iter().map(|s| (s - max_rounded).exp()).sum();
    let mut out = vec![(0.0, 0.0f32); dim];
    for ((&key, score), score_rounded) in keys.iter().zip(&exact).zip(&rounded) {
        let p = (score - max).exp() / sum;
        let p_rounded = round(case.dtype, (score_rounded - max_rounded).exp() / sum_rounded);
        for (out, v) in out.iter_mut().zip(pool.row(at(sequence.v, key), dim)) {
            out.0 += p * f64::from(v);
            out.1 += p_rounded * v;
        }
    }
    let out = out
        .into_iter()
        .map(|(exact, naive)| (exact, f64::from(round(case.dtype, naive))))
        .collect();
    Row { out, lse: max + sum.ln() }
}

fn errors_are_at_most_a_small_multiple_of_the_naive_ones() -> Verdict {
    gpu::device()?;
    let mut cases = cases();
    assert!(cases.len() >= 2000, "only {} cases", cases.len());
    if let Some(wanted) = std::env::var("MOA_CASES").ok().and_then(|n| n.parse::<usize>().ok()) {
        cases = cases.iter().step_by(cases.len().div_ceil(wanted.max(1))).copied().collect();
    }
    let pools = DTYPES.map(Pool::new);
    let next = AtomicUsize::new(0);
    let failures = Mutex::new(Vec::<String>::new());
    let worst = Mutex::new([0.0f64; 3]);
    let workers = std::thread::available_parallelism().map_or(4, usize::from).min(12);
    std::thread::scope(|scope| {
        for _ in 0..workers {
            scope.spawn(|| {
                // A stream of its own for each worker.
                let device = Device::open(0).unwrap();
                while let Some(case) = cases.get(next.fetch_add(1, Ordering::Relaxed)) {
                    let outcome = outcome(&device, &pools, case);
                    let absolute = if case.dtype == Dtype::F16 { 1e-3 } else { 1e-2 };
                    let factor = if outcome.split { 3.0 } else { 2.0 };
                    let within = outcome.ours <= factor * outcome.naive + 1e-5
                        && outcome.ours <= 2.0 * absolute
                        && outcome.lse <= 1e-4;
                    if !within {
                        let mut failures = failures.lock().unwrap();
                        failures.push(describe(case, &outcome));
                    }
                    let mut worst = worst.lock().unwrap();
                    let of_dtype = usize::from(case.dtype == Dtype::Bf16);
                    worst[of_dtype] = worst[of_dtype].max(outcome.ours);
                    worst[2] = worst[2].max(outcome.lse);
                }
            });
        }
    });
    let ([f16, bf16, lse], failures) =
        (worst.into_inner().unwrap(), failures.into_inner().unwrap());
    eprintln!(
        "{} cases: largest error {f16:.1e} in f16, {bf16:.1e} in bf16, {lse:.1e} in log-sum-exps",
        cases.len()
    );
    let shown: Vec<_> = failures.iter().take(20).cloned().collect();
    assert!(failures.is_empty(), "{} cases fail:\n{}", failures.len(), shown.join("\n"));
    Ok(())
}

fn describe(case: &impl Debug, outcome: &impl Debug) -> String {
    format!("{case:?}: {outcome:?}")
}

/// What the sampled cases leave out would go untested without a word.
fn every_pair_of_values_is_among_the_cases() {
    let cases = cases();
    println!("{} cases", cases.len());
    let position = |all: &[usize], x: usize| all.iter().position(|&y| y == x);
    let values = |case: &Case| {
        [
            position(&BATCHES, case.batch),
            position(&LENGTHS, case.length),
            position(&CHUNKS, case.chunk),
            position(&SINKS, case.sink),
            HEADS.iter().position(|&heads| heads == (case.query, case.kv)),
            position(&DIMS, case.dim),
            DTYPES.iter().position(|&dtype| dtype == case.dtype),
        ]
    };
    let counts = [3, 8, 5, 3, 5, 4, 2];
    let pairs = (0..counts.len()).flat_map(|a| (a + 1..counts.len()).map(move |b| (a, b)));
    for (a, b) in pairs {
        for (x, y) in (0..counts[a]).flat_map(|x| (0..counts[b]).map(move |y| (x, y))) {
            let found = cases.iter().any(|case| {
                let values = values(case);
                values[a] == Some(x) && values[b] == Some(y)
            });
            assert!(found, "value {x} of axis {a} never meets value {y} of axis {b}");
        }
    }
}
