use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::{Error, Result};

/// Whether one question was answered right.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Answer {
    /// Tokens of the prompt.
    pub prompt_tokens: usize,
    /// Where the answer lies in the prompt, 0 at its beginning and 1 at its end, if that is known.
    pub depth: Option<f64>,
    /// Whether it was given.
    pub right: bool,
}

/// Answers to a set of questions under one cache.
#[derive(Clone, Debug, PartialEq)]
pub struct Answers {
    /// What people call the cache.
    pub name: String,
    /// What was asked, as the settings say it; answers of other evaluations are not compared.
    pub evaluation: Option<String>,
    /// One for each question.
    pub answers: Vec<Answer>,
}

impl Answers {
    /// Reads a file of one JSON object a line, as `moa eval ... --items` writes it: each has
    /// `prompt_tokens`, and either `right` and perhaps `depth`, or a list of `references`, each with
    /// `found` and perhaps `depth`. A first line of `settings` may say the `evaluation`. A last line without
    /// an end, which a run that was broken off has left, is skipped. No two lines may have the same `size` and `case`.
    ///
    /// # Errors
    /// [`Error::Read`], [`Error::Line`] and [`Error::NoAnswers`].
    pub fn load(name: impl Into<String>, path: &Path) -> Result<Self> {
        let read = |source| Error::Read { path: path.to_path_buf(), source };
        let text = moa_core::read_text_file(path).map_err(read)?;
        let (mut answers, mut evaluation, mut asked) = (Vec::new(), None, BTreeSet::new());
        for (index, text) in text.split_inclusive('\n').enumerate() {
            if text.trim().is_empty() || (index > 0 && !text.ends_with('\n')) {
                continue;
            }
            let line = Line { path, number: index + 1, text };
            let value = line.value()?;
            if line.is_header(&value)? {
                evaluation = value["settings"]["evaluation"].as_str().map(str::to_string);
                continue;
            }
            let (size, case) = (value["size"].as_u64(), value["case"].as_u64());
            if let Some(case) = case
                && !asked.insert((size, case))
            {
                return Err(line.fault("`case`", "one that no line before answers", case));
            }
            answers.extend(line.answers(&value)?);
        }
        if answers.is_empty() {
            return Err(Error::NoAnswers { path: path.to_path_buf() });
        }
        Ok(Self { name: name.into(), evaluation, answers })
    }

    /// Questions answered right.
    pub fn right(&self) -> usize {
        self.answers.iter().filter(|a| a.right).count()
    }

    /// Share of questions answered right.
    pub fn accuracy(&self) -> f64 {
        self.right() as f64 / self.answers.len().max(1) as f64
    }
}

struct Line<'a> {
    path: &'a Path,
    /// From 1.
    number: usize,
    text: &'a str,
}

impl Line<'_> {
    fn fault(
        &self,
        what: &'static str,
        expected: &'static str,
        got: impl std::fmt::Display,
    ) -> Error {
        let (path, got) = (PathBuf::from(self.path), got.to_string());
        Error::Line { path, line: self.number, what, expected, got }
    }

    fn value(&self) -> Result<Value> {
        serde_json::from_str(self.text).map_err(|e| self.fault("item", "a JSON object", e))
    }

    /// Whether the line is the settings, which the first one alone may be.
    fn is_header(&self, value: &Value) -> Result<bool> {
        let has_settings = value.get("settings").is_some() && value.get("prompt_tokens").is_none();
        if has_settings && self.number > 1 {
            let expected = "in every line but the first, which alone may be settings";
            return Err(self.fault("`prompt_tokens`", expected, "settings of another run"));
        }
        Ok(has_settings)
    }

    /// What a line asked: one answer, or one for each of its `references`.
    fn answers(&self, value: &Value) -> Result<Vec<Answer>> {
        let tokens = &value["prompt_tokens"];
        let Some(prompt_tokens) = tokens.as_u64() else {
            return Err(self.fault("`prompt_tokens`", "a whole number", tokens));
        };
        let share = |of: &Value, what: &'static str| match of {
            Value::Null => Ok(None),
            share => match share.as_f64().filter(|share| (0.0..=1.0).contains(share)) {
                Some(share) => Ok(Some(share)),
                None => Err(self.fault(what, "a number from 0 to 1", share)),
            },
        };
        share(&value["density"], "`density`")?;
        let answer = |of: &Value, name: &'static str| {
            let Some(right) = of[name].as_bool() else {
                return Err(self.fault(name, "true or false", &of[name]));
            };
            let depth = share(&of["depth"], "`depth`")?;
            Ok(Answer { prompt_tokens: prompt_tokens as usize, depth, right })
        };
        match value.get("references").and_then(Value::as_array) {
            Some(references) => references.iter().map(|r| answer(r, "found")).collect(),
            None => Ok(vec![answer(value, "right")?]),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    fn read(text: &str, number: usize) -> Result<Vec<Answer>> {
        let line = Line { path: "items.jsonl".as_ref(), number, text };
        let value = line.value()?;
        if line.is_header(&value)? { Ok(Vec::new()) } else { line.answers(&value) }
    }

    #[test]
    fn header_and_unknown_fields_are_skipped() {
        assert_eq!(read(r#"{"settings": {"seed": 0}}"#, 1).unwrap(), []);
        let line = r#"{"right": true, "prompt_tokens": 7, "depth": 0.5, "text": "x", "more": []}"#;
        let answer = |depth, right| Answer { prompt_tokens: 7, depth, right };
        assert_eq!(read(line, 1).unwrap(), [answer(Some(0.5), true)]);
        let line = r#"{"right": false, "prompt_tokens": 7}"#;
        assert_eq!(read(line, 2).unwrap(), [answer(None, false)]);
        let line = r#"{"prompt_tokens": 7, "score": 0.5, "references": [
            {"text": "a", "depth": 0.25, "found": true}, {"text": "b", "depth": null, "found": false}]}"#;
        assert_eq!(read(line, 2).unwrap(), [answer(Some(0.25), true), answer(None, false)]);
    }

    #[test]
    fn what_is_wrong_with_a_line_is_named() {
        for (line, what) in [
            ("[1", "JSON"),
            (r#"{"settings": {}}"#, "`prompt_tokens`"),
            (r#"{"settings": {}}"#, "got settings of another run"),
            (r#"{"right": 1, "prompt_tokens": 7}"#, "right must be true or false"),
            (r#"{"references": [{}], "prompt_tokens": 7}"#, "found must be true or false"),
            (r#"{"right": true, "prompt_tokens": -7}"#, "`prompt_tokens`"),
            (r#"{"right": true, "prompt_tokens": 7, "depth": 40}"#, "`depth`"),
            (r#"{"right": true, "prompt_tokens": 7, "density": -0.5}"#, "`density`"),
        ] {
            let message = read(line, 3).unwrap_err().to_string();
            let place = message.starts_with("items.jsonl, line 3: ");
            assert!(place && message.contains(what), "{line}: {message}");
        }
    }

    #[test]
    fn files_without_answers_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("items.jsonl");
        assert!(matches!(Answers::load("a", &path), Err(Error::Read { .. })));
        fs::write(&path, "{\"settings\": {}}\n{\"right\": tr").unwrap();
        assert!(matches!(Answers::load("a", &path), Err(Error::NoAnswers { .. })));
        fs::write(&path, "{\"right\": true, \"prompt_tokens\": 3}\n{\"right\": tr").unwrap();
        assert_eq!(Answers::load("a", &path).unwrap().right(), 1);
    }

    #[test]
    fn a_question_is_answered_once() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("items.jsonl");
        let line = |size: usize, case: usize| {
            format!(
                "{{\"size\": {size}, \"case\": {case}, \"right\": true, \"prompt_tokens\": 3}}\n"
            )
        };
        let lines = line(40, 0) + &line(40, 1) + &line(90, 1);
        fs::write(&path, &lines).unwrap();
        assert_eq!(Answers::load("a", &path).unwrap().right(), 3);
        fs::write(&path, lines + &line(40, 1)).unwrap();
        let error = Answers::load("a", &path).unwrap_err().to_string();
        assert!(error.contains("line 4: `case`") && error.contains("got 1"), "{error}");
    }
}
