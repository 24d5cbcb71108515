//! LongEval line retrieval: a long record, a question about one line.

use std::path::Path;

use serde::Deserialize;

use crate::eval::jsonl;
use crate::eval::{Question, Reference, Scoring};
use crate::{Error, Result};
use moa_core::SplitMix64;

/// One case, as LongEval's files hold it.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct RetrievalCase {
    /// The user's message.
    pub prompt: String,
    /// The answer.
    pub expected_number: i64,
    /// The line that holds the answer; needed only to shorten the case.
    #[serde(default)]
    pub correct_line: Option<String>,
}

impl RetrievalCase {
    /// Reads cases, one JSON object a line.
    ///
    /// # Errors
    /// [`Error::Io`], or [`Error::Line`] with the line that is not a case.
    pub fn load(path: impl AsRef<Path>) -> Result<Vec<Self>> {
        jsonl::load(path.as_ref())
    }

    /// The same case with only `lines` consecutive record lines, the right one among them; where it
    /// lies in the window is drawn with `seed`. A record of fewer lines stays as it is.
    ///
    /// # Errors
    /// [`Error::Invalid`] if `lines` is 0 or the right line cannot be found.
    pub fn shorten(&self, lines: usize, seed: u64) -> Result<Self> {
        if lines == 0 {
            return Err(Error::invalid("lines", "at least 1", 0));
        }
        let Record { all, first, count, right } = self.record();
        let Some(right) = right else {
            let needle = format!("<{}>", self.expected_number);
            return Err(Error::invalid("case", "a record line with the expected number", needle));
        };
        if lines >= count {
            return Ok(self.clone());
        }
        // Windows of `lines` lines that hold the right one start in lowest..=highest.
        let lowest = (right + 1).saturating_sub(lines);
        let highest = right.min(count - lines);
        let start = first + lowest + SplitMix64::new(seed).below(highest - lowest + 1);
        let kept = [&all[..first], &all[start..start + lines], &all[first + count..]].concat();
        Ok(Self { prompt: kept.concat(), ..self.clone() })
    }

    /// Record lines that the case has.
    pub fn record_lines(&self) -> usize {
        self.record().count
    }

    /// The case as a question, with where the right line lies among the record lines.
    pub fn question(&self) -> Question {
        let Record { count, right, .. } = self.record();
        let depth = right.map(|right| right as f64 / (count - 1).max(1) as f64);
        let text = self.expected_number.to_string();
        Question::one(&self.prompt, vec![Reference { text, depth }], Scoring::LastInteger)
    }

    fn record(&self) -> Record<'_> {
        let all: Vec<&str> = self.prompt.split_inclusive('\n').collect();
        let is_record = |line: &&str| line.starts_with("line ") && line.contains('<');
        let first = all.iter().position(is_record).unwrap_or(0);
        let count = all[first..].iter().take_while(|line| is_record(line)).count();
        let needle = format!("<{}>", self.expected_number);
        let is_right = |line: &&str| match &self.correct_line {
            Some(right) => line.trim_end() == right.trim_end(),
            None => line.contains(&needle),
        };
        let right = all[first..first + count].iter().position(is_right);
        Record { all, first, count, right }
    }
}

/// The lines of a prompt: `count` record lines from line `first`, and the right one among them.
struct Record<'a> {
    all: Vec<&'a str>,
    first: usize,
    count: usize,
    right: Option<usize>,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn case() -> RetrievalCase {
        let lines: String =
            (0..10).map(|i| format!("line a-{i}: REGISTER_CONTENT is <{}>\n", 100 + i)).collect();
        RetrievalCase {
            prompt: format!("Remember.\n\n{lines}\nTell me line a-7."),
            expected_number: 107,
            correct_line: Some("line a-7: REGISTER_CONTENT is <107>\n".into()),
        }
    }

    #[test]
    fn shortened_case_keeps_the_right_line_among_consecutive_ones() {
        let mut places = std::collections::HashSet::new();
        for seed in 0..50 {
            let short = case().shorten(3, seed).unwrap();
            let kept: Vec<_> = short.prompt.lines().filter(|l| l.starts_with("line ")).collect();
            assert_eq!(kept.len(), 3);
            let right = kept.iter().position(|l| l.contains("<107>")).unwrap();
            places.insert(right);
            let first: usize = kept[0][7..8].parse().unwrap();
            assert!(
                kept.iter()
                    .enumerate()
                    .all(|(i, l)| l.starts_with(&format!("line a-{}", first + i)))
            );
            assert!(
                short.prompt.starts_with("Remember.\n\nline")
                    && short.prompt.ends_with("\nTell me line a-7.")
            );
        }
        assert_eq!(places.len(), 3);
        assert_eq!(case().question().turns[0].references[0].depth, Some(7.0 / 9.0));
        assert_eq!(case().shorten(10, 0).unwrap(), case());
        assert_eq!(case().record_lines(), 10);
        assert!(case().shorten(0, 0).is_err());
        let without = RetrievalCase { expected_number: 5, correct_line: None, ..case() };
        assert!(without.shorten(3, 0).is_err());
    }
}
