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
    // Some editors begin a file with a byte order mark.
    std::fs::write(&path, format!("\u{feff}{}", plan().to_json())).unwrap();
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
    let rule = broken("\"alpha\": 64.0", "\"alfa\": 64.0");
    assert!(rule.contains("rules[0][0]: expected {\"alpha\": number, \"beta\": number}"), "{rule}");
    let rule = broken("\"alpha\": 100.0", "\"alpha\": \"many\"");
    assert!(rule.contains("rules[0][1]: expected {"), "{rule}");
    assert!(broken("\"beta\": 0.1", "\"beta\": -0.1").contains("rules[0][0]"));
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

#[test]
fn a_plan_inside_of_another_message_is_its_file() {
    let text = serde_json::to_string(&[plan()]).unwrap();
    assert_eq!(serde_json::from_str::<Vec<Plan>>(&text).unwrap(), [plan()]);
    let wrong = |from: &str, to: &str| {
        assert!(text.contains(from), "{from}");
        serde_json::from_str::<Vec<Plan>>(&text.replacen(from, to, 1)).unwrap_err().to_string()
    };
    assert!(wrong("\"version\":1", "\"version\":2").contains("version: expected 1, got 2"));
    assert!(wrong("\"min_span\":16", "\"min_span\":4").contains("min_span"));
    let shape = |text: &str| serde_json::from_str::<ModelShape>(text).unwrap_err().to_string();
    let text = serde_json::to_string(&SHAPE).unwrap();
    assert!(shape(&text.replace("\"kv_heads\":2", "\"kv_heads\":3")).contains("query_heads"));
    let line = serde_json::from_str::<ElasticRule>(r#"{"alpha":1,"beta":-1}"#).unwrap_err();
    assert!(line.to_string().contains("beta"), "{line}");
}

#[test]
fn an_additive_mask_is_the_mask() {
    let plan = plan();
    let (context, queries) = (40, 17..23);
    let mask = plan.additive_mask(0, context, queries.clone()).unwrap();
    let spans = plan.layer_spans(0, context);
    assert_eq!(mask.len(), spans.len() * queries.len() * queries.end);
    let mut rows = mask.chunks(queries.end);
    for span in spans {
        for query in queries.clone() {
            for (key, x) in rows.next().unwrap().iter().enumerate() {
                let seen = span.attends(moa_core::Position(query), moa_core::Position(key));
                assert_eq!(*x == 0.0, seen);
                assert!(seen || *x == f32::NEG_INFINITY);
            }
        }
    }
    assert!(matches!(plan.additive_mask(2, context, queries), Err(Error::Invalid { .. })));
}

#[test]
fn dimensions_come_from_a_models_configuration() {
    let shape = |text: &str| ModelShape::from_config_json(text).map_err(|e| e.to_string());
    let all = r#"{"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 32}"#;
    assert_eq!(shape(all).unwrap(), ModelShape { kv_heads: 4, ..SHAPE });
    let more = all.replace('}', r#", "num_key_value_heads": 2, "head_dim": 16}"#);
    assert_eq!(shape(&more).unwrap(), ModelShape { head_dim: 16, ..SHAPE });
    assert!(
        shape(&more.replace("2, \"head_dim", "3, \"head_dim")).unwrap_err().contains("query_heads")
    );
    assert!(shape(&all.replace("32}", "30}")).unwrap_err().contains("hidden_size"));
    assert!(shape(r#"{"num_hidden_layers": 2}"#).unwrap_err().contains("num_attention_heads"));
}
