//! Load a checkpoint, generate with a plan, and see what the KV cache really holds.
//!
//! ```sh
//! cargo run --release -p moa-models --example compressed_generation
//! ```

use moa_core::{ElasticRule, Plan};
use moa_models::{
    Checkpoint, Cpu, Dtype, EngineOptions, Event, GenerateOptions, Message, PHRASINGS, Result,
};

fn main() -> Result<()> {
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../assets/moa-tiny");
    let checkpoint = Checkpoint::open(Cpu::new(Dtype::Bf16), folder)?;
    let model = &checkpoint.model;

    // A record of 60 lines and a question about one of them.
    let record = PHRASINGS[0].prompt(60, 1);
    let prompt = checkpoint.chat_tokens(&[Message::user(&record.text)])?;
    let options = GenerateOptions { max_new_tokens: 40, ..GenerateOptions::default() };
    let capacity = prompt.len() + options.max_new_tokens;

    let dense = Plan::full(model.shape())?;
    let uniform = Plan::uniform(model.shape(), 64, ElasticRule::new(0.0, 0.25)?)?;
    println!("{} prompt tokens; the answer is {}", prompt.len(), record.answer);
    for (name, plan) in [("dense", dense), ("uniform window, 25 %", uniform)] {
        let mut engine = checkpoint.engine(EngineOptions::default());
        let id = engine.resume(model.open(&plan, capacity, 0)?, &prompt[..], options.clone());
        print!("{name}:");
        while let Some(event) = engine.step()? {
            match event {
                Event::Text { piece, .. } => print!("{piece}"),
                Event::Failed { error, .. } => return Err(error),
                _ => {}
            }
        }
        let usage = engine.take_usage();
        println!(
            "\n  {} KV bytes, prefill {:.0} tok/s, decode {:.0} tok/s",
            engine.reclaim(id).map_or(0, |sequence| model.kv_bytes(&sequence)),
            usage.prefill_tokens_per_second(),
            usage.decode_tokens_per_second()
        );
    }
    Ok(())
}
