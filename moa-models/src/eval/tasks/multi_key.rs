use super::prose::Prose;
use crate::eval::{Question, Reference, Scoring};
use crate::find_plan::records::{entries, line_question, record_line};
use moa_core::SplitMix64;

/// Record lines in the prose, of which one is asked for.
pub(super) const KEYS: usize = 8;

/// Record lines scattered in prose, and a question about one of them.
pub(super) fn build(sentences: usize, mut rng: SplitMix64) -> Question {
    let lines = entries(&mut rng, KEYS);
    let depths: Vec<f64> = lines.iter().map(|_| rng.unit()).collect();
    let asked = rng.below(KEYS);
    let mut prose = Prose::new(rng);
    for ((key, value), depth) in lines.iter().zip(&depths) {
        prose.put(*depth, format!("\n{}", record_line(key, *value)));
    }
    let (key, value) = &lines[asked];
    let text = format!(
        "Below is a text with some record lines in it. Each of them begins with 'line <line index>' \
         and contains a '<REGISTER_CONTENT>' at the end of the line as a numerical value. Remember \
         them, a question about one of them follows.\n\n{}\n\nNow the text is over. {}",
        prose.text(sentences).trim_end(),
        line_question(key),
    );
    let reference = Reference { text: value.to_string(), depth: Some(depths[asked]) };
    Question::one(text, vec![reference], Scoring::Contains)
}
