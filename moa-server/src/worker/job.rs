//! What handlers ask of the loop, and what they are told.

use std::ops::Range;
use std::sync::Arc;
use std::time::Instant;

use moa_models::{Finish, GenerateOptions, TokenLogprobs};
use tokio::sync::mpsc::{UnboundedSender, unbounded_channel};

use crate::grammar::Grammar;
use crate::http::error::ApiError;

/// A message to the loop.
pub(crate) enum Command {
    /// A prompt to continue.
    Job(Box<Job>),
    /// No job follows; those that are there may end.
    Stop,
}

/// One prompt and how it is to be continued.
#[derive(Clone)]
pub(crate) struct Job {
    pub(crate) prompt: Vec<u32>,
    /// Tokens of it that other prompts are likely to begin with.
    pub(crate) shared: Option<usize>,
    /// Number of its first choice in the request; others follow.
    pub(crate) first_choice: usize,
    /// Choices, each with a seed of its own.
    pub(crate) choices: usize,
    pub(crate) options: GenerateOptions,
    pub(crate) grammar: Option<Arc<Grammar>>,
    /// Lower ones go first.
    pub(crate) priority: i64,
    pub(crate) came: Instant,
    pub(crate) deadline: Instant,
    /// Closed when the client has gone.
    pub(crate) out: UnboundedSender<Update>,
}

impl Job {
    /// The same for a rank that no client listens to.
    pub(super) fn unheard(&self) -> Self {
        Self { out: unbounded_channel().0, ..self.clone() }
    }

    /// Why nobody waits for it any more.
    pub(super) fn gone(&self, now: Instant) -> Option<Gone> {
        match self.out.is_closed() {
            true => Some(Gone::Left),
            false => (now >= self.deadline).then_some(Gone::Late),
        }
    }
}

/// Why nobody waits for a job.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Gone {
    /// Its client has left.
    Left,
    /// Its time is over.
    Late,
}

/// What became of a job since the last one.
#[derive(Debug)]
pub(crate) enum Update {
    /// Its prompt is being read, but for so many tokens of it that were read before.
    Begun { cached_tokens: usize },
    /// A token of the prompt was read, which comes before all tokens of the job's choices, where the request asks how likely
    /// they were.
    PromptToken { choices: Range<usize>, token: u32, logprobs: Option<TokenLogprobs> },
    /// A choice got a token, where the request asks how likely they were.
    Token { choice: usize, token: u32, logprobs: TokenLogprobs },
    /// A choice got text.
    Text { choice: usize, piece: String },
    /// A choice has ended, after so many tokens.
    Done { choice: usize, finish: Finish, tokens: usize },
    /// The whole job has ended.
    Failed(ApiError),
}
