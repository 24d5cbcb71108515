mod fit;
mod mqar;
mod multi_key;
mod passkey;
mod prose;
mod variables;

use std::str::FromStr;

use crate::eval::Question;
use crate::{Error, Result};
use moa_core::SplitMix64;

/// A kind of generated question over a long context, as RULER and Zoology ask them: with its own
/// wording, for any length and any number, the same for the same seed and tokenizer.
///
/// | task | context | question | score |
/// |---|---|---|---|
/// | [`Task::Passkey`] | prose with one number in it | the number | 0 or 1 |
/// | [`Task::MultiKey`] | prose with 8 record lines | the value of one line | 0 or 1 |
/// | [`Task::VariableTracking`] | prose with two chains of 5 assignments | all variables that hold a value | share of the 5 names |
/// | [`Task::Mqar`] | record lines and nothing else | the values of 4 lines, one after another in a conversation | share of the 4 values |
///
/// Answers are scored as RULER scores them, by
/// [`string_match_all`](crate::eval::metrics::string_match_all). [`Checkpoint::task_question`] makes a
/// question of a given length.
///
/// Multi-key and MQAR ask in LongEval's wording, which small models trained on it follow. The other
/// two need a model that understands plain English.
///
/// [`Checkpoint::task_question`]: crate::Checkpoint::task_question
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Task {
    /// One number in prose.
    Passkey,
    /// One of several keyed values in prose.
    MultiKey,
    /// All variables that a value was handed on to.
    VariableTracking,
    /// Several of many keyed values (multi-query associative recall).
    Mqar,
}

impl Task {
    /// Every task with its name on the command line.
    pub const ALL: [(Self, &'static str); 4] = [
        (Self::Passkey, "passkey"),
        (Self::MultiKey, "multi-key"),
        (Self::VariableTracking, "variable-tracking"),
        (Self::Mqar, "mqar"),
    ];

    /// Name on the command line and in files.
    pub fn name(self) -> &'static str {
        match self {
            Self::Passkey => "passkey",
            Self::MultiKey => "multi-key",
            Self::VariableTracking => "variable-tracking",
            Self::Mqar => "mqar",
        }
    }

    /// Sentences, or lines of a record, that a question needs at least.
    fn shortest(self) -> usize {
        match self {
            Self::Passkey | Self::VariableTracking => 1,
            Self::MultiKey => multi_key::KEYS,
            Self::Mqar => mqar::QUERIES,
        }
    }

    /// A question over `units` sentences or lines.
    fn build(self, units: usize, seed: u64) -> Question {
        let rng = SplitMix64::new(seed);
        match self {
            Self::Passkey => passkey::build(units, rng),
            Self::MultiKey => multi_key::build(units, rng),
            Self::VariableTracking => variables::build(units, rng),
            Self::Mqar => mqar::build(units, rng),
        }
    }
}

impl FromStr for Task {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        Self::ALL.iter().find(|(_, n)| *n == name).map(|(task, _)| *task).ok_or_else(|| {
            let names: Vec<_> = Self::ALL.iter().map(|(_, n)| *n).collect();
            Error::invalid("task", names.join(", "), name)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn questions_repeat_with_their_seed_and_their_context_holds_every_reference() {
        for (task, name) in Task::ALL {
            assert_eq!(name.parse::<Task>().unwrap(), task);
            assert_eq!(task.name(), name);
            for units in [task.shortest(), 100] {
                let question = task.build(units, 7);
                assert_eq!(question, task.build(units, 7), "{name}");
                assert_ne!(question, task.build(units, 8), "{name}");
                let context = &question.turns[0].text;
                for reference in question.turns.iter().flat_map(|turn| &turn.references) {
                    let depth = reference.depth.unwrap();
                    assert!((0.0..=1.0).contains(&depth), "{name}: {depth}");
                    // The first mention lies at about the depth that is claimed for it.
                    let place = context.find(&reference.text).unwrap() as f64;
                    let place = place / context.len() as f64;
                    assert!(units < 100 || (place - depth).abs() < 0.15, "{name}: {place} {depth}");
                }
            }
        }
        assert!("needle".parse::<Task>().unwrap_err().to_string().contains("mqar"));
    }

    #[test]
    fn longer_questions_hold_the_same_answers() {
        for (task, name) in Task::ALL {
            let texts = |units| -> Vec<String> {
                let turns = task.build(units, 3).turns;
                turns.into_iter().flat_map(|t| t.references).map(|r| r.text).collect()
            };
            if task != Task::Mqar {
                assert_eq!(texts(50), texts(51), "{name}");
            }
            let len = |units| task.build(units, 3).turns[0].text.len();
            assert!((10..200).all(|units| len(units) < len(units + 1)), "{name}");
        }
    }
}
