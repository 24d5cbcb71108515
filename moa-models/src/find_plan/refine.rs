//! Measured refinement: first-order influence proposes, real loss decides.
//!
//! Heads that retrieve together hide each other to first order, so the search's additive losses
//! are re-measured: around the dense model, then around the best plan found, each head's rule is
//! swapped between its narrowest and full, one at a time, and the change of the real loss replaces
//! the head's predicted total at the lengths next to the measured one. The influence keeps only its
//! shape over spans. The search then runs again. A plan is kept only if its measured loss is lower.

use std::time::{Duration, Instant};

use moa_core::{ElasticRule, HeadRule, ModelShape, Plan, PlanRequest, Profile};

use crate::decoder::model::Decoder;
use crate::device::Math;
use crate::find_plan::evidence::{Evidence, HeldOut, Merit};
use crate::find_plan::exchange::{Budget, exchange};
use crate::find_plan::measure::{Best, Effort, Measure, Scope};
use crate::find_plan::precision::{CacheTypes, choose, typed};
use crate::find_plan::table::Table;
use crate::progress::Progress;
use crate::{Error, Result};

/// A loss this close to the dense model's, in nats per token, is as good.
const CLOSE: f64 = 2e-3;

/// The best plan that [`refine`] measured, with the losses before and after it.
#[derive(Clone, Debug, PartialEq)]
pub struct Refined {
    /// The best plan.
    pub plan: Plan,
    /// Its mean response loss over the measured items, in nats per token.
    pub loss: f64,
    /// Its mean divergence from the dense model on running text, in nats per token; `None` without text.
    pub divergence: Option<f64>,
    /// Response loss of the best plan before refinement.
    pub start_loss: f64,
    /// Divergence of the best plan before refinement; `None` without text.
    pub start_divergence: Option<f64>,
    /// Response loss of dense attention.
    pub dense_loss: f64,
    /// What the plan does to held-out text, by length; empty without such text.
    pub held_out: Vec<HeldOut>,
    /// Measurements: of plans and of single heads, of dense attention, of the starts and of the limit of text.
    pub evaluations: usize,
    /// Measurements beside those of the starts that the time was expected to be enough for, where they are fewer than
    /// might have been made and the plan is not as good as dense attention on the evidence.
    pub fitting: Option<usize>,
    /// Wall time of the refinement, in seconds.
    pub seconds: f64,
}

impl Refined {
    /// Why the plan's responses lose more than those of the best plan before refinement, in a sentence; `None` where they
    /// do not. A plan is judged by its responses and by running text together.
    pub fn lost_for_text(&self) -> Option<String> {
        let lost = self.loss - self.start_loss;
        let (own, start) = self.divergence.zip(self.start_divergence)?;
        (lost >= 5e-5).then(|| {
            format!(
                "the plan's responses lose {lost:.4} nats per token more than the best searched plan's: it was chosen for \
                 what it does to running text, whose divergence from dense attention is {own:.4} nats per token in place \
                 of {start:.4}"
            )
        })
    }
}

/// Improves on `starts` (never returns a plan with a higher measured loss than the best of them),
/// with at most `evaluations` measurements beside those of `starts`: of plans, and of single heads on a
/// part of the evidence. Where held-out text suffers more than it may, a quarter as many again are made, twice at most.
/// A plan's loss is its response loss and, weighted, its divergence on running text.
/// Where `starts` say a cache type, all plans have it.
///
/// # Errors
/// As [`Decoder::response_loss`] and [`PlanRequest::search`]; [`Error::Cancelled`]; [`Error::Invalid`] if the heads
/// of `starts` have several cache types.
pub fn refine<D: Math>(
    model: &Decoder<D>,
    evidence: Evidence<'_>,
    starts: &[Plan],
    request: &PlanRequest,
    profile: &Profile,
    evaluations: usize,
    progress: &mut dyn Progress,
) -> Result<Refined> {
    let types = starts.first().map_or(Ok(CacheTypes::Device), CacheTypes::of)?;
    for plan in starts {
        if CacheTypes::of(plan)? != types {
            return Err(Error::invalid("cache types of plans", "the same in all", "several"));
        }
    }
    let effort = Effort { evaluations, deadline: None };
    let starts = Starts { found: starts, refined: None };
    refine_types(model, evidence, starts, (request, types), profile, effort, progress)
}

/// Where refinement begins.
#[derive(Clone, Copy, Debug)]
pub(super) struct Starts<'a> {
    /// Plans of a search.
    pub(super) found: &'a [Plan],
    /// A plan that was refined on other evidence.
    pub(super) refined: Option<&'a Plan>,
}

/// [`refine`] of plans whose heads have types. Where they choose their own, as many measurements again are made.
pub(super) fn refine_types<D: Math>(
    model: &Decoder<D>,
    evidence: Evidence<'_>,
    Starts { found: starts, refined }: Starts<'_>,
    (request, types): (&PlanRequest, CacheTypes),
    profile: &Profile,
    Effort { evaluations, deadline }: Effort,
    progress: &mut dyn Progress,
) -> Result<Refined> {
    let begin = Instant::now();
    let Some(first) = starts.first() else {
        return Err(Error::invalid("plans", "at least one", 0));
    };
    let expected = evaluations.max(starts.len() + 3);
    let expected = if types == CacheTypes::PerHead { 2 * expected } else { expected };
    let expected = (expected, deadline);
    let mut measure = Measure::new(model, evidence, types.first(), expected, progress)?;
    let dense = full_plan(first, model.shape())?;
    let dense_loss = measure.measure_dense()?.response_loss();
    let missing = || Error::invalid("plans", "at least one that was measured", 0);
    let start = measure.best(0, starts.to_vec(), None)?.ok_or_else(missing)?;
    let mut best = (measure.loss(&start.plan)?, start.plan);
    let start = measure.measured(&best.1, Scope::All)?;
    if let Some(refined) = refined {
        let loss = measure.loss(refined)?;
        if loss < best.0 {
            best = (loss, refined.clone());
        }
    }
    tracing::debug!(done = measure.done, best = best.0, dense_loss, "starts");
    // Where heads choose their types, half of the time is for that.
    let share = if types == CacheTypes::PerHead { 0.5 } else { 1.0 };
    let fitting = measure.fitting(evaluations, share)?;
    measure.allow(fitting);
    let enough = dense_loss + CLOSE;
    if measure.needed(&best.1)? > enough {
        let mut request = request.clone();
        // Heights are measured to a few percent at best: a few proposals are enough.
        request.solver.time_limit = request.solver.time_limit.min(Duration::from_secs(2));
        request.solver.max_plans = request.solver.max_plans.min(4);
        request.solver.intervals = request.solver.intervals.min(2);
        best = swap(&mut measure, &request, profile, dense, best, enough)?;
        if measure.needed(&best.1)? > enough {
            best = exchange(&mut measure, &request, best, Budget::Keys)?;
        }
    }
    let mut held_out = hold(&mut measure, request, &mut best, fitting)?;
    best.1 = typed(&best.1, types.first())?;
    if types == CacheTypes::PerHead && measure.needed(&best.1)? > enough {
        measure.allow(measure.fitting(evaluations, 1.0)?);
        let chosen = choose(&mut measure, request, best.clone())?;
        let of_chosen = measure.held_out(&chosen.1)?;
        if excess(&of_chosen) <= excess(&held_out) {
            (best, held_out) = (chosen, of_chosen);
        }
    }
    let is_cut = fitting < evaluations && measure.needed(&best.1)? > enough;
    let mut plan = best.1;
    plan.provenance = starts[0].provenance.clone();
    let losses = measure.measured(&plan, Scope::All)?;
    plan.provenance.measured_losses = losses.response.clone();
    plan.provenance.measured_divergences = losses.divergence.clone();
    plan.provenance.predicted_losses.clear();
    plan.provenance.trials = measure.trials;
    Ok(Refined {
        plan,
        loss: losses.response_loss(),
        divergence: losses.measured_divergence(),
        start_loss: start.response_loss(),
        start_divergence: start.measured_divergence(),
        dense_loss,
        held_out,
        evaluations: measure.done,
        fitting: is_cut.then_some(fitting),
        seconds: begin.elapsed().as_secs_f64(),
    })
}

/// Times that the limit of text is tightened where held-out text suffers more than it may.
const TIGHTENED: usize = 2;

/// Holds `best` to the limit of text on held-out text. Where it is beyond, the limit on the evidence is tightened
/// by as much, and the search goes on: from the plan, and from plans on the way to the uniform one.
fn hold<D: Math>(
    measure: &mut Measure<'_, D>,
    request: &PlanRequest,
    best: &mut (f64, Plan),
    evaluations: usize,
) -> Result<Vec<HeldOut>> {
    let mut held_out = measure.held_out(&best.1)?;
    let Some(uniform) = measure.limit_plan() else { return Ok(held_out) };
    for _ in 0..TIGHTENED {
        let excess = excess(&held_out);
        tracing::debug!(?held_out, excess, "held-out text");
        let allowed = measure.fitting(evaluations / 4, 1.0)?;
        if excess <= 1.0 || allowed == 0 {
            break;
        }
        measure.tighten(1.0 / excess.min(2.0));
        best.0 = measure.loss(&best.1)?;
        measure.allow(allowed);
        let mut plans = Vec::new();
        for share in [0.1, 0.2, 0.4] {
            plans.extend(mixed(request, &best.1, uniform, share)?);
        }
        if let Some(Best { plan, loss: Some(loss) }) = measure.best(0, plans, Some(&*best))?
            && loss < best.0
        {
            *best = (loss, plan);
        }
        *best = exchange(measure, request, best.clone(), Budget::Keys)?;
        held_out = measure.held_out(&best.1)?;
    }
    Ok(held_out)
}

/// How many times as much a plan does to held-out text as it may, at the length where that is most; 1 where it is
/// within the limit at each.
fn excess(held_out: &[HeldOut]) -> f64 {
    held_out.iter().map(HeldOut::excess).fold(1.0, f64::max)
}

/// Rounds of measuring every head's swap and searching with what was measured, with a part of the budget.
fn swap<D: Math>(
    measure: &mut Measure<'_, D>,
    request: &PlanRequest,
    profile: &Profile,
    dense: Plan,
    mut best: (f64, Plan),
    enough: f64,
) -> Result<(f64, Plan)> {
    let (shape, fingerprint) = (dense.shape(), best.1.fingerprint().map(str::to_string));
    let lengths = request.objective_lengths(profile);
    let (of_items, of_texts) = (measure.probe_lengths(false), measure.probe_lengths(true));
    let mut table = Table::new(request, profile, &lengths, &of_items, &of_texts)?;
    let limited = measure.limit_plan().cloned();
    let mut balance = Balance { weight: measure.probe_merit().weight(), room: 1.0 };
    let mut around = dense;
    // Most of the budget finds the heads that matter, the rest weighs spans against each other.
    let kept = measure.left() * 2 / 5;
    // The first round may have all: exchange without knowing which heads matter is worth less.
    let least = |round| shape.total_kv_heads() + if round == 0 { 0 } else { kept };
    let (mut is_better, mut round) = (true, 0);
    // A step of exchange finds more with as many measurements than another round after one that found nothing.
    while measure.left() >= least(round) && measure.needed(&best.1)? > enough && is_better {
        table.probe(measure, &around)?;
        let plans: Vec<Plan>;
        match &limited {
            Some(uniform) => {
                let slope = measure.probe_merit().weight();
                let lengths = (shape, &lengths[..]);
                let model = measure.model();
                // Searches end by the clock: all ranks take what the first one found.
                (balance, plans) = model.agree(|| {
                    let plans = balance.proposals(request, lengths, &table, uniform, slope)?;
                    Ok::<_, Error>((balance.clone(), plans))
                })?;
            }
            None => {
                let losses = || table.losses(balance.weight);
                let search = || Ok::<_, Error>(request.search(shape, &lengths, losses())?.plans);
                plans = measure.model().agree(search)?;
            }
        }
        let plans: Vec<Plan> =
            plans.into_iter().map(|p| p.with_fingerprint(fingerprint.clone())).collect();
        let Some(first) = plans.first().cloned() else { break };
        round += 1;
        let Some(Best { plan, loss }) = measure.best(round, plans, Some(&best))? else { break };
        let divergence = measure.measured(&first, Scope::Short)?.text_divergence();
        balance.learn(measure.probe_merit(), divergence);
        tracing::debug!(round, done = measure.done, ?loss, best = best.0, ?balance, "swaps");
        let loss = loss.unwrap_or(f64::INFINITY);
        is_better = loss < best.0 - 1e-4;
        if loss < best.0 {
            best = (loss, plan.clone());
        }
        // Linearise where the search went, even if it was worse: that is where it was wrong.
        around = plan;
    }
    Ok(best)
}

/// How much text counts in a search whose losses are additive, where its divergence has a limit: the multiplier of
/// a constraint. The limit is what a uniform plan does to text. By the additive losses too, that plan's are the most
/// that a proposal may have, so that their scale, which is wrong far from where they were measured, falls out; what
/// is left of the error is learned from each proposal that is measured.
#[derive(Clone, Debug)]
struct Balance {
    /// Nats of response loss for a nat of divergence.
    weight: f64,
    /// Additive loss of text that proposals may have, as a share of the uniform plan's.
    room: f64,
}

/// Steps of halving the range of the weight, which spans 10 octaves.
const HALVINGS: usize = 7;

impl Balance {
    /// Plans of the weight at which the additive losses of text meet their limit, of weights on either side, and
    /// of half of the way from there to the uniform plan. The first has that weight. `slope` is what a nat of
    /// divergence costs beyond the limit: no weight is much above it.
    fn proposals(
        &mut self,
        request: &PlanRequest,
        (shape, lengths): (ModelShape, &[usize]),
        table: &Table,
        uniform: &Plan,
        slope: f64,
    ) -> Result<Vec<Plan>> {
        let longest = [lengths.iter().copied().max().unwrap_or(1)];
        // One objective, the mean over lengths, so that text falls as its weight grows.
        let of_weight = |weight: f64| -> Result<Option<Plan>> {
            let plan = request
                .search(shape, &longest, table.mean_losses(weight))?
                .plans
                .into_iter()
                .next();
            // A mean of kinds and lengths is a prediction of none.
            Ok(plan.map(|mut plan| {
                plan.provenance.predicted_losses.clear();
                plan
            }))
        };
        let most = self.room * table.text_of(uniform);
        let (mut low, mut high) = (slope / 256.0, slope * 4.0);
        for _ in 0..HALVINGS {
            let middle = (low * high).sqrt();
            match of_weight(middle)? {
                Some(plan) if table.text_of(&plan) > most => low = middle,
                _ => high = middle,
            }
        }
        self.weight = high;
        let mut plans: Vec<Plan> = Vec::new();
        for factor in [1.0, 0.25, 4.0] {
            plans.extend(of_weight(self.weight * factor)?);
        }
        // Those that part the lengths otherwise.
        plans.extend(request.search(shape, lengths, table.losses(self.weight))?.plans);
        if let Some(plan) = plans.first() {
            plans.extend(mixed(request, plan, uniform, 0.5)?);
        }
        let mut known: Vec<Plan> = Vec::with_capacity(plans.len());
        for plan in plans {
            if known.iter().all(|other| other.rules() != plan.rules()) {
                known.push(plan);
            }
        }
        Ok(known)
    }

    /// `divergence` is that of the first proposal.
    fn learn(&mut self, merit: Merit, divergence: f64) {
        if let Merit::Limit(limit) = merit {
            let share = limit / divergence.max(1e-9);
            self.room = (self.room * share.clamp(0.5, 1.5)).clamp(0.25, 4.0);
        }
    }
}

/// The plan whose spans lie `share` of the way from those of `plan` to those of `uniform`, whose heads are alike;
/// `None` if it is not within the bounds, or rules of another kind cannot be mixed.
fn mixed(request: &PlanRequest, plan: &Plan, uniform: &Plan, share: f64) -> Result<Option<Plan>> {
    let Some([to]) = uniform.rules().first().map(|rule| rule.lines()) else { return Ok(None) };
    let (shape, mut mixed) = (plan.shape(), plan.clone());
    mixed.provenance.predicted_losses.clear();
    for (index, rule) in plan.rules().iter().enumerate() {
        let between = |from: f64, to: f64| from + share * (to - from);
        let line = |line: &ElasticRule| {
            ElasticRule::new(between(line.alpha, to.alpha), between(line.beta, to.beta))
        };
        let lines = rule.lines().iter().map(line).collect::<moa_core::Result<Vec<_>>>()?;
        let (layer, head) = (index / shape.kv_heads, index % shape.kv_heads);
        mixed = mixed.with_rule(layer, head, HeadRule::union(lines)?)?;
    }
    Ok(request.allows(&mixed)?.then_some(mixed))
}

fn full_plan(like: &Plan, shape: ModelShape) -> Result<Plan> {
    let rules = vec![ElasticRule::FULL.into(); shape.total_kv_heads()];
    Ok(Plan::new(shape, like.sink(), like.min_span(), rules)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_responses_lose_for_the_sake_of_text_is_told() {
        let shape = ModelShape { layers: 1, query_heads: 2, kv_heads: 2, head_dim: 8 };
        let of = |loss, divergence| Refined {
            plan: Plan::full(shape).unwrap(),
            loss,
            divergence,
            start_loss: 0.0502,
            start_divergence: divergence.map(|_| 0.02),
            dense_loss: 0.04,
            held_out: Vec::new(),
            evaluations: 5,
            fitting: None,
            seconds: 1.0,
        };
        let told = of(0.1521, Some(0.01)).lost_for_text().unwrap();
        for part in ["0.1019 nats", "best searched plan", "0.0100 nats", "in place of 0.0200"] {
            assert!(told.contains(part), "{told}");
        }
        assert_eq!(of(0.05, Some(0.01)).lost_for_text(), None);
        assert_eq!(of(0.1521, None).lost_for_text(), None);
    }

    #[test]
    fn mixed_plans_lie_between_and_keep_to_the_bounds() {
        let shape = ModelShape { layers: 1, query_heads: 2, kv_heads: 2, head_dim: 8 };
        let request = PlanRequest::density(0.5, &[1000], 4, 20).unwrap();
        let rules = [ElasticRule::FULL, ElasticRule::fixed(100)].map(HeadRule::from);
        let plan = Plan::new(shape, 4, 20, rules.to_vec()).unwrap();
        let rule = ElasticRule::new(0.0, 0.4).unwrap();
        let uniform = Plan::new(shape, 4, 20, vec![rule.into(); 2]).unwrap();
        // A tenth of the way is beyond the bound: .535 of the context.
        assert_eq!(mixed(&request, &plan, &uniform, 0.1).unwrap(), None);
        let half = mixed(&request, &plan, &uniform, 0.5).unwrap().unwrap();
        let kept = |head: usize| half.rules()[head].span(1000, 4, 20).total();
        assert_eq!((kept(0), kept(1)), (700, 250));
    }

    #[test]
    fn room_for_text_follows_what_was_measured() {
        let mut balance = Balance { weight: 1.0, room: 1.0 };
        balance.learn(Merit::Limit(0.01), 0.04);
        assert_eq!(balance.room, 0.5);
        balance.learn(Merit::Limit(0.01), 0.008);
        assert!((balance.room - 0.625).abs() < 1e-9);
        balance.learn(Merit::Weight(1.0), 0.008);
        assert!((balance.room - 0.625).abs() < 1e-9);
    }
}
