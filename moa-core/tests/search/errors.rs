//! What is refused.

use moa_core::Error;
use moa_core::search::{Bound, Options, Problem, density_sizes, fixed_grid, solve};

use crate::instances::{Instance, lifelike, limited, quarter, wild};

#[test]
fn bounds_that_cannot_be_met_are_named() {
    let base = lifelike(2, 2, 2, fixed_grid(4096, 8), &[4096], quarter(&[2048, 4096]));
    let solve_with = |bounds: Vec<Bound>, sizes: Vec<f64>, limit| {
        let instance = Instance { bounds, sizes, ..base.clone() };
        match solve(&instance.problem(), &limited(limit)) {
            Err(Error::Infeasible { length, reason }) => (length, reason),
            other => panic!("{other:?}"),
        }
    };
    let bound = |length, max, min| Bound { length, max, min };

    let bounds = vec![bound(2048, 1.0, None), bound(4096, 0.1, None)];
    let sizes = density_sizes(&base.candidates, &bounds, 128);
    let (length, reason) = solve_with(bounds, sizes.clone(), None);
    assert_eq!(length, 4096);
    assert!(reason.contains("0.125") && reason.contains("0.1 "), "{reason}");

    let (length, reason) =
        solve_with(vec![bound(2048, 3.0, Some(2.0)), bound(4096, 1.0, None)], sizes, None);
    assert_eq!(length, 2048);
    assert!(reason.contains("largest"), "{reason}");

    // One rises where the other falls: each alone is easy.
    let rising = |i: usize| i as f64 / 7.0;
    let sizes: Vec<f64> = (0..8).map(rising).chain((0..8).map(|i| 1.0 - rising(i))).collect();
    let (_, reason) =
        solve_with(vec![bound(1, 0.4, None), bound(2, 0.4, None)], sizes.clone(), Some(1));
    assert!(reason.contains("no plan meets"), "{reason}");

    // Between the two that a mean over four heads can reach.
    let sizes: Vec<f64> = (0..16).map(|i| f64::from(i % 8)).collect();
    let (_, reason) = solve_with(vec![bound(1, 2.2, Some(2.1)), bound(2, 9.0, None)], sizes, None);
    assert!(reason.contains("no plan was found"), "{reason}");
}

#[test]
fn malformed_problems_and_options_are_refused() {
    let good = wild(1, 2, 2, 3, 2, true);
    good.problem();
    let refused = |change: &dyn Fn(&mut Instance), what: &str| {
        let mut i = good.clone();
        change(&mut i);
        match Problem::new(i.layers, i.heads, i.candidates, i.lengths, i.losses, i.bounds, i.sizes)
        {
            Err(Error::Invalid { what: got, .. }) => assert_eq!(got, what),
            other => panic!("{what}: {other:?}"),
        }
    };
    refused(&|i| i.layers = 0, "layers");
    refused(&|i| i.heads = 1 << 20, "heads_per_layer");
    refused(&|i| i.candidates.clear(), "candidates");
    refused(&|i| i.lengths.clear(), "lengths");
    refused(&|i| i.lengths[1] = i.lengths[0], "lengths");
    refused(&|i| i.losses.truncate(5), "losses");
    refused(&|i| i.losses[3] = f64::NAN, "losses");
    refused(&|i| i.losses[3] = -1e200, "losses");
    refused(&|i| i.sizes.truncate(5), "sizes");
    refused(&|i| i.sizes[3] = f64::INFINITY, "sizes");
    refused(&|i| i.bounds[0].max = f64::NAN, "bound max");
    refused(&|i| i.bounds[0].min = Some(i.bounds[0].max + 0.1), "bound min");

    let problem = wild(1, 2, 2, 3, 1, false).problem();
    let default = Options::default();
    for (options, what) in [
        (Options { max_rules_per_layer: Some(0), ..default.clone() }, "max_rules_per_layer"),
        (Options { intervals: 0, ..default.clone() }, "intervals"),
        (Options { intervals: 65, ..default.clone() }, "intervals"),
        (Options { max_plans: 0, ..default }, "max_plans"),
    ] {
        match solve(&problem, &options) {
            Err(Error::Invalid { what: got, .. }) => assert_eq!(got, what),
            other => panic!("{what}: {other:?}"),
        }
    }
}
