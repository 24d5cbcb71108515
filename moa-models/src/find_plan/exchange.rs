//! Exchange between heads: what each head's span is worth near the plan at hand, rather than from all to nothing,
//! and, where heads have types of their own, what each one's type is.
//!
//! Each head's rule is widened and narrowed by a factor, or its type changed, one at a time, and the effect is
//! measured. The changes that gain most for the keys or bytes that they take are then made together with those that
//! lose least for what they free, as many together as measure best, and again from there, where only the most
//! promising changes are measured again. A step that helps is kept; where none does the factor becomes smaller.

use std::collections::BTreeMap;

use moa_core::{CacheType, ElasticRule, HeadRule, Plan, PlanRequest, Space};

use crate::Result;
use crate::device::Math;
use crate::find_plan::measure::{Best, Measure};
use crate::find_plan::precision;

/// Factors by which spans change, one after another.
const FACTORS: [f64; 3] = [2.0, 1.5, 1.25];

/// A rule that keeps so much of the context is made to keep all.
const NEARLY_ALL: f64 = 0.8;

/// What plans have a limited number of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Budget {
    Keys,
    /// Heads may then change their types too.
    Bytes,
}

/// What a change does with a head.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Kind {
    Wider,
    Narrower,
    /// Another type, the span as it is.
    Retyped(CacheType),
    /// Another type, and the span that takes as many bytes.
    Exchanged(CacheType),
}

impl Kind {
    fn is_of_type(self) -> bool {
        matches!(self, Self::Retyped(_) | Self::Exchanged(_))
    }
}

/// Another rule or type of one head.
#[derive(Clone, Debug)]
pub(super) struct Change {
    pub(super) head: usize,
    pub(super) kind: Kind,
    pub(super) rule: HeadRule,
    /// `None` for the one that the head has.
    pub(super) cache_type: Option<CacheType>,
    /// What the plan's loss changes by, as measured or as expected from an earlier measurement; below 0 is better.
    pub(super) loss: f64,
    /// What the head's keys change by, as a share of the context, or its bytes, in dense heads of the first type.
    pub(super) size: f64,
}

impl Change {
    fn per_size(&self) -> f64 {
        self.loss / self.size.abs().max(1e-4)
    }
}

/// Of changes that were measured before, one in so many is measured again after a step: the others are far
/// from being chosen.
const AGAIN: usize = 3;

/// Loss and size of changes that were measured.
type Known = BTreeMap<(usize, Kind), (f64, f64)>;

impl Budget {
    /// A step makes changes that take something of one in so many of the heads; each is tried.
    fn parts(self) -> [usize; 4] {
        match self {
            Self::Keys => [24, 12, 6, 3],
            Self::Bytes => [12, 6, 3, 1],
        }
    }

    fn fits(self, request: &PlanRequest, plan: &Plan) -> Result<bool> {
        match self {
            Self::Keys => Ok(request.allows(plan)?),
            Self::Bytes => precision::fits(request, plan),
        }
    }

    /// What each head might change to, nothing of it measured.
    pub(super) fn possible(
        self,
        request: &PlanRequest,
        plan: &Plan,
        factor: f64,
    ) -> Result<Vec<Change>> {
        let mut changes = Vec::new();
        for (head, rule) in plan.rules().iter().enumerate() {
            let own = plan.cache_types().get(head).copied().flatten();
            let kept = |rule: &HeadRule| share(request, head / plan.shape().kv_heads, rule);
            let size = |rule: &HeadRule, cache_type| match self {
                Self::Keys => kept(rule),
                Self::Bytes => kept(rule) * precision::relative(plan, cache_type),
            };
            let mut add = |kind, changed: HeadRule, cache_type: Option<CacheType>| {
                let is_same_span = (kept(&changed) - kept(rule)).abs() < 1e-6;
                if is_same_span && !matches!(kind, Kind::Retyped(_)) {
                    return;
                }
                let size = size(&changed, cache_type) - size(rule, own);
                changes.push(Change { head, kind, rule: changed, cache_type, loss: 0.0, size });
            };
            add(Kind::Wider, scaled(request, rule, factor)?, own);
            add(Kind::Narrower, scaled(request, rule, factor.recip())?, own);
            if self == Self::Bytes {
                for other in precision::others(own) {
                    let by =
                        precision::relative(plan, own) / precision::relative(plan, Some(other));
                    add(Kind::Retyped(other), rule.clone(), Some(other));
                    add(Kind::Exchanged(other), scaled(request, rule, by)?, Some(other));
                }
            }
        }
        Ok(changes)
    }
}

/// Whether each head may have any elastic rule: other spaces and times have rules of their own.
pub(super) fn is_elastic(request: &PlanRequest) -> bool {
    request.space == Space::Elastic && request.decode_time.is_none()
}

/// Improves on `best`, a plan with its loss, until the budget of measurements is spent or nothing helps.
pub(super) fn exchange<D: Math>(
    measure: &mut Measure<'_, D>,
    request: &PlanRequest,
    mut best: (f64, Plan),
    budget: Budget,
) -> Result<(f64, Plan)> {
    // A head that changes alone has a rule of its own.
    if !is_elastic(request) || request.solver.max_rules_per_layer.is_some() {
        return Ok(best);
    }
    // A search chooses from few spans for each head and leaves some of the budget.
    let whole = filled(budget, request, &best.1)?;
    if whole.rules() != best.1.rules()
        && let Some(Best { plan, loss: Some(loss) }) = measure.best(0, vec![whole], Some(&best))?
        && loss < best.0
    {
        best = (loss, plan);
    }
    let mut known = Known::new();
    let mut factors = FACTORS.iter();
    let mut factor = factors.next();
    while let Some(&by) = factor
        && measure.left() > budget.parts().len()
    {
        let heads = best.1.rules().len();
        let possible = budget.possible(request, &best.1, by)?;
        let room = measure.left() - budget.parts().len();
        let (asked, mut changes) = chosen(possible, &known, room);
        let mut variants = Vec::with_capacity(asked.len());
        for change in &asked {
            let layer = change.head / best.1.shape().kv_heads;
            variants.push((layer, with(&best.1, change)?));
        }
        let losses = measure.changes(&best.1, &variants)?;
        for (mut change, loss) in asked.into_iter().zip(losses) {
            // Fewer bits alone gain nothing: what seems so is noise.
            let is_coarser = matches!(change.kind, Kind::Retyped(_)) && change.size < 0.0;
            change.loss = if is_coarser { loss.max(0.0) } else { loss };
            known.insert((change.head, change.kind), (change.loss, change.size));
            changes.push(change);
        }
        let [mut taking, mut freeing] = by_direction(changes);
        taking.retain(|change| change.loss < 0.0);
        for changes in [&mut taking, &mut freeing] {
            changes.sort_by(|a, b| a.per_size().total_cmp(&b.per_size()));
        }
        let mut plans: Vec<Plan> = Vec::new();
        for part in budget.parts() {
            let count = (heads / part).max(1);
            let plan = changed(budget, request, &best.1, (&taking, count), &freeing)?;
            let is_other =
                |a: &Plan, b: &Plan| a.rules() != b.rules() || a.cache_types() != b.cache_types();
            plans.extend(plan.filter(|plan| {
                is_other(plan, &best.1) && plans.iter().all(|known| is_other(plan, known))
            }));
        }
        let found = measure.best(0, plans, Some(&best))?;
        let loss = found.as_ref().and_then(|found| found.loss);
        tracing::debug!(?budget, by, done = measure.done, ?loss, best = best.0, "exchange");
        match found {
            Some(Best { plan, loss: Some(loss) }) if loss < best.0 - 1e-4 => {
                // What another type does was measured of the head's old rule and type.
                known.retain(|(head, kind), _| {
                    let is_same = plan.rules()[*head] == best.1.rules()[*head]
                        && plan.cache_types().get(*head) == best.1.cache_types().get(*head);
                    is_same || !kind.is_of_type()
                });
                best = (loss, plan);
            }
            _ => factor = factors.next(),
        }
    }
    Ok(best)
}

/// Those that take something and those that free something or take nothing.
fn by_direction(changes: Vec<Change>) -> [Vec<Change>; 2] {
    let (taking, freeing) = changes.into_iter().partition(|change| change.size > 0.0);
    [taking, freeing]
}

/// Which changes to measure, `room` of them at most, and the others as far as something is known of them. Those of
/// which nothing is known come first, then the most promising of the others.
fn chosen(possible: Vec<Change>, known: &Known, room: usize) -> (Vec<Change>, Vec<Change>) {
    let directions = by_direction(possible).map(|changes| {
        let (mut before, new): (Vec<Change>, Vec<Change>) =
            changes.into_iter().partition(|change| known.contains_key(&(change.head, change.kind)));
        for change in &mut before {
            let (loss, size) = known[&(change.head, change.kind)];
            // A span's loss is that of its keys; a type's goes by the head.
            let times = if change.kind.is_of_type() { 1.0 } else { change.size / size };
            change.loss = loss * times;
        }
        before.sort_by(|a, b| a.per_size().total_cmp(&b.per_size()));
        let again = before.len().div_ceil(AGAIN);
        (new, before, again)
    });
    // Where not all can be measured, as many of either kind.
    let [taking, freeing] = directions.each_ref().map(|(new, _, again)| new.len() + again);
    let fewer = taking.min(freeing).min(room / 2);
    let taking = taking.min(room - fewer);
    let counts = [taking, freeing.min(room - taking)];
    let (mut asked, mut rest) = (Vec::new(), Vec::new());
    for ((mut new, mut before, again), count) in directions.into_iter().zip(counts) {
        new.truncate(count);
        let again = again.min(count - new.len());
        asked.append(&mut new);
        asked.extend(before.drain(..again));
        rest.append(&mut before);
    }
    (asked, rest)
}

/// `plan` with a head changed.
fn with(plan: &Plan, change: &Change) -> Result<Plan> {
    let kv_heads = plan.shape().kv_heads;
    let (layer, head) = (change.head / kv_heads, change.head % kv_heads);
    let mut changed = plan.clone().with_rule(layer, head, change.rule.clone())?;
    if change.cache_type.is_some() {
        let mut types = plan.cache_types().to_vec();
        types.resize(plan.rules().len(), None);
        types[change.head] = change.cache_type;
        changed = changed.with_cache_types(types)?;
    }
    Ok(changed)
}

/// `plan` with the first `count` of `taking`, and of `freeing` as many as bring it within its budget, and those that
/// gain by another type all the same; `None` if they do not.
fn changed(
    budget: Budget,
    request: &PlanRequest,
    plan: &Plan,
    (taking, count): (&[Change], usize),
    freeing: &[Change],
) -> Result<Option<Plan>> {
    let mut plan = plan.clone();
    plan.provenance.predicted_losses.clear();
    let mut is_changed = vec![false; plan.rules().len()];
    let mut made = 0;
    for change in taking {
        if made < count && !std::mem::replace(&mut is_changed[change.head], true) {
            plan = with(&plan, change)?;
            made += 1;
        }
    }
    for change in freeing {
        let is_gain = budget == Budget::Bytes && change.loss < 0.0;
        if !is_gain && budget.fits(request, &plan)? {
            break;
        }
        if !std::mem::replace(&mut is_changed[change.head], true) {
            plan = with(&plan, change)?;
        }
    }
    match budget.fits(request, &plan)? {
        true => Ok(Some(filled(budget, request, &plan)?)),
        false => Ok(None),
    }
}

/// `plan` with all spans longer by one factor, as far as the budget reaches.
pub(super) fn filled(budget: Budget, request: &PlanRequest, plan: &Plan) -> Result<Plan> {
    let kv_heads = plan.shape().kv_heads;
    let of = |factor: f64| -> Result<Plan> {
        let mut filled = plan.clone();
        filled.provenance.predicted_losses.clear();
        for (index, rule) in plan.rules().iter().enumerate() {
            let rule = scaled(request, rule, factor)?;
            filled = filled.with_rule(index / kv_heads, index % kv_heads, rule)?;
        }
        Ok(filled)
    };
    let (mut low, mut high) = (1.0, 4.0);
    let mut best = plan.clone();
    while high - low > 3e-3 {
        let middle = f64::midpoint(low, high);
        let plan = of(middle)?;
        match budget.fits(request, &plan)? {
            true => (low, best) = (middle, plan),
            false => high = middle,
        }
    }
    Ok(best)
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

#[cfg(test)]
mod tests {
    use moa_core::ModelShape;

    use super::*;
    use crate::find_plan::precision::{density, typed};

    const SHAPE: ModelShape = ModelShape { layers: 2, query_heads: 2, kv_heads: 1, head_dim: 64 };

    fn plan() -> Plan {
        let rules = [0.4, 0.1].map(|share| ElasticRule::new(0.0, share).unwrap().into());
        Plan::new(SHAPE, 4, 20, rules.to_vec()).unwrap()
    }

    fn request() -> PlanRequest {
        PlanRequest::density(0.25, &[1000, 4000], 4, 20).unwrap()
    }

    // What there is no time to measure again stays known.
    #[test]
    fn changes_that_are_not_measured_again_stay_known() {
        for budget in [Budget::Keys, Budget::Bytes] {
            let plan = typed(&plan(), Some(CacheType::Int8)).unwrap();
            let possible = budget.possible(&request(), &plan, 2.0).unwrap();
            let known = possible.iter().map(|c| ((c.head, c.kind), (-0.1 * c.size, c.size)));
            let known: Known = known.collect();
            for room in 0..=possible.len() {
                let (asked, rest) = chosen(possible.clone(), &known, room);
                assert!(asked.len() <= room);
                assert_eq!(asked.len() + rest.len(), possible.len(), "{budget:?} {room}");
                assert!(rest.iter().all(|c| c.loss == -0.1 * c.size));
            }
            // Of new ones as many of either direction as there is room for.
            let (asked, rest) = chosen(possible, &Known::new(), 2);
            assert!(asked.len() == 2 && rest.is_empty());
            assert!(asked[0].size > 0.0 && asked[1].size < 0.0);
        }
    }

    // Bits that one head gives up are what another's longer span is paid with, and the budget holds in bytes.
    #[test]
    fn changes_keep_to_the_budget_in_bytes() {
        let (request, budget) = (request(), Budget::Bytes);
        let plan = typed(&plan(), Some(CacheType::Int8)).unwrap();
        assert!(budget.fits(&request, &plan).unwrap());
        let all = budget.possible(&request, &plan, 1.5).unwrap();
        let find =
            |head, kind| all.iter().find(|c| c.head == head && c.kind == kind).unwrap().clone();
        let mut wider = find(0, Kind::Wider);
        let mut coarser = find(1, Kind::Retyped(CacheType::Int4));
        (wider.loss, coarser.loss) = (-0.1, 0.01);
        // A span of .6 takes .2 more, int4 frees .1 * 64 / 132.
        assert!((wider.size - 0.2).abs() < 1e-3, "{}", wider.size);
        assert!((coarser.size + 0.1 * 64.0 / 132.0).abs() < 1e-3, "{}", coarser.size);
        let all_of = |freeing: &[Change]| {
            let taking = (std::slice::from_ref(&wider), 1);
            changed(budget, &request, &plan, taking, freeing).unwrap()
        };
        assert_eq!(all_of(std::slice::from_ref(&coarser)), None);
        // The same bytes in int4: the exchanged head takes none.
        let exchanged = find(0, Kind::Exchanged(CacheType::Int4));
        assert!(exchanged.size.abs() < 0.03, "{}", exchanged.size);
        assert!(density(&request, &plan, 4000).unwrap() <= 0.25);
        // In int4 spans may be twice as long.
        let int4 = plan.clone().with_cache_types(vec![Some(CacheType::Int4); 2]).unwrap();
        let int4 = filled(budget, &request, &int4).unwrap();
        assert!(int4.density(4000) > 0.45);
        for plan in [int4, filled(Budget::Keys, &request, &self::plan()).unwrap()] {
            let used = density(&request, &plan, 4000).unwrap();
            assert!(used <= 0.25 && used > 0.24, "{used}");
        }
        // A change that gains by itself is made without any need.
        coarser.loss = -0.01;
        let freed = changed(budget, &request, &plan, (&[], 1), &[coarser]).unwrap().unwrap();
        assert_eq!(freed.cache_type(1, 0), Some(CacheType::Int4));
    }
}
