use std::collections::BTreeSet;

use super::lagrangian::{Lagrangian, Prices, cheapest};
use super::reduce::distinct;
use super::rule_sets::RuleSets;
use super::subproblem::{Row, SubProblem};

/// Candidates of a head that are kept, by reduced cost.
const CANDIDATES: usize = 32;
/// Sets of rules of a layer that are kept, by reduced cost.
const SETS: usize = 16;

/// The options that heuristics choose from: one option per unit makes a plan.
///
/// A unit is a head and an option a candidate; with a limit on distinct rules, a unit is a layer and
/// an option a choice for all its heads. Options are the ones that are cheap at the multipliers the
/// pool was made for. Numbers are sums over heads, in own units.
pub(super) struct Pool {
    pub(super) rows: usize,
    /// Option range of each unit.
    pub(super) ranges: Vec<std::ops::Range<usize>>,
    /// Unit of each option.
    pub(super) unit: Vec<u32>,
    /// Objective of each option.
    pub(super) value: Vec<f64>,
    /// `[option][row]`.
    pub(super) uses: Vec<f64>,
    /// Reduced cost of each option.
    pub(super) cost: Vec<f64>,
    /// Heads of a unit.
    width: usize,
    /// `[option][head]`.
    choices: Vec<u16>,
}

impl Pool {
    /// Options around `seeds`, which must respect the limit on distinct rules. Also returns each
    /// seed as one option per unit.
    pub(super) fn new(
        dual: &Lagrangian<'_>,
        multipliers: &[f64],
        seeds: &[Vec<u16>],
    ) -> (Self, Vec<Vec<usize>>) {
        let sub = dual.sub;
        let core = sub.core;
        let prices = Prices::new(sub, multipliers);
        let width = if core.limit.is_some() { core.width } else { 1 };
        let mut pool = Self {
            rows: sub.rows.len(),
            ranges: Vec::with_capacity(core.heads / width),
            unit: Vec::new(),
            value: Vec::new(),
            uses: Vec::new(),
            cost: Vec::new(),
            width,
            choices: Vec::new(),
        };
        let mut costs = vec![0.0; core.width * core.cands];
        let mut starts = vec![Vec::with_capacity(core.heads / width); seeds.len()];
        for layer in 0..core.layers {
            dual.layer_costs(layer, &prices, &mut costs);
            for first in (layer * core.width..(layer + 1) * core.width).step_by(width) {
                let here: Vec<&[u16]> = seeds.iter().map(|seed| &seed[first..][..width]).collect();
                let options = match core.limit {
                    Some(limit) => layer_options(sub, layer, &costs, &here, limit),
                    None => {
                        let row = &costs[(first - layer * core.width) * core.cands..][..core.cands];
                        head_options(sub, first, row, &here)
                    }
                };
                let from = pool.value.len();
                for option in &options {
                    pool.push(sub, first, option, multipliers);
                }
                pool.ranges.push(from..pool.value.len());
                for (start, seed) in starts.iter_mut().zip(here) {
                    let at = options.iter().position(|option| option == seed);
                    start.push(from + at.unwrap_or(0));
                }
            }
        }
        (pool, starts)
    }

    fn push(&mut self, sub: &SubProblem<'_>, first: usize, option: &[u16], multipliers: &[f64]) {
        let mut value = 0.0;
        let from = self.uses.len();
        self.uses.resize(from + self.rows, 0.0);
        for (head, &c) in (first..).zip(option) {
            value += sub.loss(head, c);
            for (total, row) in self.uses[from..].iter_mut().zip(&sub.rows) {
                *total += sub.usage(row, head, c);
            }
        }
        let priced: f64 = self.uses[from..].iter().zip(multipliers).map(|(u, m)| u * m).sum();
        self.value.push(value);
        self.cost.push(value + priced);
        self.unit.push(self.ranges.len() as u32);
        self.choices.extend_from_slice(option);
    }

    /// Uses of one option.
    pub(super) fn uses_of(&self, option: usize) -> &[f64] {
        &self.uses[option * self.rows..][..self.rows]
    }

    /// The plan of one option per unit.
    pub(super) fn choice(&self, selected: &[usize]) -> Vec<u16> {
        selected
            .iter()
            .flat_map(|&option| &self.choices[option * self.width..][..self.width])
            .copied()
            .collect()
    }
}

fn head_options(
    sub: &SubProblem<'_>,
    head: usize,
    costs: &[f64],
    seeds: &[&[u16]],
) -> Vec<Vec<u16>> {
    let mut order: Vec<u16> =
        (0..costs.len() as u16).filter(|&c| costs[usize::from(c)].is_finite()).collect();
    order.sort_by(|&a, &b| costs[usize::from(a)].total_cmp(&costs[usize::from(b)]));
    // What uses least of each row must be there, or repair could get stuck.
    let frugal = sub.rows.iter().filter_map(|row| {
        order
            .iter()
            .copied()
            .min_by(|&a, &b| sub.usage(row, head, a).total_cmp(&sub.usage(row, head, b)))
    });
    let mut kept: BTreeSet<u16> = frugal.collect();
    kept.extend(order.iter().take(CANDIDATES));
    kept.extend(seeds.iter().map(|seed| seed[0]));
    kept.into_iter().map(|c| vec![c]).collect()
}

fn layer_options(
    sub: &SubProblem<'_>,
    layer: usize,
    costs: &[f64],
    seeds: &[&[u16]],
    limit: usize,
) -> Vec<Vec<u16>> {
    let cands = sub.core.cands;
    let rows: Vec<&[f64]> = costs.chunks(cands).collect();
    let total =
        |set: &[u16]| -> f64 { rows.iter().map(|row| row[usize::from(cheapest(row, set))]).sum() };
    let mut sets: BTreeSet<Vec<u16>> = seeds.iter().map(|seed| distinct(seed)).collect();
    let mut finder = RuleSets::new(rows.len(), cands, limit);
    sets.insert(distinct(finder.good(costs, &[]).1));
    let centres: Vec<Vec<u16>> = sets.iter().cloned().collect();
    let mut near: Vec<(f64, Vec<u16>)> = Vec::new();
    for centre in &centres {
        for out in 0..centre.len() {
            for c in (0..cands as u16).filter(|c| !centre.contains(c)) {
                let mut set = centre.clone();
                set[out] = c;
                let cost = total(&set);
                if cost.is_finite() {
                    near.push((cost, distinct(&set)));
                }
            }
        }
    }
    near.sort_by(|a, b| a.0.total_cmp(&b.0).then_with(|| a.1.cmp(&b.1)));
    near.dedup_by(|a, b| a.1 == b.1);
    sets.extend(near.into_iter().take(SETS).map(|(_, set)| set));
    for row in &sub.rows {
        if let Row::Size(uses) = row {
            let uses = &uses[layer * cands..][..cands];
            let frugal = (0..cands as u16)
                .filter(|&c| rows.iter().all(|row| row[usize::from(c)].is_finite()))
                .min_by(|&a, &b| uses[usize::from(a)].total_cmp(&uses[usize::from(b)]));
            sets.extend(frugal.map(|c| vec![c]));
        }
    }

    let mut options: BTreeSet<Vec<u16>> = BTreeSet::new();
    let mut flips = |base: Vec<u16>, set: &[u16]| {
        for head in 0..base.len() {
            for &c in set.iter().filter(|&&c| c != base[head]) {
                if rows[head][usize::from(c)].is_finite() {
                    let mut other = base.clone();
                    other[head] = c;
                    options.insert(other);
                }
            }
        }
        options.insert(base);
    };
    for set in &sets {
        let base = rows.iter().map(|row| cheapest(row, set)).collect();
        flips(base, set);
    }
    for seed in seeds {
        flips(seed.to_vec(), &distinct(seed));
    }
    options.into_iter().collect()
}
