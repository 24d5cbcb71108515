//! What a plan may cost, and how it is found.

use std::time::{Duration, Instant};

use moa_core::search::{Bound, Options as SolverOptions};
use moa_core::{DEFAULT_SINK, ModelShape, PlanRequest, Space};

use super::bounds::with_min_share;
use crate::find_plan::calibrate::{CalibrationOptions, Part};
use crate::find_plan::objective::{Objective, TokenWeight};
use crate::find_plan::precision::CacheTypes;
use crate::find_plan::refine::Refined;
use crate::{Error, Result};

/// How many times as many contexts and texts a further round of refinement has as the one before.
pub(super) const MORE: usize = 3;

/// Nats a token that a plan's responses lose at least for a further round: less is noise on so few contexts.
const LOST: f64 = 0.02;

/// The options of [`compress`](crate::compress()): what a plan may cost, and how it is profiled, searched, validated
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
    /// In which types heads hold keys and values.
    pub cache_types: CacheTypes,
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
    /// Sink positions of every head, 0 is allowed; `None` for 64 where that is at most a quarter of the mean
    /// span at the shortest bound length, and below for an eighth of that span, as a power of two from 4 up.
    pub sink: Option<usize>,
    /// Smallest span of any head; `None` for 16 more than the sink.
    pub min_span: Option<usize>,
    /// Calibration items of the shortest length, half as many of longer ones.
    pub samples: usize,
    /// Most tokens of a calibration response.
    pub max_response: usize,
    /// Unseen length at which plans compete; `None` for twice the longest profile length, or 1.5 times it or
    /// the length itself where the model's context ends before that. A plan that is right at 1.5 times may
    /// stop growing there.
    pub validation_length: Option<usize>,
    /// Contexts that plans compete on ([`CalibrationOptions::samples`]).
    pub validation_samples: usize,
    /// Questions about each validation record ([`CalibrationOptions::questions`]).
    pub validation_questions: usize,
    /// Running texts at the shortest length, which plans should leave the model's predictions of as they
    /// are; as many tokens at longer lengths. 0 leaves text out.
    pub text_samples: usize,
    /// How much a nat of divergence on text counts, beside a nat of response loss; `None` for as much as
    /// keeps the divergence of the uniform plan of the same size ([`TextGoal`](crate::TextGoal)).
    pub text_weight: Option<f64>,
    /// Most plans to measure in refinement, on all or on some items, beside those that it starts from; 0 for
    /// none, `None` for 100 and six for each KV head. Up to half as many again where held-out text suffers more than
    /// it may, and all of that twice where heads choose their types.
    pub evaluations: Option<usize>,
    /// Wall time of everything from the beginning of the call; `None` for no limit. By the pace of the first plans as
    /// many are measured as there is expected to be time for: a fast machine may find a better plan than a slow one.
    /// Where the time is over all the same, what is being measured is measured to its end, and nothing after it.
    ///
    /// Where `evaluations` is `None` and time is left, a plan whose responses lose more than .02 nats a token is refined
    /// further, on three times as many other contexts and texts with as many plans again as there is time for, and so on,
    /// until a round finds no other plan.
    pub time_limit: Option<Duration>,
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
            cache_types: CacheTypes::default(),
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
            validation_samples: 8,
            validation_questions: 8,
            text_samples: 4,
            text_weight: None,
            evaluations: None,
            time_limit: None,
            solver: SolverOptions::default(),
            seed: 0,
        }
    }
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

    /// Whether a further round of refinement is worth its time and has enough of it. A measurement takes [`MORE`] times as
    /// long there as in the last round, which took `seconds`: a share of the plans is enough.
    pub(super) fn has_time_for_more(
        &self,
        refined: &Refined,
        seconds: f64,
        deadline: Option<Instant>,
    ) -> bool {
        let Some(deadline) = deadline else { return false };
        let left = deadline.saturating_duration_since(Instant::now()).as_secs_f64();
        self.evaluations.is_none()
            // Types of heads are chosen for the spans that they have.
            && self.cache_types != CacheTypes::PerHead
            && refined.loss - refined.dense_loss > LOST
            && left >= seconds
    }

    /// The options of a further round: more contexts and texts, and others.
    pub(super) fn with_more(&self) -> Self {
        Self {
            validation_samples: MORE * self.validation_samples,
            text_samples: MORE * self.text_samples,
            seed: self.seed.wrapping_add(0x3057_0000_0000_0001),
            ..self.clone()
        }
    }

    /// Plans to measure in refinement, for a model of this shape.
    pub fn evaluations(&self, shape: ModelShape) -> usize {
        self.evaluations.unwrap_or(100 + 6 * shape.total_kv_heads())
    }
}

/// Every head pays for the sink, also where a small budget is better spent on the heads that see far.
fn usual_sink(bounds: &[Bound]) -> usize {
    let span = |bound: &Bound| (bound.max * bound.length as f64) as usize;
    let budget = bounds.iter().map(span).min().unwrap_or(0);
    if budget >= 4 * DEFAULT_SINK {
        return DEFAULT_SINK;
    }
    1 << (budget / 8).max(4).ilog2()
}

#[cfg(test)]
mod tests {
    use moa_core::Plan;

    use super::*;

    #[test]
    fn a_further_round_needs_a_loss_and_time_for_a_third_of_the_plans() {
        let shape = ModelShape { layers: 1, query_heads: 1, kv_heads: 1, head_dim: 8 };
        let refined = |growth: f64| Refined {
            plan: Plan::full(shape).unwrap(),
            loss: 0.25 + growth,
            divergence: None,
            start_loss: 1.0,
            start_divergence: None,
            dense_loss: 0.25,
            held_out: Vec::new(),
            evaluations: 100,
            fitting: None,
            seconds: 90.0,
        };
        let in_minutes = |minutes: u64| Instant::now() + Duration::from_secs(60 * minutes);
        let options = CompressOptions::default();
        let has_time = |options: &CompressOptions, growth, seconds, deadline| {
            options.has_time_for_more(&refined(growth), seconds, deadline)
        };
        assert!(has_time(&options, 0.03, 60.0, Some(in_minutes(4))));
        assert!(has_time(&options, 0.03, 60.0, Some(in_minutes(2))), "two thirds of the plans");
        assert!(!has_time(&options, 0.03, 60.0, Some(Instant::now())), "less than a third of them");
        assert!(!has_time(&options, 0.01, 60.0, Some(in_minutes(4))), "nothing is lost");
        assert!(!has_time(&options, 0.03, 60.0, None), "nobody said for how long");
        let asked = CompressOptions { evaluations: Some(9), ..options.clone() };
        assert!(!has_time(&asked, 0.03, 60.0, Some(in_minutes(4))));
        let typed = CompressOptions { cache_types: CacheTypes::PerHead, ..options };
        assert!(!has_time(&typed, 0.03, 60.0, Some(in_minutes(4))));
    }

    #[test]
    fn further_rounds_have_items_of_their_own() {
        let first = CompressOptions::default();
        let (second, third) = (first.with_more(), first.with_more().with_more());
        assert_eq!((second.validation_samples, third.validation_samples), (24, 72));
        assert!(first.seed != second.seed && first.seed != third.seed && second.seed != third.seed);
    }
}
