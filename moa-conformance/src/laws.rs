//! The output does not depend on how a sequence was cut into chunks, on what else is in the batch,
//! or on spare capacity; a failed call leaves every cache as it was.

use moa_core::{SparseAttentionBackend, reference::Heads};
use proptest::prelude::*;

use crate::cases::{check, chunked_worlds, poisons, worlds};
use crate::numbers::{close, close_where_finite, error};
use crate::world::{Entry, batch, extend};
use crate::{Stop, Subject, Verdict, World};

pub(crate) fn output_equals_the_reference<S: Subject>(s: &S) {
    check(24, chunked_worlds(s), |(world, chunks)| {
        let output = world.run(s, &chunks);
        let (out, lse) = world.reference(s);
        let (d_out, d_lse) = (error(&output.out, &out), error(&output.lse, &lse));
        assert!(d_out <= s.tolerance() && d_lse <= s.tolerance(), "out {d_out:e}, lse {d_lse:e}");
    });
}

pub(crate) fn chunking_does_not_change_output<S: Subject>(s: &S) {
    check(24, chunked_worlds(s), |(world, chunks)| {
        let (whole, cut) = (world.run(s, &[world.tokens]), world.run(s, &chunks));
        close(&whole.out, &cut.out, s.same());
        close(&whole.lse, &cut.lse, s.same());
    });
}

/// Bitwise.
pub(crate) fn batch_composition_does_not_change_output<S: Subject>(s: &S) {
    let splits = proptest::collection::vec(0.0..1.0f64, 4);
    check(16, (worlds(s), splits, any::<u64>()), |(world, splits, seed)| {
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
            let mut cache = others[i].open(s, others[i].tokens, 0);
            if history(i) > 0 {
                others[i].extend(s, &mut cache, 0..history(i)).unwrap();
            }
            cache
        };
        let mut caches: Vec<_> = (0..others.len()).map(opened).collect();
        let mut entries: Vec<Entry<'_, S>> = caches
            .iter_mut()
            .enumerate()
            .map(|(i, cache)| Entry {
                world: &others[i],
                cache,
                range: history(i)..others[i].tokens,
            })
            .collect();
        let together = batch(s, &mut entries).unwrap();
        for (i, together) in together.iter().enumerate() {
            let alone = others[i].extend(s, &mut opened(i), history(i)..others[i].tokens).unwrap();
            assert!(alone == *together, "sequence {i} differs");
        }
    });
}

pub(crate) fn spare_capacity_does_not_change_output<S: Subject>(s: &S) {
    check(16, (chunked_worlds(s), 0usize..300, 0usize..40), |((world, chunks), spare, slack)| {
        let tight = world.run(s, &chunks);
        let mut cache = world.open(s, world.tokens + spare, slack);
        let roomy = world.run_in(s, &mut cache, 0, &chunks);
        close(&tight.out, &roomy.out, s.same());
        close(&tight.lse, &roomy.lse, s.same());
    });
}

/// Grouped-query attention equals multi-head attention whose KV heads are repeated.
pub(crate) fn a_group_equals_repeated_heads<S: Subject>(s: &S) {
    check(12, worlds(s), |world| {
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
        let mut cache = s.backend().open(&layout, dim).unwrap();
        let shape = [world.tokens, query, dim];
        let (q, k, v) = (world.q(), repeat(world.k()), repeat(world.v()));
        let [q, k, v] = [q, k, v].map(|x| s.tensor(&x, &shape));
        let only = [(&mut cache, world.tokens)];
        let out = extend(s, only, [&q, &k, &v], world.scale(), false).unwrap().out;
        close(&world.run(s, &[world.tokens]).out, &s.host(&out), s.same());
    });
}

pub(crate) fn truncate_then_extend_equals_never_having_extended<S: Subject>(s: &S) {
    check(16, (chunked_worlds(s), 1usize..30), |((world, chunks), draft)| {
        // The draft is another world's tokens at the same positions.
        let drafted =
            World { tokens: world.tokens + draft, seed: world.seed ^ 0xd, ..world.clone() };
        let mut cache = world.open(s, world.tokens + draft, draft);
        let (mut at, mut out) = (0, Vec::new());
        for chunk in &chunks {
            drafted.extend(s, &mut cache, at..at + draft).unwrap();
            s.backend().truncate(&mut cache, at).unwrap();
            assert_eq!(cache.as_ref().len(), at);
            out.extend(world.extend(s, &mut cache, at..at + chunk).unwrap().out);
            at += chunk;
        }
        close(&world.run(s, &chunks).out, &out, s.same());
    });
}

pub(crate) fn fork_is_independent<S: Subject>(s: &S) {
    check(16, (worlds(s), 0.0..1.0f64), |(world, at)| {
        let world = World { tokens: world.tokens + 2, ..world };
        let at = 1 + (at * (world.tokens - 2) as f64) as usize;
        let other = World { seed: world.seed ^ 0xf, ..world.clone() };
        let rest = [world.tokens - at];
        let mut original = world.open(s, world.tokens, 0);
        world.extend(s, &mut original, 0..at).unwrap();
        let mut expected = world.open(s, world.tokens, 0);
        world.extend(s, &mut expected, 0..at).unwrap();
        let expected = world.run_in(s, &mut expected, at, &rest);

        let mut fork = s.backend().fork(&original).unwrap();
        let mut second = s.backend().fork(&original).unwrap();
        assert_eq!(fork.as_ref().len(), at);
        other.run_in(s, &mut original, at, &rest);
        assert!(world.run_in(s, &mut fork, at, &rest) == expected, "fork sees its original");
        drop(original);
        assert!(world.run_in(s, &mut second, at, &rest) == expected, "forks see each other");
    });
}

pub(crate) fn failed_call_leaves_state_unchanged<S: Subject>(s: &S) {
    check(12, worlds(s), |world| {
        let world = World { tokens: world.tokens + 3, ..world };
        let at = world.tokens / 2;
        let rest = [1, world.tokens - at - 1];
        let opened = |capacity| {
            let mut cache = world.open(s, capacity, 0);
            world.extend(s, &mut cache, 0..at).unwrap();
            cache
        };
        let expected = world.run_in(s, &mut opened(world.tokens), at, &rest);

        // The second sequence of the batch has no room: neither cache may change.
        let (mut roomy, mut tight) = (opened(world.tokens), opened(at + 1));
        let range = at..at + 2;
        let mut entries = [
            Entry { world: &world, cache: &mut roomy, range: range.clone() },
            Entry { world: &world, cache: &mut tight, range },
        ];
        assert!(batch::<S>(s, &mut entries).is_err());
        assert_eq!((roomy.as_ref().len(), tight.as_ref().len()), (at, at));
        assert!(
            world.run_in(s, &mut roomy, at, &rest) == expected,
            "output changed after a failed call"
        );
        let step = world.extend(s, &mut tight, at..at + 1).unwrap();
        close(&step.out, &expected.out[..step.out.len()], s.same());
    });
}

pub(crate) fn truncate_to_nothing_equals_a_new_cache<S: Subject>(s: &S) {
    check(8, chunked_worlds(s), |(world, chunks)| {
        let before = World { seed: world.seed ^ 0xa, ..world.clone() };
        let mut cache = world.open(s, world.tokens, 0);
        before.run_in(s, &mut cache, 0, &chunks);
        s.backend().truncate(&mut cache, 0).unwrap();
        assert!(world.run_in(s, &mut cache, 0, &chunks) == world.run(s, &chunks));
    });
}

/// What a query does not see counts for nothing, whatever it holds: 0 times infinity is no number. What it does see
/// is not passed over. All rows are ones that some query sees.
pub(crate) fn rows_that_hold_no_numbers_reach_no_query_that_does_not_see_them<S: Subject>(s: &S) {
    check(48, (chunked_worlds(s), poisons(), any::<bool>()), |((world, chunks), poison, typed)| {
        let world = world.poisoned(poison);
        let of_types = world.clone().of_types(s);
        // Not every type is there in every head dimension.
        let is_open = |world: &World| {
            s.backend().open(&world.layout(world.tokens, 0), world.heads.dim).is_ok()
        };
        let world = if typed && is_open(&of_types) { of_types } else { world };
        let (out, lse) = world.reference(s);
        let output = world.run(s, &chunks);
        let most = match world.types.is_empty() {
            true => s.tolerance(),
            false => s.typed_tolerance().unwrap_or(s.tolerance()),
        };
        let row = world.heads.query * world.heads.dim;
        close_where_finite(&output.out, &out, most, |at| format!("out of token {}", at / row));
        let heads = world.heads.query;
        close_where_finite(&output.lse, &lse, most, |at| format!("lse of token {}", at / heads));
    });
}

/// Also in other chunks, after a rollback, in a fork and in a batch with heads of other types.
pub(crate) fn heads_of_other_types_equal_the_reference<S: Subject>(s: &S) -> Verdict {
    if s.cache_types().is_empty() {
        return Err(Stop::ignored("no type can be chosen for a head"));
    }
    check(40, chunked_worlds(s), |(world, chunks)| {
        let world = world.of_types(s);
        let (out, lse) = world.reference(s);
        let output = world.run(s, &chunks);
        let (d_out, d_lse) = (error(&output.out, &out), error(&output.lse, &lse));
        let most = s.typed_tolerance().unwrap_or(s.tolerance());
        let same = s.typed_tolerance().unwrap_or(s.same());
        assert!(d_out <= most && d_lse <= most, "{:?}: {d_out:e} {d_lse:e}", world.types);
        close(&world.run(s, &[world.tokens]).out, &output.out, same);

        let other = World { seed: world.seed.wrapping_add(1), ..world.clone() }.of_types(s);
        let mut drafted = world.open(s, world.tokens, world.tokens);
        world.extend(s, &mut drafted, 0..world.tokens).unwrap();
        let at = world.tokens / 2;
        s.backend().truncate(&mut drafted, at).unwrap();
        let mut fork = s.backend().fork(&drafted).unwrap();
        drop(drafted);
        let mut beside = other.open(s, other.tokens, 0);
        let mut entries = [
            Entry { world: &world, cache: &mut fork, range: at..world.tokens },
            Entry { world: &other, cache: &mut beside, range: 0..other.tokens },
        ];
        let outputs = batch(s, &mut entries).unwrap();
        let row = world.heads.query * world.heads.dim;
        close(&outputs[0].out, &output.out[at * row..], same);
        assert!(outputs[1] == other.run(s, &[other.tokens]), "the batch changes a bit");
    });
    Ok(())
}

/// A head that sees one key returns that key's value: what the cache made of it.
pub(crate) fn rounding_is_within_its_bound<S: Subject>(s: &S) -> Verdict {
    if s.cache_types().is_empty() {
        return Err(Stop::ignored("no type can be chosen for a head"));
    }
    for &own in s.cache_types() {
        let dim = s.dim(64);
        let world = World { types: vec![Some(own)], ..World::new(1, 1, dim, &[(0, 1)], 60) };
        let mut cache = world.open(s, 60, 0);
        let bytes = world.layout(60, 0).bytes(dim, 0);
        assert_eq!(s.backend().bytes(&cache), bytes, "bytes of {own}");
        let output = world.run_in(s, &mut cache, 0, &[1, 40, 19]).out;
        let found = error(&output, &world.stored_values(s));
        let rounding = s.output_rounding();
        assert!(found <= 1e-5 + rounding, "{own}: {found:e} from what the cache holds");
        let values: Vec<f32> = world.v().iter().map(|&x| s.round_tensor(x)).collect();
        for (row, stored) in values.chunks(dim).zip(output.chunks(dim)) {
            let length = row.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>().sqrt();
            let largest = row.iter().fold(0.0, |most: f64, x| most.max(f64::from(x.abs())));
            let bound = own.values().bound(dim, length, largest) + 1e-5;
            for (x, stored) in row.iter().zip(stored) {
                let error = f64::from((x - stored).abs());
                let bound = bound + rounding * f64::from(stored.abs());
                assert!(error <= bound, "{own}: {x} became {stored}, by more than {bound}");
            }
        }
    }
    Ok(())
}
