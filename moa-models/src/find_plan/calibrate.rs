use std::collections::BTreeMap;
use std::path::Path;

use moa_core::{Plan, SplitMix64};
use serde::Deserialize;

use crate::checkpoint::Checkpoint;
use crate::checkpoint::template::Message;
use crate::checkpoint::text::read_text;
use crate::decoder::logits::LogitRows;
use crate::device::Math;
use crate::engine::request::GenerateOptions;
use crate::engine::serve::EngineOptions;
use crate::eval::jsonl;
use crate::find_plan::profile::Item;
use crate::find_plan::tasks::{Task, TaskPrompt};
use crate::find_plan::text::excerpt;
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
    /// Reads a text file (`.txt` or `.md`) as one running text, and any other as JSONL, one item a line.
    ///
    /// # Errors
    /// [`Error::Io`], or [`Error::Line`] with the line that is not an item.
    pub fn load(path: impl AsRef<Path>) -> Result<Vec<Self>> {
        let path = path.as_ref();
        if path.extension().is_some_and(|e| e == "txt" || e == "md") {
            let text = read_text(path)?;
            return Ok(vec![Self::Text(text)]);
        }
        jsonl::load(path)
    }
}

/// Where calibration prompts come from.
#[derive(Clone, Debug)]
pub enum CalibrationData {
    /// Built-in questions of graded difficulty: a pass key, facts, quotations and recollections in
    /// running text, and lines of long records. Those that the dense model answers are used.
    Tasks,
    /// Built-in records alone.
    Records,
    /// The user's items.
    Prompts(Vec<CalibrationPrompt>),
}

/// The number and the lengths of calibration items, and the seed that they are drawn with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CalibrationOptions {
    /// Lengths in tokens, prompt and response together.
    pub lengths: Vec<usize>,
    /// Most items per length.
    pub samples: usize,
    /// Questions about each built-in context, at even depths, where its task has several; items that
    /// share a context lie next to each other and cost little more than one
    /// ([`Decoder::response_loss`](crate::Decoder::response_loss)).
    pub questions: usize,
    /// Most tokens of a response.
    pub max_response: usize,
    /// Which of the user's items may be used.
    pub part: Part,
    /// Seed of the built-in tasks.
    pub seed: u64,
}

/// Calibration items by length, and where they come from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Calibration {
    /// Items at each length.
    pub items: BTreeMap<usize, Vec<Item>>,
    /// The data in words, with the built-in tasks that the dense model answers.
    pub data: String,
}

/// A part of the user's calibration items, so that plans are not judged by what they were made from.
/// Built-in tasks are drawn anew for each use and have no parts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Part {
    /// All items.
    #[default]
    All,
    /// All but those of [`HeldOut`](Self::HeldOut).
    Profiled,
    /// Every third item.
    HeldOut,
}

impl Part {
    fn holds(self, index: usize) -> bool {
        match self {
            Self::All => true,
            Self::Profiled => index % 3 != 2,
            Self::HeldOut => index % 3 == 2,
        }
    }
}

impl Default for CalibrationOptions {
    fn default() -> Self {
        Self {
            lengths: vec![1024, 2048],
            samples: 8,
            questions: 1,
            max_response: 48,
            part: Part::All,
            seed: 0,
        }
    }
}

impl<D: Math> Checkpoint<D> {
    /// Makes calibration items for each length. Responses that the data does not give are the
    /// greedy answers of the dense model itself (MoA, section 4.3). Of the built-in tasks, those
    /// are used that the dense model answers, and of their questions only those that it answers
    /// right: a wrong answer shows no dependency.
    ///
    /// `progress` hears of each context or prompt, of as many as are asked for.
    ///
    /// # Errors
    /// [`Error::ContextExceeded`] if a length is beyond the model's context; [`Error::Invalid`] if
    /// a length is too short for a response, or there are no lengths, samples or questions;
    /// [`Error::NoCalibration`] if no prompt fits a length, or the dense model answers nothing, with
    /// what was tried; [`Error::Cancelled`]; those of [`Checkpoint::prompt_tokens`] and of
    /// [`Decoder::forward`](crate::Decoder::forward).
    pub fn calibrate(
        &self,
        data: &CalibrationData,
        options: &CalibrationOptions,
        progress: &mut dyn Progress,
    ) -> Result<Calibration> {
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
            CalibrationData::Tasks => self.task_items(&Task::OF_TEXT, options, progress),
            CalibrationData::Records => self.task_items(&[], options, progress),
            CalibrationData::Prompts(prompts) => {
                let items = self.prompt_items(prompts, options, progress)?;
                Ok(Calibration { items, data: format!("{} items of a file", prompts.len()) })
            }
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

    /// Items of the records and of `others`, in turn, as far as the dense model answers them.
    fn task_items(
        &self,
        others: &[Task],
        options: &CalibrationOptions,
        progress: &mut dyn Progress,
    ) -> Result<Calibration> {
        let (tasks, tried) = self.answered_tasks(others, options)?;
        let (mut done, total) = (0, options.lengths.len() * options.samples);
        let mut items = BTreeMap::new();
        for &length in &options.lengths {
            let (mut own, mut contexts) = (Vec::new(), 0);
            // What is answered when short may be too hard at this length.
            let mut misses = vec![0; tasks.len()];
            // A model that answers a quarter of its calibration prompts still fills the set.
            for attempt in 0..4 * options.samples {
                let place = attempt % tasks.len().max(1);
                if contexts == options.samples || tasks.is_empty() {
                    break;
                }
                if misses[place] >= 4 && misses.iter().any(|m| *m < 4) {
                    continue;
                }
                let seed = options
                    .seed
                    .wrapping_mul(0x1_0000)
                    .wrapping_add(attempt as u64 ^ (length as u64) << 32);
                let items = self.answered_items(tasks[place], length, seed, options)?;
                if items.is_empty() {
                    misses[place] += 1;
                } else {
                    own.extend(items);
                    contexts += 1;
                    done += 1;
                    progress.advance(Stage::Calibrate, done, total)?;
                }
            }
            if own.is_empty() {
                let reason =
                    format!("the dense model answered none of the built-in tasks ({tried})");
                return Err(Error::NoCalibration { length, reason });
            }
            if own.len() < FEW.min(options.samples) {
                tracing::warn!(
                    length,
                    items = own.len(),
                    "the dense model answers few of the built-in tasks ({tried}); the plan may depend on chance"
                );
            }
            items.insert(length, own);
        }
        let names: Vec<_> = tasks.iter().map(|task| task.name()).collect();
        Ok(Calibration { items, data: format!("built-in tasks ({})", names.join(", ")) })
    }

    /// The tasks that the dense model answers when they are short, and what it answered of each that was
    /// tried. Of the records it is the phrasing that is answered best.
    fn answered_tasks(
        &self,
        others: &[Task],
        options: &CalibrationOptions,
    ) -> Result<(Vec<Task>, String)> {
        let length = options.lengths.iter().copied().min().unwrap_or(1024).min(1024);
        let options = CalibrationOptions { questions: 1, ..options.clone() };
        let mut tried = Vec::new();
        let mut right_of = |task: Task| -> Result<usize> {
            let mut right = 0;
            for probe in 0..PROBES {
                let seed = options.seed.wrapping_add(0xca11_b000 + probe as u64);
                right += self.answered_items(task, length, seed, &options)?.len();
                if probe == 1 && right == 0 {
                    break;
                }
            }
            tracing::debug!(?task, right, "calibration task");
            tried.push(format!("{} {right} of {PROBES}", task.name()));
            Ok(right)
        };
        let mut answered: Vec<(usize, Task)> = Vec::new();
        for task in Task::records() {
            let right = right_of(task)?;
            if right > answered.first().map_or(0, |best| best.0) {
                answered = vec![(right, task)];
            }
            if right == PROBES {
                break;
            }
        }
        for &task in others {
            let right = right_of(task)?;
            if right > 0 {
                answered.push((right, task));
            }
        }
        // A task that is answered once by chance wastes attempts, if there are others.
        let most = answered.iter().map(|(right, _)| *right).max().unwrap_or(0);
        answered.retain(|(right, _)| 2 * right >= most);
        let tasks: Vec<Task> = answered.into_iter().map(|(_, task)| task).collect();
        Ok((tasks, tried.join(", ")))
    }

    /// A task's context of about `length` tokens with the dense model's answers, those that are right.
    fn answered_items(
        &self,
        task: Task,
        length: usize,
        seed: u64,
        options: &CalibrationOptions,
    ) -> Result<Vec<Item>> {
        let (tasks, prompts) = self.fill(length - options.max_response, |bytes| {
            task.prompts(bytes, seed, options.questions)
        })?;
        let responses = self.dense_answers(&prompts, options.max_response)?;
        let mut items = Vec::with_capacity(prompts.len());
        for ((prompt, task), response) in prompts.iter().zip(tasks).zip(responses) {
            if !task.is_answered_by(&self.tokenizer.decode(&response, true)?) {
                continue;
            }
            // What is said behind the answer depends on nothing far away.
            let mut end = 1;
            while end < response.len()
                && !task.is_answered_by(&self.tokenizer.decode(&response[..end], true)?)
            {
                end += 1;
            }
            items.push(Item::new(prompt, &response[..end])?);
        }
        Ok(items)
    }

    /// The largest prompts that `build` makes of a number of bytes, all of at most `room` tokens.
    fn fill(
        &self,
        room: usize,
        build: impl Fn(usize) -> Vec<TaskPrompt>,
    ) -> Result<(Vec<TaskPrompt>, Vec<Vec<u32>>)> {
        let made = |bytes: usize| -> Result<_> {
            let tasks = build(bytes);
            let tokens: Result<Vec<_>> =
                tasks.iter().map(|task| self.question_tokens(&task.messages)).collect();
            let tokens = tokens?;
            let most = tokens.iter().map(Vec::len).max().unwrap_or(0);
            Ok((tasks, tokens, most))
        };
        let mut bytes = 4 * room;
        let mut best = None;
        // Tokens grow nearly as bytes do: a few steps of the rule of three come close.
        for _ in 0..6 {
            let (tasks, tokens, most) = made(bytes)?;
            let fits = most <= room;
            if fits {
                best = Some((tasks, tokens));
                if most + room / 32 >= room {
                    break;
                }
            }
            let next = bytes * room / most.max(1);
            // What does not fit yields a little more than the rule of three says.
            bytes = if fits { next.saturating_sub(room / 64) } else { next * 63 / 64 };
        }
        let least = || made(1).map(|(tasks, tokens, _)| (tasks, tokens));
        best.map_or_else(least, Ok)
    }

    /// Tokens of a built-in question.
    fn question_tokens(&self, messages: &[Message]) -> Result<Vec<u32>> {
        let mut messages = messages.to_vec();
        if let Some(last) = messages.last_mut() {
            last.content = self.question_text(std::mem::take(&mut last.content));
        }
        self.prompt_tokens(&messages)
    }

    /// Running text of each length, without questions, whose predictions plans are to leave as they are
    /// ([`refine`](crate::refine)). The text is the user's, where the data has some, or built in.
    ///
    /// # Errors
    /// [`Error::ContextExceeded`] if a length is beyond the model's context, [`Error::Invalid`] if it
    /// is below 2 tokens, [`Error::Tokenizer`].
    pub fn text_items(
        &self,
        data: &CalibrationData,
        options: &CalibrationOptions,
    ) -> Result<BTreeMap<usize, Vec<Item>>> {
        let own = match data {
            CalibrationData::Prompts(prompts) => self.own_texts(prompts, options.part)?,
            CalibrationData::Tasks | CalibrationData::Records => Vec::new(),
        };
        let limit = self.model.config().context_length();
        let mut rng = SplitMix64::new(options.seed ^ 0x7e87_0000);
        let mut items = BTreeMap::new();
        for &length in &options.lengths {
            if length > limit {
                return Err(Error::ContextExceeded { asked: length, limit });
            }
            if length < 2 {
                return Err(Error::invalid("length", "at least 2 tokens", length));
            }
            let pieces: Vec<&[u32]> = own.iter().flat_map(|t| t.chunks_exact(length)).collect();
            let mut own = Vec::with_capacity(options.samples);
            for sample in 0..options.samples {
                // Of a long text, pieces from all over it.
                let own_piece = pieces.get(sample * pieces.len() / options.samples.max(1));
                let tokens = match own_piece {
                    Some(piece) => piece.to_vec(),
                    None => self.built_in_text(&mut rng, length)?,
                };
                let (prompt, response) = tokens.split_at(length - 1);
                own.push(Item::new(prompt, response)?);
            }
            items.insert(length, own);
        }
        Ok(items)
    }

    fn own_texts(&self, prompts: &[CalibrationPrompt], part: Part) -> Result<Vec<Vec<u32>>> {
        let texts = prompts.iter().filter_map(|prompt| match prompt {
            CalibrationPrompt::Text(text) => Some(text),
            CalibrationPrompt::Question { .. } => None,
        });
        let tokens: Result<Vec<_>> = texts.map(|text| self.tokenizer.encode(text, true)).collect();
        let mut tokens = tokens?;
        // One long text is parted at its middle, several are told apart by their place.
        if let [text] = &mut tokens[..] {
            let middle = text.len() / 2;
            match part {
                Part::All => {}
                Part::Profiled => text.truncate(middle),
                Part::HeldOut => drop(text.drain(..middle)),
            }
            return Ok(tokens);
        }
        let own = tokens.into_iter().enumerate().filter(|(index, _)| part.holds(*index));
        Ok(own.map(|(_, tokens)| tokens).collect())
    }

    fn built_in_text(&self, rng: &mut SplitMix64, length: usize) -> Result<Vec<u32>> {
        let (mut bytes, seed) = (6 * length, rng.below(1 << 31) as u64);
        loop {
            let text = excerpt(&mut SplitMix64::new(seed), bytes);
            let mut tokens = self.tokenizer.encode(&text, true)?;
            if tokens.len() >= length {
                tokens.truncate(length);
                return Ok(tokens);
            }
            bytes *= 2;
        }
    }

    /// A prompt with its answer; the dense model's where there is none, of what the longest length holds of
    /// the prompt. `None` where the answer is empty.
    fn sized(
        &self,
        messages: &[Message],
        answer: Option<&str>,
        options: &CalibrationOptions,
        found: &mut FromPrompts,
    ) -> Result<Option<Sized>> {
        let mut tokens = self.prompt_tokens(messages)?;
        let response = match answer {
            Some(answer) => self.tokenizer.encode(&format!(" {}", answer.trim()), false)?,
            None => {
                found.longest = found.longest.max(tokens.len() + options.max_response);
                let most = options.lengths.iter().copied().max().unwrap_or(0);
                cut_middle(&mut tokens, most.saturating_sub(options.max_response).max(1));
                let prompt = std::slice::from_ref(&tokens);
                self.dense_answers(prompt, options.max_response)?.swap_remove(0)
            }
        };
        found.longest = found.longest.max(tokens.len() + response.len());
        if response.is_empty() {
            found.without_answer += 1;
            return Ok(None);
        }
        Ok(Some(Sized { tokens, response }))
    }

    fn prompt_items(
        &self,
        prompts: &[CalibrationPrompt],
        options: &CalibrationOptions,
        progress: &mut dyn Progress,
    ) -> Result<BTreeMap<usize, Vec<Item>>> {
        let mut lengths = options.lengths.clone();
        lengths.sort_unstable();
        lengths.dedup();
        let most = lengths.last().copied().unwrap_or(0);
        let mut items: BTreeMap<usize, Vec<Item>> =
            lengths.iter().map(|l| (*l, Vec::new())).collect();
        let wanted = lengths.len() * options.samples;
        let mut found = FromPrompts::default();
        let questions: Vec<_> = prompts
            .iter()
            .enumerate()
            .filter(|(index, _)| options.part.holds(*index))
            .filter_map(|(_, prompt)| match prompt {
                CalibrationPrompt::Question { messages, answer } => Some((messages, answer)),
                CalibrationPrompt::Text(_) => None,
            })
            .collect();
        for (messages, answer) in &questions {
            if found.made == wanted {
                break;
            }
            let Some(prompt) = self.sized(messages, answer.as_deref(), options, &mut found)? else {
                continue;
            };
            // An item stands for the length that holds it, if it fills half of that; longer ones are cut.
            let total = prompt.total();
            let length = lengths.iter().copied().find(|l| *l >= total).unwrap_or(most);
            if 2 * total >= length && items[&length].len() < options.samples {
                found.put(prompt, length, &mut items)?;
                progress.advance(Stage::Calibrate, found.made, wanted)?;
            }
        }
        // Where all are longer, the beginnings and ends of longer ones.
        for &length in &lengths {
            for (messages, answer) in &questions {
                if !items[&length].is_empty() && items[&length].len() >= FEW.min(options.samples) {
                    break;
                }
                let prompt = self.sized(messages, answer.as_deref(), options, &mut found)?;
                if let Some(prompt) = prompt.filter(|prompt| prompt.total() > length) {
                    found.put(prompt, length, &mut items)?;
                }
            }
        }
        let FromPrompts { longest, cut, without_answer, .. } = found;
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
        for (length, own) in &items {
            if !own.is_empty() && own.len() < FEW.min(options.samples) {
                tracing::warn!(
                    "only {} calibration items have about {length} tokens; the plan may depend on chance",
                    own.len()
                );
            }
        }
        Ok(items)
    }
}

/// What became of prompts.
#[derive(Default)]
struct FromPrompts {
    made: usize,
    longest: usize,
    cut: usize,
    without_answer: usize,
}

/// A prompt with its answer.
struct Sized {
    tokens: Vec<u32>,
    response: Vec<u32>,
}

impl Sized {
    fn total(&self) -> usize {
        self.tokens.len() + self.response.len()
    }
}

impl FromPrompts {
    /// Puts an item to those of a length, cut where it is longer.
    fn put(
        &mut self,
        prompt: Sized,
        length: usize,
        items: &mut BTreeMap<usize, Vec<Item>>,
    ) -> Result<()> {
        let Sized { mut tokens, response } = prompt;
        if response.len() + 2 > length {
            return Ok(());
        }
        if tokens.len() + response.len() > length {
            cut_middle(&mut tokens, length - response.len());
            self.cut += 1;
        }
        items.entry(length).or_default().push(Item::new(&tokens, &response)?);
        self.made += 1;
        Ok(())
    }
}

/// Fewer items of a length than this are told.
const FEW: usize = 4;

/// Short questions of each built-in task.
const PROBES: usize = 4;

/// Shortens a prompt to `room` tokens by taking tokens out of its middle, as LongBench does: the
/// beginning holds the instruction, the end the question.
fn cut_middle(tokens: &mut Vec<u32>, room: usize) {
    if tokens.len() > room {
        let head = room / 2;
        let tail = tokens.len() - (room - head);
        tokens.drain(head..tail);
    }
}
