use std::collections::BTreeMap;

use moa_core::{FarLosses, Plan};

use crate::checkpoint::Checkpoint;
use crate::decoder::logits::LogitRows;
use crate::device::Math;
use crate::engine::request::GenerateOptions;
use crate::engine::serve::EngineOptions;
use crate::find_plan::profile::Item;
use crate::find_plan::prompts::CalibrationPrompt;
use crate::find_plan::tasks::Task;
use crate::progress::Progress;
use crate::{Error, Result};

/// Where calibration prompts come from.
#[derive(Clone, Debug)]
pub enum CalibrationData {
    /// Built-in questions of graded difficulty: a pass key, facts, quotations and recollections in
    /// running text, and lines of long records. Those that the dense model answers are used.
    Tasks,
    /// Built-in records alone.
    Records,
    /// The user's items. Running text counts beside questions ([`Checkpoint::text_items`]); where there are no questions,
    /// windows of it are the items, whose last [`max_response`](CalibrationOptions::max_response) tokens are to be predicted.
    Prompts(Vec<CalibrationPrompt>),
}

/// The number and the lengths of calibration items, and the seed that they are drawn with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CalibrationOptions {
    /// Lengths in tokens, prompt and response together.
    pub lengths: Vec<usize>,
    /// Most items of the shortest length, and built-in contexts; half as many of longer ones, whose items cost
    /// more and say as much.
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
    pub(super) fn holds(self, index: usize) -> bool {
        match self {
            Self::All => true,
            Self::Profiled => index % 3 != 2,
            Self::HeldOut => index % 3 == 2,
        }
    }
}

impl CalibrationOptions {
    /// Items, or contexts of several, at a length.
    pub(super) fn samples_at(&self, length: usize) -> usize {
        let is_shortest = self.lengths.iter().all(|other| length <= *other);
        if is_shortest { self.samples } else { self.samples.div_ceil(2) }
    }

    /// Fewer items of a length than this are told: of the items that are asked for, and however few those are, of as
    /// many as show whether they differ by chance.
    pub(super) fn least_at(&self, length: usize) -> usize {
        self.samples_at(length).clamp(FarLosses::FEWEST, FEW)
    }

    /// Warns of lengths with few of the user's items.
    pub(super) fn tell_few(&self, items: &BTreeMap<usize, Vec<Item>>) {
        for (length, own) in
            items.iter().filter(|(length, own)| own.len() < self.least_at(**length))
        {
            tracing::warn!(
                "calibration items of about {length} tokens: {}, so few that what is measured on them may depend on chance",
                own.len()
            );
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
    /// `progress` hears of the beginning and of each context or prompt, of as many as are asked for.
    ///
    /// # Errors
    /// [`Error::ContextExceeded`] if a length is beyond the model's context; [`Error::Invalid`] if
    /// a length is too short for a response, or there are no lengths, samples or questions;
    /// [`Error::NoCalibration`] if no prompt or, where there is running text alone, no text fits a length, or the dense model answers nothing, with
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
                    format!(
                        "at least {shortest} tokens where a response may have {}",
                        options.max_response
                    ),
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
                let has_question =
                    prompts.iter().any(|of| matches!(of, CalibrationPrompt::Question { .. }));
                let items = match has_question {
                    true => self.prompt_items(prompts, options, progress)?,
                    false => self.window_items(prompts, options, progress)?,
                };
                Ok(Calibration { items, data: format!("{} items of a file", prompts.len()) })
            }
        }
    }

    /// The dense model's greedy answers to the prompts of each context, which begin alike. All are written together:
    /// a step of few sequences takes hardly longer than one of a single sequence.
    pub(super) fn dense_answers(
        &self,
        contexts: &[Vec<Vec<u32>>],
        max_response: usize,
    ) -> Result<Vec<Vec<Vec<u32>>>> {
        let plan = Plan::full(self.model.shape())?;
        let options = GenerateOptions { max_new_tokens: max_response, ..Default::default() };
        let mut engine = self.engine(EngineOptions::default());
        for prompts in contexts {
            let Some(first) = prompts.first() else { continue };
            let shared = prompts.iter().fold(first.len(), |shared, prompt| {
                let equal = first[..shared].iter().zip(prompt).take_while(|(a, b)| a == b).count();
                equal.min(prompt.len() - 1)
            });
            let longest = prompts.iter().map(Vec::len).max().unwrap_or(0);
            let mut sequence = self.model.open(&plan, longest + max_response, 0)?;
            if shared > 0 {
                self.model.forward(&mut [&mut sequence], &[&first[..shared]], LogitRows::None)?;
            }
            let mut batch = (1..prompts.len())
                .map(|_| self.model.fork(&sequence))
                .collect::<Result<Vec<_>>>()?;
            batch.push(sequence);
            for (sequence, prompt) in batch.into_iter().zip(prompts) {
                engine.resume(sequence, &prompt[shared..], options.clone());
            }
        }
        let mut answers = engine.complete_all()?.into_iter().map(|completion| completion.tokens);
        Ok(contexts.iter().map(|prompts| answers.by_ref().take(prompts.len()).collect()).collect())
    }
}

/// Fewer items of a length than this are told, if as many are asked for.
pub(super) const FEW: usize = 4;
