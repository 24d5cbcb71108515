//! Built-in calibration prompts: long records of keyed values and a question that needs one line
//! of them. Every answer depends on one far token group, which is what calibration needs (MoA,
//! section 4.3: general text teaches a plan nothing about long dependencies).

use std::collections::HashSet;
use std::sync::LazyLock;

use moa_core::SplitMix64;

/// First words of keys.
pub(crate) static FIRST: LazyLock<Vec<&str>> =
    LazyLock::new(|| words(include_str!("words/first.txt")));

/// Second words of keys.
pub(crate) static SECOND: LazyLock<Vec<&str>> =
    LazyLock::new(|| words(include_str!("words/second.txt")));

/// Common and rare words: of common ones alone, which are a token or two, plans were found that
/// confuse longer keys.
fn words(text: &'static str) -> Vec<&'static str> {
    text.split_whitespace().collect()
}

/// A way of writing a record: introduction, line, question.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Phrasing {
    introduction: &'static str,
    /// `{key}` and `{value}` are replaced.
    line: &'static str,
    /// `{key}` is replaced.
    question: &'static str,
}

/// The built-in phrasings. Whole introductions are longer than sinks, as real instructions are: what lies in
/// the sinks is seen by every head, whatever its span. Small models follow only those near to what they were trained on, so
/// calibration asks the dense model which of them it answers (see
/// [`Checkpoint::calibrate`](crate::Checkpoint::calibrate)).
pub const PHRASINGS: &[Phrasing] = &[
    Phrasing {
        introduction: "Here is a register with one entry per line. Every entry has a name and a numerical content. The names are made of two words, and no name is used twice. The contents are whole numbers in angle brackets, in no particular order, and have nothing to do with the names or with each other. Please read all of the lines carefully and keep them in mind. When the register is over, there will be one question about a single entry, and the right answer is the content that stands in the line of that name, exactly as it is written there. The register begins now.\n\n",
        line: "line {key}: REGISTER_CONTENT is <{value}>\n",
        question: "\nThat was the register. Tell me what is the <REGISTER_CONTENT> in line {key}? I need the number.",
    },
    Phrasing {
        introduction: "Here is a list of storage lockers. Every locker has a name and a code. The names are made of two words, and no name is used twice. The codes are whole numbers, in no particular order, and have nothing to do with the names or with each other. Please read the whole list carefully and keep it in mind. When the list is over, there will be one question about a single locker, and the right answer is the code that stands beside its name, exactly as it is written there. The list begins now.\n\n",
        line: "Locker {key} has the code {value}.\n",
        question: "\nThat was the whole list. What is the code of locker {key}? Answer with the number.",
    },
    Phrasing {
        introduction: "The following notes assign a number to each name. The names are made of two words, and no name is used twice. The numbers are whole, in no particular order, and have nothing to do with the names or with each other. Please read all of the notes carefully and keep them in mind. When they are over, there will be one question about a single name, and the right answer is the number that stands beside it, exactly as it is written there. The notes begin now.\n\n",
        line: "{key} = {value}\n",
        question: "\nWhich number do the notes assign to {key}? Answer with the number.",
    },
];

/// Of the keys that the words allow, about half: drawing distinct ones stays quick.
const MOST_ENTRIES: usize = 30_000;

/// A prompt whose answer is known.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RecordPrompt {
    /// The user's message.
    pub text: String,
    /// The value that was asked for.
    pub answer: u32,
}

impl Phrasing {
    /// A phrasing of one's own: in `line`, `{key}` and `{value}` are replaced, in `question` `{key}`.
    pub const fn new(
        introduction: &'static str,
        line: &'static str,
        question: &'static str,
    ) -> Self {
        Self { introduction, line, question }
    }

    pub(crate) fn introduction_bytes(&self) -> usize {
        self.introduction.len() + self.question.len()
    }

    /// Bytes of a line with a key and a value of usual length.
    pub(crate) fn line_bytes(&self) -> usize {
        self.line.len() + 8
    }

    /// A record of `lines` lines (at most 4,000) and a question about one of them, drawn with `seed`, as is
    /// how many sentences of the introduction it begins with.
    pub fn prompt(&self, lines: usize, seed: u64) -> RecordPrompt {
        let (mut rng, entries, text) = self.record(lines, seed);
        self.ask(&text, &entries[rng.below(entries.len())])
    }

    /// The record of [`prompt`](Self::prompt) with `questions` questions, one drawn from each of as
    /// many equal parts of it, in order.
    pub fn prompts(&self, lines: usize, seed: u64, questions: usize) -> Vec<RecordPrompt> {
        let (mut rng, entries, text) = self.record(lines, seed);
        let place = |part: usize| entries.len() * part / questions;
        (0..questions)
            .map(|part| place(part) + rng.below((place(part + 1) - place(part)).max(1)))
            .map(|line| self.ask(&text, &entries[line]))
            .collect()
    }

    fn record(&self, lines: usize, seed: u64) -> (SplitMix64, Vec<(String, u32)>, String) {
        let mut rng = SplitMix64::new(seed);
        let entries = entries(&mut rng, lines.clamp(1, 4000));
        let mut text = self.introduction(seed);
        for (key, value) in &entries {
            text.push_str(&self.line.replace("{key}", key).replace("{value}", &value.to_string()));
        }
        (rng, entries, text)
    }

    /// The whole introduction, its first half or its beginning: heads that look at one long introduction
    /// alone would seem to need no more than it.
    fn introduction(&self, seed: u64) -> String {
        let sentences: Vec<&str> = self.introduction.split_inclusive(". ").collect();
        let kept = match seed % 3 {
            0 => sentences.len(),
            1 => sentences.len().div_ceil(2),
            _ => sentences.len().min(2),
        };
        let end = &self.introduction[self.introduction.trim_end().len()..];
        format!("{}{end}", sentences[..kept].concat().trim_end())
    }

    fn ask(&self, record: &str, (key, answer): &(String, u32)) -> RecordPrompt {
        RecordPrompt {
            text: format!("{record}{}", self.question.replace("{key}", key)),
            answer: *answer,
        }
    }
}

/// Distinct keys with a value each, at most [`MOST_ENTRIES`]; fewer are the beginning of more.
pub(crate) fn entries(rng: &mut SplitMix64, count: usize) -> Vec<(String, u32)> {
    let count = count.min(MOST_ENTRIES);
    let mut used = HashSet::new();
    let mut entries = Vec::with_capacity(count);
    let mut second = SECOND.to_vec();
    while entries.len() < count {
        // Second words come round in random order, so that short records repeat none.
        let turn = entries.len() % second.len();
        let other = turn + rng.below(second.len() - turn);
        second.swap(turn, other);
        let key = format!("{}-{}", rng.pick(&FIRST), second[turn]);
        if used.insert(key.clone()) {
            entries.push((key, 1 + rng.below(50_000) as u32));
        }
    }
    entries
}

/// A record line in LongEval's wording, with its line end.
pub(crate) fn record_line(key: &str, value: u32) -> String {
    format!("line {key}: REGISTER_CONTENT is <{value}>\n")
}

/// The question about a record line in LongEval's wording.
pub(crate) fn line_question(key: &str) -> String {
    format!("Tell me what is the <REGISTER_CONTENT> in line {key}? I need the number.")
}

/// The last integer in a text, which is how LongEval reads an answer.
pub(crate) fn last_integer(text: &str) -> Option<i64> {
    text.split(|c: char| !c.is_ascii_digit()).rfind(|run| !run.is_empty())?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prompts_repeat_with_their_seed_and_hold_their_answer() {
        for phrasing in PHRASINGS {
            let prompt = phrasing.prompt(50, 7);
            assert_eq!(prompt, phrasing.prompt(50, 7));
            assert_ne!(prompt, phrasing.prompt(50, 8));
            assert!(prompt.text.contains(&prompt.answer.to_string()));

            let line = |prompt: &RecordPrompt| {
                let key = phrasing.question.replace("{key}", "|");
                let (before, after) = key.split_once('|').unwrap();
                let key = prompt.text.rsplit(before).next().unwrap().strip_suffix(after).unwrap();
                prompt.text.lines().position(|line| line.contains(key)).unwrap()
            };
            let places: Vec<_> = phrasing.prompts(50, 7, 5).iter().map(line).collect();
            let first = places[0] / 10 * 10;
            assert!(
                places.iter().zip(0..).all(|(p, part)| (p - first).abs_diff(10 * part + 5) < 9)
            );
            assert_eq!(phrasing.prompts(2, 7, 3).len(), 3);
        }
    }

    #[test]
    fn last_integer_is_the_last_run_of_digits() {
        assert_eq!(last_integer("line 3 is <4821>."), Some(4821));
        assert_eq!(last_integer("no number"), None);
        assert_eq!(last_integer("99999999999999999999999"), None);
    }
}
