//! Keys of 4 bits with feedback: codes that make up for one another.

use moa_core::{Append, CacheType, ExtendInputs, SparseAttentionBackend};

use crate::cases::{check, chunked_worlds, is_right_in_any_cut_and_company};
use crate::numbers::error;
use crate::{Stop, Subject, Verdict, World};

/// Also where a query sees two keys alone, so that one code that differs is seen, and bitwise in a batch with others.
pub(crate) fn keys_with_feedback_equal_the_reference<S: Subject>(s: &S) -> Verdict {
    offered(s)?;
    let (most, same) = match s.typed_tolerance() {
        Some(most) => (most, most),
        None => (s.tolerance(), s.same()),
    };
    check(24, chunked_worlds(s), |(world, chunks)| {
        let world = of_4_bits(s, world);
        is_right_in_any_cut_and_company(s, &world, &chunks, most, same);
    });
    let dims = s.dims().iter().filter(|dim| **dim >= 16);
    for &dim in dims {
        let world = of_4_bits(s, World::new(2, 1, dim, &[(0, 2)], 400));
        let (out, lse) = world.reference(s);
        let found = world.run(s, &[399, 1]);
        let (d_out, d_lse) = (error(&found.out, &out), error(&found.lse, &lse));
        assert!(d_out <= most && d_lse <= most, "{dim}: {d_out:e} {d_lse:e}");
        let without = World { has_feedback: false, ..world.clone() };
        let missed = error(&found.out, &without.reference(s).0);
        assert!(missed > 10.0 * most, "{dim}: feedback changes {missed:e} alone");
    }
    Ok(())
}

pub(crate) fn wrong_feedback_is_refused<S: Subject>(s: &S) {
    let d = s.dim(8);
    let world = World::new(4, 2, d, &[(0, 10), (0, 10)], 3);
    let mut cache = world.open(s, 10, 0);
    let (q, kv) =
        (s.tensor(&vec![0.5; 12 * d], &[3, 4, d]), s.tensor(&vec![0.5; 6 * d], &[3, 2, d]));
    for shape in [&[2 * d, d][..], &[1, d, d], &[4, d, d], &[2, d, d + 1], &[2, d * d]] {
        let feedback = s.lse(&vec![0.0; shape.iter().product()], shape);
        let key_feedback = Some(&feedback);
        let inputs = ExtendInputs { key_feedback, ..ExtendInputs::new(&q, &kv, &kv, 1.0) };
        let mut batch = [Append { cache: &mut cache, tokens: 3 }];
        let Err(error) = s.backend().extend(&mut batch, &inputs) else {
            panic!("feedback is taken: {shape:?}");
        };
        assert_eq!(cache.as_ref().len(), 0);
        assert!(error.to_string().contains("key_feedback"), "{error}");
    }
}

/// The same world with feedback, whose heads are in 4 and in 8 bits.
fn of_4_bits<S: Subject>(s: &S, world: World) -> World {
    let wanted = [CacheType::Int4, CacheType::Int8];
    let types: Vec<_> = wanted.into_iter().filter(|own| s.cache_types().contains(own)).collect();
    let types = (0..world.heads.kv).map(|head| Some(types[head % types.len()])).collect();
    World { types, has_feedback: true, ..world }
}

/// Ignores the trial of a backend that has no keys of 4 bits.
fn offered<S: Subject>(s: &S) -> Verdict {
    match s.cache_types().contains(&CacheType::Int4) {
        true => Ok(()),
        false => Err(Stop::ignored("no head can have keys of 4 bits")),
    }
}
