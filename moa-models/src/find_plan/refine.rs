//! Measured refinement: first-order influence proposes, real loss decides.
//!
//! Heads that retrieve together hide each other to first order, so the search's additive losses
//! are re-measured: around the dense model, then around the best plan found, each head's rule is
//! swapped between its narrowest and full, one at a time, and the change of the real loss replaces
//! the head's predicted total at the lengths next to the measured one. The influence keeps only its
//! shape over spans. The search then runs again. A plan is kept only if its measured loss is lower.
//!
//! Single heads and many plans are measured on a part of the items (the *probe*) that has about as
//! many tokens at each length.

use std::collections::{BTreeMap, HashMap};
use std::time::{Duration, Instant};

use moa_core::{AtLength, ElasticRule, ModelShape, Plan, PlanRequest, Profile, Trial};

use crate::decoder::model::Decoder;
use crate::device::Math;
use crate::find_plan::probe::groups;
use crate::find_plan::profile::Item;
use crate::progress::{Progress, Stage};
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
    /// Loss of the best plan before refinement.
    pub start_loss: f64,
    /// Loss of dense attention.
    pub dense_loss: f64,
    /// Plans measured.
    pub evaluations: usize,
    /// Wall time of the refinement, in seconds.
    pub seconds: f64,
}

/// Measures plans on items, once each.
struct Measure<'a, D: Math> {
    model: &'a Decoder<D>,
    items: &'a BTreeMap<usize, Vec<Item>>,
    probe: BTreeMap<usize, Vec<Item>>,
    known: HashMap<String, Vec<AtLength>>,
    /// What was predicted and measured of plans, at the shortest length.
    trials: Vec<Trial>,
    /// Plans measured, on all items or on the probe.
    done: usize,
    budget: usize,
    progress: &'a mut dyn Progress,
    /// Measurements that `progress` is told to expect.
    expected: usize,
}

impl<D: Math> Measure<'_, D> {
    fn losses(&mut self, plan: &Plan) -> Result<Vec<AtLength>> {
        let key = plan.rules().iter().map(|r| format!("{:?}", r.lines())).collect::<String>();
        if let Some(losses) = self.known.get(&key) {
            return Ok(losses.clone());
        }
        let losses = measured_losses(self.model, self.items, plan)?;
        self.count()?;
        self.known.insert(key, losses.clone());
        Ok(losses)
    }

    fn loss(&mut self, plan: &Plan) -> Result<f64> {
        Ok(mean(&self.losses(plan)?))
    }

    /// The plan with the lowest loss. Of several, all are measured on the probe and the two best of
    /// those on all items. `round` is for the record of trials.
    fn best(&mut self, round: usize, mut plans: Vec<Plan>) -> Result<Option<(f64, Plan)>> {
        let screens = plans.len() > 2;
        if screens {
            let mut screened = Vec::with_capacity(plans.len());
            for plan in plans {
                let losses = measured_losses(self.model, &self.probe, &plan)?;
                self.count()?;
                self.trials.extend(plan.provenance.trial(round, losses[0]));
                screened.push((mean(&losses), plan));
            }
            screened.sort_by(|a, b| a.0.total_cmp(&b.0));
            plans = screened.into_iter().take(2).map(|(_, plan)| plan).collect();
        }
        let mut best: Option<(f64, Plan)> = None;
        for plan in plans {
            let loss = self.loss(&plan)?;
            if !screens {
                let shortest = self.losses(&plan)?[0];
                self.trials.extend(plan.provenance.trial(round, shortest));
            }
            if best.as_ref().is_none_or(|b| loss < b.0) {
                best = Some((loss, plan));
            }
        }
        Ok(best)
    }

    fn count(&mut self) -> Result<()> {
        self.done += 1;
        self.progress.advance(Stage::Measure, self.done.min(self.expected), self.expected)
    }

    fn left(&self) -> usize {
        self.budget.saturating_sub(self.done)
    }
}

fn mean(losses: &[AtLength]) -> f64 {
    losses.iter().map(|l| l.value).sum::<f64>() / losses.len() as f64
}

/// At each length the first items that together have about as many tokens as those of the shortest
/// length, but at least one group of items that begin alike.
fn probe(items: &BTreeMap<usize, Vec<Item>>) -> BTreeMap<usize, Vec<Item>> {
    let shortest = items.iter().next().map_or(0, |(length, own)| length * groups(own).count());
    let first = |(&length, own): (&usize, &Vec<Item>)| {
        let some = (shortest as f64 / length as f64).round().max(1.0) as usize;
        (length, groups(own).take(some).flatten().cloned().collect())
    };
    items.iter().map(first).collect()
}

/// Mean response loss of a plan at each length.
///
/// # Errors
/// As [`Decoder::response_loss`].
pub fn measured_losses<D: Math>(
    model: &Decoder<D>,
    items: &BTreeMap<usize, Vec<Item>>,
    plan: &Plan,
) -> Result<Vec<AtLength>> {
    items
        .iter()
        .map(|(&length, items)| {
            Ok(AtLength { length, value: model.response_loss(items, plan, length)? })
        })
        .collect()
}

/// Improves on `starts` (never returns a plan with a higher measured loss than the best of them),
/// with about `evaluations` measurements: of plans on all `items`, and of single heads on some of them.
///
/// # Errors
/// As [`Decoder::response_loss`] and [`PlanRequest::search`]; [`Error::Cancelled`].
pub fn refine<D: Math>(
    model: &Decoder<D>,
    items: &BTreeMap<usize, Vec<Item>>,
    starts: &[Plan],
    request: &PlanRequest,
    profile: &Profile,
    evaluations: usize,
    progress: &mut dyn Progress,
) -> Result<Refined> {
    let begin = Instant::now();
    let Some(first) = starts.first() else {
        return Err(Error::invalid("plans", "at least one", 0));
    };
    let mut measure = Measure {
        model,
        items,
        probe: probe(items),
        known: HashMap::new(),
        trials: Vec::new(),
        done: 0,
        budget: evaluations,
        progress,
        expected: evaluations.max(starts.len() + 1),
    };
    let dense = full_plan(first, model.shape())?;
    let dense_loss = measure.loss(&dense)?;
    let Some(mut best) = measure.best(0, starts.to_vec())? else {
        return Err(Error::invalid("plans", "at least one", 0));
    };
    let start_loss = best.0;
    let lengths = request.objective_lengths(profile);
    let measured: Vec<usize> = items.keys().copied().collect();
    let mut table = Table::new(request, profile, &lengths, &measured)?;
    // Heights are measured to a few percent at best: proofs beyond that are wasted.
    let mut request = request.clone();
    request.solver.target_gap = request.solver.target_gap.max(1e-3);
    request.solver.time_limit = request.solver.time_limit.min(Duration::from_secs(2));
    request.solver.max_plans = request.solver.max_plans.min(4);
    request.solver.intervals = request.solver.intervals.min(2);
    let mut around = dense;
    let (mut stalled, mut round) = (0, 0);
    while measure.left() > 0 && best.0 > dense_loss + CLOSE && stalled < 3 {
        table.probe(&mut measure, &around)?;
        let found = request.search(model.shape(), &lengths, table.losses())?;
        let fingerprint = first.fingerprint().map(str::to_string);
        let plans = found.plans.into_iter().map(|p| p.with_fingerprint(fingerprint.clone()));
        round += 1;
        let Some((loss, plan)) = measure.best(round, plans.collect())? else { break };
        stalled = if loss < best.0 - 1e-4 { 0 } else { stalled + 1 };
        if loss < best.0 {
            best = (loss, plan.clone());
        }
        // Linearise where the search went, even if it was worse: that is where it was wrong.
        around = if stalled > 1 { best.1.clone() } else { plan };
    }
    let mut plan = best.1;
    plan.provenance = starts[0].provenance.clone();
    plan.provenance.measured_losses = measure.losses(&plan)?;
    plan.provenance.predicted_losses.clear();
    plan.provenance.trials = measure.trials;
    Ok(Refined {
        plan,
        loss: best.0,
        start_loss,
        dense_loss,
        evaluations: measure.done,
        seconds: begin.elapsed().as_secs_f64(),
    })
}

fn full_plan(like: &Plan, shape: ModelShape) -> Result<Plan> {
    let rules = vec![ElasticRule::FULL.into(); shape.total_kv_heads()];
    Ok(Plan::new(shape, like.sink(), like.min_span(), rules)?)
}

/// Additive losses `[length][head][candidate]`: a shape from influence, a height from measurement.
struct Table {
    heads: usize,
    candidates: usize,
    /// The candidate that keeps least.
    narrow: ElasticRule,
    shape: Vec<f64>,
    /// `[measured length][head]`.
    height: Vec<Vec<f64>>,
    /// For each length of the search, the measured one whose heights it takes.
    nearest: Vec<usize>,
}

impl Table {
    fn new(
        request: &PlanRequest,
        profile: &Profile,
        lengths: &[usize],
        measured: &[usize],
    ) -> Result<Self> {
        let (heads, candidates) = (profile.shape.total_kv_heads(), request.candidates.len());
        let mut shape = request.predicted_losses(profile, lengths)?;
        for (row, values) in shape.chunks_mut(candidates).enumerate() {
            let length = lengths[row / heads];
            let kept: Vec<f64> = request
                .candidates
                .iter()
                .map(|rule| rule.span(length, request.min_span) as f64 / length as f64)
                .collect();
            let narrow = (0..candidates).min_by(|a, b| kept[*a].total_cmp(&kept[*b])).unwrap_or(0);
            let (total, least) = (values[narrow], kept[narrow]);
            for (value, kept) in values.iter_mut().zip(kept) {
                // Half influence, half "what is asked for lies anywhere": influence of a head that
                // others hide has noise for a shape.
                let anywhere = (1.0 - kept) / (1.0 - least).max(1e-9);
                let predicted =
                    if total > 0.0 { (*value / total).clamp(0.0, 1.0) } else { anywhere };
                *value = 0.5 * (predicted + anywhere);
            }
        }
        let nearest = |&length: &usize| {
            let distance = |i: &usize| (measured[*i] as f64 / length as f64).ln().abs();
            let place = (0..measured.len()).min_by(|a, b| distance(a).total_cmp(&distance(b)));
            place.unwrap_or(0)
        };
        let nearest = lengths.iter().map(nearest).collect();
        let height = vec![vec![0.0; heads]; measured.len()];
        let longest = lengths.iter().copied().max().unwrap_or(1);
        let span = |rule: &&ElasticRule| rule.span(longest, request.min_span);
        let narrow = ElasticRule::fixed(request.min_span);
        let narrow = request.candidates.iter().min_by_key(span).copied().unwrap_or(narrow);
        Ok(Self { heads, candidates, narrow, shape, height, nearest })
    }

    /// Measures every head's swap around `plan`, on the probe.
    fn probe<D: Math>(&mut self, measure: &mut Measure<'_, D>, plan: &Plan) -> Result<()> {
        let Some(&length) = measure.probe.keys().next() else { return Ok(()) };
        let kv_heads = plan.shape().kv_heads;
        let mut is_wide = Vec::with_capacity(self.heads);
        let mut variants = Vec::with_capacity(self.heads);
        for head in 0..self.heads {
            let span = plan.rules()[head].span(length, plan.sink(), plan.min_span()).total();
            is_wide.push(2 * span > length);
            let rule = if is_wide[head] { self.narrow } else { ElasticRule::FULL };
            let (layer, head) = (head / kv_heads, head % kv_heads);
            variants.push((layer, plan.clone().with_rule(layer, head, rule.into())?));
        }
        for (heights, (&length, items)) in self.height.iter_mut().zip(&measure.probe) {
            let (base, losses) = measure.model.variant_losses(items, plan, &variants, length)?;
            for ((height, loss), is_wide) in heights.iter_mut().zip(losses).zip(&is_wide) {
                let now = if *is_wide { loss - base } else { base - loss };
                // A head that mattered around one plan may be covered by another around the next.
                *height = height.max(now) * 0.5 + now.max(0.0) * 0.5;
            }
        }
        (0..self.heads).try_for_each(|_| measure.count())
    }

    fn losses(&self) -> Vec<f64> {
        let smallest = 1e-6;
        let mut losses = Vec::with_capacity(self.shape.len());
        for (length, &nearest) in self.nearest.iter().enumerate() {
            for head in 0..self.heads {
                let row = (length * self.heads + head) * self.candidates;
                let height = self.height[nearest][head].max(smallest);
                losses.extend(self.shape[row..row + self.candidates].iter().map(|s| s * height));
            }
        }
        losses
    }
}
