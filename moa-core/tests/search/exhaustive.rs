//! Against all choices there are.

use moa_core::Error;
use moa_core::search::{Options, solve};

use crate::instances::{limited, wild};

/// Exhaustive search, one length: nearly always the optimum itself, never below the bound; infeasible where
/// nothing is allowed.
#[test]
fn one_length_gives_nearly_always_the_exhaustive_optimum() {
    let (mut solved, mut infeasible, mut missed) = (0, 0, 0);
    for seed in 0..240 {
        let limit = [None, Some(1), Some(2)][seed as usize % 3];
        let (layers, heads) = [(2, 3), (1, 5), (2, 2), (3, 2)][seed as usize / 3 % 4];
        let instance = wild(seed, layers, heads, 3 + seed as usize % 2, 1, seed % 5 == 0);
        let truth =
            instance.everything(limit).into_iter().map(|l| l[0]).fold(f64::INFINITY, f64::min);
        match solve(&instance.problem(), &limited(limit)) {
            Ok(found) => {
                instance.check(&found, limit);
                assert_eq!(found.solutions.len(), 1);
                let value = found.solutions[0].losses[0];
                let bound = found.solutions[0].gap.bound;
                assert!(
                    bound <= truth + 1e-7 && truth <= value + 1e-7,
                    "seed {seed}: {value}, {truth}"
                );
                missed += usize::from(value > truth + 1e-7);
                solved += 1;
            }
            Err(Error::Infeasible { .. }) => {
                // Between two bounds a few heads may have a plan that no exchange leads to.
                missed += usize::from(truth.is_finite());
                infeasible += 1;
            }
            Err(other) => panic!("{other}"),
        }
    }
    assert!(solved > 100 && infeasible > 10, "{solved} solved, {infeasible} infeasible");
    assert!(missed < 24, "{missed} of 240");
}

/// Exhaustive search, several lengths: no plan is better than its bound allows, and the best plan at each
/// length is nearly among them.
#[test]
fn several_lengths_give_plans_near_the_true_front() {
    let mut plans = 0;
    for seed in 1000..1060 {
        let limit = [None, Some(2)][seed as usize % 2];
        let instance = wild(seed, 2, 2 + seed as usize % 3 / 2, 4, 2 + seed as usize % 2, false);
        let all = instance.everything(limit);
        let options = Options { max_plans: 100, ..limited(limit) };
        let Ok(found) = solve(&instance.problem(), &options) else {
            assert!(all.is_empty());
            continue;
        };
        instance.check(&found, limit);
        plans += found.solutions.len();
        for s in &found.solutions {
            let within = |l: &&Vec<f64>| {
                l.iter()
                    .zip(&s.gap.limits)
                    .all(|(x, limit)| limit.is_none_or(|limit| *x <= limit - 1e-9))
            };
            let value =
                |l: &Vec<f64>| l.iter().zip(&s.gap.weights).map(|(x, w)| x * w).sum::<f64>();
            let truth = all.iter().filter(within).map(value).fold(f64::INFINITY, f64::min);
            assert!(s.gap.bound <= truth + 1e-7, "seed {seed}: {} {truth}", s.gap.bound);
        }
        for length in 0..instance.lengths.len() {
            let least = |l: &mut dyn Iterator<Item = f64>| l.fold(f64::INFINITY, f64::min);
            let truth = least(&mut all.iter().map(|l| l[length]));
            let ours = least(&mut found.solutions.iter().map(|s| s.losses[length]));
            let scale = all.iter().map(|l| l[length] - truth).fold(0.0, f64::max);
            assert!(ours <= truth + 0.1 * scale, "seed {seed} length {length}: {ours} {truth}");
        }
    }
    assert!(plans > 100, "{plans}");
}
