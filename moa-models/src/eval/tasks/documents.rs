use std::collections::HashMap;
use std::path::Path;

use serde::Deserialize;

use super::haystack::{distinct, shuffle};
use crate::eval::{Question, Reference, Scoring};
use crate::{Error, Result};
use moa_core::SplitMix64;

/// Questions that some documents answer, with other documents to hide those among: RULER's `qa_1` and
/// `qa_2`.
#[derive(Clone, Debug)]
pub struct Documents {
    /// Every text once, sorted.
    texts: Vec<String>,
    questions: Vec<Asked>,
}

#[derive(Clone, Debug)]
struct Asked {
    query: String,
    answers: Vec<String>,
    /// Texts that hold the answer.
    own: Vec<usize>,
    /// Texts of the same article, which come before any others.
    related: Vec<usize>,
}

/// SQuAD, version 1 or 2.
#[derive(Deserialize)]
struct Squad {
    data: Vec<Article>,
}

#[derive(Deserialize)]
struct Article {
    paragraphs: Vec<Paragraph>,
}

#[derive(Deserialize)]
struct Paragraph {
    context: String,
    qas: Vec<SquadQuestion>,
}

#[derive(Deserialize)]
struct SquadQuestion {
    question: String,
    answers: Vec<SquadAnswer>,
    #[serde(default)]
    is_impossible: bool,
}

#[derive(Deserialize)]
struct SquadAnswer {
    text: String,
}

#[derive(Deserialize)]
struct Hotpot {
    question: String,
    answer: String,
    /// Titles with sentences.
    context: Vec<(String, Vec<String>)>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum File {
    Squad(Squad),
    Hotpot(Vec<Hotpot>),
}

impl Documents {
    /// Reads a JSON file in the format of SQuAD (an object with `data`) or HotpotQA (a list).
    ///
    /// # Errors
    /// [`Error::Io`], or [`Error::Line`] if it is neither or holds no question with an answer.
    pub fn load(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let text = moa_core::read_text_file(path)
            .map_err(|source| Error::Io { path: path.to_path_buf(), source })?;
        let fault = |reason: &str, line: usize| Error::Line {
            path: path.to_path_buf(),
            line,
            reason: reason.to_string(),
        };
        let file = serde_json::from_str::<serde_json::Value>(&text)
            .map_err(|e| fault(&e.to_string(), e.line()))?;
        let file = serde_json::from_value(file).map_err(|_| {
            let expected = "an object {\"data\": [{\"paragraphs\": [{\"context\", \"qas\": \
                [{\"question\", \"answers\": [{\"text\"}]}]}]}]} as SQuAD's, or a list of \
                {\"question\", \"answer\", \"context\": [[title, [sentence]]]} as HotpotQA's";
            fault(&format!("expected {expected}"), 1)
        })?;
        let documents = match file {
            File::Squad(squad) => Self::squad(&squad),
            File::Hotpot(items) => Self::hotpot(&items),
        };
        match documents.questions.is_empty() {
            true => Err(fault("no question with an answer", 1)),
            false => Ok(documents),
        }
    }

    fn squad(squad: &Squad) -> Self {
        let paragraphs = || squad.data.iter().flat_map(|article| &article.paragraphs);
        let (texts, places) = once(paragraphs().map(|p| p.context.clone()));
        let mut questions = Vec::new();
        for article in &squad.data {
            let all: Vec<usize> =
                article.paragraphs.iter().map(|p| places[p.context.as_str()]).collect();
            for paragraph in &article.paragraphs {
                let own = places[paragraph.context.as_str()];
                let mut related: Vec<usize> = all.iter().copied().filter(|i| *i != own).collect();
                related.sort_unstable();
                related.dedup();
                let answerable = |q: &&SquadQuestion| !q.is_impossible && !q.answers.is_empty();
                questions.extend(paragraph.qas.iter().filter(answerable).map(|q| Asked {
                    query: q.question.clone(),
                    answers: q.answers.iter().map(|a| a.text.clone()).collect(),
                    own: vec![own],
                    related: related.clone(),
                }));
            }
        }
        Self { texts, questions }
    }

    fn hotpot(items: &[Hotpot]) -> Self {
        let text =
            |(title, sentences): &(String, Vec<String>)| format!("{title}\n{}", sentences.concat());
        let (texts, places) = once(items.iter().flat_map(|item| item.context.iter().map(text)));
        let asked = |item: &Hotpot| {
            let mut own: Vec<_> = item.context.iter().map(|c| places[text(c).as_str()]).collect();
            own.sort_unstable();
            own.dedup();
            let answers = vec![item.answer.clone()];
            Asked { query: item.question.clone(), answers, own, related: Vec::new() }
        };
        let questions = items.iter().map(asked).collect();
        Self { texts, questions }
    }

    /// Documents that a question needs at least: those that answer it.
    pub(super) fn shortest(&self, case: usize) -> usize {
        self.asked(case).own.len()
    }

    fn asked(&self, case: usize) -> &Asked {
        &self.questions[case % self.questions.len()]
    }

    /// Question number `case` of the file over `count` documents: its own, then those of the same
    /// article, then any, then all again, in random order.
    pub(super) fn build(&self, count: usize, case: usize, mut rng: SplitMix64) -> Question {
        let rng = &mut rng;
        let asked = self.asked(case);
        let order = |rng: &mut SplitMix64, list: &[usize]| -> Vec<usize> {
            distinct(rng, list.len(), list.len()).into_iter().map(|i| list[i]).collect()
        };
        let others: Vec<usize> = (0..self.texts.len())
            .filter(|i| !asked.own.contains(i) && asked.related.binary_search(i).is_err())
            .collect();
        let all = [asked.own.clone(), order(rng, &asked.related), order(rng, &others)].concat();
        let mut taken: Vec<usize> = all.iter().copied().cycle().take(count).collect();
        shuffle(rng, &mut taken);
        let documents: Vec<_> = taken
            .iter()
            .zip(1..)
            .map(|(text, n)| format!("Document {n}:\n{}", self.texts[*text]))
            .collect();
        let instruction = "Answer the question based on the given documents. Only give me the answer \
            and do not output any other words.";
        let text = format!(
            "{instruction}\n\nThe following are given documents.\n\n{}\n\n{instruction}\n\nQuestion: {}",
            documents.join("\n\n"),
            asked.query
        );
        // One document has the answer of SQuAD; of HotpotQA's it is not known which.
        let place = taken.iter().position(|text| *text == asked.own[0]);
        let depth = place.filter(|_| asked.own.len() == 1);
        let depth = depth.map(|place| place as f64 / (taken.len() - 1).max(1) as f64);
        let reference = |text: &String| Reference { text: text.clone(), depth };
        let references = asked.answers.iter().map(reference).collect();
        Question::one(text, references, Scoring::Any).with_answer_prefix(" Answer:")
    }
}

/// Texts once each, sorted, and the place of each.
fn once(texts: impl Iterator<Item = String>) -> (Vec<String>, HashMap<String, usize>) {
    let mut all: Vec<String> = texts.collect();
    all.sort_unstable();
    all.dedup();
    let places = all.iter().cloned().zip(0..).collect();
    (all, places)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn load(text: &str) -> Result<Documents> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("qa.json");
        std::fs::write(&path, text).unwrap();
        Documents::load(&path)
    }

    const SQUAD: &str = r#"{"version": "v2.0", "data": [
        {"title": "A", "paragraphs": [
            {"context": "Ducks swim.", "qas": [
                {"question": "Who swims?", "id": "1", "is_impossible": false,
                 "answers": [{"text": "Ducks", "answer_start": 0}, {"text": "the ducks"}]},
                {"question": "Who flies?", "id": "2", "is_impossible": true, "answers": []}]},
            {"context": "Cats sleep.", "qas": []}]},
        {"title": "B", "paragraphs": [{"context": "Dogs bark.", "qas": [
            {"question": "Who barks?", "answers": [{"text": "Dogs"}]}]}]}]}"#;

    #[test]
    fn squad_questions_are_hidden_among_their_article_then_any_document() {
        let squad = load(SQUAD).unwrap();
        assert_eq!((squad.texts.len(), squad.questions.len()), (3, 2));
        let question = squad.build(2, 0, SplitMix64::new(1));
        let text = &question.turns[0].text;
        assert!(text.contains("Ducks swim.") && text.contains("Cats sleep."), "{text}");
        assert!(text.contains("Document 1:\n") && text.ends_with("\n\nQuestion: Who swims?"));
        let texts: Vec<_> = question.turns[0].references.iter().map(|r| r.text.as_str()).collect();
        assert_eq!((texts, question.scoring), (vec!["Ducks", "the ducks"], Scoring::Any));
        assert_eq!(question.answer_prefix, " Answer:");
        // More than there are: all of them again. The question that cannot be answered is left out.
        let text = squad.build(7, 1, SplitMix64::new(1)).turns[0].text.clone();
        assert!(text.matches("Dogs bark.").count() >= 2 && text.contains("Document 7:"), "{text}");
        assert!(text.ends_with("Question: Who barks?"));
        assert_eq!(squad.build(3, 2, SplitMix64::new(9)), squad.build(3, 0, SplitMix64::new(9)));
    }

    #[test]
    fn hotpotqa_questions_bring_their_documents() {
        let hotpot = load(
            r#"[{"_id": "x", "question": "Q1?", "answer": "yes", "supporting_facts": [],
                 "context": [["T1", ["One. ", "Two."]], ["T2", ["Three."]]]},
                {"question": "Q2?", "answer": "no", "context": [["T3", ["Four."]]]}]"#,
        )
        .unwrap();
        assert_eq!((hotpot.shortest(0), hotpot.shortest(1)), (2, 1));
        let text = &hotpot.build(2, 0, SplitMix64::new(1)).turns[0].text;
        assert!(text.contains("T1\nOne. Two.") && text.contains("T2\nThree."), "{text}");
    }

    #[test]
    fn other_files_are_refused_with_what_was_expected() {
        for (text, part) in [
            ("{\"data\": [", "line 1"),
            ("{\"questions\": []}", "HotpotQA"),
            ("[{\"question\": \"Q\"}]", "SQuAD"),
            ("{\"data\": []}", "no question"),
            ("[]", "no question"),
        ] {
            let error = load(text).unwrap_err();
            assert!(matches!(error, Error::Line { .. }), "{text}: {error}");
            assert!(error.to_string().contains(part), "{text}: {error}");
        }
    }
}
