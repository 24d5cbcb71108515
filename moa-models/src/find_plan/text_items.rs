//! Running text for calibration, the user's or built in.

use std::collections::BTreeMap;

use moa_core::SplitMix64;

use crate::checkpoint::Checkpoint;
use crate::device::Math;
use crate::find_plan::calibrate::{CalibrationData, CalibrationOptions, Part};
use crate::find_plan::profile::Item;
use crate::find_plan::prompts::CalibrationPrompt;
use crate::find_plan::text::excerpt_of;
use crate::progress::{Progress, Stage};
use crate::{Error, Result};

impl<D: Math> Checkpoint<D> {
    /// Running text of each length, without questions, whose predictions plans are to leave as they are
    /// ([`refine`](crate::refine)). The text is the user's, where the data has some, in as many pieces as there are
    /// of a length at most, or built in.
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
            let pieces = pieces(&own, length, options.samples);
            let built_in = match pieces.is_empty() {
                true => (0..options.samples)
                    .map(|_| self.built_in_text(&mut rng, length, options.part))
                    .collect::<Result<Vec<_>>>()?,
                false => Vec::new(),
            };
            let all = pieces.into_iter().chain(built_in.iter().map(Vec::as_slice));
            items.insert(length, all.map(|piece| item(piece, 1)).collect::<Result<_>>()?);
        }
        Ok(items)
    }

    /// Items of the user's running text, where there is nothing else: windows of each length, whose last tokens, as
    /// many as a response has at most, are to be predicted from those before.
    pub(super) fn window_items(
        &self,
        prompts: &[CalibrationPrompt],
        options: &CalibrationOptions,
        progress: &mut dyn Progress,
    ) -> Result<BTreeMap<usize, Vec<Item>>> {
        let wanted = options.lengths.iter().map(|length| options.samples_at(*length)).sum();
        progress.advance(Stage::Calibrate, 0, wanted)?;
        let own = self.own_texts(prompts, options.part)?;
        let longest = own.iter().map(Vec::len).max().unwrap_or(0);
        let mut items = BTreeMap::new();
        for &length in &options.lengths {
            let pieces = pieces(&own, length, options.samples_at(length));
            if pieces.is_empty() {
                let reason = format!(
                    "there are no questions, and no running text that may be used here has so many tokens (the \
                     longest has {longest})"
                );
                return Err(Error::NoCalibration { length, reason });
            }
            let own = pieces.into_iter().map(|piece| item(piece, options.max_response));
            items.insert(length, own.collect::<Result<_>>()?);
        }
        progress.advance(Stage::Calibrate, wanted, wanted)?;
        options.tell_few(&items);
        Ok(items)
    }

    fn own_texts(&self, prompts: &[CalibrationPrompt], part: Part) -> Result<Vec<Vec<u32>>> {
        let texts = prompts.iter().filter_map(|prompt| match prompt {
            CalibrationPrompt::Text(text) => Some(text),
            CalibrationPrompt::Question { .. } => None,
        });
        let tokens: Result<Vec<_>> = texts.map(|text| self.tokenizer.encode(text, true)).collect();
        let mut tokens = tokens?;
        // One or two texts are parted at their middle, more are told apart by their place.
        if tokens.len() < 3 {
            for text in &mut tokens {
                let middle = text.len() / 2;
                match part {
                    Part::All => {}
                    Part::Profiled => text.truncate(middle),
                    Part::HeldOut => drop(text.drain(..middle)),
                }
            }
            return Ok(tokens);
        }
        let own = tokens.into_iter().enumerate().filter(|(index, _)| part.holds(*index));
        Ok(own.map(|(_, tokens)| tokens).collect())
    }

    fn built_in_text(&self, rng: &mut SplitMix64, length: usize, part: Part) -> Result<Vec<u32>> {
        let (mut bytes, seed) = (6 * length, rng.below(1 << 31) as u64);
        loop {
            let text = excerpt_of(&mut SplitMix64::new(seed), bytes, part);
            let mut tokens = self.tokenizer.encode(&text, true)?;
            if tokens.len() >= length {
                tokens.truncate(length);
                return Ok(tokens);
            }
            bytes *= 2;
        }
    }
}

/// Pieces of a length, each once, from all over the texts: the first few are what many plans are measured on.
fn pieces(texts: &[Vec<u32>], length: usize, most: usize) -> Vec<&[u32]> {
    let all: Vec<&[u32]> = texts.iter().flat_map(|text| text.chunks_exact(length)).collect();
    let samples = most.min(all.len());
    (0..samples).map(|sample| all[sample * all.len() / samples]).collect()
}

/// A text whose last tokens are predicted.
fn item(tokens: &[u32], predicted: usize) -> Result<Item> {
    let (prompt, response) = tokens.split_at(tokens.len().saturating_sub(predicted));
    Item::new(prompt, response)
}
