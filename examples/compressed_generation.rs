//! Load a checkpoint, generate with a plan, and see what the KV cache really holds.
//!
//! ```sh
//! cargo run --release -p moa-models --example compressed_generation
//! ```

use moa_core::{ElasticRule, Plan};
use moa_models::{Checkpoint, Cpu, Dtype, Message, Next, PHRASINGS, Result, TextProgress};

fn main() -> Result<()> {
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../assets/moa-tiny");
    let checkpoint = Checkpoint::open(Cpu::new(Dtype::Bf16), folder)?;
    let model = &checkpoint.model;

    // A record of 60 lines and a question about one of them.
    let record = PHRASINGS[0].prompt(60, 1);
    let prompt = checkpoint.chat_tokens(&[Message::user(&record.text)])?;
    let options = checkpoint.greedy(40);
    let capacity = prompt.len() + options.max_new_tokens;

    let dense = Plan::full(model.shape())?;
    let uniform = Plan::uniform(model.shape(), 64, ElasticRule::new(0.0, 0.25)?)?;
    println!("{} prompt tokens; the answer is {}", prompt.len(), record.answer);
    for (name, plan) in [("dense", dense), ("uniform window, 25 %", uniform)] {
        let mut batch = [model.open(&plan, capacity, 0)?];
        let mut print = |progress: TextProgress<'_>| {
            if let TextProgress::Text { piece, .. } = progress {
                print!("{piece}");
            }
            Next::Continue
        };
        print!("{name}:");
        let (_, generation) =
            checkpoint.generate_text(&mut batch, &[&prompt], &options, &[], &mut print)?;
        println!(
            "\n  {} KV bytes, prefill {:.0} tok/s, decode {:.0} tok/s",
            model.kv_bytes(&batch[0]),
            generation.prefill_tokens_per_second(),
            generation.decode_tokens_per_second()
        );
    }
    Ok(())
}
