//! Built-in calibration tasks of graded difficulty. Each answer depends on something far back, which is
//! what calibration needs (MoA, section 4.3: general text teaches a plan nothing about long
//! dependencies).

use moa_core::SplitMix64;

use crate::checkpoint::template::Message;
use crate::find_plan::facts::{Fact, facts, keys, scatter};
use crate::find_plan::records::{PHRASINGS, Phrasing};
use crate::find_plan::text::excerpt;

/// A conversation that ends with a question, and what a right answer contains.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct TaskPrompt {
    pub(crate) messages: Vec<Message>,
    pub(crate) answers: Vec<String>,
}

/// A kind of built-in question, from easy to hard for a small model.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Task {
    /// A number in running text, said to be important.
    PassKey,
    /// Facts in running text, one of which is asked for in other words.
    Facts(usize),
    /// Numbers, codes and words in running text, one of which is asked for.
    Keys(usize),
    /// Two facts in running text, both asked for.
    TwoAnswers,
    /// A sentence of running text, to be written again.
    Quote,
    /// Something that was said at the beginning of a conversation about running text.
    Recall,
    /// A line of a long list.
    Record(&'static Phrasing),
}

impl Task {
    /// All but the records, from easy to hard.
    pub(crate) const OF_TEXT: [Self; 7] = [
        Self::PassKey,
        Self::Facts(1),
        Self::Facts(4),
        Self::Keys(4),
        Self::TwoAnswers,
        Self::Recall,
        Self::Quote,
    ];

    /// Tasks of which one is enough: lists, in each of the built-in phrasings.
    pub(crate) fn records() -> impl Iterator<Item = Self> {
        PHRASINGS.iter().map(Self::Record)
    }

    /// What messages call it.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::PassKey => "pass key",
            Self::Facts(1) => "one fact",
            Self::Facts(_) => "one of several facts",
            Self::Keys(_) => "one of several keys",
            Self::TwoAnswers => "two facts",
            Self::Quote => "quotation",
            Self::Recall => "recall",
            Self::Record(_) => "records",
        }
    }

    /// Questions over one context of about `bytes` bytes, drawn with `seed`; at most `questions`, fewer
    /// where the task has fewer.
    pub(crate) fn prompts(self, bytes: usize, seed: u64, questions: usize) -> Vec<TaskPrompt> {
        let rng = &mut SplitMix64::new(seed);
        match self {
            Self::PassKey => vec![pass_key(rng, bytes)],
            Self::Facts(1) => {
                let facts = facts(rng, 1);
                one_of(rng, bytes, &facts, 1)
            }
            Self::Facts(several) => {
                let facts = facts(rng, several.max(questions));
                one_of(rng, bytes, &facts, questions)
            }
            Self::Keys(several) => {
                let keys = keys(rng, several.max(questions));
                one_of(rng, bytes, &keys, questions)
            }
            Self::TwoAnswers => vec![two_answers(rng, bytes)],
            Self::Quote => vec![quote(rng, bytes)],
            Self::Recall => vec![recall(rng, bytes)],
            Self::Record(phrasing) => {
                let lines =
                    bytes.saturating_sub(phrasing.introduction_bytes()) / phrasing.line_bytes();
                let prompts = phrasing.prompts(lines.max(1), seed, questions);
                let prompt = |record: crate::find_plan::records::RecordPrompt| {
                    one(record.text, vec![record.answer.to_string()])
                };
                prompts.into_iter().map(prompt).collect()
            }
        }
    }
}

fn one(text: String, answers: Vec<String>) -> TaskPrompt {
    TaskPrompt { messages: vec![Message::user(text)], answers }
}

fn pass_key(rng: &mut SplitMix64, bytes: usize) -> TaskPrompt {
    let key = (10_000 + rng.below(90_000)).to_string();
    let text = excerpt(rng, bytes);
    let statement = format!("The pass key is {key}. Remember it. {key} is the pass key.");
    let text = scatter(rng, &text, &[&statement]);
    let text = format!(
        "There is an important piece of information hidden inside a lot of irrelevant text. Find it and \
         memorize it. I will quiz you about it.\n\n{text}\n\nWhat is the pass key? Answer with the number."
    );
    one(text, vec![key])
}

const READ: &str = "Read the following text carefully and keep what it says in mind. A question about it follows.\n\n";

fn one_of(rng: &mut SplitMix64, bytes: usize, facts: &[Fact], questions: usize) -> Vec<TaskPrompt> {
    let text = excerpt(rng, bytes);
    let statements: Vec<&str> = facts.iter().map(|fact| fact.statement.as_str()).collect();
    let text = scatter(rng, &text, &statements);
    // Without a choice the question is about any of them.
    let first = if questions < facts.len() { rng.below(facts.len() + 1 - questions) } else { 0 };
    let asked = facts[first..].iter().take(questions);
    let ask = |fact: &Fact| {
        let text = format!("{READ}{text}\n\n{} Answer in one short sentence.", fact.question);
        one(text, vec![fact.answer.clone()])
    };
    asked.map(ask).collect()
}

fn two_answers(rng: &mut SplitMix64, bytes: usize) -> TaskPrompt {
    let facts = facts(rng, 2);
    let text = excerpt(rng, bytes);
    let text = scatter(rng, &text, &[&facts[0].statement, &facts[1].statement]);
    let text = format!(
        "{READ}{text}\n\nAnswer two questions, each in one short sentence. {} {}",
        facts[0].question, facts[1].question
    );
    one(text, facts.into_iter().map(|fact| fact.answer).collect())
}

fn quote(rng: &mut SplitMix64, bytes: usize) -> TaskPrompt {
    let fact = &facts(rng, 1)[0];
    let text = excerpt(rng, bytes);
    let text = scatter(rng, &text, &[&fact.statement]);
    let words: Vec<&str> = fact.statement.trim_end_matches('.').split(' ').collect();
    let beginning = words[..3].join(" ");
    let text = format!(
        "{READ}{text}\n\nOne sentence of the text begins with the words \"{beginning}\". Write the whole \
         sentence again, word for word."
    );
    one(text, vec![words[3..].join(" ")])
}

fn recall(rng: &mut SplitMix64, bytes: usize) -> TaskPrompt {
    let fact = &facts(rng, 1)[0];
    let text = excerpt(rng, bytes);
    let messages = vec![
        Message::user(format!("Please remember this for later: {}", fact.statement)),
        Message::assistant("I will remember it."),
        Message::user(format!("Now read this text.\n\n{text}\n\nTell me when you have read it.")),
        Message::assistant("I have read the text."),
        Message::user(format!(
            "Back to what I told you at the beginning. {} Answer in one short sentence.",
            fact.question
        )),
    ];
    TaskPrompt { messages, answers: vec![fact.answer.clone()] }
}

impl TaskPrompt {
    /// Whether a response contains every answer as whole words, whatever their case.
    pub(crate) fn is_answered_by(&self, response: &str) -> bool {
        let words = |text: &str| -> Vec<String> {
            let words = text.split(|c: char| !c.is_alphanumeric()).filter(|word| !word.is_empty());
            words.map(str::to_lowercase).collect()
        };
        let response = words(response);
        self.answers.iter().all(|answer| {
            let answer = words(answer);
            !answer.is_empty() && response.windows(answer.len()).any(|part| part == answer)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prompts_repeat_with_their_seed_grow_with_their_bytes_and_hold_their_answers() {
        for task in Task::OF_TEXT.into_iter().chain(Task::records()) {
            let name = task.name();
            let texts = |bytes, seed, questions| -> Vec<(String, TaskPrompt)> {
                let prompts = task.prompts(bytes, seed, questions).into_iter();
                let text = |p: &TaskPrompt| -> String {
                    p.messages.iter().map(|m| m.content.as_str()).collect()
                };
                prompts.map(|prompt| (text(&prompt), prompt)).collect()
            };
            assert_eq!(texts(3000, 7, 8), texts(3000, 7, 8), "{name}");
            assert_ne!(texts(3000, 7, 1), texts(3000, 8, 1), "{name}");
            assert_eq!(texts(3000, 7, 1).len(), 1, "{name}");
            let (short, long) = (texts(3000, 7, 1)[0].0.len(), texts(9000, 7, 1)[0].0.len());
            assert!(long > short + 4000 && long < 11_000, "{name}: {short} and {long}");
            for (text, prompt) in texts(3000, 7, 8) {
                assert!(prompt.is_answered_by(&text), "{name}");
                let question = &prompt.messages.last().unwrap().content;
                let question = question.rsplit("\n\n").next().unwrap();
                assert!(!prompt.is_answered_by(question), "{name}: {question}");
            }
        }
        // Many questions share one context.
        assert_eq!(Task::Keys(4).prompts(3000, 1, 8).len(), 8);
        assert_eq!(Task::Facts(4).prompts(3000, 1, 8).len(), 8);
    }

    #[test]
    fn answers_are_whole_words_in_their_order() {
        let prompt = one(String::new(), vec!["47".into(), "spare key".into()]);
        assert!(prompt.is_answered_by("The Spare-Key of room 47."));
        assert!(!prompt.is_answered_by("The spare key of room 470."));
        assert!(!prompt.is_answered_by("The key, spare, of room 47."));
    }
}
