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
use crate::find_plan::exchange::exchange;
use crate::find_plan::probe::{Text, groups};
use crate::find_plan::profile::Item;
use crate::progress::{Progress, Stage};
use crate::{Error, Result};

/// A loss this close to the dense model's, in nats per token, is as good.
const CLOSE: f64 = 2e-3;

/// What plans are judged by.
#[derive(Clone, Copy, Debug)]
pub struct Evidence<'a> {
    /// Items whose responses should stay as likely as under dense attention, by the length that their
    /// sequences are opened for.
    pub items: &'a BTreeMap<usize, Vec<Item>>,
    /// Running text whose predictions should stay what they are under dense attention; may be empty.
    pub texts: &'a BTreeMap<usize, Vec<Item>>,
    /// How much divergence on text counts.
    pub text_goal: TextGoal<'a>,
}

/// How much divergence on running text counts beside the loss of responses.
#[derive(Clone, Copy, Debug)]
pub enum TextGoal<'a> {
    /// A nat of divergence as much as this many nats of response loss.
    Weight(f64),
    /// The divergence should not exceed that of this plan, usually the uniform one of the same size; below
    /// that responses alone count.
    NoWorseThan(&'a Plan),
}

/// What was measured of a plan.
#[derive(Clone, Debug, PartialEq)]
pub struct Measured {
    /// Mean response loss at each length of the items, in nats per token.
    pub response: Vec<AtLength>,
    /// Mean Kullback-Leibler divergence from the dense model's predictions at each length of the texts,
    /// in nats per token.
    pub divergence: Vec<AtLength>,
}

impl Measured {
    /// Mean response loss over the lengths.
    pub fn response_loss(&self) -> f64 {
        mean(&self.response)
    }

    /// Mean divergence over the lengths; 0 without texts.
    pub fn text_divergence(&self) -> f64 {
        mean(&self.divergence)
    }
}

/// What a plan's measurements come to.
#[derive(Clone, Copy, Debug)]
enum Merit {
    Weight(f64),
    /// Divergence at most this much; what is beyond costs [`EXCESS`] nats for each time the limit.
    Limit(f64),
}

/// Nats of response loss that a divergence of twice its limit costs.
const EXCESS: f64 = 0.25;

impl Merit {
    /// Smaller is better.
    fn of(self, measured: &Measured) -> f64 {
        let divergence = measured.text_divergence();
        let text = match self {
            Self::Weight(weight) => weight * divergence,
            Self::Limit(limit) => EXCESS * (divergence / limit.max(1e-9) - 1.0).max(0.0),
        };
        measured.response_loss() + text
    }
}

/// The best plan that [`refine`] measured, with the losses before and after it.
#[derive(Clone, Debug, PartialEq)]
pub struct Refined {
    /// The best plan.
    pub plan: Plan,
    /// Its mean response loss over the measured items, in nats per token.
    pub loss: f64,
    /// Its mean divergence from the dense model on running text, in nats per token; 0 without text.
    pub divergence: f64,
    /// Response loss of the best plan before refinement.
    pub start_loss: f64,
    /// Divergence of the best plan before refinement.
    pub start_divergence: f64,
    /// Response loss of dense attention.
    pub dense_loss: f64,
    /// Plans measured.
    pub evaluations: usize,
    /// Wall time of the refinement, in seconds.
    pub seconds: f64,
}

/// Measures plans on items and texts, once each.
pub(super) struct Measure<'a, D: Math> {
    model: &'a Decoder<D>,
    items: &'a BTreeMap<usize, Vec<Item>>,
    texts: BTreeMap<usize, Vec<Text>>,
    merit: Merit,
    /// The same on the probe.
    probe_merit: Merit,
    probe: BTreeMap<usize, Vec<Item>>,
    known: HashMap<String, Measured>,
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
    fn losses(&mut self, plan: &Plan) -> Result<Measured> {
        let key = plan.rules().iter().map(|r| format!("{:?}", r.lines())).collect::<String>();
        if let Some(losses) = self.known.get(&key) {
            return Ok(losses.clone());
        }
        let response = measured_losses(self.model, self.items, plan)?;
        let losses = Measured { response, divergence: self.divergence(plan, false)? };
        self.count()?;
        self.known.insert(key, losses.clone());
        Ok(losses)
    }

    /// Divergence on all texts, or on the first of each length.
    fn divergence(&self, plan: &Plan, first: bool) -> Result<Vec<AtLength>> {
        let measured = |(&length, texts): (&usize, &Vec<Text>)| {
            let some = if first { texts.len().min(TEXT_PROBE) } else { texts.len() };
            let value = self.model.divergences(&texts[..some], plan, &[], length)?.0;
            Ok(AtLength { length, value })
        };
        self.texts.iter().map(measured).collect()
    }

    fn loss(&mut self, plan: &Plan) -> Result<f64> {
        Ok(self.merit.of(&self.losses(plan)?))
    }

    /// The plan with the lowest loss. Of several, all are measured on the probe and the two best of
    /// those on all items. `round` is for the record of trials.
    pub(super) fn best(
        &mut self,
        round: usize,
        mut plans: Vec<Plan>,
    ) -> Result<Option<(f64, Plan)>> {
        let screens = plans.len() > 2;
        if screens {
            let mut screened = Vec::with_capacity(plans.len());
            for plan in plans {
                let response = measured_losses(self.model, &self.probe, &plan)?;
                let losses = Measured { response, divergence: self.divergence(&plan, true)? };
                self.count()?;
                self.trials.extend(plan.provenance.trial(round, losses.response[0]));
                screened.push((self.probe_merit.of(&losses), plan));
            }
            screened.sort_by(|a, b| a.0.total_cmp(&b.0));
            plans = screened.into_iter().take(2).map(|(_, plan)| plan).collect();
        }
        let mut best: Option<(f64, Plan)> = None;
        for plan in plans {
            let loss = self.loss(&plan)?;
            if !screens {
                let shortest = self.losses(&plan)?.response[0];
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

    /// Losses of `plan` and of `variants`, plans that differ from it only in the layer given, on the
    /// probe, a nat of divergence as much as `weight` of response loss.
    pub(super) fn around(
        &mut self,
        plan: &Plan,
        variants: &[(usize, Plan)],
        weight: f64,
    ) -> Result<(f64, Vec<f64>)> {
        let (mut base, mut losses) = (0.0, vec![0.0; variants.len()]);
        let mut add = |(of_plan, of_variants): (f64, Vec<f64>), share: f64| {
            base += share * of_plan;
            losses.iter_mut().zip(of_variants).for_each(|(sum, loss)| *sum += share * loss);
        };
        for (&length, items) in &self.probe {
            let share = 1.0 / self.probe.len() as f64;
            add(self.model.variant_losses(items, plan, variants, length)?, share);
        }
        for (&length, texts) in &self.texts {
            let some = &texts[..texts.len().min(TEXT_PROBE)];
            let share = weight / self.texts.len() as f64;
            add(self.model.divergences(some, plan, variants, length)?, share);
        }
        (0..variants.len()).try_for_each(|_| self.count())?;
        Ok((base, losses))
    }

    pub(super) fn left(&self) -> usize {
        self.budget.saturating_sub(self.done)
    }
}

/// Texts of a length that single heads and many plans are measured on.
const TEXT_PROBE: usize = 2;

/// 0 for none.
fn mean(losses: &[AtLength]) -> f64 {
    losses.iter().map(|l| l.value).sum::<f64>() / losses.len().max(1) as f64
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
/// with about `evaluations` measurements: of plans on all of the evidence, and of single heads on some
/// of it. A plan's loss is its response loss and, weighted, its divergence on running text.
///
/// # Errors
/// As [`Decoder::response_loss`] and [`PlanRequest::search`]; [`Error::Cancelled`].
pub fn refine<D: Math>(
    model: &Decoder<D>,
    evidence: Evidence<'_>,
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
    let Evidence { items, texts, text_goal } = evidence;
    let texts = texts
        .iter()
        .map(|(&length, own)| Ok((length, model.texts(own, length)?)))
        .collect::<Result<_>>()?;
    let mut measure = Measure {
        model,
        items,
        texts,
        merit: Merit::Weight(0.0),
        probe_merit: Merit::Weight(0.0),
        probe: probe(items),
        known: HashMap::new(),
        trials: Vec::new(),
        done: 0,
        budget: evaluations,
        progress,
        expected: evaluations.max(starts.len() + 1),
    };
    let dense = full_plan(first, model.shape())?;
    let dense_measured = measure.losses(&dense)?;
    // How much text counts in the search, whose losses are additive.
    let mut text_weight = 1.0;
    match text_goal {
        TextGoal::Weight(weight) => {
            text_weight = weight;
            measure.merit = Merit::Weight(weight);
            measure.probe_merit = measure.merit;
        }
        TextGoal::NoWorseThan(plan) => {
            measure.merit = Merit::Limit(measure.losses(plan)?.text_divergence());
            measure.probe_merit = Merit::Limit(mean(&measure.divergence(plan, true)?));
        }
    }
    let dense_loss = measure.merit.of(&dense_measured);
    let Some(mut best) = measure.best(0, starts.to_vec())? else {
        return Err(Error::invalid("plans", "at least one", 0));
    };
    let start = measure.losses(&best.1)?;
    let lengths = request.objective_lengths(profile);
    let measured: Vec<usize> = items.keys().copied().collect();
    let of_texts: Vec<usize> = measure.texts.keys().copied().collect();
    let mut table = Table::new(request, profile, &lengths, &measured, &of_texts)?;
    // Heights are measured to a few percent at best: proofs beyond that are wasted.
    let mut request = request.clone();
    request.solver.target_gap = request.solver.target_gap.max(1e-3);
    request.solver.time_limit = request.solver.time_limit.min(Duration::from_secs(2));
    request.solver.max_plans = request.solver.max_plans.min(4);
    request.solver.intervals = request.solver.intervals.min(2);
    let mut around = dense;
    // Most of the budget finds the heads that matter, the rest weighs spans against each other.
    measure.budget = evaluations - evaluations * 2 / 5;
    let (mut stalled, mut round) = (0, 0);
    while measure.left() > 0 && best.0 > dense_loss + CLOSE && stalled < 3 {
        table.probe(&mut measure, &around)?;
        let found = request.search(model.shape(), &lengths, table.losses(text_weight))?;
        let fingerprint = first.fingerprint().map(str::to_string);
        let plans = found.plans.into_iter().map(|p| p.with_fingerprint(fingerprint.clone()));
        round += 1;
        let Some((loss, plan)) = measure.best(round, plans.collect())? else { break };
        if let Merit::Limit(limit) = measure.merit {
            // The weight that makes the search end just below the limit is found on the way.
            let share = measure.losses(&plan)?.text_divergence() / limit.max(1e-9);
            text_weight = (text_weight * share.clamp(0.7, 2.0)).clamp(1e-3, 1e3);
        }
        stalled = if loss < best.0 - 1e-4 { 0 } else { stalled + 1 };
        if loss < best.0 {
            best = (loss, plan.clone());
        }
        // Linearise where the search went, even if it was worse: that is where it was wrong.
        around = if stalled > 1 { best.1.clone() } else { plan };
    }
    if best.0 > dense_loss + CLOSE {
        measure.budget = evaluations.max(measure.done + evaluations * 2 / 5);
        let weight = match measure.merit {
            Merit::Weight(weight) => weight,
            Merit::Limit(limit) => EXCESS / limit.max(1e-9),
        };
        best = exchange(&mut measure, &request, best, weight)?;
    }
    let mut plan = best.1;
    plan.provenance = starts[0].provenance.clone();
    let losses = measure.losses(&plan)?;
    plan.provenance.measured_losses = losses.response.clone();
    plan.provenance.measured_divergences = losses.divergence.clone();
    plan.provenance.predicted_losses.clear();
    plan.provenance.trials = measure.trials;
    Ok(Refined {
        plan,
        loss: losses.response_loss(),
        divergence: losses.text_divergence(),
        start_loss: start.response_loss(),
        start_divergence: start.text_divergence(),
        dense_loss: dense_measured.response_loss(),
        evaluations: measure.done,
        seconds: begin.elapsed().as_secs_f64(),
    })
}

fn full_plan(like: &Plan, shape: ModelShape) -> Result<Plan> {
    let rules = vec![ElasticRule::FULL.into(); shape.total_kv_heads()];
    Ok(Plan::new(shape, like.sink(), like.min_span(), rules)?)
}

/// Additive losses `[length][head][candidate]` of one kind: a shape from the profile, a height from
/// measurement.
struct Channel {
    shape: Vec<f64>,
    /// `[measured length][head]`.
    height: Vec<Vec<f64>>,
    /// For each length of the search, the measured one whose heights it takes.
    nearest: Vec<usize>,
}

impl Channel {
    fn new(heads: usize, shape: Vec<f64>, lengths: &[usize], measured: &[usize]) -> Self {
        let nearest = |&length: &usize| {
            let distance = |i: &usize| (measured[*i] as f64 / length as f64).ln().abs();
            let place = (0..measured.len()).min_by(|a, b| distance(a).total_cmp(&distance(b)));
            place.unwrap_or(0)
        };
        let nearest = lengths.iter().map(nearest).collect();
        Self { shape, height: vec![vec![0.0; heads]; measured.len()], nearest }
    }

    /// Takes the losses of a plan and of each head's swap at the measured length of this index.
    fn measure(&mut self, index: usize, base: f64, swapped: &[f64], is_wide: &[bool]) {
        for ((height, loss), is_wide) in self.height[index].iter_mut().zip(swapped).zip(is_wide) {
            let now = if *is_wide { loss - base } else { base - loss };
            // A head that mattered around one plan may be covered by another around the next.
            *height = height.max(now) * 0.5 + now.max(0.0) * 0.5;
        }
    }

    fn add_to(&self, losses: &mut [f64], candidates: usize, weight: f64) {
        let Some(heads) = self.height.first().map(Vec::len) else { return };
        let rows = losses.chunks_mut(candidates).zip(self.shape.chunks(candidates));
        for (row, (losses, shape)) in rows.enumerate() {
            let height = self.height[self.nearest[row / heads]][row % heads].max(1e-6) * weight;
            losses.iter_mut().zip(shape).for_each(|(loss, shape)| *loss += shape * height);
        }
    }
}

/// What single heads cost: their answers and the text.
struct Table {
    heads: usize,
    candidates: usize,
    /// The candidate that keeps least.
    narrow: ElasticRule,
    response: Channel,
    text: Channel,
}

impl Table {
    fn new(
        request: &PlanRequest,
        profile: &Profile,
        lengths: &[usize],
        measured: &[usize],
        of_texts: &[usize],
    ) -> Result<Self> {
        let (heads, candidates) = (profile.shape.total_kv_heads(), request.candidates.len());
        let mut response = request.predicted_losses(profile, lengths)?;
        let mut text = Vec::with_capacity(response.len());
        for (row, response) in response.chunks_mut(candidates).enumerate() {
            let length = lengths[row / heads];
            let kept: Vec<f64> = request
                .candidates
                .iter()
                .map(|rule| rule.span(length, request.min_span) as f64 / length as f64)
                .collect();
            let narrow = (0..candidates).min_by(|a, b| kept[*a].total_cmp(&kept[*b])).unwrap_or(0);
            let (total, least) = (response[narrow], kept[narrow]);
            for (response, kept) in response.iter_mut().zip(kept) {
                let anywhere = (1.0 - kept) / (1.0 - least).max(1e-9);
                let predicted =
                    if total > 0.0 { (*response / total).clamp(0.0, 1.0) } else { anywhere };
                // Half influence, half "what is asked for lies anywhere": influence of a head that
                // others hide has noise for a shape.
                *response = 0.5 * (predicted + anywhere);
                // Text needs what is near most.
                text.push(anywhere * anywhere);
            }
        }
        let longest = lengths.iter().copied().max().unwrap_or(1);
        let span = |rule: &&ElasticRule| rule.span(longest, request.min_span);
        let narrow = ElasticRule::fixed(request.min_span);
        let narrow = request.candidates.iter().min_by_key(span).copied().unwrap_or(narrow);
        let response = Channel::new(heads, response, lengths, measured);
        let text = Channel::new(heads, text, lengths, of_texts);
        Ok(Self { heads, candidates, narrow, response, text })
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
        for (index, (&length, items)) in measure.probe.iter().enumerate() {
            let (base, losses) = measure.model.variant_losses(items, plan, &variants, length)?;
            self.response.measure(index, base, &losses, &is_wide);
        }
        for (index, (&length, texts)) in measure.texts.iter().enumerate() {
            let some = &texts[..texts.len().min(TEXT_PROBE)];
            let (base, losses) = measure.model.divergences(some, plan, &variants, length)?;
            self.text.measure(index, base, &losses, &is_wide);
        }
        (0..self.heads).try_for_each(|_| measure.count())
    }

    fn losses(&self, text_weight: f64) -> Vec<f64> {
        let mut losses = vec![0.0; self.response.shape.len()];
        self.response.add_to(&mut losses, self.candidates, 1.0);
        self.text.add_to(&mut losses, self.candidates, text_weight);
        losses
    }
}
