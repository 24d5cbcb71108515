//! Calls of tools in what a model said.

use serde_json::{Value, json};

/// What may be called.
pub(crate) struct Callable {
    pub(crate) names: Vec<String>,
    /// Whether one answer may hold several calls.
    pub(crate) parallel: bool,
}

/// A text with its calls taken out.
pub(crate) struct Found {
    pub(crate) text: Option<String>,
    /// In OpenAI's shape.
    pub(crate) calls: Vec<Value>,
}

/// The calls in a text: objects between `<tool_call>` and `</tool_call>`, as Qwen and Hermes write them,
/// or a text that is nothing but such an object. `None` if there is none, or one of what does not exist: then all
/// of it is text.
pub(crate) fn parse(text: &str, unique: u64, of: &Callable) -> Option<Found> {
    const BEGIN: &str = "<tool_call>";
    let (mut calls, mut rest, mut said) = (Vec::new(), text, String::new());
    while let Some(at) = rest.find(BEGIN) {
        let inner = &rest[at + BEGIN.len()..];
        let (call, after) = inner.split_once("</tool_call>").unwrap_or((inner, ""));
        calls.push(object(call, unique, calls.len(), of)?);
        said.push_str(&rest[..at]);
        rest = after;
    }
    if calls.is_empty() {
        calls.push(object(text, unique, 0, of)?);
        rest = "";
    }
    if !of.parallel {
        calls.truncate(1);
    }
    said.push_str(rest);
    let said = said.trim();
    Some(Found { text: (!said.is_empty()).then(|| said.to_owned()), calls })
}

fn object(text: &str, unique: u64, index: usize, of: &Callable) -> Option<Value> {
    let value: Value = serde_json::from_str(text.trim()).ok()?;
    let name = value.get("name")?.as_str().filter(|name| of.names.iter().any(|n| n == name))?;
    let arguments = value.get("arguments").or_else(|| value.get("parameters"))?;
    // Clients read arguments as a text of JSON.
    let arguments = match arguments {
        Value::String(text) => text.clone(),
        other => other.to_string(),
    };
    Some(json!({
        "id": format!("call_{unique:016x}{index}"),
        "type": "function",
        "function": { "name": name, "arguments": arguments },
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn calls_are_found_with_and_without_tags() {
        let one = r#"{"name": "weather", "arguments": {"city": "Paris"}}"#;
        let all = Callable { names: vec!["other".into(), "weather".into()], parallel: true };
        let found = parse(one, 7, &all).unwrap();
        assert_eq!(found.text, None);
        assert_eq!(found.calls[0]["function"]["name"], "weather");
        assert_eq!(found.calls[0]["function"]["arguments"], r#"{"city":"Paris"}"#);
        let two =
            format!("I look.\n<tool_call>\n{one}\n</tool_call>\n<tool_call>{one}</tool_call>");
        let found = parse(&two, 7, &all).unwrap();
        assert_eq!((found.text.as_deref(), found.calls.len()), (Some("I look."), 2));
        assert_ne!(found.calls[0]["id"], found.calls[1]["id"]);
        for none in ["", "Paris", "{}", r#"{"name": "x"}"#, "<tool_call>{", "[1]"] {
            assert!(parse(none, 7, &all).is_none(), "{none}");
        }
        let single = Callable { names: all.names.clone(), parallel: false };
        let found = parse(&two, 7, &single).unwrap();
        assert_eq!((found.text.as_deref(), found.calls.len()), (Some("I look."), 1));
        let unknown = Callable { names: vec!["clock".into()], parallel: true };
        assert!(parse(one, 7, &unknown).is_none() && parse(&two, 7, &unknown).is_none());
    }
}
