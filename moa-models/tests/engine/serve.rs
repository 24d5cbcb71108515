//! Requests that come and go: none of them changes what another gets.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use moa_models::{
    Communicator, Completion, Cpu, Engine, EngineOptions, Error, Event, Finish, GenerateOptions,
    Rank, RequestId, Result, SamplingOptions,
};
use proptest::prelude::*;

use crate::shard::{biased, uneven};
use crate::{checkpoint, continued, engine, full, greedy, narrow, text, tiny};

/// Greedy options for every other request, and warm ones for the rest.
fn options(of: usize, new: usize) -> GenerateOptions {
    let temperature = if of.is_multiple_of(2) { 0.0 } else { 0.9 };
    let sampling = SamplingOptions { temperature, seed: of as u64, ..Default::default() };
    GenerateOptions { sampling, ..greedy(new) }
}

/// A request of a script: after how many events it comes, and after how many of its own tokens it is
/// cancelled, if it is.
#[derive(Clone, Debug)]
struct Script {
    at: usize,
    prompt: usize,
    new: usize,
    cancelled_after: Option<usize>,
}

fn script() -> impl Strategy<Value = Script> {
    let cancelled = prop::option::weighted(0.3, 1usize..6);
    (0usize..40, 1usize..120, 1usize..12, cancelled)
        .prop_map(|(at, prompt, new, cancelled_after)| Script { at, prompt, new, cancelled_after })
}

/// What each request was continued with, as told by events and as a whole.
fn play(options_: EngineOptions, scripts: &[Script], text: &[u32]) -> Vec<Completion> {
    let mut engine = engine(options_);
    let mut names: Vec<Option<RequestId>> = vec![None; scripts.len()];
    let (mut told, mut done) = (vec![Vec::new(); scripts.len()], BTreeMap::new());
    let mut events = 0;
    loop {
        for (of, script) in scripts.iter().enumerate() {
            // Nothing would come any more once no request is left.
            let comes = script.at <= events || engine.is_idle();
            if names[of].is_none() && comes {
                let prompt = &text[of..of + script.prompt];
                names[of] = Some(engine.submit(prompt, &narrow(), options(of, script.new)));
            }
        }
        let Some(event) = engine.step().unwrap() else { break };
        events += 1;
        let of = names.iter().position(|name| *name == Some(event.id())).unwrap();
        assert!(!done.contains_key(&of), "nothing follows an end");
        match event {
            Event::Token { token, .. } => {
                told[of].push(token);
                if scripts[of].cancelled_after == Some(told[of].len()) {
                    let id = names[of].unwrap();
                    done.insert(of, engine.cancel(id).unwrap());
                }
            }
            Event::Done { completion, .. } => drop(done.insert(of, completion)),
            Event::Failed { error, .. } => panic!("{error}"),
            _ => {}
        }
        assert!(engine.running() <= options_.max_batch);
    }
    for (of, completion) in &done {
        assert_eq!(completion.tokens, told[*of], "request {of}");
    }
    assert_eq!(done.len(), scripts.len());
    done.into_values().collect()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 8, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn requests_that_come_and_go_get_what_they_get_alone(
        scripts in prop::collection::vec(script(), 2..6),
        prefill_chunk in 1usize..60,
        max_batch in 1usize..4,
    ) {
        let text = text(200);
        let completions = play(EngineOptions { prefill_chunk, max_batch, ..Default::default() }, &scripts, &text);
        for (of, (script, completion)) in scripts.iter().zip(completions).enumerate() {
            let prompt = &text[of..of + script.prompt];
            let alone = continued(&narrow(), prompt, &options(of, script.new)).unwrap();
            let cancelled = script.cancelled_after.filter(|after| *after <= script.new);
            prop_assert_eq!(&completion.tokens[..], &alone[..cancelled.unwrap_or(script.new)]);
            // The last token may have ended a request before it could be cancelled.
            let ended = cancelled.is_none_or(|after| after == script.new);
            let expected = if ended { Finish::Length } else { Finish::Stopped };
            prop_assert_eq!(completion.finish, expected, "request {}", of);
        }
    }
}

#[test]
fn engines_and_conversations_can_move_to_another_thread() {
    fn is_owned<T: Send + 'static>() {}
    is_owned::<Engine<Cpu>>();
    is_owned::<moa_models::ChatSession<Cpu>>();
}

#[test]
fn a_refused_request_stops_nobody() -> Result<()> {
    let text = text(60);
    let mut engine = engine(EngineOptions::default());
    let good = engine.submit(&text[..], &narrow(), greedy(6));
    engine.step()?;
    let bad = [
        engine.submit(vec![tiny().config().vocab_size as u32], &narrow(), greedy(6)),
        engine.submit(Vec::new(), &narrow(), greedy(6)),
        engine.resume(tiny().open(&narrow(), 10, 0)?, &text[..], greedy(6)),
    ];
    let late = engine.submit(&text[..], &narrow(), greedy(6));
    let (mut refused, mut finished) = (Vec::new(), Vec::new());
    while let Some(event) = engine.step()? {
        match event {
            Event::Failed { id, error } => {
                assert!(matches!(error, Error::Invalid { .. } | Error::ContextExceeded { .. }));
                refused.push(id);
            }
            Event::Done { id, completion } => finished.push((id, completion.tokens)),
            _ => {}
        }
    }
    assert_eq!(refused, bad);
    let alone = continued(&narrow(), &text, &greedy(6))?;
    assert_eq!(finished, [(good, alone.clone()), (late, alone)]);
    Ok(())
}

#[test]
fn requests_wait_for_a_place_without_taking_memory() -> Result<()> {
    let mut engine = engine(EngineOptions { max_batch: 2, ..EngineOptions::default() });
    let ids: Vec<_> = (0..4).map(|_| engine.submit(text(20), &narrow(), greedy(3))).collect();
    assert_eq!((engine.running(), engine.waiting()), (0, 4));
    engine.step()?;
    assert_eq!((engine.running(), engine.waiting()), (2, 2));
    // One that waits can be cancelled too, and one that left makes room.
    assert!(engine.cancel(ids[2]).unwrap().tokens.is_empty());
    assert!(!engine.cancel(ids[0]).unwrap().tokens.is_empty());
    assert_eq!((engine.running(), engine.waiting()), (1, 1));
    let left = engine.complete_all()?;
    assert_eq!(left.len(), 2);
    assert_eq!(left[0], left[1]);
    assert!(engine.is_idle());
    Ok(())
}

#[test]
fn a_resumed_request_gives_its_sequence_back_however_it_ends() -> Result<()> {
    let mut engine = engine(EngineOptions { max_batch: 1, ..EngineOptions::default() });
    let open = || tiny().open(&narrow(), 40, 0);
    let ended = engine.resume(open()?, text(20), greedy(3));
    let waiting = engine.resume(open()?, text(20), greedy(3));
    let refused = engine.resume(open()?, text(41), greedy(3));
    engine.cancel(waiting).expect("it waits");
    assert!(matches!(engine.complete_all(), Err(Error::ContextExceeded { .. })));
    assert_eq!(engine.complete_all()?.len(), 1);
    for (id, len) in [(ended, 22), (waiting, 0), (refused, 0)] {
        assert_eq!(engine.reclaim(id).expect("it was resumed").len(), len);
    }
    Ok(())
}

#[test]
fn stop_strings_end_requests_that_came_late() -> Result<()> {
    let alone = |stop: &[String]| {
        let mut engine = checkpoint().engine(EngineOptions::default());
        engine.submit(text(64), &full(), GenerateOptions { stop: stop.to_vec(), ..greedy(40) });
        Ok::<_, Error>(engine.complete_all()?.remove(0))
    };
    let whole = alone(&[])?.text;
    // Strings of several tokens, which begin in the middle of one.
    let cut = |part: usize| -> Vec<String> {
        let start = whole.char_indices().nth(whole.chars().count() * part / 4 + 1).unwrap().0;
        vec![whole[start..].chars().take(6).collect()]
    };
    let mut engine = checkpoint().engine(EngineOptions {
        prefill_chunk: 24,
        max_batch: 3,
        ..Default::default()
    });
    let mut asked = Vec::new();
    let mut texts = BTreeMap::<RequestId, String>::new();
    let mut done = BTreeMap::new();
    for events in 0.. {
        if events % 9 == 0 && events < 36 {
            let stop = if events == 0 { Vec::new() } else { cut(events / 9) };
            let options = GenerateOptions { stop: stop.clone(), ..greedy(40) };
            asked.push((engine.submit(text(64), &full(), options), stop));
        }
        match engine.step()? {
            Some(Event::Text { id, piece }) => texts.entry(id).or_default().push_str(&piece),
            Some(Event::Done { id, completion }) => drop(done.insert(id, completion)),
            Some(_) => {}
            None => break,
        }
    }
    assert_eq!(asked.len(), 4);
    for (id, stop) in asked {
        assert_eq!(done[&id], alone(&stop)?, "{stop:?}");
        assert_eq!(done[&id].text, texts.remove(&id).unwrap_or_default());
        let expected = if stop.is_empty() { Finish::Length } else { Finish::Stopped };
        assert_eq!(done[&id].finish, expected);
    }
    Ok(())
}

/// The only rank of a model, whose `n`th sum fails, for want of memory or not.
struct FailsOnce(AtomicUsize, bool);

impl Rank for FailsOnce {
    fn rank(&self) -> usize {
        0
    }

    fn ranks(&self) -> usize {
        1
    }

    fn fail(&self) {}

    fn failed(&self) -> Option<usize> {
        None
    }
}

impl Communicator<Cpu> for FailsOnce {
    fn all_reduce(&self, _: &Cpu, _: &mut moa_backend_cpu::Tensor) -> Result<()> {
        match self.0.fetch_sub(1, Ordering::Relaxed) {
            0 if self.1 => Err(Error::OutOfMemory { what: "sum", bytes: Some(8), free: None }),
            0 => Err(Error::Rank { rank: 0 }),
            _ => Ok(()),
        }
    }
}

#[test]
fn a_step_that_fails_ends_those_that_ran_and_nobody_else() -> Result<()> {
    let plan = uneven();
    // Seven sums a step: in the first step, which reads prompts, and in a later one, which decodes.
    for (at, memory) in [(3, false), (3 + 7 * 3, false), (3, true), (3 + 7 * 3, true)] {
        let model = biased().part(&plan, FailsOnce(AtomicUsize::new(at), memory))?;
        let options = EngineOptions { max_batch: 2, ..EngineOptions::default() };
        let mut engine = Engine::new(Arc::new(model), options);
        let ids: Vec<_> = (0..3).map(|_| engine.submit(vec![1, 2, 3], &plan, greedy(6))).collect();
        let error = loop {
            match engine.step() {
                Ok(event) => assert!(event.is_some()),
                Err(error) => break error,
            }
        };
        let is_told = match memory {
            true => matches!(error, Error::OutOfMemory { bytes: Some(8), .. }),
            false => matches!(error, Error::Rank { rank: 0 }),
        };
        assert!(is_told, "{error}");
        assert_eq!((engine.running(), engine.waiting()), (0, 1));
        for id in &ids[..2] {
            match engine.step()? {
                Some(Event::Failed { id: of, error: Error::Step { out_of_memory, .. } }) => {
                    assert_eq!((of, out_of_memory), (*id, memory));
                }
                other => panic!("{other:?}"),
            }
        }
        let done = engine.complete_all()?;
        engine.submit(vec![1, 2, 3], &plan, greedy(6));
        assert_eq!(done, engine.complete_all()?);
        assert_eq!(done[0].tokens.len(), 6);
    }
    Ok(())
}
