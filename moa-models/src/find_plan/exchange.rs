//! Exchange of spans between heads: what each head's span is worth near the plan at hand, rather than
//! from all to nothing.
//!
//! Each head's rule is widened and narrowed by a factor, one at a time, and the change is measured. The
//! heads that gain most for their keys are then widened and those that lose least narrowed, as many
//! together as measure best, and again from there. A step that helps is kept; where none does the factor
//! becomes smaller.

use moa_core::{ElasticRule, HeadRule, Plan, PlanRequest, Space};

use crate::Result;
use crate::device::Math;
use crate::find_plan::refine::Measure;

/// Factors of the steps, one after another.
const FACTORS: [f64; 3] = [2.0, 1.5, 1.25];

/// A rule that keeps so much of the context is made to keep all.
const NEARLY_ALL: f64 = 0.8;

/// One head's change, its measured effect and its size.
struct Change {
    head: usize,
    rule: HeadRule,
    /// Change of the plan's loss; below 0 is better.
    gain: f64,
    /// Keys that the change adds, or frees, as a share of the context.
    keys: f64,
}

/// Improves on `best`, a plan with its loss, until the budget of measurements is spent or nothing helps.
/// `weight` is what a nat of divergence costs.
pub(super) fn exchange<D: Math>(
    measure: &mut Measure<'_, D>,
    request: &PlanRequest,
    mut best: (f64, Plan),
    weight: f64,
) -> Result<(f64, Plan)> {
    // Other spaces and times have rules of their own.
    if request.space != Space::Elastic || request.decode_time.is_some() {
        return Ok(best);
    }
    let mut factors = FACTORS.iter();
    let mut factor = factors.next();
    while let Some(&by) = factor
        && measure.left() > 0
    {
        let heads = best.1.rules().len();
        let (mut wider, mut narrower) = changes(measure, request, &best.1, by, weight)?;
        let per_key = |change: &Change| change.gain / change.keys.max(1e-9);
        wider.retain(|change| change.gain < 0.0);
        wider.sort_by(|a, b| per_key(a).total_cmp(&per_key(b)));
        narrower.sort_by(|a, b| per_key(a).total_cmp(&per_key(b)));
        let mut plans: Vec<Plan> = Vec::new();
        for part in [24, 12, 6, 3] {
            let count = (heads / part).max(1).min(wider.len());
            let plan = exchanged(request, &best.1, &wider[..count], &narrower)?;
            if let Some(plan) = plan.filter(|plan| !plans.iter().any(|p| p.rules() == plan.rules()))
            {
                plans.push(plan);
            }
        }
        match measure.best(0, plans)? {
            Some((loss, plan)) if loss < best.0 - 1e-4 => best = (loss, plan),
            _ => factor = factors.next(),
        }
    }
    Ok(best)
}

/// The measured changes of every head: wider by `factor`, and narrower by it.
fn changes<D: Math>(
    measure: &mut Measure<'_, D>,
    request: &PlanRequest,
    plan: &Plan,
    factor: f64,
    weight: f64,
) -> Result<(Vec<Change>, Vec<Change>)> {
    let kv_heads = plan.shape().kv_heads;
    let mut variants = Vec::new();
    let mut made = Vec::new();
    for (head, rule) in plan.rules().iter().enumerate() {
        for factor in [factor, factor.recip()] {
            let changed = scaled(request, rule, factor)?;
            let keys = share(request, &changed) - share(request, rule);
            if keys.abs() < 1e-6 {
                continue;
            }
            let layer = head / kv_heads;
            variants
                .push((layer, plan.clone().with_rule(layer, head % kv_heads, changed.clone())?));
            made.push(Change { head, rule: changed, gain: 0.0, keys });
        }
    }
    let (base, losses) = measure.around(plan, &variants, weight)?;
    for (change, loss) in made.iter_mut().zip(losses) {
        change.gain = loss - base;
    }
    let (wider, mut narrower): (Vec<_>, Vec<_>) = made.into_iter().partition(|c| c.keys > 0.0);
    narrower.iter_mut().for_each(|change| change.keys = -change.keys);
    Ok((wider, narrower))
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
        if fits(request, &plan) {
            break;
        }
        if wider.iter().all(|change| change.head != *head) {
            plan = plan.with_rule(head / kv_heads, head % kv_heads, rule.clone())?;
        }
    }
    Ok(fits(request, &plan).then_some(plan))
}

/// Whether a plan is within the density bounds of a request.
pub(super) fn fits(request: &PlanRequest, plan: &Plan) -> bool {
    request.bounds.iter().all(|bound| {
        let density = plan.density(bound.length);
        density <= bound.max + 1e-9 && bound.min.is_none_or(|min| density >= min)
    })
}

/// Mean share of the context that a rule keeps at the lengths of the bounds.
fn share(request: &PlanRequest, rule: &HeadRule) -> f64 {
    let share = |length: usize| {
        rule.span(length, request.sink, request.min_span).total() as f64 / length as f64
    };
    request.bounds.iter().map(|bound| share(bound.length)).sum::<f64>()
        / request.bounds.len().max(1) as f64
}

/// A rule whose spans are `factor` times as long, within what rules may be.
fn scaled(request: &PlanRequest, rule: &HeadRule, factor: f64) -> Result<HeadRule> {
    if factor > 1.0 && share(request, rule) * factor >= NEARLY_ALL {
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
