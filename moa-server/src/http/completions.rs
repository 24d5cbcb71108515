//! `/v1/completions`.

use std::sync::Arc;
use std::time::Instant;

use axum::response::Response;
use serde::Deserialize;

use super::answer::{Answer, Echo, Kind};
use super::error::ApiError;
use super::fields::Fields;
use super::form::form;
use super::params::Params;
use super::submit::{Prompt, submit};
use crate::state::State;

#[derive(Deserialize)]
#[serde(untagged)]
enum Prompts {
    Text(String),
    Texts(Vec<String>),
    Tokens(Vec<u32>),
    Lists(Vec<Vec<u32>>),
}

pub(crate) async fn complete(state: Arc<State>, body: &[u8]) -> Result<Response, ApiError> {
    let came = Instant::now();
    let mut fields = Fields::parse(body)?;
    let mut params = Params::of(&mut fields, &state, came)?;
    if !params.says_length && state.options.default_max_tokens.is_none() {
        // OpenAI's default for this kind.
        params.options.max_new_tokens = 16;
    }
    params.options.logprobs = fields.count("logprobs", 0, 20)?;
    fields.refuse("suffix", "the model only continues texts")?;
    let best_of = fields.count("best_of", 1, usize::MAX)?;
    if let Some(best_of) = best_of.filter(|best_of| *best_of != params.choices) {
        return Err(ApiError::field("best_of", "the same as `n`", best_of));
    }
    let form = form(&mut fields)?;
    let echo = fields.flag("echo")?;
    params.options.prompt_logprobs = echo && params.options.logprobs.is_some();
    let expected = "a text, an array of texts, or arrays of token ids";
    let prompts = match fields.get("prompt", expected)? {
        Some(Prompts::Text(text)) => vec![Prompt::Text(text)],
        Some(Prompts::Tokens(tokens)) => vec![Prompt::Tokens(tokens)],
        Some(Prompts::Texts(texts)) => texts.into_iter().map(Prompt::Text).collect(),
        Some(Prompts::Lists(lists)) => lists.into_iter().map(Prompt::Tokens).collect(),
        None => return Err(ApiError::field("prompt", expected, "nothing")),
    };
    let most = state.options.max_choices;
    if prompts.is_empty() || prompts.len() * params.choices > most {
        let expected = format!("at least 1, and with `n` at most {most} choices together");
        return Err(ApiError::field("prompt", expected, format!("{} prompts", prompts.len())));
    }
    let echoes = prompts.iter().flat_map(|prompt| {
        let of = match prompt {
            Prompt::Text(text) if echo => Echo { text: text.clone(), has_special: true },
            Prompt::Tokens(tokens) if echo => Echo {
                text: state.text.tokenizer.decode(tokens, true).unwrap_or_default(),
                has_special: false,
            },
            _ => Echo::default(),
        };
        vec![of; params.choices]
    });
    let mut answer = Answer::new(Arc::clone(&state), Kind::Text, echoes.collect());
    answer.logprobs = params.options.logprobs.is_some();
    submit(state, params, came, prompts, form, answer).await
}
