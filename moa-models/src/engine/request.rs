//! What goes into the engine and what comes out of it.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::Error;
use crate::checkpoint::template::Message;
use crate::engine::logprobs::TokenLogprobs;
use crate::engine::sampling::SamplingOptions;

/// The input of a request to an [`Engine`](crate::Engine): token ids, a text, or a conversation.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
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
/// takes the likeliest token 256 times, or until the model ends its text. Options that a file leaves out are the
/// default's, and names that there are not are refused.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct GenerateOptions {
    /// Most tokens that are added to the prompt.
    pub max_new_tokens: usize,
    /// So many tokens come before the text may end by a token or a stop string; the host chooses them. Where a
    /// [`Constraint`](crate::Constraint) allows nothing but an end earlier, the request fails with
    /// [`Error::Logits`](crate::Error::Logits).
    pub min_new_tokens: usize,
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
    /// Tell with each token how likely it was, and so many of the likeliest in its place; the host then
    /// chooses the request's tokens.
    pub logprobs: Option<usize>,
    /// Tell the tokens of the prompt too, each with how likely it was, where [`logprobs`](Self::logprobs) are asked for: as
    /// [`Event::PromptToken`]. Those that a sequence holds already, and the one after them, are not told.
    pub prompt_logprobs: bool,
    /// Whether the text follows on that of a prompt of tokens, whose first space it then keeps; `None`
    /// where the model has no chat template.
    pub continues_prompt: Option<bool>,
    /// Positions inside the prompt at which a step ends, so that the sequence can be copied there
    /// ([`Engine::snapshot`](crate::Engine::snapshot)); the answer does not depend on them. Those are left out that
    /// are nearer to each other, to the beginning of what is read or to the end than
    /// [`Device::many_rows`](crate::Device::many_rows).
    pub prefill_stops: Vec<usize>,
}

impl Default for GenerateOptions {
    fn default() -> Self {
        Self {
            max_new_tokens: 256,
            min_new_tokens: 0,
            sampling: SamplingOptions::default(),
            stop: Vec::new(),
            stop_token_ids: Vec::new(),
            eos_token_ids: None,
            logprobs: None,
            prompt_logprobs: false,
            continues_prompt: None,
            prefill_stops: Vec::new(),
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
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Finish {
    /// The model chose an end-of-sequence token.
    Eos,
    /// The request has all its new tokens, or its sequence is full.
    Length,
    /// The text reached a stop string or a stop token, or the caller ended the request.
    #[serde(rename = "stop")]
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
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
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
    /// A token of the prompt was read, where [`GenerateOptions::prompt_logprobs`] asks for it.
    PromptToken {
        /// The request.
        id: RequestId,
        /// The token.
        token: u32,
        /// How likely it was after those before it; `None` of the first one, which follows nothing.
        logprobs: Option<TokenLogprobs>,
    },
    /// The request got a token, which is never an end-of-sequence token.
    Token {
        /// The request.
        id: RequestId,
        /// The token.
        token: u32,
        /// How likely it was, where [`GenerateOptions::logprobs`] asks for it.
        logprobs: Option<TokenLogprobs>,
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
            | Self::PromptToken { id, .. }
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
    /// Tokens that running requests took in during all other steps, one each and step, and guesses that were right.
    pub decoded_tokens: usize,
    /// Time of those other steps.
    pub decode: Duration,
    /// Tokens that were guessed and checked, where the engine
    /// [speculates](crate::EngineOptions::speculation).
    pub drafted_tokens: usize,
    /// Those of them that were right; `decoded_tokens` counts them too.
    pub accepted_tokens: usize,
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
