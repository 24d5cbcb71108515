//! What KVzip has a model read again.

use super::prefill::Repeat;
use crate::checkpoint::Checkpoint;
use crate::checkpoint::prompt_style::PromptStyle;
use crate::checkpoint::template::Message;
use crate::device::Math;
use crate::{Error, Result};

/// Most tokens of a part, and the fewest where the model's context leaves less room.
const PART: usize = 2048;
const LEAST_PART: usize = 64;

/// Tokens of the part before that say where the next one begins.
const LINK: usize = 8;

impl<D: Math> Checkpoint<D> {
    /// The texts that repeat a context, part by part: the instruction, the end of a user's message, and the part.
    ///
    /// # Errors
    /// [`Error::ContextExceeded`] if the model's context has no room for a part after the context; those of the
    /// template and the tokenizer.
    pub(crate) fn repeats(&self, context: &[u32]) -> Result<Vec<Repeat>> {
        let encode = |text: &str| self.tokenizer.encode(text, false);
        let whole = encode("\n\nRepeat the previous context exactly.")?;
        let rest = encode("\n\nRepeat the part of the previous context exactly, starting with")?;
        let end = encode(&self.end_of_message()?)?;
        let limit = self.model.config().context_length();
        let before = context.len() + rest.len().max(whole.len()) + LINK + end.len();
        let part = limit.saturating_sub(before).min(PART);
        if part < LEAST_PART.min(context.len()) {
            return Err(Error::ContextExceeded { asked: before + LEAST_PART, limit });
        }
        let repeat = |start: usize| {
            let keys = start..(start + part).min(context.len());
            let (ask, link) = match start {
                0 => (&whole, 0..0),
                _ => (&rest, start.saturating_sub(LINK)..start),
            };
            let input = [&ask[..], &context[link], &end, &context[keys.clone()]].concat();
            Repeat { keys, input }
        };
        Ok((0..context.len()).step_by(part.max(1)).map(repeat).collect())
    }

    /// What follows a user's message until the model's answer.
    fn end_of_message(&self) -> Result<String> {
        const MESSAGE: &str = "The message.";
        if self.prompt_style() == PromptStyle::Raw {
            return Ok("\n".to_string());
        }
        let text = self.template()?.render(&[Message::user(MESSAGE)], true)?;
        Ok(text.rsplit_once(MESSAGE).map_or("\n".to_string(), |(_, end)| end.to_string()))
    }
}
