use serde::{Deserialize, Serialize};

use crate::eval::metrics::{Metric, contains};
use crate::find_plan::records::last_integer;

/// A text that an answer must hold to be right; [`Scoring`] says when it does.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Reference {
    /// The text.
    pub text: String,
    /// Where the context says it: 0 for its beginning, 1 for its end; `None` where unknown.
    pub depth: Option<f64>,
}

/// One message of the user's, and the texts that its answer must hold.
#[derive(Clone, Debug, PartialEq)]
pub struct Turn {
    /// The message.
    pub text: String,
    /// The texts that the answer must hold; there is at least one.
    pub references: Vec<Reference>,
}

/// When an answer holds a reference, and what that is worth.
#[derive(Clone, Debug, PartialEq)]
pub enum Scoring {
    /// The last integer of the answer is the reference: LongEval. The score is the share of references
    /// held.
    LastInteger,
    /// The answer contains the reference, in upper or lower case: `string_match_all` of RULER. The
    /// score is the share of references held.
    Contains,
    /// As `Contains`, but one reference is enough: `string_match_part` of RULER.
    Any,
    /// The best score of a metric over the references, which are other ways to say the same.
    Metric(Metric),
}

/// How the messages of a question become what the model reads.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Prompting {
    /// As the checkpoint's prompts ([`PromptStyle`](crate::PromptStyle)).
    #[default]
    Chat,
    /// As running text that the model continues.
    Text,
}

/// A conversation whose right answers are known. Its score is the mean of its messages', which count by
/// the number of their references where the score is a share of those.
#[derive(Clone, Debug, PartialEq)]
pub struct Question {
    /// Messages, answered one after another on one cache; the first holds the context.
    pub turns: Vec<Turn>,
    /// When an answer is right.
    pub scoring: Scoring,
    /// How the model reads it. More than one message needs a chat template.
    pub prompting: Prompting,
    /// How the answer begins: the model goes on from there. Of a question of one message; others have
    /// none.
    pub answer_prefix: String,
}

impl Question {
    /// A conversation by the chat template.
    pub fn new(turns: Vec<Turn>, scoring: Scoring) -> Self {
        Self { turns, scoring, prompting: Prompting::Chat, answer_prefix: String::new() }
    }

    /// A question of one message, by the chat template.
    pub fn one(text: impl Into<String>, references: Vec<Reference>, scoring: Scoring) -> Self {
        Self::new(vec![Turn { text: text.into(), references }], scoring)
    }

    /// The same question with the beginning of its answer given, so that a model without a chat
    /// template can go on from there as well.
    #[must_use]
    pub fn with_answer_prefix(self, prefix: impl Into<String>) -> Self {
        Self { answer_prefix: prefix.into(), ..self }
    }
}

impl Scoring {
    /// Whether `answer` holds `reference`; of a metric, whether its score is 1.
    pub fn holds(&self, answer: &str, reference: &str) -> bool {
        match self {
            Self::LastInteger => {
                last_integer(answer).is_some_and(|got| reference.parse() == Ok(got))
            }
            Self::Contains | Self::Any => contains(answer, reference),
            Self::Metric(metric) => metric.score(answer, reference) >= 1.0,
        }
    }

    /// The score of an answer, from 0 to 1, and what it weighs in a conversation.
    pub(crate) fn score(&self, answer: &str, references: &[Reference]) -> (f64, f64) {
        let held = || references.iter().filter(|r| self.holds(answer, &r.text)).count();
        match self {
            Self::LastInteger | Self::Contains => {
                let all = references.len().max(1) as f64;
                (held() as f64 / all, all)
            }
            Self::Any => (f64::from(held() > 0), 1.0),
            Self::Metric(metric) => {
                let scores = references.iter().map(|r| metric.score(answer, &r.text));
                (scores.fold(0.0, f64::max), 1.0)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn references_are_all_wanted_or_one_of_them_or_compared() {
        let references = ["one", "two"].map(|t| Reference { text: t.into(), depth: None });
        let score = |scoring: Scoring, answer| scoring.score(answer, &references);
        assert_eq!(score(Scoring::Contains, "ONE"), (0.5, 2.0));
        assert_eq!(score(Scoring::Any, "ONE"), (1.0, 1.0));
        assert_eq!(score(Scoring::Any, "three"), (0.0, 1.0));
        assert_eq!(score(Scoring::Metric(Metric::F1), "the one"), (1.0, 1.0));
        assert_eq!(score(Scoring::Metric(Metric::F1), "two three"), (2.0 / 3.0, 1.0));
        assert!(!Scoring::Metric(Metric::F1).holds("two three", "two"));
    }
}
