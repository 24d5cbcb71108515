mod documents;
mod fit;
mod haystack;
mod mqar;
mod multi_key;
mod niah;
mod paraphrase;
mod passkey;
mod prose;
mod sources;
mod vt;
mod words;

use std::str::FromStr;

use crate::eval::Question;
use crate::{Error, Result};
use moa_core::SplitMix64;
use niah::Niah;

pub use documents::Documents;
pub use sources::TaskSources;

/// A kind of generated question over a long context, for any length and any number, the same for the
/// same seed and tokenizer. [`Task::RULER`] are RULER's thirteen, with its wording, its beginning of the
/// answer and its scores; their words and texts are this crate's own.
///
/// | task | context | question | score |
/// |---|---|---|---|
/// | [`Task::Passkey`] | prose with one number in it | the number | 0 or 1 |
/// | [`Task::MultiKey`] | prose with 8 record lines | the value of one line | 0 or 1 |
/// | [`Task::Mqar`] | record lines and nothing else | the values of 4 lines, one after another in a conversation | share of the 4 values |
/// | [`Task::ParaphrasedNeedle`] | an essay with two facts about people in it | whom one of them is about, in other words | 0 or 1 |
/// | [`Task::NiahSingle1`] | a line of noise again and again, one number for a word | the number | 0 or 1 |
/// | [`Task::NiahSingle2`], [`Task::NiahSingle3`] | an essay, one number or UUID for a word | the value | 0 or 1 |
/// | [`Task::NiahMultikey1`] | an essay, numbers for four words | one of them | 0 or 1 |
/// | [`Task::NiahMultikey2`], [`Task::NiahMultikey3`] | numbers for words, or UUIDs for UUIDs, and nothing else | one of them | 0 or 1 |
/// | [`Task::NiahMultivalue`] | an essay, four numbers for a word | all of them | share of the 4 |
/// | [`Task::NiahMultiquery`] | an essay, numbers for four words | all of them | share of the 4 |
/// | [`Task::Vt`] | a line of noise again and again, a chain of 5 assignments | all variables with its value | share of the 5 |
/// | [`Task::Cwe`] | a numbered list of words | the 10 commonest | share of the 10 |
/// | [`Task::Fwe`] | coded words by Zipf's law | the 3 most frequent | share of the 3 |
/// | [`Task::Qa1`], [`Task::Qa2`] | documents of a file that the user gives ([`Documents`]) | its question | 0 or 1 |
///
/// [`Checkpoint::task_question`] makes a question of a given length. Multi-key and MQAR ask in
/// LongEval's wording, which small models trained on it follow. The others need a model that
/// understands plain English.
///
/// [`Checkpoint::task_question`]: crate::Checkpoint::task_question
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Task {
    /// One number in prose.
    Passkey,
    /// One of several keyed values in prose.
    MultiKey,
    /// Several of many keyed values (multi-query associative recall).
    Mqar,
    /// A fact that is asked for in other words (as in NoLiMa).
    ParaphrasedNeedle,
    /// One needle in noise.
    NiahSingle1,
    /// One needle in an essay.
    NiahSingle2,
    /// One needle with a UUID in an essay.
    NiahSingle3,
    /// One of four needles in an essay.
    NiahMultikey1,
    /// One of many needles.
    NiahMultikey2,
    /// One of many needles, UUIDs for UUIDs.
    NiahMultikey3,
    /// All values of a key.
    NiahMultivalue,
    /// The values of four keys.
    NiahMultiquery,
    /// All variables that a value was handed on to.
    Vt,
    /// The commonest words of a list.
    Cwe,
    /// The most frequent coded words.
    Fwe,
    /// A question on a document among others, of a file in SQuAD's format.
    Qa1,
    /// A question on several documents among others, of a file in HotpotQA's format.
    Qa2,
}

impl Task {
    /// Every task with its name on the command line.
    pub const ALL: [(Self, &'static str); 17] = [
        (Self::Passkey, "passkey"),
        (Self::MultiKey, "multi-key"),
        (Self::Mqar, "mqar"),
        (Self::ParaphrasedNeedle, "paraphrased-needle"),
        (Self::NiahSingle1, "niah_single_1"),
        (Self::NiahSingle2, "niah_single_2"),
        (Self::NiahSingle3, "niah_single_3"),
        (Self::NiahMultikey1, "niah_multikey_1"),
        (Self::NiahMultikey2, "niah_multikey_2"),
        (Self::NiahMultikey3, "niah_multikey_3"),
        (Self::NiahMultivalue, "niah_multivalue"),
        (Self::NiahMultiquery, "niah_multiquery"),
        (Self::Vt, "vt"),
        (Self::Cwe, "cwe"),
        (Self::Fwe, "fwe"),
        (Self::Qa1, "qa_1"),
        (Self::Qa2, "qa_2"),
    ];

    /// RULER's thirteen tasks.
    pub const RULER: [Self; 13] = [
        Self::NiahSingle1,
        Self::NiahSingle2,
        Self::NiahSingle3,
        Self::NiahMultikey1,
        Self::NiahMultikey2,
        Self::NiahMultikey3,
        Self::NiahMultivalue,
        Self::NiahMultiquery,
        Self::Vt,
        Self::Cwe,
        Self::Fwe,
        Self::Qa1,
        Self::Qa2,
    ];

    /// Name on the command line and in files.
    pub fn name(self) -> &'static str {
        Self::ALL.iter().find(|(task, _)| *task == self).map_or("", |(_, name)| name)
    }

    /// Most tokens of an answer: RULER's own for its tasks.
    pub fn max_new_tokens(self) -> usize {
        match self {
            Self::Passkey | Self::MultiKey | Self::Mqar | Self::ParaphrasedNeedle => 48,
            Self::Vt => 30,
            Self::Cwe => 120,
            Self::Fwe => 50,
            Self::Qa1 | Self::Qa2 => 32,
            _ => 128,
        }
    }

    /// Sentences, lines, words or documents that a question needs at least.
    fn shortest(self, sources: &TaskSources, case: usize) -> usize {
        match self {
            Self::Passkey | Self::Vt => 1,
            Self::MultiKey => multi_key::KEYS,
            Self::Mqar => mqar::QUERIES,
            Self::Cwe => words::SHORTEST_CWE,
            Self::Fwe => words::SHORTEST_FWE,
            Self::Qa1 | Self::Qa2 => {
                self.documents(sources).map_or(1, |documents| documents.shortest(case))
            }
            _ => Niah::SHORTEST,
        }
    }

    /// The documents that a task is about.
    fn documents(self, sources: &TaskSources) -> Result<&Documents> {
        let (documents, expected) = match self {
            Self::Qa2 => (&sources.hotpotqa, "a file in HotpotQA's format for qa_2"),
            _ => (&sources.squad, "a file in SQuAD's format for qa_1"),
        };
        documents.as_ref().ok_or_else(|| Error::invalid("task sources", expected, "none"))
    }

    /// Question number `case` over `units` sentences, lines, words or documents, for a context of
    /// about `length` tokens.
    fn build(
        self,
        units: usize,
        sources: &TaskSources,
        (length, case): (usize, usize),
        seed: u64,
    ) -> Result<Question> {
        let rng = SplitMix64::new(seed);
        let niah = match self {
            Self::Passkey => return Ok(passkey::build(units, rng)),
            Self::MultiKey => return Ok(multi_key::build(units, rng)),
            Self::Mqar => return Ok(mqar::build(units, rng)),
            Self::ParaphrasedNeedle => return Ok(paraphrase::build(units, sources, rng)),
            Self::Vt => return Ok(vt::build(units, length, rng)),
            Self::Cwe => return Ok(words::cwe(units, length, rng)),
            Self::Fwe => return Ok(words::fwe(units, length, rng)),
            Self::Qa1 | Self::Qa2 => return Ok(self.documents(sources)?.build(units, case, rng)),
            Self::NiahSingle1 => Niah::SINGLE_1,
            Self::NiahSingle2 => Niah::SINGLE_2,
            Self::NiahSingle3 => Niah::SINGLE_3,
            Self::NiahMultikey1 => Niah::MULTIKEY_1,
            Self::NiahMultikey2 => Niah::MULTIKEY_2,
            Self::NiahMultikey3 => Niah::MULTIKEY_3,
            Self::NiahMultivalue => Niah::MULTIVALUE,
            Self::NiahMultiquery => Niah::MULTIQUERY,
        };
        Ok(niah.build(units, sources, rng))
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

    /// All tasks that need no file.
    fn generated() -> impl Iterator<Item = (Task, &'static str)> {
        Task::ALL.into_iter().filter(|(task, _)| !matches!(task, Task::Qa1 | Task::Qa2))
    }

    fn build(task: Task, units: usize, seed: u64) -> Question {
        task.build(units, &TaskSources::default(), (4096, 0), seed).unwrap()
    }

    #[test]
    fn questions_repeat_with_their_seed_and_their_context_holds_every_reference() {
        for (task, name) in generated() {
            assert_eq!(name.parse::<Task>().unwrap(), task);
            assert_eq!(task.name(), name);
            for units in [task.shortest(&TaskSources::default(), 0), 1000] {
                let question = build(task, units, 7);
                assert_eq!(question, build(task, units, 7), "{name}");
                assert_ne!(question, build(task, units, 8), "{name}");
                let context = &question.turns[0].text;
                for reference in question.turns.iter().flat_map(|turn| &turn.references) {
                    let text = match task {
                        Task::MultiKey | Task::Mqar => format!("<{}>", reference.text),
                        _ => reference.text.clone(),
                    };
                    let place = context.rfind(&text).unwrap() as f64 / context.len() as f64;
                    let Some(depth) = reference.depth else { continue };
                    assert!((0.0..=1.0).contains(&depth), "{name}: {depth}");
                    // The mention lies at about the depth that is claimed for it; the last one of a
                    // variable is where it was handed on.
                    let far = (place - depth).abs();
                    let known = units == 1000 && task != Task::Vt;
                    assert!(!known || far < 0.15, "{name}: {place} {depth}");
                }
            }
        }
        assert!("needle".parse::<Task>().unwrap_err().to_string().contains("niah_single_1"));
    }

    #[test]
    fn longer_questions_hold_the_same_answers() {
        for (task, name) in generated() {
            let texts = |units| -> Vec<String> {
                let turns = build(task, units, 3).turns;
                turns.into_iter().flat_map(|t| t.references).map(|r| r.text).collect()
            };
            if task != Task::Mqar {
                assert_eq!(texts(50), texts(51), "{name}");
            }
            let len = |units| build(task, units, 3).turns[0].text.len();
            assert!(len(100) < len(200) && len(200) < len(400), "{name}");
        }
    }

    #[test]
    fn tasks_about_documents_need_a_file() {
        assert!(Task::RULER.iter().all(|task| task.max_new_tokens() > 0));
        for (task, part) in [(Task::Qa1, "SQuAD"), (Task::Qa2, "HotpotQA")] {
            let error = task.build(1, &TaskSources::default(), (512, 0), 1).unwrap_err();
            assert!(error.to_string().contains(part), "{error}");
        }
    }
}
