//! What is wrong with what plans were found on, or with what was found.

use moa_core::{CacheType, PlanRequest, Profile};

use crate::Result;
use crate::find_plan::precision;
use crate::find_plan::refine::Refined;

/// A response loss this far above the dense model's, in nats per token, changes answers.
const WORSE: f64 = 0.1;

/// What is wrong with a plan that was found, on a device whose caches are of type `device` where a plan says none.
pub(super) fn warnings_of(
    refined: &Refined,
    request: &PlanRequest,
    device: Option<CacheType>,
) -> Result<Vec<String>> {
    let mut warnings = Vec::new();
    let growth = refined.loss - refined.dense_loss;
    if growth > WORSE {
        let mut warning = format!(
            "the plan's responses lose {growth:.3} nats per token against the dense model's: expect \
             wrong answers. A larger density, more calibration items or more evaluations may help"
        );
        let has_16_bits = matches!(device, Some(CacheType::F16 | CacheType::Bf16));
        if has_16_bits && refined.plan.cache_types().is_empty() {
            let share = request.bounds.iter().map(|bound| bound.max).fold(1.0, f64::min);
            warning += &format!(
                "; as many bytes hold nearly twice the keys in int8 (--kv-bytes {:.1}% without --cache-dtype)",
                100.0 * share
            );
        }
        warnings.push(warning);
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

#[cfg(test)]
mod tests {
    use moa_core::{ElasticRule, ModelShape, Plan};

    use super::*;
    use crate::find_plan::precision::typed;

    // Half of the keys in 8 bits lose less than a quarter of them in 16.
    #[test]
    fn plans_that_lose_answers_are_told_of_narrow_types_unless_they_have_them() -> Result<()> {
        let shape = ModelShape { layers: 1, query_heads: 1, kv_heads: 1, head_dim: 64 };
        let rule = ElasticRule::new(0.0, 0.25)?;
        let request = PlanRequest::density(0.25, &[1000], 4, 20)?;
        let warning = |cache_type, device, loss| {
            let refined = Refined {
                plan: typed(&Plan::new(shape, 4, 20, vec![rule.into()])?, cache_type)?,
                loss,
                divergence: 0.0,
                start_loss: loss,
                start_divergence: 0.0,
                dense_loss: 0.25,
                held_out: None,
                evaluations: 0,
                seconds: 0.0,
            };
            Ok::<_, crate::Error>(warnings_of(&refined, &request, Some(device))?.concat())
        };
        let wide = CacheType::Bf16;
        assert!(
            warning(None, wide, 0.5)?.contains("in int8 (--kv-bytes 25.0% without --cache-dtype)")
        );
        for (own, device) in [(Some(CacheType::Int8), wide), (None, CacheType::Int8)] {
            let narrow = warning(own, device, 0.5)?;
            assert!(narrow.contains("wrong answers") && !narrow.contains("int8"), "{narrow}");
        }
        assert!(!warning(None, wide, 0.3)?.contains("wrong answers"));
        Ok(())
    }
}
