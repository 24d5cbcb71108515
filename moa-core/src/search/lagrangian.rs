use super::reduce::distinct;
use super::rule_sets::{EXACT_LIMIT, RuleSets, minimum};
use super::subproblem::{Row, SubProblem};

/// The dual function at some multipliers: a lower bound on the objective, and the choice that gives
/// it.
#[derive(Clone, Debug)]
pub(super) struct Point {
    /// Lower bound, own units.
    pub(super) value: f64,
    /// Use of every row by `choice`: the supergradient.
    pub(super) slope: Vec<f64>,
    /// Candidate of each head. With a limit above [`EXACT_LIMIT`] it may break that limit.
    pub(super) choice: Vec<u16>,
}

/// Evaluates the dual function; keeps buffers and the last best sets of rules between calls.
pub(super) struct Lagrangian<'a> {
    pub(super) sub: &'a SubProblem<'a>,
    /// Reduced costs of one layer, `[head][candidate]`.
    costs: Vec<f64>,
    sets: Option<RuleSets>,
    /// Best set of each layer at the last evaluation.
    last: Vec<Vec<u16>>,
}

impl<'a> Lagrangian<'a> {
    pub(super) fn new(sub: &'a SubProblem<'a>) -> Self {
        let core = sub.core;
        let sets = core
            .limit
            .filter(|&limit| limit <= EXACT_LIMIT)
            .map(|limit| RuleSets::new(core.width, core.cands, limit));
        Self {
            sub,
            costs: vec![0.0; core.width * core.cands],
            sets,
            last: vec![Vec::new(); core.layers],
        }
    }

    /// Reduced costs of one layer at these multipliers, `[head][candidate]`.
    pub(super) fn layer_costs(&self, layer: usize, prices: &Prices, costs: &mut [f64]) {
        let core = self.sub.core;
        for (h, row) in costs.chunks_mut(core.cands).enumerate() {
            row.copy_from_slice(&prices.candidates[layer * core.cands..][..core.cands]);
            let at = (layer * core.width + h) * core.cands;
            for (&price, losses) in prices.losses.iter().zip(&core.losses) {
                for (cost, &loss) in row.iter_mut().zip(&losses[at..]) {
                    *cost += price * loss;
                }
            }
        }
    }

    /// The dual function at `multipliers` (one per row, none negative).
    pub(super) fn evaluate(&mut self, multipliers: &[f64]) -> Point {
        let core = self.sub.core;
        let prices = Prices::new(self.sub, multipliers);
        let mut costs = std::mem::take(&mut self.costs);
        let mut choice = Vec::with_capacity(core.heads);
        let mut value = -prices.constant;
        for layer in 0..core.layers {
            self.layer_costs(layer, &prices, &mut costs);
            if let Some(sets) = &mut self.sets {
                let (cost, set) = sets.best(&costs, &self.last[layer]);
                value += cost;
                choice.extend(costs.chunks(core.cands).map(|row| cheapest(row, set)));
                self.last[layer] = set.to_vec();
            } else {
                for row in costs.chunks(core.cands) {
                    let least = minimum(row);
                    value += least;
                    choice.push(row.iter().position(|&x| x == least).unwrap_or(0) as u16);
                }
            }
        }
        self.costs = costs;
        let slope = self.sub.measure(&choice).1;
        Point { value: value / core.heads as f64, slope, choice }
    }

    /// Makes a choice obey the limit on distinct rules, at small cost in reduced costs.
    pub(super) fn impose_limit(&self, choice: &mut [u16], prices: &Prices) {
        let core = self.sub.core;
        let Some(limit) = core.limit else { return };
        let mut sets = RuleSets::new(core.width, core.cands, limit);
        let mut costs = vec![0.0; core.width * core.cands];
        for (layer, choice) in choice.chunks_mut(core.width).enumerate() {
            if distinct(choice).len() > limit {
                self.layer_costs(layer, prices, &mut costs);
                let (_, set) = sets.good(&costs, &[]);
                for (c, row) in choice.iter_mut().zip(costs.chunks(core.cands)) {
                    *c = cheapest(row, set);
                }
            }
        }
    }
}

/// What losses and candidates cost at given multipliers, in own units.
pub(super) struct Prices {
    losses: Vec<f64>,
    /// `[layer][candidate]`.
    candidates: Vec<f64>,
    /// To subtract from the sum over heads.
    pub(super) constant: f64,
}

impl Prices {
    pub(super) fn new(sub: &SubProblem<'_>, multipliers: &[f64]) -> Self {
        let mut losses: Vec<f64> = sub.weights.iter().map(|w| w / sub.scale).collect();
        let mut candidates = vec![0.0; sub.core.layers * sub.core.cands];
        let mut constant = 0.0;
        for (&multiplier, row) in multipliers.iter().zip(&sub.rows) {
            match row {
                Row::Size(uses) => {
                    candidates.iter_mut().zip(uses).for_each(|(sum, u)| *sum += multiplier * u);
                }
                Row::Loss { length, mean, scale } => {
                    losses[*length] += multiplier / scale;
                    constant += multiplier / scale * mean * sub.core.heads as f64;
                }
            }
        }
        Self { losses, candidates, constant }
    }
}

/// The member of `set` that is cheapest in `row`.
pub(super) fn cheapest(row: &[f64], set: &[u16]) -> u16 {
    let cost = |c: u16| row[usize::from(c)];
    set.iter().copied().min_by(|&a, &b| cost(a).total_cmp(&cost(b))).unwrap_or(0)
}
