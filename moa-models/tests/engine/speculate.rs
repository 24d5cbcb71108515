//! Guesses that a step checks: nobody can tell by the tokens.

use std::sync::Arc;

use moa_core::Plan;
use moa_models::{
    Cpu, Decoder, Engine, EngineOptions, GenerateOptions, ModelConfig, RandomTensors, Result,
    SamplingOptions, Speculation, Usage,
};

use crate::{engine, full, greedy, narrow, text, tiny};

/// Requests that come together; their tokens, and what was done.
fn run(
    speculation: Speculation,
    plan: &Plan,
    requests: &[(&[u32], GenerateOptions)],
) -> Result<(Vec<Vec<u32>>, Usage)> {
    let mut engine = engine(EngineOptions { speculation, ..EngineOptions::default() });
    for (prompt, options) in requests {
        engine.submit(*prompt, plan, options.clone());
    }
    let completions = engine.complete_all()?;
    Ok((completions.into_iter().map(|one| one.tokens).collect(), engine.take_usage()))
}

/// All guesses, whatever the time that they take here.
const ALL: Speculation = Speculation::Ngram { draft_tokens: 6, adaptive: false };

/// A text three times, which the model then goes on with, or not.
fn repeated(tokens: usize) -> Vec<u32> {
    text(tokens).repeat(3)
}

fn warm(new: usize, seed: u64, temperature: f32) -> GenerateOptions {
    let sampling = SamplingOptions { temperature, seed, ..Default::default() };
    GenerateOptions { sampling, ..greedy(new) }
}

#[test]
fn guesses_change_no_token() -> Result<()> {
    let (long, short) = (repeated(40), repeated(15));
    let mut accepted = 0;
    for plan in [full(), narrow()] {
        let penalty = SamplingOptions { repetition_penalty: 1.1, ..Default::default() };
        let requests = [
            (&long[..], greedy(60)),
            (&short[..], greedy(25)),
            (&long[..70], warm(40, 3, 0.8)),
            (&short[..], GenerateOptions { sampling: penalty, ..greedy(20) }),
        ];
        // Alone, with all options, then beside each other.
        for some in [&requests[..1], &requests[2..3], &requests[..]] {
            let (plain, usage) = run(Speculation::Off, &plan, some)?;
            assert_eq!(usage.drafted_tokens, 0);
            assert_eq!(plain, run(Speculation::ngram(), &plan, some)?.0);
            let (guessed, usage) = run(ALL, &plan, some)?;
            assert_eq!(plain, guessed);
            accepted += usage.accepted_tokens;
            assert_eq!(
                usage.decoded_tokens,
                guessed.iter().map(|one| one.len() - 1).sum::<usize>()
            );
        }
    }
    assert!(accepted > 0);
    Ok(())
}

/// Without slack a ring that has wrapped can forget one wrong guess: no more is made.
#[test]
fn a_sequence_without_slack_gets_one_guess_a_step() -> Result<()> {
    let prompt = repeated(40);
    let options = EngineOptions { speculation: ALL, ..Default::default() };
    let mut engine = engine(options);
    let id = engine.resume(tiny().open(&narrow(), 200, 0)?, &prompt[..], greedy(30));
    let tokens = engine.complete_all()?.swap_remove(0).tokens;
    assert_eq!(tokens, run(Speculation::Off, &narrow(), &[(&prompt, greedy(30))])?.0[0]);
    assert!((1..30).contains(&engine.take_usage().drafted_tokens));
    assert_eq!(engine.reclaim(id).map(|sequence| sequence.len()), Some(120 + 29));
    Ok(())
}

/// A model of four tokens, none of which is unlikely.
fn four_tokens() -> Result<Arc<Decoder<Cpu>>> {
    let config = ModelConfig {
        vocab_size: 4,
        num_hidden_layers: 1,
        tie_word_embeddings: false,
        ..tiny().config().clone()
    };
    let weights = RandomTensors::new(&config, 3)?;
    Ok(Arc::new(Decoder::load(Cpu::default(), config, &weights)?))
}

/// How probable each text of three tokens after `prompt` is, at this temperature.
fn probabilities(
    model: &Decoder<Cpu>,
    plan: &Plan,
    prompt: &[u32],
    temperature: f64,
) -> Result<Vec<f64>> {
    let mut all = vec![(Vec::new(), 1.0)];
    for _ in 0..3 {
        let mut longer = Vec::new();
        for (text, before) in &all {
            let mut sequence = model.open(plan, 40, 0)?;
            let logits = model.prefill(&mut sequence, &[prompt, text].concat(), 40)?;
            let weights = logits.iter().map(|z| (f64::from(*z) / temperature).exp());
            let weights: Vec<f64> = weights.collect();
            let sum: f64 = weights.iter().sum();
            for (token, weight) in (0..).zip(weights) {
                longer.push(([&text[..], &[token]].concat(), before * weight / sum));
            }
        }
        all = longer;
    }
    Ok(all.into_iter().map(|(_, probability)| probability).collect())
}

/// 2,000 texts of three tokens, the last two of which are drawn in steps that check guesses.
#[test]
fn what_is_drawn_with_guesses_is_distributed_as_the_model_says() -> Result<()> {
    let model = four_tokens()?;
    let plan = Plan::full(model.shape())?;
    // Every pair of tokens stands in it, so that there is a guess whatever is drawn.
    let prompt = [0, 0, 1, 0, 2, 0, 3, 1, 1, 2, 1, 3, 2, 2, 3, 3, 0];
    let temperature = 0.8;
    let run = |speculation: Speculation| {
        let (mut counts, mut texts, mut done) = (vec![0u32; 64], Vec::new(), Usage::default());
        for first in (0..2000).step_by(50) {
            let options = EngineOptions { speculation, ..EngineOptions::default() };
            let mut engine = Engine::new(Arc::clone(&model), options);
            for seed in first..first + 50 {
                engine.submit(&prompt[..], &plan, warm(3, seed, temperature));
            }
            for completion in engine.complete_all()? {
                let place = completion.tokens.iter().fold(0, |place, t| 4 * place + *t as usize);
                counts[place] += 1;
                texts.push(completion.tokens);
            }
            let usage = engine.take_usage();
            done.drafted_tokens += usage.drafted_tokens;
            done.accepted_tokens += usage.accepted_tokens;
        }
        Ok::<_, moa_models::Error>((counts, texts, done))
    };
    let (counts, guessed, usage) = run(ALL)?;
    let wrong = usage.drafted_tokens - usage.accepted_tokens;
    assert!(usage.accepted_tokens > 300 && wrong > 300, "{usage:?}");
    assert_eq!(guessed, run(Speculation::Off)?.1);
    let expected = probabilities(&model, &plan, &prompt, f64::from(temperature))?;
    let chi_square = |expected: &[f64]| -> f64 {
        let term =
            |(count, p): (&u32, &f64)| (f64::from(*count) - 2000.0 * p).powi(2) / (2000.0 * p);
        counts.iter().zip(expected).map(term).sum()
    };
    // Of 63 degrees of freedom; 103.4 is exceeded once in a thousand times.
    let own = chi_square(&expected);
    assert!(own < 103.4, "{own}");
    // The draws are many enough to tell it from another distribution.
    let other: Vec<f64> = expected.iter().map(|p| (p + 1.0 / 64.0) / 2.0).collect();
    assert!(chi_square(&other) > 103.4, "{}", chi_square(&other));
    Ok(())
}

#[test]
fn greedy_texts_are_the_same_on_many_prompts() -> Result<()> {
    let text = text(400);
    let mut accepted = 0;
    for plan in [full(), narrow()] {
        let prompts: Vec<Vec<u32>> =
            (0..24).map(|i| text[i * 13..i * 13 + 12 + i].repeat(1 + i % 3)).collect();
        let requests: Vec<_> = prompts.iter().map(|prompt| (&prompt[..], greedy(12))).collect();
        for some in requests.chunks(5) {
            let (plain, _) = run(Speculation::Off, &plan, some)?;
            let (guessed, usage) = run(ALL, &plan, some)?;
            assert_eq!(plain, guessed);
            accepted += usage.accepted_tokens;
        }
    }
    assert!(accepted > 20, "{accepted}");
    Ok(())
}
