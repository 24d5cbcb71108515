//! What a server asks of the engine: copies, constraints, log probabilities, fairness.

use moa_models::{
    Constraint, Device, EngineOptions, Error, Event, Finish, GenerateOptions, LogitRows, Result,
    SamplingOptions,
};

use crate::{chunked, continued, engine, full, greedy, narrow, text, tiny};

#[test]
fn a_copy_goes_on_as_a_cold_run_does() -> Result<()> {
    let text = text(200);
    let other = [&text[..50], &text[90..130]].concat();
    let mut engine = chunked(32);
    let options = GenerateOptions { prefill_stops: vec![50], ..greedy(60) };
    let id = engine.submit(&text[..100], &narrow(), options);
    let (mut copies, mut whole) = (Vec::new(), Vec::new());
    while let Some(event) = engine.step()? {
        match event {
            // At the stop inside of the prompt, and at its end.
            Event::Prefill { done: 50 | 100, .. } => copies.extend(engine.snapshot(id)?),
            Event::Done { completion, .. } => whole = completion.tokens,
            _ => {}
        }
    }
    assert_eq!(whole, continued(&narrow(), &text[..100], &greedy(60))?);
    assert_eq!(engine.snapshot(id)?.map(|copy| copy.len()), None, "it has ended");
    let mut again = copies.pop().expect("a copy of the prompt");
    let half = copies.pop().expect("a copy of its first half");
    assert_eq!((half.len(), again.len(), copies.len()), (50, 100, 0));
    // The penalty looks at the whole prompt, which the engine did not read.
    let sampling = SamplingOptions { repetition_penalty: 1.3, ..SamplingOptions::default() };
    let penalised = GenerateOptions { sampling, ..greedy(20) };
    assert!(again.can_truncate(99));
    tiny().truncate(&mut again, 99)?;
    let ids = [
        engine.submit_in(half, other.clone(), penalised.clone()),
        engine.submit_in(again, &text[..100], greedy(60)),
    ];
    let completions = engine.complete_all()?;
    assert_eq!(completions[0].tokens, continued(&narrow(), &other, &penalised)?);
    assert_eq!(completions[1].tokens, whole);
    for (id, len) in ids.into_iter().zip([109, 159]) {
        assert_eq!(engine.reclaim(id).expect("its sequence").len(), len);
    }
    // A prompt that the sequence holds already has no token left to read.
    let mut held = tiny().open(&narrow(), 100, 0)?;
    tiny().prefill(&mut held, &text[..20], 32)?;
    let id = engine.submit_in(held, &text[..20], greedy(1));
    assert!(matches!(engine.complete_all(), Err(Error::Invalid { what: "prompt", .. })));
    assert_eq!(engine.reclaim(id).expect("its sequence").len(), 20);
    Ok(())
}

/// Every bit of the logits, through whichever steps a prompt was read, in company or not.
#[test]
fn a_beginning_that_was_read_before_changes_no_bit() -> Result<()> {
    let text = text(300);
    for plan in [full(), narrow()] {
        let mut first: Option<Vec<String>> = None;
        let mut check = |events: Vec<Event>, id| {
            let own = events.into_iter().filter(|event| event.id() == id).filter_map(|event| {
                let Event::Token { token, logprobs, .. } = event else { return None };
                // `Debug` of a float tells all bits apart.
                Some(format!("{token} {:?}", logprobs.expect("asked for")))
            });
            let own: Vec<String> = own.collect();
            assert_eq!(own.len(), 4);
            assert_eq!(*first.get_or_insert_with(|| own.clone()), own);
        };
        for (chunk, stops) in [(2048, vec![]), (32, vec![]), (47, vec![284]), (64, vec![131, 140])]
        {
            let mut engine = chunked(chunk);
            let stopping = GenerateOptions { prefill_stops: stops.clone(), ..options(4) };
            let id = engine.submit(&text[..], &plan, stopping);
            let (mut events, mut copies) = (Vec::new(), Vec::new());
            while let Some(event) = engine.step()? {
                match event {
                    Event::Prefill { done, .. } if stops.contains(&done) => {
                        copies.extend(engine.snapshot(id)?);
                    }
                    _ => events.push(event),
                }
            }
            check(events, id);
            assert_eq!(copies.len(), stops.len().min(1), "the second of two stops is too near");
            for copy in copies {
                let id = engine.submit_in(copy, &text[..], options(4));
                let mut events = Vec::new();
                while let Some(event) = engine.step()? {
                    events.push(event);
                }
                check(events, id);
            }
        }
    }
    Ok(())
}

fn options(new: usize) -> GenerateOptions {
    GenerateOptions { logprobs: Some(5), ..greedy(new) }
}

#[test]
fn short_prompts_do_not_wait_for_long_ones() -> Result<()> {
    let mut engine = chunked(32);
    let long = engine.submit(text(600), &narrow(), greedy(2));
    let short = engine.submit(text(20), &narrow(), greedy(2));
    let mut read = 0;
    while let Some(event) = engine.step()? {
        match event {
            Event::Prefill { id, done, .. } if id == long => read = done,
            Event::Token { id, .. } if id == short => break,
            _ => {}
        }
    }
    assert!((32..=80).contains(&read), "both are read meanwhile: {read}");
    let both = engine.complete_all()?;
    assert_eq!(both[0].tokens, continued(&narrow(), &text(600), &greedy(2))?);
    assert_eq!(both[1].tokens, continued(&narrow(), &text(20), &greedy(2))?);
    Ok(())
}

#[test]
fn likelihoods_are_told_and_change_nothing() -> Result<()> {
    let prompt = text(40);
    let plain = continued(&narrow(), &prompt, &greedy(6))?;
    let mut engine = engine(EngineOptions::default());
    let options = GenerateOptions { logprobs: Some(3), ..greedy(6) };
    engine.submit(&prompt[..], &narrow(), options);
    let mut told = Vec::new();
    while let Some(event) = engine.step()? {
        if let Event::Token { token, logprobs, .. } = event {
            let logprobs = logprobs.expect("it was asked for");
            assert_eq!((logprobs.top.len(), logprobs.top[0]), (3, (token, logprobs.logprob)));
            let sum: f32 = logprobs.top.iter().map(|(_, p)| p.exp()).sum();
            assert!(sum > 0.0 && sum < 1.0001, "{sum}");
            told.push(token);
        }
    }
    assert_eq!(told, plain);
    Ok(())
}

/// Even tokens, and no more than so many.
#[derive(Debug)]
struct Even(usize);

impl Constraint for Even {
    fn restrict(&mut self, logits: &mut [f32]) -> Result<()> {
        logits.iter_mut().skip(1).step_by(2).for_each(|logit| *logit = f32::NEG_INFINITY);
        Ok(())
    }

    fn accept(&mut self, token: u32) -> Result<bool> {
        assert!(token.is_multiple_of(2));
        self.0 -= 1;
        Ok(self.0 == 0)
    }
}

#[test]
fn a_constraint_holds_for_its_request_alone() -> Result<()> {
    let prompt = text(40);
    let mut engine = engine(EngineOptions::default());
    let free = engine.submit(&prompt[..], &narrow(), greedy(12));
    let bound = engine.submit(&prompt[..], &narrow(), greedy(12));
    assert!(engine.constrain(bound, Box::new(Even(7))));
    let both = engine.complete_all()?;
    assert!(!engine.constrain(free, Box::new(Even(7))), "it has ended");
    assert_eq!(both[0].tokens, continued(&narrow(), &prompt, &greedy(12))?);
    assert_eq!((both[1].tokens.len(), both[1].finish), (7, Finish::Eos));
    Ok(())
}

/// However the prompt is cut into steps, and in company.
#[test]
fn tokens_of_a_prompt_are_told_with_how_likely_they_were() -> Result<()> {
    let text = text(200);
    let model = tiny();
    let mut sequence = model.open(&narrow(), 200, 0)?;
    let rows: Vec<usize> = (0..199).collect();
    let logits = model.forward(&mut [&mut sequence], &[&text[..199]], LogitRows::Rows(&rows))?;
    let logits = model.device().values(logits)?;
    let expected = |at: usize| {
        let row = &logits[(at - 1) * model.config().vocab_size..][..model.config().vocab_size];
        let sum: f64 = row.iter().map(|z| f64::from(*z).exp()).sum();
        let best = crate::likeliest(row);
        (f64::from(row[text[at] as usize]) - sum.ln(), best)
    };
    for chunk in [32, 200] {
        let mut engine = chunked(chunk);
        let plain = engine.submit(&text[50..120], &narrow(), greedy(9));
        let asked = GenerateOptions { logprobs: Some(1), prompt_logprobs: true, ..greedy(3) };
        let id = engine.submit(&text[..], &narrow(), asked);
        let (mut told, mut read, mut new) = (Vec::new(), 0, 0);
        while let Some(event) = engine.step()? {
            match event {
                Event::PromptToken { id: of, token, logprobs } => {
                    assert_eq!((of, new), (id, 0));
                    told.push((token, logprobs));
                }
                Event::Prefill { id: of, done, .. } if of == id => {
                    assert_eq!(told.len(), 200.min(done + 1));
                    read = done;
                }
                Event::Token { id: of, .. } if of == id => new += 1,
                Event::Failed { error, .. } => panic!("{error}"),
                _ => {}
            }
        }
        assert_ne!(plain, id);
        assert_eq!((read, new), (200, 3));
        for (at, (token, logprobs)) in told.into_iter().enumerate() {
            assert_eq!(token, text[at]);
            let Some(own) = logprobs else {
                assert_eq!(at, 0);
                continue;
            };
            let (logprob, best) = expected(at);
            assert!((f64::from(own.logprob) - logprob).abs() < 1e-4, "{at}: {own:?} {logprob}");
            assert_eq!((own.top.len(), own.top[0].0), (1, best), "{at}");
        }
    }
    Ok(())
}
