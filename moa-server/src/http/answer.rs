//! From the loop's updates to what clients read: one JSON object, or a stream of them.

use std::collections::VecDeque;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use axum::body::{Body, Bytes};
use axum::http::{HeaderValue, header};
use axum::response::Response;
use http_body::Frame;
use moa_models::Finish;
use serde_json::{Value, json};
use tokio::sync::mpsc::UnboundedReceiver;

use super::error::{ApiError, json_response, text_response};
use super::logprobs::{ChoiceLogprobs, TokenText};
use super::responses::told::Told;
use super::tools::{Callable, Held};
use crate::state::State;
use crate::worker::Update;

/// What the client reads.
pub(crate) enum Kind {
    /// Messages.
    Chat,
    /// Texts, each after what is echoed of its prompt.
    Text,
    /// A response of one choice.
    Response(Box<Told>),
}

/// What a choice has said since it was last asked.
pub(crate) struct Said {
    /// What is no call.
    pub(crate) text: String,
    pub(crate) logprobs: ChoiceLogprobs,
    /// All of them, at its end, in the shape of chat completions.
    pub(crate) calls: Vec<Value>,
    /// Why it has ended, if it has: `stop`, `length` or `tool_calls`.
    pub(crate) finish: Option<&'static str>,
}

/// Tokens of a request.
pub(crate) struct Usage {
    pub(crate) prompt: usize,
    /// Those of the prompt that were read before.
    pub(crate) cached: usize,
    pub(crate) generated: usize,
}

/// A request whose prompts the loop has, and how it is answered.
pub(crate) struct Answer {
    pub(crate) state: Arc<State>,
    pub(crate) kind: Kind,
    id: String,
    created: u64,
    pub(crate) include_usage: bool,
    pub(crate) logprobs: bool,
    pub(crate) prompt_tokens: usize,
    cached_tokens: usize,
    /// Calls that are looked for in the text.
    pub(crate) tools: Option<Callable>,
    choices: Vec<Choice>,
}

/// What of a prompt comes before the text.
#[derive(Clone, Default)]
pub(crate) struct Echo {
    pub(crate) text: String,
    /// Whether special tokens of the prompt are in it, but those that the tokenizer adds.
    pub(crate) has_special: bool,
}

/// What is known of one choice.
#[derive(Default)]
struct Choice {
    echo: Echo,
    /// What is not told yet; without a stream, all.
    text: String,
    /// What of that may be a call.
    held: Held,
    /// Tokens whose text was not told yet; without a stream, all tokens.
    logprobs: ChoiceLogprobs,
    /// Characters of the text that the tokens whose probabilities were told stand for.
    offset: usize,
    finish: Option<Finish>,
    tokens: usize,
}

impl Answer {
    pub(crate) fn new(state: Arc<State>, kind: Kind, echoes: Vec<Echo>) -> Self {
        let prefix = if matches!(kind, Kind::Chat) { "chatcmpl" } else { "cmpl" };
        Self {
            id: format!("{prefix}-{:016x}", state.unique()),
            created: now(),
            state,
            kind,
            include_usage: false,
            logprobs: false,
            prompt_tokens: 0,
            cached_tokens: 0,
            tools: None,
            choices: echoes.into_iter().map(|echo| Choice { echo, ..Choice::default() }).collect(),
        }
    }

    /// Waits for all choices; one object.
    pub(crate) async fn whole(
        mut self,
        mut updates: UnboundedReceiver<Update>,
    ) -> Result<Response, ApiError> {
        while self.choices.iter().any(|choice| choice.finish.is_none()) {
            match updates.recv().await {
                Some(Update::Failed(error)) => return Err(error),
                Some(update) => {
                    self.take(update);
                }
                None => return Err(ApiError::stopping()),
            }
        }
        let usage = self.usage();
        let mut choices = std::mem::take(&mut self.choices);
        let said: Vec<Said> = choices.iter_mut().map(|choice| self.said(choice)).collect();
        if let Kind::Response(told) = &mut self.kind {
            // What the last event of a stream tells.
            let mut out = VecDeque::new();
            said.into_iter().for_each(|said| told.push(said, &usage, &mut out));
            return Ok(json_response(told.object()));
        }
        let choices = said.into_iter().zip(choices).enumerate();
        let choices: Vec<Value> =
            choices.map(|(index, (said, choice))| self.whole_choice(index, said, choice)).collect();
        let mut object = self.envelope(false);
        object["choices"] = choices.into();
        object["usage"] = usage.json();
        Ok(json_response(&object))
    }

    /// Answers with a stream once the loop has begun.
    pub(crate) async fn stream(
        mut self,
        mut updates: UnboundedReceiver<Update>,
    ) -> Result<Response, ApiError> {
        match updates.recv().await {
            Some(Update::Failed(error)) => return Err(error),
            Some(update) => self.take(update),
            None => return Err(ApiError::stopping()),
        };
        let mut out = VecDeque::new();
        if let Kind::Response(told) = &mut self.kind {
            told.begin(&mut out);
        }
        for index in 0..self.choices.len() {
            let echo = self.choices[index].echo.text.clone();
            match self.kind {
                Kind::Chat => {
                    let delta = json!({ "role": "assistant", "content": "" });
                    out.push_back(self.chunk(index, delta, Value::Null, None));
                }
                Kind::Text if !echo.is_empty() => {
                    out.push_back(self.chunk(index, echo.into(), Value::Null, None));
                }
                Kind::Text | Kind::Response(_) => {}
            }
        }
        let stream = Stream { answer: self, updates, out, is_over: false };
        let mut response = text_response("text/event-stream", Body::new(stream));
        let no_cache = HeaderValue::from_static("no-cache");
        response.headers_mut().insert(header::CACHE_CONTROL, no_cache);
        Ok(response)
    }

    /// Notes an update; its choice.
    fn take(&mut self, update: Update) -> Option<usize> {
        match update {
            Update::Begun { cached_tokens } => {
                self.cached_tokens += cached_tokens;
                None
            }
            Update::PromptToken { choices, token, logprobs } => {
                let text = TokenText { tokenizer: &self.state.text.tokenizer };
                for choice in self.choices.get_mut(choices)? {
                    let is_first = choice.logprobs.is_empty() && choice.offset == 0;
                    // A tokenizer begins a text with a token that the text need not have.
                    let is_added = is_first && !choice.echo.text.starts_with(&text.of(token));
                    let is_literal = choice.echo.has_special && !is_added;
                    choice.logprobs.push(&text, token, logprobs.as_ref(), is_literal);
                }
                None
            }
            Update::Token { choice: index, token, logprobs } => {
                let text = TokenText { tokenizer: &self.state.text.tokenizer };
                let choice = self.choices.get_mut(index)?;
                choice.logprobs.push(&text, token, Some(&logprobs), false);
                None
            }
            Update::Text { choice: index, piece } => {
                self.choices.get_mut(index)?.text.push_str(&piece);
                Some(index)
            }
            Update::Done { choice: index, finish, tokens } => {
                let choice = self.choices.get_mut(index)?;
                (choice.finish, choice.tokens) = (Some(finish), tokens);
                Some(index)
            }
            Update::Failed(_) => None,
        }
    }

    /// What all objects of an answer have in common.
    fn envelope(&self, is_chunk: bool) -> Value {
        let object = match (&self.kind, is_chunk) {
            (Kind::Text, _) => "text_completion",
            (_, true) => "chat.completion.chunk",
            (_, false) => "chat.completion",
        };
        json!({
            "id": self.id,
            "object": object,
            "created": self.created,
            "model": self.state.model.name,
            "system_fingerprint": self.state.model.fingerprint,
        })
    }

    /// Of the choices that have ended.
    fn usage(&self) -> Usage {
        Usage {
            prompt: self.prompt_tokens,
            cached: self.cached_tokens,
            generated: self.choices.iter().map(|choice| choice.tokens).sum(),
        }
    }

    fn whole_choice(&self, index: usize, said: Said, mut choice: Choice) -> Value {
        let logprobs = self.logprobs_value(said.logprobs, &mut choice.offset);
        let mut object =
            json!({ "index": index, "logprobs": logprobs, "finish_reason": said.finish });
        if matches!(self.kind, Kind::Text) {
            object["text"] = (choice.echo.text + &said.text).into();
            return object;
        }
        let is_silent = said.text.is_empty() && !said.calls.is_empty();
        let content = if is_silent { Value::Null } else { said.text.into() };
        object["message"] = json!({ "role": "assistant", "content": content, "refusal": null });
        if !said.calls.is_empty() {
            object["message"]["tool_calls"] = said.calls.into();
        }
        object
    }

    /// What a choice has to say now.
    fn said(&self, choice: &mut Choice) -> Said {
        let (mut text, mut calls) = (std::mem::take(&mut choice.text), Vec::new());
        if let Some(tools) = &self.tools {
            text = choice.held.push(&text, tools);
            if choice.finish.is_some() {
                let held = std::mem::take(&mut choice.held);
                let (rest, found) = held.finish(self.state.unique(), tools);
                text.push_str(&rest);
                calls = found;
            }
        }
        // A call that had to come may have been cut off; others are whole.
        let is_forced = self.tools.as_ref().is_some_and(|tools| tools.forced);
        let finish = choice.finish.map(|finish| match finish {
            Finish::Length if calls.is_empty() || is_forced => "length",
            _ if calls.is_empty() => "stop",
            _ => "tool_calls",
        });
        // Those of a text that is held back come with it.
        let is_told = !text.is_empty() || finish.is_some();
        let logprobs = match is_told {
            true => std::mem::take(&mut choice.logprobs),
            false => ChoiceLogprobs::default(),
        };
        Said { text, logprobs, calls, finish }
    }

    fn logprobs_value(&self, logprobs: ChoiceLogprobs, offset: &mut usize) -> Value {
        match (self.logprobs, &self.kind) {
            (false, _) => Value::Null,
            (true, Kind::Text) => logprobs.text(offset),
            (true, _) => logprobs.chat(),
        }
    }

    /// One part of a choice; `content` is a text, or for chats the change of a message.
    fn chunk(
        &self,
        index: usize,
        content: Value,
        logprobs: Value,
        finish: Option<&'static str>,
    ) -> Bytes {
        let mut object = self.envelope(true);
        let field = if matches!(self.kind, Kind::Text) { "text" } else { "delta" };
        let mut choice = json!({ "index": index, "logprobs": logprobs, "finish_reason": finish });
        choice[field] = content;
        object["choices"] = json!([choice]);
        if self.include_usage {
            object["usage"] = Value::Null;
        }
        event(&object)
    }

    /// What an update adds to a stream.
    fn push(&mut self, update: Update, out: &mut VecDeque<Bytes>) {
        let Some(index) = self.take(update) else { return };
        let mut choice = std::mem::take(&mut self.choices[index]);
        let said = self.said(&mut choice);
        if !matches!(self.kind, Kind::Response(_)) {
            return self.push_chunks(index, said, choice, out);
        }
        self.choices[index] = choice;
        let usage = self.usage();
        if let Kind::Response(told) = &mut self.kind {
            told.push(said, &usage, out);
        }
    }

    fn push_chunks(
        &mut self,
        index: usize,
        said: Said,
        mut choice: Choice,
        out: &mut VecDeque<Bytes>,
    ) {
        let is_chat = matches!(self.kind, Kind::Chat);
        if !said.text.is_empty() || !said.logprobs.is_empty() {
            let content = if is_chat { json!({ "content": said.text }) } else { said.text.into() };
            let logprobs = self.logprobs_value(said.logprobs, &mut choice.offset);
            out.push_back(self.chunk(index, content, logprobs, None));
        }
        for (at, mut call) in said.calls.into_iter().enumerate() {
            call["index"] = at.into();
            out.push_back(self.chunk(index, json!({ "tool_calls": [call] }), Value::Null, None));
        }
        if said.finish.is_some() {
            let content = if is_chat { json!({}) } else { "".into() };
            out.push_back(self.chunk(index, content, Value::Null, said.finish));
        }
        self.choices[index] = choice;
        if self.is_over() {
            if self.include_usage {
                let mut object = self.envelope(true);
                object["choices"] = json!([]);
                object["usage"] = self.usage().json();
                out.push_back(event(&object));
            }
            out.push_back(Bytes::from_static(b"data: [DONE]\n\n"));
        }
    }

    /// Ends a stream by what went wrong.
    fn fail(&mut self, error: &ApiError, out: &mut VecDeque<Bytes>) {
        match &mut self.kind {
            Kind::Response(told) => told.fail(error, out),
            _ => out.push_back(event(&error.json())),
        }
    }

    fn is_over(&self) -> bool {
        self.choices.iter().all(|choice| choice.finish.is_some())
    }
}

impl Usage {
    /// In the shape of completions.
    fn json(&self) -> Value {
        json!({
            "prompt_tokens": self.prompt,
            "completion_tokens": self.generated,
            "total_tokens": self.prompt + self.generated,
            "prompt_tokens_details": { "cached_tokens": self.cached },
        })
    }
}

/// Seconds since 1970.
pub(crate) fn now() -> u64 {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    now.unwrap_or_default().as_secs()
}

/// A server-sent event.
fn event(object: &Value) -> Bytes {
    format!("data: {object}\n\n").into()
}

/// An answer as a stream of events. The loop learns that the client has gone when this is dropped.
struct Stream {
    answer: Answer,
    updates: UnboundedReceiver<Update>,
    out: VecDeque<Bytes>,
    is_over: bool,
}

impl http_body::Body for Stream {
    type Data = Bytes;
    type Error = std::convert::Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Self::Error>>> {
        let this = &mut *self;
        // What is there already goes out as one frame.
        while !this.is_over {
            match this.updates.poll_recv(context) {
                Poll::Ready(Some(Update::Failed(error))) => {
                    this.answer.fail(&error, &mut this.out);
                    this.is_over = true;
                }
                Poll::Ready(Some(update)) => {
                    this.answer.push(update, &mut this.out);
                    this.is_over = this.answer.is_over();
                }
                Poll::Ready(None) => {
                    this.answer.fail(&ApiError::stopping(), &mut this.out);
                    this.is_over = true;
                }
                Poll::Pending => break,
            }
        }
        match this.out.len() {
            0 if this.is_over => Poll::Ready(None),
            0 => Poll::Pending,
            1 => Poll::Ready(this.out.pop_front().map(|bytes| Ok(Frame::data(bytes)))),
            _ => {
                let all: Vec<u8> = this.out.drain(..).flatten().collect();
                Poll::Ready(Some(Ok(Frame::data(all.into()))))
            }
        }
    }
}
