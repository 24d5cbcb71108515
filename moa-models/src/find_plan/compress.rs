use std::collections::BTreeMap;

use moa_core::search::{Bound, Options as SolverOptions};
use moa_core::{
    CostBound, CostCurve, DEFAULT_SINK, ElasticRule, FoundPlans, Influence, ModelShape, Plan,
    PlanRequest, Profile, ProfileInfo, Space,
};

use crate::checkpoint::Checkpoint;
use crate::decoder::model::Decoder;
use crate::device::{Backward, Math};
use crate::find_plan::calibrate::{Calibration, CalibrationData, CalibrationOptions, Part};
use crate::find_plan::exchange::fits;
use crate::find_plan::objective::{Objective, TokenWeight, WeightedObjective};
use crate::find_plan::profile::Item;
use crate::find_plan::refine::{Evidence, Refined, TextGoal, refine};
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
    /// Sink positions of every head, 0 is allowed; `None` for an eighth of the mean span at the shortest
    /// bound length, as a power of two from 4 to 64.
    pub sink: Option<usize>,
    /// Smallest span of any head; `None` for 16 more than the sink.
    pub min_span: Option<usize>,
    /// Calibration items per length.
    pub samples: usize,
    /// Most tokens of a calibration response.
    pub max_response: usize,
    /// Unseen length at which plans compete; `None` for twice the longest profile length, or 1.5 times it or
    /// the length itself where the model's context ends before that. A plan that is right at 1.5 times may
    /// stop growing there.
    pub validation_length: Option<usize>,
    /// Validation records or prompts.
    pub validation_samples: usize,
    /// Questions about each validation record ([`CalibrationOptions::questions`]).
    pub validation_questions: usize,
    /// Running texts at the shortest length, which plans should leave the model's predictions of as they
    /// are; as many tokens at longer lengths. 0 leaves text out.
    pub text_samples: usize,
    /// How much a nat of divergence on text counts, beside a nat of response loss; `None` for as much as
    /// keeps the divergence of the uniform plan of the same size ([`TextGoal`]).
    pub text_weight: Option<f64>,
    /// Plans to measure in refinement, on all or on some items; 0 for none, `None` for 100 and four for
    /// each KV head.
    pub evaluations: Option<usize>,
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
            sink: None,
            min_span: None,
            samples: 12,
            max_response: 48,
            validation_length: None,
            validation_samples: 4,
            validation_questions: 8,
            text_samples: 4,
            text_weight: None,
            evaluations: None,
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
    /// What is wrong with the calibration data or the plan, a sentence each.
    pub warnings: Vec<String>,
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
        if let Some(weight) = self.text_weight.filter(|w| !(*w >= 0.0 && w.is_finite())) {
            return Err(Error::invalid("text weight", "a number from 0 up", weight));
        }
        self.request(1).map(|_| ())
    }

    /// Length at which plans compete, for a model of this context length.
    pub fn validation_length(&self, context_length: usize) -> usize {
        let longest = self.lengths.iter().copied().max().unwrap_or(1);
        let unseen = [2 * longest, longest * 3 / 2];
        let unseen = unseen.into_iter().find(|length| *length <= context_length);
        self.validation_length.or(unseen).unwrap_or(longest)
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
        let sink = self.sink.unwrap_or_else(|| usual_sink(&bounds));
        let min_span = self.min_span.unwrap_or(sink + 16);
        let mut request = PlanRequest::bounded(bounds, sink, min_span)?;
        request.solver = self.solver.clone();
        Ok(with_min_share(request.with_space(self.space), self.min_share)?)
    }

    /// Calibration items for profiling.
    pub fn profile_calibration(&self) -> CalibrationOptions {
        CalibrationOptions {
            lengths: self.lengths.clone(),
            samples: self.samples,
            questions: 1,
            max_response: self.max_response,
            part: Part::Profiled,
            seed: self.seed,
        }
    }

    /// Calibration items for measuring plans: other records than those profiled, at the shortest
    /// profile length (cheap, and where spans are smallest) and at the validation length.
    pub fn validation_calibration(&self, context_length: usize) -> CalibrationOptions {
        let mut lengths = vec![self.validation_length(context_length)];
        lengths.extend(self.lengths.iter().copied().min());
        lengths.dedup();
        let seed = self.seed ^ 0x5eed_0000_0000;
        CalibrationOptions {
            lengths,
            samples: self.validation_samples,
            questions: self.validation_questions,
            max_response: self.max_response,
            part: Part::HeldOut,
            seed,
        }
    }

    /// Plans to measure in refinement, for a model of this shape.
    pub fn evaluations(&self, shape: ModelShape) -> usize {
        self.evaluations.unwrap_or(100 + 4 * shape.total_kv_heads())
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
    // What cannot be met is said before the work of profiling.
    options.request(model.config().context_length())?;
    let calibration = options.profile_calibration();
    let Calibration { items, data: name } = checkpoint.calibrate(data, &calibration, progress)?;
    let description = format!("{name}, seed {}", options.seed);
    let objective =
        WeightedObjective { objective: options.objective, weight: options.token_weight };
    let profile = model.profile_all(&items, objective, DEFAULT_BLOCK, &description, progress)?;
    compress_profile(checkpoint, data, profile, options, progress)
}

/// [`compress`] of a model that was profiled before; the options' lengths are those of the profile.
///
/// # Errors
/// As [`compress`]; [`Error::Core`] with [`ShapeMismatch`](moa_core::Error::ShapeMismatch) or
/// [`FingerprintMismatch`](moa_core::Error::FingerprintMismatch) if the profile is of another model.
pub fn compress_profile<D: Math>(
    checkpoint: &Checkpoint<D>,
    data: &CalibrationData,
    profile: Profile,
    options: &CompressOptions,
    progress: &mut dyn Progress,
) -> Result<Compressed> {
    let options = &CompressOptions { lengths: profile.lengths(), ..options.clone() };
    options.validate()?;
    let model = &checkpoint.model;
    if profile.shape != model.shape() {
        let (expected, got) = (model.shape(), profile.shape);
        return Err(moa_core::Error::ShapeMismatch { what: "profile", expected, got }.into());
    }
    if let Some(got) = profile.info.fingerprint.as_deref().filter(|f| *f != model.fingerprint()) {
        let (expected, got) = (model.fingerprint().to_string(), got.to_string());
        return Err(moa_core::Error::FingerprintMismatch { what: "profile", expected, got }.into());
    }
    let context = model.config().context_length();
    let mut request = options.request(context)?;
    if let Some(share) = options.decode_time {
        bound_decode_time(&mut request, &model.device, model.shape(), share)?;
    }
    progress.advance(Stage::Search, 0, 1)?;
    let found = request.search_profile(&profile, &request.objective_lengths(&profile))?;
    let uniform = uniform(&request, &profile)?;
    let starts: Vec<Plan> = found.plans.iter().chain(&uniform).cloned().collect();
    let validation = options.validation_calibration(context);
    let mut warnings = profile_warnings(&profile)?;
    let items = match (checkpoint.calibrate(data, &validation, progress), data) {
        // A user's file may hold nothing else, or nothing longer than the profile lengths.
        (Err(Error::NoCalibration { length, reason }), CalibrationData::Prompts(_)) => {
            warnings.push(format!(
                "no item is left to judge plans by at {length} tokens ({reason}): plans were judged \
                 by what they were made from"
            ));
            checkpoint.calibrate(data, &options.profile_calibration(), progress)?
        }
        (made, _) => made?,
    };
    let items = items.items;
    let texts = texts_of(checkpoint, data, options, &validation)?;
    let text_goal = match (options.text_weight, &uniform) {
        (None, Some(plan)) if !texts.is_empty() => TextGoal::NoWorseThan(plan),
        (weight, _) => TextGoal::Weight(weight.unwrap_or(1.0)),
    };
    let evidence = Evidence { items: &items, texts: &texts, text_goal };
    let evaluations = options.evaluations(model.shape());
    let mut refined = refine(model, evidence, &starts, &request, &profile, evaluations, progress)?;
    refined.plan.provenance.method = Some("moa compress".to_string());
    let plan = refined.plan.clone();
    warnings.extend(warnings_of(&refined, &request));
    Ok(Compressed { plan, profile, found, refined, warnings })
}

/// A response loss this far above the dense model's, in nats per token, changes answers.
const WORSE: f64 = 0.1;

/// What is wrong with a plan that was found.
fn warnings_of(refined: &Refined, request: &PlanRequest) -> Vec<String> {
    let mut warnings = Vec::new();
    let growth = refined.loss - refined.dense_loss;
    if growth > WORSE {
        warnings.push(format!(
            "the plan's responses lose {growth:.3} nats per token against the dense model's: expect \
             wrong answers. A larger density, more calibration items or more evaluations may help"
        ));
    }
    let Some(bound) = request.bounds.iter().min_by_key(|bound| bound.length) else {
        return warnings;
    };
    let half = bound.length / 2;
    let density = refined.plan.density(half.max(1));
    if density > bound.max + 1e-3 {
        warnings.push(format!(
            "below {} tokens, the shortest length with a bound, rules keep the spans that they have there: \
             the density at {half} tokens is {density:.3}",
            bound.length
        ));
    }
    warnings
}

/// What is wrong with the data of a profile, a sentence for each length.
///
/// # Errors
/// None: every length is one of the profile's.
pub fn profile_warnings(profile: &Profile) -> Result<Vec<String>> {
    let mut warnings = Vec::new();
    for length in profile.lengths() {
        let far = profile.at(length)?.far_losses();
        if far.is_noise() {
            warnings.push(format!(
                "the calibration data ({}) has no long dependency at {length} tokens: without the far \
                 context its loss grows by {:.3} +- {:.3} nats per token in {} samples. A plan from it \
                 may keep the wrong heads; use prompts whose answers lie far back, or `--data tasks`",
                profile.info.data,
                far.mean(),
                far.standard_error(),
                far.samples(),
            ));
        }
    }
    Ok(warnings)
}

/// Running texts at the lengths of a calibration, with about as many tokens at each.
fn texts_of<D: Math>(
    checkpoint: &Checkpoint<D>,
    data: &CalibrationData,
    options: &CompressOptions,
    calibration: &CalibrationOptions,
) -> Result<BTreeMap<usize, Vec<Item>>> {
    let samples = options.text_samples;
    if samples == 0 || options.text_weight == Some(0.0) {
        return Ok(BTreeMap::new());
    }
    let mut texts =
        checkpoint.text_items(data, &CalibrationOptions { samples, ..calibration.clone() })?;
    let shortest = texts.keys().next().copied().unwrap_or(1);
    for (length, own) in &mut texts {
        own.truncate((samples * shortest).div_ceil(*length).max(1));
    }
    Ok(texts)
}

/// One rule for all heads, of the largest size within the bounds.
fn uniform(request: &PlanRequest, profile: &Profile) -> Result<Option<Plan>> {
    let density = request.bounds.iter().map(|bound| bound.max).fold(1.0, f64::min);
    if request.space != Space::Elastic || request.decode_time.is_some() {
        return Ok(None);
    }
    let rules = vec![ElasticRule::new(0.0, density)?.into(); profile.shape.total_kv_heads()];
    let plan = Plan::new(profile.shape, request.sink, request.min_span, rules)?;
    let plan = plan.with_fingerprint(profile.info.fingerprint.clone());
    Ok(fits(request, &plan).then_some(plan))
}

/// Every head pays for the sink, also where a small budget is better spent on the heads that see far.
fn usual_sink(bounds: &[Bound]) -> usize {
    let span = |bound: &Bound| (bound.max * bound.length as f64) as usize;
    let budget = bounds.iter().map(span).min().unwrap_or(0);
    let sink = (budget / 8).clamp(4, DEFAULT_SINK);
    1 << sink.ilog2()
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
