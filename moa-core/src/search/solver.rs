use super::bundle::{Maximum, Stop, maximise};
use super::exchange::Exchange;
use super::lagrangian::{Lagrangian, Prices};
use super::pool::Pool;
use super::subproblem::{EQUAL, SubProblem, feasible};
use crate::SplitMix64;

/// Outcome of one sub-problem.
pub(super) struct Found {
    /// Best choice, if one that breaks no constraint was found.
    pub(super) choice: Option<Vec<u16>>,
    /// Proven lower bound of the objective, own units; infinite if there is proof that no choice
    /// exists.
    pub(super) bound: f64,
    /// Where the dual function is largest, to start a similar sub-problem from.
    pub(super) warm: Warm,
    /// The choice that came closest to the constraints, if none satisfies them.
    pub(super) closest: Option<Vec<u16>>,
}

/// Start of a dual ascent.
#[derive(Clone, Debug)]
pub(super) struct Warm {
    pub(super) multipliers: Vec<f64>,
    pub(super) step: f64,
}

/// Gap ([`crate::search::Gap::relative`]) at which exchanges end.
const CLOSE: f64 = 1e-5;

/// Evaluations of the dual function at the root.
const ASCENT: usize = 200;
/// Rounds of new option pools around the best plan.
const ROUNDS: usize = 4;
/// Perturbed multipliers that plans are started from: relative size of each perturbation.
const SHAKES: [f64; 6] = [0.003, 0.01, 0.01, 0.03, 0.03, 0.1];

/// Minimises one sub-problem: dual ascent for the bound, exchanges for a plan.
pub(super) fn solve_one(sub: &SubProblem<'_>, warm: Option<&Warm>) -> Found {
    let mut dual = Lagrangian::new(sub);
    let cold = Warm { multipliers: vec![0.0; sub.rows.len()], step: 1.0 };
    let warm = warm.filter(|w| w.multipliers.len() == sub.rows.len()).unwrap_or(&cold);
    // Above the worst choice of all there is none that is feasible.
    let none = sub.ceiling + 1e-6 * (sub.ceiling - sub.floor) + EQUAL;
    let stop = Stop { evaluations: ASCENT, tolerance: 1e-6, enough: none };
    let root = maximise(&mut dual, &warm.multipliers, warm.step, &stop);
    let warm = Warm { multipliers: root.multipliers.clone(), step: root.step };
    if root.point.value >= none {
        return Found {
            choice: None,
            bound: f64::INFINITY,
            warm,
            closest: closest(sub, &root, &dual),
        };
    }

    let mut best = root.incumbent.clone();
    round(&mut dual, &root, &mut best);
    let bound = root.point.value.max(sub.floor);
    let closest = if best.is_none() { closest(sub, &root, &dual) } else { None };
    Found { choice: best.map(|(_, choice)| choice), bound, warm, closest }
}

/// As [`crate::search::Gap::relative`]; 1 without a plan.
fn gap(sub: &SubProblem<'_>, best: Option<&(f64, Vec<u16>)>, bound: f64) -> f64 {
    match best {
        Some((value, _)) if value - bound <= EQUAL => 0.0,
        Some((value, _)) => (value - bound) / (value - sub.floor),
        None => 1.0,
    }
}

/// Plans from points near the maximum of the dual function, improved by exchanges.
fn round(dual: &mut Lagrangian<'_>, root: &Maximum, best: &mut Option<(f64, Vec<u16>)>) {
    let sub = dual.sub;
    let heads = sub.core.heads;
    let mut seeds = seeds(dual, root, best.as_ref());
    for _ in 0..ROUNDS {
        let (pool, starts) = Pool::new(dual, &root.multipliers, &seeds);
        let before = best.as_ref().map_or(f64::INFINITY, |(value, _)| *value);
        for start in starts {
            let mut exchange = Exchange::new(&pool, start, heads);
            if exchange.run()
                && best.as_ref().is_none_or(|(value, _)| exchange.value(heads) < *value)
            {
                let choice = pool.choice(&exchange.selected);
                // Judged anew, without the rounding of running totals.
                let (value, uses) = sub.measure(&choice);
                if feasible(&uses) && sub.core.within_limit(&choice) {
                    *best = Some((value, choice));
                }
            }
        }
        let Some((value, choice)) = best.as_ref() else { return };
        // New options appear around the best plan only if it moved.
        if *value >= before || gap(sub, best.as_ref(), root.point.value) <= CLOSE {
            return;
        }
        seeds = vec![choice.clone()];
    }
}

/// Choices near the maximum, each within the limit on distinct rules.
fn seeds(
    dual: &mut Lagrangian<'_>,
    root: &Maximum,
    incumbent: Option<&(f64, Vec<u16>)>,
) -> Vec<Vec<u16>> {
    let sub = dual.sub;
    let mut seeds: Vec<Vec<u16>> = vec![root.point.choice.clone()];
    seeds.extend(incumbent.map(|(_, choice)| choice.clone()));
    seeds.extend(root.mixture.iter().cloned());
    let mut random = SplitMix64::new(0x9e37_79b9_7f4a_7c15);
    for size in SHAKES {
        let shaken: Vec<f64> = root
            .multipliers
            .iter()
            .map(|m| m * (1.0 + size * (2.0 * random.unit() - 1.0)))
            .collect();
        seeds.push(dual.evaluate(&shaken).choice);
    }
    let prices = Prices::new(sub, &root.multipliers);
    seeds.iter_mut().for_each(|seed| dual.impose_limit(seed, &prices));
    let mut kept: Vec<Vec<u16>> = Vec::with_capacity(seeds.len());
    for seed in seeds {
        if !kept.contains(&seed) {
            kept.push(seed);
        }
    }
    kept
}

/// A choice that breaks the constraints as little as the heuristics can.
fn closest(sub: &SubProblem<'_>, root: &Maximum, dual: &Lagrangian<'_>) -> Option<Vec<u16>> {
    let mut seed = root.point.choice.clone();
    dual.impose_limit(&mut seed, &Prices::new(sub, &root.multipliers));
    let (pool, starts) = Pool::new(dual, &root.multipliers, &[seed]);
    let mut exchange = Exchange::new(&pool, starts.into_iter().next()?, sub.core.heads);
    exchange.run();
    Some(pool.choice(&exchange.selected))
}
