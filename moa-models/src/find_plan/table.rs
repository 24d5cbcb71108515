//! What single heads cost, as measured around the plans at hand, for a search whose losses are additive.

use moa_core::{ElasticRule, Plan, PlanRequest, Profile};

use crate::Result;
use crate::device::Math;
use crate::find_plan::measure::{Effects, Measure};

/// A height is no less: of heads that do nothing those that keep more are better still.
const LEAST: f64 = 1e-6;

/// Additive losses `[length][head][candidate]` of one kind: a shape from the profile, a height from
/// measurement.
struct Channel {
    shape: Vec<f64>,
    /// Lengths that heights are measured at.
    measured: Vec<usize>,
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
        let height = vec![vec![0.0; heads]; measured.len()];
        Self { shape, measured: measured.to_vec(), height, nearest }
    }

    /// Takes the losses of a plan and of each head's swap at this length.
    fn measure(&mut self, length: usize, base: f64, swapped: &[f64], is_wide: &[bool]) {
        let Some(index) = self.measured.iter().position(|l| *l == length) else { return };
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
            let height = self.height[self.nearest[row / heads]][row % heads].max(LEAST) * weight;
            losses.iter_mut().zip(shape).for_each(|(loss, shape)| *loss += shape * height);
        }
    }
}

/// What single heads cost: their answers and the text.
pub(super) struct Table {
    heads: usize,
    candidates: usize,
    /// The candidate that keeps least.
    narrow: ElasticRule,
    /// The share that it keeps at each length of the search, by length.
    least: Vec<(usize, f64)>,
    response: Channel,
    text: Channel,
}

/// What text loses of a head's height where the head keeps `kept` of the context: text needs what is near most.
fn text_shape(kept: f64, least: f64) -> f64 {
    let hidden = ((1.0 - kept) / (1.0 - least).max(1e-9)).clamp(0.0, 1.0);
    hidden * hidden
}

impl Table {
    /// Of nothing measured yet; responses will be measured at the lengths `measured`, texts `of_texts`.
    pub(super) fn new(
        request: &PlanRequest,
        profile: &Profile,
        lengths: &[usize],
        measured: &[usize],
        of_texts: &[usize],
    ) -> Result<Self> {
        let (heads, candidates) = (profile.shape().total_kv_heads(), request.candidates.len());
        let mut response = request.predicted_losses(profile, lengths)?;
        let mut text = Vec::with_capacity(response.len());
        let mut of_narrowest = Vec::new();
        for (row, response) in response.chunks_mut(candidates).enumerate() {
            let length = lengths[row / heads];
            let kept: Vec<f64> = request
                .candidates
                .iter()
                .map(|rule| rule.span(length, request.min_span) as f64 / length as f64)
                .collect();
            let narrow = (0..candidates).min_by(|a, b| kept[*a].total_cmp(&kept[*b])).unwrap_or(0);
            let (total, least) = (response[narrow], kept[narrow]);
            if row % heads == 0 {
                of_narrowest.push((length, least));
            }
            for (response, kept) in response.iter_mut().zip(kept) {
                let anywhere = (1.0 - kept) / (1.0 - least).max(1e-9);
                let predicted =
                    if total > 0.0 { (*response / total).clamp(0.0, 1.0) } else { anywhere };
                // Half influence, half "what is asked for lies anywhere": influence of a head that
                // others hide has noise for a shape.
                *response = 0.5 * (predicted + anywhere);
                text.push(text_shape(kept, least));
            }
        }
        let longest = lengths.iter().copied().max().unwrap_or(1);
        let span = |rule: &&ElasticRule| rule.span(longest, request.min_span);
        let narrow = ElasticRule::fixed(request.min_span);
        let narrow = request.candidates.iter().min_by_key(span).copied().unwrap_or(narrow);
        let response = Channel::new(heads, response, lengths, measured);
        let text = Channel::new(heads, text, lengths, of_texts);
        Ok(Self { heads, candidates, narrow, least: of_narrowest, response, text })
    }

    /// Measures every head's swap around `plan`, on the probe.
    pub(super) fn probe<D: Math>(
        &mut self,
        measure: &mut Measure<'_, D>,
        plan: &Plan,
    ) -> Result<()> {
        let Some(length) = measure.probe_lengths(false).first().copied() else { return Ok(()) };
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
        for Effects { is_text, length, base, losses } in measure.effects(plan, &variants)? {
            let channel = if is_text { &mut self.text } else { &mut self.response };
            channel.measure(length, base, &losses, &is_wide);
        }
        Ok(())
    }

    /// What a plan does to text by the additive losses, in the sum over lengths: any plan, not only one of
    /// candidates.
    pub(super) fn text_of(&self, plan: &Plan) -> f64 {
        let mut sum = 0.0;
        for (at, &(length, least)) in self.least.iter().enumerate() {
            let Some(heights) = self.text.nearest.get(at).and_then(|at| self.text.height.get(*at))
            else {
                continue;
            };
            for (rule, height) in plan.rules().iter().zip(heights) {
                let kept =
                    rule.span(length, plan.sink(), plan.min_span()).total() as f64 / length as f64;
                sum += height.max(LEAST) * text_shape(kept, least);
            }
        }
        sum
    }

    /// Additive losses `[length][head][candidate]`, text weighted.
    pub(super) fn losses(&self, text_weight: f64) -> Vec<f64> {
        let mut losses = vec![0.0; self.response.shape.len()];
        self.response.add_to(&mut losses, self.candidates, 1.0);
        self.text.add_to(&mut losses, self.candidates, text_weight);
        losses
    }

    /// The same in the mean over lengths, `[head][candidate]`.
    pub(super) fn mean_losses(&self, text_weight: f64) -> Vec<f64> {
        let losses = self.losses(text_weight);
        let rows = self.heads * self.candidates;
        let lengths = losses.len() / rows.max(1);
        let mut mean = vec![0.0; rows];
        for of_length in losses.chunks(rows.max(1)) {
            mean.iter_mut().zip(of_length).for_each(|(sum, loss)| *sum += loss / lengths as f64);
        }
        mean
    }
}
