//! The influence of many calibration items.

use std::collections::BTreeMap;

use moa_core::{Influence, Profile, ProfileInfo};

use crate::Result;
use crate::decoder::model::Decoder;
use crate::device::Backward;
use crate::find_plan::objective::WeightedObjective;
use crate::find_plan::profile::Item;
use crate::progress::{Progress, Stage};

/// Tokens per side of an influence block.
pub const DEFAULT_BLOCK: usize = 64;

impl<D: Backward> Decoder<D> {
    /// Influence of a set of calibration items at each length, and what the far context is worth to
    /// them ([`Influence::far_losses`]).
    ///
    /// # Errors
    /// [`Error::Cancelled`](crate::Error::Cancelled); [`Error::Invalid`](crate::Error::Invalid),
    /// [`Error::ContextExceeded`](crate::Error::ContextExceeded), [`Error::OutOfMemory`](crate::Error::OutOfMemory)
    /// or [`Error::Backend`](crate::Error::Backend) as [`Decoder::profile`] and [`Decoder::response_loss`].
    pub fn profile_all(
        &self,
        items: &BTreeMap<usize, Vec<Item>>,
        objective: impl Into<WeightedObjective>,
        block: usize,
        data: &str,
        progress: &mut dyn Progress,
    ) -> Result<Profile> {
        let objective = objective.into();
        let info = ProfileInfo {
            fingerprint: Some(self.fingerprint().to_string()),
            objective: objective.name(),
            data: data.to_string(),
        };
        let mut profile = Profile::new(self.shape(), info);
        let (mut done, total) = (0, items.values().map(Vec::len).sum());
        progress.advance(Stage::Profile, done, total)?;
        for (&length, items) in items {
            let mut influence = Influence::new(self.shape(), length, block)?;
            for item in items {
                self.profile_with_far_loss(item, objective, &mut influence)?;
                done += 1;
                progress.advance(Stage::Profile, done, total)?;
            }
            profile.add(influence)?;
        }
        Ok(profile)
    }
}
