//! Item files of `moa eval retrieval --items`: a header line, then one object per question.

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
        for (number, line) in text.lines().enumerate() {
            if line.trim().is_empty() {
                continue;
            }
            let place = || format!("{}, line {}", path.display(), number + 1);
            let item = item(line, number == 0).map_err(|error| error.at(place()))?;
            asked.extend(item);
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

/// A question, or `None` for the header.
fn item(line: &str, is_first: bool) -> Result<Option<Asked>> {
    let value: Value =
        serde_json::from_str(line).map_err(|e| Error::argument("item", "a JSON object", e))?;
    if is_first && value.get("settings").is_some() && value.get("right").is_none() {
        return Ok(None);
    }
    let field = |name: &str| value.get(name).unwrap_or(&Value::Null);
    let Some(right) = field("right").as_bool() else {
        return Err(Error::argument("`right`", "true or false", field("right")));
    };
    let Some(prompt_tokens) = field("prompt_tokens").as_u64() else {
        return Err(Error::argument("`prompt_tokens`", "a whole number", field("prompt_tokens")));
    };
    let depth = match field("depth") {
        Value::Null => None,
        depth => match depth.as_f64().filter(|d| (0.0..=1.0).contains(d)) {
            Some(depth) => Some(depth),
            None => return Err(Error::argument("`depth`", "a number from 0 to 1", depth)),
        },
    };
    Ok(Some(Asked { prompt_tokens: prompt_tokens as usize, depth, right }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn header_and_unknown_fields_are_skipped() {
        assert_eq!(item(r#"{"settings": {"seed": 0}}"#, true).unwrap(), None);
        let line = r#"{"right": true, "prompt_tokens": 7, "depth": 0.5, "text": "x", "more": []}"#;
        let asked = Asked { prompt_tokens: 7, depth: Some(0.5), right: true };
        assert_eq!(item(line, true).unwrap(), Some(asked));
        assert_eq!(
            item(r#"{"right": false, "prompt_tokens": 7}"#, false).unwrap().unwrap().depth,
            None
        );
    }

    #[test]
    fn what_is_wrong_with_a_line_is_named() {
        for (line, what) in [
            ("[1", "JSON"),
            (r#"{"settings": {}}"#, "`right`"),
            (r#"{"right": 1, "prompt_tokens": 7}"#, "`right`"),
            (r#"{"right": true, "prompt_tokens": -7}"#, "`prompt_tokens`"),
            (r#"{"right": true, "prompt_tokens": 7, "depth": 40}"#, "`depth`"),
        ] {
            let message = item(line, false).unwrap_err().to_string();
            assert!(message.contains(what), "{line}: {message}");
        }
    }
}
