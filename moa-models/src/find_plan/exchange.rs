//! Exchange of spans between heads: what each head's span is worth near the plan at hand, rather than
//! from all to nothing.
//!
//! Each head's rule is widened and narrowed by a factor, one at a time, and the change is measured. The
//! heads that gain most for their keys are then widened and those that lose least narrowed, as many
//! together as measure best, and again from there, where only the most promising changes are measured
//! again. A step that helps is kept; where none does the factor becomes smaller.

use std::collections::BTreeMap;

use moa_core::{ElasticRule, HeadRule, Plan, PlanRequest, Space};

use crate::Result;
use crate::device::Math;
use crate::find_plan::measure::{Best, Measure};

/// Factors by which spans change, one after another.
pub(super) const FACTORS: [f64; 3] = [2.0, 1.5, 1.25];

/// A step widens one in so many of the heads; each is tried.
const PARTS: [usize; 4] = [24, 12, 6, 3];

/// A rule that keeps so much of the context is made to keep all.
const NEARLY_ALL: f64 = 0.8;

/// One head's change, its effect and its size.
struct Change {
    head: usize,
    rule: HeadRule,
    /// Change of the plan's loss, as measured or as expected from an earlier measurement; below 0 is better.
    gain: f64,
    /// Keys that the change adds, or frees, as a share of the context.
    keys: f64,
}

/// Of changes that were measured before, one in so many is measured again after a step: the others are far
/// from being chosen.
pub(super) const AGAIN: usize = 3;

/// Change of the loss for each key, by head, of widening it and of narrowing it.
type Known = [BTreeMap<usize, f64>; 2];

/// Whether each head may have any elastic rule: other spaces and times have rules of their own.
pub(super) fn is_elastic(request: &PlanRequest) -> bool {
    request.space == Space::Elastic && request.decode_time.is_none()
}

/// Improves on `best`, a plan with its loss, until the budget of measurements is spent or nothing helps.
pub(super) fn exchange<D: Math>(
    measure: &mut Measure<'_, D>,
    request: &PlanRequest,
    mut best: (f64, Plan),
) -> Result<(f64, Plan)> {
    if !is_elastic(request) {
        return Ok(best);
    }
    let mut known = Known::default();
    let mut factors = FACTORS.iter();
    let mut factor = factors.next();
    while let Some(&by) = factor
        && measure.left() > PARTS.len()
    {
        let heads = best.1.rules().len();
        let [mut wider, mut narrower] = changes(measure, request, &best.1, by, &mut known)?;
        let per_key = |change: &Change| change.gain / change.keys.max(1e-9);
        wider.retain(|change| change.gain < 0.0);
        wider.sort_by(|a, b| per_key(a).total_cmp(&per_key(b)));
        narrower.sort_by(|a, b| per_key(a).total_cmp(&per_key(b)));
        let mut plans: Vec<Plan> = Vec::new();
        for part in PARTS {
            let count = (heads / part).max(1).min(wider.len());
            let plan = exchanged(request, &best.1, &wider[..count], &narrower)?;
            if let Some(plan) = plan.filter(|plan| !plans.iter().any(|p| p.rules() == plan.rules()))
            {
                plans.push(plan);
            }
        }
        let found = measure.best(0, plans, Some(&best))?;
        let loss = found.as_ref().and_then(|found| found.loss);
        tracing::debug!(by, done = measure.done, ?loss, best = best.0, "exchange");
        match found {
            Some(Best { plan, loss: Some(loss) }) if loss < best.0 - 1e-4 => best = (loss, plan),
            _ => factor = factors.next(),
        }
    }
    Ok(best)
}

/// Changes of heads, wider by `factor` and narrower by it. Those of which nothing is known are measured, and of
/// the others the most promising ones.
fn changes<D: Math>(
    measure: &mut Measure<'_, D>,
    request: &PlanRequest,
    plan: &Plan,
    factor: f64,
    known: &mut Known,
) -> Result<[Vec<Change>; 2]> {
    let kv_heads = plan.shape().kv_heads;
    let (mut done, mut asked) = ([Vec::new(), Vec::new()], [Vec::new(), Vec::new()]);
    for (head, rule) in plan.rules().iter().enumerate() {
        for factor in [factor, factor.recip()] {
            let changed = scaled(request, rule, factor)?;
            let layer = head / kv_heads;
            let keys = share(request, layer, &changed) - share(request, layer, rule);
            if keys.abs() < 1e-6 {
                continue;
            }
            let kind = usize::from(keys < 0.0);
            let change = Change { head, rule: changed, gain: 0.0, keys: keys.abs() };
            match known[kind].get(&head) {
                None => asked[kind].push(change),
                Some(each) => done[kind].push(Change { gain: each * keys.abs(), ..change }),
            }
        }
    }
    for (done, asked) in done.iter_mut().zip(&mut asked) {
        done.sort_by(|a, b| (a.gain / a.keys).total_cmp(&(b.gain / b.keys)));
        asked.extend(done.drain(..done.len().div_ceil(AGAIN)));
    }
    // Where not all can be measured, as many of either kind.
    let [wider, narrower] = asked;
    let room = measure.left().saturating_sub(PARTS.len());
    let fewer = wider.len().min(narrower.len()).min(room / 2);
    let most = |own: usize, other: usize| own.min(room - other.min(fewer));
    let (wider_count, narrower_count) =
        (most(wider.len(), narrower.len()), most(narrower.len(), wider.len()));
    let mut asked: Vec<(usize, Change)> =
        wider.into_iter().take(wider_count).map(|c| (0, c)).collect();
    asked.extend(narrower.into_iter().take(narrower_count.min(room - asked.len())).map(|c| (1, c)));
    let mut variants = Vec::with_capacity(asked.len());
    for (_, Change { head, rule, .. }) in &asked {
        let (layer, head) = (head / kv_heads, head % kv_heads);
        variants.push((layer, plan.clone().with_rule(layer, head, rule.clone())?));
    }
    let gains = measure.changes(plan, &variants)?;
    for ((kind, change), gain) in asked.into_iter().zip(gains) {
        known[kind].insert(change.head, gain / change.keys);
        done[kind].push(Change { gain, ..change });
    }
    Ok(done)
}

/// `plan` with all of `wider`, and of `narrower` as many as bring it within its bounds; `None` if they
/// do not.
fn exchanged(
    request: &PlanRequest,
    plan: &Plan,
    wider: &[Change],
    narrower: &[Change],
) -> Result<Option<Plan>> {
    let kv_heads = plan.shape().kv_heads;
    let mut plan = plan.clone();
    plan.provenance.predicted_losses.clear();
    for Change { head, rule, .. } in wider {
        plan = plan.with_rule(head / kv_heads, head % kv_heads, rule.clone())?;
    }
    for Change { head, rule, .. } in narrower {
        if request.allows(&plan)? {
            break;
        }
        if wider.iter().all(|change| change.head != *head) {
            plan = plan.with_rule(head / kv_heads, head % kv_heads, rule.clone())?;
        }
    }
    Ok(request.allows(&plan)?.then_some(plan))
}

/// Mean share of the context that a rule keeps in a layer at the lengths of the bounds.
pub(super) fn share(request: &PlanRequest, layer: usize, rule: &HeadRule) -> f64 {
    let share = |length: usize| request.span(layer, rule, length).total() as f64 / length as f64;
    request.bounds.iter().map(|bound| share(bound.length)).sum::<f64>()
        / request.bounds.len().max(1) as f64
}

/// A rule whose spans are `factor` times as long, within what rules may be, whatever its layer sees.
pub(super) fn scaled(request: &PlanRequest, rule: &HeadRule, factor: f64) -> Result<HeadRule> {
    if factor > 1.0 && share(request, usize::MAX, rule) * factor >= NEARLY_ALL {
        return Ok(ElasticRule::FULL.into());
    }
    let mut lines = Vec::new();
    for line in rule.lines() {
        lines.push(ElasticRule::new(line.alpha * factor, (line.beta * factor).min(1.0))?);
    }
    if request.min_share > 0.0 {
        lines.push(ElasticRule::new(0.0, request.min_share)?);
    }
    // What another line is never below says nothing.
    let is_below =
        |a: &ElasticRule, b: &ElasticRule| a.alpha <= b.alpha && a.beta <= b.beta && a != b;
    let all = lines.clone();
    lines.retain(|line| !all.iter().any(|other| is_below(line, other)));
    Ok(HeadRule::union(lines)?)
}
