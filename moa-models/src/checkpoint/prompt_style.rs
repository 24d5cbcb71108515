use crate::Result;
use crate::checkpoint::Checkpoint;
use crate::checkpoint::template::{ChatTemplate, Message};
use crate::device::Math;

/// How a text becomes the tokens of a prompt.
///
/// A checkpoint is opened with [`Chat`](Self::Chat) where its folder has a chat template, and with
/// [`Raw`](Self::Raw) where it has none, as those of base models.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum PromptStyle {
    /// Messages go through the chat template.
    #[default]
    Chat,
    /// The model continues the text as it is, after the begin token.
    Raw,
}

impl PromptStyle {
    /// That of a model with this chat template, or without one.
    pub(crate) fn of(template: Option<&ChatTemplate>) -> Self {
        if template.is_some() { Self::Chat } else { Self::Raw }
    }
}

impl<D: Math> Checkpoint<D> {
    /// How texts become prompts in conversations, calibration and evaluations.
    pub fn prompt_style(&self) -> PromptStyle {
        self.style
    }

    /// Chooses how texts become prompts.
    pub fn set_prompt_style(&mut self, style: PromptStyle) {
        self.style = style;
    }

    /// Tokens of a conversation that the model is to answer or, in [`PromptStyle::Raw`], of its
    /// messages as a plain text with a line end between two of them.
    ///
    /// # Errors
    /// As [`chat_tokens`](Self::chat_tokens) in [`PromptStyle::Chat`];
    /// [`Error::Tokenizer`](crate::Error::Tokenizer) if the tokenizer refuses the text.
    pub fn prompt_tokens(&self, messages: &[Message]) -> Result<Vec<u32>> {
        match self.style {
            PromptStyle::Chat => self.chat_tokens(messages),
            PromptStyle::Raw => {
                let texts: Vec<&str> = messages.iter().map(|m| m.content.as_str()).collect();
                self.tokenizer.encode(&texts.join("\n"), true)
            }
        }
    }

    /// A question of the product's own wording. A model that continues texts is led to the answer,
    /// where a chat template would do it.
    pub(crate) fn question_text(&self, question: String) -> String {
        match self.style {
            PromptStyle::Chat => question,
            PromptStyle::Raw => question + "\nAnswer:",
        }
    }
}
