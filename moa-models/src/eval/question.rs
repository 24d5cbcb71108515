use serde::{Deserialize, Serialize};

use crate::eval::metrics::contains;
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

/// When an answer holds a reference.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scoring {
    /// The last integer of the answer is the reference: LongEval.
    LastInteger,
    /// The answer contains the reference, in upper or lower case: `string_match_all` of RULER.
    Contains,
}

/// A conversation whose right answers are known. Its score is the share of all references that the
/// answers hold.
#[derive(Clone, Debug, PartialEq)]
pub struct Question {
    /// Messages, answered one after another on one cache; the first holds the context.
    pub turns: Vec<Turn>,
    /// When an answer is right.
    pub scoring: Scoring,
}

impl Question {
    /// A question of one message.
    pub fn one(text: impl Into<String>, references: Vec<Reference>, scoring: Scoring) -> Self {
        Self { turns: vec![Turn { text: text.into(), references }], scoring }
    }
}

impl Scoring {
    /// Whether `answer` holds `reference`.
    pub fn holds(self, answer: &str, reference: &str) -> bool {
        match self {
            Self::LastInteger => {
                last_integer(answer).is_some_and(|got| reference.parse() == Ok(got))
            }
            Self::Contains => contains(answer, reference),
        }
    }
}
