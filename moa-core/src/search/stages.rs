use super::lagrangian::{Lagrangian, Prices};
use super::quadratic::dot;
use super::rule_sets::{EXACT_LIMIT, RuleSets, minimum};
use super::subproblem::{Row, SubProblem};

/// Factors on one multiplier for each [`Side`].
const SIDES: [f64; 2] = [0.6, 1.5];

/// The heads of a problem in the order of assignment, each with the options that can still be part of
/// a plan better than a given one. Numbers are sums over heads, in own units.
pub(super) struct Stages {
    pub(super) rows: usize,
    /// How many of the rows, the first ones, are about sizes.
    pub(super) size_rows: usize,
    /// Distinct rules per layer; 1 without a limit, as every stage is a layer then.
    pub(super) limit: usize,
    pub(super) stages: Vec<Stage>,
    /// Candidate of each option, by rising reduced cost within a stage.
    pub(super) cands: Vec<u16>,
    /// Reduced cost of each option.
    pub(super) costs: Vec<f64>,
    /// Objective of each option.
    pub(super) values: Vec<f64>,
    /// `[option][row]`.
    pub(super) uses: Vec<f64>,
    /// Least use of later stages, `[stage][row]`.
    pub(super) rest_uses: Vec<f64>,
    /// What the constants of the constraints add to a sum of reduced costs.
    pub(super) base: f64,
    /// Bounds at other multipliers, for partial plans that use unusually much of one row.
    pub(super) sides: Vec<Side>,
}

/// A second opinion: the dual function at other multipliers.
pub(super) struct Side {
    pub(super) multipliers: Vec<f64>,
    /// Least reduced cost of later stages.
    pub(super) rest: Vec<f64>,
}

/// One head.
#[derive(Clone)]
pub(super) struct Stage {
    pub(super) head: usize,
    pub(super) options: std::ops::Range<usize>,
    /// Least reduced cost of later stages of the same layer, and of later layers.
    pub(super) rest_here: f64,
    pub(super) rest_after: f64,
    /// First stage of the next layer.
    pub(super) layer_end: usize,
}

impl Stages {
    /// Stages with what `allowed` (head, candidate) admits, for plans with an objective below
    /// `cutoff` (mean over heads), at these multipliers.
    pub(super) fn new(
        dual: &Lagrangian<'_>,
        multipliers: &[f64],
        allowed: impl Fn(usize, usize) -> bool,
        cutoff: f64,
    ) -> Self {
        let (sub, core) = (dual.sub, dual.sub.core);
        let prices = Prices::new(sub, multipliers);
        let mut costs = vec![0.0; core.heads * core.cands];
        for (layer, costs) in costs.chunks_mut(core.width * core.cands).enumerate() {
            dual.layer_costs(layer, &prices, costs);
        }
        for (at, cost) in costs.iter_mut().enumerate() {
            if !allowed(at / core.cands, at % core.cands) {
                *cost = f64::INFINITY;
            }
        }
        let groups = groups(sub, &costs, cutoff * core.heads as f64 + prices.constant);
        let mut new = Self {
            rows: sub.rows.len(),
            size_rows: sub.rows.iter().filter(|row| matches!(row, Row::Size(_))).count(),
            limit: core.limit.unwrap_or(1),
            stages: Vec::with_capacity(core.heads),
            cands: Vec::new(),
            costs: Vec::new(),
            values: Vec::new(),
            uses: Vec::new(),
            rest_uses: vec![0.0; core.heads * sub.rows.len()],
            base: -prices.constant,
            sides: Vec::new(),
        };
        let mut rest_after: f64 = groups.iter().map(|group| group.least).sum();
        for group in &groups {
            rest_after -= group.least;
            let layer_end = new.stages.len() + group.heads.len();
            let mut rest_here: f64 = group.heads.iter().map(|(_, least, _)| least).sum();
            for &(head, least, ref options) in &group.heads {
                rest_here -= least;
                let from = new.cands.len();
                for &c in options {
                    new.cands.push(c);
                    new.costs.push(costs[head * core.cands + usize::from(c)]);
                    new.values.push(sub.loss(head, c));
                    new.uses.extend(sub.rows.iter().map(|row| sub.usage(row, head, c)));
                }
                let options = from..new.cands.len();
                new.stages.push(Stage { head, options, rest_here, rest_after, layer_end });
            }
        }
        for stage in (1..new.stages.len()).rev() {
            for row in 0..new.rows {
                let uses = new.stages[stage].options.clone().map(|o| new.uses[o * new.rows + row]);
                let least = uses.fold(f64::INFINITY, f64::min);
                new.rest_uses[(stage - 1) * new.rows + row] =
                    new.rest_uses[stage * new.rows + row] + least;
            }
        }
        new.sides = (0..new.rows)
            .flat_map(|row| SIDES.map(|factor| (row, factor)))
            .filter(|(row, _)| multipliers[*row] > 0.0)
            .map(|(row, factor)| {
                let mut multipliers = multipliers.to_vec();
                multipliers[row] *= factor;
                new.side(multipliers)
            })
            .collect();
        new
    }

    fn side(&self, multipliers: Vec<f64>) -> Side {
        let mut rest = vec![0.0; self.stages.len()];
        for at in (1..self.stages.len()).rev() {
            let cost = |option: usize| self.values[option] + dot(&multipliers, self.uses_of(option));
            let least = self.stages[at].options.clone().map(cost).fold(f64::INFINITY, f64::min);
            rest[at - 1] = rest[at] + least;
        }
        Side { multipliers, rest }
    }

    /// Uses of one option.
    pub(super) fn uses_of(&self, option: usize) -> &[f64] {
        &self.uses[option * self.rows..][..self.rows]
    }

    /// Least reduced cost of the rest of a layer that takes no rules but `set`.
    pub(super) fn served(&self, stage: usize, set: &[u16]) -> f64 {
        let serve = |stage: &Stage| {
            stage
                .options
                .clone()
                .find(|&option| set.contains(&self.cands[option]))
                .map_or(f64::INFINITY, |option| self.costs[option])
        };
        self.stages[stage + 1..self.stages[stage].layer_end].iter().map(serve).sum()
    }
}

/// Heads that the limit on distinct rules binds together, with their options.
struct Group {
    /// Least sum of reduced costs.
    least: f64,
    /// Head, its least reduced cost, its options by rising reduced cost.
    heads: Vec<(usize, f64, Vec<u16>)>,
}

/// Options that can be part of a choice with reduced costs below `cutoff`, groups and heads with few
/// options first: then there are few partial plans until late.
fn groups(sub: &SubProblem<'_>, costs: &[f64], cutoff: f64) -> Vec<Group> {
    let core = sub.core;
    // Without a limit every head is a group of its own.
    let width = if core.limit.is_some() { core.width } else { 1 };
    let mut sets = RuleSets::new(width, core.cands, core.limit.unwrap_or(1));
    let blocks = costs.chunks(width * core.cands);
    let leasts: Vec<f64> = blocks
        .clone()
        .map(|block| match core.limit {
            Some(limit) if limit <= EXACT_LIMIT => sets.best(block, &[]).0,
            _ => block.chunks(core.cands).map(minimum).sum(),
        })
        .collect();
    let room = cutoff - leasts.iter().sum::<f64>();
    let mut groups: Vec<Group> = blocks
        .zip(&leasts)
        .enumerate()
        .map(|(g, (block, &least))| {
            // A head alone may be cheaper than its share of the group.
            let alone: f64 = block.chunks(core.cands).map(minimum).sum();
            let room = room + (least - alone);
            let mut heads: Vec<_> = block
                .chunks(core.cands)
                .enumerate()
                .map(|(h, row)| {
                    let least = minimum(row);
                    let mut options: Vec<u16> = (0..core.cands as u16)
                        .filter(|&c| row[usize::from(c)] - least < room)
                        .collect();
                    options.sort_by(|&a, &b| row[usize::from(a)].total_cmp(&row[usize::from(b)]));
                    (g * width + h, least, options)
                })
                .collect();
            heads.sort_by_key(|(_, _, options)| options.len());
            Group { least, heads }
        })
        .collect();
    groups.sort_by_key(|group| group.heads.iter().map(|(_, _, options)| options.len()).sum::<usize>());
    groups
}
