//! What goes into the engine and what comes out of it.

use std::time::Duration;

use crate::Error;
use crate::checkpoint::template::Message;
use crate::engine::sampling::SamplingOptions;

/// The input of a request to an [`Engine`](crate::Engine): token ids, a text, or a conversation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Prompt {
    /// Token ids, which are read as they are.
    Tokens(Vec<u32>),
    /// A text that the model continues; the tokenizer adds the begin token.
    Text(String),
    /// A conversation that the model answers; it goes through the chat template.
    Chat(Vec<Message>),
}

impl Prompt {
    /// A conversation that the model answers.
    pub fn chat(messages: &[Message]) -> Self {
        Self::Chat(messages.to_vec())
    }
}

impl From<&[u32]> for Prompt {
    fn from(tokens: &[u32]) -> Self {
        Self::Tokens(tokens.to_vec())
    }
}

impl From<Vec<u32>> for Prompt {
    fn from(tokens: Vec<u32>) -> Self {
        Self::Tokens(tokens)
    }
}

impl From<&str> for Prompt {
    fn from(text: &str) -> Self {
        Self::Text(text.to_owned())
    }
}

impl From<String> for Prompt {
    fn from(text: String) -> Self {
        Self::Text(text)
    }
}

/// The options of one request: its length, how tokens are chosen, and what ends it. The default
/// takes the likeliest token 256 times, or until the model ends its text.
#[derive(Clone, Debug, PartialEq)]
pub struct GenerateOptions {
    /// Most tokens that are added to the prompt.
    pub max_new_tokens: usize,
    /// How each token is chosen.
    pub sampling: SamplingOptions,
    /// Texts that end the request, of which nothing is returned. One that is a special token ends it as
    /// such.
    pub stop: Vec<String>,
    /// Tokens that end the request beside [`eos_token_ids`](Self::eos_token_ids), of which nothing is
    /// returned.
    pub stop_token_ids: Vec<u32>,
    /// Tokens that end the request; `None` for those of the model, an empty list for none.
    pub eos_token_ids: Option<Vec<u32>>,
}

impl Default for GenerateOptions {
    fn default() -> Self {
        Self {
            max_new_tokens: 256,
            sampling: SamplingOptions::default(),
            stop: Vec::new(),
            stop_token_ids: Vec::new(),
            eos_token_ids: None,
        }
    }
}

/// The name that an engine gives to a request, which no other request of that engine gets.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RequestId(pub(crate) u64);

impl std::fmt::Display for RequestId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.fmt(f)
    }
}

/// Why a request ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Finish {
    /// The model chose an end-of-sequence token.
    Eos,
    /// The request has all its new tokens, or its sequence is full.
    Length,
    /// The text reached a stop string or a stop token, or the caller ended the request.
    Stopped,
}

impl Finish {
    /// The reason in one word: `eos`, `length` or `stop`.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Eos => "eos",
            Self::Length => "length",
            Self::Stopped => "stop",
        }
    }
}

/// The answer to one request: its text, its new tokens, and why it ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Completion {
    /// The text, without the stop string; empty where the engine has no tokenizer.
    pub text: String,
    /// The new tokens, without the end-of-sequence token.
    pub tokens: Vec<u32>,
    /// Why the request ended.
    pub finish: Finish,
}

/// What [`Engine::step`](crate::Engine::step) tells about one request.
#[non_exhaustive]
#[derive(Debug)]
pub enum Event {
    /// A stretch of the prompt was read.
    Prefill {
        /// The request.
        id: RequestId,
        /// Tokens of the prompt that are read.
        done: usize,
        /// Tokens of the prompt.
        total: usize,
    },
    /// The request got a token, which is never an end-of-sequence token.
    Token {
        /// The request.
        id: RequestId,
        /// The token.
        token: u32,
    },
    /// The request got text: whole characters, and nothing of a stop string.
    Text {
        /// The request.
        id: RequestId,
        /// At least one character; all pieces of a request join to [`Completion::text`].
        piece: String,
    },
    /// The request has ended.
    Done {
        /// The request.
        id: RequestId,
        /// The whole answer.
        completion: Completion,
    },
    /// The request was refused, or cannot go on; the others go on.
    Failed {
        /// The request.
        id: RequestId,
        /// What is wrong with it.
        error: Error,
    },
}

impl Event {
    /// The request that this is about.
    #[must_use]
    pub fn id(&self) -> RequestId {
        match self {
            Self::Prefill { id, .. }
            | Self::Token { id, .. }
            | Self::Text { id, .. }
            | Self::Done { id, .. }
            | Self::Failed { id, .. } => *id,
        }
    }
}

/// What an engine has done, and the time that its steps took.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// Prompt tokens that were read.
    pub prompt_tokens: usize,
    /// Time of the steps that read prompts; running requests may have got a token in them too.
    pub prefill: Duration,
    /// Tokens that running requests took in during all other steps, one each and step.
    pub decoded_tokens: usize,
    /// Time of those other steps.
    pub decode: Duration,
}

impl Usage {
    /// Prompt tokens per second.
    #[must_use]
    pub fn prefill_tokens_per_second(&self) -> f64 {
        self.prompt_tokens as f64 / self.prefill.as_secs_f64().max(1e-9)
    }

    /// Decoded tokens per second, of all requests together.
    #[must_use]
    pub fn decode_tokens_per_second(&self) -> f64 {
        self.decoded_tokens as f64 / self.decode.as_secs_f64().max(1e-9)
    }
}
