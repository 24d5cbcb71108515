//! What is measured of plans, piece by piece: a plan that is worse on the first pieces is not measured on the
//! others, and no plan is measured on a piece twice.

use std::collections::{BTreeMap, HashMap};
use std::time::Instant;

use moa_core::{AtLength, CacheType, Plan, Trial};

use crate::decoder::model::Decoder;
use crate::device::Math;
use crate::eval::agreement::Agreement;
use crate::find_plan::evidence::{Evidence, HeldOut, Measured, Merit, TextGoal};
use crate::find_plan::precision::typed;
use crate::find_plan::probe::{Text, Work, groups};
use crate::find_plan::profile::Item;
use crate::progress::{Progress, Stage};
use crate::{Error, Result};

/// A piece of the evidence that is measured as one.
struct Piece<'a> {
    length: usize,
    kind: Kind<'a>,
    work: Work,
    /// Whether single heads and all proposed plans are measured on it.
    is_probe: bool,
}

enum Kind<'a> {
    /// Items that begin alike.
    Responses(&'a [Item]),
    Text(Text),
}

impl Piece<'_> {
    fn is_text(&self) -> bool {
        matches!(self.kind, Kind::Text(_))
    }
}

/// Which pieces.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Scope {
    /// The shortest of the probe.
    Short,
    /// Those that single heads are measured on.
    Probe,
    All,
}

/// What changing single heads does to one kind of evidence at one length.
pub(super) struct Effects {
    pub(super) is_text: bool,
    pub(super) length: usize,
    /// Loss or divergence of the plan.
    pub(super) base: f64,
    /// The same of each variant.
    pub(super) losses: Vec<f64>,
}

/// Of several plans the one that measured best on the probe.
pub(super) struct Best {
    pub(super) plan: Plan,
    /// On all of the evidence; `None` if the probe showed no improvement on the incumbent.
    pub(super) loss: Option<f64>,
}

/// How much may be measured.
#[derive(Clone, Copy, Debug)]
pub(super) struct Effort {
    /// Plans, single heads included.
    pub(super) evaluations: usize,
    /// When everything is to be done.
    pub(super) deadline: Option<Instant>,
}

/// Seconds that measurements took, and their [`Work`].
#[derive(Clone, Copy, Debug, Default)]
struct Pace {
    seconds: f64,
    work: f64,
}

impl Pace {
    fn add(&mut self, begin: Instant, work: f64) {
        self.seconds += begin.elapsed().as_secs_f64();
        self.work += work;
    }
}

/// Measures plans.
pub(super) struct Measure<'a, D: Math> {
    model: &'a Decoder<D>,
    pieces: Vec<Piece<'a>>,
    merit: Merit,
    /// The same on the probe.
    probe_merit: Merit,
    /// Values of the pieces by plan.
    known: HashMap<String, Vec<Option<f64>>>,
    /// What was predicted and measured of plans, at the shortest length.
    pub(super) trials: Vec<Trial>,
    /// Plans measured, on all pieces or on some.
    pub(super) done: usize,
    budget: usize,
    /// When no further plan is to be measured.
    deadline: Option<Instant>,
    pace: Pace,
    /// The plan that says what text may suffer.
    limit: Option<&'a Plan>,
    held_out: &'a BTreeMap<usize, Vec<Item>>,
    /// That plan's agreement on held-out text of each length, once it is known.
    limit_held_out: Vec<Agreement>,
    /// Values of the pieces under dense attention, once they are known.
    dense: Option<Vec<Option<f64>>>,
    /// The type of all heads of plans that say none.
    cache_type: Option<CacheType>,
    progress: &'a mut dyn Progress,
    /// Measurements that `progress` is told to expect.
    expected: usize,
}

impl<'a, D: Math> Measure<'a, D> {
    pub(super) fn new(
        model: &'a Decoder<D>,
        evidence: Evidence<'a>,
        cache_type: Option<CacheType>,
        (expected, deadline): (usize, Option<Instant>),
        progress: &'a mut dyn Progress,
    ) -> Result<Self> {
        progress.advance(Stage::Measure, 0, expected)?;
        let layers = model.shape().layers;
        if evidence.items.is_empty() {
            return Err(Error::invalid("items", "some of a length", "none of any"));
        }
        let mut pieces = Vec::new();
        // Half of the shortest items, and of longer ones about as many tokens.
        let shortest = evidence.items.iter().next();
        let (shortest, contexts) =
            shortest.map_or((0, 0), |(length, own)| (*length, groups(own).count().div_ceil(2)));
        let mut taken = 0;
        for (&length, items) in evidence.items {
            if items.is_empty() {
                return Err(Error::invalid("items", format!("some of {length} tokens"), 0));
            }
            let mut own: Vec<&[Item]> = groups(items).collect();
            let share = shortest as f64 / length as f64;
            let probes = (share * contexts as f64).round().max(1.0) as usize;
            // Kinds of contexts come in turn: each length's few go on where the last one's ended.
            let turn = taken % own.len();
            own.rotate_left(turn);
            taken += probes;
            let of = |(at, group)| Piece {
                length,
                kind: Kind::Responses(group),
                work: Work::of_responses(group, layers),
                is_probe: at < probes,
            };
            pieces.extend(own.into_iter().enumerate().map(of));
        }
        let shortest = evidence.texts.keys().next().copied();
        for (&length, texts) in evidence.texts {
            for (at, text) in model.texts(texts, length)?.into_iter().enumerate() {
                // What text needs lies near: the shortest ones tell heads apart.
                let is_probe = Some(length) == shortest && at < TEXT_PROBE;
                let work = Work::of_text(&text, layers);
                pieces.push(Piece { length, kind: Kind::Text(text), work, is_probe });
            }
        }
        // What is cheap comes first: a plan that is bad there is not measured on the rest.
        pieces.sort_by_key(|piece| (piece.length, piece.is_text()));
        let (merit, known) = (Merit::Weight(0.0), HashMap::new());
        let limit = match evidence.text_goal {
            TextGoal::NoWorseThan(plan) => Some(plan),
            TextGoal::Weight(_) => None,
        };
        let mut measure = Self {
            model,
            pieces,
            merit,
            probe_merit: merit,
            known,
            trials: Vec::new(),
            done: 0,
            budget: usize::MAX,
            deadline,
            pace: Pace::default(),
            limit,
            held_out: evidence.held_out,
            limit_held_out: Vec::new(),
            dense: None,
            cache_type,
            progress,
            expected,
        };
        (measure.merit, measure.probe_merit) = match evidence.text_goal {
            TextGoal::Weight(weight) => (Merit::Weight(weight), Merit::Weight(weight)),
            TextGoal::NoWorseThan(plan) => {
                let mut limit = |scope| {
                    Ok::<_, Error>(Merit::Limit(measure.measured(plan, scope)?.text_divergence()))
                };
                (limit(Scope::All)?, limit(Scope::Probe)?)
            }
        };
        Ok(measure)
    }

    /// The model that plans are measured on.
    pub(super) fn model(&self) -> &'a Decoder<D> {
        self.model
    }

    /// Losses of dense attention in the device's own type, as which texts are what they should be.
    pub(super) fn measure_dense(&mut self) -> Result<Measured> {
        let dense = Plan::full(self.model.shape())?;
        let mut values = Vec::with_capacity(self.pieces.len());
        for piece in &self.pieces {
            let begin = Instant::now();
            values.push(Some(match piece.kind {
                Kind::Text(_) => 0.0,
                Kind::Responses(_) => {
                    let loss = self.model.piece_losses(piece, &dense, &[])?.0;
                    self.pace.add(begin, piece.work.plan);
                    loss
                }
            }));
        }
        let measured = sums(&self.pieces, &values, |_| true);
        self.dense = Some(values);
        self.count(1)?;
        Ok(measured)
    }

    /// The plan whose divergence on text is the limit, if there is one.
    pub(super) fn limit_plan(&self) -> Option<&'a Plan> {
        self.limit
    }

    /// What a plan does to held-out text of each length.
    pub(super) fn held_out(&mut self, plan: &Plan) -> Result<Vec<HeldOut>> {
        if self.held_out.is_empty() {
            return Ok(Vec::new());
        }
        let plan = &typed(plan, self.cache_type)?;
        let limit = self.limit.map(|limit| typed(limit, self.cache_type)).transpose()?;
        let unknown = limit.as_ref().filter(|_| self.limit_held_out.is_empty());
        let plans: Vec<&Plan> = [plan].into_iter().chain(unknown).collect();
        let mut own = Vec::new();
        for (&length, items) in self.held_out {
            let of_plans = self.model.agreements(items, &plans, length, self.progress)?;
            let mut of_plans = of_plans.into_iter();
            own.extend(of_plans.next().map(|agreement| (length, agreement)));
            self.limit_held_out.extend(of_plans.next());
        }
        self.count(1)?;
        let limits = self.limit_held_out.iter().copied().map(Some).chain(std::iter::repeat(None));
        let of = |((length, plan), limit)| HeldOut { length, plan, limit };
        Ok(own.into_iter().zip(limits).map(of).collect())
    }

    /// Lets text suffer only the given share of what it might.
    pub(super) fn tighten(&mut self, share: f64) {
        for merit in [&mut self.merit, &mut self.probe_merit] {
            if let Merit::Limit(limit) = merit {
                *limit *= share;
            }
        }
    }

    /// How plans are judged on the probe.
    pub(super) fn probe_merit(&self) -> Merit {
        self.probe_merit
    }

    /// Lengths of the probe's items, or of its texts.
    pub(super) fn probe_lengths(&self, is_text: bool) -> Vec<usize> {
        let of_kind = self.pieces.iter().filter(|p| p.is_probe && p.is_text() == is_text);
        let mut lengths: Vec<usize> = of_kind.map(|p| p.length).collect();
        lengths.dedup();
        lengths
    }

    /// Sets the measurements that may be made from here on.
    pub(super) fn allow(&mut self, measurements: usize) {
        self.budget = self.done + measurements;
        self.expected = self.expected.max(self.budget);
    }

    pub(super) fn left(&self) -> usize {
        self.budget.saturating_sub(self.done)
    }

    /// Of `most` measurements those that the time is expected to be enough for, or a share of it, by the pace so far.
    pub(super) fn fitting(&self, most: usize, share: f64) -> Result<usize> {
        let Some(deadline) = self.deadline else { return Ok(most) };
        let work = |is_asked: fn(&Piece<'_>) -> bool, of: fn(&Work) -> f64| -> f64 {
            self.pieces.iter().filter(|piece| is_asked(piece)).map(|piece| of(&piece.work)).sum()
        };
        let variant = work(|piece| piece.is_probe, |work| work.variant);
        let plan = work(|piece| piece.is_probe, |work| work.plan);
        let each = (variant * (HEADS_A_PLAN - 1.0) + plan) / HEADS_A_PLAN;
        let tokens =
            |items: &Vec<Item>| items.iter().map(|item| item.inputs().len()).sum::<usize>();
        // Under dense attention, under the plan and under the one that is its limit.
        let held_out = 3.0 * self.held_out.values().map(tokens).sum::<usize>() as f64;
        let of_work = self.pace.seconds / self.pace.work.max(1.0);
        // Ranks measure different times.
        self.model.agree(|| {
            let left = deadline.saturating_duration_since(Instant::now()).as_secs_f64();
            let left = (share * left - held_out * of_work).max(0.0);
            let fitting = left / (each * of_work).max(1e-9);
            tracing::debug!(left, fitting, most, pace = ?self.pace, "time");
            Ok(most.min(fitting as usize))
        })
    }

    fn count(&mut self, plans: usize) -> Result<()> {
        self.done += plans;
        if let Some(deadline) = self.deadline
            && self.model.agree(|| Ok::<_, Error>(Instant::now() >= deadline))?
        {
            self.budget = self.budget.min(self.done);
        }
        self.progress.advance(Stage::Measure, self.done.min(self.expected), self.expected)
    }

    /// Losses of a plan on some or all pieces.
    pub(super) fn measured(&mut self, plan: &Plan, scope: Scope) -> Result<Measured> {
        Ok(self
            .measure(plan, scope, None)?
            .unwrap_or(Measured { response: vec![], divergence: vec![] }))
    }

    /// The same; `None` as soon as the plan cannot come to `limit` any more, if what is left were as under dense
    /// attention.
    fn measure(
        &mut self,
        plan: &Plan,
        scope: Scope,
        limit: Option<f64>,
    ) -> Result<Option<Measured>> {
        let plan = &typed(plan, self.cache_type)?;
        let key = key(plan);
        let known = self.known.get(&key).cloned();
        let mut is_new = known.is_none();
        let mut values = known.unwrap_or_else(|| vec![None; self.pieces.len()]);
        let mut is_hopeless = false;
        let answers = self.pieces.iter().filter(|p| p.is_probe && !p.is_text());
        let shortest = answers.map(|p| p.length).min().unwrap_or(usize::MAX);
        let asked = |piece: &Piece<'_>| match scope {
            Scope::Short => piece.is_probe && piece.length <= shortest,
            Scope::Probe => piece.is_probe,
            Scope::All => true,
        };
        for index in 0..self.pieces.len() {
            if values[index].is_some() || !asked(&self.pieces[index]) {
                continue;
            }
            if let (Some(limit), Some(dense)) = (limit, &self.dense) {
                let hoped: Vec<_> =
                    values.iter().zip(dense).map(|(own, dense)| own.or(*dense)).collect();
                is_hopeless = self.merit.of(&sums(&self.pieces, &hoped, asked)) >= limit;
                if is_hopeless {
                    break;
                }
            }
            let (piece, begin) = (&self.pieces[index], Instant::now());
            values[index] = Some(self.model.piece_losses(piece, plan, &[])?.0);
            self.pace.add(begin, piece.work.plan);
            is_new |= scope == Scope::All;
        }
        let measured = sums(&self.pieces, &values, asked);
        self.known.insert(key, values);
        if is_new {
            self.count(1)?;
        }
        Ok((!is_hopeless).then_some(measured))
    }

    /// What all of the evidence of a plan comes to, without what text may cost within its limit.
    pub(super) fn needed(&mut self, plan: &Plan) -> Result<f64> {
        let measured = self.measured(plan, Scope::All)?;
        Ok(self.merit.needed(&measured))
    }

    /// What all of the evidence of a plan comes to.
    pub(super) fn loss(&mut self, plan: &Plan) -> Result<f64> {
        Ok(self.merit.of(&self.measured(plan, Scope::All)?))
    }

    /// The same if it is below `limit`; infinity where it is not.
    fn loss_below(&mut self, plan: &Plan, limit: f64) -> Result<f64> {
        let measured = self.measure(plan, Scope::All, Some(limit))?;
        Ok(measured.map_or(f64::INFINITY, |measured| self.merit.of(&measured)))
    }

    /// The best of some plans on the probe, and its loss if it is better there than the incumbent. The next
    /// best one has its turn where the first does not keep that promise. `round` is for the record of trials.
    pub(super) fn best(
        &mut self,
        round: usize,
        plans: Vec<Plan>,
        incumbent: Option<&(f64, Plan)>,
    ) -> Result<Option<Best>> {
        // The better half on the shortest pieces goes on to the longer ones, which cost most.
        let mut screened = Vec::with_capacity(plans.len());
        for scope in [Scope::Short, Scope::Probe] {
            let plans = match scope {
                Scope::Short => plans.to_vec(),
                _ => std::mem::take(&mut screened).into_iter().map(|(_, plan)| plan).collect(),
            };
            for plan in plans {
                if !screened.is_empty() && self.left() == 0 {
                    break;
                }
                let measured = self.measured(&plan, scope)?;
                if scope == Scope::Short {
                    let first = measured.response.first().copied();
                    self.trials.extend(first.and_then(|loss| plan.provenance.trial(round, loss)));
                }
                screened.push((self.probe_merit.of(&measured), plan));
            }
            screened.sort_by(|a: &(f64, Plan), b| a.0.total_cmp(&b.0));
            if scope == Scope::Short {
                screened.truncate(screened.len().div_ceil(2).max(LEFT));
            }
        }
        let limit = match incumbent {
            Some((_, plan)) => self.probe_merit.of(&self.measured(plan, Scope::Probe)?) - LEAST,
            None => f64::INFINITY,
        };
        let mut best: Option<Best> = None;
        for (on_probe, plan) in screened.into_iter().take(2) {
            let known = incumbent.map_or(f64::INFINITY, |(known, _)| *known);
            let loss = if on_probe < limit { Some(self.loss_below(&plan, known)?) } else { None };
            if best
                .as_ref()
                .is_none_or(|best| loss.is_some_and(|l| best.loss.is_some_and(|b| l < b)))
            {
                best = Some(Best { plan, loss });
            }
            let is_better = |loss: f64| incumbent.is_some_and(|(known, _)| loss < known - LEAST);
            if loss.is_none_or(is_better) {
                break;
            }
        }
        Ok(best)
    }

    /// What `variants`, plans that differ from `plan` only in the layer given, do on the probe
    /// ([`Decoder::variant_losses`]).
    pub(super) fn effects(
        &mut self,
        plan: &Plan,
        variants: &[(usize, Plan)],
    ) -> Result<Vec<Effects>> {
        let plan = &typed(plan, self.cache_type)?;
        let typed =
            |(layer, variant): &(usize, Plan)| Ok((*layer, typed(variant, self.cache_type)?));
        let variants = &variants.iter().map(typed).collect::<Result<Vec<_>>>()?;
        let probe: Vec<&Piece<'_>> = self.pieces.iter().filter(|piece| piece.is_probe).collect();
        let kind = |piece: &Piece<'_>| (piece.length, piece.is_text());
        let (mut effects, mut read) = (Vec::new(), 0);
        // Of one kind at one length the pieces follow each other.
        for pieces in probe.chunk_by(|a, b| kind(a) == kind(b)) {
            let ((length, is_text), count) = (kind(pieces[0]), pieces.len() as f64);
            let (mut base, mut losses) = (0.0, vec![0.0; variants.len()]);
            for piece in pieces {
                let begin = Instant::now();
                let (own, of_variants) = self.model.piece_losses(piece, plan, variants)?;
                self.pace.add(begin, piece.work.plan + variants.len() as f64 * piece.work.variant);
                base += own;
                losses.iter_mut().zip(of_variants).for_each(|(sum, loss)| *sum += loss);
                read += 1;
                let done = self.done + variants.len() * read / probe.len();
                self.progress.advance(Stage::Measure, done.min(self.expected), self.expected)?;
            }
            losses.iter_mut().for_each(|loss| *loss /= count);
            effects.push(Effects { is_text, length, base: base / count, losses });
        }
        self.count(variants.len())?;
        Ok(effects)
    }

    /// What each of `variants` adds to the loss of `plan` on the probe; see [`effects`](Self::effects).
    pub(super) fn changes(&mut self, plan: &Plan, variants: &[(usize, Plan)]) -> Result<Vec<f64>> {
        let mut changes = vec![0.0; variants.len()];
        let of_texts = self.probe_lengths(true).len() as f64;
        let of_items = self.probe_lengths(false).len() as f64;
        let weight = self.probe_merit.weight();
        for Effects { is_text, base, losses, .. } in self.effects(plan, variants)? {
            let weight = if is_text { weight / of_texts } else { of_items.recip() };
            changes.iter_mut().zip(losses).for_each(|(sum, loss)| *sum += weight * (loss - base));
        }
        Ok(changes)
    }
}

/// What a plan's measurements are known by: all that its spans and types of caches come of.
fn key(plan: &Plan) -> String {
    let rules = plan.rules().iter().map(|rule| format!("{:?}", rule.lines()));
    let (sink, min_span, types) = (plan.sink(), plan.min_span(), plan.cache_types());
    format!("{sink} {min_span} {}{types:?}", rules.collect::<String>())
}

impl<D: Math> Decoder<D> {
    /// Mean loss or divergence of a plan on a piece, and of variants of it.
    fn piece_losses(
        &self,
        piece: &Piece<'_>,
        plan: &Plan,
        variants: &[(usize, Plan)],
    ) -> Result<(f64, Vec<f64>)> {
        match &piece.kind {
            Kind::Responses(items) => self.variant_losses(items, plan, variants, piece.length),
            Kind::Text(text) => {
                self.divergences(std::slice::from_ref(text), plan, variants, piece.length)
            }
        }
    }
}

/// Means at each length of the values of those pieces that are asked for.
fn sums(
    pieces: &[Piece<'_>],
    values: &[Option<f64>],
    asked: impl Fn(&Piece<'_>) -> bool,
) -> Measured {
    let of = |is_text| {
        let mut sums: BTreeMap<usize, (f64, f64)> = BTreeMap::new();
        for (value, piece) in values.iter().zip(pieces) {
            if let Some(value) = value.filter(|_| piece.is_text() == is_text && asked(piece)) {
                let sum = sums.entry(piece.length).or_default();
                *sum = (sum.0 + value, sum.1 + 1.0);
            }
        }
        let mean = |(length, (sum, count))| AtLength { length, value: sum / count };
        sums.into_iter().map(mean).collect()
    };
    Measured { response: of(false), divergence: of(true) }
}

/// Plans that go on to the longer pieces, if there are as many: fewer would leave out plans that are good at
/// length alone.
const LEFT: usize = 4;

/// Of the measurements about one in so many is of a whole proposal, the others are of single heads.
const HEADS_A_PLAN: f64 = 12.0;

/// Texts that single heads and many plans are measured on.
const TEXT_PROBE: usize = 2;

/// Improvements of less than this, in nats, are none.
const LEAST: f64 = 1e-4;

/// Mean response loss of a plan at each length, as in [`Measured::response`]: each context counts alike, however many
/// of the items ask about it.
///
/// # Errors
/// As [`Decoder::response_loss`].
pub fn measured_losses<D: Math>(
    model: &Decoder<D>,
    items: &BTreeMap<usize, Vec<Item>>,
    plan: &Plan,
) -> Result<Vec<AtLength>> {
    let at_length = |(&length, items): (&usize, &Vec<Item>)| {
        let of_context = |context| model.response_loss(context, plan, length);
        let losses = groups(items).map(of_context).collect::<Result<Vec<f64>>>()?;
        if losses.is_empty() {
            return Err(Error::invalid("items", format!("some of {length} tokens"), 0));
        }
        Ok(AtLength { length, value: losses.iter().sum::<f64>() / losses.len() as f64 })
    };
    items.iter().map(at_length).collect()
}

#[cfg(test)]
mod tests {
    use std::ops::ControlFlow;
    use std::sync::Arc;

    use moa_core::ElasticRule;

    use super::*;
    use crate::checkpoint::Checkpoint;
    use crate::device::cpu::Cpu;

    fn model() -> Result<Arc<Decoder<Cpu>>> {
        let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../assets/moa-tiny");
        Ok(Checkpoint::open(Cpu::default(), folder)?.model)
    }

    /// Three contexts of 128 tokens.
    fn items() -> Result<BTreeMap<usize, Vec<Item>>> {
        let tokens: Vec<u32> = (0..300).map(|i| 300 + i * i % 991).collect();
        let item = |from: usize| Item::new(&tokens[from..from + 100], &tokens[from + 100..][..20]);
        Ok(BTreeMap::from([(128, vec![item(0)?, item(90)?, item(170)?])]))
    }

    #[test]
    fn a_plan_that_cannot_be_better_any_more_is_given_up() -> Result<()> {
        let (model, items) = (model()?, items()?);
        let none = BTreeMap::new();
        let text_goal = TextGoal::Weight(1.0);
        let evidence = Evidence { items: &items, texts: &none, text_goal, held_out: &none };
        let progress = &mut ();
        let mut measure = Measure::new(&model, evidence, None, (9, None), progress)?;
        let dense = measure.measure_dense()?.response_loss();
        let plan = Plan::uniform(model.shape(), 4, ElasticRule::fixed(24))?;
        let pieces = |measure: &mut Measure<'_, Cpu>, limit| -> Result<(f64, usize)> {
            let loss = measure.loss_below(&plan, limit)?;
            Ok((loss, measure.known[&key(&plan)].iter().flatten().count()))
        };
        // As under dense attention on all of them would not be enough.
        assert_eq!(pieces(&mut measure, dense)?, (f64::INFINITY, 0));
        let (loss, measured) = pieces(&mut measure, f64::INFINITY)?;
        assert_eq!(measured, 3);
        let whole = groups(&items[&128]).map(|context| model.response_loss(context, &plan, 128));
        let whole = whole.sum::<Result<f64>>()? / 3.0;
        assert!((loss - whole).abs() < 1e-9, "{loss} {whole}");
        Ok(())
    }

    // A minute of single heads goes by without a word otherwise, and cannot be cancelled.
    #[test]
    fn progress_is_told_between_the_pieces_that_single_heads_are_measured_on() -> Result<()> {
        let (model, items) = (model()?, items()?);
        let none = BTreeMap::new();
        let text_goal = TextGoal::Weight(1.0);
        let evidence = Evidence { items: &items, texts: &none, text_goal, held_out: &none };
        let plan = Plan::uniform(model.shape(), 4, ElasticRule::fixed(24))?;
        let variant =
            |head| Ok::<_, Error>((0, plan.clone().with_rule(0, head, ElasticRule::FULL.into())?));
        let mut told = Vec::new();
        let progress = &mut |_, done, _| {
            told.push(done);
            ControlFlow::Continue(())
        };
        let mut measure = Measure::new(&model, evidence, None, (9, None), progress)?;
        measure.effects(&plan, &[variant(0)?, variant(1)?])?;
        // Two of the three contexts; at the end all of it counts.
        assert_eq!(told, [0, 1, 2, 2]);
        Ok(())
    }
}
