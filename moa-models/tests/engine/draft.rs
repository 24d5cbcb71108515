//! Another model that guesses: nobody can tell by the tokens.

use std::fs;
use std::sync::Arc;

use moa_core::Plan;
use moa_models::{
    ChatSession, Checkpoint, Cpu, Decoder, Engine, EngineOptions, Error, GenerateOptions,
    ModelConfig, RandomTensors, Result, SamplingOptions, Speculation, Tokenizer, Usage,
};

use crate::{checkpoint, full, greedy, moa_tiny, narrow, text, tiny};

/// All guesses, whatever the time that they take here.
const ALL: Speculation = Speculation::Draft { draft_tokens: 5, adaptive: false };

/// moa-tiny with a model that guesses for it.
fn with_draft(draft: &Checkpoint<Cpu>, plan: &Plan) -> Result<Checkpoint<Cpu>> {
    let mut own = checkpoint().clone();
    own.set_draft(draft, plan)?;
    Ok(own)
}

fn engine(of: &Checkpoint<Cpu>, speculation: Speculation) -> Engine<Cpu> {
    // Short stretches: a prompt takes several steps to be read.
    of.engine(EngineOptions { speculation, prefill_chunk: 1, ..EngineOptions::default() })
}

fn run(
    of: &Checkpoint<Cpu>,
    speculation: Speculation,
    plan: &Plan,
    requests: &[(Vec<u32>, GenerateOptions)],
) -> Result<(Vec<Vec<u32>>, Usage)> {
    let mut engine = engine(of, speculation);
    for (prompt, options) in requests {
        engine.submit(&prompt[..], plan, options.clone());
    }
    let completions = engine.complete_all()?;
    Ok((completions.into_iter().map(|one| one.tokens).collect(), engine.take_usage()))
}

fn requests() -> [(Vec<u32>, GenerateOptions); 3] {
    let text = text(160);
    let drawn = |sampling| GenerateOptions { sampling, ..greedy(24) };
    let warm = SamplingOptions { temperature: 0.9, seed: 11, ..Default::default() };
    let penalised = SamplingOptions {
        repetition_penalty: 1.2,
        presence_penalty: 0.3,
        top_k: Some(30),
        top_p: 0.9,
        ..warm.clone()
    };
    [
        (text[..150].to_vec(), greedy(24)),
        (text[..9].to_vec(), drawn(warm)),
        (text[40..110].to_vec(), drawn(penalised)),
    ]
}

#[test]
fn a_model_guesses_its_own_tokens_drawn_ones_too() -> Result<()> {
    for plan in [full(), narrow()] {
        let own = with_draft(checkpoint(), &plan)?;
        let requests = requests();
        for some in [&requests[..1], &requests[1..2], &requests[2..], &requests[..]] {
            let (plain, none) = run(&own, Speculation::Off, &plan, some)?;
            let (guessed, usage) = run(&own, ALL, &plan, some)?;
            assert_eq!((&plain, none.drafted_tokens), (&guessed, 0));
            let Usage { drafted_tokens, accepted_tokens, .. } = usage;
            assert_eq!(drafted_tokens, accepted_tokens, "of {} requests", some.len());
            assert!(accepted_tokens >= some.len() * 8, "{usage:?}");
            assert_eq!(plain, run(&own, Speculation::draft(), &plan, some)?.0);
        }
    }
    Ok(())
}

#[test]
fn a_plan_guesses_for_dense_attention() -> Result<()> {
    let own = with_draft(checkpoint(), &narrow())?;
    let requests = requests();
    let (plain, _) = run(&own, Speculation::Off, &full(), &requests)?;
    let (guessed, usage) = run(&own, ALL, &full(), &requests)?;
    assert_eq!(plain, guessed);
    assert!((1..usage.drafted_tokens).contains(&usage.accepted_tokens), "{usage:?}");
    Ok(())
}

/// Two layers of random weights: they know nothing, in contexts of 100 tokens.
fn ignorant() -> Result<Checkpoint<Cpu>> {
    let config = ModelConfig {
        num_hidden_layers: 2,
        max_position_embeddings: 100,
        ..tiny().config().clone()
    };
    let weights = RandomTensors::new(&config, 3)?;
    let mut other = checkpoint().clone();
    other.model = Arc::new(Decoder::load(Cpu::default(), config, &weights)?);
    Ok(other)
}

#[test]
fn guesses_that_are_wrong_change_nothing_and_end() -> Result<()> {
    let draft = ignorant()?;
    let own = with_draft(&draft, &Plan::full(draft.model.shape())?)?;
    let requests = requests();
    for plan in [full(), narrow()] {
        let (plain, _) = run(&own, Speculation::Off, &plan, &requests)?;
        let (guessed, usage) = run(&own, ALL, &plan, &requests)?;
        assert_eq!(plain, guessed);
        assert!(usage.drafted_tokens > 20, "{usage:?}");
    }
    let long = [(text(20), greedy(300))];
    let (plain, _) = run(&own, Speculation::Off, &narrow(), &long)?;
    let (guessed, usage) = run(&own, Speculation::draft(), &narrow(), &long)?;
    assert_eq!(plain, guessed);
    assert!(usage.drafted_tokens < 60, "{usage:?}");
    Ok(())
}

#[test]
fn requests_join_leave_and_go_on_without_a_beginning() -> Result<()> {
    let own = with_draft(checkpoint(), &full())?;
    let text = text(100);
    let mut engine = engine(&own, ALL);
    let first = engine.submit(&text[..60], &full(), greedy(12));
    let cancelled = engine.submit(&text[..40], &full(), greedy(200));
    while engine.take_usage().decoded_tokens == 0 {
        engine.step()?;
    }
    assert!(engine.cancel(cancelled).is_some_and(|one| !one.tokens.is_empty()));
    let joined = engine.submit(&text[..30], &full(), greedy(12));
    assert!(first < joined);
    let both = engine.complete_all()?;
    for (completion, len) in both.iter().zip([60, 30]) {
        assert_eq!(completion.tokens, crate::continued(&full(), &text[..len], &greedy(12))?);
    }
    engine.take_usage();
    // What a sequence holds that nobody told, the other model cannot read.
    let mut sequence = tiny().open(&full(), 200, 5)?;
    tiny().prefill(&mut sequence, &text[..50], 200)?;
    engine.resume(sequence, &text[50..], greedy(8));
    engine.complete_all()?;
    assert_eq!(engine.take_usage().drafted_tokens, 0);
    Ok(())
}

#[test]
fn a_conversation_is_guessed_from_its_first_turn_on() -> Result<()> {
    let own = with_draft(checkpoint(), &full())?;
    let chat = |speculation| {
        let options = EngineOptions { speculation, ..EngineOptions::default() };
        ChatSession::with_options(&own, &full(), 500, options)
    };
    let (mut plain, mut guessed) = (chat(Speculation::Off)?, chat(ALL)?);
    for line in ["Line 7 is 4711. What is in line 7?", "And in line 8?"] {
        assert_eq!(plain.answer(line, greedy(10))?, guessed.answer(line, greedy(10))?);
        let usage = guessed.take_usage();
        assert!(usage.accepted_tokens > 0 && usage.accepted_tokens == usage.drafted_tokens);
    }
    Ok(())
}

#[test]
fn a_model_of_other_tokens_or_another_plan_is_refused() -> Result<()> {
    let mut other = checkpoint().clone();
    let folder = tempfile::tempdir().expect("a folder");
    let written = fs::read_to_string(moa_tiny().join("tokenizer.json")).expect("moa-tiny's");
    let [one, another] = [300, 302];
    let name = |id| checkpoint().tokenizer.decode(&[id], false).expect("a token").trim().to_owned();
    // Two tokens change places.
    let changed = written
        .replace(&format!(": {one},"), ": ~,")
        .replace(&format!(": {another},"), &format!(": {one},"))
        .replace(": ~,", &format!(": {another},"));
    assert_ne!(written, changed);
    fs::write(folder.path().join("tokenizer.json"), changed).expect("a file");
    other.tokenizer = Tokenizer::from_dir(folder.path())?;
    let Err(Error::DraftVocabulary { token, id, got, .. }) = with_draft(&other, &full()) else {
        panic!("it was taken");
    };
    assert!(
        token.ends_with(&name(one)) && (id, got) == (one, Some(another)),
        "{token} {id} {got:?}"
    );
    let draft = ignorant()?;
    assert!(matches!(with_draft(&draft, &full()), Err(Error::Core(_))));
    // Its sequence is counted, as long as its context is.
    let own = with_draft(&draft, &Plan::full(draft.model.shape())?)?;
    let bytes = |speculation| own.request_bytes(&narrow(), 200, speculation);
    let beside = draft.model.cache_bytes(&Plan::full(draft.model.shape())?, 100, 6)?;
    assert_eq!(bytes(Speculation::Off)?, tiny().cache_bytes(&narrow(), 200, 0)?);
    assert_eq!(bytes(Speculation::draft())?, tiny().cache_bytes(&narrow(), 200, 6)? + beside);
    Ok(())
}
