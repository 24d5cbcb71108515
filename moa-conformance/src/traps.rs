//! Traps that other implementations fell into, one test each, with where it happened.

use moa_core::SparseAttentionBackend;

use crate::numbers::{close, error, f64s};
use crate::world::{Entry, batch};
use crate::{Subject, World};

#[track_caller]
fn equals_reference<S: Subject>(s: &S, world: &World, from: usize, out: &[f32]) {
    let (expected, _) = world.reference(s);
    let row = world.heads.query * world.heads.dim;
    let error = error(out, &expected[from * row..][..out.len()]);
    assert!(error <= s.tolerance(), "differs by {error:e}");
}

/// Off by one: does a window of W count the query itself? (transformers #29623, vLLM #3385, mlx-lm #390)
pub(crate) fn trap_01_window_counts_the_query_itself<S: Subject>(s: &S) {
    let world = World::new(1, 1, s.dim(16), &[(0, 1)], 80);
    let own = world.stored_values(s);
    for chunks in [&[80][..], &[1; 80]] {
        let error = error(&world.run(s, chunks).out, &own);
        assert!(error <= 1e-6, "differs by {error:e}");
    }
    let two = World::new(1, 1, s.dim(16), &[(0, 2)], 80);
    equals_reference(s, &two, 0, &two.run(s, &[40, 1, 1, 38]).out);
}

/// A ring's multi-token append overwrites keys that the chunk's first queries still need (candle's
/// RotatingKvCache).
pub(crate) fn trap_02_chunk_sees_keys_that_it_pushes_out<S: Subject>(s: &S) {
    for chunk in [2, 7, 8, 9, 20, 70] {
        let world = World::new(4, 2, s.dim(16), &[(2, 8), (0, 33)], 50 + chunk);
        let mut cache = world.open(s, world.tokens, 0);
        world.extend(s, &mut cache, 0..50).unwrap();
        let output = world.extend(s, &mut cache, 50..50 + chunk).unwrap();
        equals_reference(s, &world, 50, &output.out);
    }
}

/// A wrapped ring is reused as a prefix, cut by logical length: silent corruption (TensorRT-LLM
/// #2983, mlx-vlm #1715, vllm-mlx #775).
pub(crate) fn trap_03_prefix_reuse_of_a_wrapped_ring<S: Subject>(s: &S) {
    let world = World::new(2, 1, s.dim(16), &[(2, 8)], 60);
    let mut prefix = world.open(s, 60, 0);
    world.extend(s, &mut prefix, 0..37).unwrap();
    let mut fork = s.backend().fork(&prefix).unwrap();
    let output = world.run_in(s, &mut fork, 37, &[20, 1, 1, 1]);
    equals_reference(s, &world, 37, &output.out);
    // Sequences that differ after 20 tokens share only what is still held: an error, not a guess.
    assert!(s.backend().truncate(&mut prefix, 20).is_err());
    assert_eq!(prefix.as_ref().len(), 37);
}

/// Speculative rollback of a ring goes wrong only once the prompt has wrapped (mlx-lm #1914).
pub(crate) fn trap_04_speculative_rollback_of_a_wrapped_ring<S: Subject>(s: &S) {
    for prompt in [3, 8, 9, 10, 11, 40, 41] {
        let world = World::new(2, 1, s.dim(16), &[(2, 8)], prompt + 20);
        let draft = World { seed: 77, ..world.clone() };
        let mut cache = world.open(s, world.tokens, 5);
        world.extend(s, &mut cache, 0..prompt).unwrap();
        let mut at = prompt;
        for accepted in [0, 1, 4, 3, 2] {
            let mut out = world.run_in(s, &mut cache, at, &vec![1; accepted]).out;
            draft.extend(s, &mut cache, at + accepted..at + 5).unwrap();
            s.backend().truncate(&mut cache, at + accepted).unwrap();
            out.extend(world.extend(s, &mut cache, at + accepted..at + accepted + 1).unwrap().out);
            equals_reference(s, &world, at, &out);
            at += accepted + 1;
        }
    }
}

/// The decode kernel ignores the window (mistral.rs #2094).
pub(crate) fn trap_05_decode_respects_the_window<S: Subject>(s: &S) {
    // Also with a ring that is larger than the window.
    for slack in [0, 30] {
        let world = World::new(4, 2, s.dim(24), &[(3, 9), (0, 60)], 140);
        let mut cache = world.open(s, 140, slack);
        world.extend(s, &mut cache, 0..60).unwrap();
        let output = world.run_in(s, &mut cache, 60, &[1; 80]);
        equals_reference(s, &world, 60, &output.out);
    }
}

/// Compute is masked, but the memory is not saved (nanochat #825, head-wise presses of kvpress).
pub(crate) fn trap_06_memory_is_as_small_as_the_spans<S: Subject>(s: &S) {
    let dense = World::new(2, 2, s.dim(32), &[(0, 4096), (0, 4096)], 4096);
    let sparse = World::new(2, 2, s.dim(32), &[(16, 240), (16, 1008)], 4096);
    let (dense, sparse) = (dense.open(s, 4096, 0), sparse.open(s, 4096, 0));
    let (dense, sparse) = (s.backend().bytes(&dense), s.backend().bytes(&sparse));
    assert_eq!(dense * (256 + 1024), sparse * 2 * 4096);
}

/// The update is wrong when the length equals the window (transformers #37574).
pub(crate) fn trap_07_length_equal_to_window<S: Subject>(s: &S) {
    for len in 6..=13 {
        for more in [1, 2, 6] {
            let world = World::new(2, 1, s.dim(8), &[(2, 8)], len + more + 3);
            let mut cache = world.open(s, world.tokens, 0);
            world.extend(s, &mut cache, 0..len).unwrap();
            let output = world.run_in(s, &mut cache, len, &[more, 1, 2]);
            equals_reference(s, &world, len, &output.out);
        }
    }
}

/// State leaks from one generation into the next (burn-lm).
pub(crate) fn trap_08_no_state_leaks_into_the_next_sequence<S: Subject>(s: &S) {
    let first = World::new(4, 2, s.dim(16), &[(2, 8), (0, 200)], 150);
    let second = World { tokens: 40, seed: 9, ..first.clone() };
    let mut cache = first.open(s, 150, 0);
    first.run_in(s, &mut cache, 0, &[100, 1, 49]);
    s.backend().truncate(&mut cache, 0).unwrap();
    let output = second.run_in(s, &mut cache, 0, &[30, 1, 9]);
    equals_reference(s, &second, 0, &output.out);
}

/// A kernel reads row 0's lengths for every row of the batch (the original MoA decode kernel).
pub(crate) fn trap_11_every_row_of_a_batch_has_its_own_length<S: Subject>(s: &S) {
    let lens = [150, 1, 64, 11, 9];
    let worlds: Vec<World> = lens
        .iter()
        .map(|&len| World {
            seed: len as u64,
            ..World::new(4, 2, s.dim(16), &[(2, 8), (0, 500)], len + 1)
        })
        .collect();
    let mut caches: Vec<_> = worlds.iter().map(|w| w.open(s, w.tokens, 0)).collect();
    for ((world, cache), len) in worlds.iter().zip(&mut caches).zip(lens) {
        world.extend(s, cache, 0..len).unwrap();
    }
    let mut entries: Vec<Entry<'_, S>> = worlds
        .iter()
        .zip(&mut caches)
        .zip(lens)
        .map(|((world, cache), len)| Entry { world, cache, range: len..len + 1 })
        .collect();
    for ((world, output), len) in worlds.iter().zip(batch(s, &mut entries).unwrap()).zip(lens) {
        equals_reference(s, world, len, &output.out);
    }
}

/// The result depends on the batch or on the number of splits (flash-attention #2604, flashinfer
/// #1675). The history is long enough for several splits.
pub(crate) fn trap_12_result_does_not_depend_on_the_batch<S: Subject>(s: &S) {
    let world = World::new(4, 2, s.dim(16), &[(0, 4000), (4, 700)], 2003);
    let mut original = world.open(s, 2003, 0);
    world.extend(s, &mut original, 0..2000).unwrap();
    for tokens in [1, 3] {
        let range = 2000..2000 + tokens;
        let alone =
            world.extend(s, &mut s.backend().fork(&original).unwrap(), range.clone()).unwrap();
        let mut forks: Vec<_> = (0..9).map(|_| s.backend().fork(&original).unwrap()).collect();
        let mut entries: Vec<Entry<'_, S>> = forks
            .iter_mut()
            .map(|cache| Entry { world: &world, cache, range: range.clone() })
            .collect();
        for (number, together) in batch(s, &mut entries).unwrap().iter().enumerate() {
            let off = error(&together.out, &f64s(&alone.out));
            assert!(
                alone == *together,
                "{tokens} new tokens: sequence {number} of 9 has other bits than alone, off by {off:e}"
            );
        }
        let one_by_one =
            world.run_in(s, &mut s.backend().fork(&original).unwrap(), 2000, &vec![1; tokens]);
        close(&alone.out, &one_by_one.out, s.same());
    }
}
