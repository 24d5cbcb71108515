use crate::eval::{Question, Reference, Scoring, Turn};
use crate::find_plan::records::{entries, line_question, record_line};
use moa_core::SplitMix64;

/// Lines that are asked for.
pub(super) const QUERIES: usize = 4;

/// A record of `lines` lines, and questions about some of them in one conversation.
pub(super) fn build(lines: usize, mut rng: SplitMix64) -> Question {
    let lines = entries(&mut rng, lines);
    let mut record: String = lines.iter().map(|(key, value)| record_line(key, *value)).collect();
    record.insert_str(
        0,
        "Below is a record of lines I want you to remember. Each line begins with 'line <line index>' \
         and contains a '<REGISTER_CONTENT>' at the end of the line as a numerical value. Questions \
         about some of the lines follow.\n\n",
    );
    record.push_str("\nNow the record is over. ");
    let mut left: Vec<usize> = (0..lines.len()).collect();
    let mut turns = Vec::new();
    for _ in 0..QUERIES.min(lines.len()) {
        let index = left.swap_remove(rng.below(left.len()));
        let (key, value) = &lines[index];
        let depth = Some(index as f64 / (lines.len() - 1).max(1) as f64);
        turns.push(Turn {
            text: std::mem::take(&mut record) + &line_question(key),
            references: vec![Reference { text: value.to_string(), depth }],
        });
    }
    Question::new(turns, Scoring::Contains)
}
