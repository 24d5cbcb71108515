use std::collections::HashMap;
use std::hash::{DefaultHasher, Hash, Hasher};

use super::quadratic::dot;
use super::stages::{Side, Stages};
use super::subproblem::{EQUAL, FEASIBLE, SubProblem, feasible};

/// Totals that differ by less are the same.
const SAME: f64 = 1e-12;

/// Fewest labels that are kept.
const FEWEST: usize = 10;
/// Labels of the same sizes that a new one is compared with. More would remove more labels, in more
/// time than those cost.
const COMPARISONS: usize = 8;

/// What the search over partial plans found out.
pub(super) struct Outcome {
    /// No plan that was not seen has an objective (mean over heads) below this; infinite if all were
    /// seen.
    pub(super) bound: f64,
    /// Extensions that were tried.
    pub(super) tried: u64,
}

/// How far to go.
#[derive(Clone, Copy)]
pub(super) struct Effort {
    /// Labels that are kept of each stage.
    pub(super) width: usize,
    /// Extensions after which the search narrows down.
    pub(super) tries: u64,
}

/// Dynamic programming over partial plans, stage by stage. A partial plan goes when its bound shows no
/// improvement on `cutoff` (mean over heads), when it cannot meet the constraints any more, or when
/// another one is no worse in every total; sizes mostly lie on a lattice, so many plans agree in
/// all of them. Where more are left than the effort allows, those of least bound stay, and the others
/// count in [`Outcome::bound`]. An improvement goes to `best`.
pub(super) fn search(
    sub: &SubProblem<'_>,
    stages: &Stages,
    effort: Effort,
    cutoff: f64,
    best: &mut Option<(f64, Vec<u16>)>,
) -> Outcome {
    let heads = sub.core.heads as f64;
    let cutoff = cutoff * heads;
    let mut outcome = Outcome { bound: f64::INFINITY, tried: 0 };
    let mut labels = Labels::default();
    let mut new = Label::new(stages);
    labels.push(&new);
    let mut rest = f64::INFINITY;
    let mut history: Vec<Vec<(u32, u32)>> = Vec::with_capacity(stages.stages.len());
    for (at, stage) in stages.stages.iter().enumerate() {
        let mut next = Labels::default();
        // Out of effort, the rest is walked with few labels, so that there is a plan and a bound.
        let left = effort.tries.saturating_sub(outcome.tried) as usize;
        let width = effort.width.min(4 * left / stage.options.len().max(1)).max(FEWEST);
        if labels.costs.len() > width {
            outcome.bound = outcome.bound.min(labels.narrow(stages, width) + rest);
        }
        history.push(std::mem::take(&mut labels.steps));
        for old in 0..labels.costs.len() {
            for option in stage.options.clone() {
                if labels.costs[old] + stages.costs[option] + stage.rest >= cutoff {
                    break;
                }
                outcome.tried += 1;
                if new.extend(&labels, old, stages, at, option, cutoff) {
                    next.insert(&new, stages.size_rows);
                }
            }
            if next.costs.len() >= 2 * width {
                outcome.bound = outcome.bound.min(next.narrow(stages, width) + stage.rest);
            }
        }
        rest = stage.rest;
        labels = next;
    }
    history.push(std::mem::take(&mut labels.steps));
    outcome.bound /= heads;

    let last =
        (0..labels.values.len()).min_by(|&a, &b| labels.values[a].total_cmp(&labels.values[b]));
    if let Some(last) = last.filter(|&label| labels.values[label] < cutoff - EQUAL) {
        let mut label = last;
        let mut choice = vec![0; sub.core.heads];
        for (steps, stage) in history[1..].iter().zip(&stages.stages).rev() {
            let (before, option) = steps[label];
            choice[stage.first_head..][..stages.width]
                .copy_from_slice(stages.choice_of(option as usize));
            label = before as usize;
        }
        let (value, uses) = sub.measure(&choice);
        if feasible(&uses) && best.as_ref().is_none_or(|(old, _)| value < *old) {
            *best = Some((value, choice));
        }
    }
    outcome
}

/// A partial plan.
struct Label {
    /// Sum of reduced costs.
    cost: f64,
    /// Objective.
    value: f64,
    /// Total of each row.
    uses: Vec<f64>,
    /// Label of the stage before, and option of this stage.
    step: (u32, u32),
}

impl Label {
    fn new(stages: &Stages) -> Self {
        Self { cost: stages.base, value: 0.0, uses: vec![0.0; stages.rows], step: (0, 0) }
    }

    /// Becomes a label of the stage before with one more option. False if that leads nowhere.
    fn extend(
        &mut self,
        from: &Labels,
        old: usize,
        stages: &Stages,
        at: usize,
        option: usize,
        cutoff: f64,
    ) -> bool {
        self.step = (old as u32, option as u32);
        self.cost = from.costs[old] + stages.costs[option];
        self.value = from.values[old] + stages.values[option];
        let tolerance = FEASIBLE * (stages.stages.len() * stages.width) as f64;
        let totals = self.uses.iter_mut().zip(&from.uses[old * stages.rows..]);
        let steps = stages.uses_of(option).iter().zip(&stages.stages[at].rest_uses);
        for ((total, before), (u, rest)) in totals.zip(steps) {
            *total = before + u;
            if *total + rest > tolerance {
                return false;
            }
        }
        let bound = |side: &Side| self.value + dot(&side.multipliers, &self.uses) + side.rest[at];
        stages.sides.iter().all(|side| bound(side) < cutoff)
    }

    /// Equal for labels with the same sizes (but for rounding).
    fn key(&self, size_rows: usize) -> u64 {
        let mut hasher = DefaultHasher::new();
        for total in &self.uses[..size_rows] {
            ((total * 1e9).round() as i64).hash(&mut hasher);
        }
        hasher.finish()
    }
}

/// Labels of one stage, in flat arrays.
#[derive(Default)]
struct Labels {
    costs: Vec<f64>,
    values: Vec<f64>,
    uses: Vec<f64>,
    steps: Vec<(u32, u32)>,
    /// Newest label of each key, and for each label its key and the label before of that key.
    newest: HashMap<u64, u32>,
    older: Vec<(u64, Option<u32>)>,
}

impl Labels {
    fn push(&mut self, new: &Label) {
        self.costs.push(new.cost);
        self.values.push(new.value);
        self.uses.extend_from_slice(&new.uses);
        self.steps.push(new.step);
    }

    /// Adds a label unless one of the same key is no worse; takes the place of one that is worse.
    fn insert(&mut self, new: &Label, size_rows: usize) {
        let rows = new.uses.len();
        let key = new.key(size_rows);
        let mut other = self.newest.get(&key).copied();
        for _ in 0..COMPARISONS {
            let Some(label) = other else { break };
            let i = label as usize;
            other = self.older[i].1;
            let uses = &self.uses[i * rows..][..rows];
            let pairs = || uses.iter().zip(&new.uses);
            if self.values[i] <= new.value + SAME && pairs().all(|(a, b)| *a <= b + SAME) {
                return;
            }
            if new.value <= self.values[i] && pairs().all(|(a, b)| b <= a) {
                self.costs[i] = new.cost;
                self.values[i] = new.value;
                self.uses[i * rows..][..rows].copy_from_slice(&new.uses);
                self.steps[i] = new.step;
                return;
            }
        }
        let label = self.costs.len() as u32;
        self.push(new);
        self.older.push((key, self.newest.insert(key, label)));
    }

    /// Keeps the `width` labels of least cost; returns the least cost of the others.
    fn narrow(&mut self, stages: &Stages, width: usize) -> f64 {
        let mut order: Vec<u32> = (0..self.costs.len() as u32).collect();
        let by_cost = |a: &u32, b: &u32| {
            self.costs[*a as usize].total_cmp(&self.costs[*b as usize]).then(a.cmp(b))
        };
        let (_, &mut first_out, _) = order.select_nth_unstable_by(width, by_cost);
        let dropped = self.costs[first_out as usize];
        order.truncate(width);
        order.sort_unstable();
        let mut kept = Self::default();
        for i in order.into_iter().map(|i| i as usize) {
            kept.costs.push(self.costs[i]);
            kept.values.push(self.values[i]);
            kept.uses.extend_from_slice(&self.uses[i * stages.rows..][..stages.rows]);
            kept.steps.push(self.steps[i]);
            let key = self.older[i].0;
            let label = kept.older.len() as u32;
            kept.older.push((key, kept.newest.insert(key, label)));
        }
        *self = kept;
        dropped
    }
}
