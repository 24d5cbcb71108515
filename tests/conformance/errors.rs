//! Bad calls are refused with an error and change nothing.

use moa_core::{Append, ExtendInputs, SparseAttentionBackend};

use super::TestBackend;
use super::world::World;

pub(crate) fn wrong_shapes_are_refused<T: TestBackend>(t: &T) {
    let world = World::new(4, 2, t.dim(8), &[(0, 10), (0, 10)], 3);
    let mut cache = world.open(t, 10, 0);
    let mut second = world.open(t, 10, 0);
    let mut call = |tokens: &[usize], q: &[usize], k: &[usize], v: &[usize]| {
        let tensor = |shape: &[usize]| t.tensor(&vec![0.5; shape.iter().product()], shape);
        let (q, k, v) = (tensor(q), tensor(k), tensor(v));
        let inputs = ExtendInputs { q: &q, k: &k, v: &v, scale: 1.0, lse: false };
        let caches = [&mut cache, &mut second].into_iter().zip(tokens);
        let mut batch: Vec<_> = caches.map(|(cache, &tokens)| Append { cache, tokens }).collect();
        let result = t.backend().extend(&mut batch, &inputs);
        assert!(batch.iter().all(|b| (*b.cache).as_ref().is_empty()) || result.is_ok());
        result.is_ok()
    };
    let d = t.dim(8);
    let (q, kv) = ([3, 4, d], [3, 2, d]);
    assert!(!call(&[2], &q, &kv, &kv), "token counts do not add up");
    assert!(!call(&[], &q, &kv, &kv), "no sequence");
    assert!(!call(&[3, 0], &q, &kv, &kv), "no token");
    assert!(!call(&[3], &[3, 4 * d], &kv, &kv), "rank of q");
    assert!(!call(&[3], &q, &[6, d], &kv), "rank of k");
    assert!(!call(&[3], &q, &[3, 3, d], &[3, 3, d]), "group is not whole");
    assert!(!call(&[3], &q, &[3, 1, d], &[3, 1, d]), "KV heads of the cache");
    assert!(!call(&[3], &[3, 4, d / 2], &[3, 2, d / 2], &[3, 2, d / 2]), "head dim of the cache");
    assert!(!call(&[3], &q, &kv, &[3, 2, d / 2]), "v is not k's shape");
    assert!(!call(&[3], &q, &[2, 2, d], &[2, 2, d]), "tokens of k");
    assert!(call(&[3], &q, &kv, &kv));
}

pub(crate) fn capacity_is_an_error_and_changes_nothing<T: TestBackend>(t: &T) {
    let world = World::new(2, 1, t.dim(8), &[(0, 4)], 8);
    let mut cache = world.open(t, 6, 0);
    world.extend(t, &mut cache, 0..5).unwrap();
    let error = world.extend(t, &mut cache, 5..7).unwrap_err().to_string();
    assert!(error.contains('5') && error.contains('6') && error.contains('2'), "{error}");
    assert_eq!(cache.as_ref().len(), 5);
    world.extend(t, &mut cache, 5..6).unwrap();
}

pub(crate) fn rollback_of_evicted_keys_is_an_error<T: TestBackend>(t: &T) {
    let world = World::new(2, 1, t.dim(8), &[(1, 4)], 20);
    let mut cache = world.open(t, 20, 2);
    world.extend(t, &mut cache, 0..15).unwrap();
    assert!(t.backend().truncate(&mut cache, 16).is_err(), "longer than the sequence");
    assert!(t.backend().truncate(&mut cache, 11).is_err(), "evicted");
    assert_eq!(cache.as_ref().len(), 15);
    t.backend().truncate(&mut cache, 12).unwrap();
    assert_eq!(cache.as_ref().len(), 12);
}
