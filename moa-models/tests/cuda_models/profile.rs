//! Profiles made on the GPU against the CPU's.

use moa_conformance::{Trial, Verdict, trials};
use moa_core::Influence;
use moa_models::{Backward, Decoder, Item, Message, Objective, PHRASINGS};

use crate::{cpu, cuda, likeliest, plans, read, step};

pub(crate) fn trials() -> Vec<Trial> {
    trials![influence_is_the_cpus]
}

/// A record, and what the model answers.
fn item() -> Item {
    let prompt = PHRASINGS[0].prompt(24, 5);
    let prompt = cpu().chat_tokens(&[Message::user(&prompt.text)]).unwrap();
    let model = &cpu().model;
    let [dense, _] = plans(model.shape());
    let mut sequence = model.open(&dense, prompt.len() + 24, 0).unwrap();
    let mut response = vec![likeliest(&read(model, &mut sequence, &prompt, 500))];
    while response.len() < 20 {
        let logits = step(model, &mut sequence, &response[response.len() - 1..]);
        response.push(likeliest(&logits[0]));
    }
    Item::new(&prompt, &response).unwrap()
}

fn profile<D: Backward>(model: &Decoder<D>, item: &Item, objective: Objective) -> (f64, Influence) {
    let mut influence = Influence::new(model.shape(), item.tokens().len(), 64).unwrap();
    let loss = model.profile(item, objective, &mut influence).unwrap();
    (loss, influence)
}

/// Cosine of two vectors, and the ratio of their lengths.
pub(crate) fn compare(a: &[f64], b: &[f64]) -> (f64, f64) {
    let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(x, y)| x * y).sum::<f64>();
    let (of_a, of_b) = (dot(a, a).sqrt(), dot(b, b).sqrt());
    (dot(a, b) / (of_a * of_b), of_a / of_b)
}

fn influence_is_the_cpus() -> Verdict {
    let models = cuda()?;
    let item = item();
    let shape = cpu().model.shape();
    for objective in [Objective::Margin, Objective::CrossEntropyAbsolute] {
        let (loss, expected) = profile(&cpu().model, &item, objective);
        for &(checkpoint, share) in &models {
            let (got_loss, got) = profile(&checkpoint.model, &item, objective);
            println!("{objective:?}: loss {got_loss}, {loss} on the CPU");
            assert!(
                (got_loss - loss).abs() <= share * (1.0 + loss.abs()),
                "{got_loss}, not {loss}"
            );
            for layer in 0..shape.layers {
                let all = |influence: &Influence| -> Vec<f64> {
                    let heads = 0..shape.kv_heads;
                    heads.flat_map(|head| influence.head(layer, head).to_vec()).collect()
                };
                let (cosine, ratio) = compare(&all(&got), &all(&expected));
                println!("{objective:?}, layer {layer}: cosine {cosine:.5}, size {ratio:.4}");
                assert!(cosine > 0.98, "layer {layer}: {cosine}");
                // bf16 rounds gradients coarsely on their way down to the lowest layers.
                let off = if share > 0.05 { 0.2 } else { 0.1 };
                assert!((ratio - 1.0).abs() < off, "layer {layer}: {ratio}");
            }
        }
    }
    Ok(())
}
