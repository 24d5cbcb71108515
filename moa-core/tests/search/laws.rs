//! Laws that hold for every problem.

use std::time::Duration;

use moa_core::search::{Bound, Options, fixed_grid, paper_grid, scaled_grid, solve};
use moa_core::{Error, SplitMix64};
use proptest::prelude::*;

use crate::instances::{Instance, lifelike, limited, quarter, wild};

/// Small models, 99 rules, 4 bounds: each head is a large part of the budget.
#[test]
fn small_models_are_solved_to_a_few_percent_of_the_bound() {
    for (layers, heads, limit) in [(6, 2, None), (6, 2, Some(1)), (8, 4, None)] {
        let bounds = quarter(&[2048, 4096, 8192, 16384]);
        let instance = lifelike(3, layers, heads, scaled_grid(8192), &[2048, 4096, 8192], bounds);
        let options = Options { intervals: 1, ..limited(limit) };
        let found = solve(&instance.problem(), &options).unwrap();
        instance.check(&found, limit);
        assert!(found.subproblems == 3 && found.worst_gap < 0.1, "{layers} x {heads}: {found:?}");
    }
}

/// Where layers differ in what candidates cost, the bound is on what each costs there.
#[test]
fn sizes_of_layers_are_their_own() {
    let bounds = vec![Bound { length: 4096, max: 0.25, min: None }];
    let instance = lifelike(4, 4, 2, fixed_grid(4096, 16), &[4096], bounds);
    let (cands, sizes) = (instance.candidates.len(), &instance.sizes);
    // Two layers see no more than an eighth of the context.
    let layer = |layer: usize| {
        sizes.iter().map(move |size| if layer.is_multiple_of(2) { size.min(0.125) } else { *size })
    };
    let own: Vec<f64> = (0..4).flat_map(layer).collect();
    let problem = instance.problem();
    let alike = solve(&problem, &limited(None)).unwrap();
    let found = solve(&problem.with_layer_sizes(own.clone()).unwrap(), &limited(None)).unwrap();
    let [found, alike] = [&found.solutions[0], &alike.solutions[0]];
    let size = |(head, c): (usize, &usize)| own[head / 2 * cands + c];
    let mean = found.choice.iter().enumerate().map(size).sum::<f64>() / 8.0;
    assert!((mean - found.sizes[0]).abs() < 1e-12 && mean <= 0.25 + 1e-9 && mean > 0.2, "{mean}");
    assert!(found.losses[0] < alike.losses[0], "{} {}", found.losses[0], alike.losses[0]);
    for wrong in [vec![], vec![f64::NAN; own.len()]] {
        assert!(matches!(instance.problem().with_layer_sizes(wrong), Err(Error::Invalid { .. })));
    }
}

#[test]
fn threads_do_not_change_the_plans() {
    let bounds = quarter(&[2048, 8192]);
    let instance = lifelike(5, 5, 4, paper_grid(), &[2048, 4096, 8192], bounds);
    let with = |threads| {
        // A time limit could end a search at another point each time.
        let time_limit = Duration::from_secs(3600);
        let options = Options { threads, time_limit, intervals: 2, ..Options::default() };
        solve(&instance.problem(), &options).unwrap().solutions
    };
    let one = with(1);
    assert!(one.len() > 2);
    assert_eq!(one, with(2));
    assert_eq!(one, with(5));
}

#[test]
fn count_of_plans_keeps_the_best_of_each_length() {
    let bounds = quarter(&[2048, 8192]);
    let instance = lifelike(6, 4, 4, paper_grid(), &[2048, 8192], bounds);
    let with = |max_plans| {
        let options = Options { max_plans, intervals: 8, ..Options::default() };
        solve(&instance.problem(), &options).unwrap()
    };
    let (all, few) = (with(100), with(3));
    assert!(all.solutions.len() > 3 && few.solutions.len() == 3);
    assert_eq!(all.solutions[0], few.solutions[0], "best at the longest length comes first");
    assert_eq!(all.solutions.last(), few.solutions.last());
    assert!(few.solutions.is_sorted_by(|a, b| a.losses[1] <= b.losses[1]));
}

#[test]
fn no_time_still_gives_plans_within_the_bounds() {
    let instance = lifelike(8, 6, 4, scaled_grid(8192), &[2048, 8192], quarter(&[4096, 16384]));
    let options = Options { time_limit: Duration::ZERO, ..limited(Some(2)) };
    let found = solve(&instance.problem(), &options).unwrap();
    instance.check(&found, Some(2));
    assert!(found.worst_gap < 0.05, "{}", found.worst_gap);
}

#[test]
fn without_bounds_every_head_takes_its_best_rule() {
    let instance = Instance { bounds: vec![], sizes: vec![], ..wild(1, 2, 3, 5, 1, false) };
    let found = solve(&instance.problem(), &limited(None)).unwrap();
    instance.check(&found, None);
    let best: f64 = instance
        .losses
        .chunks(5)
        .map(|head| head.iter().copied().fold(f64::INFINITY, f64::min))
        .sum();
    assert!((found.solutions[0].losses[0] - best).abs() < 1e-9);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, failure_persistence: None, ..ProptestConfig::default() })]

    /// Every solution obeys bounds, limits on rules and its own epsilon constraints, at any size.
    #[test]
    fn solutions_are_feasible(
        seed in 0u64..1 << 40,
        layers in 1usize..7,
        heads in 1usize..7,
        lengths in 1usize..4,
        limit in prop::option::of(1usize..6),
        min: bool,
        max in 0.1f64..0.9,
    ) {
        let bounds = [2048, 4096, 16384]
            .map(|length| Bound { length, max, min: min.then_some(0.6 * max) });
        let lengths = &[2048, 4096, 8192][..lengths];
        let instance = lifelike(seed, layers, heads, paper_grid(), lengths, bounds.to_vec());
        let options = Options { max_rules_per_layer: limit, intervals: 2, ..Options::default() };
        match solve(&instance.problem(), &options) {
            Ok(found) => instance.check(&found, limit),
            // Few heads with few rules cannot always reach a mean between two bounds.
            Err(Error::Infeasible { .. }) => prop_assert!(min),
            Err(other) => prop_assert!(false, "{}", other),
        }
    }

    /// More room costs no more than what the plan before may be away from the best one.
    #[test]
    fn loss_falls_as_the_bound_rises(seed in 0u64..1 << 40, limit in prop::option::of(1usize..3)) {
        let mut last = f64::INFINITY;
        for max in [0.15, 0.25, 0.4, 0.7, 1.0] {
            let bounds = vec![Bound { length: 4096, max, min: None }];
            let instance = lifelike(seed, 3, 3, fixed_grid(4096, 16), &[4096], bounds);
            let found = solve(&instance.problem(), &limited(limit)).unwrap();
            let gap = &found.solutions[0].gap;
            prop_assert!(gap.bound <= last + 1e-6, "{} after {}", gap.bound, last);
            last = found.solutions[0].losses[0];
        }
    }

    /// The bound does not depend on the order of heads within layers, nor on a constant added to a head's
    /// losses.
    #[test]
    fn order_of_heads_and_constants_do_not_matter(seed in 0u64..1 << 40, limit in prop::option::of(1usize..3)) {
        let one = lifelike(seed, 3, 4, fixed_grid(4096, 10), &[4096], quarter(&[2048, 8192]));
        let mut other = one.clone();
        let shift = SplitMix64::new(seed).unit();
        other.losses = one
            .losses
            .chunks(4 * 10)
            .rev()
            .flat_map(|layer| layer.chunks(10).rev().flatten())
            .map(|loss| loss - shift)
            .collect();
        let solved = |instance: &Instance| solve(&instance.problem(), &limited(limit)).unwrap().solutions.remove(0);
        let (a, b) = (solved(&one), solved(&other));
        prop_assert!((a.gap.bound - b.gap.bound - 12.0 * shift).abs() < 1e-3 * a.gap.bound.abs().max(1.0));
    }
}
