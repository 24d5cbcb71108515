//! What both kinds of completions have in common.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use moa_models::{GenerateOptions, SamplingOptions};
use serde::Deserialize;

use super::error::ApiError;
use super::fields::Fields;
use crate::state::State;

/// How a request wants to be continued.
pub(crate) struct Params {
    pub(crate) choices: usize,
    pub(crate) stream: bool,
    pub(crate) include_usage: bool,
    pub(crate) options: GenerateOptions,
    /// Whether the request says how many tokens there may be.
    pub(crate) says_length: bool,
    pub(crate) deadline: Instant,
    /// Lower ones go first.
    pub(crate) priority: i64,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Stop {
    One(String),
    Many(Vec<String>),
}

#[derive(Deserialize, Default)]
struct StreamOptions {
    include_usage: Option<bool>,
}

impl Params {
    pub(crate) fn of(fields: &mut Fields, state: &State, came: Instant) -> Result<Self, ApiError> {
        check_model(fields, state)?;
        let stream = fields.flag("stream")?;
        let stream_options: StreamOptions =
            fields.get("stream_options", "an object")?.unwrap_or_default();
        let choices = fields.count("n", 1, state.options.max_choices)?.unwrap_or(1);
        let newer = fields.count("max_completion_tokens", 1, usize::MAX)?;
        let max_tokens = fields.count("max_tokens", 0, usize::MAX)?;
        let asked = newer.or(max_tokens);
        let stop = match fields.get("stop", "a text or an array of texts")? {
            None => Vec::new(),
            Some(Stop::One(stop)) => vec![stop],
            Some(Stop::Many(stops)) => stops,
        };
        let wrong = match stop.iter().find(|stop| stop.is_empty() || stop.len() > 1024) {
            Some(stop) => Some(format!("one of {} bytes", stop.len())),
            None if stop.len() > 16 => Some(format!("{} texts", stop.len())),
            None => None,
        };
        if let Some(wrong) = wrong {
            return Err(ApiError::field("stop", "at most 16 texts of 1 to 1024 bytes", wrong));
        }
        let stop_token_ids = fields.ids("stop_token_ids", state.model.vocab_size)?;
        let ignore_eos = fields.flag("ignore_eos")?;
        let timeout = fields.number("timeout", 0.001, 1e6)?.map(Duration::from_secs_f32);
        let most = state.options.request_timeout;
        let options = GenerateOptions {
            max_new_tokens: asked.unwrap_or(state.model.default_max_tokens),
            min_new_tokens: fields.count("min_tokens", 0, usize::MAX)?.unwrap_or(0),
            sampling: sampling(fields, state)?,
            stop,
            stop_token_ids: stop_token_ids.unwrap_or_default(),
            eos_token_ids: ignore_eos.then(Vec::new),
            ..GenerateOptions::default()
        };
        Ok(Self {
            choices,
            stream,
            include_usage: stream_options.include_usage.unwrap_or(false),
            options,
            says_length: asked.is_some(),
            priority: fields.get("priority", "a whole number")?.unwrap_or(0),
            deadline: came + timeout.map_or(most, |timeout| timeout.min(most)),
        })
    }

    /// The options of a prompt of this length, which must have room for a token.
    pub(crate) fn for_prompt(
        &self,
        len: usize,
        state: &State,
    ) -> Result<GenerateOptions, ApiError> {
        let limit = state.model.context;
        if len == 0 {
            return Err(ApiError::invalid("the prompt must have at least 1 token"));
        }
        if len >= limit {
            return Err(ApiError::too_long(len, limit));
        }
        let mut options = self.options.clone();
        if self.says_length && options.max_new_tokens > limit - len {
            let asked = options.max_new_tokens;
            let message = format!(
                "the model's context is {limit} tokens; the prompt has {len}, and {asked} more are asked for"
            );
            let code = Some("context_length_exceeded");
            return Err(ApiError { code, ..ApiError::invalid(message) });
        }
        options.max_new_tokens = options.max_new_tokens.min(limit - len);
        let (least, most) = (options.min_new_tokens, options.max_new_tokens);
        if least > most {
            let expected = format!("at most the {most} tokens that the answer may have");
            return Err(ApiError::field("min_tokens", expected, least));
        }
        Ok(options)
    }
}

fn check_model(fields: &mut Fields, state: &State) -> Result<(), ApiError> {
    let asked: Option<String> = fields.get("model", "a text")?;
    match asked {
        Some(name) if name != state.model.name => Err(ApiError {
            status: axum::http::StatusCode::NOT_FOUND,
            param: Some("model".to_owned()),
            code: Some("model_not_found"),
            ..ApiError::invalid(format!(
                "the model `{name}` does not exist; this server has `{}`",
                state.model.name
            ))
        }),
        _ => Ok(()),
    }
}

/// The request's sampling over that of the model's authors.
fn sampling(fields: &mut Fields, state: &State) -> Result<SamplingOptions, ApiError> {
    let seed: Option<i64> = fields.get("seed", "a whole number")?;
    // The sign is a bit like the others.
    let seed = seed.map_or_else(|| state.unique(), |seed| seed as u64);
    let defaults = state.text.generation.sampling(seed);
    let bias: Option<BTreeMap<String, f32>> =
        fields.get("logit_bias", "an object of numbers by token ids")?;
    let top_k: Option<i64> = fields.get("top_k", "a whole number")?;
    Ok(SamplingOptions {
        temperature: fields.number("temperature", 0.0, 100.0)?.unwrap_or(defaults.temperature),
        top_p: fields.number("top_p", 0.0, 1.0)?.map_or(defaults.top_p, SamplingOptions::share),
        // Some clients say "all" by -1.
        top_k: match top_k {
            Some(k) => usize::try_from(k).ok().filter(|k| *k > 0),
            None => defaults.top_k,
        },
        min_p: fields.number("min_p", 0.0, 1.0)?.unwrap_or(defaults.min_p),
        repetition_penalty: fields
            .number("repetition_penalty", 0.01, 100.0)?
            .unwrap_or(defaults.repetition_penalty),
        presence_penalty: fields.number("presence_penalty", -2.0, 2.0)?.unwrap_or(0.0),
        frequency_penalty: fields.number("frequency_penalty", -2.0, 2.0)?.unwrap_or(0.0),
        logit_bias: logit_bias(bias.unwrap_or_default(), state.model.vocab_size)?,
        seed,
    })
}

fn logit_bias(bias: BTreeMap<String, f32>, vocab_size: usize) -> Result<Vec<(u32, f32)>, ApiError> {
    let one = |(id, bias): (String, f32)| {
        let token = id.parse().ok().filter(|token: &u32| (*token as usize) < vocab_size);
        let expected = format!("by ids below {vocab_size}, each from -100 to 100");
        match token {
            Some(token) if (-100.0..=100.0).contains(&bias) => Ok((token, bias)),
            Some(_) => Err(ApiError::field("logit_bias", expected, bias)),
            None => Err(ApiError::field("logit_bias", expected, id)),
        }
    };
    bias.into_iter().map(one).collect()
}
