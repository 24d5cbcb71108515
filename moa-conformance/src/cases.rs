//! Random worlds, the same ones every time.

use proptest::prelude::*;
use proptest::test_runner::{Config, RngAlgorithm, TestRng, TestRunner};

use crate::numbers::{close, error};
use crate::world::{Entry, batch};
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

/// Holds what a world gives in these chunks to the reference, within `most`; what it gives in one to that, within
/// `same`; and what it gives beside another sequence to the latter, bitwise.
pub(crate) fn is_right_in_any_cut_and_company<S: Subject>(
    s: &S,
    world: &World,
    chunks: &[usize],
    most: f64,
    same: f64,
) {
    let (out, lse) = world.reference(s);
    let cut = world.run(s, chunks);
    let (d_out, d_lse) = (error(&cut.out, &out), error(&cut.lse, &lse));
    let of = (world.softcap, &world.types);
    assert!(d_out <= most && d_lse <= most, "{of:?}: out {d_out:e}, lse {d_lse:e}");
    let whole = world.run(s, &[world.tokens]);
    close(&whole.out, &cut.out, same);
    close(&whole.lse, &cut.lse, same);

    let other = World { seed: world.seed ^ 0xb, ..world.clone() };
    let (mut first, mut second) = (other.open(s, other.tokens, 0), world.open(s, world.tokens, 0));
    let mut entries = [
        Entry { world: &other, cache: &mut first, range: 0..other.tokens / 2 + 1 },
        Entry { world, cache: &mut second, range: 0..world.tokens },
    ];
    assert!(batch(s, &mut entries).unwrap()[1] == whole, "the batch changes a bit");
}
