//! From a request to the loop's jobs.

use std::sync::Arc;
use std::sync::atomic::Ordering::{Relaxed, SeqCst};
use std::time::Instant;

use axum::response::Response;
use tokio::sync::mpsc::unbounded_channel;

use super::answer::{Answer, Kind};
use super::chat::ChatText;
use super::error::ApiError;
use super::form::Form;
use super::params::Params;
use crate::state::State;
use crate::worker::{Command, Job};

/// What is to be continued.
pub(crate) enum Prompt {
    Text(String),
    Tokens(Vec<u32>),
    Chat(Box<ChatText>),
}

/// Gives the prompts to the loop, and answers with what it makes of them.
pub(crate) async fn submit(
    state: Arc<State>,
    params: Params,
    came: Instant,
    prompts: Vec<Prompt>,
    form: Option<Form>,
    mut answer: Answer,
) -> Result<Response, ApiError> {
    check_room(&state)?;
    let field = match answer.kind {
        Kind::Text => "prompt",
        Kind::Chat => "messages",
        Kind::Response(_) => "input",
    };
    let prompts = tokens(&state, prompts).await.map_err(|error| error.of(field))?;
    if let Some((of, grammar)) = &form {
        if params.options.min_new_tokens > 0 {
            // It may allow nothing but the end.
            let expected = "left out where the answer must have a form";
            return Err(ApiError::field("min_tokens", expected, params.options.min_new_tokens));
        }
        grammar.prepare(&state).await.map_err(|error| error.of(of))?;
    }
    answer.include_usage = params.include_usage;
    answer.prompt_tokens = prompts.iter().map(|(prompt, _)| prompt.len()).sum();
    let (out, updates) = unbounded_channel();
    let mut jobs = Vec::with_capacity(prompts.len());
    for (at, (prompt, shared)) in prompts.into_iter().enumerate() {
        let mut options = params.for_prompt(prompt.len(), &state).map_err(|e| e.of(field))?;
        options.continues_prompt = Some(matches!(answer.kind, Kind::Text));
        // Prompts of one request draw alike only where their texts are alike.
        options.sampling.seed = options.sampling.seed.wrapping_add((at * params.choices) as u64);
        jobs.push(Job {
            prompt,
            shared,
            first_choice: at * params.choices,
            choices: params.choices,
            options,
            grammar: form.as_ref().map(|(_, grammar)| Arc::clone(grammar)),
            priority: params.priority,
            came,
            deadline: params.deadline,
            out: out.clone(),
        });
    }
    drop(out);
    check_room(&state)?;
    state.metrics.requests.fetch_add(1, Relaxed);
    for job in jobs {
        state.metrics.queued.fetch_add(1, Relaxed);
        let sent = state.commands.send(Command::Job(Box::new(job)));
        sent.map_err(|_| ApiError::stopping())?;
    }
    match params.stream {
        true => answer.stream(updates).await,
        false => answer.whole(updates).await,
    }
}

/// Refuses a request that the queue has no room for.
fn check_room(state: &State) -> Result<(), ApiError> {
    if state.stopping.load(SeqCst) {
        return Err(ApiError::stopping());
    }
    if state.metrics.queued.load(Relaxed) >= state.options.max_queue as u64 {
        state.metrics.refused.fetch_add(1, Relaxed);
        return Err(ApiError::busy("too many requests wait"));
    }
    Ok(())
}

/// The tokens of prompts, made where they keep no connection waiting, each with how many of them other prompts are
/// likely to begin with, where that is known.
async fn tokens(
    state: &Arc<State>,
    prompts: Vec<Prompt>,
) -> Result<Vec<(Vec<u32>, Option<usize>)>, ApiError> {
    let state = Arc::clone(state);
    let work = move || {
        let vocab_size = state.model.vocab_size;
        let one = |prompt: &Prompt| match prompt {
            Prompt::Text(text) => {
                let tokens = state.text.tokenizer.encode_within(text, true, state.model.context);
                tokens.map(|own| (own, None)).map_err(|error| ApiError::of_model(&error))
            }
            Prompt::Chat(text) => text.tokens(&state).map_err(|error| ApiError::of_model(&error)),
            Prompt::Tokens(tokens) => match tokens.iter().find(|t| **t as usize >= vocab_size) {
                Some(token) => {
                    Err(ApiError::field("prompt", format!("ids below {vocab_size}"), token))
                }
                None => Ok((tokens.clone(), None)),
            },
        };
        prompts.iter().map(one).collect()
    };
    blocking(work).await?
}

/// Runs what takes long on a thread that may wait.
pub(crate) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, ApiError> {
    tokio::task::spawn_blocking(work).await.map_err(|error| {
        let status = axum::http::StatusCode::INTERNAL_SERVER_ERROR;
        ApiError::new(status, format!("the request could not be worked on: {error}"))
    })
}
