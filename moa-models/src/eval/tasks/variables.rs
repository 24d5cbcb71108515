use super::prose::Prose;
use crate::eval::{Question, Reference, Scoring};
use moa_core::SplitMix64;

/// Assignments of a chain; each variable but the first gets the value of the one before.
const CHAIN: usize = 5;
/// One chain is asked for, the other is there to be told apart from it.
const CHAINS: usize = 2;

/// Chains of assignments in prose; the question is which variables hold the value of one chain.
pub(super) fn build(sentences: usize, mut rng: SplitMix64) -> Question {
    let names = names(&mut rng, CHAINS * CHAIN);
    let first = 10_000 + rng.below(45_000);
    let values = [first, first + 1 + rng.below(44_000)];
    let depths: Vec<Vec<f64>> = (0..CHAINS).map(|_| ascending(&mut rng)).collect();
    let asked = rng.below(CHAINS);
    let mut prose = Prose::new(rng);
    for (chain, names) in names.chunks(CHAIN).enumerate() {
        for (index, (name, depth)) in names.iter().zip(&depths[chain]).enumerate() {
            let value = match index {
                0 => values[chain].to_string(),
                _ => format!("VAR {}", names[index - 1]),
            };
            prose.put(*depth, format!("\nVAR {name} = {value}\n"));
        }
    }
    let text = format!(
        "Assignments of variables are hidden in the text below. Keep track of them, a question about \
         them follows.\n\n{}\n\nThat was the text. Find all variables that have the value {}. There \
         are {CHAIN} of them; answer with their names.",
        prose.text(sentences).trim_end(),
        values[asked],
    );
    let own = names[asked * CHAIN..][..CHAIN].iter().zip(&depths[asked]);
    let references =
        own.map(|(name, depth)| Reference { text: name.clone(), depth: Some(*depth) }).collect();
    Question::one(text, references, Scoring::Contains)
}

/// Depths of one chain: a variable is known before it is handed on.
fn ascending(rng: &mut SplitMix64) -> Vec<f64> {
    let mut depths: Vec<f64> = (0..CHAIN).map(|_| rng.unit()).collect();
    depths.sort_by(f64::total_cmp);
    depths
}

/// Distinct names of five capital letters.
fn names(rng: &mut SplitMix64, count: usize) -> Vec<String> {
    let mut names: Vec<String> = Vec::new();
    while names.len() < count {
        let name: String = (0..5).map(|_| char::from(b'A' + rng.below(26) as u8)).collect();
        if !names.contains(&name) {
            names.push(name);
        }
    }
    names
}
