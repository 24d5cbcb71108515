//! Plan search at the sizes of 70B (80 x 8 KV heads), 7B (32 x 32) and 13B (40 x 40) models: 99
//! rules, 3 lengths, 4 bounds. Prints gap and peak memory of each instance, then times it.
//!
//! `cargo bench -p moa-benches --bench search` (append `-- --test` to run each instance once)

use std::hint::black_box;

use criterion::{BenchmarkId, Criterion, SamplingMode, criterion_group, criterion_main};
use moa_core::search::{Bound, Options, Problem, density_sizes, scaled_grid, solve};

/// Losses that fall with the span; importance of heads is heavy-tailed, with noise and some heads
/// whose influence is negative.
fn instance(layers: usize, heads: usize) -> Problem {
    let mut state = 7u64;
    let mut uniform = move || {
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = state;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) >> 11) as f64 / (1u64 << 53) as f64
    };
    let candidates = scaled_grid(8192);
    let lengths = vec![2048, 4096, 8192];
    let traits: Vec<[f64; 4]> = (0..layers * heads)
        .map(|_| {
            let normal = (0..12).map(|_| uniform()).sum::<f64>() - 6.0;
            [(1.8 * normal).exp(), 0.5 + 6.0 * uniform(), 0.5 * uniform(), uniform()]
        })
        .collect();
    let mut losses = Vec::new();
    for (l, &length) in lengths.iter().enumerate() {
        for &[weight, shape, growth, sign] in &traits {
            for rule in &candidates {
                let hidden = 1.0 - rule.span(length, 128) as f64 / length as f64;
                let noise = 0.05 * (uniform() - 0.5) * hidden;
                let local = if sign < 0.1 { -0.2 * hidden * (1.0 - hidden) } else { 0.0 };
                let scale = weight * (1.0 + growth * l as f64);
                losses.push(scale * (hidden.powf(shape) + noise + local));
            }
        }
    }
    let bounds: Vec<Bound> =
        [2048, 4096, 8192, 16384].map(|length| Bound { length, max: 0.25, min: None }).to_vec();
    let sizes = density_sizes(&candidates, &bounds, 128);
    Problem::new(layers, heads, candidates, lengths, losses, bounds, sizes)
        .expect("a valid instance")
}

fn peak_mib() -> String {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let kib = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    let kib = kib.and_then(|s| s.trim().trim_end_matches(" kB").parse::<u64>().ok());
    kib.map_or_else(|| "unknown".into(), |kib| format!("{} MiB", kib / 1024))
}

fn search(c: &mut Criterion) {
    let mut group = c.benchmark_group("search");
    group.sample_size(10).sampling_mode(SamplingMode::Flat);
    for (layers, heads) in [(80, 8), (32, 32), (40, 40)] {
        let problem = instance(layers, heads);
        for limit in [None, Some(2)] {
            let options = Options { max_rules_per_layer: limit, ..Options::default() };
            let name = limit.map_or_else(|| "any rules".into(), |k| format!("{k} rules a layer"));
            let found = solve(&problem, &options).expect("a feasible instance");
            println!(
                "{layers} x {heads}, {name}: {} plans of {} sub-problems in {:.1} s, worst gap {:.4} %, \
                 peak memory so far {}",
                found.solutions.len(),
                found.subproblems,
                found.seconds,
                100.0 * found.worst_gap,
                peak_mib(),
            );
            group.bench_with_input(
                BenchmarkId::new(name, format!("{layers}x{heads}")),
                &options,
                |b, options| b.iter(|| solve(black_box(&problem), options)),
            );
        }
    }
    group.finish();
}

criterion_group!(benches, search);
criterion_main!(benches);
