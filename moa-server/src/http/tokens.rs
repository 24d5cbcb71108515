//! `/tokenize` and `/detokenize`.

use std::sync::Arc;

use axum::response::Response;
use serde_json::json;

use super::chat::conversation;
use super::error::{ApiError, json_response};
use super::fields::Fields;
use super::submit::blocking;
use crate::state::State;

pub(crate) async fn tokenize(state: Arc<State>, body: &[u8]) -> Result<Response, ApiError> {
    let mut fields = Fields::parse(body)?;
    let limit = state.model.context;
    let field = if fields.has("messages") { "messages" } else { "prompt" };
    let tokens = match fields.has("messages") {
        true => {
            let text = conversation(&mut fields, &state)?;
            blocking(move || text.tokens(&state).map(|(tokens, _)| tokens)).await?
        }
        false => {
            let text: Option<String> = match fields.get("prompt", "a text")? {
                Some(text) => Some(text),
                None => fields.get("content", "a text")?,
            };
            let text = text.ok_or_else(|| ApiError::field("prompt", "a text", "nothing"))?;
            let add_special = fields.get("add_special_tokens", "true or false")?.unwrap_or(true);
            blocking(move || state.text.tokenizer.encode(&text, add_special)).await?
        }
    };
    let tokens = tokens.map_err(|error| ApiError::of_model(&error).of(field))?;
    Ok(json_response(&json!({
        "count": tokens.len(),
        "max_model_len": limit,
        "tokens": tokens,
    })))
}

pub(crate) async fn detokenize(state: Arc<State>, body: &[u8]) -> Result<Response, ApiError> {
    let mut fields = Fields::parse(body)?;
    let tokens = fields.ids("tokens", state.model.vocab_size)?;
    let tokens = tokens.ok_or_else(|| ApiError::field("tokens", "an array of ids", "nothing"))?;
    let text = blocking(move || state.text.tokenizer.decode(&tokens, false)).await?;
    let text = text.map_err(|error| ApiError::of_model(&error).of("tokens"))?;
    Ok(json_response(&json!({ "prompt": text, "content": text })))
}
