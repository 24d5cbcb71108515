//! What form an answer is asked for in: JSON of a schema, a choice of texts, an expression, a grammar.

use std::sync::Arc;

use serde_json::{Map, Value, json};

use super::error::ApiError;
use super::fields::{Fields, short};
use crate::grammar::Grammar;

/// What an answer must be, with the field that says so.
pub(crate) type Form = (String, Arc<Grammar>);

/// The form that a request asks for: OpenAI's `response_format`, vLLM's `structured_outputs` or
/// what that was called before, or llama.cpp's `json_schema`.
pub(crate) fn form(fields: &mut Fields) -> Result<Option<Form>, ApiError> {
    let format = fields.value("response_format").unwrap_or_else(|| json!({ "type": "text" }));
    let schema = ("response_format.json_schema.schema", &format["json_schema"]["schema"]);
    form_or(fields, "response_format", &format["type"], schema)
}

/// The form that is asked for by a format, of a type and perhaps with a schema, or by fields beyond OpenAI's.
pub(crate) fn form_or(
    fields: &mut Fields,
    format: &str,
    kind: &Value,
    schema: (&str, &Value),
) -> Result<Option<Form>, ApiError> {
    fields.refuse("grammar", "give one in Lark's notation in `structured_outputs.grammar`")?;
    let mut forms = Vec::new();
    forms.extend(grammar_of(format, kind, schema)?.map(|grammar| (format.to_owned(), grammar)));
    if let Some(outputs) = fields.get("structured_outputs", "an object")? {
        let outputs: Map<String, Value> = outputs;
        for (kind, value) in outputs.iter().filter(|(_, value)| !value.is_null()) {
            forms.extend(structured(&format!("structured_outputs.{kind}"), kind, value)?);
        }
    }
    for (field, kind) in [
        ("guided_json", "json"),
        ("guided_regex", "regex"),
        ("guided_choice", "choice"),
        ("guided_grammar", "grammar"),
        ("json_schema", "json"),
    ] {
        if let Some(value) = fields.value(field) {
            forms.extend(structured(field, kind, &value)?);
        }
    }
    match forms.len() {
        0 | 1 => Ok(forms.pop()),
        _ => Err(ApiError::field(&forms[1].0, "the only form that is asked for", &forms[0].0)),
    }
}

/// One of vLLM's kinds; `None` of options that are about something else.
fn structured(field: &str, kind: &str, value: &Value) -> Result<Option<Form>, ApiError> {
    let fault = |expected| ApiError::field(field, expected, short(value));
    let text = |expected| value.as_str().ok_or_else(|| fault(expected));
    let grammar = match kind {
        "json" => {
            let parsed = value.as_str().map(serde_json::from_str).transpose();
            let schema = parsed.ok().map(|parsed| parsed.unwrap_or_else(|| value.clone()));
            let is_schema = |schema: &Value| schema.is_object() || schema.is_boolean();
            Grammar::schema(schema.filter(is_schema).ok_or_else(|| fault("a JSON schema"))?)
        }
        "json_object" if *value == false => return Ok(None),
        "json_object" => Grammar::schema(json!({ "type": "object" })),
        "regex" => Grammar::regex(text("a regular expression")?),
        "grammar" => Grammar::lark(text("a grammar in Lark's notation")?.to_owned()),
        "choice" => {
            let expected = "an array of at least one text";
            let texts = value.as_array().filter(|texts| !texts.is_empty());
            let texts = texts.ok_or_else(|| fault(expected))?.iter();
            let escaped = texts.map(|text| text.as_str().map(escaped));
            let escaped: Option<Vec<String>> = escaped.collect();
            let escaped = escaped
                .ok_or_else(|| ApiError::field(field, expected, "an array of other values too"))?;
            // As one word of a grammar, of which there may be any number.
            Grammar::regex(&escaped.join("|"))
        }
        "structural_tag" => return Err(fault("left out")),
        _ => return Ok(None),
    };
    Ok(Some((field.to_owned(), grammar)))
}

/// The regular expression of a text alone.
fn escaped(text: &str) -> String {
    let escapes = |c: char| c.is_ascii_punctuation() && !matches!(c, '<' | '>');
    text.chars().flat_map(|c| escapes(c).then_some('\\').into_iter().chain([c])).collect()
}

fn grammar_of(
    format: &str,
    kind: &Value,
    (field, schema): (&str, &Value),
) -> Result<Option<Arc<Grammar>>, ApiError> {
    match kind.as_str() {
        Some("text") => Ok(None),
        Some("json_object") => Ok(Some(Grammar::schema(json!({ "type": "object" })))),
        Some("json_schema") if schema.is_object() || schema.is_boolean() => {
            Ok(Some(Grammar::schema(schema.clone())))
        }
        Some("json_schema") => Err(ApiError::field(field, "a JSON schema", short(schema))),
        _ => {
            let expected = "text, json_object or json_schema";
            Err(ApiError::field(&format!("{format}.type"), expected, short(kind)))
        }
    }
}
