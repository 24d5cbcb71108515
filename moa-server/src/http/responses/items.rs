//! Items, tools and choices of tools in the shapes of chat completions.

use serde_json::{Map, Value, json};

use crate::http::chat::{MOST, call, message, text_of};
use crate::http::error::ApiError;
use crate::http::fields::{Fields, short};

/// The messages that a request's instructions and items are.
pub(super) fn messages(
    fields: &mut Fields,
    instructions: Option<&str>,
) -> Result<Vec<Value>, ApiError> {
    let expected = "a text, or an array of at least one item";
    let items = match fields.value("input") {
        Some(Value::String(text)) => vec![json!({ "role": "user", "content": text })],
        Some(Value::Array(items)) if (1..=MOST).contains(&items.len()) => items,
        Some(Value::Array(items)) => {
            return Err(ApiError::field("input", expected, format!("{} items", items.len())));
        }
        other => {
            let got = other.as_ref().map_or_else(|| "nothing".to_owned(), short);
            return Err(ApiError::field("input", expected, got));
        }
    };
    let system = instructions.map(|text| json!({ "role": "system", "content": text }));
    let mut messages: Vec<Value> = system.into_iter().collect();
    for (at, item) in items.into_iter().enumerate() {
        take(item, &format!("input[{at}]"), &mut messages)?;
    }
    match messages.len() > usize::from(instructions.is_some()) {
        true => Ok(messages),
        false => Err(ApiError::field("input", expected, "items of reasoning alone")),
    }
}

/// Adds an item to the messages before it.
fn take(mut item: Value, place: &str, messages: &mut Vec<Value>) -> Result<(), ApiError> {
    if !item.is_object() {
        return Err(ApiError::field(place, "an object", short(&item)));
    }
    match &item["type"] {
        Value::Null => messages.push(message(item, place)?),
        Value::String(kind) => match kind.as_str() {
            "message" => messages.push(message(item, place)?),
            "function_call" => {
                let call = function_call(&item, place)?;
                // What the model said before, and its other calls, were the same turn.
                match messages.last_mut().filter(|last| last["role"] == "assistant") {
                    Some(last) => match last["tool_calls"].as_array_mut() {
                        Some(calls) => calls.push(call),
                        None => last["tool_calls"] = json!([call]),
                    },
                    None => messages
                        .push(json!({ "role": "assistant", "content": "", "tool_calls": [call] })),
                }
            }
            "function_call_output" => {
                let text = text_of(item["output"].take(), &format!("{place}.output"))?;
                let id = text_field(&item, "call_id", place)?;
                messages.push(json!({ "role": "tool", "content": text, "tool_call_id": id }));
            }
            // No template is told what was thought in earlier turns.
            "reasoning" => {}
            _ => return Err(unknown(&item["type"], place)),
        },
        other => return Err(unknown(other, place)),
    }
    Ok(())
}

fn unknown(kind: &Value, place: &str) -> ApiError {
    let expected = "message, function_call, function_call_output or reasoning (the server keeps no items \
                    and has no tools of its own)";
    ApiError::field(&format!("{place}.type"), expected, short(kind))
}

fn function_call(item: &Value, place: &str) -> Result<Value, ApiError> {
    let [id, name, arguments] =
        ["call_id", "name", "arguments"].map(|field| text_field(item, field, place));
    let function = json!({ "name": name?, "arguments": arguments? });
    Ok(call(json!({ "id": id?, "type": "function", "function": function })))
}

fn text_field<'v>(item: &'v Value, field: &str, place: &str) -> Result<&'v str, ApiError> {
    let fault = || ApiError::field(&format!("{place}.{field}"), "a text", short(&item[field]));
    item[field].as_str().ok_or_else(fault)
}

/// Tools in the shape of chat completions, and as the response tells them.
pub(super) fn tools(fields: &mut Fields) -> Result<(Vec<Value>, Vec<Value>), ApiError> {
    let expected = "an array of {\"type\": \"function\", \"name\", \"parameters\"}";
    let mut told: Vec<Value> = fields.get("tools", expected)?.unwrap_or_default();
    if told.len() > MOST {
        return Err(ApiError::field("tools", format!("at most {MOST}"), told.len()));
    }
    let mut tools = Vec::with_capacity(told.len());
    for (at, tool) in told.iter_mut().enumerate() {
        let Some(object) = tool.as_object_mut() else {
            return Err(ApiError::field(&format!("tools[{at}]"), "an object", short(tool)));
        };
        let kind = object.get("type").unwrap_or(&Value::Null);
        if *kind != "function" {
            let expected = "function (the server has no tools of its own)";
            return Err(ApiError::field(&format!("tools[{at}].type"), expected, short(kind)));
        }
        // In their order, which templates write: removing one from the object may change it.
        let fields = object.iter().filter(|(name, _)| *name != "type");
        let function: Map<String, Value> =
            fields.map(|(name, value)| (name.clone(), value.clone())).collect();
        for field in ["description", "parameters", "strict"] {
            object.entry(field).or_insert(Value::Null);
        }
        text_field(tool, "name", &format!("tools[{at}]"))?;
        tools.push(json!({ "type": "function", "function": function }));
    }
    Ok((tools, told))
}

/// A choice of tools in the shape of chat completions.
pub(super) fn choice(mut choice: Value) -> Value {
    let named = |tool: &Value| json!({ "type": "function", "function": { "name": tool["name"] } });
    match choice["type"].as_str() {
        Some("function") => named(&choice),
        Some("allowed_tools") => {
            let tools = choice["tools"].as_array().into_iter().flatten().map(named);
            let tools: Vec<Value> = tools.collect();
            json!({ "allowed_tools": { "mode": choice["mode"].take(), "tools": tools } })
        }
        _ => choice,
    }
}
