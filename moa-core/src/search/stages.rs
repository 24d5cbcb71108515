use super::lagrangian::{Lagrangian, Prices};
use super::quadratic::dot;
use super::rule_sets::{EXACT_LIMIT, RuleSets, minimum};
use super::subproblem::{Row, SubProblem};

/// Most options of one stage; with more the problem is too large to search this way.
const OPTIONS: usize = 20_000;
/// Options that a new one is compared with for dominance.
const COMPARISONS: usize = 200;
/// Factors on one multiplier for each [`Side`].
const SIDES: [f64; 2] = [0.6, 1.5];

/// The problem as a sequence of decisions, each with all options that can be part of a plan better
/// than a given one. A stage is a head; with a limit on distinct rules, a layer. Numbers are sums
/// over heads, in own units.
pub(super) struct Stages {
    pub(super) rows: usize,
    /// How many of the rows, the first ones, are about sizes.
    pub(super) size_rows: usize,
    pub(super) stages: Vec<Stage>,
    /// Reduced cost of each option.
    pub(super) costs: Vec<f64>,
    /// Objective of each option.
    pub(super) values: Vec<f64>,
    /// `[option][row]`.
    uses: Vec<f64>,
    /// Candidates of each option, `[option][head]`.
    choices: Vec<u16>,
    /// Heads of a stage.
    pub(super) width: usize,
    /// What the constants of the constraints add to a sum of reduced costs.
    pub(super) base: f64,
    /// Bounds at other multipliers, for partial plans that use unusually much of one row.
    pub(super) sides: Vec<Side>,
}

/// One decision.
pub(super) struct Stage {
    pub(super) first_head: usize,
    /// By rising reduced cost.
    pub(super) options: std::ops::Range<usize>,
    /// Least reduced cost of later stages.
    pub(super) rest: f64,
    /// Least use of later stages, by row.
    pub(super) rest_uses: Vec<f64>,
}

/// A second opinion: the dual function at other multipliers.
pub(super) struct Side {
    pub(super) multipliers: Vec<f64>,
    /// Least reduced cost of later stages.
    pub(super) rest: Vec<f64>,
}

impl Stages {
    /// Stages with what `allowed` (head, candidate) admits, for plans with an objective below
    /// `cutoff` (mean over heads), at these multipliers. None if there are too many options.
    pub(super) fn new(
        dual: &Lagrangian<'_>,
        multipliers: &[f64],
        allowed: impl Fn(usize, usize) -> bool,
        cutoff: f64,
    ) -> Option<Self> {
        let (sub, core) = (dual.sub, dual.sub.core);
        let prices = Prices::new(sub, multipliers);
        let width = if core.limit.is_some() { core.width } else { 1 };
        let mut costs = vec![0.0; core.heads * core.cands];
        for (layer, costs) in costs.chunks_mut(core.width * core.cands).enumerate() {
            dual.layer_costs(layer, &prices, costs);
        }
        for (at, cost) in costs.iter_mut().enumerate() {
            if !allowed(at / core.cands, at % core.cands) {
                *cost = f64::INFINITY;
            }
        }
        let mut new = Self {
            rows: sub.rows.len(),
            size_rows: sub.rows.iter().filter(|row| matches!(row, Row::Size(_))).count(),
            stages: Vec::with_capacity(core.heads / width),
            costs: Vec::new(),
            values: Vec::new(),
            uses: Vec::new(),
            choices: Vec::new(),
            width,
            base: -prices.constant,
            sides: Vec::new(),
        };
        let blocks = || costs.chunks(width * core.cands);
        let mut sets = RuleSets::new(width, core.cands, core.limit.unwrap_or(1));
        let leasts: Vec<f64> = blocks()
            .map(|block| match core.limit {
                Some(limit) if limit <= EXACT_LIMIT => sets.best(block, &[]).0,
                _ => block.chunks(core.cands).map(minimum).sum(),
            })
            .collect();
        let room = cutoff * core.heads as f64 + prices.constant - leasts.iter().sum::<f64>();
        for (stage, (block, least)) in blocks().zip(&leasts).enumerate() {
            let mut options = Options {
                costs: block,
                cands: core.cands,
                limit: core.limit.unwrap_or(1),
                rest: rests(block, core.cands),
                cutoff: least + room,
                picked: Vec::new(),
                found: Vec::new(),
            };
            if !options.visit(0.0, 0) {
                return None;
            }
            new.push(sub, stage * width, options.found);
        }
        new.order(multipliers);
        Some(new)
    }

    /// Adds a stage with those options that no other one of it dominates.
    fn push(&mut self, sub: &SubProblem<'_>, first_head: usize, mut found: Vec<(f64, Vec<u16>)>) {
        found.sort_by(|a, b| a.0.total_cmp(&b.0).then_with(|| a.1.cmp(&b.1)));
        let from = self.costs.len();
        for (cost, choice) in found {
            let heads = || (first_head..).zip(&choice);
            let value: f64 = heads().map(|(head, &c)| sub.loss(head, c)).sum();
            let total = |row| heads().map(|(head, &c)| sub.usage(row, head, c)).sum::<f64>();
            let uses: Vec<f64> = sub.rows.iter().map(total).collect();
            let no_worse = |option: usize| {
                self.values[option] <= value
                    && self.uses_of(option).iter().zip(&uses).all(|(a, b)| a <= b)
            };
            if (from..self.costs.len()).take(COMPARISONS).any(no_worse) {
                continue;
            }
            self.costs.push(cost);
            self.values.push(value);
            self.uses.extend(uses);
            self.choices.extend(choice);
        }
        let options = from..self.costs.len();
        self.stages.push(Stage { first_head, options, rest: 0.0, rest_uses: Vec::new() });
    }

    /// Puts stages with few options first, so that there are few partial plans until late, and sums
    /// up what follows each.
    fn order(&mut self, multipliers: &[f64]) {
        self.stages.sort_by_key(|stage| stage.options.len());
        let least = |of: &dyn Fn(usize) -> f64, stage: &Stage| {
            stage.options.clone().map(of).fold(f64::INFINITY, f64::min)
        };
        let rest = |of: &dyn Fn(usize) -> f64| {
            let mut rest = vec![0.0; self.stages.len()];
            for at in (1..rest.len()).rev() {
                rest[at - 1] = rest[at] + least(of, &self.stages[at]);
            }
            rest
        };
        self.sides = (0..self.rows)
            .flat_map(|row| SIDES.map(|factor| (row, factor)))
            .filter(|(row, _)| multipliers[*row] > 0.0)
            .map(|(row, factor)| {
                let mut multipliers = multipliers.to_vec();
                multipliers[row] *= factor;
                let cost =
                    |option: usize| self.values[option] + dot(&multipliers, self.uses_of(option));
                let rest = rest(&cost);
                Side { multipliers, rest }
            })
            .collect();
        let rest_costs = rest(&|option| self.costs[option]);
        let rest_uses: Vec<Vec<f64>> =
            (0..self.rows).map(|row| rest(&|option| self.uses_of(option)[row])).collect();
        for (at, stage) in self.stages.iter_mut().enumerate() {
            stage.rest = rest_costs[at];
            stage.rest_uses = rest_uses.iter().map(|rest| rest[at]).collect();
        }
    }

    /// Uses of one option.
    pub(super) fn uses_of(&self, option: usize) -> &[f64] {
        &self.uses[option * self.rows..][..self.rows]
    }

    /// Candidates of one option.
    pub(super) fn choice_of(&self, option: usize) -> &[u16] {
        &self.choices[option * self.width..][..self.width]
    }
}

/// Enumeration of the options of one stage.
struct Options<'a> {
    /// `[head][candidate]`.
    costs: &'a [f64],
    cands: usize,
    limit: usize,
    /// Least cost of later heads.
    rest: Vec<f64>,
    cutoff: f64,
    picked: Vec<u16>,
    found: Vec<(f64, Vec<u16>)>,
}

impl Options<'_> {
    /// Finds all options below the cutoff that begin with the picked ones, which have `distinct`
    /// rules. False if there are too many.
    fn visit(&mut self, cost: f64, distinct: usize) -> bool {
        let head = self.picked.len();
        if head == self.rest.len() {
            self.found.push((cost, self.picked.clone()));
            return self.found.len() <= OPTIONS;
        }
        for c in 0..self.cands {
            let cost = cost + self.costs[head * self.cands + c];
            let rule = c as u16;
            let distinct = distinct + usize::from(!self.picked.contains(&rule));
            if cost + self.rest[head] >= self.cutoff || distinct > self.limit {
                continue;
            }
            self.picked.push(rule);
            let go = distinct < self.limit || cost + self.served() < self.cutoff;
            let complete = !go || self.visit(cost, distinct);
            self.picked.pop();
            if !complete {
                return false;
            }
        }
        true
    }

    /// Least cost of later heads if they take no other rules than the picked ones.
    fn served(&self) -> f64 {
        let serve = |row: &[f64]| {
            self.picked.iter().map(|&c| row[usize::from(c)]).fold(f64::INFINITY, f64::min)
        };
        self.costs.chunks(self.cands).skip(self.picked.len()).map(serve).sum()
    }
}

/// Least cost of the heads after each.
fn rests(costs: &[f64], cands: usize) -> Vec<f64> {
    let least: Vec<f64> = costs.chunks(cands).map(minimum).collect();
    (1..=least.len()).map(|next| least[next..].iter().sum()).collect()
}
