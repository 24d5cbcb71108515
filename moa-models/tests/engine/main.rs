//! The model as its users run it: logits, generation, chat, profiling, on the model that comes with
//! the repository.

mod api;
mod chat;
mod draft;
mod earlier_files;
mod eval;
mod evict;
mod faults;
mod generate;
mod laws;
mod profile;
mod recorded;
mod rounded;
mod saved;
mod serve;
mod serve_more;
mod shard;
mod shard_failures;
mod shard_plans;
mod speculate;

use std::path::{Path, PathBuf};
use std::sync::{Arc, LazyLock};

use moa_core::{ElasticRule, HeadRule, ModelShape, Plan};
use moa_models::{
    Checkpoint, Cpu, Decoder, Engine, EngineOptions, GenerateOptions, LogitRows, Result, Sequence,
};

fn moa_tiny() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../assets/moa-tiny")
}

/// moa-tiny with f32 caches.
fn checkpoint() -> &'static Checkpoint<Cpu> {
    static TINY: LazyLock<Checkpoint<Cpu>> =
        LazyLock::new(|| Checkpoint::open(Cpu::default(), moa_tiny()).expect("moa-tiny"));
    &TINY
}

fn tiny() -> &'static Arc<Decoder<Cpu>> {
    &checkpoint().model
}

/// `len` tokens of English text.
fn text(len: usize) -> Vec<u32> {
    const TEXT: &str = "The history of navigation is the history of people who trusted numbers \
        more than the evidence of their eyes. A pilot who could not see the coast still knew how \
        fast the ship had sailed, for how many hours, and in which direction; from these three \
        figures he drew a line on paper and said that the harbour lay at its end. When the line \
        was wrong nobody came home to say so, which is why the books that were written about the \
        art praise it so warmly. ";
    let tokenizer = &checkpoint().tokenizer;
    let mut ids = tokenizer.encode(TEXT, true).expect("plain text");
    while ids.len() < len {
        // Numbered, so that no stretch of the text repeats exactly.
        let more = format!("Chapter {}. {TEXT}", ids.len());
        ids.extend(tokenizer.encode(&more, false).expect("plain text"));
    }
    ids.truncate(len);
    ids
}

/// Fixed spans of all heads: `odd` keys where layer + KV head is odd, else `even`.
fn alternating(shape: ModelShape, sink: usize, odd: usize, even: usize) -> Plan {
    let heads = (0..shape.layers).flat_map(|layer| (0..shape.kv_heads).map(move |h| layer + h));
    let rules = heads
        .map(|place| HeadRule::from(ElasticRule::fixed(if place % 2 == 1 { odd } else { even })));
    Plan::new(shape, sink, sink + 1, rules.collect()).expect("one rule per head")
}

/// Spans of 48 and 24 keys: prompts of a hundred tokens wrap every ring.
fn narrow() -> Plan {
    alternating(tiny().shape(), 8, 24, 48)
}

fn full() -> Plan {
    Plan::full(tiny().shape()).expect("a valid shape")
}

/// Reads `tokens` in chunks; the logits of the last.
fn read(sequence: &mut Sequence<Cpu>, tokens: &[u32], chunk: usize) -> Result<Vec<f32>> {
    tiny().prefill(sequence, tokens, chunk)
}

/// One step; the logits of all its tokens.
fn step(sequence: &mut Sequence<Cpu>, tokens: &[u32]) -> Result<Vec<Vec<f32>>> {
    let rows: Vec<usize> = (0..tokens.len()).collect();
    let logits = tiny().forward(&mut [sequence], &[tokens], LogitRows::Rows(&rows))?;
    Ok(logits.into_data().chunks(tiny().config().vocab_size).map(<[f32]>::to_vec).collect())
}

fn likeliest(logits: &[f32]) -> u32 {
    let best = |best: usize, (i, z): (usize, &f32)| if *z > logits[best] { i } else { best };
    logits.iter().enumerate().fold(0, best) as u32
}

fn largest_difference(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}

/// The likeliest tokens, as many as asked for.
fn greedy(max_new_tokens: usize) -> GenerateOptions {
    GenerateOptions { max_new_tokens, eos_token_ids: Some(Vec::new()), ..Default::default() }
}

/// An engine of moa-tiny that knows tokens alone.
fn engine(options: EngineOptions) -> Engine<Cpu> {
    Engine::new(Arc::clone(tiny()), options)
}

/// One that reads at most so many prompt tokens a step.
fn chunked(prefill_chunk: usize) -> Engine<Cpu> {
    engine(EngineOptions { prefill_chunk, ..EngineOptions::default() })
}

/// The tokens that follow `prompt` in a sequence of its own.
fn continued(plan: &Plan, prompt: &[u32], options: &GenerateOptions) -> Result<Vec<u32>> {
    let mut engine = engine(EngineOptions::default());
    engine.submit(prompt, plan, options.clone());
    Ok(engine.complete_all()?.swap_remove(0).tokens)
}
