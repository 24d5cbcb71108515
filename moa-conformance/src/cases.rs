//! Random worlds, the same ones every time.

use proptest::prelude::*;
use proptest::test_runner::{Config, RngAlgorithm, TestRng, TestRunner};

use crate::{Poison, Poisoned, Subject, World};

/// Worlds around the edges of tiles and spans.
pub(crate) fn worlds<S: Subject>(s: &S) -> impl Strategy<Value = World> + use<S> {
    let span = (0usize..6, prop_oneof![1usize..12, 30usize..150, Just(1000)]);
    let dim = proptest::sample::select(s.dims());
    let group = prop_oneof![Just(1usize), Just(2), Just(3), Just(4), Just(7), Just(16)];
    let tokens = prop_oneof![4 => 1usize..40, 2 => 60usize..140, 1 => 250usize..300];
    (group, proptest::collection::vec(span, 1..=2), dim, tokens, any::<u64>()).prop_map(
        |(group, spans, dim, tokens, seed)| {
            let world = World::new(group * spans.len(), spans.len(), dim, &spans, tokens);
            World { seed, ..world }
        },
    )
}

/// A world and chunks that add up to its tokens.
pub(crate) fn chunked_worlds<S: Subject>(
    s: &S,
) -> impl Strategy<Value = (World, Vec<usize>)> + use<S> {
    let sizes = prop_oneof![3 => 1usize..5, 2 => 5usize..40, 1 => 60usize..200];
    (worlds(s), proptest::collection::vec(sizes, 1..30)).prop_map(|(world, sizes)| {
        let chunks = cut(world.tokens, &sizes);
        (world, chunks)
    })
}

/// A query, key or value that holds no numbers, of a token that is to be taken modulo a world's.
pub(crate) fn poisons() -> impl Strategy<Value = Poison> {
    let of = prop_oneof![
        1 => Just(Poisoned::Queries),
        3 => Just(Poisoned::Keys),
        4 => Just(Poisoned::Values),
    ];
    let with = proptest::sample::select(&[f32::NAN, f32::INFINITY, f32::NEG_INFINITY]);
    (0usize..10_000, of, with).prop_map(|(token, of, with)| Poison { token, of, with })
}

/// Cuts `tokens` into chunks of the given sizes and one for the rest.
pub(crate) fn cut(tokens: usize, sizes: &[usize]) -> Vec<usize> {
    let mut left = tokens;
    let mut chunks: Vec<usize> = sizes
        .iter()
        .map(|&size| {
            let chunk = size.min(left);
            left -= chunk;
            chunk
        })
        .filter(|&chunk| chunk > 0)
        .collect();
    chunks.extend((left > 0).then_some(left));
    chunks
}

/// Runs a property on random cases, the same ones every time.
pub(crate) fn check<S: Strategy>(cases: u32, strategy: S, property: impl Fn(S::Value)) {
    let config = Config { cases, failure_persistence: None, ..Config::default() };
    let rng = TestRng::deterministic_rng(RngAlgorithm::ChaCha);
    let mut runner = TestRunner::new_with_rng(config, rng);
    runner
        .run(&strategy, |case| {
            property(case);
            Ok(())
        })
        .unwrap_or_else(|failure| panic!("{failure}"));
}
