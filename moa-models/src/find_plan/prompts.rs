//! Calibration items of the user's.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::path::Path;

use serde::Deserialize;

use crate::checkpoint::Checkpoint;
use crate::checkpoint::template::Message;
use crate::checkpoint::text::read_text;
use crate::device::Math;
use crate::eval::jsonl;
use crate::find_plan::calibrate::{CalibrationOptions, FEW};
use crate::find_plan::profile::Item;
use crate::progress::{Progress, Stage};
use crate::{Error, Result};

/// A calibration item of the user's: `{"prompt": .., "answer": ..}`, `{"messages": [..]}` or
/// `{"text": ..}`, a line each.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(try_from = "Fields")]
pub enum CalibrationPrompt {
    /// A conversation that the model is to answer.
    Question {
        /// The conversation, which ends with the user's turn.
        messages: Vec<Message>,
        /// The answer; where it is missing the dense model writes it.
        answer: Option<String>,
    },
    /// Running text, whose next tokens a plan should predict as the dense model does.
    Text(String),
}

/// Fields of a line, whatever its kind.
#[derive(Deserialize)]
struct Fields {
    prompt: Option<String>,
    messages: Option<Vec<Message>>,
    answer: Option<String>,
    text: Option<String>,
}

impl TryFrom<Fields> for CalibrationPrompt {
    type Error = &'static str;

    fn try_from(fields: Fields) -> std::result::Result<Self, Self::Error> {
        match fields {
            Fields { prompt: Some(prompt), messages: None, answer, text: None } => {
                Ok(Self::Question { messages: vec![Message::user(prompt)], answer })
            }
            Fields { prompt: None, messages: Some(mut messages), mut answer, text: None } => {
                if answer.is_none() && messages.last().is_some_and(|m| m.role == "assistant") {
                    answer = messages.pop().map(|message| message.content);
                }
                match messages.is_empty() {
                    true => Err("`messages` needs a turn that is to be answered"),
                    false => Ok(Self::Question { messages, answer }),
                }
            }
            Fields { prompt: None, messages: None, answer: None, text: Some(text) } => {
                Ok(Self::Text(text))
            }
            _ => Err("expected either `prompt` and perhaps `answer`, or `messages`, or `text`"),
        }
    }
}

impl CalibrationPrompt {
    /// Reads a text file (`.txt`, `.text` or `.md`, in any case) as one running text, and any other as JSONL, one item
    /// a line.
    ///
    /// # Errors
    /// [`Error::Io`], or [`Error::Line`] with the line that is not an item, or the first where the file is empty.
    pub fn load(path: impl AsRef<Path>) -> Result<Vec<Self>> {
        let path = path.as_ref();
        let is_text =
            |e: &OsStr| ["txt", "text", "md"].iter().any(|own| e.eq_ignore_ascii_case(own));
        if path.extension().is_some_and(is_text) {
            let text = read_text(path)?;
            if text.trim().is_empty() {
                return Err(jsonl::empty(path, "a text"));
            }
            return Ok(vec![Self::Text(text)]);
        }
        jsonl::load(path)
    }
}

/// A question in tokens.
struct Sized {
    prompt: Vec<u32>,
    /// `None` if the dense model is to write it.
    answer: Option<Vec<u32>>,
    /// Tokens of both, at most.
    total: usize,
}

/// What becomes of prompts.
struct Chosen<'a> {
    options: &'a CalibrationOptions,
    items: BTreeMap<usize, Vec<Item>>,
    made: usize,
    cut: usize,
    without_answer: usize,
}

impl<D: Math> Checkpoint<D> {
    /// Items of prompts with about as many tokens as the lengths. The dense model is asked for the answers
    /// that are missing of the prompts that are taken, and of no other.
    pub(super) fn prompt_items(
        &self,
        prompts: &[CalibrationPrompt],
        options: &CalibrationOptions,
        progress: &mut dyn Progress,
    ) -> Result<BTreeMap<usize, Vec<Item>>> {
        let mut lengths = options.lengths.clone();
        lengths.sort_unstable();
        lengths.dedup();
        let most = lengths.last().copied().unwrap_or(0);
        let wanted = lengths.iter().map(|length| options.samples_at(*length)).sum();
        progress.advance(Stage::Calibrate, 0, wanted)?;
        let items = lengths.iter().map(|length| (*length, Vec::new())).collect();
        let mut chosen = Chosen { options, items, made: 0, cut: 0, without_answer: 0 };
        let mut longer: Vec<(Sized, usize)> = Vec::new();
        let mut longest = 0;
        for (_, prompt) in
            prompts.iter().enumerate().filter(|(index, _)| options.part.holds(*index))
        {
            let CalibrationPrompt::Question { messages, answer } = prompt else { continue };
            if chosen.made == wanted {
                break;
            }
            let sized = self.sized(messages, answer.as_deref(), options)?;
            longest = longest.max(sized.total);
            // An item stands for the length that holds it, if it fills half of that; longer ones are cut.
            let length = lengths.iter().copied().find(|l| *l >= sized.total).unwrap_or(most);
            if 2 * sized.total >= length && chosen.has_room(length) {
                self.take(&sized, length, &mut chosen)?;
                progress.advance(Stage::Calibrate, chosen.made, wanted)?;
            }
            longer.push((sized, length));
        }
        // Where all are longer, the beginnings and ends of longer ones.
        for &length in &lengths {
            for (sized, own) in &longer {
                if chosen.items[&length].len() >= FEW.min(options.samples_at(length)) {
                    break;
                }
                if *own > length {
                    self.take(sized, length, &mut chosen)?;
                }
            }
        }
        chosen.finish(longest)
    }

    fn sized(
        &self,
        messages: &[Message],
        answer: Option<&str>,
        options: &CalibrationOptions,
    ) -> Result<Sized> {
        let prompt = self.prompt_tokens(messages)?;
        let encode = |answer: &str| self.tokenizer.encode(&format!(" {}", answer.trim()), false);
        let answer = answer.map(encode).transpose()?;
        let total = prompt.len() + answer.as_ref().map_or(options.max_response, Vec::len);
        Ok(Sized { prompt, answer, total })
    }

    /// Makes an item of a length, cut where it is longer; none where the answer is empty.
    fn take(&self, sized: &Sized, length: usize, chosen: &mut Chosen<'_>) -> Result<()> {
        let most = chosen.options.max_response;
        let answer_len = sized.answer.as_ref().map_or(most, Vec::len);
        if sized.answer.as_ref().is_some_and(Vec::is_empty) {
            chosen.without_answer += 1;
            return Ok(());
        }
        if answer_len + 2 > length {
            return Ok(());
        }
        let mut prompt = sized.prompt.clone();
        let is_cut = cut_middle(&mut prompt, length - answer_len);
        let answer = match &sized.answer {
            Some(answer) => answer.clone(),
            None => {
                self.dense_answers(&[vec![prompt.clone()]], most)?.swap_remove(0).swap_remove(0)
            }
        };
        if answer.is_empty() {
            chosen.without_answer += 1;
            return Ok(());
        }
        chosen.cut += usize::from(is_cut);
        chosen.made += 1;
        chosen.items.entry(length).or_default().push(Item::new(&prompt, &answer)?);
        Ok(())
    }
}

impl Chosen<'_> {
    fn has_room(&self, length: usize) -> bool {
        self.items.get(&length).is_none_or(|own| own.len() < self.options.samples_at(length))
    }

    /// The items, if there are some of each length; `longest` prompt with its answer.
    fn finish(self, longest: usize) -> Result<BTreeMap<usize, Vec<Item>>> {
        let Self { options, items, cut, without_answer, .. } = self;
        if let Some((&length, _)) = items.iter().find(|(_, own)| own.is_empty()) {
            return Err(Error::NoCalibration {
                length,
                reason: match without_answer {
                    0 => format!(
                        "no prompt with its answer has from half as many to as many tokens (the \
                         longest has {longest})"
                    ),
                    count => format!(
                        "{count} prompts have no answer: the dense model ended it at its first token"
                    ),
                },
            });
        }
        if cut > 0 {
            tracing::warn!(
                "{cut} calibration prompts are longer than their lengths and were cut in their middle, \
                 where the answer may have stood; profile at longer lengths, or give shorter prompts"
            );
        }
        options.tell_few(&items);
        Ok(items)
    }
}

/// Shortens a prompt to `room` tokens by taking tokens out of its middle, as LongBench does: the
/// beginning holds the instruction, the end the question. Whether there was something to take out.
fn cut_middle(tokens: &mut Vec<u32>, room: usize) -> bool {
    let is_longer = tokens.len() > room;
    if is_longer {
        let head = room / 2;
        let tail = tokens.len() - (room - head);
        tokens.drain(head..tail);
    }
    is_longer
}
