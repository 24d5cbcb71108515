//! `/v1/responses`: the conversation that a request's items are is answered as a chat is, and the answer told in items.

mod items;
pub(crate) mod told;

use std::sync::Arc;
use std::time::Instant;

use axum::response::Response;
use serde_json::{Map, Value, json};

use super::answer::Kind;
use super::chat::{Turn, parallel};
use super::error::ApiError;
use super::fields::{Fields, short};
use super::form::form_or;
use super::params::Params;
use crate::state::State;
use told::Told;

/// Fields that ask for what the server does not keep or do, and those of chat completions that have another name here.
const REFUSED: [(&str, &str); 11] = [
    (
        "previous_response_id",
        "the server keeps no responses: send the whole conversation as `input`",
    ),
    ("conversation", "the server keeps no conversations: send the whole one as `input`"),
    ("prompt", "the server keeps no prompts: send its text as `instructions` and `input`"),
    ("background", "the server keeps no responses: wait for this one, or use `stream`"),
    ("messages", "use `input`"),
    ("max_tokens", "use `max_output_tokens`"),
    ("max_completion_tokens", "use `max_output_tokens`"),
    ("n", "a response is one answer"),
    ("response_format", "use `text.format`"),
    ("functions", "use `tools`"),
    ("function_call", "use `tool_choice`"),
];

pub(crate) async fn respond(state: Arc<State>, body: &[u8]) -> Result<Response, ApiError> {
    let came = Instant::now();
    let mut fields = Fields::parse(body)?;
    for (field, reason) in REFUSED {
        fields.refuse(field, reason)?;
    }
    let truncation: Option<String> = fields.get("truncation", "a text")?;
    if let Some(other) = truncation.filter(|own| own != "disabled") {
        let expected = "disabled: what is longer than the model's context is refused";
        return Err(ApiError::field("truncation", expected, short(&other.into())));
    }
    let most = fields.count("max_output_tokens", 1, usize::MAX)?;
    let mut params = Params::of(&mut fields, &state, came)?;
    if let Some(most) = most {
        (params.options.max_new_tokens, params.says_length) = (most, true);
    }
    let include: Vec<String> = fields.get("include", "an array of texts")?.unwrap_or_default();
    let top = fields.count("top_logprobs", 0, 20)?.unwrap_or(0);
    let is_told = include.iter().any(|own| own == "message.output_text.logprobs");
    params.options.logprobs = is_told.then_some(top);
    let instructions: Option<String> = fields.get("instructions", "a text")?;
    let messages = items::messages(&mut fields, instructions.as_deref())?;
    let (tools, told_tools) = items::tools(&mut fields)?;
    let choice = fields.value("tool_choice");
    let parallel = parallel(&mut fields)?;
    let mut text: Map<String, Value> = fields.get("text", "an object")?.unwrap_or_default();
    let format = text.remove("format").filter(|format| !format.is_null());
    let format = format.unwrap_or_else(|| json!({ "type": "text" }));
    let schema = ("text.format.schema", &format["schema"]);
    let form = form_or(&mut fields, "text.format", &format["type"], schema)?;
    let metadata = metadata(&mut fields)?;
    // Fields that clients rely on, whether or not the server makes something of them.
    let mut asked = json!({
        "background": false,
        "instructions": instructions,
        "max_output_tokens": most,
        "max_tool_calls": null,
        "metadata": metadata,
        "parallel_tool_calls": parallel,
        "previous_response_id": null,
        "reasoning": { "effort": null, "summary": null },
        "service_tier": "default",
        "store": false,
        "text": { "format": format },
        "tool_choice": choice.clone().unwrap_or_else(|| "auto".into()),
        "tools": told_tools,
        "top_logprobs": top,
        "truncation": "disabled",
    });
    let sampling = &params.options.sampling;
    for (field, number) in [
        ("temperature", sampling.temperature),
        ("top_p", sampling.top_p),
        ("presence_penalty", sampling.presence_penalty),
        ("frequency_penalty", sampling.frequency_penalty),
    ] {
        // The shortest text of the number, which the request has: as f64 it has further digits.
        asked[field] = number.to_string().parse().map_or(Value::Null, |number: f64| number.into());
    }
    fields.get::<bool>("store", "true or false")?;
    for field in ["user", "safety_identifier", "prompt_cache_key"] {
        asked[field] = fields.get::<String>(field, "a text")?.into();
    }
    let choice = choice.map(items::choice);
    let turn = Turn { messages, tools, choice, parallel, form };
    let kind = Kind::Response(Box::new(Told::new(&state, asked)));
    turn.answer(state, came, fields, params, kind).await
}

/// What a client wants to find in the response again.
fn metadata(fields: &mut Fields) -> Result<Map<String, Value>, ApiError> {
    let expected = "an object of texts";
    let metadata: Map<String, Value> = fields.get("metadata", expected)?.unwrap_or_default();
    match metadata.values().find(|value| !value.is_string()) {
        Some(other) => Err(ApiError::field("metadata", expected, short(other))),
        None => Ok(metadata),
    }
}
