/// The proven distance of one solution from the best possible one.
///
/// The plan was found as the minimum of `weights . losses` under the size bounds and `limits`.
#[derive(Clone, Debug, PartialEq)]
pub struct Gap {
    /// Weight of each length's loss in the objective: 1 at one length, and a small one at the
    /// others, so that a tie is never decided for a plan that another one dominates.
    pub weights: Vec<f64>,
    /// Epsilon constraints: largest loss allowed at each length, where there was one.
    pub limits: Vec<Option<f64>>,
    /// Objective of this plan.
    pub value: f64,
    /// No plan within the bounds and limits has a smaller objective than this.
    pub bound: f64,
    /// `(value - bound) / (value - floor)`, where `floor` is the objective with every head at its
    /// best candidate and no bounds at all. In words: the share of the avoidable loss of this plan
    /// that might still be saved. Between 0 and 1, and unlike a ratio to `|value|` it means the same
    /// when losses are negative or a constant is added to a head's losses.
    pub relative: f64,
}

impl Gap {
    pub(super) fn new(
        weights: Vec<f64>,
        limits: Vec<Option<f64>>,
        value: f64,
        bound: f64,
        floor: f64,
        spread: f64,
    ) -> Self {
        let bound = bound.min(value);
        let (left, all) = (value - bound, value - floor);
        // Up to 1e-9 of the spread between best and worst, a difference is rounding; a closed tree
        // proves just that much.
        let relative = if left <= 2e-9 * spread { 0.0 } else { (left / all).clamp(0.0, 1.0) };
        Self { weights, limits, value, bound, relative }
    }
}

/// One plan of a [`ParetoSet`].
#[derive(Clone, Debug, PartialEq)]
pub struct Solution {
    /// Index of the candidate of each head, `[layer * heads_per_layer + head]`.
    pub choice: Vec<usize>,
    /// Loss at each objective length, summed over heads.
    pub losses: Vec<f64>,
    /// Mean size over heads at each bound.
    pub sizes: Vec<f64>,
    /// How near to the best possible choice it is proven to be.
    pub gap: Gap,
}

/// The choices of rules that [`solve`](super::solve) found: a Pareto set, in which none is at least
/// as good as another one at every length.
#[derive(Clone, Debug, PartialEq)]
pub struct ParetoSet {
    /// The plans, by rising loss at the longest objective length.
    pub solutions: Vec<Solution>,
    /// Sub-problems that were solved.
    pub subproblems: usize,
    /// Wall time.
    pub seconds: f64,
    /// Largest [`Gap::relative`] of the plans.
    pub worst_gap: f64,
}

/// Drops plans that another one dominates, and repetitions.
pub(super) fn keep_efficient(mut solutions: Vec<Solution>) -> Vec<Solution> {
    let mut kept: Vec<Solution> = Vec::with_capacity(solutions.len());
    // Smallest gap first, so that of two equal plans the better proof stays.
    solutions.sort_by(|a, b| a.gap.relative.total_cmp(&b.gap.relative));
    for new in solutions {
        if kept.iter().any(|old| no_worse(old, &new)) {
            continue;
        }
        kept.retain(|old| !no_worse(&new, old));
        kept.push(new);
    }
    kept
}

fn no_worse(a: &Solution, b: &Solution) -> bool {
    a.losses.iter().zip(&b.losses).all(|(x, y)| x <= y)
}

/// At most `count` plans: the best at the length `first`, then the best at each other length, then
/// always the one farthest from those kept, distances taken in units of each length's range.
pub(super) fn spread_out(solutions: Vec<Solution>, count: usize, first: usize) -> Vec<Solution> {
    if solutions.len() <= count {
        return solutions;
    }
    let lengths = solutions[0].losses.len();
    let best = |i: usize| {
        (0..solutions.len())
            .min_by(|&a, &b| solutions[a].losses[i].total_cmp(&solutions[b].losses[i]))
            .unwrap_or(0)
    };
    let range = |i: usize| {
        let all = solutions.iter().map(|s| s.losses[i]);
        (all.clone().fold(f64::NEG_INFINITY, f64::max) - all.fold(f64::INFINITY, f64::min))
            .max(f64::MIN_POSITIVE)
    };
    let ranges: Vec<f64> = (0..lengths).map(range).collect();
    let distance = |a: usize, b: usize| -> f64 {
        (0..lengths)
            .map(|i| ((solutions[a].losses[i] - solutions[b].losses[i]) / ranges[i]).powi(2))
            .sum()
    };
    let mut kept: Vec<usize> = Vec::with_capacity(count);
    let order = std::iter::once(first).chain((0..lengths).filter(|&i| i != first));
    for i in order.map(best) {
        if kept.len() < count && !kept.contains(&i) {
            kept.push(i);
        }
    }
    while kept.len() < count {
        let nearest = |i: usize| kept.iter().map(|&k| distance(i, k)).fold(f64::INFINITY, f64::min);
        let farthest = (0..solutions.len())
            .filter(|i| !kept.contains(i))
            .max_by(|&a, &b| nearest(a).total_cmp(&nearest(b)));
        kept.extend(farthest);
    }
    let keep: Vec<bool> = (0..solutions.len()).map(|i| kept.contains(&i)).collect();
    solutions.into_iter().zip(keep).filter_map(|(s, keep)| keep.then_some(s)).collect()
}
