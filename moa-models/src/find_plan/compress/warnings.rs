//! What is wrong with what plans were found on, or with what was found.

use moa_core::{CacheType, FarLosses, Plan, PlanRequest, Profile};

use crate::Result;
use crate::eval::agreement::Agreement;
use crate::find_plan::evidence::HeldOut;
use crate::find_plan::precision;

/// A response loss this far above the dense model's, in nats per token, changes answers.
const WORSE: f64 = 0.1;

/// What is wrong with a plan, a sentence each: responses that it loses, `growth` being what their loss is above the
/// dense model's in nats per token, or held-out text, and more keys than `request` bounds below its lengths. `device`
/// is the type of the device's caches where a plan says none.
///
/// # Errors
/// [`Error::Core`](crate::Error::Core) if the plan is for a model of other dimensions than the request.
pub fn plan_warnings(
    plan: &Plan,
    growth: f64,
    held_out: &[HeldOut],
    request: Option<&PlanRequest>,
    device: Option<CacheType>,
) -> Result<Vec<String>> {
    let mut warnings = Vec::new();
    if growth > WORSE {
        let mut warning = format!(
            "the plan's responses lose {growth:.3} nats per token against the dense model's: expect \
             wrong answers. A larger density, more calibration items or more evaluations may help"
        );
        let has_16_bits = matches!(device, Some(CacheType::F16 | CacheType::Bf16));
        if let Some(request) = request.filter(|_| has_16_bits && plan.cache_types().is_empty()) {
            let share = request.bounds.iter().map(|bound| bound.max).fold(1.0, f64::min);
            warning += &format!(
                "; as many bytes hold nearly twice the keys in int8 (--kv-bytes {:.1}% without --cache-dtype)",
                100.0 * share
            );
        }
        warnings.push(warning);
    }
    let worst = held_out.iter().max_by(|a, b| a.excess().total_cmp(&b.excess()));
    if let Some((worst, limit)) = worst.and_then(|of| Some((of, of.limit?)))
        && worst.excess() > 1.0
    {
        let growth = |of: &Agreement| 100.0 * (of.perplexity_ratio - 1.0);
        warnings.push(format!(
            "on held-out text of {} tokens the plan's predictions diverge by {:.3} nats and their perplexity grows by \
             {:.1} %, more than under one window of the same size for all heads ({:.3} and {:.1} %)",
            worst.length,
            worst.plan.kl_mean,
            growth(&worst.plan),
            limit.kl_mean,
            growth(&limit),
        ));
    }
    let bounds =
        request.iter().flat_map(|request| request.bounds.iter().map(move |b| (request, b)));
    let Some((request, bound)) = bounds.min_by_key(|(_, bound)| bound.length) else {
        return Ok(warnings);
    };
    let half = (bound.length / 2).max(1);
    let density = match plan.cache_types() {
        [first, others @ ..] if others.iter().any(|other| other != first) => {
            precision::density(request, plan, half)?
        }
        _ => request.density_of(plan, half)?,
    };
    if density > bound.max + 1e-3 {
        warnings.push(format!(
            "below {} tokens, the shortest length with a bound, spans shrink by less than the context does: \
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
        let influence = profile.at(length)?;
        let (far, samples) = (influence.far_losses(), influence.samples());
        if samples < FarLosses::FEWEST as u64 {
            warnings.push(format!(
                "few calibration items at {length} tokens ({samples}): whether they have long dependencies cannot be \
                 said, and a plan from them may depend on chance. Profile more samples"
            ));
        } else if far.is_noise() {
            warnings.push(format!(
                "the calibration data ({}) has no long dependency at {length} tokens: without the far \
                 context its loss grows by {:.3} +- {:.3} nats per token in {} samples. A plan from it \
                 may keep the wrong heads; use prompts whose answers lie far back, or `--data tasks`",
                profile.info.data,
                far.mean(),
                far.standard_error().unwrap_or(0.0),
                far.samples(),
            ));
        }
    }
    Ok(warnings)
}

#[cfg(test)]
mod tests {
    use moa_core::{ElasticRule, Influence, ModelShape, ProfileInfo};

    use super::*;
    use crate::find_plan::precision::typed;

    // Half of the keys in 8 bits lose less than a quarter of them in 16.
    #[test]
    fn plans_that_lose_answers_are_told_of_narrow_types_unless_they_have_them() -> Result<()> {
        let shape = ModelShape { layers: 1, query_heads: 1, kv_heads: 1, head_dim: 64 };
        let rule = ElasticRule::new(0.0, 0.25)?;
        let request = PlanRequest::density(0.25, &[1000], 4, 20)?;
        let warning = |cache_type, device, growth| {
            let plan = typed(&Plan::new(shape, 4, 20, vec![rule.into()])?, cache_type)?;
            let warnings = plan_warnings(&plan, growth, &[], Some(&request), Some(device))?;
            Ok::<_, crate::Error>(warnings.concat())
        };
        let wide = CacheType::Bf16;
        assert!(
            warning(None, wide, 0.25)?.contains("in int8 (--kv-bytes 25.0% without --cache-dtype)")
        );
        for (own, device) in [(Some(CacheType::Int8), wide), (None, CacheType::Int8)] {
            let narrow = warning(own, device, 0.25)?;
            assert!(narrow.contains("wrong answers") && !narrow.contains("int8"), "{narrow}");
        }
        assert!(!warning(None, wide, 0.05)?.contains("wrong answers"));
        Ok(())
    }

    #[test]
    fn more_keys_below_the_shortest_bound_than_asked_for_are_told() -> Result<()> {
        let shape = ModelShape { layers: 1, query_heads: 1, kv_heads: 1, head_dim: 64 };
        let request = PlanRequest::density(0.25, &[1024, 2048], 4, 20)?;
        let warnings = |rule| {
            let plan = Plan::new(shape, 4, 20, vec![rule])?;
            assert!(request.allows(&plan)?);
            plan_warnings(&plan, 0.0, &[], Some(&request), None)
        };
        // 256 keys at every length.
        let told = warnings(ElasticRule::fixed(256).into())?.concat();
        assert!(
            told.contains("below 1024 tokens") && told.contains("at 512 tokens is 0.500"),
            "{told}"
        );
        // Half of the context, but 200 keys at least: 256 at 512 tokens, where the bound holds, and 200 at 256.
        let request = PlanRequest::density(0.5, &[512], 4, 200)?;
        let plan = Plan::new(shape, 4, 200, vec![ElasticRule::new(0.0, 0.5)?.into()])?;
        let told = plan_warnings(&plan, 0.0, &[], Some(&request), None)?.concat();
        assert!(
            told.contains("at 256 tokens is 0.781") && !told.contains("keep the spans"),
            "{told}"
        );
        assert_eq!(warnings(ElasticRule::new(0.0, 0.25)?.into())?, Vec::<String>::new());
        Ok(())
    }

    #[test]
    fn a_profile_of_one_or_two_items_is_told_of() -> Result<()> {
        let shape = ModelShape { layers: 1, query_heads: 1, kv_heads: 1, head_dim: 64 };
        for (items, told) in [(1, true), (2, true), (3, false)] {
            let mut influence = Influence::new(shape, 128, 64)?;
            for _ in 0..items {
                influence.count_sample();
            }
            let mut profile = Profile::new(shape, ProfileInfo::default());
            profile.add(influence)?;
            let warnings = profile_warnings(&profile)?.concat();
            let expected = format!("few calibration items at 128 tokens ({items})");
            assert_eq!(warnings.contains(&expected), told, "{warnings}");
        }
        Ok(())
    }

    // What text gains at one length does not pay for what it loses at another.
    #[test]
    fn text_is_held_to_its_limit_at_every_length() -> Result<()> {
        let shape = ModelShape { layers: 1, query_heads: 1, kv_heads: 1, head_dim: 16 };
        let agreement = |perplexity_ratio| Agreement {
            perplexity_ratio,
            tokens: 40_000,
            ..Agreement::default()
        };
        let of = |length, plan, limit| HeldOut {
            length,
            plan: agreement(plan),
            limit: Some(agreement(limit)),
        };
        let warnings =
            |held_out: &[HeldOut]| plan_warnings(&Plan::full(shape)?, 0.0, held_out, None, None);
        let (near, far) = (of(1024, 1.02, 1.01), of(2048, 1.0, 1.02));
        let told = warnings(&[near, far])?.concat();
        assert!(told.contains("text of 1024 tokens") && told.contains("2.0 %"), "{told}");
        assert_eq!(warnings(&[far])?, Vec::<String>::new());
        assert_eq!(warnings(&[HeldOut { limit: None, ..near }])?, Vec::<String>::new());
        Ok(())
    }
}
