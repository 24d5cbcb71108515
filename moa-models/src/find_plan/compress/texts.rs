//! Running text that plans should leave the model's predictions of as they are.

use std::collections::BTreeMap;

use moa_core::{Plan, PlanRequest, Profile};

use super::{CompressOptions, uniform};
use crate::Result;
use crate::checkpoint::Checkpoint;
use crate::device::Math;
use crate::find_plan::calibrate::{CalibrationData, CalibrationOptions, Part};
use crate::find_plan::profile::Item;

impl CompressOptions {
    /// Running texts at the lengths of [`validation_calibration`](Self::validation_calibration), on which plans are
    /// refined; none where text is left out.
    ///
    /// # Errors
    /// As [`Checkpoint::text_items`].
    pub fn texts<D: Math>(
        &self,
        checkpoint: &Checkpoint<D>,
        data: &CalibrationData,
    ) -> Result<BTreeMap<usize, Vec<Item>>> {
        let validation = self.validation_calibration(checkpoint.model.config().context_length());
        texts_of(checkpoint, data, self, CalibrationOptions { part: Part::Profiled, ..validation })
    }

    /// Other running texts, at the profile lengths, which a plan is held to: the first half of each is read, the
    /// second is predicted. None where text is left out.
    ///
    /// # Errors
    /// As [`Checkpoint::text_items`].
    pub fn held_out_texts<D: Math>(
        &self,
        checkpoint: &Checkpoint<D>,
        data: &CalibrationData,
    ) -> Result<BTreeMap<usize, Vec<Item>>> {
        let profile = self.profile_calibration();
        let mut texts = texts_of(
            checkpoint,
            data,
            self,
            CalibrationOptions { part: Part::HeldOut, ..profile },
        )?;
        for text in texts.values_mut().flatten() {
            let (read, predicted) = text.tokens().split_at(text.tokens().len() / 2);
            *text = Item::new(read, predicted)?;
        }
        Ok(texts)
    }

    /// The plan that says what text may suffer: one rule for all heads, of the largest size that `request` allows.
    /// `None` where text is left out or has a weight, and for requests of other plans than elastic ones.
    ///
    /// # Errors
    /// As [`PlanRequest::allows`].
    pub fn text_limit(&self, request: &PlanRequest, profile: &Profile) -> Result<Option<Plan>> {
        match self.text_weight {
            None if self.text_samples > 0 => uniform(request, profile),
            _ => Ok(None),
        }
    }
}

/// Running texts at the lengths of a calibration, with about as many tokens at each.
fn texts_of<D: Math>(
    checkpoint: &Checkpoint<D>,
    data: &CalibrationData,
    options: &CompressOptions,
    calibration: CalibrationOptions,
) -> Result<BTreeMap<usize, Vec<Item>>> {
    let samples = options.text_samples;
    if samples == 0 || options.text_weight == Some(0.0) {
        return Ok(BTreeMap::new());
    }
    let mut texts = checkpoint.text_items(data, &CalibrationOptions { samples, ..calibration })?;
    let shortest = texts.keys().next().copied().unwrap_or(1);
    for (length, own) in &mut texts {
        own.truncate((samples * shortest).div_ceil(*length).max(1));
    }
    Ok(texts)
}
