//! What is wrong with what plans were found on, or with what was found.

use moa_core::{PlanRequest, Profile};

use crate::Result;
use crate::find_plan::precision;
use crate::find_plan::refine::Refined;

/// A response loss this far above the dense model's, in nats per token, changes answers.
const WORSE: f64 = 0.1;

/// What is wrong with a plan that was found.
pub(super) fn warnings_of(refined: &Refined, request: &PlanRequest) -> Result<Vec<String>> {
    let mut warnings = Vec::new();
    let growth = refined.loss - refined.dense_loss;
    if growth > WORSE {
        warnings.push(format!(
            "the plan's responses lose {growth:.3} nats per token against the dense model's: expect \
             wrong answers. A larger density, more calibration items or more evaluations may help"
        ));
    }
    if let Some(of) = refined.held_out.filter(|of| of.excess() > 1.0) {
        warnings.push(format!(
            "on held-out text the plan's predictions diverge by {:.3} nats and their perplexity grows by {:.1} %, \
             more than under one window of the same size for all heads ({:.3} and {:.1} %)",
            of.divergence,
            100.0 * of.growth.exp_m1(),
            of.limit_divergence,
            100.0 * of.limit_growth.exp_m1(),
        ));
    }
    let Some(bound) = request.bounds.iter().min_by_key(|bound| bound.length) else {
        return Ok(warnings);
    };
    let half = bound.length / 2;
    let density = match refined.plan.cache_types() {
        [first, others @ ..] if others.iter().any(|other| other != first) => {
            precision::density(request, &refined.plan, half.max(1))?
        }
        _ => request.density_of(&refined.plan, half.max(1))?,
    };
    if density > bound.max + 1e-3 {
        warnings.push(format!(
            "below {} tokens, the shortest length with a bound, rules keep the spans that they have there: \
             the density at {half} tokens is {density:.3}",
            bound.length
        ));
    }
    Ok(warnings)
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
