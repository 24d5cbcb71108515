//! Greedy text and retrieval: what a user of the model sees.

use moa_conformance::{Trial, Verdict, trials};
use moa_models::{
    Cpu, Cuda, Decoder, Engine, EngineOptions, Event, GenerateOptions, Math, PHRASINGS,
    SamplingOptions, Task,
};
use std::collections::BTreeMap;
use std::sync::Arc;

use crate::{cpu, cuda, likeliest, plans, prose, read, step};

pub(crate) fn trials() -> Vec<Trial> {
    trials![
        greedy_text_is_the_cpus_or_parts_at_a_near_tie,
        sampled_text_repeats_with_its_seed_and_stays_among_the_likeliest,
        requests_that_choose_in_other_ways_get_what_they_get_among_their_like,
        steps_that_are_begun_ahead_change_no_event,
        requests_that_come_and_go_get_what_they_get_alone_but_for_ties,
        records_are_retrieved_as_on_the_cpu,
    ]
}

/// Prompts that continue greedily for this many tokens.
const NEW: usize = 32;

fn options(sampling: SamplingOptions) -> GenerateOptions {
    let eos_token_ids = Some(Vec::new());
    GenerateOptions { max_new_tokens: NEW, sampling, eos_token_ids, ..Default::default() }
}

/// What prompts that run together are continued with; each has a seed of its own.
fn continued<D: Math>(
    model: &Arc<Decoder<D>>,
    plan: &moa_core::Plan,
    prompts: &[&[u32]],
    sampling: &SamplingOptions,
) -> Vec<Vec<u32>> {
    let mut engine = Engine::new(Arc::clone(model), EngineOptions::default());
    for (seed, prompt) in (sampling.seed..).zip(prompts) {
        engine.submit(*prompt, plan, options(SamplingOptions { seed, ..sampling.clone() }));
    }
    engine.complete_all().unwrap().into_iter().map(|made| made.tokens).collect()
}

pub(crate) fn greedy<D: Math>(
    model: &Arc<Decoder<D>>,
    plan: &moa_core::Plan,
    prompts: &[&[u32]],
) -> Vec<Vec<u32>> {
    continued(model, plan, prompts, &SamplingOptions::default())
}

fn greedy_text_is_the_cpus_or_parts_at_a_near_tie() -> Verdict {
    for (checkpoint, share) in cuda()? {
        greedy_text_agrees(&checkpoint.model, &cpu().model, share);
    }
    Ok(())
}

/// Where texts part, the CPU's logits must have been nearly equal there.
pub(crate) fn greedy_text_agrees(gpu: &Arc<Decoder<Cuda>>, cpu: &Arc<Decoder<Cpu>>, share: f64) {
    let text = prose(2500);
    let prompts: Vec<&[u32]> = (0..100).map(|i| &text[i * 20..i * 20 + 30 + 4 * i]).collect();
    for plan in &plans(cpu.shape()) {
        let expected = greedy(cpu, plan, &prompts);
        let got = greedy(gpu, plan, &prompts);
        let mut equal = 0;
        for ((prompt, expected), got) in prompts.iter().zip(&expected).zip(&got) {
            let same = expected.iter().zip(got).take_while(|(a, b)| a == b).count();
            if same == NEW {
                equal += 1;
                continue;
            }
            let mut sequence = cpu.open(plan, prompt.len() + NEW, 0).unwrap();
            let mut logits = read(cpu, &mut sequence, prompt, 500);
            for token in &expected[..same] {
                logits = step(cpu, &mut sequence, &[*token]).pop().unwrap();
            }
            // Where the CPU's own sums depend on the number of rows, it may part from itself.
            let best = logits[likeliest(&logits) as usize];
            let spread = spread(&logits);
            let own = best - logits[expected[same] as usize];
            assert!(f64::from(own) <= share * spread, "{own} below the CPU's likeliest token");
            let gap = best - logits[got[same] as usize];
            println!("token {same} differs, gap {gap} of a spread of {spread}");
            // Both tokens may be off by what the logits may.
            assert!(f64::from(gap) <= 2.0 * share * spread, "gap {gap} at token {same}");
        }
        println!("{equal} of {} texts are equal", prompts.len());
        assert!(equal * 2 > prompts.len(), "only {equal} texts are equal");
    }
}

fn spread(logits: &[f32]) -> f64 {
    let n = logits.len() as f64;
    let mean = logits.iter().map(|&z| f64::from(z)).sum::<f64>() / n;
    (logits.iter().map(|&z| (f64::from(z) - mean).powi(2)).sum::<f64>() / n).sqrt()
}

fn sampled_text_repeats_with_its_seed_and_stays_among_the_likeliest() -> Verdict {
    let text = prose(300);
    for (checkpoint, _) in cuda()? {
        let model = &checkpoint.model;
        let [dense, _] = plans(model.shape());
        let prompts: Vec<&[u32]> = [40, 90, 41].map(|len| &text[..len]).into();
        let run = |sampling: SamplingOptions| continued(model, &dense, &prompts, &sampling);
        let warm = |seed| SamplingOptions { temperature: 1.0, seed, ..Default::default() };
        assert_eq!(run(warm(1)), run(warm(1)));
        assert_ne!(run(warm(1)), run(warm(2)));
        let one = SamplingOptions { top_k: Some(1), ..warm(3) };
        assert_eq!(run(one), run(SamplingOptions::default()), "the likeliest one is greedy");
        let penalised = SamplingOptions { repetition_penalty: 1.3, ..Default::default() };
        assert_ne!(run(penalised), run(SamplingOptions::default()), "chosen on the host");
    }
    Ok(())
}

/// Each of some requests asks for its tokens in another way, some of which only the host knows.
fn ways() -> Vec<GenerateOptions> {
    let warm = SamplingOptions { temperature: 0.9, ..Default::default() };
    let plain = [
        SamplingOptions::default(),
        warm.clone(),
        SamplingOptions { top_k: Some(20), ..warm.clone() },
        SamplingOptions { temperature: 1.2, top_p: 0.8, ..warm.clone() },
        SamplingOptions { min_p: 0.1, ..warm.clone() },
        SamplingOptions { repetition_penalty: 1.2, ..warm },
    ];
    let seeded = (20..).zip(plain).map(|(seed, own)| SamplingOptions { seed, ..own });
    let mut ways: Vec<GenerateOptions> = seeded.map(options).collect();
    ways.push(GenerateOptions { logprobs: Some(2), ..options(SamplingOptions::default()) });
    ways
}

/// Batches of one size have logits of one kind: what a request gets depends on its own options alone.
fn requests_that_choose_in_other_ways_get_what_they_get_among_their_like() -> Verdict {
    let text = prose(400);
    let ways = ways();
    for (checkpoint, _) in cuda()? {
        let model = &checkpoint.model;
        let [dense, _] = plans(model.shape());
        let run = |of: &dyn Fn(usize) -> usize| -> Vec<Vec<u32>> {
            let mut engine = Engine::new(Arc::clone(model), EngineOptions::default());
            for at in 0..ways.len() {
                engine.submit(&text[at * 20..at * 20 + 60], &dense, ways[of(at)].clone());
            }
            engine.complete_all().unwrap().into_iter().map(|made| made.tokens).collect()
        };
        let mixed = run(&|at| at);
        for way in 0..ways.len() {
            assert_eq!(mixed[way], run(&|_| way)[way], "{:?}", ways[way].sampling);
        }
        assert_eq!(mixed[0], run(&|_| ways.len() - 1)[0], "likelihoods do not change the choice");
    }
    Ok(())
}

/// The device begins steps before what it chose is told; requests end, are cancelled and come meanwhile.
fn steps_that_are_begun_ahead_change_no_event() -> Verdict {
    let text = prose(600);
    for (checkpoint, _) in cuda()? {
        let [dense, _] = plans(checkpoint.model.shape());
        let submit = |engine: &mut Engine<Cuda>, at: usize| {
            let temperature = if at.is_multiple_of(2) { 0.0 } else { 0.8 };
            let sampling =
                SamplingOptions { temperature, seed: at as u64, ..SamplingOptions::default() };
            let stop = if at == 2 { vec![" the".to_owned()] } else { Vec::new() };
            let how = GenerateOptions { max_new_tokens: 20 + 4 * at, stop, ..options(sampling) };
            engine.submit(&text[at * 20..at * 20 + 60], &dense, how)
        };
        let all = |engine: &mut Engine<Cuda>, goes_on: bool| -> Option<Vec<Event>> {
            let first = engine.step_ahead(|| goes_on).unwrap()?;
            Some(std::iter::once(first).chain(std::iter::from_fn(|| engine.poll())).collect())
        };
        let run = |goes_on: &dyn Fn(usize) -> bool| -> Vec<String> {
            let mut engine = checkpoint.engine(EngineOptions::default());
            for at in 0..6 {
                submit(&mut engine, at);
            }
            let steps = (0..).map_while(|step| all(&mut engine, goes_on(step)));
            steps.flatten().map(|event| format!("{event:?}")).collect()
        };
        let plain = run(&|_| false);
        for goes_on in [&|_| true, &(|step: usize| step % 7 != 6) as &dyn Fn(usize) -> bool] {
            let ahead = run(goes_on);
            for (at, (plain, ahead)) in plain.iter().zip(&ahead).enumerate() {
                assert_eq!(plain, ahead, "event {at}");
            }
            assert_eq!(plain.len(), ahead.len());
        }

        let mut engine = checkpoint.engine(EngineOptions::default());
        let mut ids: Vec<_> = (0..6).map(|at| submit(&mut engine, at)).collect();
        let (mut tokens, mut ends) = (BTreeMap::<_, usize>::new(), BTreeMap::new());
        for step in 0.. {
            let Some(events) = all(&mut engine, true) else { break };
            for event in events {
                match event {
                    Event::Token { id, .. } => *tokens.entry(id).or_default() += 1,
                    Event::Done { id, completion } => drop(ends.insert(id, completion)),
                    Event::Failed { error, .. } => panic!("{error}"),
                    _ => {}
                }
            }
            if step == 9 || step == 13 {
                let id = ids[step - 9];
                let cut = engine.cancel(id).unwrap();
                assert_eq!(cut.tokens.len(), tokens[&id], "what was told");
                ends.insert(id, cut);
            }
            if step == 13 {
                ids.push(submit(&mut engine, 6));
            }
        }
        assert!(engine.is_idle());
        for (at, id) in ids.iter().enumerate() {
            assert_eq!(ends[id].tokens.len(), tokens[id], "request {at}");
            if ![0, 2, 4].contains(&at) {
                assert_eq!(tokens[id], 20 + 4 * at, "request {at}");
            }
        }

        // One that is dropped while a step runs waits for it.
        let mut engine = checkpoint.engine(EngineOptions::default());
        submit(&mut engine, 0);
        (0..12).for_each(|_| drop(all(&mut engine, true)));
        drop(engine);
    }
    Ok(())
}

/// Requests come while others run, so products have other shapes than alone: texts may part at ties.
fn requests_that_come_and_go_get_what_they_get_alone_but_for_ties() -> Verdict {
    let text = prose(400);
    for (checkpoint, _) in cuda()? {
        let model = &checkpoint.model;
        let [dense, _] = plans(model.shape());
        let prompts: Vec<&[u32]> = (0..8).map(|i| &text[i * 20..i * 20 + 40 + 15 * i]).collect();
        let mut waiting = prompts.iter();
        let chunks = EngineOptions { prefill_chunk: 50, ..EngineOptions::default() };
        let mut engine = Engine::new(Arc::clone(model), chunks);
        let mut served = BTreeMap::new();
        // One comes with every 20th event: graphs are made, and replayed for others.
        for events in 0.. {
            if (engine.is_idle() || events % 20 == 0)
                && let Some(prompt) = waiting.next()
            {
                engine.submit(*prompt, &dense, options(SamplingOptions::default()));
            }
            match engine.step().unwrap() {
                Some(Event::Done { id, completion }) => drop(served.insert(id, completion.tokens)),
                Some(Event::Failed { error, .. }) => panic!("{error}"),
                Some(_) => {}
                None if waiting.len() == 0 => break,
                None => {}
            }
        }
        // Of 1, 2, 4 and 8 requests, some of which are longer than those before.
        assert!((1..=6).contains(&engine.recordings()), "{} recordings", engine.recordings());
        let alone: Vec<_> =
            prompts.iter().map(|prompt| greedy(model, &dense, &[prompt]).remove(0)).collect();
        let equal = alone.iter().zip(served.values()).filter(|(a, b)| a == b).count();
        println!("{equal} of {} texts are equal", prompts.len());
        assert_eq!(served.len(), prompts.len());
        assert!(served.values().all(|tokens| tokens.len() == NEW));
        assert!(equal * 4 >= 3 * prompts.len(), "{equal} texts are equal");
    }
    Ok(())
}

fn records_are_retrieved_as_on_the_cpu() -> Verdict {
    for (checkpoint, _) in cuda()? {
        let [dense, narrow] = plans(checkpoint.model.shape());
        let mut right = 0;
        for seed in 0..6 {
            let prompt = PHRASINGS[0].prompt(40, seed);
            let messages = [moa_models::Message::user(&prompt.text)];
            let tokens = checkpoint.chat_tokens(&messages).unwrap();
            let [text] = &greedy(&checkpoint.model, &dense, &[&tokens])[..] else { panic!() };
            let text = checkpoint.tokenizer.decode(text, true).unwrap();
            right += usize::from(text.contains(&prompt.answer.to_string()));
        }
        assert!(right >= 5, "{right} of 6 records were retrieved");

        let question = checkpoint.task_question(Task::MultiKey, 512, 32, (0, 0)).unwrap();
        let (there, here) =
            (checkpoint.ask(&question, &dense, 32), cpu().ask(&question, &dense, 32));
        let (there, here) = (there.unwrap(), here.unwrap());
        assert_eq!((there.score, &there.answers), (1.0, &here.answers));
        let there = checkpoint.ask(&question, &narrow, 32).unwrap();
        // Elements of the caches are half as wide as the CPU's.
        assert!(there.kv_bytes * 5 < there.kv_bytes_dense, "{there:?}");
        assert_eq!(2 * there.kv_bytes_dense, here.kv_bytes_dense);
    }
    Ok(())
}
