//! Plan files: round trips, and errors that name the place.

use moa_core::{AtLength, ElasticRule, Error, HeadRule, ModelShape, Plan};

const SHAPE: ModelShape = ModelShape { layers: 2, query_heads: 4, kv_heads: 2, head_dim: 8 };

fn plan() -> Plan {
    let line = |a, b| ElasticRule::new(a, b).unwrap();
    let rules = vec![
        HeadRule::from(line(64.0, 0.1)),
        HeadRule::union([line(100.0, 0.0), line(-50.0, 0.5)]).unwrap(),
        HeadRule::from(ElasticRule::FULL),
        HeadRule::from(line(-0.5, 1.0 / 3.0)),
    ];
    let mut plan = Plan::new(SHAPE, 4, 16, rules).unwrap().with_fingerprint(Some("beef".into()));
    plan.provenance.objective = Some("margin".into());
    plan.provenance.density_bounds = vec![AtLength { length: 1024, value: 0.25 }];
    plan
}

#[test]
fn a_saved_plan_loads_the_same() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("plan.json");
    plan().save(&path).unwrap();
    assert_eq!(Plan::load(&path).unwrap(), plan());
    let names: Vec<_> =
        std::fs::read_dir(dir.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert_eq!(names, ["plan.json"], "no temporary file is left");
}

#[test]
fn a_failed_save_leaves_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("missing").join("plan.json");
    assert!(matches!(plan().save(&path), Err(Error::Io { path: p, .. }) if p == path));
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
}

fn error_of(text: &str) -> String {
    Plan::from_json(text).unwrap_err().to_string()
}

#[test]
fn bad_plan_files_name_the_place() {
    let good = plan().to_json();
    let broken = |from: &str, to: &str| {
        assert!(good.contains(from), "{from}");
        error_of(&good.replacen(from, to, 1))
    };
    assert!(error_of("{").contains("moa-plan"));
    assert!(error_of("[]").contains("plan file"));
    assert!(error_of(r#"{"alphas": [[1]], "betas": [[1]]}"#).contains("moa plan import"));
    assert!(broken("\"version\": 1", "\"version\": 9").contains("version"));
    assert!(broken("\"alpha\": 64.0", "\"alpha\": NaN").contains("line"));
    assert!(broken("\"alpha\": 64.0", "\"alpha\": 1e999").contains("plan file"));
    assert!(broken("\"beta\": 0.1", "\"beta\": -0.1").contains("beta"));
    assert!(
        broken("\"layers\": 2", "\"layers\": 3").contains("rules: expected 3 layers, got 2 layers")
    );
    assert!(broken("\"kv_heads\": 2", "\"kv_heads\": 3").contains("query_heads"));
    assert!(
        broken("\"kv_heads\": 2", "\"kv_heads\": 4")
            .contains("rules[0]: expected 4 heads, got 2 heads")
    );
    assert!(broken("\"min_span\": 16", "\"min_span\": 4").contains("min_span"));
    assert!(broken("\"sink\": 4", "\"sync\": 4").contains("sync"));
    assert!(broken("\"head_dim\": 8", "\"head_dim\": 0").contains("head_dim"));
    assert!(broken("\"head_dim\": 8", "\"head_dim\": 8, \"head_dim\": 9").contains("duplicate"));
}

#[test]
fn published_plans_import_as_unions_and_export_again() {
    // Query heads 0, 1 share KV head 0; heads 2, 3 share KV head 1.
    let text =
        r#"{"alphas": [[0, 1024, 5, 5], [1, 2, 3, 4]], "betas": [[0.5, 0, 0, 0], [0, 0, 0, 0]]}"#;
    let plan = Plan::from_published_json(text, SHAPE, 64, 128).unwrap();
    let total = |layer, n| plan.layer_spans(layer, n).iter().map(|s| s.total()).collect::<Vec<_>>();
    assert_eq!(total(0, 1500), [1024, 128]);
    assert_eq!(total(0, 8192), [4096, 128]);
    let again =
        Plan::from_published_json(&plan.to_published_json().unwrap(), SHAPE, 64, 128).unwrap();
    assert_eq!(again, plan);
    let three = HeadRule::union((1..=3).map(ElasticRule::fixed)).unwrap();
    assert!(plan.clone().with_rule(0, 0, three).unwrap().to_published_json().is_err());

    let wrong = |t: &str| Plan::from_published_json(t, SHAPE, 64, 128).unwrap_err().to_string();
    assert!(
        wrong(r#"{"alphas": [[0, 0, 0, 0]], "betas": []}"#)
            .contains("alphas: expected 2 layers, got 1 layers")
    );
    let short = r#"{"alphas": [[0, 0], [0, 0]], "betas": [[0, 0], [0, 0]]}"#;
    assert!(wrong(short).contains("alphas[0]: expected 4 heads, got 2 heads"));
    assert!(wrong(r#"{"alphas": [[NaN]]}"#).contains("published plan"));
}
