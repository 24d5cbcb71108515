use super::prose::Prose;
use crate::eval::{Question, Reference, Scoring};
use moa_core::SplitMix64;

/// One number of five digits in prose.
pub(super) fn build(sentences: usize, mut rng: SplitMix64) -> Question {
    let key = (10_000 + rng.below(90_000)).to_string();
    let depth = rng.unit();
    let mut prose = Prose::new(rng);
    prose.put(depth, format!("The pass key is {key}. Remember it: {key} is the pass key. "));
    let text = format!(
        "A pass key is hidden in the text below. Find it and remember it, a question about it \
         follows.\n\n{}\n\nThat was the text. What is the pass key? Answer with the number.",
        prose.text(sentences).trim_end(),
    );
    Question::one(text, vec![Reference { text: key, depth: Some(depth) }], Scoring::Contains)
}
