use moa_core::Plan;

use crate::Result;
use crate::checkpoint::template::Message;
use crate::checkpoint::{Checkpoint, Completion, TextProgress};
use crate::decoder::sequence::Sequence;
use crate::device::Math;
use crate::engine::generate::{GenerateOptions, Generation, Next};

/// A conversation on one cache: each turn reads only what is new.
#[derive(Debug)]
pub struct ChatSession<'a, D: Math> {
    checkpoint: &'a Checkpoint<D>,
    /// One element: a batch of one.
    sequence: [Sequence<D>; 1],
    /// Tokens that the cache holds.
    cached: Vec<u32>,
    messages: Vec<Message>,
}

impl<'a, D: Math> ChatSession<'a, D> {
    /// An empty conversation of at most `capacity` tokens.
    ///
    /// # Errors
    /// If the plan is for another model or the capacity is beyond the model's context.
    pub fn new(checkpoint: &'a Checkpoint<D>, plan: &Plan, capacity: usize) -> Result<Self> {
        let sequence = [checkpoint.model.open(plan, capacity, 0)?];
        Ok(Self { checkpoint, sequence, cached: Vec::new(), messages: Vec::new() })
    }

    /// The conversation so far.
    pub fn messages(&self) -> &[Message] {
        &self.messages
    }

    /// Tokens that the cache holds.
    pub fn cached_tokens(&self) -> usize {
        self.cached.len()
    }

    /// Adds a user's message and streams the answer, which becomes part of the conversation.
    ///
    /// Templates may write history differently from what the model produced (trimmed, closed by
    /// an end token): the cache is rolled back to the common prefix, and where a wrapped ring no
    /// longer allows that, the conversation is read again from its start.
    ///
    /// # Errors
    /// As [`Checkpoint::generate_text`]; the message is then not part of the conversation.
    pub fn say(
        &mut self,
        content: &str,
        options: &GenerateOptions,
        stop: &[String],
        on_progress: &mut dyn FnMut(TextProgress<'_>) -> Next,
    ) -> Result<Completion> {
        Ok(self.turn(content, options, stop, on_progress)?.0)
    }

    /// Bytes of keys and values that the cache holds.
    pub(crate) fn kv_bytes(&self) -> u64 {
        self.checkpoint.model.kv_bytes(&self.sequence[0])
    }

    /// [`ChatSession::say`], with what was read and written and the time it took.
    pub(crate) fn turn(
        &mut self,
        content: &str,
        options: &GenerateOptions,
        stop: &[String],
        on_progress: &mut dyn FnMut(TextProgress<'_>) -> Next,
    ) -> Result<(Completion, Generation)> {
        let mut messages = self.messages.clone();
        messages.push(Message::user(content));
        let tokens = self.checkpoint.chat_tokens(&messages)?;
        let common = self.cached.iter().zip(&tokens).take_while(|(a, b)| a == b).count();
        // At least one token must be read to have logits to answer from.
        self.roll_back(common.min(tokens.len().saturating_sub(1)))?;
        let new = &tokens[self.cached.len()..];
        let result =
            self.checkpoint.generate_text(&mut self.sequence, &[new], options, stop, on_progress);
        let (mut completions, generation) = match result {
            Ok(done) => done,
            Err(error) => {
                // Some chunks may have been read: the next turn starts from a known state.
                self.roll_back(self.cached.len())?;
                return Err(error);
            }
        };
        self.cached = tokens;
        self.cached.extend(&generation.sequences[0].tokens);
        self.cached.truncate(self.sequence[0].len());
        let completion = completions.remove(0);
        messages.push(Message::assistant(&completion.text));
        self.messages = messages;
        Ok((completion, generation))
    }

    fn roll_back(&mut self, len: usize) -> Result<()> {
        let model = &self.checkpoint.model;
        let len = len.min(self.cached.len());
        let len = match model.truncate(&mut self.sequence[0], len) {
            Ok(()) => len,
            Err(_) => {
                model.truncate(&mut self.sequence[0], 0)?;
                0
            }
        };
        self.cached.truncate(len);
        Ok(())
    }
}
