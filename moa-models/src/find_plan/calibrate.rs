use std::collections::BTreeMap;
use std::path::Path;

use moa_core::Plan;
use serde::Deserialize;

use crate::checkpoint::Checkpoint;
use crate::checkpoint::template::Message;
use crate::decoder::logits::LogitRows;
use crate::device::Math;
use crate::engine::request::GenerateOptions;
use crate::engine::serve::EngineOptions;
use crate::eval::jsonl;
use crate::find_plan::profile::Item;
use crate::find_plan::records::{PHRASINGS, Phrasing, last_integer};
use crate::progress::{Progress, Stage};
use crate::{Error, Result};

/// A calibration prompt of the user's.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct CalibrationPrompt {
    /// The user's message; becomes tokens as [`Checkpoint::prompt_style`](crate::Checkpoint::prompt_style)
    /// says.
    pub prompt: String,
    /// The response; where it is missing the dense model writes it.
    #[serde(default)]
    pub answer: Option<String>,
}

impl CalibrationPrompt {
    /// Reads prompts, one JSON object a line.
    ///
    /// # Errors
    /// [`Error::Io`], or [`Error::Line`] with the line that is not a prompt.
    pub fn load(path: impl AsRef<Path>) -> Result<Vec<Self>> {
        jsonl::load(path.as_ref())
    }
}

/// Where calibration prompts come from.
#[derive(Clone, Debug)]
pub enum CalibrationData {
    /// Built-in records of each length.
    Records,
    /// These prompts, each used at the largest length it fills.
    Prompts(Vec<CalibrationPrompt>),
}

/// The number and the lengths of calibration items, and the seed that they are drawn with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CalibrationOptions {
    /// Lengths in tokens, prompt and response together.
    pub lengths: Vec<usize>,
    /// Most items per length.
    pub samples: usize,
    /// Questions about each built-in record, at even depths; items that share a record lie next to
    /// each other and cost little more than one ([`Decoder::response_loss`](crate::Decoder::response_loss)).
    pub questions: usize,
    /// Most tokens of a response.
    pub max_response: usize,
    /// Seed of the built-in records.
    pub seed: u64,
}

impl Default for CalibrationOptions {
    fn default() -> Self {
        Self { lengths: vec![1024, 2048], samples: 8, questions: 1, max_response: 48, seed: 0 }
    }
}

impl<D: Math> Checkpoint<D> {
    /// Makes calibration items for each length. Responses that the data does not give are the
    /// greedy answers of the dense model itself (MoA, section 4.3). Of the built-in
    /// records, only those count that the dense model answers right: a wrong answer shows no
    /// dependency.
    ///
    /// `progress` hears of each record or prompt, of as many as are asked for.
    ///
    /// # Errors
    /// [`Error::ContextExceeded`] if a length is beyond the model's context; [`Error::Invalid`] if
    /// a length is too short for a response, or there are no lengths, samples or questions;
    /// [`Error::NoCalibration`] if no prompt fills a length, or the dense model answers no built-in
    /// record; [`Error::Cancelled`]; those of [`Checkpoint::prompt_tokens`] and of
    /// [`Decoder::forward`](crate::Decoder::forward).
    pub fn calibrate(
        &self,
        data: &CalibrationData,
        options: &CalibrationOptions,
        progress: &mut dyn Progress,
    ) -> Result<BTreeMap<usize, Vec<Item>>> {
        let limit = self.model.config().context_length();
        let shortest = 2 * options.max_response + 64;
        for &length in &options.lengths {
            if length > limit {
                return Err(Error::ContextExceeded { asked: length, limit });
            }
            if length < shortest {
                return Err(Error::invalid(
                    "length",
                    format!("at least {shortest} tokens"),
                    length,
                ));
            }
        }
        if options.lengths.is_empty() || options.samples == 0 || options.questions == 0 {
            return Err(Error::invalid("lengths, samples and questions", "at least one", 0));
        }
        match data {
            CalibrationData::Records => self.record_items(options, progress),
            CalibrationData::Prompts(prompts) => self.prompt_items(prompts, options, progress),
        }
    }

    /// The dense model's greedy answers to prompts that begin alike.
    fn dense_answers(&self, prompts: &[Vec<u32>], max_response: usize) -> Result<Vec<Vec<u32>>> {
        let Some(first) = prompts.first() else { return Ok(Vec::new()) };
        let shared = prompts.iter().fold(first.len(), |shared, prompt| {
            let equal = first[..shared].iter().zip(prompt).take_while(|(a, b)| a == b).count();
            equal.min(prompt.len() - 1)
        });
        let longest = prompts.iter().map(Vec::len).max().unwrap_or(0);
        let plan = Plan::full(self.model.shape())?;
        let mut sequence = self.model.open(&plan, longest + max_response, 0)?;
        if shared > 0 {
            self.model.forward(&mut [&mut sequence], &[&first[..shared]], LogitRows::None)?;
        }
        let mut batch =
            (1..prompts.len()).map(|_| self.model.fork(&sequence)).collect::<Result<Vec<_>>>()?;
        batch.push(sequence);
        let options = GenerateOptions { max_new_tokens: max_response, ..Default::default() };
        let mut engine = self.engine(EngineOptions::default());
        for (sequence, prompt) in batch.into_iter().zip(prompts) {
            engine.resume(sequence, &prompt[shared..], options.clone());
        }
        Ok(engine.complete_all()?.into_iter().map(|completion| completion.tokens).collect())
    }

    fn record_items(
        &self,
        options: &CalibrationOptions,
        progress: &mut dyn Progress,
    ) -> Result<BTreeMap<usize, Vec<Item>>> {
        let phrasing = self.best_phrasing(options)?;
        let (mut done, total) = (0, options.lengths.len() * options.samples);
        let mut items = BTreeMap::new();
        for &length in &options.lengths {
            let (mut own, mut records) = (Vec::new(), 0);
            // A model that answers a quarter of its calibration prompts still fills the set.
            for attempt in 0..4 * options.samples as u64 {
                if records == options.samples {
                    break;
                }
                let seed = options
                    .seed
                    .wrapping_mul(0x1_0000)
                    .wrapping_add(attempt ^ (length as u64) << 32);
                let items = self.record_questions(phrasing, length, seed, options)?;
                if !items.is_empty() {
                    own.extend(items);
                    records += 1;
                    done += 1;
                    progress.advance(Stage::Calibrate, done, total)?;
                }
            }
            if own.is_empty() {
                return Err(Error::NoCalibration {
                    length,
                    reason: "the dense model answered none of the built-in records".into(),
                });
            }
            items.insert(length, own);
        }
        Ok(items)
    }

    /// The phrasing whose short records the dense model answers best.
    fn best_phrasing(&self, options: &CalibrationOptions) -> Result<&'static Phrasing> {
        let length = options.lengths.iter().copied().min().unwrap_or(1024).min(1024);
        let options = CalibrationOptions { questions: 1, ..options.clone() };
        let mut best = (0, &PHRASINGS[0]);
        for phrasing in PHRASINGS {
            let mut right = 0;
            for probe in 0..4 {
                let seed = options.seed.wrapping_add(0xca11_b000 + probe);
                right += self.record_questions(phrasing, length, seed, &options)?.len();
            }
            tracing::debug!(?phrasing, right, "calibration phrasing");
            if right > best.0 {
                best = (right, phrasing);
            }
            if right == 4 {
                break;
            }
        }
        Ok(best.1)
    }

    /// A record of about `length` tokens with the dense model's answers, those that are right.
    fn record_questions(
        &self,
        phrasing: &Phrasing,
        length: usize,
        seed: u64,
        options: &CalibrationOptions,
    ) -> Result<Vec<Item>> {
        let room = length - options.max_response;
        let tokens = |lines: usize| {
            let records = match options.questions {
                1 => vec![phrasing.prompt(lines, seed)],
                several => phrasing.prompts(lines, seed, several),
            };
            let answers: Vec<u32> = records.iter().map(|r| r.answer).collect();
            let prompts: Result<Vec<_>> = records
                .into_iter()
                .map(|r| self.prompt_tokens(&[Message::user(self.question_text(r.text))]))
                .collect();
            Ok::<_, Error>((prompts?, answers))
        };
        let longest = |prompts: &[Vec<u32>]| prompts.iter().map(Vec::len).max().unwrap_or(0);
        let (few, many) = (longest(&tokens(8)?.0), longest(&tokens(40)?.0));
        let per_line = (many - few).max(32) as f64 / 32.0;
        let mut lines = ((room as f64 - few as f64) / per_line) as usize + 8;
        let (prompts, answers) = loop {
            let (prompts, answers) = tokens(lines)?;
            let most = longest(&prompts);
            if most <= room || lines == 1 {
                break (prompts, answers);
            }
            lines -= (((most - room) as f64 / per_line).ceil() as usize).clamp(1, lines - 1);
        };
        let responses = self.dense_answers(&prompts, options.max_response)?;
        let mut items = Vec::with_capacity(prompts.len());
        for ((prompt, answer), response) in prompts.iter().zip(answers).zip(responses) {
            if last_integer(&self.tokenizer.decode(&response, true)?) == Some(i64::from(answer)) {
                items.push(Item::new(prompt, &response)?);
            }
        }
        Ok(items)
    }

    fn prompt_items(
        &self,
        prompts: &[CalibrationPrompt],
        options: &CalibrationOptions,
        progress: &mut dyn Progress,
    ) -> Result<BTreeMap<usize, Vec<Item>>> {
        let mut lengths = options.lengths.clone();
        lengths.sort_unstable();
        let mut items: BTreeMap<usize, Vec<Item>> =
            lengths.iter().map(|l| (*l, Vec::new())).collect();
        let (mut done, wanted) = (0, lengths.len() * options.samples);
        let (mut longest, mut without_answer) = (0, 0);
        for prompt in prompts {
            let mut tokens = self.prompt_tokens(&[Message::user(&prompt.prompt)])?;
            let given = prompt
                .answer
                .as_deref()
                .map(|a| self.tokenizer.encode(&format!(" {}", a.trim()), false))
                .transpose()?;
            let response_room = given.as_ref().map_or(options.max_response, Vec::len);
            let total = tokens.len() + response_room;
            longest = longest.max(total);
            let Some(&length) = lengths.iter().rfind(|l| **l <= total) else { continue };
            if items[&length].len() == options.samples || response_room + 2 > length {
                continue;
            }
            cut_middle(&mut tokens, length - response_room);
            let response = match given {
                Some(tokens) => tokens,
                None => self
                    .dense_answers(std::slice::from_ref(&tokens), options.max_response)?
                    .swap_remove(0),
            };
            if response.is_empty() {
                without_answer += 1;
                continue;
            }
            items.entry(length).or_default().push(Item::new(&tokens, &response)?);
            done += 1;
            progress.advance(Stage::Calibrate, done, wanted)?;
        }
        match items.iter().find(|(_, own)| own.is_empty()) {
            Some((&length, _)) => Err(Error::NoCalibration {
                length,
                reason: match without_answer {
                    _ if longest < length => format!(
                        "no prompt with its answer fills it (the longest has {longest} tokens)"
                    ),
                    0 => format!(
                        "no prompt with its answer has so many tokens and fewer than the next longer \
                         length, which takes what fills it (the longest has {longest} tokens)"
                    ),
                    count => format!(
                        "{count} prompts have no answer: the dense model ended it at its first token"
                    ),
                },
            }),
            None => Ok(items),
        }
    }
}

/// Shortens a prompt to `room` tokens by taking tokens out of its middle, as LongBench does: the
/// beginning holds the instruction, the end the question.
fn cut_middle(tokens: &mut Vec<u32>, room: usize) {
    if tokens.len() > room {
        let head = room / 2;
        let tail = tokens.len() - (room - head);
        tokens.drain(head..tail);
    }
}
