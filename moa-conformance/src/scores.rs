//! Softcaps and learned sinks: what scores are, and what is in the softmax beside them.

use moa_core::{Append, ExtendInputs, Scores, SparseAttentionBackend};
use proptest::prelude::*;

use crate::cases::{check, chunked_worlds, is_right_in_any_cut_and_company};
use crate::numbers::{close, error};
use crate::world::Output;
use crate::{Stop, Subject, Verdict, World};

/// From ones that bound nearly every score to one that bounds none.
const SOFTCAPS: [f32; 5] = [0.25, 1.0, 3.0, 50.0, 1e6];

pub(crate) fn softcap_equals_the_reference<S: Subject>(s: &S) -> Verdict {
    equals_the_reference(s, true, false)
}

pub(crate) fn sinks_equal_the_reference<S: Subject>(s: &S) -> Verdict {
    equals_the_reference(s, false, true)
}

pub(crate) fn softcap_and_sinks_equal_the_reference<S: Subject>(s: &S) -> Verdict {
    equals_the_reference(s, true, true)
}

/// In caches of the backend's own type and of others, in chunks and in one, and bitwise the same in a batch.
fn equals_the_reference<S: Subject>(s: &S, capped: bool, has_sinks: bool) -> Verdict {
    offered(s, capped, has_sinks)?;
    let softcaps = proptest::sample::select(&SOFTCAPS);
    check(12, (chunked_worlds(s), softcaps, any::<bool>()), |((world, chunks), cap, typed)| {
        let world = World { softcap: capped.then_some(cap), has_sinks, ..world };
        let world = if typed { world.of_types(s) } else { world };
        let (most, same) = match s.typed_tolerance() {
            Some(most) if typed => (most, most),
            _ => (s.tolerance(), s.same()),
        };
        is_right_in_any_cut_and_company(s, &world, &chunks, most, same);
    });
    // A history that is long enough for several splits.
    let world = World::new(4, 2, s.dim(16), &[(0, 4000), (4, 700)], 2003);
    let world = World { softcap: capped.then_some(2.0), has_sinks, ..world };
    let row = world.heads.query * world.heads.dim;
    let (out, lse) = world.reference(s);
    let mut cache = world.open(s, world.tokens, 0);
    world.extend(s, &mut cache, 0..2000).unwrap();
    for chunks in [&[3][..], &[1, 2]] {
        let mut fork = s.backend().fork(&cache).unwrap();
        let found = world.run_in(s, &mut fork, 2000, chunks);
        let d_out = error(&found.out, &out[2000 * row..]);
        let d_lse = error(&found.lse, &lse[2000 * world.heads.query..]);
        let most = s.tolerance();
        assert!(d_out <= most && d_lse <= most, "long: out {d_out:e}, lse {d_lse:e}");
    }
    Ok(())
}

/// A sink of minus infinity changes nothing, a large one takes all of the weight.
pub(crate) fn sinks_at_the_ends<S: Subject>(s: &S) -> Verdict {
    offered(s, false, true)?;
    let world = World::new(2, 1, s.dim(8), &[(0, 30)], 40);
    for chunk in [40, 1] {
        let run = |sink: Option<[f32; 2]>| {
            let sinks = sink.map(|sinks| s.lse(&sinks, &[2]));
            let mut cache = world.open(s, 40, 0);
            let mut all = Output::default();
            for start in (0..40).step_by(chunk) {
                let part = |x: Vec<f32>, heads: usize| {
                    let row = heads * world.heads.dim;
                    let rows = &x[start * row..(start + chunk) * row];
                    s.tensor(rows, &[chunk, heads, world.heads.dim])
                };
                let (q, k, v) = (part(world.q(), 2), part(world.k(), 1), part(world.v(), 1));
                let scores = Scores { sinks: sinks.as_ref(), ..Scores::from(world.scale()) };
                let inputs = ExtendInputs { lse: true, ..ExtendInputs::new(&q, &k, &v, scores) };
                let mut batch = [Append { cache: &mut cache, tokens: chunk }];
                let extended = s.backend().extend(&mut batch, &inputs).unwrap();
                all.out.extend(s.host(&extended.out));
                all.lse.extend(s.host(&extended.lse.expect("lse was asked for")));
            }
            all
        };
        let plain = run(None);
        let ends = run(Some([f32::NEG_INFINITY, 1e4]));
        for (head, (out, plain)) in
            ends.out.chunks(world.heads.dim).zip(plain.out.chunks(world.heads.dim)).enumerate()
        {
            match head % 2 {
                0 => close(out, plain, s.same()),
                _ => assert!(out.iter().all(|x| x.abs() <= 1e-30), "beside a sink of 1e4: {out:?}"),
            }
        }
        let of_head = |head: usize, lse: &[f32]| -> Vec<f32> {
            lse.iter().skip(head).step_by(2).copied().collect()
        };
        close(&of_head(0, &ends.lse), &of_head(0, &plain.lse), s.same());
        close(&of_head(1, &ends.lse), &[1e4; 40], s.same());
    }
    Ok(())
}

pub(crate) fn wrong_softcaps_and_sinks_are_refused<S: Subject>(s: &S) -> Verdict {
    let d = s.dim(8);
    let world = World::new(4, 2, d, &[(0, 10), (0, 10)], 3);
    let mut cache = world.open(s, 10, 0);
    let (q, kv) =
        (s.tensor(&vec![0.5; 12 * d], &[3, 4, d]), s.tensor(&vec![0.5; 6 * d], &[3, 2, d]));
    let mut refused = |softcap: Option<f32>, sinks: Option<&S::Tensor>, named: &str| {
        let scores = Scores { softcap, sinks, ..Scores::from(1.0) };
        let mut batch = [Append { cache: &mut cache, tokens: 3 }];
        let result = s.backend().extend(&mut batch, &ExtendInputs::new(&q, &kv, &kv, scores));
        let Err(error) = result else { panic!("{named} is taken: {softcap:?}") };
        assert_eq!(cache.as_ref().len(), 0);
        let unsupported = matches!(s.core_error(&error), Some(moa_core::Error::Unsupported { .. }));
        assert!(unsupported || error.to_string().contains(named), "{named}: {error}");
    };
    for softcap in [0.0, -1.0, 1e-30, 1e30, f32::INFINITY, f32::NEG_INFINITY, f32::NAN] {
        refused(Some(softcap), None, "softcap");
    }
    for shape in [&[3][..], &[2], &[5], &[4, 1], &[2, 2]] {
        let sinks = s.lse(&vec![0.5; shape.iter().product()], shape);
        refused(None, Some(&sinks), "sinks");
    }
    Ok(())
}

/// Ignores the trial of a backend that has not these scores.
fn offered<S: Subject>(s: &S, capped: bool, has_sinks: bool) -> Verdict {
    let world = World::new(1, 1, s.dim(8), &[(0, 3)], 3);
    let world = World { softcap: capped.then_some(1.0), has_sinks, ..world };
    match world.extend(s, &mut world.open(s, 3, 0), 0..3) {
        Ok(_) => Ok(()),
        Err(error) => match s.core_error(&error) {
            Some(unsupported @ moa_core::Error::Unsupported { .. }) => {
                Err(Stop::ignored(unsupported))
            }
            _ => Err(error.into()),
        },
    }
}
