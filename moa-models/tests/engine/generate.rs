//! A single request as its caller sees it: stream, ends, errors, sampling.

use moa_models::{
    Completion, EngineOptions, Error, Event, Finish, GenerateOptions, Message, Prompt, Result,
    SamplingOptions,
};

use crate::{checkpoint, chunked, continued, engine, full, greedy, narrow, read, step, text, tiny};

/// What `text(64)` is continued with, and the pieces that the text came in.
fn told(options: GenerateOptions, stop: &[&str]) -> Result<(Completion, Vec<String>)> {
    let stop = stop.iter().map(|s| (*s).to_owned()).collect();
    let mut engine = checkpoint().engine(EngineOptions::default());
    engine.submit(text(64), &full(), GenerateOptions { stop, ..options });
    let (mut pieces, mut tokens) = (Vec::new(), Vec::new());
    while let Some(event) = engine.step()? {
        match event {
            Event::Text { piece, .. } => pieces.push(piece),
            Event::Token { token, .. } => tokens.push(token),
            Event::Failed { error, .. } => return Err(error),
            Event::Done { completion, .. } => {
                assert_eq!(pieces.concat(), completion.text, "pieces join to the text");
                assert_eq!(tokens, completion.tokens);
                assert!(engine.step()?.is_none(), "nothing follows");
                return Ok((completion, pieces));
            }
            _ => {}
        }
    }
    panic!("the engine has nothing to tell, but the request has not ended");
}

/// What is wrong with a request that is the only one.
fn refused(engine: &mut moa_models::Engine<moa_models::Cpu>) -> Error {
    match engine.step() {
        Ok(Some(Event::Failed { error, .. })) => error,
        other => panic!("expected a refusal, got {other:?}"),
    }
}

#[test]
fn pieces_join_to_the_text_and_the_text_is_that_of_the_tokens() -> Result<()> {
    let (told, pieces) = told(greedy(40), &[])?;
    assert_eq!((told.tokens.len(), told.finish), (40, Finish::Length));
    assert_eq!(told.text, checkpoint().tokenizer.decode(&told.tokens, true)?);
    assert!(pieces.len() > 10 && pieces.iter().all(|piece| !piece.is_empty()), "{pieces:?}");
    assert_eq!(told.tokens, continued(&full(), &text(64), &greedy(40))?);
    Ok(())
}

#[test]
fn a_stop_string_that_is_a_special_token_stops_at_the_token() -> Result<()> {
    let record = moa_models::PHRASINGS[0].prompt(8, 7).text;
    let chat = Prompt::chat(&[Message::user(record)]);
    let complete = |options: GenerateOptions| -> Result<Completion> {
        let mut engine = checkpoint().engine(EngineOptions::default());
        engine.submit(chat.clone(), &full(), options);
        Ok(engine.complete_all()?.remove(0))
    };
    let ended = complete(GenerateOptions { max_new_tokens: 40, ..Default::default() })?;
    assert_eq!(ended.finish, Finish::Eos);
    let eos = checkpoint().tokenizer.eos_id().unwrap();
    let no_eos = greedy(40);
    for (stop, stop_token_ids) in [(vec!["</s>".to_owned()], vec![]), (vec![], vec![eos])] {
        let stopped = complete(GenerateOptions { stop, stop_token_ids, ..no_eos.clone() })?;
        assert_eq!((stopped.text, stopped.finish), (ended.text.clone(), Finish::Stopped));
        assert_eq!(stopped.tokens, ended.tokens);
    }
    Ok(())
}

#[test]
fn a_stop_string_ends_the_text_and_is_not_in_it() -> Result<()> {
    let whole = told(greedy(40), &[])?.0.text;
    // Across the borders of tokens.
    let middle: usize = whole.char_indices().nth(whole.chars().count() / 2).unwrap().0;
    let stop = &whole[middle..].chars().take(7).collect::<String>();
    let before = &whole[..whole.find(stop.as_str()).unwrap()];
    let (stopped, _) = told(greedy(40), &["\u{1F999} never", stop])?;
    assert_eq!((stopped.text.as_str(), stopped.finish), (before, Finish::Stopped));
    assert!(stopped.tokens.len() < 40);

    // What looked like a stop string until the end is part of the text.
    let almost = format!("{}\u{1F999}", &whole[whole.len() - 1..]);
    let (held, _) = told(greedy(40), &[&almost])?;
    assert_eq!((held.text, held.finish), (whole, Finish::Length));
    assert!(matches!(told(greedy(4), &[""]), Err(Error::Invalid { .. })));
    Ok(())
}

#[test]
fn an_end_token_ends_the_request_and_is_not_in_it() -> Result<()> {
    let tokens = continued(&full(), &text(64), &greedy(20))?;
    let eos = tokens[7];
    let first = tokens.iter().position(|t| *t == eos).unwrap();
    let ends = GenerateOptions { eos_token_ids: Some(vec![8191, eos]), ..greedy(20) };
    let (told, _) = told(ends, &[])?;
    assert_eq!((&told.tokens[..], told.finish), (&tokens[..first], Finish::Eos));
    Ok(())
}

/// Neither tokens nor stop strings end a text before it has so many tokens.
#[test]
fn min_new_tokens_are_kept() -> Result<()> {
    let tokens = continued(&full(), &text(64), &greedy(20))?;
    let (eos, stop) = (tokens[7], tokens[3]);
    let first = tokens.iter().position(|t| *t == eos || *t == stop).unwrap();
    let ends = GenerateOptions {
        eos_token_ids: Some(vec![8191, eos]),
        stop_token_ids: vec![stop],
        ..greedy(20)
    };
    for least in [0, first, first + 1, 20] {
        let (own, _) = told(GenerateOptions { min_new_tokens: least, ..ends.clone() }, &[])?;
        assert!(own.tokens.len() >= least);
        assert_eq!(own.tokens[..first], tokens[..first]);
        match least > first {
            true => assert!(own.tokens[..least].iter().all(|own| *own != eos && *own != stop)),
            false => assert_eq!(own.tokens.len(), first),
        }
    }
    // A stop string that comes before is text.
    let whole = told(greedy(20), &[])?.0;
    let early: String = whole.text.chars().skip(2).take(4).collect();
    let (own, _) = told(GenerateOptions { min_new_tokens: 20, ..greedy(20) }, &[&early])?;
    assert_eq!((own.text, own.finish), (whole.text, Finish::Length));
    assert!(told(greedy(20), &[&early])?.0.tokens.len() < 20);
    Ok(())
}

#[test]
fn max_new_tokens_is_kept() -> Result<()> {
    let tokens = continued(&full(), &text(64), &greedy(6))?;
    for n in [0, 1, 5] {
        let (told, _) = told(greedy(n), &[])?;
        assert_eq!((&told.tokens[..], told.finish), (&tokens[..n], Finish::Length));
    }
    Ok(())
}

#[test]
fn a_checkpoint_answers_through_its_template_and_ends_where_the_model_does() -> Result<()> {
    let question = moa_models::PHRASINGS[0].prompt(5, 1);
    let answer = checkpoint().complete(&full(), &question.text, 40)?;
    assert!(answer.text.contains(&question.answer.to_string()), "{answer:?}");
    assert_eq!(answer.finish, Finish::Eos);
    let mut engine = checkpoint().engine(EngineOptions::default());
    let options = GenerateOptions { max_new_tokens: 40, ..Default::default() };
    engine.submit(Prompt::chat(&[Message::user(&question.text)]), &full(), options);
    assert_eq!(engine.complete_all()?, [answer]);
    let longer = "far too long ".repeat(8192);
    let error = checkpoint().complete(&full(), &longer, 4).unwrap_err();
    assert!(matches!(error, Error::ContextExceeded { limit: 8192, .. }), "{error}");
    Ok(())
}

#[test]
fn a_sequence_that_is_full_ends() -> Result<()> {
    let mut engine = engine(EngineOptions::default());
    let id = engine.resume(tiny().open(&full(), 66, 0)?, text(64), greedy(50));
    // The last token needs no room: nothing follows it.
    let done = engine.complete_all()?.remove(0);
    assert_eq!((done.tokens.len(), done.finish), (3, Finish::Length));
    assert_eq!(engine.reclaim(id).unwrap().len(), 66);
    assert!(engine.reclaim(id).is_none(), "it was given back");
    let usage = engine.take_usage();
    assert_eq!((usage.prompt_tokens, usage.decoded_tokens), (64, 2));
    assert!(!usage.prefill.is_zero() && !usage.decode.is_zero());
    assert_eq!(engine.take_usage(), moa_models::Usage::default());
    Ok(())
}

#[test]
fn too_long_prompts_and_contexts_say_how_long() -> Result<()> {
    let mut engine = engine(EngineOptions::default());
    let id = engine.resume(tiny().open(&full(), 60, 0)?, text(64), greedy(5));
    let error = refused(&mut engine);
    assert!(matches!(error, Error::ContextExceeded { asked: 64, limit: 60 }), "{error}");
    assert!(engine.reclaim(id).unwrap().is_empty());
    engine.submit(text(8193), &full(), greedy(5));
    let error = refused(&mut engine);
    assert!(matches!(error, Error::ContextExceeded { asked: 8193, limit: 8192 }), "{error}");
    let error = tiny().open(&full(), 8193, 0).unwrap_err();
    assert!(matches!(error, Error::ContextExceeded { asked: 8193, limit: 8192 }), "{error}");
    assert!(matches!(
        tiny().open(&full(), 0, 0),
        Err(Error::Core(moa_core::Error::Invalid { .. }))
    ));
    Ok(())
}

#[test]
fn bad_requests_are_refused_and_give_their_sequence_back() -> Result<()> {
    let (prompt, vocab) = (text(8), tiny().config().vocab_size as u32);
    let hot = SamplingOptions { temperature: f32::NAN, ..Default::default() };
    let cases: [(Prompt, GenerateOptions); 6] = [
        (Prompt::Tokens(Vec::new()), greedy(3)),
        (Prompt::Tokens(vec![5, vocab]), greedy(3)),
        (prompt.clone().into(), GenerateOptions { sampling: hot, ..greedy(3) }),
        (prompt.clone().into(), GenerateOptions { stop: vec![String::new()], ..greedy(3) }),
        // This engine has no tokenizer.
        (prompt.into(), GenerateOptions { stop: vec!["a".into()], ..greedy(3) }),
        ("a text".into(), greedy(3)),
    ];
    for (i, (prompt, options)) in cases.into_iter().enumerate() {
        let mut engine = engine(EngineOptions::default());
        let id = engine.resume(tiny().open(&full(), 20, 0)?, prompt.clone(), options.clone());
        let error = refused(&mut engine);
        assert!(matches!(error, Error::Invalid { .. }), "{i}: {error}");
        assert!(engine.reclaim(id).unwrap().is_empty(), "{i}");
        engine.submit(prompt, &full(), options);
        assert!(matches!(refused(&mut engine), Error::Invalid { .. }), "{i}");
        assert!(engine.is_idle() && engine.step()?.is_none(), "{i}");
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
    let mut engine = engine(EngineOptions::default());
    engine.submit(text(8), &plan, greedy(3));
    let error = refused(&mut engine);
    assert!(matches!(error, Error::Core(moa_core::Error::ShapeMismatch { .. })), "{error}");
    let other = full().with_fingerprint(Some("of other weights".into()));
    let error = checkpoint().check_plan(&other).unwrap_err();
    assert!(matches!(error, Error::Core(moa_core::Error::FingerprintMismatch { .. })), "{error}");
    let own = full().with_fingerprint(Some(tiny().fingerprint().to_owned()));
    assert!(checkpoint().check_plan(&own).is_ok());
}

#[test]
fn a_step_reads_a_chunk_of_all_prompts_half_of_the_oldest_and_half_of_the_shortest() -> Result<()> {
    let mut engine = chunked(64);
    let (a, b) = (text(200), text(120));
    let ids =
        [engine.submit(&a[..], &full(), greedy(2)), engine.submit(&b[..], &full(), greedy(2))];
    let (mut reads, mut tokens) = (Vec::new(), [Vec::new(), Vec::new()]);
    while let Some(event) = engine.step()? {
        let of = usize::from(event.id() == ids[1]);
        match event {
            Event::Prefill { done, total, .. } => reads.push((of, done, total)),
            Event::Token { token, .. } => tokens[of].push(token),
            Event::Done { completion, .. } => assert_eq!(completion.tokens, tokens[of]),
            other => panic!("{other:?}"),
        }
    }
    // The second is the shorter one, until nothing of it is left.
    let both = |done| [(0, done, 200), (1, done, 120)];
    let end = [(0, 136, 200), (1, 120, 120), (0, 200, 200)];
    assert_eq!(reads, [&[both(32), both(64), both(96)].concat()[..], &end].concat());
    Ok(())
}

#[test]
fn a_request_may_be_cancelled_at_any_time_and_the_others_go_on() -> Result<()> {
    let (a, b) = (text(200), text(120));
    let expected = continued(&narrow(), &b, &greedy(6))?;
    // While its prompt is read, after its first token, after some more.
    for (at, tokens, held) in [(3, 0, 64), (11, 1, 200), (17, 4, 203)] {
        let mut engine = chunked(64);
        let resumed = engine.resume(tiny().open(&narrow(), 210, 0)?, &a[..], greedy(6));
        let other = engine.submit(&b[..], &narrow(), greedy(6));
        for _ in 0..at {
            engine.step()?;
        }
        let partial = engine.cancel(resumed).expect("it has not ended");
        assert_eq!((partial.tokens.len(), partial.finish), (tokens, Finish::Stopped), "at {at}");
        assert!(engine.cancel(resumed).is_none());
        let mut sequence = engine.reclaim(resumed).unwrap();
        assert_eq!(sequence.len(), held, "as after the last step, at {at}");
        step(&mut sequence, &[5])?;
        let mut done = None;
        while let Some(event) = engine.step()? {
            assert_eq!(event.id(), other, "nothing of the cancelled one");
            if let Event::Done { completion, .. } = event {
                done = Some(completion.tokens);
            }
        }
        assert_eq!(done.as_ref(), Some(&expected));
    }
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
        let mut engine = engine(EngineOptions::default());
        engine.resume(tiny().open(&plan, 130, 0)?, &prompt[..], greedy(8));
        let expected = engine.complete_all()?;
        engine.take_usage();
        let mut sequence = tiny().open(&plan, 130, 0)?;
        read(&mut sequence, &prompt[..77], 32)?;
        let id = engine.resume(sequence, &prompt[77..], greedy(8));
        assert_eq!(engine.complete_all()?, expected);
        assert_eq!(engine.reclaim(id).unwrap().len(), 127);
        assert_eq!(engine.take_usage().prompt_tokens, 43);
    }
    Ok(())
}
