use super::pool::Pool;
use super::subproblem::{EQUAL, FEASIBLE};

/// Moves that pairs are made of, the cheapest by reduced cost.
const MOVES: usize = 500;

/// One option per unit, with its totals, under improvement.
pub(super) struct Exchange<'a> {
    pool: &'a Pool,
    pub(super) selected: Vec<usize>,
    value: f64,
    uses: Vec<f64>,
    /// Largest total that satisfies a constraint.
    slack: f64,
    /// Least gain worth a move.
    gain: f64,
}

impl<'a> Exchange<'a> {
    pub(super) fn new(pool: &'a Pool, selected: Vec<usize>, heads: usize) -> Self {
        let value = selected.iter().map(|&option| pool.value[option]).sum();
        let mut uses = vec![0.0; pool.rows];
        for &option in &selected {
            uses.iter_mut().zip(pool.uses_of(option)).for_each(|(total, u)| *total += u);
        }
        // Half of the tolerance is kept for the rounding of running totals.
        let (slack, gain) = (0.5 * FEASIBLE * heads as f64, EQUAL * heads as f64);
        Self { pool, selected, value, uses, slack, gain }
    }

    /// Repairs the constraints, then applies improving exchanges of one and of two options until
    /// there are none. Whether all constraints hold.
    pub(super) fn run(&mut self) -> bool {
        if !self.repair() {
            return false;
        }
        while self.exchange_one() || self.exchange_two() {}
        true
    }

    /// Sum of the amounts by which constraints are broken.
    fn broken(&self, change: impl Fn(usize) -> f64) -> f64 {
        self.uses.iter().enumerate().map(|(row, total)| (total + change(row)).max(0.0)).sum()
    }

    /// Takes the option that mends most per unit of reduced cost, until nothing is broken.
    fn repair(&mut self) -> bool {
        let pool = self.pool;
        loop {
            let now = self.broken(|_| 0.0);
            if self.uses.iter().all(|&total| total <= self.slack) {
                return true;
            }
            let mut best: Option<(f64, usize)> = None;
            for option in 0..pool.value.len() {
                let old = self.selected[pool.unit[option] as usize];
                if option == old {
                    continue;
                }
                let (new_uses, old_uses) = (pool.uses_of(option), pool.uses_of(old));
                let mended = now - self.broken(|row| new_uses[row] - old_uses[row]);
                if mended > 1e-9 * now {
                    // What mends everything is not worth more for mending it twice.
                    let price = (pool.cost[option] - pool.cost[old]).max(0.0) + self.gain;
                    let rate = price / mended;
                    if best.is_none_or(|(least, _)| rate < least) {
                        best = Some((rate, option));
                    }
                }
            }
            let Some((_, option)) = best else { return false };
            self.apply(option);
        }
    }

    fn apply(&mut self, option: usize) {
        let pool = self.pool;
        let selected = &mut self.selected[pool.unit[option] as usize];
        let (new, old) = (pool.uses_of(option), pool.uses_of(*selected));
        for (total, (new, old)) in self.uses.iter_mut().zip(new.iter().zip(old)) {
            *total += new - old;
        }
        self.value += pool.value[option] - pool.value[*selected];
        *selected = option;
    }

    /// The best single improvement.
    fn exchange_one(&mut self) -> bool {
        let pool = self.pool;
        let mut best = (-self.gain, None);
        for (range, &old) in pool.ranges.iter().zip(&self.selected) {
            let old_uses = pool.uses_of(old);
            for option in range.clone() {
                let change = pool.value[option] - pool.value[old];
                if change < best.0 {
                    let mut rows = self.uses.iter().zip(pool.uses_of(option).iter().zip(old_uses));
                    if rows.all(|(total, (new, old))| total + (new - old) <= self.slack) {
                        best = (change, Some(option));
                    }
                }
            }
        }
        best.1.inspect(|&option| self.apply(option)).is_some()
    }

    /// The best improvement by two options at once, among the moves of least reduced cost.
    fn exchange_two(&mut self) -> bool {
        let pool = self.pool;
        let old = |option: usize| self.selected[pool.unit[option] as usize];
        let rise = |option: usize| pool.cost[option] - pool.cost[old(option)];
        let mut moves: Vec<(f64, usize)> = (0..pool.value.len())
            .filter(|&option| option != old(option))
            .map(|option| (rise(option), option))
            .collect();
        if moves.len() > MOVES {
            moves.select_nth_unstable_by(MOVES, |a, b| a.0.total_cmp(&b.0).then(a.1.cmp(&b.1)));
            moves.truncate(MOVES);
        }
        let rows = pool.rows;
        let mut changes = Vec::with_capacity(moves.len() * rows);
        let mut values = Vec::with_capacity(moves.len());
        // By rising objective, so that a partner that cannot help ends the scan.
        moves.sort_by(|a, b| {
            let value = |option: usize| pool.value[option] - pool.value[old(option)];
            value(a.1).total_cmp(&value(b.1)).then(a.1.cmp(&b.1))
        });
        for &(_, option) in &moves {
            let new = pool.uses_of(option).iter().zip(pool.uses_of(old(option)));
            changes.extend(new.map(|(new, old)| new - old));
            values.push(pool.value[option] - pool.value[old(option)]);
        }
        let mut best = (-self.gain, None);
        for i in 0..moves.len() {
            if values[i] >= 0.0 {
                break;
            }
            let first = &changes[i * rows..][..rows];
            for j in i + 1..moves.len() {
                if values[i] + values[j] >= best.0 {
                    break;
                }
                let second = &changes[j * rows..][..rows];
                if pool.unit[moves[i].1] != pool.unit[moves[j].1]
                    && self
                        .uses
                        .iter()
                        .zip(first.iter().zip(second))
                        .all(|(total, (a, b))| total + a + b <= self.slack)
                {
                    best = (values[i] + values[j], Some((moves[i].1, moves[j].1)));
                }
            }
        }
        let Some((first, second)) = best.1 else { return false };
        self.apply(first);
        self.apply(second);
        true
    }

    /// Objective, mean over heads.
    pub(super) fn value(&self, heads: usize) -> f64 {
        self.value / heads as f64
    }
}
