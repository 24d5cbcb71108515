//! Prompts and steps on the CPU, as `benches/peers/turns.py` asks for them, to measure other engines beside it.
//!
//! ```sh
//! cargo run --release -p moa-models --example turns -- MODEL THREADS
//! ```
//! `prefill LENGTH DENSITY SEED` reads a prompt that is kept, dense with a density of 1; `decode LENGTH DENSITY STEPS` goes on
//! with it. Printed are the seconds of the prompt, or of one step. Caches and activations are those of `moa bench`.

use std::collections::HashMap;
use std::io::BufRead;
use std::time::Instant;

use moa_core::{DEFAULT_SINK, Dtype, ElasticRule, Plan};
use moa_models::{Checkpoint, Cpu, Session};

const ROOM: usize = 96;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut args = std::env::args().skip(1);
    let file = args.next().ok_or("a model")?;
    let threads: usize = args.next().ok_or("threads")?.parse()?;
    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build()?;
    pool.install(|| run(&file)).map_err(|error| error.to_string().into())
}

fn run(file: &str) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
    let device = Cpu::new(Dtype::Bf16).narrow_activations(true);
    let model = Checkpoint::open(device, file)?.model;
    let vocab = model.config().vocab_size;
    let mut open: HashMap<String, (Session<Cpu>, u32)> = HashMap::new();
    for line in std::io::stdin().lock().lines() {
        let line = line?;
        let words: Vec<&str> = line.split_whitespace().collect();
        let [what, length, density, steps] = words[..] else { return Err("4 words".into()) };
        let name = format!("{length} {density}");
        let count: usize = length.parse()?;
        if what == "prefill" {
            let density: f64 = density.parse()?;
            let plan = match density < 1.0 {
                true => {
                    Plan::uniform(model.shape(), DEFAULT_SINK, ElasticRule::new(0.0, density)?)?
                }
                false => Plan::full(model.shape())?,
            };
            open.remove(&name);
            let mut sequence = model.open(&plan, count + ROOM, 0)?;
            let first: u64 = steps.parse()?;
            let token = |i: u64| (100 + (i * 7919 + first) % (vocab as u64 - 100)) as u32;
            let tokens: Vec<u32> = (0..count as u64).map(token).collect();
            let begin = Instant::now();
            let logits = model.prefill(&mut sequence, &tokens, 512)?;
            let best = (0..vocab).max_by(|a, b| logits[*a].total_cmp(&logits[*b])).unwrap_or(0);
            println!("{}", begin.elapsed().as_secs_f64());
            open.insert(name, (model.session(vec![sequence])?, best as u32));
        } else {
            let (session, token) = open.get_mut(&name).ok_or("a prompt")?;
            let steps: usize = steps.parse()?;
            for _ in 0..2 {
                *token = session.step_greedy(&model, &[*token])?[0];
            }
            let begin = Instant::now();
            for _ in 0..steps {
                *token = session.step_greedy(&model, &[*token])?[0];
            }
            println!("{}", begin.elapsed().as_secs_f64() / steps as f64);
        }
    }
    Ok(())
}
