//! Bad calls are refused with an error and change nothing.

use moa_core::{CacheType, SparseAttentionBackend};

use crate::world::extend;
use crate::{Subject, World};

pub(crate) fn wrong_shapes_are_refused<S: Subject>(s: &S) {
    let world = World::new(4, 2, s.dim(8), &[(0, 10), (0, 10)], 3);
    let mut cache = world.open(s, 10, 0);
    let mut second = world.open(s, 10, 0);
    let mut call = |tokens: &[usize], q: &[usize], k: &[usize], v: &[usize]| {
        let [q, k, v] = [q, k, v].map(|shape| s.tensor(&vec![0.5; shape.iter().product()], shape));
        let caches = [&mut cache, &mut second].into_iter().zip(tokens.iter().copied());
        let result = extend(s, caches, [&q, &k, &v], 1.0, false);
        assert!(result.is_ok() || (cache.as_ref().len(), second.as_ref().len()) == (0, 0));
        result.is_ok()
    };
    let d = s.dim(8);
    let (q, kv) = ([3, 4, d], [3, 2, d]);
    assert!(!call(&[], &q, &kv, &kv), "no cache");
    assert!(!call(&[2], &q, &kv, &kv), "token counts do not add up");
    assert!(!call(&[3, 1], &q, &kv, &kv), "token counts of two caches do not add up");
    assert!(!call(&[3, 0], &q, &kv, &kv), "no token");
    assert!(!call(&[3], &[3, 4 * d], &kv, &kv), "rank of q");
    assert!(!call(&[3], &q, &[6, d], &kv), "rank of k");
    assert!(!call(&[3], &q, &[3, 3, d], &[3, 3, d]), "group is not whole");
    assert!(!call(&[3], &q, &[3, 1, d], &[3, 1, d]), "KV heads of the cache");
    let half = d / 2;
    assert!(!call(&[3], &[3, 4, half], &[3, 2, half], &[3, 2, half]), "head dim of the cache");
    assert!(!call(&[3], &q, &kv, &[3, 2, half]), "v is not k's shape");
    assert!(!call(&[3], &q, &[2, 2, d], &[2, 2, d]), "tokens of k");
    assert!(call(&[3], &q, &kv, &kv));
}

pub(crate) fn capacity_is_an_error_and_changes_nothing<S: Subject>(s: &S) {
    let world = World::new(2, 1, s.dim(8), &[(0, 4)], 8);
    let mut cache = world.open(s, 6, 0);
    world.extend(s, &mut cache, 0..5).unwrap();
    let error = world.extend(s, &mut cache, 5..7).unwrap_err();
    let named = matches!(
        s.core_error(&error),
        Some(moa_core::Error::CapacityExceeded { len: 5, more: 2, capacity: 6 })
    );
    assert!(named, "{error}");
    assert_eq!(cache.as_ref().len(), 5);
    world.extend(s, &mut cache, 5..6).unwrap();
}

pub(crate) fn rollback_of_evicted_keys_is_an_error<S: Subject>(s: &S) {
    let world = World::new(2, 1, s.dim(8), &[(1, 4)], 20);
    let mut cache = world.open(s, 20, 2);
    world.extend(s, &mut cache, 0..15).unwrap();
    assert!(s.backend().truncate(&mut cache, 16).is_err(), "longer than the sequence");
    let error = s.backend().truncate(&mut cache, 11).unwrap_err();
    let evicted = matches!(s.core_error(&error), Some(moa_core::Error::Evicted { to: 11, .. }));
    assert!(evicted, "{error}");
    assert_eq!(cache.as_ref().len(), 15);
    s.backend().truncate(&mut cache, 12).unwrap();
    assert_eq!(cache.as_ref().len(), 12);
}

pub(crate) fn types_that_are_lacked_are_refused<S: Subject>(s: &S) {
    for wanted in CacheType::ALL {
        let types = vec![None, Some(wanted)];
        let world = World { types, ..World::new(2, 2, s.dim(8), &[(0, 4), (0, 4)], 8) };
        let has = s.cache_types().contains(&wanted) || s.backend().has_cache_type(wanted);
        match s.backend().open(&world.layout(8, 0), world.heads.dim) {
            Ok(_) => assert!(has, "{wanted} is taken"),
            Err(error) => {
                let named = matches!(
                    s.core_error(&error),
                    Some(moa_core::Error::CacheType { cache_type, head: Some(1), .. })
                        if *cache_type == wanted
                );
                assert!(named && !has, "{wanted}: {error}");
            }
        }
    }
}
