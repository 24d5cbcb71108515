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
use super::tools::{Callable, Held};
use crate::state::State;
use crate::worker::Update;

/// What the client reads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// Messages.
    Chat,
    /// Texts, each after what is echoed of its prompt.
    Text,
}

/// A request whose prompts the loop has, and how it is answered.
pub(crate) struct Answer {
    pub(crate) state: Arc<State>,
    pub(crate) kind: Kind,
    pub(crate) id: String,
    pub(crate) created: u64,
    pub(crate) include_usage: bool,
    pub(crate) logprobs: bool,
    pub(crate) prompt_tokens: usize,
    cached_tokens: usize,
    /// Calls that are looked for in the text.
    pub(crate) tools: Option<Callable>,
    choices: Vec<Choice>,
}

/// What is known of one choice.
#[derive(Default)]
struct Choice {
    /// What of the prompt comes before the text.
    echo: String,
    /// What is not told yet; without a stream, all.
    text: String,
    /// What of that may be a call.
    held: Held,
    /// Tokens whose text was not told yet; without a stream, all tokens.
    logprobs: ChoiceLogprobs,
    /// Characters of the tokens whose probabilities were told.
    offset: usize,
    finish: Option<Finish>,
    tokens: usize,
}

impl Answer {
    pub(crate) fn new(state: Arc<State>, kind: Kind, echoes: Vec<String>) -> Self {
        let prefix = if kind == Kind::Chat { "chatcmpl" } else { "cmpl" };
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
        Self {
            id: format!("{prefix}-{:016x}", state.unique()),
            created: now.unwrap_or_default().as_secs(),
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
        let choices = std::mem::take(&mut self.choices);
        let tokens = choices.iter().map(|choice| choice.tokens).sum();
        let choices: Vec<Value> =
            choices.into_iter().enumerate().map(|(index, c)| self.whole_choice(index, c)).collect();
        let mut object = self.envelope(false);
        object["choices"] = choices.into();
        object["usage"] = self.usage(tokens);
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
        for index in 0..self.choices.len() {
            let echo = std::mem::take(&mut self.choices[index].echo);
            match self.kind {
                Kind::Chat => {
                    let delta = json!({ "role": "assistant", "content": "" });
                    out.push_back(self.chunk(index, delta, Value::Null, None));
                }
                Kind::Text if echo.is_empty() => {}
                Kind::Text => out.push_back(self.chunk(index, echo.into(), Value::Null, None)),
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
                    choice.logprobs.push(&text, token, logprobs.as_ref());
                }
                None
            }
            Update::Token { choice: index, token, logprobs } => {
                let text = TokenText { tokenizer: &self.state.text.tokenizer };
                let choice = self.choices.get_mut(index)?;
                choice.logprobs.push(&text, token, Some(&logprobs));
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
        let object = match (self.kind, is_chunk) {
            (Kind::Chat, true) => "chat.completion.chunk",
            (Kind::Chat, false) => "chat.completion",
            (Kind::Text, _) => "text_completion",
        };
        json!({
            "id": self.id,
            "object": object,
            "created": self.created,
            "model": self.state.model.name,
            "system_fingerprint": self.state.model.fingerprint,
        })
    }

    fn usage(&self, tokens: usize) -> Value {
        json!({
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": tokens,
            "total_tokens": self.prompt_tokens + tokens,
            "prompt_tokens_details": { "cached_tokens": self.cached_tokens },
        })
    }

    fn whole_choice(&self, index: usize, mut choice: Choice) -> Value {
        let (text, calls) = self.said(&mut choice);
        let mut finish = finish_reason(choice.finish);
        let logprobs = self.logprobs_value(choice.logprobs, &mut choice.offset);
        match self.kind {
            Kind::Text => json!({
                "index": index,
                "text": choice.echo + &text,
                "logprobs": logprobs,
                "finish_reason": finish,
            }),
            Kind::Chat => {
                let mut message = json!({ "role": "assistant", "content": text, "refusal": null });
                if !calls.is_empty() {
                    if text.is_empty() {
                        message["content"] = Value::Null;
                    }
                    message["tool_calls"] = calls.into();
                    finish = self.called(choice.finish);
                }
                json!({
                    "index": index,
                    "message": message,
                    "logprobs": logprobs,
                    "finish_reason": finish,
                })
            }
        }
    }

    /// What a choice has said that is no call, and at its end the calls.
    fn said(&self, choice: &mut Choice) -> (String, Vec<Value>) {
        let text = std::mem::take(&mut choice.text);
        let Some(tools) = &self.tools else { return (text, Vec::new()) };
        let mut said = choice.held.push(&text, tools);
        if choice.finish.is_none() {
            return (said, Vec::new());
        }
        let held = std::mem::take(&mut choice.held);
        let (rest, calls) = held.finish(self.state.unique(), tools);
        said.push_str(&rest);
        (said, calls)
    }

    /// Why a choice with calls has ended: one that had to come may have been cut off.
    fn called(&self, finish: Option<Finish>) -> &'static str {
        match finish {
            Some(Finish::Length) if self.tools.as_ref().is_some_and(|tools| tools.forced) => {
                "length"
            }
            _ => "tool_calls",
        }
    }

    fn logprobs_value(&self, logprobs: ChoiceLogprobs, offset: &mut usize) -> Value {
        match (self.logprobs, self.kind) {
            (false, _) => Value::Null,
            (true, Kind::Chat) => logprobs.chat(),
            (true, Kind::Text) => logprobs.text(offset),
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
        let field = if self.kind == Kind::Chat { "delta" } else { "text" };
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
        let (is_done, is_chat) = (choice.finish.is_some(), self.kind == Kind::Chat);
        let (text, calls) = self.said(&mut choice);
        let has_calls = !calls.is_empty();
        if !text.is_empty() || is_done && !choice.logprobs.is_empty() {
            let content = if is_chat { json!({ "content": text }) } else { text.into() };
            let logprobs = std::mem::take(&mut choice.logprobs);
            let logprobs = self.logprobs_value(logprobs, &mut choice.offset);
            out.push_back(self.chunk(index, content, logprobs, None));
        }
        for (at, mut call) in calls.into_iter().enumerate() {
            call["index"] = at.into();
            out.push_back(self.chunk(index, json!({ "tool_calls": [call] }), Value::Null, None));
        }
        if is_done {
            let content = if is_chat { json!({}) } else { "".into() };
            let finish = match has_calls {
                true => self.called(choice.finish),
                false => finish_reason(choice.finish),
            };
            out.push_back(self.chunk(index, content, Value::Null, Some(finish)));
        }
        self.choices[index] = choice;
        if self.choices.iter().all(|choice| choice.finish.is_some()) {
            if self.include_usage {
                let mut object = self.envelope(true);
                object["choices"] = json!([]);
                object["usage"] = self.usage(self.choices.iter().map(|c| c.tokens).sum());
                out.push_back(event(&object));
            }
            out.push_back(Bytes::from_static(b"data: [DONE]\n\n"));
        }
    }

    fn is_over(&self) -> bool {
        self.choices.iter().all(|choice| choice.finish.is_some())
    }
}

fn finish_reason(finish: Option<Finish>) -> &'static str {
    match finish {
        Some(Finish::Length) => "length",
        _ => "stop",
    }
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
                    this.out.push_back(event(&error.json()));
                    this.is_over = true;
                }
                Poll::Ready(Some(update)) => {
                    this.answer.push(update, &mut this.out);
                    this.is_over = this.answer.is_over();
                }
                Poll::Ready(None) => {
                    this.out.push_back(event(&ApiError::stopping().json()));
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
