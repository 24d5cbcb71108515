use std::collections::BTreeMap;

use moa_core::search::{Bound, Options as SolverOptions};
use moa_core::{
    CostBound, CostCurve, DEFAULT_SINK, FoundPlans, Influence, ModelShape, Plan, PlanRequest,
    Profile, ProfileInfo, Space,
};

use crate::checkpoint::Checkpoint;
use crate::decoder::model::Decoder;
use crate::device::{Backward, Math};
use crate::find_plan::calibrate::{CalibrationData, CalibrationOptions};
use crate::find_plan::objective::{Objective, TokenWeight, WeightedObjective};
use crate::find_plan::profile::Item;
use crate::find_plan::refine::{Refined, refine};
use crate::progress::{Progress, Stage};
use crate::{Error, Result};

/// Tokens per side of an influence block.
pub const DEFAULT_BLOCK: usize = 64;

/// The options of [`compress`]: what a plan may cost, and how it is profiled, searched, validated
/// and refined.
#[derive(Clone, Debug, PartialEq)]
pub struct CompressOptions {
    /// Largest mean density at every bound length.
    pub density: f64,
    /// Smallest mean density at every bound length.
    pub min_density: Option<f64>,
    /// Bounds on density in place of `density`, `min_density` and `bound_lengths`, such as those that
    /// bytes come to ([`Bound::kv_bytes`]); empty for those.
    pub bounds: Vec<Bound>,
    /// Largest attention time of a decode step at every bound length, as a share of dense attention's,
    /// by measurements on the backend.
    pub decode_time: Option<f64>,
    /// Smallest share of the context that any head keeps ([`PlanRequest::with_min_share`]); `None` for a
    /// quarter of the smallest density bound where the space is elastic, and nothing elsewhere.
    pub min_share: Option<f64>,
    /// Kind of plan.
    pub space: Space,
    /// Lengths at which influence is measured.
    pub lengths: Vec<usize>,
    /// Lengths at which the density is bounded; empty for the profile lengths, the validation length
    /// and twice the longest profile length.
    pub bound_lengths: Vec<usize>,
    /// The objective that influence is measured on.
    pub objective: Objective,
    /// How much each token of a response counts.
    pub token_weight: TokenWeight,
    /// Sink positions of every head; 0 is allowed.
    pub sink: usize,
    /// Smallest span of any head.
    pub min_span: usize,
    /// Calibration items per length.
    pub samples: usize,
    /// Most tokens of a calibration response.
    pub max_response: usize,
    /// Unseen length at which plans compete; `None` for 1.5 times the longest profile length, or the
    /// longest profile length itself where the model's context ends before that.
    pub validation_length: Option<usize>,
    /// Validation records or prompts.
    pub validation_samples: usize,
    /// Questions about each validation record ([`CalibrationOptions::questions`]).
    pub validation_questions: usize,
    /// Plans to measure in refinement; 0 for none.
    pub evaluations: usize,
    /// Limits and accuracy of the search.
    pub solver: SolverOptions,
    /// Seed of everything drawn.
    pub seed: u64,
}

impl Default for CompressOptions {
    fn default() -> Self {
        Self {
            density: 0.25,
            min_density: None,
            bounds: Vec::new(),
            decode_time: None,
            min_share: None,
            space: Space::default(),
            lengths: vec![1024, 2048],
            bound_lengths: Vec::new(),
            objective: Objective::Margin,
            token_weight: TokenWeight::default(),
            sink: DEFAULT_SINK,
            min_span: DEFAULT_SINK + 16,
            samples: 8,
            max_response: 48,
            validation_length: None,
            validation_samples: 4,
            validation_questions: 8,
            evaluations: 200,
            solver: SolverOptions::default(),
            seed: 0,
        }
    }
}

/// Everything that [`compress`] found.
#[derive(Debug)]
pub struct Compressed {
    /// The plan.
    pub plan: Plan,
    /// The measured influence that the plan was searched on.
    pub profile: Profile,
    /// The plans that the search found, by predicted loss.
    pub found: FoundPlans,
    /// The refinement by measured loss, which chose the plan.
    pub refined: Refined,
}

impl CompressOptions {
    /// Checks the options that do not depend on the model.
    ///
    /// # Errors
    /// [`Error::Invalid`] naming the option.
    pub fn validate(&self) -> Result<()> {
        if self.lengths.is_empty() {
            return Err(Error::invalid("lengths", "at least one", "none"));
        }
        if self.samples == 0 || self.validation_samples == 0 {
            return Err(Error::invalid("samples", "at least 1", 0));
        }
        self.request(1).map(|_| ())
    }

    /// Length at which plans compete, for a model of this context length.
    pub fn validation_length(&self, context_length: usize) -> usize {
        let longest = self.lengths.iter().copied().max().unwrap_or(1);
        self.validation_length.unwrap_or_else(|| match longest * 3 / 2 {
            unseen if unseen <= context_length => unseen,
            _ => longest,
        })
    }

    /// The search's request, for a model of this context length.
    ///
    /// # Errors
    /// [`Error::Core`] naming the option that is out of range.
    pub fn request(&self, context_length: usize) -> Result<PlanRequest> {
        let mut lengths = self.bound_lengths.clone();
        if lengths.is_empty() {
            let longest = self.lengths.iter().copied().max().unwrap_or(1);
            lengths.clone_from(&self.lengths);
            lengths.extend([self.validation_length(context_length), 2 * longest]);
        }
        lengths.sort_unstable();
        lengths.dedup();
        let bound = |&length| Bound { length, max: self.density, min: self.min_density };
        let bounds = match self.bounds.is_empty() {
            true => lengths.iter().map(bound).collect(),
            false => self.bounds.clone(),
        };
        let mut request = PlanRequest::bounded(bounds, self.sink, self.min_span)?;
        request.solver = self.solver.clone();
        Ok(with_min_share(request.with_space(self.space), self.min_share)?)
    }

    fn calibration(&self, lengths: Vec<usize>, samples: usize, seed: u64) -> CalibrationOptions {
        let max_response = self.max_response;
        CalibrationOptions { lengths, samples, questions: 1, max_response, seed }
    }

    /// Calibration items for profiling.
    pub fn profile_calibration(&self) -> CalibrationOptions {
        self.calibration(self.lengths.clone(), self.samples, self.seed)
    }

    /// Calibration items for measuring plans: other records than those profiled, at the shortest
    /// profile length (cheap, and where spans are smallest) and at the validation length.
    pub fn validation_calibration(&self, context_length: usize) -> CalibrationOptions {
        let mut lengths = vec![self.validation_length(context_length)];
        lengths.extend(self.lengths.iter().copied().min());
        lengths.dedup();
        let seed = self.seed ^ 0x5eed_0000_0000;
        CalibrationOptions {
            questions: self.validation_questions,
            ..self.calibration(lengths, self.validation_samples, seed)
        }
    }
}

impl<D: Backward> Decoder<D> {
    /// Influence of a set of calibration items at each length, and what the far context is worth to
    /// them ([`Influence::far_losses`]).
    ///
    /// # Errors
    /// [`Error::Cancelled`]; [`Error::Invalid`], [`Error::ContextExceeded`], [`Error::OutOfMemory`]
    /// or [`Error::Backend`] as [`Decoder::profile`] and [`Decoder::response_loss`].
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

/// Finds a plan for a checkpoint: profiles, searches, and decides by measured loss at a length that
/// was not profiled.
///
/// # Errors
/// [`Error::Invalid`], [`Error::Core`] and [`Error::ContextExceeded`] for an option that is out of
/// range or does not fit the model, [`Error::Core`] with
/// [`Infeasible`](moa_core::Error::Infeasible) if no plan meets the bounds, [`Error::Cancelled`],
/// and those of [`Checkpoint::calibrate`], [`Decoder::profile`] and [`bound_decode_time`].
pub fn compress<D: Backward>(
    checkpoint: &Checkpoint<D>,
    data: &CalibrationData,
    options: &CompressOptions,
    progress: &mut dyn Progress,
) -> Result<Compressed> {
    options.validate()?;
    let model = &checkpoint.model;
    let context = model.config().context_length();
    let mut request = options.request(context)?;
    if let Some(share) = options.decode_time {
        bound_decode_time(&mut request, &model.device, model.shape(), share)?;
    }
    let items = checkpoint.calibrate(data, &options.profile_calibration(), progress)?;
    let description = format!("{}, seed {}", describe(data), options.seed);
    let objective =
        WeightedObjective { objective: options.objective, weight: options.token_weight };
    let profile = model.profile_all(&items, objective, DEFAULT_BLOCK, &description, progress)?;
    progress.advance(Stage::Search, 0, 1)?;
    let found = request.search_profile(&profile, &request.objective_lengths(&profile))?;
    let validation = options.validation_calibration(context);
    let items = match (checkpoint.calibrate(data, &validation, progress), data) {
        // A user's file may hold nothing longer than the profile lengths.
        (Err(Error::NoCalibration { .. }), CalibrationData::Prompts(_)) => items,
        (made, _) => made?,
    };
    let evaluations = options.evaluations;
    let mut refined =
        refine(model, &items, &found.plans, &request, &profile, evaluations, progress)?;
    refined.plan.provenance.method = Some("moa compress".to_string());
    Ok(Compressed { plan: refined.plan.clone(), profile, found, refined })
}

/// Adds the smallest share of the context that any head keeps, or the one that is used by default: a
/// quarter of the smallest density bound for elastic plans, nothing for others.
///
/// # Errors
/// As [`PlanRequest::with_min_share`].
pub fn with_min_share(request: PlanRequest, share: Option<f64>) -> moa_core::Result<PlanRequest> {
    let least = request.bounds.iter().map(|b| b.max).fold(1.0, f64::min);
    let usual = if request.space == Space::Elastic { least / 4.0 } else { 0.0 };
    request.with_min_share(share.unwrap_or(usual))
}

/// Bounds the decode time of a search by measurements on the backend.
///
/// # Errors
/// [`Error::Invalid`] if the share is not above 0, [`Error::Core`] with
/// [`Unsupported`](moa_core::Error::Unsupported) if the backend does not measure.
pub fn bound_decode_time<D: Math>(
    request: &mut PlanRequest,
    device: &D,
    shape: ModelShape,
    share: f64,
) -> Result<()> {
    if !(share > 0.0 && share.is_finite()) {
        return Err(Error::invalid("decode time", "a share above 0", share));
    }
    let longest = request.bounds.iter().map(|b| b.length).max().unwrap_or(1);
    let shortest = request.min_span.min(longest);
    let curve = CostCurve::measure(device.attention(), shape, shortest, longest);
    request.decode_time = Some(CostBound { share, curve: curve.map_err(Into::into)? });
    Ok(())
}

/// A name for calibration data, as profiles keep it.
pub fn describe(data: &CalibrationData) -> String {
    match data {
        CalibrationData::Records => "built-in records".to_string(),
        CalibrationData::Prompts(prompts) => format!("{} prompts of a file", prompts.len()),
    }
}
