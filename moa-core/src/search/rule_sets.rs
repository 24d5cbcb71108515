//! Which few candidates a layer should share among its heads.

/// Largest limit on distinct rules that the dual function treats exactly.
pub(super) const EXACT_LIMIT: usize = 3;

/// Finds sets of at most `limit` candidates that minimise the sum over heads of the least cost in
/// the set.
pub(super) struct RuleSets {
    width: usize,
    cands: usize,
    limit: usize,
    /// Least cost of each head over all candidates.
    least: Vec<f64>,
    sums: Vec<f64>,
    /// Cost and members of the best set so far.
    best: f64,
    set: Vec<u16>,
    chosen: Vec<u16>,
}

impl RuleSets {
    /// For layers of `width` heads with `cands` candidates.
    pub(super) fn new(width: usize, cands: usize, limit: usize) -> Self {
        Self {
            width,
            cands,
            limit,
            least: vec![0.0; width],
            sums: vec![0.0; cands],
            best: f64::INFINITY,
            set: Vec::new(),
            chosen: Vec::new(),
        }
    }

    /// The best set for `costs` (`[head][candidate]`) and its cost. `start` is a set to beat; the
    /// nearer it is to the best one, the less is searched.
    ///
    /// Exhaustive, but a head that the set does not serve within the budget left to beat the best
    /// known cost must be served by the next member, which leaves few candidates to try.
    pub(super) fn best(&mut self, costs: &[f64], start: &[u16]) -> (f64, &[u16]) {
        self.begin(costs, start);
        if self.limit <= EXACT_LIMIT {
            let open = vec![f64::INFINITY; self.width];
            self.chosen.clear();
            self.descend(costs, &open, self.limit);
        }
        (self.best, &self.set)
    }

    /// A set that no exchange of one member improves.
    pub(super) fn good(&mut self, costs: &[f64], start: &[u16]) -> (f64, &[u16]) {
        self.begin(costs, start);
        loop {
            let before = self.best;
            for out in 0..self.set.len() {
                self.chosen = self.set.clone();
                self.chosen.remove(out);
                let served = self.served(costs, &self.chosen);
                self.close(costs, &served, 0);
            }
            if self.best >= before {
                return (self.best, &self.set);
            }
        }
    }

    /// Takes `start`, filled up greedily, as the best known set.
    fn begin(&mut self, costs: &[f64], start: &[u16]) {
        for (least, row) in self.least.iter_mut().zip(costs.chunks(self.cands)) {
            *least = minimum(row);
        }
        self.set = start.to_vec();
        self.set.truncate(self.limit);
        self.best = self.served(costs, &self.set).iter().sum();
        while self.set.len() < self.limit {
            self.chosen = self.set.clone();
            let served = self.served(costs, &self.set);
            let before = self.set.len();
            // A further member is never worse; accept an equal one so that the set fills up.
            self.best = f64::INFINITY;
            self.close(costs, &served, 0);
            if self.set.len() == before {
                break;
            }
        }
    }

    /// Cost of each head with the best member of a set.
    fn served(&self, costs: &[f64], set: &[u16]) -> Vec<f64> {
        let serve =
            |row: &[f64]| set.iter().map(|&c| row[usize::from(c)]).fold(f64::INFINITY, f64::min);
        costs.chunks(self.cands).map(serve).collect()
    }

    fn descend(&mut self, costs: &[f64], served: &[f64], left: usize) {
        if left == 1 {
            self.close(costs, served, 0);
            return;
        }
        let budget = self.best - self.least.iter().sum::<f64>();
        let cands = self.cands;
        let within = |head: usize, cost: f64| cost - self.least[head] < budget;
        let serving = |head: usize| {
            let row = &costs[head * cands..][..cands];
            (0..cands).filter(move |&c| within(head, row[c]))
        };
        let next: Vec<usize> = (0..self.width)
            .filter(|&head| !within(head, served[head]))
            .min_by_key(|&head| serving(head).count())
            .map_or_else(|| (0..cands).collect(), |head| serving(head).collect());
        let mut done = 0;
        for c in next {
            let with: Vec<f64> = served
                .iter()
                .zip(costs.chunks(cands))
                .map(|(&cost, row)| if row[c] < cost { row[c] } else { cost })
                .collect();
            self.chosen.push(c as u16);
            if left == 2 {
                // Sets with a candidate below `done` were all seen in an earlier round.
                self.close(costs, &with, done);
            } else {
                self.descend(costs, &with, left - 1);
            }
            self.chosen.pop();
            if c == done {
                done += 1;
            }
        }
    }

    /// Adds the best last member, of at least `from`, to the chosen ones.
    fn close(&mut self, costs: &[f64], served: &[f64], from: usize) {
        let cands = self.cands;
        let sums = &mut self.sums[from..];
        sums.fill(0.0);
        let mut heads = served.chunks_exact(4).zip(costs.chunks_exact(4 * cands));
        for (cost, rows) in &mut heads {
            let (a, rest) = rows.split_at(cands);
            let (b, rest) = rest.split_at(cands);
            let (c, d) = rest.split_at(cands);
            let rows = a[from..].iter().zip(&b[from..]).zip(c[from..].iter().zip(&d[from..]));
            for (sum, ((&a, &b), (&c, &d))) in sums.iter_mut().zip(rows) {
                *sum +=
                    (less(a, cost[0]) + less(b, cost[1])) + (less(c, cost[2]) + less(d, cost[3]));
            }
        }
        let rest = self.width / 4 * 4;
        for (&cost, row) in served[rest..].iter().zip(costs[rest * cands..].chunks(cands)) {
            for (sum, &x) in sums.iter_mut().zip(&row[from..]) {
                *sum += less(x, cost);
            }
        }
        let least = minimum(sums);
        if least < self.best
            && let Some(last) = sums.iter().position(|&x| x == least)
        {
            self.best = least;
            self.set.clone_from(&self.chosen);
            self.set.push((from + last) as u16);
        }
    }
}

// Unlike f64::min this is one instruction on every machine; no cost is NaN.
fn less(a: f64, b: f64) -> f64 {
    if a < b { a } else { b }
}

/// The least entry; infinite if there is none.
pub(super) fn minimum(row: &[f64]) -> f64 {
    let mut lanes = [f64::INFINITY; 8];
    let chunks = row.chunks_exact(8);
    let rest = chunks.remainder();
    for chunk in chunks {
        for (lane, &x) in lanes.iter_mut().zip(chunk) {
            *lane = less(x, *lane);
        }
    }
    lanes.iter().chain(rest).fold(f64::INFINITY, |a, &b| less(b, a))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn best_set_is_the_exhaustive_one() {
        let (width, cands) = (6, 9_usize);
        let mut state = 1u64;
        for round in 0..60 {
            let costs: Vec<f64> = (0..width * cands)
                .map(|_| {
                    state =
                        state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
                    let x = (state >> 40) as f64 / (1u64 << 24) as f64;
                    if round % 3 == 0 { x } else { x.powi(8) }
                })
                .collect();
            for limit in 2..=3 {
                let mut truth = f64::INFINITY;
                for code in 0..cands.pow(limit as u32) {
                    let set: Vec<usize> =
                        (0..limit).map(|i| code / cands.pow(i as u32) % cands).collect();
                    let cost: f64 = costs
                        .chunks(cands)
                        .map(|row| set.iter().map(|&c| row[c]).fold(f64::INFINITY, f64::min))
                        .sum();
                    truth = truth.min(cost);
                }
                let mut sets = RuleSets::new(width, cands, limit);
                let good = sets.good(&costs, &[]).0;
                let (cost, set) = sets.best(&costs, &[]);
                assert!((cost - truth).abs() < 1e-12, "limit {limit}: {cost} {truth}");
                assert!(set.len() <= limit && good >= truth - 1e-12);
            }
        }
    }
}
