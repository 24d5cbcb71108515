//! Plans and profiles that earlier versions wrote load, and mean what they meant then.

use std::path::{Path, PathBuf};

use moa_core::{ModelShape, Plan, PlanRequest, Profile, Result, Space};

const SHAPE: ModelShape = ModelShape { layers: 6, query_heads: 4, kv_heads: 2, head_dim: 64 };
const WEIGHTS: &str = "0f69edb58b86a4bb";

/// JSON numbers are read to within a unit in the last place.
fn is_close(a: f64, b: f64) -> bool {
    (a - b).abs() < 1e-14 * a.abs().max(1.0)
}

fn file(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name)
}

#[test]
fn a_plan_has_the_spans_and_sizes_it_had() -> Result<()> {
    let plan = Plan::load(file("validated.json"))?;
    assert_eq!((plan.shape(), plan.sink(), plan.min_span()), (SHAPE, 4, 20));
    assert_eq!(plan.fingerprint(), Some(WEIGHTS));
    let spans = |n| plan.spans(n).iter().map(|s| s.total().min(n)).collect::<Vec<_>>();
    assert_eq!(spans(192), [24, 192, 96, 144, 24, 192, 120, 24, 192, 24, 24, 72]);
    assert_eq!(spans(1000), [125, 1000, 298, 952, 125, 1000, 827, 125, 1000, 125, 125, 375]);
    assert_eq!((plan.kv_bytes(1000, 256), SHAPE.kv_bytes(1000, 256)), (1_555_712, 3_072_000));

    let from = &plan.provenance;
    assert_eq!(from.method.as_deref(), Some("moa validate"));
    assert_eq!((from.profile_lengths.as_slice(), from.min_share), (&[128, 192][..], Some(0.125)));
    assert!(is_close(from.measured_losses[1].value, 3.3200560143476086));
    let trial = from.trials[3];
    assert_eq!((trial.round, trial.predicted_at, trial.measured_at), (0, 192, 192));
    assert!(is_close(trial.predicted, -0.5101941272570882));
    assert!(is_close(trial.measured, 3.3298439345057367));
    Ok(())
}

#[test]
fn a_plan_is_written_as_it_was_read() -> Result<()> {
    for name in ["validated.json", "plan-00.json", "plan-01.json"] {
        let text = std::fs::read_to_string(file(name)).expect("a file of the repository");
        let again = Plan::from_json(&text)?.to_json();
        let lines = |text: &str| text.lines().map(str::to_string).collect::<Vec<_>>();
        let (text, again) = (lines(&text), lines(&again));
        assert_eq!(text.len(), again.len(), "{name}");
        for (old, new) in text.iter().zip(&again).filter(|(old, new)| old != new) {
            let number = |line: &str| line.rsplit(' ').next().and_then(|n| n.parse().ok());
            let (a, b) = (number(old), number(new));
            assert!(a.zip(b).is_some_and(|(a, b)| is_close(a, b)), "{name}: {old} / {new}");
        }
    }
    Ok(())
}

#[test]
fn the_search_that_a_plan_names_finds_it_again() -> Result<()> {
    let plans = [Plan::load(file("plan-00.json"))?, Plan::load(file("plan-01.json"))?];
    let profile = Profile::load(file("profile.safetensors"))?;
    assert_eq!((profile.shape(), profile.lengths()), (SHAPE, vec![128, 192]));
    assert_eq!(profile.info.fingerprint.as_deref(), Some(WEIGHTS));
    assert!(is_close(profile.at(192)?.far_losses().mean(), -0.013028348653361554));

    let mut request = PlanRequest::from_plan(&plans[0])?.expect("bounds");
    assert_eq!((request.space, request.min_share), (Space::Elastic, 0.125));
    let bounds: Vec<_> = request.bounds.iter().map(|b| (b.length, b.max, b.min)).collect();
    assert_eq!(bounds, [128, 192, 288, 384].map(|length| (length, 0.5, None)));
    request.solver.max_plans = 2;
    let found = request.search_profile(&profile, &request.objective_lengths(&profile))?.plans;
    assert_eq!(found.len(), plans.len());
    for (found, plan) in found.iter().zip(&plans) {
        assert_eq!((found.rules(), found.fingerprint()), (plan.rules(), plan.fingerprint()));
        let (found, plan) = (&found.provenance, &plan.provenance);
        assert_eq!((&found.objective, &found.data), (&plan.objective, &plan.data));
        for (found, plan) in found.predicted_losses.iter().zip(&plan.predicted_losses) {
            assert_eq!(found.length, plan.length);
            assert!(is_close(found.value, plan.value), "{found:?} {plan:?}");
        }
    }

    let unknown = Plan::full(SHAPE)?;
    assert_eq!(PlanRequest::from_plan(&unknown)?, None);
    Ok(())
}
