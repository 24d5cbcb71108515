//! The cache type of each KV head, beside its span: precision as the second axis of a plan.
//!
//! Spans are found with every head in int8, under the density that a budget of bytes comes to in int8. Then heads
//! change types and spans under the budget itself, in bytes.
//!
//! What a type costs is measured of one head at a time, around the plan at hand, as spans are. Single measurements
//! may be added for this reason: a rounding error has a mean of about 0 and those of two heads have nothing to do
//! with each other. To second order the divergence is `d' F d / 2`, `d` being the sum of the heads' errors as they
//! arrive at the predictions, and its mixed terms vanish in the mean: what is left is one term a head. The gradient
//! of the loss, which the influence of keys is made of, says nothing here: its term is of first order in `d`, and so
//! 0 in the mean. Hence a measured improvement by fewer bits alone is noise, and counts as none.

use std::collections::BTreeMap;

use moa_core::{CacheType, HeadRule, Plan, PlanRequest};

use crate::device::Math;
use crate::find_plan::exchange::{AGAIN, FACTORS, is_elastic, scaled, share};
use crate::find_plan::measure::{Best, Measure};
use crate::{Error, Result};

/// In which types the heads of a plan that is searched for hold keys and values.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum CacheTypes {
    /// In that of the device; the plan says nothing of it.
    #[default]
    Device,
    /// All in one, which the plan says.
    All(CacheType),
    /// Each in its own, chosen by measured loss under a budget of bytes. Densities are those that the same bytes
    /// come to in [`PER_HEAD`]'s first.
    PerHead,
}

/// The types that are chosen from, the widest first: fp8 takes as many bytes as int8 and loses more.
pub const PER_HEAD: [CacheType; 3] = [CacheType::Int8, CacheType::K8V4, CacheType::Int4];

impl CacheTypes {
    /// The type of all heads while spans are found.
    pub const fn first(self) -> Option<CacheType> {
        match self {
            Self::Device => None,
            Self::All(cache_type) => Some(cache_type),
            Self::PerHead => Some(PER_HEAD[0]),
        }
    }

    /// The density of plans whose heads, all in [`first`](Self::first) or else in 16 bits, take `share` of the bytes
    /// of a dense cache of 16 bits; 1 at most.
    ///
    /// # Errors
    /// [`Error::Invalid`] if the share is not above 0.
    pub fn density(self, share: f64, head_dim: usize) -> Result<f64> {
        if !(share > 0.0 && share.is_finite()) {
            return Err(Error::invalid("share of the dense cache's bytes", "above 0", share));
        }
        let dense = CacheType::F16.slot_bytes(head_dim) as f64;
        let slot = self.first().unwrap_or(CacheType::F16).slot_bytes(head_dim) as f64;
        Ok((share * dense / slot).min(1.0))
    }

    /// All the types that heads may come to have.
    pub(super) fn all(self) -> Vec<CacheType> {
        match self {
            Self::Device => Vec::new(),
            Self::All(cache_type) => vec![cache_type],
            Self::PerHead => PER_HEAD.to_vec(),
        }
    }
}

/// The plan with all heads of one type, if it says none.
pub(super) fn typed(plan: &Plan, cache_type: Option<CacheType>) -> Result<Plan> {
    match cache_type {
        Some(own) if plan.cache_types().is_empty() => {
            Ok(plan.clone().with_cache_types(vec![Some(own); plan.rules().len()])?)
        }
        _ => Ok(plan.clone()),
    }
}

/// What a plan's bytes come to as the density of one whose heads are all in the first type.
pub(super) fn density(request: &PlanRequest, plan: &Plan, length: usize) -> Result<f64> {
    let first = PER_HEAD[0].slot_bytes(plan.shape().head_dim);
    let slots = plan.rules().len() as f64 * length.max(1) as f64;
    let bytes = match request.windows.is_empty() {
        true => plan.kv_bytes(length, first),
        false => plan.clone().within(request.windows.clone())?.kv_bytes(length, first),
    };
    Ok(bytes as f64 / first as f64 / slots)
}

/// Whether a plan keeps to the budget, in bytes.
fn fits(request: &PlanRequest, plan: &Plan) -> Result<bool> {
    for bound in &request.bounds {
        if density(request, plan, bound.length)? > bound.max + 1e-9 {
            return Ok(false);
        }
    }
    Ok(true)
}

/// A step spends bytes on one in so many of the heads; each is tried.
const PARTS: [usize; 4] = [12, 6, 3, 1];

/// What a change does with a head's bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Kind {
    Wider,
    Narrower,
    /// Another type, the span as it is.
    Retyped(CacheType),
    /// Another type, and the span that takes as many bytes.
    Exchanged(CacheType),
}

/// Another rule and type of one head.
#[derive(Clone, Debug)]
struct Change {
    head: usize,
    kind: Kind,
    rule: HeadRule,
    cache_type: CacheType,
    /// What the plan's loss changes by.
    loss: f64,
    /// What the head's bytes change by, in dense heads of the first type.
    bytes: f64,
}

impl Change {
    fn per_byte(&self) -> f64 {
        self.loss / self.bytes.abs().max(1e-4)
    }
}

/// Improves on `best`, a plan with its loss whose heads have types, until the budget of measurements is spent or
/// nothing helps.
pub(super) fn choose<D: Math>(
    measure: &mut Measure<'_, D>,
    request: &PlanRequest,
    mut best: (f64, Plan),
) -> Result<(f64, Plan)> {
    if !is_elastic(request) {
        return Ok(best);
    }
    let mut uniform = Vec::new();
    for cache_type in &PER_HEAD[1..] {
        uniform.push(filled(request, &best.1, *cache_type)?);
    }
    if let Some(Best { plan, loss: Some(loss) }) = measure.best(0, uniform, Some(&best))?
        && loss < best.0
    {
        best = (loss, plan);
    }
    let mut known: BTreeMap<(usize, Kind), f64> = BTreeMap::new();
    let mut factors = FACTORS.iter();
    let mut factor = factors.next();
    while let Some(&by) = factor
        && measure.left() > PARTS.len()
    {
        let heads = best.1.rules().len();
        let changes = changes(measure, request, &best.1, by, &mut known)?;
        let (mut spending, mut freeing): (Vec<_>, Vec<_>) =
            changes.into_iter().partition(|change| change.bytes > 0.0);
        spending.retain(|change| change.loss < 0.0);
        for changes in [&mut spending, &mut freeing] {
            changes.sort_by(|a, b| a.per_byte().total_cmp(&b.per_byte()));
        }
        let mut plans: Vec<Plan> = Vec::new();
        for part in PARTS {
            let plan = changed(request, &best.1, &spending, &freeing, heads.div_ceil(part))?;
            plans.extend(plan.filter(|plan| *plan != best.1 && !plans.contains(plan)));
        }
        let found = measure.best(0, plans, Some(&best))?;
        let loss = found.as_ref().and_then(|found| found.loss);
        tracing::debug!(by, done = measure.done, ?loss, best = best.0, "types");
        match found {
            Some(Best { plan, loss: Some(loss) }) if loss < best.0 - 1e-4 => {
                // What was measured of a head is of its old rule and type.
                let is_same = |head: usize| {
                    plan.rules()[head] == best.1.rules()[head]
                        && plan.cache_types()[head] == best.1.cache_types()[head]
                };
                known.retain(|(head, _), _| is_same(*head));
                best = (loss, plan);
            }
            _ => {
                factor = factors.next();
                known.retain(|(_, kind), _| matches!(kind, Kind::Retyped(_) | Kind::Exchanged(_)));
            }
        }
    }
    Ok(best)
}

/// The changes of every head, with what they do: those of which nothing is known are measured, and the most
/// promising of the others once more.
fn changes<D: Math>(
    measure: &mut Measure<'_, D>,
    request: &PlanRequest,
    plan: &Plan,
    factor: f64,
    known: &mut BTreeMap<(usize, Kind), f64>,
) -> Result<Vec<Change>> {
    let (mut done, mut asked) = (Vec::new(), Vec::new());
    for mut change in possible(request, plan, factor)? {
        match known.get(&(change.head, change.kind)) {
            None => asked.push(change),
            Some(loss) => {
                change.loss = *loss;
                done.push(change);
            }
        }
    }
    done.sort_by(|a, b| a.per_byte().total_cmp(&b.per_byte()));
    // What there is no time to measure again stays known.
    let room = measure.left().saturating_sub(PARTS.len());
    asked.truncate(room);
    asked.extend(done.drain(..done.len().div_ceil(AGAIN).min(room - asked.len())));
    let mut variants = Vec::with_capacity(asked.len());
    for change in &asked {
        let layer = change.head / plan.shape().kv_heads;
        variants.push((layer, with(plan, change)?));
    }
    let losses = measure.changes(plan, &variants)?;
    for (mut change, loss) in asked.into_iter().zip(losses) {
        let is_coarser = matches!(change.kind, Kind::Retyped(_)) && change.bytes < 0.0;
        change.loss = if is_coarser { loss.max(0.0) } else { loss };
        known.insert((change.head, change.kind), change.loss);
        done.push(change);
    }
    Ok(done)
}

/// What each head might change to, nothing of it measured.
fn possible(request: &PlanRequest, plan: &Plan, factor: f64) -> Result<Vec<Change>> {
    let (kv_heads, head_dim) = (plan.shape().kv_heads, plan.shape().head_dim);
    let slot = |cache_type: CacheType| cache_type.slot_bytes(head_dim) as f64;
    let mut changes = Vec::new();
    for (head, rule) in plan.rules().iter().enumerate() {
        let layer = head / kv_heads;
        let own = plan.cache_types().get(head).copied().flatten().unwrap_or(PER_HEAD[0]);
        let bytes = |rule: &HeadRule, cache_type: CacheType| {
            share(request, layer, rule) * slot(cache_type) / slot(PER_HEAD[0])
        };
        let mut add = |kind, rule: HeadRule, cache_type| {
            let bytes = bytes(&rule, cache_type) - bytes(&plan.rules()[head], own);
            changes.push(Change { head, kind, rule, cache_type, loss: 0.0, bytes });
        };
        add(Kind::Wider, scaled(request, rule, factor)?, own);
        add(Kind::Narrower, scaled(request, rule, factor.recip())?, own);
        for other in PER_HEAD.into_iter().filter(|other| *other != own) {
            add(Kind::Retyped(other), rule.clone(), other);
            add(Kind::Exchanged(other), scaled(request, rule, slot(own) / slot(other))?, other);
        }
    }
    let is_change = |change: &Change| {
        let own = plan.cache_types().get(change.head).copied().flatten();
        let same_span = share(request, change.head / kv_heads, &change.rule)
            == share(request, change.head / kv_heads, &plan.rules()[change.head]);
        match change.kind {
            Kind::Wider | Kind::Narrower | Kind::Exchanged(_) => !same_span,
            Kind::Retyped(other) => own != Some(other),
        }
    };
    changes.retain(is_change);
    Ok(changes)
}

/// `plan` with a head changed.
fn with(plan: &Plan, change: &Change) -> Result<Plan> {
    let kv_heads = plan.shape().kv_heads;
    let mut types = plan.cache_types().to_vec();
    types.resize(plan.rules().len(), None);
    types[change.head] = Some(change.cache_type);
    let (layer, head) = (change.head / kv_heads, change.head % kv_heads);
    Ok(plan.clone().with_rule(layer, head, change.rule.clone())?.with_cache_types(types)?)
}

/// `plan` with the first `count` of `spending`, and of `freeing` all that lose nothing, and as many as bring it
/// within its budget; `None` if they do not.
fn changed(
    request: &PlanRequest,
    plan: &Plan,
    spending: &[Change],
    freeing: &[Change],
    count: usize,
) -> Result<Option<Plan>> {
    let mut plan = plan.clone();
    plan.provenance.predicted_losses.clear();
    let mut is_changed = vec![false; plan.rules().len()];
    let mut spent = 0;
    for change in spending {
        if spent < count && !std::mem::replace(&mut is_changed[change.head], true) {
            plan = with(&plan, change)?;
            spent += 1;
        }
    }
    for change in freeing {
        if change.loss >= 0.0 && fits(request, &plan)? {
            break;
        }
        if !std::mem::replace(&mut is_changed[change.head], true) {
            plan = with(&plan, change)?;
        }
    }
    Ok(fits(request, &plan)?.then_some(plan))
}

/// `plan` with all heads in one type, and spans longer by one factor as far as the budget reaches.
fn filled(request: &PlanRequest, plan: &Plan, cache_type: CacheType) -> Result<Plan> {
    let of = |factor: f64| -> Result<Plan> {
        let rules = plan.rules().iter().map(|rule| scaled(request, rule, factor));
        let rules = rules.collect::<Result<Vec<_>>>()?;
        let types = vec![Some(cache_type); rules.len()];
        let mut filled = plan.clone();
        filled.provenance.predicted_losses.clear();
        for (index, rule) in rules.into_iter().enumerate() {
            let kv_heads = plan.shape().kv_heads;
            filled = filled.with_rule(index / kv_heads, index % kv_heads, rule)?;
        }
        Ok(filled.with_cache_types(types)?)
    };
    let (mut low, mut high) = (1.0, 4.0);
    for _ in 0..10 {
        let middle = f64::midpoint(low, high);
        match fits(request, &of(middle)?)? {
            true => low = middle,
            false => high = middle,
        }
    }
    of(low)
}

#[cfg(test)]
mod tests {
    use moa_core::{ElasticRule, ModelShape};

    use super::*;

    const SHAPE: ModelShape = ModelShape { layers: 2, query_heads: 2, kv_heads: 1, head_dim: 64 };

    fn plan() -> Plan {
        let rules = [0.4, 0.1].map(|share| ElasticRule::new(0.0, share).unwrap().into());
        typed(&Plan::new(SHAPE, 4, 20, rules.to_vec()).unwrap(), Some(CacheType::Int8)).unwrap()
    }

    #[test]
    fn a_share_of_bytes_is_a_density_with_scales_counted() {
        let density = |types: CacheTypes| types.density(0.09, 64).unwrap();
        assert_eq!(density(CacheTypes::Device), 0.09);
        assert_eq!(density(CacheTypes::PerHead), 0.09 * 256.0 / 132.0);
        assert_eq!(density(CacheTypes::All(CacheType::Int4)), 0.09 * 256.0 / 68.0);
        assert_eq!(CacheTypes::All(CacheType::Int4).density(0.5, 64).unwrap(), 1.0);
        assert!(CacheTypes::Device.density(0.0, 64).is_err());
    }

    // Bits that one head gives up are what another's longer span is paid with, and the budget holds in bytes.
    #[test]
    fn changes_keep_to_the_budget_in_bytes() {
        let request = PlanRequest::density(0.25, &[1000, 4000], 4, 20).unwrap();
        let plan = plan();
        assert!(fits(&request, &plan).unwrap());
        let all = possible(&request, &plan, 1.5).unwrap();
        let find =
            |head, kind| all.iter().find(|c| c.head == head && c.kind == kind).unwrap().clone();
        let mut wider = find(0, Kind::Wider);
        let mut coarser = find(1, Kind::Retyped(CacheType::Int4));
        (wider.loss, coarser.loss) = (-0.1, 0.01);
        // A span of .6 takes .2 more, int4 frees .1 * 64 / 132.
        assert!((wider.bytes - 0.2).abs() < 1e-3, "{}", wider.bytes);
        assert!((coarser.bytes + 0.1 * 64.0 / 132.0).abs() < 1e-3, "{}", coarser.bytes);
        let all_of = |freeing: &[Change]| {
            changed(&request, &plan, std::slice::from_ref(&wider), freeing, 1).unwrap()
        };
        assert_eq!(all_of(std::slice::from_ref(&coarser)), None);
        // The same bytes in int4: the exchanged head takes none.
        let exchanged = find(0, Kind::Exchanged(CacheType::Int4));
        assert!(exchanged.bytes.abs() < 0.03, "{}", exchanged.bytes);
        let plan = filled(&request, &plan, CacheType::Int4).unwrap();
        let used = density(&request, &plan, 4000).unwrap();
        assert!(used <= 0.25 && used > 0.24, "{used}");
        assert!(plan.density(4000) > 0.45);
        // A change that gains by itself is made without any need.
        coarser.loss = -0.01;
        let freed = changed(&request, &self::plan(), &[], &[coarser], 1).unwrap().unwrap();
        assert_eq!(freed.cache_type(1, 0), Some(CacheType::Int4));
    }
}
