//! Item files of `moa eval ... --items`: a header line, then one object per question.

use std::fs;

use serde_json::Value;

use crate::error::{Error, Result};
use crate::plans::labelled;

/// How one question went.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Asked {
    pub(crate) prompt_tokens: usize,
    /// Where the answer lies in the prompt, 0 at its beginning and 1 at its end, if that is known.
    pub(crate) depth: Option<f64>,
    pub(crate) right: bool,
}

/// The questions of one file.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Items {
    pub(crate) name: String,
    pub(crate) asked: Vec<Asked>,
}

impl Items {
    /// Reads `NAME=FILE` or `FILE`, which goes by the name of the file.
    pub(crate) fn load(argument: &str) -> Result<Self> {
        let (name, path) = labelled(argument);
        let read = |source| Error::Read { path: path.clone(), source };
        let text = fs::read_to_string(&path).map_err(read)?;
        let mut asked = Vec::new();
        for (number, line) in text.split_inclusive('\n').enumerate() {
            // A last line without an end is what a run that was broken off has left.
            if line.trim().is_empty() || (number > 0 && !line.ends_with('\n')) {
                continue;
            }
            let place = || format!("{}, line {}", path.display(), number + 1);
            asked.extend(item(line, number == 0).map_err(|error| error.at(place()))?);
        }
        if asked.is_empty() {
            let error = Error::argument("items", "at least one question", "none");
            return Err(error.at(path.display().to_string()));
        }
        Ok(Self { name, asked })
    }

    /// Share of questions answered right.
    pub(crate) fn accuracy(&self) -> f64 {
        self.asked.iter().filter(|a| a.right).count() as f64 / self.asked.len().max(1) as f64
    }
}

/// What a line asked: one answer, or one for each of its `references`; nothing for the header.
fn item(line: &str, is_first: bool) -> Result<Vec<Asked>> {
    let value: Value =
        serde_json::from_str(line).map_err(|e| Error::argument("item", "a JSON object", e))?;
    if is_first && value.get("settings").is_some() && value.get("prompt_tokens").is_none() {
        return Ok(Vec::new());
    }
    let tokens = &value["prompt_tokens"];
    let Some(prompt_tokens) = tokens.as_u64() else {
        return Err(Error::argument("`prompt_tokens`", "a whole number", tokens));
    };
    let asked = |of: &Value, name: &'static str| {
        let Some(right) = of[name].as_bool() else {
            return Err(Error::argument(name, "true or false", &of[name]));
        };
        let depth = match &of["depth"] {
            Value::Null => None,
            depth => match depth.as_f64().filter(|d| (0.0..=1.0).contains(d)) {
                Some(depth) => Some(depth),
                None => return Err(Error::argument("`depth`", "a number from 0 to 1", depth)),
            },
        };
        Ok(Asked { prompt_tokens: prompt_tokens as usize, depth, right })
    };
    match value.get("references").and_then(Value::as_array) {
        Some(references) => references.iter().map(|r| asked(r, "found")).collect(),
        None => Ok(vec![asked(&value, "right")?]),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn header_and_unknown_fields_are_skipped() {
        assert_eq!(item(r#"{"settings": {"seed": 0}}"#, true).unwrap(), []);
        let line = r#"{"right": true, "prompt_tokens": 7, "depth": 0.5, "text": "x", "more": []}"#;
        let asked = |depth, right| Asked { prompt_tokens: 7, depth, right };
        assert_eq!(item(line, true).unwrap(), [asked(Some(0.5), true)]);
        let line = r#"{"right": false, "prompt_tokens": 7}"#;
        assert_eq!(item(line, false).unwrap(), [asked(None, false)]);
        let line = r#"{"prompt_tokens": 7, "score": 0.5, "references": [
            {"text": "a", "depth": 0.25, "found": true}, {"text": "b", "depth": null, "found": false}]}"#;
        let both = [asked(Some(0.25), true), asked(None, false)];
        assert_eq!(item(line, false).unwrap(), both);
    }

    #[test]
    fn what_is_wrong_with_a_line_is_named() {
        for (line, what) in [
            ("[1", "JSON"),
            (r#"{"settings": {}}"#, "`prompt_tokens`"),
            (r#"{"right": 1, "prompt_tokens": 7}"#, "right must be true or false"),
            (r#"{"references": [{}], "prompt_tokens": 7}"#, "found must be true or false"),
            (r#"{"right": true, "prompt_tokens": -7}"#, "`prompt_tokens`"),
            (r#"{"right": true, "prompt_tokens": 7, "depth": 40}"#, "`depth`"),
        ] {
            let message = item(line, false).unwrap_err().to_string();
            assert!(message.contains(what), "{line}: {message}");
        }
    }
}
