//! Running text for calibration, the user's or built in.

use std::collections::BTreeMap;

use moa_core::SplitMix64;

use crate::checkpoint::Checkpoint;
use crate::device::Math;
use crate::find_plan::calibrate::{CalibrationData, CalibrationOptions, Part};
use crate::find_plan::profile::Item;
use crate::find_plan::prompts::CalibrationPrompt;
use crate::find_plan::text::excerpt_of;
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
            let pieces: Vec<&[u32]> = own.iter().flat_map(|t| t.chunks_exact(length)).collect();
            // No piece twice: the first few are what many plans are measured on.
            let samples = match pieces.len() {
                0 => options.samples,
                most => options.samples.min(most),
            };
            let mut own = Vec::with_capacity(samples);
            for sample in 0..samples {
                // Of a long text, pieces from all over it.
                let own_piece = pieces.get(sample * pieces.len() / samples);
                let tokens = match own_piece {
                    Some(piece) => piece.to_vec(),
                    None => self.built_in_text(&mut rng, length, options.part)?,
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
