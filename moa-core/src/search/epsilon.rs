use std::sync::atomic::{AtomicUsize, Ordering};

use super::clock::Instant;
use super::pareto::{keep_efficient, spread_out};
use super::reduce::Core;
use super::solver::{Found, Warm, solve_one};
use super::subproblem::{SubProblem, extent, feasible};
use super::{Gap, Options, ParetoSet, Problem, Solution};
use crate::{Error, Result};

/// Weight of the other lengths in an objective, in units of the spreads of the losses. It decides
/// ties for efficient plans (augmented epsilon constraints, Mavrotas 2009).
const AUGMENTATION: f64 = 1e-3;

/// Finds the Pareto set over the objective lengths by the epsilon-constraint method (MoA,
/// arXiv 2406.14909, section 4): least loss at each length alone; the ranges that this gives, for
/// all lengths but the longest, are cut into [`Options::intervals`]; the loss at the longest length
/// is minimised under each combination of limits.
///
/// # Errors
/// [`Error::Infeasible`] if no choice meets the bounds, or none was found within the limits of time;
/// [`Error::Invalid`] if an option is outside its domain.
pub fn solve(problem: &Problem, options: &Options) -> Result<ParetoSet> {
    let begin = Instant::now();
    options.validate()?;
    problem.reachable()?;
    let core = Core::new(problem, options);
    let front = Front::new(&core, options, begin);

    let lengths = problem.lengths().len();
    let mut cells = in_parallel(options.workers(), lengths, |i| {
        front.cell(front.weights(i), vec![None; lengths], None)
    });
    for cell in &cells {
        if cell.found.choice.is_none() {
            return Err(infeasible(problem, &core, &cell.found));
        }
    }
    let rows = front.rows(&cells);
    let warm = &cells[front.longest].found.warm;
    let walked = in_parallel(options.workers(), rows.len(), |i| front.walk(&rows[i], warm));
    cells.extend(walked.into_iter().flatten());

    let subproblems = cells.len();
    let efficient = keep_efficient(front.solutions(cells));
    let mut solutions = spread_out(efficient, options.max_plans, front.longest);
    solutions.sort_by(|a, b| {
        let by = |i: usize| a.losses[i].total_cmp(&b.losses[i]);
        (0..lengths).fold(by(front.longest), |order, i| order.then(by(i)))
    });
    let worst_gap = solutions.iter().map(|s| s.gap.relative).fold(0.0, f64::max);
    Ok(ParetoSet { solutions, subproblems, seconds: begin.elapsed().as_secs_f64(), worst_gap })
}

struct Front<'a> {
    core: &'a Core<'a>,
    intervals: usize,
    /// Index of the longest objective length.
    longest: usize,
    deadline: Instant,
}

/// One solved sub-problem.
struct Cell<'a> {
    sub: SubProblem<'a>,
    found: Found,
}

impl<'a> Front<'a> {
    fn new(core: &'a Core<'a>, options: &Options, begin: Instant) -> Self {
        let lengths = core.problem.lengths();
        let longest = (0..lengths.len()).max_by_key(|&i| lengths[i]).unwrap_or(0);
        // A limit beyond what the clock can hold is no limit.
        let far = std::time::Duration::from_secs(1 << 30);
        let deadline = begin + options.time_limit.min(far);
        Self { core, intervals: options.intervals, longest, deadline }
    }

    /// Weights of the objective that minimises the loss at the length of that index.
    fn weights(&self, main: usize) -> Vec<f64> {
        let spread = |i: usize| extent(self.core, &|j| if i == j { 1.0 } else { 0.0 }).2;
        let weight =
            |i: usize| if i == main { 1.0 } else { AUGMENTATION * spread(main) / spread(i) };
        (0..self.core.losses.len()).map(weight).collect()
    }

    fn cell(&self, weights: Vec<f64>, limits: Vec<Option<f64>>, warm: Option<&Warm>) -> Cell<'a> {
        let sub = SubProblem::new(self.core, weights, limits);
        let found = solve_one(&sub, warm);
        Cell { sub, found }
    }

    /// All combinations of limits, in rows along which only the last limit changes, loosest first.
    /// The combination without any limit was solved before.
    fn rows(&self, alone: &[Cell<'_>]) -> Vec<Vec<Vec<Option<f64>>>> {
        let losses: Vec<Vec<f64>> = alone
            .iter()
            .filter_map(|cell| cell.found.choice.as_ref())
            .map(|choice| self.core.problem.losses_of(&self.core.original(choice)))
            .collect();
        let lengths = losses.len();
        let mut rows: Vec<Vec<Vec<Option<f64>>>> = vec![vec![vec![None; lengths]]];
        let mut last = true;
        for length in (0..lengths).rev().filter(|&i| i != self.longest) {
            let best = losses[length][length];
            let worst = losses.iter().map(|l| l[length]).fold(best, f64::max);
            let cuts =
                if worst - best > 1e-9 * worst.abs().max(best.abs()) { self.intervals } else { 1 };
            let limit =
                |k: usize| (k < cuts).then(|| best + (worst - best) * k as f64 / cuts as f64);
            let with = |limits: &Vec<Option<f64>>, k: usize| {
                let mut limits = limits.clone();
                limits[length] = limit(k);
                limits
            };
            let ks: Vec<usize> = (1..=cuts).rev().collect();
            rows = if std::mem::take(&mut last) {
                rows.iter().map(|row| ks.iter().map(|&k| with(&row[0], k)).collect()).collect()
            } else {
                ks.iter()
                    .flat_map(|&k| rows.iter().map(move |row| (k, row)))
                    .map(|(k, row)| row.iter().map(|limits| with(limits, k)).collect())
                    .collect()
            };
        }
        rows.iter_mut().for_each(|row| row.retain(|limits| limits.iter().any(Option::is_some)));
        rows
    }

    /// Solves the cells of a row, each from the multipliers of the one before.
    fn walk(&self, row: &[Vec<Option<f64>>], warm: &Warm) -> Vec<Cell<'a>> {
        let weights = self.weights(self.longest);
        let mut warm = warm.clone();
        let mut cells = Vec::with_capacity(row.len());
        for limits in row {
            if Instant::now() >= self.deadline {
                break;
            }
            let rows = limits.iter().flatten().count()
                + self.core.problem.bounds().len()
                + self.core.problem.bounds().iter().filter(|bound| bound.min.is_some()).count();
            // Constraints on losses come last and in the order of lengths: new ones start at 0.
            warm.multipliers.resize(rows, 0.0);
            let cell = self.cell(weights.clone(), limits.clone(), Some(&warm));
            if cell.found.choice.is_none() {
                // The limits that follow are tighter.
                cells.push(cell);
                break;
            }
            warm = cell.found.warm.clone();
            cells.push(cell);
        }
        cells
    }

    /// The best choice for each cell, whichever cell it was found for.
    fn solutions(&self, cells: Vec<Cell<'_>>) -> Vec<Solution> {
        let problem = self.core.problem;
        let choices: Vec<Vec<u16>> =
            cells.iter().filter_map(|cell| cell.found.choice.clone()).collect();
        let solution = |cell: &Cell<'_>| {
            let sub = &cell.sub;
            let fitting = choices.iter().filter_map(|choice| {
                let (value, uses) = sub.measure(choice);
                feasible(&uses).then_some((value, choice))
            });
            let (_, choice) = fitting.min_by(|a, b| a.0.total_cmp(&b.0))?;
            let choice = self.core.original(choice);
            let losses = problem.losses_of(&choice);
            let value = losses.iter().zip(&sub.weights).map(|(loss, weight)| loss * weight).sum();
            let (bound, floor) = (sub.unscaled(cell.found.bound), sub.unscaled(sub.floor));
            let (weights, limits) = (sub.weights.clone(), sub.limits.clone());
            let gap = Gap::new(weights, limits, value, bound, floor, sub.unscaled(1.0));
            let sizes = problem.sizes_of(&choice);
            Some(Solution { choice, losses, sizes, gap })
        };
        cells.iter().filter_map(solution).collect()
    }
}

/// The error when bounds that can be met one by one cannot be met together.
fn infeasible(problem: &Problem, core: &Core<'_>, found: &Found) -> Error {
    let none = match found.bound == f64::INFINITY {
        true => "no plan meets",
        false => "no plan was found that meets",
    };
    let sizes = found
        .closest
        .as_ref()
        .map_or_else(Vec::new, |choice| problem.sizes_of(&core.original(choice)));
    let excess = |bound: &super::Bound, size: f64| {
        let below = bound.min.map_or(f64::NEG_INFINITY, |min| min - size);
        (size - bound.max).max(below) / bound.max.abs().max(f64::MIN_POSITIVE)
    };
    let worst = problem
        .bounds()
        .iter()
        .zip(sizes)
        .max_by(|a, b| excess(a.0, a.1).total_cmp(&excess(b.0, b.1)));
    let Some((bound, size)) = worst else {
        return Error::invalid("bounds", "bounds that can be met together", "none that can");
    };
    let least = bound.min.map_or_else(String::new, |min| format!("at least {min} and "));
    Error::Infeasible {
        length: bound.length,
        reason: format!(
            "{none} all bounds; the closest has a mean size of {size} here, \
             {least}at most {} is asked for",
            bound.max
        ),
    }
}

/// Calls `work` with every index below `count` on up to `threads` threads; results in order.
fn in_parallel<T: Send>(threads: usize, count: usize, work: impl Fn(usize) -> T + Sync) -> Vec<T> {
    let next = AtomicUsize::new(0);
    let run = || {
        let mut done = Vec::new();
        loop {
            let i = next.fetch_add(1, Ordering::Relaxed);
            if i >= count {
                return done;
            }
            done.push((i, work(i)));
        }
    };
    let mut results: Vec<(usize, T)> = std::thread::scope(|scope| {
        let others: Vec<_> = (1..threads.min(count)).map(|_| scope.spawn(run)).collect();
        let mut results = run();
        for other in others {
            match other.join() {
                Ok(done) => results.extend(done),
                Err(panic) => std::panic::resume_unwind(panic),
            }
        }
        results
    });
    results.sort_by_key(|(i, _)| *i);
    results.into_iter().map(|(_, result)| result).collect()
}
