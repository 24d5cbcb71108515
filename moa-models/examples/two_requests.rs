//! Two requests in one engine, side by side: the second comes while the first is answered, and neither
//! changes what the other gets.
//!
//! ```sh
//! cargo run --release -p moa-models --example two_requests
//! ```

use moa_core::{ElasticRule, Plan};
use moa_models::{
    Checkpoint, Cpu, Dtype, EngineOptions, Event, GenerateOptions, Message, PHRASINGS, Prompt,
    Result,
};

fn main() -> Result<()> {
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../assets/moa-tiny");
    let checkpoint = Checkpoint::open(Cpu::new(Dtype::Bf16), folder)?;
    let shape = checkpoint.model.shape();
    let dense = Plan::full(shape)?;
    let quarter = Plan::uniform(shape, 64, ElasticRule::new(0.0, 0.25)?)?;

    // Two records of 40 lines, and a question about a line of each.
    let records = [1, 2].map(|seed| PHRASINGS[0].prompt(40, seed));
    let [first, second] = &records;
    let ask = |text: &str| Prompt::chat(&[Message::user(text)]);
    let options = GenerateOptions { max_new_tokens: 40, ..GenerateOptions::default() };

    let mut engine = checkpoint.engine(EngineOptions { prefill_chunk: 256, ..Default::default() });
    // A request has its own plan and its own options.
    let mut ids = vec![engine.submit(ask(&first.text), &dense, options.clone())];
    println!("{:32}uniform window, 25 %", "dense");
    let mut completions = Vec::new();
    while let Some(event) = engine.step()? {
        // The first request's row is to the left.
        let of = ids.iter().position(|id| *id == event.id()).unwrap_or_default();
        let indent = 32 * of;
        match event {
            Event::Prefill { done, total, .. } => {
                println!("{:indent$}[{done} of {total} tokens read]", "");
            }
            Event::Text { piece, .. } => println!("{:indent$}{piece:?}", ""),
            Event::Done { completion, .. } => completions.push((of, completion)),
            Event::Failed { error, .. } => return Err(error),
            _ => {}
        }
        if ids.len() == 1 {
            ids.push(engine.submit(ask(&second.text), &quarter, options.clone()));
        }
    }
    completions.sort_by_key(|(of, _)| *of);
    for ((_, completion), record) in completions.iter().zip(&records) {
        println!("{} ({:?}; it is {})", completion.text, completion.finish, record.answer);
    }
    println!("{:.0} tok/s decoded together", engine.take_usage().decode_tokens_per_second());
    Ok(())
}
