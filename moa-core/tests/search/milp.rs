//! Against a MILP solver.

use moa_core::search::{ParetoSet, Solution, fixed_grid, solve};

use crate::instances::{Instance, lifelike, limited, quarter};

/// The same problem as a mixed-integer linear programme.
fn milp(instance: &Instance, limit: Option<usize>) -> f64 {
    let mut lp = microlp::Problem::new(microlp::OptimizationDirection::Minimize);
    let n = instance.candidates.len();
    let take: Vec<_> = instance.losses.iter().map(|&loss| lp.add_binary_var(loss)).collect();
    for head in take.chunks(n) {
        lp.add_constraint(head.iter().map(|&x| (x, 1.0)), microlp::ComparisonOp::Eq, 1.0);
    }
    for (b, bound) in instance.bounds.iter().enumerate() {
        let terms: Vec<_> =
            take.iter().enumerate().map(|(i, &x)| (x, instance.sizes[b * n + i % n])).collect();
        let heads = instance.total() as f64;
        lp.add_constraint(&terms, microlp::ComparisonOp::Le, heads * bound.max);
        if let Some(min) = bound.min {
            lp.add_constraint(&terms, microlp::ComparisonOp::Ge, heads * min);
        }
    }
    if let Some(limit) = limit {
        for layer in take.chunks(n * instance.heads) {
            let used: Vec<_> = (0..n).map(|_| lp.add_binary_var(0.0)).collect();
            for (i, &x) in layer.iter().enumerate() {
                lp.add_constraint([(x, 1.0), (used[i % n], -1.0)], microlp::ComparisonOp::Le, 0.0);
            }
            lp.add_constraint(
                used.iter().map(|&x| (x, 1.0)),
                microlp::ComparisonOp::Le,
                limit as f64,
            );
        }
    }
    lp.solve().unwrap().into_solution().unwrap().objective()
}

#[test]
fn medium_problems_agree_with_a_milp_solver() {
    for seed in 0..4 {
        let mut bounds = quarter(&[2048, 8192]);
        bounds[0].min = (seed % 2 == 1).then_some(0.22);
        let instance = lifelike(seed, 6, 4, fixed_grid(4096, 12), &[4096], bounds);
        let truth = milp(&instance, None);
        let found = solve(&instance.problem(), &limited(None)).unwrap();
        agrees(&instance, &found, truth);
    }
    for seed in 0..2 {
        let instance = lifelike(seed, 4, 3, fixed_grid(4096, 12), &[4096], quarter(&[2048, 8192]));
        let truth = milp(&instance, Some(2));
        let found = solve(&instance.problem(), &limited(Some(2))).unwrap();
        instance.check(&found, Some(2));
        agrees(&instance, &found, truth);
    }
}

fn agrees(instance: &Instance, found: &ParetoSet, truth: f64) {
    let Solution { gap, .. } = &found.solutions[0];
    assert!(gap.bound <= truth + 1e-6 && truth <= gap.value + 1e-6, "{gap:?}, truth {truth}");
    // A few heads: each is a large part of the budget, and plans cannot be shifted a little.
    let floor = gap.value - (gap.value - gap.bound) / gap.relative.max(1e-12);
    assert!(gap.value - truth <= 0.01 * (truth - floor).abs() + 1e-6, "{gap:?}, truth {truth}");
    assert!(gap.relative < 0.1, "{gap:?} {:?}", instance.bounds);
}
