//! The laws of a sequence: its output does not depend on chunks, batch, spare room or history.

use moa_core::{ElasticRule, Plan};
use moa_models::{
    Cpu, Decoder, EngineOptions, Error, GenerateOptions, LogitRows, Result, SamplingOptions,
    Sequence, Weights,
};
use proptest::prelude::*;

use crate::{
    alternating, chunked, continued, engine, full, greedy, largest_difference, likeliest, moa_tiny,
    narrow, read, step, text, tiny,
};

#[test]
fn plans_with_full_spans_equal_dense_attention_token_for_token() -> Result<()> {
    let prompt = text(160);
    let shape = tiny().shape();
    let dense = continued(&full(), &prompt, &greedy(32))?;
    assert_eq!(dense.len(), 32);
    let heads: Vec<_> =
        (0..shape.layers).flat_map(|l| (0..shape.kv_heads).map(move |h| (l, h))).collect();
    for plan in [
        Plan::retrieval_heads(shape, 16, 8, &heads)?,
        Plan::uniform(shape, 64, ElasticRule::new(1e6, 0.0)?)?,
        // A window of exactly the context: nothing is hidden, nothing wraps.
        Plan::uniform(shape, 0, ElasticRule::fixed(192))?,
    ] {
        assert_eq!(plan.density(192), 1.0);
        assert_eq!(continued(&plan, &prompt, &greedy(32))?, dense);
    }
    // The comparison would be empty if spans were ignored.
    let local = Plan::uniform(shape, 4, ElasticRule::fixed(12))?;
    assert_ne!(continued(&local, &prompt, &greedy(32))?, dense);
    Ok(())
}

#[test]
fn chunking_does_not_change_output() -> Result<()> {
    let prompt = text(140);
    let mut whole = tiny().open(&narrow(), 156, 0)?;
    let expected = read(&mut whole, &prompt, prompt.len())?;
    let tokens = continued(&narrow(), &prompt, &greedy(16))?;
    for chunk in [1, 7, 64] {
        let mut sequence = tiny().open(&narrow(), 156, 0)?;
        let logits = read(&mut sequence, &prompt, chunk)?;
        assert_eq!(sequence.len(), prompt.len());
        let difference = largest_difference(&logits, &expected);
        assert!(difference < 1e-4, "chunks of {chunk}: {difference}");
        let mut engine = chunked(chunk);
        engine.submit(&prompt[..], &narrow(), greedy(16));
        assert_eq!(engine.complete_all()?[0].tokens, tokens, "chunks of {chunk}");
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 12, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn cuts_batch_mates_and_slack_do_not_change_output(
        cuts in prop::collection::vec(1usize..30, 1..6),
        (sink, odd, even) in (0usize..6, 8usize..40, 8usize..40),
        slack in 0usize..9,
        mate in 1usize..40,
    ) {
        let total: usize = cuts.iter().sum();
        let tokens = text(total + mate);
        let plan = alternating(tiny().shape(), sink, odd, even);
        let mut alone = tiny().open(&plan, 160, 0).unwrap();
        let expected = read(&mut alone, &tokens[..total], total).unwrap();

        let mut cut = tiny().open(&plan, 160, slack).unwrap();
        let mut other = tiny().open(&plan, 160, 0).unwrap();
        let mut logits = Vec::new();
        let mut start = 0;
        for (i, len) in cuts.iter().enumerate() {
            let part = &tokens[start..start + len];
            start += len;
            logits = match i {
                0 => {
                    let both = tiny()
                        .forward(&mut [&mut other, &mut cut], &[&tokens[total..], part], LogitRows::Last)
                        .unwrap()
                        .into_data();
                    both[both.len() / 2..].to_vec()
                }
                _ => read(&mut cut, part, *len).unwrap(),
            };
        }
        let difference = largest_difference(&logits, &expected);
        prop_assert!(difference < 2e-4, "{difference}");
    }
}

#[test]
fn a_ragged_batch_gives_each_prompt_what_it_gets_alone() -> Result<()> {
    let source = text(200);
    let prompts: [&[u32]; 3] = [&source[..33], &source[40..180], &source[9..80]];
    let new = 12;
    for plan in [full(), narrow()] {
        for temperature in [0.0, 0.9] {
            let options = |seed| {
                let sampling = SamplingOptions { temperature, seed, ..Default::default() };
                GenerateOptions { sampling, ..greedy(new) }
            };
            let mut engine = engine(EngineOptions::default());
            for (seed, prompt) in (40..).zip(prompts) {
                engine.submit(prompt, &plan, options(seed));
            }
            let together = engine.complete_all()?;
            for ((seed, prompt), together) in (40..).zip(prompts).zip(together) {
                let alone = continued(&plan, prompt, &options(seed))?;
                assert_eq!(together.tokens, alone, "seed {seed}, temperature {temperature}");
            }
        }
    }
    Ok(())
}

#[test]
fn a_fork_goes_its_own_way() -> Result<()> {
    let tokens = text(150);
    for plan in [full(), narrow()] {
        let mut untouched = tiny().open(&plan, 160, 0)?;
        read(&mut untouched, &tokens[..100], 100)?;
        let expected = read(&mut untouched, &tokens[100..110], 10)?;

        let mut original = tiny().open(&plan, 160, 0)?;
        read(&mut original, &tokens[..100], 100)?;
        let mut fork = tiny().fork(&original)?;
        assert_eq!((fork.len(), fork.capacity()), (100, 160));
        assert_eq!(tiny().kv_bytes(&fork), tiny().kv_bytes(&original));
        read(&mut fork, &tokens[110..150], 40)?;
        assert_eq!((fork.len(), original.len()), (140, 100));
        assert_eq!(read(&mut original, &tokens[100..110], 10)?, expected);

        // And the fork that follows its original gets the same.
        let mut first = tiny().open(&plan, 160, 0)?;
        read(&mut first, &tokens[..100], 100)?;
        let mut second = tiny().fork(&first)?;
        read(&mut first, &tokens[110..150], 40)?;
        drop(first);
        assert_eq!(read(&mut second, &tokens[100..110], 10)?, expected);
    }
    Ok(())
}

#[test]
fn tokens_rolled_back_within_the_slack_leave_no_trace() -> Result<()> {
    let tokens = text(140);
    let (draft, next) = (&tokens[120..128], &tokens[130..140]);
    for (plan, slack) in [(full(), 0), (narrow(), 7)] {
        let mut straight = tiny().open(&plan, 140, slack)?;
        read(&mut straight, &tokens[..120], 64)?;
        let expected = read(&mut straight, next, next.len())?;

        let mut sequence = tiny().open(&plan, 140, slack)?;
        read(&mut sequence, &tokens[..120], 64)?;
        read(&mut sequence, draft, draft.len())?;
        // A ring that has wrapped goes back by its slack and one.
        tiny().truncate(&mut sequence, 120)?;
        assert_eq!(sequence.len(), 120);
        assert_eq!(read(&mut sequence, next, next.len())?, expected);
    }
    Ok(())
}

#[track_caller]
fn evicted(result: Result<()>, len: usize) {
    match result {
        Err(Error::Core(moa_core::Error::Evicted { to, needed, oldest_held })) => {
            assert_eq!(to, len);
            assert!(needed < oldest_held, "{needed} is still held from {oldest_held} on");
        }
        other => panic!("expected an eviction, got {other:?}"),
    }
}

#[test]
fn truncating_past_what_a_ring_holds_changes_nothing() -> Result<()> {
    let tokens = text(140);
    let shape = tiny().shape();
    // Only the top layer forgets, so the layers before it could truncate.
    let top = (shape.layers - 1, 1);
    let mixed = full().with_rule(top.0, top.1, ElasticRule::fixed(32).into())?;
    for plan in [narrow(), mixed] {
        let mut untouched = tiny().open(&plan, 140, 4)?;
        read(&mut untouched, &tokens[..120], 120)?;
        let expected = read(&mut untouched, &tokens[120..], 20)?;

        let mut sequence = tiny().open(&plan, 140, 4)?;
        read(&mut sequence, &tokens[..120], 120)?;
        evicted(tiny().truncate(&mut sequence, 114), 114);
        evicted(tiny().truncate(&mut sequence, 60), 60);
        let longer = tiny().truncate(&mut sequence, 121);
        assert!(matches!(longer, Err(Error::Core(moa_core::Error::Invalid { .. }))), "{longer:?}");
        assert_eq!(sequence.len(), 120);
        assert_eq!(read(&mut sequence, &tokens[120..], 20)?, expected);

        // From the start is always possible.
        tiny().truncate(&mut sequence, 0)?;
        assert!(sequence.is_empty());
        read(&mut sequence, &tokens[..120], 120)?;
        assert_eq!(read(&mut sequence, &tokens[120..], 20)?, expected);
    }
    Ok(())
}

// Only prompts that wrap the ring show a rollback that slices by logical length (mlx-lm #1914).
#[test]
fn speculative_decoding_equals_plain_decoding() -> Result<()> {
    for len in [20, 47, 48, 49, 130] {
        let prompt = text(len);
        let new = 10;
        let plain = continued(&narrow(), &prompt, &greedy(new))?;

        let mut sequence = tiny().open(&narrow(), len + new + 4, 3)?;
        let mut next = likeliest(&read(&mut sequence, &prompt, 64)?);
        let mut tokens = vec![next];
        while tokens.len() < new {
            // A draft of which only the first token, the one that is known already, is right.
            let draft = [next, 700, 701, 702];
            next = likeliest(&step(&mut sequence, &draft)?[0]);
            let back = sequence.len() - 3;
            tiny().truncate(&mut sequence, back)?;
            tokens.push(next);
        }
        // The capacity is not the same, but these spans do not depend on it.
        assert_eq!(tokens, plain, "prompt of {len}");
    }
    Ok(())
}

#[test]
fn refused_steps_change_nothing() -> Result<()> {
    let tokens = text(120);
    let fresh = |capacity| -> Result<Sequence<_>> {
        let mut sequence = tiny().open(&narrow(), capacity, 0)?;
        read(&mut sequence, &tokens[..100], 100)?;
        Ok(sequence)
    };
    let expected = read(&mut fresh(110)?, &tokens[100..110], 10)?;

    let mut sequence = fresh(110)?;
    let mut mate = fresh(120)?;
    let too_long = tiny().forward(
        &mut [&mut mate, &mut sequence],
        &[&[5], &tokens[100..111]],
        LogitRows::Last,
    );
    match too_long {
        Err(Error::Core(moa_core::Error::CapacityExceeded { len, more, capacity })) => {
            assert_eq!((len, more, capacity), (100, 11, 110));
        }
        other => panic!("{other:?}"),
    }
    let vocab = tiny().config().vocab_size as u32;
    let refused = [
        tiny()
            .forward(&mut [&mut mate, &mut sequence], &[&[5], &[7, vocab]], LogitRows::Last)
            .err(),
        tiny().forward(&mut [&mut mate, &mut sequence], &[&[5], &[]], LogitRows::Last).err(),
        tiny().forward(&mut [&mut mate, &mut sequence], &[&[5]], LogitRows::Last).err(),
        tiny()
            .forward(&mut [&mut mate, &mut sequence], &[&[5], &[6, 7]], LogitRows::Rows(&[3]))
            .err(),
        // The unknown token is in the second chunk.
        read(&mut sequence, &[5, 6, 7, vocab], 2).err(),
        read(&mut sequence, &[], 2).err(),
        read(&mut sequence, &[5], 0).err(),
    ];
    for (i, error) in refused.into_iter().enumerate() {
        assert!(matches!(error, Some(Error::Invalid { .. })), "{i}: {error:?}");
    }
    let too_long = read(&mut sequence, &tokens[100..111], 4);
    assert!(
        matches!(too_long, Err(Error::Core(moa_core::Error::CapacityExceeded { .. }))),
        "{too_long:?}"
    );

    assert_eq!((mate.len(), sequence.len()), (100, 100));
    assert_eq!(read(&mut mate, &tokens[100..110], 10)?, expected);
    assert_eq!(read(&mut sequence, &tokens[100..110], 10)?, expected);
    Ok(())
}

// burn-lm's state of one generation was left for the next.
#[test]
fn generations_leave_nothing_for_the_next() -> Result<()> {
    let (a, b) = (text(130), text(90));
    let first = continued(&narrow(), &a, &greedy(10))?;
    continued(&narrow(), &b[30..], &greedy(5))?;
    assert_eq!(continued(&narrow(), &a, &greedy(10))?, first);

    // Nor does a sequence that is used again from its start.
    let mut engine = engine(EngineOptions::default());
    let id = engine.resume(tiny().open(&narrow(), 140, 0)?, &b[30..], greedy(5));
    engine.complete_all()?;
    let mut sequence = engine.reclaim(id).expect("it was resumed");
    tiny().truncate(&mut sequence, 0)?;
    engine.resume(sequence, &a[..], greedy(10));
    assert_eq!(engine.complete_all()?[0].tokens, first);
    Ok(())
}

#[test]
fn a_session_equals_single_steps_and_refuses_what_they_refuse() -> Result<()> {
    let text = text(200);
    let vocab = tiny().config().vocab_size as u32;
    let open = |len: usize| {
        let mut sequence = tiny().open(&narrow(), len + 6, 0)?;
        read(&mut sequence, &text[..len], 100)?;
        Ok::<_, Error>(sequence)
    };
    let (together, mut alone) = (vec![open(120)?, open(31)?], [open(120)?, open(31)?]);
    let mut next = [7, 8];
    let mut session = tiny().session(together)?;
    for round in 0..6 {
        let mut expected = Vec::new();
        for (sequence, token) in alone.iter_mut().zip(next) {
            expected.extend(step(sequence, &[token])?);
        }
        let chosen: Vec<u32> = expected.iter().map(|row| likeliest(row)).collect();
        if round % 2 == 0 {
            let got = session.step(tiny(), &next)?;
            assert!(largest_difference(&got, &expected.concat()) < 1e-4);
        } else {
            assert_eq!(session.step_greedy(tiny(), &next)?, chosen);
        }
        next = [chosen[0], chosen[1]];
    }
    assert!(session.step(tiny(), &next).is_err(), "there is no room");
    assert_eq!(session.into_sequences().iter().map(|s| s.len()).collect::<Vec<_>>(), [126, 37]);
    let mut session = tiny().session(vec![open(20)?])?;
    for tokens in [&[vocab][..], &[1, 2], &[]] {
        assert!(session.step_greedy(tiny(), tokens).is_err(), "{tokens:?}");
    }
    assert_eq!(session.sequences()[0].len(), 20);
    assert!(!session.can_sample());
    let other =
        Decoder::load(Cpu::default(), tiny().config().clone(), &Weights::open(moa_tiny())?)?;
    let refused = session.step(&other, &[1]);
    assert!(matches!(refused, Err(Error::Invalid { what: "model", .. })), "{refused:?}");
    assert!(matches!(tiny().session(Vec::new()).err(), Some(Error::Invalid { what: "batch", .. })));
    Ok(())
}
