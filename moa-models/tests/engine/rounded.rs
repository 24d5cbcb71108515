//! The command's own arithmetic: activations that are rounded to bf16, where the machine multiplies pairs of them,
//! and caches of narrow types. What a prompt was read with, and guesses, change no bit there either.

use std::sync::{Arc, LazyLock};

use moa_core::{CacheType, Plan};
use moa_models::{
    Checkpoint, Cpu, Decoder, Engine, EngineOptions, Event, GenerateOptions, LogitRows,
    ModelConfig, RequestId, Result, SamplingOptions, Speculation, Weights,
};

use crate::{full, greedy, moa_tiny, narrow, text};

/// moa-tiny with caches of each of these types.
static MODELS: LazyLock<Vec<Arc<Decoder<Cpu>>>> = LazyLock::new(|| {
    let types = [CacheType::Bf16, CacheType::Int8, CacheType::K8V4, CacheType::Int4];
    let open = |own| Checkpoint::open(Cpu::new(own).narrow_activations(true), moa_tiny());
    types.map(|own| open(own).expect("moa-tiny").model).into()
});

/// Tokens and how likely they were, by all bits.
fn told(engine: &mut Engine<Cpu>, of: RequestId) -> Result<Vec<String>> {
    let mut own = Vec::new();
    while let Some(event) = engine.step()? {
        match event {
            Event::Token { id, token, logprobs } if id == of => {
                own.push(format!("{token} {logprobs:?}"));
            }
            Event::Failed { error, .. } => return Err(error),
            _ => {}
        }
    }
    Ok(own)
}

fn engine(model: &Arc<Decoder<Cpu>>, options: EngineOptions) -> Engine<Cpu> {
    Engine::new(Arc::clone(model), options)
}

#[test]
fn neither_chunks_nor_a_beginning_that_was_read_change_a_bit() -> Result<()> {
    let text = text(150);
    let options = GenerateOptions { logprobs: Some(3), ..greedy(3) };
    for model in &*MODELS {
        for plan in [full(), narrow()] {
            let mut whole = engine(model, EngineOptions::default());
            let id = whole.submit(&text[..], &plan, options.clone());
            let whole = told(&mut whole, id)?;
            assert_eq!(whole.len(), 3);
            let mut cut = engine(model, EngineOptions { prefill_chunk: 1, ..Default::default() });
            // Another prompt shares the steps.
            cut.submit(&text[20..110], &plan, greedy(2));
            let id = cut.submit(&text[..], &plan, options.clone());
            assert_eq!(told(&mut cut, id)?, whole);
            for held in [16, 77, 134] {
                let mut sequence = model.open(&plan, 200, 0)?;
                model.prefill(&mut sequence, &text[..held], 200)?;
                let mut again = engine(model, EngineOptions::default());
                let id = again.submit_in(sequence, &text[..], options.clone());
                assert_eq!(told(&mut again, id)?, whole, "{held}");
            }
        }
    }
    Ok(())
}

#[test]
fn guesses_change_no_bit() -> Result<()> {
    let prompt = text(30).repeat(3);
    let drawn = SamplingOptions { temperature: 0.7, seed: 5, ..Default::default() };
    let kinds = [greedy(24), GenerateOptions { sampling: drawn, ..greedy(24) }];
    let all = Speculation::Ngram { draft_tokens: 6, adaptive: false };
    let mut checked = 0;
    for model in &*MODELS {
        let run = |speculation: Speculation, plan: &Plan, options: &GenerateOptions| {
            let mut engine = engine(model, EngineOptions { speculation, ..Default::default() });
            let id = engine.submit(&prompt[..], plan, options.clone());
            Ok::<_, moa_models::Error>((told(&mut engine, id)?, engine.take_usage()))
        };
        for plan in [full(), narrow()] {
            for options in &kinds {
                let options = GenerateOptions { logprobs: Some(2), ..options.clone() };
                let (plain, _) = run(Speculation::Off, &plan, &options)?;
                let (guessed, usage) = run(all, &plan, &options)?;
                assert_eq!(plain, guessed);
                checked += usage.drafted_tokens;
            }
        }
    }
    assert!(checked > 30, "{checked}");
    Ok(())
}

/// Mean KL divergence of the next token's distribution after each of these tokens from that of f32 caches.
fn divergence(model: &Decoder<Cpu>, tokens: &[u32]) -> Result<f64> {
    let own = Checkpoint::open(Cpu::new(CacheType::F32), moa_tiny())?.model;
    let rows: Vec<usize> = (0..tokens.len()).collect();
    let log_probabilities = |model: &Decoder<Cpu>| {
        let mut sequence = model.open(&full(), tokens.len(), 0)?;
        let logits = model.forward(&mut [&mut sequence], &[tokens], LogitRows::Rows(&rows))?;
        let row = |row: &[f32]| {
            let sum: f64 = row.iter().map(|x| f64::from(*x).exp()).sum();
            row.iter().map(|x| f64::from(*x) - sum.ln()).collect::<Vec<_>>()
        };
        let vocab_size = model.config().vocab_size;
        Ok::<_, moa_models::Error>(logits.into_data().chunks(vocab_size).flat_map(row).collect())
    };
    let (exact, rounded): (Vec<f64>, Vec<f64>) =
        (log_probabilities(&own)?, log_probabilities(model)?);
    let sum: f64 = exact.iter().zip(&rounded).map(|(p, q)| p.exp() * (p - q)).sum();
    Ok(sum / tokens.len() as f64)
}

/// By a text's mean and moments, where there is a tokenizer, and by those of random tokens.
#[test]
fn keys_of_4_bits_lose_little() -> Result<()> {
    let model = Checkpoint::open(Cpu::new(CacheType::Int4), moa_tiny())?.model;
    let lost = divergence(&model, &text(100))?;
    assert!(lost < 0.012, "{lost}");
    let (config, weights) = (ModelConfig::from_file(moa_tiny())?, Weights::open(moa_tiny())?);
    let model = Decoder::load(Cpu::new(CacheType::Int4), config, &weights)?;
    let lost = divergence(&model, &text(100))?;
    assert!(lost < 0.014, "{lost}");
    Ok(())
}
