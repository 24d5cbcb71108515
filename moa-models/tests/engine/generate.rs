//! Generation as its caller sees it: stream, ends, errors, sampling.

use moa_models::{
    CpuOps, Error, Finish, GenerateOptions, GenerateProgress, Next, Result, SamplingOptions,
    Sequence, TextProgress,
};

use crate::{checkpoint, continued, full, greedy, narrow, read, step, text, tiny};

/// What `generate_text` made of `text(64)` with these options.
struct Told {
    pieces: Vec<String>,
    text: String,
    finish: Finish,
    tokens: Vec<u32>,
}

fn told(options: &GenerateOptions, stop: &[&str]) -> Result<Told> {
    let prompt = text(64);
    let stop: Vec<String> = stop.iter().map(|s| (*s).to_owned()).collect();
    let mut batch = [tiny().open(&full(), 128, 0)?];
    let mut pieces = Vec::new();
    let (mut completions, mut generation) =
        checkpoint().generate_text(&mut batch, &[&prompt], options, &stop, &mut |progress| {
            if let TextProgress::Text { sequence: 0, piece } = progress {
                pieces.push(piece.to_owned());
            }
            Next::Continue
        })?;
    let completion = completions.remove(0);
    let generated = generation.sequences.remove(0);
    assert_eq!(generated.finish, completion.finish);
    assert_eq!(pieces.concat(), completion.text, "pieces join to the text");
    Ok(Told { pieces, text: completion.text, finish: completion.finish, tokens: generated.tokens })
}

#[test]
fn pieces_join_to_the_text_and_the_text_is_that_of_the_tokens() -> Result<()> {
    let told = told(&greedy(40), &[])?;
    assert_eq!((told.tokens.len(), told.finish), (40, Finish::Length));
    assert_eq!(told.text, checkpoint().tokenizer.decode(&told.tokens, true)?);
    assert!(told.pieces.iter().filter(|p| !p.is_empty()).count() > 10, "{:?}", told.pieces);
    assert_eq!(told.tokens, continued(&full(), &text(64), &greedy(40))?);
    Ok(())
}

#[test]
fn a_stop_string_ends_the_text_and_is_not_in_it() -> Result<()> {
    let whole = told(&greedy(40), &[])?.text;
    // Across the borders of tokens.
    let middle: usize = whole.char_indices().nth(whole.chars().count() / 2).unwrap().0;
    let stop = &whole[middle..].chars().take(7).collect::<String>();
    let before = &whole[..whole.find(stop.as_str()).unwrap()];
    let told_ = told(&greedy(40), &["\u{1F999} never", stop])?;
    assert_eq!((told_.text.as_str(), told_.finish), (before, Finish::Stopped));
    assert!(told_.tokens.len() < 40);

    // What looked like a stop string until the end is part of the text.
    let almost = format!("{}\u{1F999}", &whole[whole.len() - 1..]);
    let told_ = told(&greedy(40), &[&almost])?;
    assert_eq!((told_.text, told_.finish), (whole, Finish::Length));
    assert!(matches!(told(&greedy(4), &[""]), Err(Error::Invalid { .. })));
    Ok(())
}

#[test]
fn an_end_token_ends_the_sequence_and_is_not_in_it() -> Result<()> {
    let tokens = continued(&full(), &text(64), &greedy(20))?;
    let eos = tokens[7];
    let first = tokens.iter().position(|t| *t == eos).unwrap();
    let told = told(&GenerateOptions { eos_token_ids: vec![8191, eos], ..greedy(20) }, &[])?;
    assert_eq!((&told.tokens[..], told.finish), (&tokens[..first], Finish::Eos));
    Ok(())
}

#[test]
fn max_new_tokens_is_kept() -> Result<()> {
    let tokens = continued(&full(), &text(64), &greedy(6))?;
    for n in [0, 1, 5] {
        let told = told(&greedy(n), &[])?;
        assert_eq!((&told.tokens[..], told.finish), (&tokens[..n], Finish::Length));
    }
    Ok(())
}

#[test]
fn a_sequence_that_is_full_ends() -> Result<()> {
    let prompt = text(64);
    let mut batch = [tiny().open(&full(), 66, 0)?];
    let generation =
        tiny().generate(&mut batch, &[&prompt], &greedy(50), &mut |_| Next::Continue)?;
    // The last token needs no room: nothing follows it.
    assert_eq!(
        (generation.sequences[0].tokens.len(), generation.sequences[0].finish),
        (3, Finish::Length)
    );
    assert_eq!((batch[0].len(), generation.prompt_tokens, generation.decoded_tokens), (66, 64, 2));
    Ok(())
}

#[test]
fn too_long_prompts_and_contexts_say_how_long() -> Result<()> {
    let prompt = text(64);
    let mut batch = [tiny().open(&full(), 60, 0)?];
    let error =
        tiny().generate(&mut batch, &[&prompt], &greedy(5), &mut |_| Next::Continue).unwrap_err();
    assert!(matches!(error, Error::ContextExceeded { asked: 64, limit: 60 }), "{error}");
    assert!(batch[0].is_empty());
    let error = tiny().open(&full(), 8193, 0).unwrap_err();
    assert!(matches!(error, Error::ContextExceeded { asked: 8193, limit: 8192 }), "{error}");
    assert!(matches!(
        tiny().open(&full(), 0, 0),
        Err(Error::Core(moa_core::Error::Invalid { .. }))
    ));
    Ok(())
}

#[test]
fn bad_arguments_are_refused_before_anything_is_read() -> Result<()> {
    let (prompt, vocab) = (text(8), tiny().config().vocab_size as u32);
    let sampling = |sampling| GenerateOptions { sampling, ..greedy(3) };
    let hot = sampling(SamplingOptions { temperature: f32::NAN, ..Default::default() });
    let no_chunk = GenerateOptions { prefill_chunk: 0, ..greedy(3) };
    let unknown = [vocab];
    let cases: [(&[&[u32]], &GenerateOptions); 5] = [
        (&[&prompt, &[]], &greedy(3)),
        (&[&prompt], &greedy(3)),
        (&[&prompt, &unknown], &greedy(3)),
        (&[&prompt, &prompt], &hot),
        (&[&prompt, &prompt], &no_chunk),
    ];
    for (i, (prompts, options)) in cases.into_iter().enumerate() {
        let mut batch = [tiny().open(&full(), 20, 0)?, tiny().open(&full(), 20, 0)?];
        let error =
            tiny().generate(&mut batch, prompts, options, &mut |_| Next::Continue).unwrap_err();
        assert!(matches!(error, Error::Invalid { .. }), "{i}: {error}");
        assert!(batch.iter().all(Sequence::is_empty), "{i}");
    }
    Ok(())
}

#[test]
fn a_plan_for_another_model_is_refused() {
    let mut shape = tiny().shape();
    shape.layers += 1;
    let plan = moa_core::Plan::full(shape).unwrap();
    let error = tiny().open(&plan, 20, 0).unwrap_err();
    assert!(matches!(error, Error::Core(moa_core::Error::ShapeMismatch { .. })), "{error}");
    let other = full().with_fingerprint(Some("of other weights".into()));
    let error = checkpoint().check_plan(&other).unwrap_err();
    assert!(matches!(error, Error::Core(moa_core::Error::FingerprintMismatch { .. })), "{error}");
    let own = full().with_fingerprint(Some(tiny().fingerprint().to_owned()));
    assert!(checkpoint().check_plan(&own).is_ok());
}

#[test]
fn progress_counts_the_prompts_and_may_cancel_them() -> Result<()> {
    let (a, b) = (text(50), text(30));
    let options = GenerateOptions { prefill_chunk: 16, ..greedy(2) };
    let open = || -> Result<[Sequence<CpuOps>; 2]> {
        Ok([tiny().open(&full(), 60, 0)?, tiny().open(&full(), 60, 0)?])
    };
    let (mut read, mut tokens) = (Vec::new(), Vec::new());
    let generation =
        tiny().generate(&mut open()?, &[&a, &b], &options, &mut |progress| match progress {
            GenerateProgress::Prefill { done, total } => {
                read.push((done, total));
                // Of a prefill this means nothing.
                Next::Stop
            }
            GenerateProgress::Token { sequence, token } => {
                tokens.push((sequence, token));
                Next::Continue
            }
        })?;
    assert_eq!(read, [16, 32, 48, 50, 66, 80].map(|done| (done, 80)));
    for (i, generated) in generation.sequences.iter().enumerate() {
        let own: Vec<u32> = tokens.iter().filter(|(s, _)| *s == i).map(|(_, t)| *t).collect();
        assert_eq!(own, generated.tokens);
    }

    let mut batch = open()?;
    let error = tiny().generate(&mut batch, &[&a, &b], &options, &mut |progress| match progress {
        GenerateProgress::Prefill { done, .. } if done >= 32 => Next::Cancel,
        _ => Next::Continue,
    });
    assert!(matches!(error, Err(Error::Cancelled)), "{error:?}");
    assert_eq!(batch.each_ref().map(Sequence::len), [32, 0]);
    Ok(())
}

#[test]
fn decoding_may_be_cancelled_and_single_sequences_stopped() -> Result<()> {
    let (a, b) = (text(50), text(30));
    let whole = [continued(&full(), &a, &greedy(6))?, continued(&full(), &b, &greedy(6))?];
    for plan in [full(), narrow()] {
        let mut batch = [tiny().open(&plan, 60, 0)?, tiny().open(&plan, 60, 0)?];
        let mut seen = 0;
        let error = tiny().generate(&mut batch, &[&a, &b], &greedy(6), &mut |progress| {
            seen += usize::from(matches!(progress, GenerateProgress::Token { .. }));
            if seen == 4 { Next::Cancel } else { Next::Continue }
        });
        assert!(matches!(error, Err(Error::Cancelled)), "{error:?}");
        assert_eq!(seen, 4);
        // The sequences are as after the last whole step.
        assert_eq!(batch.each_ref().map(Sequence::len), [51, 31]);
        step(&mut batch[0], &[5])?;
    }

    let mut batch = [tiny().open(&full(), 60, 0)?, tiny().open(&full(), 60, 0)?];
    let mut seen = 0;
    let generation =
        tiny().generate(&mut batch, &[&a, &b], &greedy(6), &mut |progress| match progress {
            GenerateProgress::Token { sequence: 0, .. } => {
                seen += 1;
                if seen == 2 { Next::Stop } else { Next::Continue }
            }
            _ => Next::Continue,
        })?;
    assert_eq!(generation.sequences[0].tokens, whole[0][..2]);
    assert_eq!(generation.sequences[0].finish, Finish::Stopped);
    assert_eq!(generation.sequences[1].tokens, whole[1]);
    assert_eq!(generation.sequences[1].finish, Finish::Length);
    Ok(())
}

#[test]
fn equal_seeds_give_equal_texts() -> Result<()> {
    let prompt = text(48);
    let with = |seed| {
        let sampling = SamplingOptions {
            temperature: 1.2,
            top_p: 0.95,
            repetition_penalty: 1.1,
            seed,
            ..Default::default()
        };
        continued(&narrow(), &prompt, &GenerateOptions { sampling, ..greedy(16) })
    };
    assert_eq!(with(1)?, with(1)?);
    assert_ne!(with(1)?, with(2)?);
    Ok(())
}

#[test]
fn a_strong_repetition_penalty_forbids_repetitions() -> Result<()> {
    let prompt = text(48);
    let sampling = SamplingOptions { repetition_penalty: 1e6, ..Default::default() };
    let tokens = continued(&full(), &prompt, &GenerateOptions { sampling, ..greedy(32) })?;
    for (i, token) in tokens.iter().enumerate() {
        assert!(!prompt.contains(token) && !tokens[..i].contains(token), "{token} again, at {i}");
    }
    let plain = continued(&full(), &prompt, &greedy(32))?;
    assert!(plain.iter().enumerate().any(|(i, t)| prompt.contains(t) || plain[..i].contains(t)));
    Ok(())
}

#[test]
fn generation_continues_what_a_sequence_already_holds() -> Result<()> {
    let prompt = text(120);
    for plan in [full(), narrow()] {
        let mut whole = [tiny().open(&plan, 130, 0)?];
        let expected =
            tiny().generate(&mut whole, &[&prompt], &greedy(8), &mut |_| Next::Continue)?;
        let mut parts = [tiny().open(&plan, 130, 0)?];
        read(&mut parts[0], &prompt[..77], 32)?;
        let generation =
            tiny().generate(&mut parts, &[&prompt[77..]], &greedy(8), &mut |_| Next::Continue)?;
        assert_eq!(generation.sequences, expected.sequences);
        assert_eq!((parts[0].len(), generation.prompt_tokens), (127, 43));
    }
    Ok(())
}
