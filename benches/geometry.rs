//! Mask and cache geometry: what an engine pays per layer and step on the host.

use std::hint::black_box;

use criterion::{BenchmarkId, Criterion, criterion_group, criterion_main};
use moa_core::{LayerLayout, Position, Span};

fn mask(c: &mut Criterion) {
    let span = Span::new(64, 960).unwrap();
    c.bench_function("mask/predicate_1M_pairs", |b| {
        b.iter(|| {
            let query = black_box(Position(1 << 20));
            (0..1 << 20).filter(|k| span.attends(query, Position(*k))).count()
        });
    });
}

fn geometry(c: &mut Criterion) {
    let mut group = c.benchmark_group("geometry");
    for heads in [8, 32] {
        let spans: Vec<_> = (0..heads).map(|h| Span::new(64, 512 * (h + 1)).unwrap()).collect();
        let layout = LayerLayout::new(&spans, 32768, 0).unwrap();
        for tokens in [1, 512] {
            let id = BenchmarkId::new(format!("{heads}_heads"), format!("{tokens}_tokens"));
            group.bench_with_input(id, &tokens, |b, &tokens| {
                b.iter(|| {
                    let len = black_box(20_000);
                    let runs = layout.heads().iter().flat_map(|head| {
                        let keys = head.cached_keys(len, len..len + tokens);
                        keys.into_iter().flat_map(|r| head.runs(r)).chain(head.append(len, tokens))
                    });
                    runs.map(|run| run.slot.0 + run.len).sum::<usize>()
                });
            });
        }
    }
}

criterion_group!(benches, mask, geometry);
criterion_main!(benches);
