//! Spaces of plans: what each may choose, and that all obey the same bounds.

use moa_core::search::Bound;
use moa_core::{
    CostBound, CostCurve, Error, FoundPlans, Influence, ModelShape, Plan, PlanRequest, Profile,
    ProfileInfo, Space, Span,
};
use proptest::prelude::*;

const SHAPE: ModelShape = ModelShape { layers: 3, query_heads: 4, kv_heads: 2, head_dim: 8 };
const LENGTH: usize = 1024;

/// Influence `scale[head]` for each head, less with distance, halved at every block.
fn profile(scale: &[f64]) -> Profile {
    let block = 64;
    let side = LENGTH / block;
    let mut influence = Influence::new(SHAPE, LENGTH, block).unwrap();
    for (layer, scale) in scale.chunks(2).enumerate() {
        let mut blocks = vec![0.0; 2 * side * side];
        for (head, scale) in scale.iter().enumerate() {
            for row in 0..side {
                for column in 0..=row {
                    let fall = (-((row - column) as f64) / 4.0).exp();
                    blocks[(head * side + row) * side + column] = scale * fall;
                }
            }
        }
        influence.add_layer(layer, side, &blocks, 1.0).unwrap();
    }
    influence.count_sample();
    let mut profile = Profile::new(SHAPE, ProfileInfo::default());
    profile.add(influence).unwrap();
    profile
}

fn find(space: Space, bounds: &[Bound], profile: &Profile) -> Result<FoundPlans, Error> {
    let request = PlanRequest::bounded(bounds.to_vec(), 16, 32)?.with_space(space);
    request.search_profile(profile, &[LENGTH])
}

fn at_most(max: f64) -> Bound {
    Bound { length: LENGTH, max, min: None }
}

fn is_full(plan: &Plan) -> Vec<bool> {
    plan.spans(LENGTH).iter().map(|span| span.total() == LENGTH).collect()
}

#[test]
fn duo_keeps_the_heads_whole_that_need_the_context_most() {
    // Ranked 4, 1, 0, 3, 5, 2; the last two would rather see less.
    let profile = profile(&[2.0, 5.0, -3.0, 1.0, 9.0, -1.0]);
    let full = |max| is_full(&find(Space::Duo, &[at_most(max)], &profile).unwrap().plans[0]);
    assert_eq!(full(0.36), [false, true, false, false, true, false]);
    assert_eq!(full(0.6), [true, true, false, false, true, false]);
    assert_eq!(full(0.9), [true, true, false, true, true, true], "filled, though it is no gain");
    assert!(full(1.0).iter().all(|full| *full));
    assert_eq!(full(0.1), [false; 6]);
    let narrow = find(Space::Duo, &[at_most(0.02)], &profile).unwrap_err();
    assert!(matches!(narrow, Error::Infeasible { length: LENGTH, .. }), "{narrow}");
}

#[test]
fn every_bound_decides_how_many_duo_heads_are_full() {
    let profile = profile(&[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]);
    let bounds = [at_most(0.9), Bound { length: 2048, max: 0.4, min: None }];
    let plan = &find(Space::Duo, &bounds, &profile).unwrap().plans[0];
    assert_eq!(is_full(plan).iter().filter(|full| **full).count(), 2);
    assert_eq!(plan.provenance.space.as_deref(), Some("duo"));
}

#[test]
fn a_bound_on_decode_time_holds_beside_density() {
    let profile = profile(&[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]);
    // A head of 32 keys takes half the time of one of 1024.
    let curve = CostCurve::new(vec![(32, 1.0), (1024, 2.0)]).unwrap();
    let full = |share| {
        let mut request = PlanRequest::bounded(vec![at_most(0.9)], 16, 32)?.with_space(Space::Duo);
        request.decode_time = Some(CostBound { share, curve: curve.clone() });
        let found = request.search_profile(&profile, &[LENGTH])?;
        assert_eq!(found.plans[0].provenance.decode_time, Some(share));
        Ok::<_, Error>(is_full(&found.plans[0]).iter().filter(|full| **full).count())
    };
    assert_eq!(full(0.75).unwrap(), 3);
    assert_eq!(full(1.0).unwrap(), 5, "the density binds");
    assert!(matches!(full(0.4), Err(Error::Infeasible { length: LENGTH, .. })));
}

#[test]
fn lower_bounds_are_met_and_kept() {
    // Nothing here matters, so without a lower bound the smallest plan is the best one.
    let profile = profile(&[-1.0; 6]);
    let bound = |min| [Bound { length: LENGTH, max: 0.5, min }];
    let density =
        |min| find(Space::Elastic, &bound(min), &profile).unwrap().plans[0].density(LENGTH);
    assert!(density(None) < 0.05);
    assert!((0.45..=0.5).contains(&density(Some(0.45))));
    let found = find(Space::Fixed, &bound(Some(0.45)), &profile).unwrap();
    assert_eq!(found.plans[0].provenance.density_floors[0].value, 0.45);
    // One span, 25 % at 1k, is 12.5 % at 2k.
    let both = [1024, 2048].map(|length| Bound { length, max: 0.25, min: Some(0.2) });
    assert!(matches!(
        find(Space::PerLayer, &both, &profile),
        Err(Error::Infeasible { length: 1024 | 2048, .. })
    ));
    for min in [-0.1, 0.6, f64::NAN] {
        assert!(matches!(
            PlanRequest::bounded(bound(Some(min)).to_vec(), 16, 32),
            Err(Error::Invalid { ref what, .. }) if what == "smallest density"
        ));
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 32, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn every_space_obeys_the_bounds_and_its_own_form(
        scale in prop::collection::vec(-1.0f64..9.0, 6),
        max in 0.1f64..0.9,
    ) {
        let profile = profile(&scale);
        let mut losses = Vec::new();
        for (space, name) in Space::ALL {
            let found = find(space, &[at_most(max)], &profile).unwrap();
            for plan in &found.plans {
                prop_assert!(plan.density(LENGTH) <= max + 1e-9, "{}", name);
                let spans = plan.spans(LENGTH);
                for short in [200, 500, 1000] {
                    let kept = plan.spans(short);
                    let same = |(kept, span): (&Span, &Span)| kept.total() == span.total().min(short);
                    prop_assert!(kept.iter().zip(&spans).all(same), "{} at {}", name, short);
                }
                let fixed = plan.rules().iter().all(|rule| rule.lines()[0].beta == 0.0);
                match space {
                    Space::Elastic => {}
                    Space::Fixed => prop_assert!(fixed),
                    Space::PerLayer => {
                        prop_assert!(fixed && spans.chunks(2).all(|layer| layer[0] == layer[1]));
                    }
                    Space::Duo => {
                        let full = spans.iter().filter(|s| s.total() == LENGTH).count();
                        prop_assert!(spans.iter().all(|s| [32, LENGTH].contains(&s.total())));
                        let more = (full + 1) as f64 + (5.0 - full as f64) / 32.0;
                        prop_assert!(full == 6 || more / 6.0 > max, "{} heads are full", full);
                    }
                }
            }
            losses.push(found.set.solutions[0].losses[0]);
        }
        // A layer's span is a choice of spans for its heads.
        prop_assert!(losses[1] <= losses[2] + 1e-6, "per head {} per layer {}", losses[1], losses[2]);
    }
}

#[test]
fn every_head_keeps_the_smallest_share_and_the_plan_says_so() {
    // The fourth head would rather see nothing.
    let profile = profile(&[2.0, 5.0, 0.5, -4.0, 9.0, 1.0]);
    let longer = Bound { length: 4 * LENGTH, max: 0.4, min: None };
    let search = |share: f64| {
        let request = PlanRequest::bounded(vec![at_most(0.4), longer], 16, 32)?;
        request.with_min_share(share)?.search_profile(&profile, &[LENGTH])
    };
    let least =
        |plan: &Plan, length| plan.spans(length).iter().map(|span| span.total()).min().unwrap();
    let free = search(0.0).unwrap();
    assert!(free.plans.iter().any(|plan| least(plan, 4 * LENGTH) == 32));
    assert_eq!(free.plans[0].provenance.min_share, None);
    for share in [0.1, 0.33, 0.4] {
        for plan in search(share).unwrap().plans {
            for length in [LENGTH, 4 * LENGTH] {
                assert!(least(&plan, length) >= (share * length as f64) as usize);
                let kept: usize = plan.spans(length).iter().map(|span| span.total()).sum();
                assert!(kept as f64 <= 0.4 * (6 * length) as f64 + 1e-6);
            }
            assert_eq!(plan.provenance.min_share, Some(share));
        }
    }
    for share in [-0.1, 0.41, f64::NAN] {
        assert!(search(share).unwrap_err().to_string().contains("smallest share"));
    }
    let fixed = PlanRequest::bounded(vec![at_most(0.4)], 16, 32).unwrap().with_space(Space::Fixed);
    assert!(fixed.clone().with_min_share(0.1).is_err());
    assert_eq!(fixed.clone().with_min_share(0.0).unwrap(), fixed);
}

#[test]
fn heads_are_charged_no_more_than_their_layers_window() -> Result<(), Error> {
    let profile = profile(&[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]);
    let windows = vec![Some(128), None, Some(128)];
    let request = PlanRequest::bounded(vec![at_most(0.3)], 16, 32)?;
    let alike = request.search_profile(&profile, &[LENGTH])?;
    let request = request.with_windows(windows.clone());
    let found = request.search_profile(&profile, &[LENGTH])?;
    let density = |plan: &Plan| request.density_of(plan, LENGTH);
    for plan in &found.plans {
        assert!(request.allows(plan)? && density(plan)? > 0.27, "{}", density(plan)?);
        // The layer without a window gets what the others cannot use.
        let spans = plan.clone().within(windows.clone())?.spans(LENGTH);
        assert!(spans.iter().enumerate().all(|(head, s)| head / 2 == 1 || s.total() <= 128));
    }
    let most = |plans: &[Plan]| plans.iter().map(|p| density(p).unwrap()).fold(0.0, f64::max);
    assert!(most(&found.plans) > most(&alike.plans) + 0.05);
    let wrong = request.with_windows(vec![None]).search_profile(&profile, &[LENGTH]);
    assert!(matches!(wrong, Err(Error::Invalid { .. })), "{wrong:?}");
    Ok(())
}

#[test]
fn what_cannot_be_reached_is_known_without_a_profile() {
    let request = |max: f64, windows: Vec<Option<usize>>| {
        let bounds = vec![Bound { length: 4 * LENGTH, max: 1.0, min: None }, at_most(max)];
        PlanRequest::bounded(bounds, 16, 32).unwrap().with_windows(windows)
    };
    let least = 32.0 / LENGTH as f64;
    request(least, Vec::new()).reachable(SHAPE).unwrap();
    let below = request(least * 0.99, Vec::new());
    let error = below.reachable(SHAPE).unwrap_err();
    assert!(matches!(error, Error::Infeasible { length: LENGTH, .. }), "{error}");
    let searched = below.search_profile(&profile(&[1.0; 6]), &[LENGTH]).unwrap_err();
    assert_eq!(searched.to_string(), error.to_string());
    let causes = ["mean density", "(32 keys, 16 of them sink)"];
    assert!(causes.iter().all(|cause| error.to_string().contains(cause)), "{error}");
    let few = request(1e-6, Vec::new()).reachable(SHAPE).unwrap_err().to_string();
    assert!(few.ends_with("at most 0.000001 is allowed"), "{few}");
    let curve = CostCurve::new(vec![(32, 1.0), (4 * LENGTH, 2.0)]).unwrap();
    let decode_time = Some(CostBound { share: 0.1, curve });
    let slow = PlanRequest { decode_time, ..request(1.0, Vec::new()) }.reachable(SHAPE);
    let slow = slow.unwrap_err().to_string();
    assert!(slow.contains("decode time is") && slow.ends_with("at most 0.1 is allowed"), "{slow}");

    // A window of the model's is smaller than the smallest span, and a floor may be above all windows.
    let narrow = vec![Some(16), None, None];
    request(least * 0.99, narrow.clone()).reachable(SHAPE).unwrap();
    let mut floor = request(1.0, narrow.clone());
    floor.bounds[1].min = Some(0.7);
    let error = floor.reachable(SHAPE).unwrap_err();
    assert!(error.to_string().contains("0.7"), "{error}");
    let error = request(1.0, narrow[1..].to_vec()).reachable(SHAPE).unwrap_err();
    assert!(matches!(error, Error::Invalid { .. }), "{error}");
}

#[test]
fn plans_keep_to_a_limit_of_rules_in_a_layer() {
    let profile = profile(&[1.0, 0.01, 0.3, 0.02, 0.5, 0.001]);
    let mut request = PlanRequest::density(0.4, &[LENGTH], 16, 32).unwrap();
    let free = request.search_profile(&profile, &[LENGTH]).unwrap().plans.remove(0);
    assert_ne!(free.rules()[0], free.rules()[1]);
    request.solver.max_rules_per_layer = Some(1);
    assert!(!request.allows(&free).unwrap());
    let one = request.search_profile(&profile, &[LENGTH]).unwrap().plans.remove(0);
    assert!(request.allows(&one).unwrap());
    // A plan says so of itself, for those who search from it.
    let from = PlanRequest::from_plan(&one).unwrap().unwrap();
    assert_eq!(from.solver.max_rules_per_layer, Some(1));
    assert!(!from.allows(&free).unwrap());
    let mut bad = one;
    bad.provenance.max_rules_per_layer = Some(0);
    let refused = PlanRequest::from_plan(&bad);
    assert!(matches!(refused, Err(Error::Invalid { .. })), "{refused:?}");
}
