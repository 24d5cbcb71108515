//! The way from a checkpoint to a plan, in one call.

mod bounds;
mod options;
mod texts;
mod warnings;

use std::collections::BTreeMap;
use std::time::Instant;

use moa_core::{ElasticRule, FoundPlans, Plan, PlanRequest, Profile, SparseAttentionBackend};

use crate::checkpoint::Checkpoint;
use crate::device::{Backward, Math};
use crate::find_plan::calibrate::{Calibration, CalibrationData};
use crate::find_plan::evidence::{Evidence, TextGoal};
use crate::find_plan::exchange::is_elastic;
use crate::find_plan::measure::Effort;
use crate::find_plan::objective::WeightedObjective;
use crate::find_plan::precision::CacheTypes;
use crate::find_plan::probe::groups;
use crate::find_plan::profile::Item;
use crate::find_plan::profile_all::DEFAULT_BLOCK;
use crate::find_plan::refine::{Refined, Starts, refine_types};
use crate::progress::{Progress, Stage};
use crate::{Error, Result};

pub use bounds::{bound_decode_time, with_min_share};
pub use options::CompressOptions;
pub use warnings::{plan_warnings, profile_warnings};

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

/// Finds a plan for a checkpoint: profiles, searches, and decides by measured loss at a length that
/// was not profiled.
///
/// # Errors
/// [`Error::Invalid`], [`Error::Core`] and [`Error::ContextExceeded`] for an option that is out of
/// range or does not fit the model, [`Error::Core`] with
/// [`Infeasible`](moa_core::Error::Infeasible) if no plan meets the bounds, [`Error::Cancelled`],
/// [`Error::Core`] with [`CacheType`](moa_core::Error::CacheType) if the device lacks a type that heads may have,
/// and those of [`Checkpoint::calibrate`], [`Decoder::profile`](crate::Decoder::profile) and [`bound_decode_time`].
pub fn compress<D: Backward>(
    checkpoint: &Checkpoint<D>,
    data: &CalibrationData,
    options: &CompressOptions,
    progress: &mut dyn Progress,
) -> Result<Compressed> {
    let begin = Instant::now();
    options.validate()?;
    let model = &checkpoint.model;
    check_types(&model.device, options.cache_types)?;
    // What cannot be met is said before the work of profiling.
    let request = options.request(model.config().context_length())?;
    request.with_windows(model.config().windows()).reachable(model.shape())?;
    let calibration = options.profile_calibration();
    let Calibration { items, data: name } = checkpoint.calibrate(data, &calibration, progress)?;
    let description = format!("{name}, seed {}", options.seed);
    let objective =
        WeightedObjective { objective: options.objective, weight: options.token_weight };
    tracing::debug!(data = name, "calibrated");
    let profile = model.profile_all(&items, objective, DEFAULT_BLOCK, &description, progress)?;
    tracing::debug!("profiled");
    compress_since(begin, checkpoint, data, profile, options, progress)
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
    compress_since(Instant::now(), checkpoint, data, profile, options, progress)
}

/// [`compress_profile`] as a part of what began at `begin`.
fn compress_since<D: Math>(
    begin: Instant,
    checkpoint: &Checkpoint<D>,
    data: &CalibrationData,
    profile: Profile,
    options: &CompressOptions,
    progress: &mut dyn Progress,
) -> Result<Compressed> {
    let options = &CompressOptions { lengths: profile.lengths(), ..options.clone() };
    options.validate()?;
    let model = &checkpoint.model;
    check_types(&model.device, options.cache_types)?;
    if profile.shape() != model.shape() {
        let (expected, got) = (model.shape(), profile.shape());
        return Err(moa_core::Error::ShapeMismatch { what: "profile", expected, got }.into());
    }
    if let Some(got) = profile.info.fingerprint.as_deref().filter(|f| *f != model.fingerprint()) {
        let (expected, got) = (model.fingerprint().to_string(), got.to_string());
        return Err(moa_core::Error::FingerprintMismatch { what: "profile", expected, got }.into());
    }
    let context = model.config().context_length();
    let mut request = options.request(context)?.with_windows(model.config().windows());
    if let Some(share) = options.decode_time {
        // Ranks measure different times, and searches end by the clock.
        request = model.agree(|| {
            bound_decode_time(&mut request, &model.device, model.shape(), share)?;
            Ok::<_, Error>(request.clone())
        })?;
    }
    progress.advance(Stage::Search, 0, 1)?;
    let lengths = request.objective_lengths(&profile);
    let search = || Ok::<_, Error>(request.search_profile(&profile, &lengths)?);
    let found = model.agree(search)?;
    tracing::debug!(plans = found.plans.len(), "searched");
    let uniform = uniform(&request, &profile)?;
    let starts: Vec<Plan> = found.plans.iter().chain(&uniform).cloned().collect();
    let mut warnings = profile_warnings(&profile)?;
    let judged = Judged::new(checkpoint, data, options, &mut warnings, progress)?;
    let text_goal = match &uniform {
        Some(plan) if options.text_weight.is_none() && !judged.texts.is_empty() => {
            TextGoal::NoWorseThan(plan)
        }
        _ => TextGoal::Weight(options.text_weight.unwrap_or(1.0)),
    };
    let evaluations = options.evaluations(model.shape());
    // A limit beyond what the clock can hold is no limit.
    let deadline = options.time_limit.and_then(|limit| begin.checked_add(limit));
    let effort = Effort { evaluations, deadline };
    let bounds = (&request, options.cache_types);
    let starts = Starts { found: &starts, refined: None };
    let evidence = judged.evidence(text_goal);
    let mut refined = refine_types(model, evidence, starts, bounds, &profile, effort, progress)?;
    if let (Some(fitting), Some(limit)) = (refined.fitting, options.time_limit) {
        warnings.push(format!(
            "within {:.1} minutes there was time to measure {fitting} of {evaluations} plans: more minutes may find \
             a better one",
            limit.as_secs_f64() / 60.0
        ));
    }
    let (mut options, mut contexts) = (options.clone(), judged.contexts());
    let (mut seconds, fitting) = (refined.seconds, refined.fitting);
    while model.agree(|| Ok::<_, Error>(options.has_time_for_more(&refined, seconds, deadline)))? {
        options = options.with_more();
        let starts = Starts { refined: Some(&refined.plan), ..starts };
        // What there is too little of was told before.
        let judged = Judged::new(checkpoint, data, &options, &mut Vec::new(), progress);
        let next = judged.and_then(|judged| {
            // A file has only so many items.
            if judged.contexts() <= contexts {
                return Ok(None);
            }
            contexts = judged.contexts();
            tracing::debug!(contexts, seconds, "more to judge plans by");
            let evidence = judged.evidence(text_goal);
            refine_types(model, evidence, starts, bounds, &profile, effort, progress).map(Some)
        });
        if let Ok(Some(next)) = &next {
            seconds = next.seconds;
        }
        let goes_on;
        (refined, goes_on) = after(refined, next, &mut warnings)?;
        if !goes_on {
            break;
        }
    }
    refined.fitting = fitting;
    refined.plan.provenance.method = Some("moa compress".to_string());
    let plan = refined.plan.clone();
    let (growth, device) = (refined.loss - refined.dense_loss, model.device.default_cache_type());
    warnings.extend(refined.lost_for_text());
    warnings.extend(plan_warnings(&plan, growth, &refined.held_out, Some(&request), device)?);
    Ok(Compressed { plan, profile, found, refined, warnings })
}

/// What there is after a further round of refinement, `None` where it had no more to judge plans by, and whether another
/// one may follow: not where this one found no other plan. A round that fails loses nothing of what was found before.
/// Why there is no further one is said in `warnings`.
fn after(
    refined: Refined,
    next: Result<Option<Refined>>,
    warnings: &mut Vec<String>,
) -> Result<(Refined, bool)> {
    match next {
        Ok(Some(next)) => {
            let evaluations = refined.evaluations + next.evaluations;
            let seconds = refined.seconds + next.seconds;
            let is_other = next.plan.rules() != refined.plan.rules();
            Ok((Refined { evaluations, seconds, ..next }, is_other))
        }
        Ok(None) => {
            warnings.push(format!(
                "the plan loses {:.4} nats per token where it is measured, and the data has no further items to refine \
                 it on: more of them may find a better one",
                refined.loss - refined.dense_loss
            ));
            Ok((refined, false))
        }
        Err(Error::Cancelled) => Err(Error::Cancelled),
        Err(error) => {
            warnings.push(format!("the plan was not refined on more contexts: {error}"));
            Ok((refined, false))
        }
    }
}

/// What plans are judged by.
struct Judged {
    items: BTreeMap<usize, Vec<Item>>,
    texts: BTreeMap<usize, Vec<Item>>,
    held_out: BTreeMap<usize, Vec<Item>>,
}

impl Judged {
    fn new<D: Math>(
        checkpoint: &Checkpoint<D>,
        data: &CalibrationData,
        options: &CompressOptions,
        warnings: &mut Vec<String>,
        progress: &mut dyn Progress,
    ) -> Result<Self> {
        let validation = options.validation_calibration(checkpoint.model.config().context_length());
        let made = match (checkpoint.calibrate(data, &validation, progress), data) {
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
        let items = made.items;
        // The text that plans are refined on and the text that the result is held to have nothing in common.
        let texts = options.texts(checkpoint, data)?;
        let held_out = options.held_out_texts(checkpoint, data)?;
        tracing::debug!(lengths = ?items.keys(), texts = texts.len(), "calibrated for validation");
        Ok(Self { items, texts, held_out })
    }

    /// Contexts that items are asked about, or items that share none.
    fn contexts(&self) -> usize {
        self.items.values().map(|items| groups(items).count()).sum()
    }

    fn evidence<'a>(&'a self, text_goal: TextGoal<'a>) -> Evidence<'a> {
        let Self { items, texts, held_out } = self;
        Evidence { items, texts, text_goal, held_out }
    }
}

/// Checks that a device has caches of the types that heads may come to have.
fn check_types<D: Math>(device: &D, types: CacheTypes) -> Result<()> {
    let attention = device.attention();
    match types.all().into_iter().find(|own| !attention.has_cache_type(*own)) {
        None => Ok(()),
        Some(cache_type) => {
            let backend = attention.name();
            Err(moa_core::Error::CacheType { backend, cache_type, head: None }.into())
        }
    }
}

/// One rule for all heads, of the largest size within the bounds.
fn uniform(request: &PlanRequest, profile: &Profile) -> Result<Option<Plan>> {
    if !is_elastic(request) {
        return Ok(None);
    }
    let of_share = |share: f64| -> Result<_> {
        let rules = vec![ElasticRule::new(0.0, share)?.into(); profile.shape().total_kv_heads()];
        let plan = Plan::new(profile.shape(), request.sink, request.min_span, rules)?;
        let plan = plan.with_fingerprint(profile.info.fingerprint.clone());
        Ok(request.allows(&plan)?.then_some(plan))
    };
    let mut least = request.bounds.iter().map(|bound| bound.max).fold(1.0, f64::min);
    let mut best = of_share(least)?;
    // Where layers have windows, the others may keep more.
    let mut most = if request.windows.is_empty() { least } else { 1.0 };
    while most - least > 1e-3 {
        let middle = f64::midpoint(least, most);
        match of_share(middle)? {
            Some(plan) => (least, best) = (middle, Some(plan)),
            None => most = middle,
        }
    }
    Ok(best)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::options::MORE;
    use super::*;
    use crate::checkpoint::template::Message;
    use crate::device::cpu::Cpu;
    use crate::find_plan::prompts::CalibrationPrompt;

    /// Letters, in an order of `seed`.
    fn text(seed: usize, len: usize) -> String {
        (0..len).map(|i| char::from(b'A' + ((seed + i * i * 7 + i) % 26) as u8)).collect()
    }

    /// A model, what it is asked, and a budget that loses answers.
    fn losing() -> Result<(Checkpoint<Cpu>, CalibrationData, CompressOptions)> {
        let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../assets/moa-tiny");
        let checkpoint = Checkpoint::open(Cpu::default(), folder)?;
        let question = |i: usize| CalibrationPrompt::Question {
            messages: vec![Message::user(text(i, 200))],
            answer: None,
        };
        let data = CalibrationData::Prompts((0..36).map(question).collect());
        let options = CompressOptions {
            density: 0.12,
            lengths: vec![256],
            bound_lengths: vec![256],
            validation_length: Some(256),
            samples: 2,
            max_response: 16,
            validation_samples: 1,
            text_samples: 0,
            time_limit: Some(Duration::from_secs(600)),
            ..CompressOptions::default()
        };
        Ok((checkpoint, data, options))
    }

    #[test]
    fn a_plan_that_loses_is_refined_on_more_where_there_is_time() -> Result<()> {
        let (checkpoint, data, options) = losing()?;
        let model = &checkpoint.model;
        let found = compress(&checkpoint, &data, &options, &mut ())?;
        let validation =
            options.with_more().validation_calibration(model.config().context_length());
        let items = checkpoint.calibrate(&data, &validation, &mut ())?.items;
        assert_eq!(items[&256].len(), MORE);
        let refined = &found.refined;
        for (plan, loss) in
            [(&found.plan, refined.loss), (&Plan::full(model.shape())?, refined.dense_loss)]
        {
            let own = model.response_loss(&items[&256], plan, 256)?;
            assert!((own - loss).abs() < 1e-5, "{loss}, not {own}");
        }
        assert!(refined.loss <= refined.start_loss, "{refined:?}");
        Ok(())
    }

    #[test]
    fn a_further_round_that_fails_loses_no_plan() -> Result<()> {
        let (checkpoint, data, options) = losing()?;
        let options = CompressOptions { time_limit: None, evaluations: Some(1), ..options };
        let first = compress(&checkpoint, &data, &options, &mut ())?.refined;
        let mut warnings = Vec::new();
        let failed = Err(Error::invalid("memory", "enough", "too little"));
        let (kept, goes_on) = after(first.clone(), failed, &mut warnings)?;
        assert!(kept == first && !goes_on);
        assert!(warnings[0].contains("memory"), "{warnings:?}");
        let next = Refined { loss: 0.1, seconds: 2.0, ..first.clone() };
        let (kept, goes_on) = after(first.clone(), Ok(Some(next.clone())), &mut warnings)?;
        assert!(!goes_on, "no other plan was found");
        assert!(kept.loss == 0.1 && kept.seconds == first.seconds + 2.0);
        assert_eq!(kept.evaluations, 2 * first.evaluations);
        let next = Refined { plan: Plan::full(checkpoint.model.shape())?, ..next };
        assert!(after(first.clone(), Ok(Some(next)), &mut warnings)?.1);
        assert_eq!(warnings.len(), 1);
        assert!(!after(first.clone(), Ok(None), &mut warnings)?.1);
        assert!(warnings[1].contains("no further items"), "{warnings:?}");
        let cancelled = after(first, Err(Error::Cancelled), &mut warnings);
        assert!(matches!(cancelled, Err(Error::Cancelled)) && warnings.len() == 2);
        Ok(())
    }
}
