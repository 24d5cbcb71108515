//! The output does not depend on how a sequence was cut into chunks, on what else is in the batch,
//! or on spare capacity; a failed call leaves every cache as it was.

use moa_core::{Append, ExtendInputs, SparseAttentionBackend, reference::Heads};
use proptest::prelude::*;

use super::TestBackend;
use super::world::{Entry, World, batch, check, chunked_worlds, close, error, worlds};

pub(crate) fn output_equals_the_reference<T: TestBackend>(t: &T) {
    check(24, chunked_worlds(t), |(world, chunks)| {
        let output = world.run(t, &chunks);
        let (out, lse) = world.reference(t);
        let (d_out, d_lse) = (error(&output.out, &out), error(&output.lse, &lse));
        assert!(d_out <= t.tolerance() && d_lse <= t.tolerance(), "out {d_out:e}, lse {d_lse:e}");
    });
}

pub(crate) fn chunking_does_not_change_output<T: TestBackend>(t: &T) {
    check(24, chunked_worlds(t), |(world, chunks)| {
        let (whole, cut) = (world.run(t, &[world.tokens]), world.run(t, &chunks));
        close(&whole.out, &cut.out, t.same());
        close(&whole.lse, &cut.lse, t.same());
    });
}

/// Bitwise.
pub(crate) fn batch_composition_does_not_change_output<T: TestBackend>(t: &T) {
    let splits = proptest::collection::vec(0.0..1.0f64, 4);
    check(16, (worlds(t), splits, any::<u64>()), |(world, splits, seed)| {
        // Sequences of one layer, each with another history and another chunk.
        let others: Vec<World> = splits
            .iter()
            .enumerate()
            .map(|(i, split)| World {
                tokens: 1 + (split * world.tokens as f64) as usize,
                seed: seed.wrapping_add(i as u64),
                ..world.clone()
            })
            .chain([world.clone()])
            .collect();
        let history = |i: usize| (others[i].tokens - 1) * (i % 3) / 2;
        let opened = |i: usize| {
            let mut cache = others[i].open(t, others[i].tokens, 0);
            if history(i) > 0 {
                others[i].extend(t, &mut cache, 0..history(i)).unwrap();
            }
            cache
        };
        let mut caches: Vec<_> = (0..others.len()).map(opened).collect();
        let mut entries: Vec<Entry<'_, T>> = caches
            .iter_mut()
            .enumerate()
            .map(|(i, cache)| Entry {
                world: &others[i],
                cache,
                range: history(i)..others[i].tokens,
            })
            .collect();
        let together = batch(t, &mut entries).unwrap();
        for (i, together) in together.iter().enumerate() {
            let alone = others[i].extend(t, &mut opened(i), history(i)..others[i].tokens).unwrap();
            assert!(alone == *together, "sequence {i} differs");
        }
    });
}

pub(crate) fn spare_capacity_does_not_change_output<T: TestBackend>(t: &T) {
    check(16, (chunked_worlds(t), 0usize..300, 0usize..40), |((world, chunks), spare, slack)| {
        let tight = world.run(t, &chunks);
        let mut cache = world.open(t, world.tokens + spare, slack);
        let roomy = world.run_in(t, &mut cache, 0, &chunks);
        close(&tight.out, &roomy.out, t.same());
        close(&tight.lse, &roomy.lse, t.same());
    });
}

/// Grouped-query attention equals multi-head attention whose KV heads are repeated.
pub(crate) fn a_group_equals_repeated_heads<T: TestBackend>(t: &T) {
    check(12, worlds(t), |world| {
        let Heads { query, kv, dim } = world.heads;
        let group = query / kv;
        let repeat = |x: Vec<f32>| -> Vec<f32> {
            x.chunks(dim)
                .flat_map(|head| std::iter::repeat_n(head, group).flatten().copied())
                .collect()
        };
        let spans: Vec<_> =
            world.spans.iter().flat_map(|&s| std::iter::repeat_n(s, group)).collect();
        let layout = moa_core::LayerLayout::new(&spans, world.tokens, 0).unwrap();
        let mut cache = t.backend().open(&layout, dim).unwrap();
        let shape = [world.tokens, query, dim];
        let (q, k, v) = (world.q(), repeat(world.k()), repeat(world.v()));
        let [q, k, v] = [q, k, v].map(|x| t.tensor(&x, &shape));
        let inputs = ExtendInputs { q: &q, k: &k, v: &v, scale: world.scale(), lse: false };
        let batch = &mut [Append { cache: &mut cache, tokens: world.tokens }];
        let extended = t.backend().extend(batch, &inputs).unwrap();
        close(&world.run(t, &[world.tokens]).out, &t.host(&extended.out), t.same());
    });
}

pub(crate) fn truncate_then_extend_equals_never_having_extended<T: TestBackend>(t: &T) {
    check(16, (chunked_worlds(t), 1usize..30), |((world, chunks), draft)| {
        // The draft is another world's tokens at the same positions.
        let drafted =
            World { tokens: world.tokens + draft, seed: world.seed ^ 0xd, ..world.clone() };
        let mut cache = world.open(t, world.tokens + draft, draft);
        let (mut at, mut out) = (0, Vec::new());
        for chunk in &chunks {
            drafted.extend(t, &mut cache, at..at + draft).unwrap();
            t.backend().truncate(&mut cache, at).unwrap();
            assert_eq!(cache.as_ref().len(), at);
            out.extend(world.extend(t, &mut cache, at..at + chunk).unwrap().out);
            at += chunk;
        }
        close(&world.run(t, &chunks).out, &out, t.same());
    });
}

pub(crate) fn fork_is_independent<T: TestBackend>(t: &T) {
    check(16, (worlds(t), 0.0..1.0f64), |(world, at)| {
        let world = World { tokens: world.tokens + 2, ..world };
        let at = 1 + (at * (world.tokens - 2) as f64) as usize;
        let other = World { seed: world.seed ^ 0xf, ..world.clone() };
        let rest = [world.tokens - at];
        let mut original = world.open(t, world.tokens, 0);
        world.extend(t, &mut original, 0..at).unwrap();
        let mut expected = world.open(t, world.tokens, 0);
        world.extend(t, &mut expected, 0..at).unwrap();
        let expected = world.run_in(t, &mut expected, at, &rest);

        let mut fork = t.backend().fork(&original).unwrap();
        let mut second = t.backend().fork(&original).unwrap();
        assert_eq!(fork.as_ref().len(), at);
        other.run_in(t, &mut original, at, &rest);
        assert!(world.run_in(t, &mut fork, at, &rest) == expected, "fork sees its original");
        drop(original);
        assert!(world.run_in(t, &mut second, at, &rest) == expected, "forks see each other");
    });
}

pub(crate) fn failed_call_leaves_state_unchanged<T: TestBackend>(t: &T) {
    check(12, worlds(t), |world| {
        let world = World { tokens: world.tokens + 3, ..world };
        let at = world.tokens / 2;
        let rest = [1, world.tokens - at - 1];
        let opened = |capacity| {
            let mut cache = world.open(t, capacity, 0);
            world.extend(t, &mut cache, 0..at).unwrap();
            cache
        };
        let expected = world.run_in(t, &mut opened(world.tokens), at, &rest);

        // The second sequence of the batch has no room: neither cache may change.
        let (mut roomy, mut tight) = (opened(world.tokens), opened(at + 1));
        let range = at..at + 2;
        let mut entries = [
            Entry { world: &world, cache: &mut roomy, range: range.clone() },
            Entry { world: &world, cache: &mut tight, range },
        ];
        assert!(batch::<T>(t, &mut entries).is_err());
        assert_eq!((roomy.as_ref().len(), tight.as_ref().len()), (at, at));
        assert!(
            world.run_in(t, &mut roomy, at, &rest) == expected,
            "output changed after a failed call"
        );
        let step = world.extend(t, &mut tight, at..at + 1).unwrap();
        close(&step.out, &expected.out[..step.out.len()], t.same());
    });
}

pub(crate) fn truncate_to_nothing_equals_a_new_cache<T: TestBackend>(t: &T) {
    check(8, chunked_worlds(t), |(world, chunks)| {
        let before = World { seed: world.seed ^ 0xa, ..world.clone() };
        let mut cache = world.open(t, world.tokens, 0);
        before.run_in(t, &mut cache, 0, &chunks);
        t.backend().truncate(&mut cache, 0).unwrap();
        assert!(world.run_in(t, &mut cache, 0, &chunks) == world.run(t, &chunks));
    });
}
