use super::reduce::Core;

/// One sub-problem of the epsilon-constraint method: the least weighted loss under the size bounds
/// and under limits on the losses.
///
/// The solver sees it in units of its own: everything is a mean over heads, the objective is divided
/// by its mean spread over a head's candidates, and each constraint reads `use <= 0` after division
/// by its own spread. So multipliers, slopes and tolerances are of order one.
pub(super) struct SubProblem<'a> {
    pub(super) core: &'a Core<'a>,
    /// Weight of each length's loss; all positive.
    pub(super) weights: Vec<f64>,
    /// Largest loss at each length.
    pub(super) limits: Vec<Option<f64>>,
    pub(super) rows: Vec<Row>,
    /// Mean spread of the objective over a head's candidates.
    pub(super) scale: f64,
    /// Objective, in own units, with every head at its best.
    pub(super) floor: f64,
    /// Objective, in own units, with every head at its worst.
    pub(super) ceiling: f64,
}

/// One constraint, `use <= 0`.
pub(super) enum Row {
    /// What each candidate uses, `[layer][candidate]`.
    Size(Vec<f64>),
    /// A head uses `(loss - mean) / scale` at that length.
    Loss { length: usize, mean: f64, scale: f64 },
}

/// Constraints hold up to this, in own units; it only absorbs the rounding of sums.
pub(super) const FEASIBLE: f64 = 1e-10;
/// Differences of the objective below this, in own units, are rounding.
pub(super) const EQUAL: f64 = 1e-9;

impl<'a> SubProblem<'a> {
    pub(super) fn new(core: &'a Core<'a>, weights: Vec<f64>, limits: Vec<Option<f64>>) -> Self {
        let mut rows = Vec::new();
        for (bound, sizes) in core.problem.bounds().iter().zip(&core.sizes) {
            let least = sizes.iter().copied().fold(f64::INFINITY, f64::min);
            let most = sizes.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let scale = if most > least { most - least } else { most.abs().max(1.0) };
            rows.push(Row::Size(sizes.iter().map(|s| (s - bound.max) / scale).collect()));
            if let Some(min) = bound.min {
                rows.push(Row::Size(sizes.iter().map(|s| (min - s) / scale).collect()));
            }
        }
        for (length, limit) in limits.iter().enumerate() {
            if let Some(limit) = limit {
                let (_, _, scale) = extent(core, &|i| if i == length { 1.0 } else { 0.0 });
                rows.push(Row::Loss { length, mean: limit / core.heads as f64, scale });
            }
        }
        let (floor, ceiling, scale) = extent(core, &|i| weights[i]);
        let (floor, ceiling) = (floor / scale, ceiling / scale);
        Self { core, weights, limits, rows, scale, floor, ceiling }
    }

    /// Objective in own units and use of every row.
    pub(super) fn measure(&self, choice: &[u16]) -> (f64, Vec<f64>) {
        let heads = self.core.heads as f64;
        let mut value = 0.0;
        let mut uses = vec![0.0; self.rows.len()];
        for (head, &c) in choice.iter().enumerate() {
            value += self.loss(head, c);
            for (total, row) in uses.iter_mut().zip(&self.rows) {
                *total += self.usage(row, head, c);
            }
        }
        uses.iter_mut().for_each(|total| *total /= heads);
        (value / heads, uses)
    }

    /// What one head adds to `heads` x the objective, in own units.
    pub(super) fn loss(&self, head: usize, candidate: u16) -> f64 {
        let at = head * self.core.cands + usize::from(candidate);
        let sum: f64 =
            self.weights.iter().zip(&self.core.losses).map(|(w, losses)| w * losses[at]).sum();
        sum / self.scale
    }

    /// What one head adds to `heads` x the use of a row.
    pub(super) fn usage(&self, row: &Row, head: usize, candidate: u16) -> f64 {
        match row {
            Row::Size(uses) => {
                uses[head / self.core.width * self.core.cands + usize::from(candidate)]
            }
            Row::Loss { length, mean, scale } => {
                let losses = &self.core.losses[*length];
                (losses[head * self.core.cands + usize::from(candidate)] - mean) / scale
            }
        }
    }

    /// The objective in the unit of the losses, from own units.
    pub(super) fn unscaled(&self, value: f64) -> f64 {
        value * self.scale * self.core.heads as f64
    }
}

/// Whether every constraint holds.
pub(super) fn feasible(uses: &[f64]) -> bool {
    uses.iter().all(|&total| total <= FEASIBLE)
}

/// Mean over heads of the least and the most that a candidate adds to a weighted sum of losses, and
/// the difference, or 1 if there is none.
pub(super) fn extent(core: &Core<'_>, weight: &dyn Fn(usize) -> f64) -> (f64, f64, f64) {
    let weights: Vec<f64> = (0..core.losses.len()).map(weight).collect();
    let (mut least, mut most) = (0.0, 0.0);
    for head in 0..core.heads {
        let (mut low, mut high) = (f64::INFINITY, f64::NEG_INFINITY);
        for at in head * core.cands..(head + 1) * core.cands {
            if core.losses[0][at].is_finite() {
                let x: f64 =
                    weights.iter().zip(&core.losses).map(|(w, losses)| w * losses[at]).sum();
                low = low.min(x);
                high = high.max(x);
            }
        }
        least += low;
        most += high;
    }
    let heads = core.heads as f64;
    let (least, most) = (least / heads, most / heads);
    (least, most, if most > least { most - least } else { 1.0 })
}
