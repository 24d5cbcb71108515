//! Calls of tools in what a model says.

use serde_json::{Value, json};

/// What may be called.
pub(crate) struct Callable {
    pub(crate) names: Vec<String>,
    /// Whether one answer may hold several calls.
    pub(crate) parallel: bool,
    /// Whether a grammar leaves nothing but a call.
    pub(crate) forced: bool,
}

const BEGIN: &str = "<tool_call>";
const END: &str = "</tool_call>";

/// A text that comes in pieces, of which nothing that may be part of a call is given on before the text's end.
///
/// A call is an object with `name` and `arguments`, or one of a list of such objects. Calls stand between `<tool_call>` and
/// `</tool_call>`, as Qwen and Hermes write them, or a text is nothing but calls, as Llama and Mistral write them. Where one
/// is broken, or of what does not exist, there is no call but text.
#[derive(Debug, Default)]
pub(crate) struct Held {
    text: String,
    /// Something was given on, so that the text is not nothing but calls.
    has_begun: bool,
    /// No call comes any more.
    is_text: bool,
    /// Bytes of `text` from which on it is looked at again: looking at all of it at each piece would take time by the
    /// square of its length.
    next_look: usize,
}

impl Held {
    /// Takes the next piece; what is text whatever follows.
    pub(crate) fn push(&mut self, piece: &str, of: &Callable) -> String {
        self.text.push_str(piece);
        if !self.is_text && self.text.len() < self.next_look {
            return String::new();
        }
        let certain = self.certain(of);
        let rest = self.text.split_off(certain);
        let text = std::mem::replace(&mut self.text, rest);
        self.has_begun |= !text.is_empty();
        self.next_look = self.text.len() + self.text.len() / 64 * 8;
        text
    }

    /// Bytes that no call can be part of. What is blank before a call is not said.
    fn certain(&mut self, of: &Callable) -> usize {
        if self.is_text {
            return self.text.len();
        }
        let begin = self.text.trim_start();
        let may_be_calls = || begin.starts_with(['{', '[']) && may_be_calls(begin, of);
        if !self.has_begun && (begin.is_empty() || may_be_calls()) {
            return 0;
        }
        let at = match self.text.find(BEGIN) {
            Some(at) if may_be_tagged(&self.text[at..], of) => at,
            Some(_) => {
                self.is_text = true;
                return self.text.len();
            }
            None => before_part_of(BEGIN, &self.text).len(),
        };
        self.text[..at].trim_end().len()
    }

    /// The end of the text: what of it was not given on, and the calls in it, in OpenAI's shape.
    pub(crate) fn finish(self, unique: u64, of: &Callable) -> (String, Vec<Value>) {
        let found = match self.text.contains(BEGIN) {
            _ if self.is_text => None,
            true => tagged(&self.text, of),
            false if self.has_begun => None,
            false => calls(&self.text, of)
                .or_else(|| cut_call(&self.text, of))
                .map(|calls| (String::new(), calls)),
        };
        let Some((text, mut calls)) = found else { return (self.text, Vec::new()) };
        if !of.parallel {
            calls.truncate(1);
        }
        let shaped = calls.into_iter().enumerate().map(|(index, Call { name, arguments })| {
            json!({
                "id": format!("call_{unique:016x}{index}"),
                "type": "function",
                "function": { "name": name, "arguments": arguments },
            })
        });
        (text, shaped.collect())
    }
}

struct Call {
    name: String,
    /// The text of JSON, as clients read it.
    arguments: String,
}

/// A text with the calls between tags taken out of it; `None` if one of them is none.
fn tagged(text: &str, of: &Callable) -> Option<(String, Vec<Call>)> {
    let (mut all, mut rest, mut said) = (Vec::new(), text, String::new());
    while let Some(at) = rest.find(BEGIN) {
        let inner = &rest[at + BEGIN.len()..];
        let (call, after) = inner.split_once(END).unwrap_or((inner, ""));
        all.extend(calls(call, of)?);
        said.push_str(&rest[..at]);
        rest = after;
    }
    said.push_str(rest);
    said.truncate(said.trim_end().len());
    Some((said, all))
}

/// Whether [`tagged`] may find calls in a text that begins like this one.
fn may_be_tagged(text: &str, of: &Callable) -> bool {
    let mut rest = text;
    while let Some(at) = rest.find(BEGIN) {
        let inner = &rest[at + BEGIN.len()..];
        let Some((call, after)) = inner.split_once(END) else {
            return may_be_calls(before_part_of(END, inner), of);
        };
        if calls(call, of).is_none() {
            return false;
        }
        rest = after;
    }
    true
}

/// A text up to what may become this tag.
fn before_part_of<'t>(tag: &str, text: &'t str) -> &'t str {
    let mut parts = (1..tag.len()).rev().map(|len| &tag[..len]);
    parts.find_map(|part| text.strip_suffix(part)).unwrap_or(text)
}

/// A call or a list of them, and nothing else.
fn calls(text: &str, of: &Callable) -> Option<Vec<Call>> {
    calls_of(serde_json::from_str(text.trim()).ok()?, of)
}

/// A call that had to come and was cut off in its arguments, as the grammar writes it.
fn cut_call(text: &str, of: &Callable) -> Option<Vec<Call>> {
    let rest = text.trim_start().strip_prefix("{\"name\": \"").filter(|_| of.forced)?;
    let call = of.names.iter().find_map(|name| {
        let arguments = rest.strip_prefix(name)?.strip_prefix("\", \"arguments\": ")?;
        Some(Call { name: name.clone(), arguments: arguments.to_owned() })
    });
    call.map(|call| vec![call])
}

fn calls_of(value: Value, of: &Callable) -> Option<Vec<Call>> {
    match value {
        Value::Array(list) if !list.is_empty() => list.iter().map(|one| call(one, of)).collect(),
        one => call(&one, of).map(|call| vec![call]),
    }
}

/// Whether [`calls`] may find some in a text that begins like this one.
fn may_be_calls(text: &str, of: &Callable) -> bool {
    match serde_json::from_str(text.trim()) {
        Ok(value) => calls_of(value, of).is_some(),
        Err(error) => error.is_eof(),
    }
}

fn call(value: &Value, of: &Callable) -> Option<Call> {
    let name = value.get("name")?.as_str().filter(|name| of.names.iter().any(|n| n == name))?;
    let arguments = value.get("arguments").or_else(|| value.get("parameters"))?;
    let arguments = match arguments {
        Value::String(text) => text.clone(),
        other => other.to_string(),
    };
    Some(Call { name: name.to_owned(), arguments })
}

#[cfg(test)]
mod tests {
    use super::*;

    const ONE: &str = r#"{"name": "weather", "arguments": {"city": "Paris"}}"#;

    fn callable(parallel: bool) -> Callable {
        Callable { names: vec!["other".into(), "weather".into()], parallel, forced: false }
    }

    /// What is given on of a text in pieces, and what comes at its end.
    fn told<'t>(
        pieces: impl IntoIterator<Item = &'t str>,
        of: &Callable,
    ) -> (Vec<String>, String, Vec<Value>) {
        let mut held = Held::default();
        let told = pieces.into_iter().map(|piece| held.push(piece, of)).collect();
        let (rest, calls) = held.finish(7, of);
        (told, rest, calls)
    }

    fn whole(text: &str, of: &Callable) -> (String, Vec<Value>) {
        let (told, rest, calls) = told([text], of);
        (told.concat() + &rest, calls)
    }

    #[test]
    fn calls_are_found_with_and_without_tags_and_in_lists() {
        let all = callable(true);
        let (text, calls) = whole(ONE, &all);
        assert_eq!(text, "");
        assert_eq!(calls[0]["function"]["name"], "weather");
        assert_eq!(calls[0]["function"]["arguments"], r#"{"city":"Paris"}"#);
        let list = format!(r#" [{ONE}, {{"name": "other", "parameters": {{}}}}]"#);
        let two =
            format!("I look.\n<tool_call>\n{ONE}\n</tool_call>\n<tool_call>{ONE}</tool_call>");
        let lists = format!("I look.\n<tool_call>[{ONE}, {ONE}]</tool_call>");
        for (text, said) in [(&list, ""), (&two, "I look."), (&lists, "I look.")] {
            let (text, calls) = whole(text, &all);
            assert_eq!((text.as_str(), calls.len()), (said, 2));
            assert_ne!(calls[0]["id"], calls[1]["id"]);
        }
        assert_eq!(whole(&list, &all).1[1]["function"]["name"], "other");
        for text in [&list, &two] {
            assert_eq!(whole(text, &callable(false)).1.len(), 1);
        }
    }

    #[test]
    fn what_is_no_call_stays_as_it_is() {
        let unknown = ONE.replace("weather", "clock");
        let mixed = format!("[{ONE}, {unknown}]");
        let tagged = format!("<tool_call>{ONE}</tool_call> <tool_call>{unknown}</tool_call> ");
        for none in ["", " ", "Paris\n", "{}", r#"{"name": "x"}"#, "<tool_call>{", "[1]", "[]"]
            .into_iter()
            .chain([
                unknown.as_str(),
                &mixed,
                &tagged,
                &format!("{ONE} it is."),
                &format!("So: {ONE}"),
            ])
        {
            assert_eq!(whole(none, &callable(true)), (none.to_owned(), Vec::new()));
        }
    }

    #[test]
    fn text_goes_on_as_soon_as_it_can_be_no_call() {
        let all = callable(true);
        let say = |pieces: &[&str]| told(pieces.iter().copied(), &all).0;
        assert_eq!(say(&[" ", "Well", ", ", "no"]), ["", " Well", ",", " no"]);
        assert_eq!(say(&["a <too", "l> b", " <tool_call>"]), ["a", " <tool> b", ""]);
        assert_eq!(say(&["{", "x", "} is"]), ["", "{x", "} is"]);
        assert_eq!(say(&["[", "1", "]", " says"]), ["", "", "[1]", " says"]);
        assert_eq!(
            say(&["<tool_call>{\"name\"", "}", " and"]),
            ["", "<tool_call>{\"name\"}", " and"]
        );
        let unknown = ["<tool_call>", r#"{"name": "x", "arguments": {}}"#, "</tool_call>", "\n"];
        assert_eq!(say(&unknown), ["", &unknown[..2].concat(), unknown[2], "\n"]);
    }

    #[test]
    fn pieces_give_what_the_whole_gives() {
        let all = callable(true);
        let texts = [
            ONE.to_owned(),
            format!(" [{ONE}, {ONE}]\n"),
            format!("\n<tool_call>{ONE}</tool_call>"),
            format!(
                "I look.\n\n<tool_call>\n{ONE}\n</tool_call>\nSo.\n<tool_call>{ONE}</tool_call> "
            ),
            format!("<tool_call>{ONE}"),
            format!("<tool_call>{ONE}</tool"),
            format!("{{x}} <tool_call>{ONE}</tool_call>"),
            format!(
                "{{\"a\": \"é\"}} [1] <too <tool_call>{{}}</tool_call> <tool_call>{ONE}</tool_call>"
            ),
            " \n".to_owned(),
        ];
        for text in &texts {
            let expected = whole(text, &all);
            for step in [1, 2, 3, 7, 20] {
                let chars: Vec<char> = text.chars().collect();
                let pieces: Vec<String> = chars.chunks(step).map(|c| c.iter().collect()).collect();
                let (told, rest, calls) = told(pieces.iter().map(String::as_str), &all);
                assert_eq!((told.concat() + &rest, calls), expected, "{text:?} by {step}");
            }
        }
    }
}
