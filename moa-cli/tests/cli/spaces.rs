//! Rivals' allocations: searched, refined and run like any other plan.

use std::fs;
use std::path::Path;

use serde_json::{Value, json};

use crate::common::{json_of, moa_in, ok, refuses, tiny};

/// Spans of a plan at one length, `[layer][head]`.
fn spans(root: &Path, plan: &str, length: &str) -> Vec<Vec<u64>> {
    let shown = json_of(root, &["plan", "show", plan, "--at", length]);
    serde_json::from_value(shown["at"][0]["spans"].clone()).unwrap()
}

#[test]
fn every_space_gives_plans_of_its_kind_under_one_bound() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path();
    let tiny = tiny();
    let tiny = tiny.to_str().unwrap();
    let profile = ["profile", "--model", tiny, "--lengths", "256", "--samples", "1"];
    ok(root, &[&profile[..], &["--out", "p.safetensors"]].concat());
    for space in ["elastic", "fixed", "per-layer", "duo"] {
        let args = ["search", "--profile", "p.safetensors", "--density", "0.5", "--space", space];
        let sizes = ["--sink", "64", "--min-span", "80", "--bound-lengths", "256", "--out", space];
        let found = json_of(root, &[&args[..], &sizes].concat());
        assert_eq!(found["space"], space);
        let plan = format!("{space}/plan-00.json");
        let kept = spans(root, &plan, "256");
        let mean = kept.concat().iter().sum::<u64>() as f64 / 12.0;
        assert!(mean <= 0.5 * 256.0 + 1e-6, "{space}: {mean}");
        match space {
            "per-layer" => assert!(kept.iter().all(|layer| layer[0] == layer[1]), "{kept:?}"),
            "duo" => {
                // 12 heads: 3 of 256 and 9 of 80 are 48.4 %, 4 would be 54.2 %.
                assert_eq!(kept.concat().iter().filter(|s| **s == 256).count(), 3, "{kept:?}");
                assert_eq!(kept.concat().iter().filter(|s| **s == 80).count(), 9, "{kept:?}");
            }
            "fixed" => assert_eq!(spans(root, &plan, "4096"), spans(root, &plan, "1024")),
            _ => {}
        }
    }

    let validate = ["validate", "--model", tiny, "--plans", "duo", "--profile", "p.safetensors"];
    let options = ["--samples", "1", "--length", "256", "--refine", "4"];
    ok(root, &[&validate[..], &options, &["--out", "plan.json"]].concat());
    let kept = spans(root, "plan.json", "256").concat();
    assert!(kept.iter().all(|span| [80, 256].contains(span)), "refined within its space: {kept:?}");
    let plan: Value =
        serde_json::from_str(&fs::read_to_string(root.join("plan.json")).unwrap()).unwrap();
    assert_eq!(plan["provenance"]["space"], "duo");
    let trials = plan["provenance"]["trials"].as_array().unwrap();
    assert!(trials.iter().any(|trial| trial["round"] == 0 && trial["measured_at"] == 256));

    let search = ["search", "--profile", "p.safetensors", "--force"];
    refuses(
        root,
        &[&search[..], &["--space", "per-head", "--out", "x"]].concat(),
        &["per-head", "per-layer"],
    );
    // A dense cache of 256 tokens takes 768 KiB.
    let bytes = [&search[..], &["--kv-bytes", "256:384KiB", "--out", "bytes"]].concat();
    ok(root, &[&bytes[..], &["--cache-dtype", "bf16"]].concat());
    let shown = json_of(root, &["plan", "show", "bytes/plan-00.json", "--at", "256"]);
    assert_eq!(shown["provenance"]["density_bounds"], json!([{ "length": 256, "value": 0.5 }]));
    assert!(shown["at"][0]["kv_bytes"].as_u64().unwrap() <= 384 << 10);
    // By itself a budget of bytes is one of keys and values in int8: 132 bytes a slot of 256.
    ok(root, &bytes);
    let shown = json_of(root, &["plan", "show", "bytes/plan-00.json", "--at", "256"]);
    let bound = shown["provenance"]["density_bounds"][0]["value"].as_f64().unwrap();
    assert!((bound - 0.5 * 256.0 / 132.0).abs() < 1e-9, "{bound}");
    assert_eq!(shown["cache_types"], json!(vec!["int8"; 12]));
    assert!(shown["at"][0]["kv_bytes"].as_u64().unwrap() <= 384 << 10);
    // Plans that are validated and refined stay in their type.
    let validate = ["validate", "--model", tiny, "--plans", "bytes", "--profile", "p.safetensors"];
    ok(root, &[&validate[..], &options, &["--out", "narrow.json"]].concat());
    let shown = json_of(root, &["plan", "show", "narrow.json", "--at", "256"]);
    assert_eq!(shown["cache_types"], json!(vec!["int8"; 12]));
    assert!(shown["at"][0]["kv_bytes"].as_u64().unwrap() <= 384 << 10);
    let both = ["--density", "0.5", "--min-density", "0.45", "--bound-lengths", "256"];
    ok(root, &[&search[..], &both, &["--out", "both"]].concat());
    // Plans of several types are not refined together, which is told of the file that differs.
    fs::create_dir(root.join("mixed")).unwrap();
    for (from, to) in [("bytes", "plan-00.json"), ("both", "plan-01.json")] {
        fs::copy(root.join(from).join("plan-00.json"), root.join("mixed").join(to)).unwrap();
    }
    let validate = ["validate", "--model", tiny, "--plans", "mixed", "--profile", "p.safetensors"];
    let mixed = [&validate[..], &options, &["--out", "x.json"]].concat();
    refuses(root, &mixed, &["plan-01.json", "cache types", "those of the first plan"]);
    let kept = spans(root, "both/plan-00.json", "256").concat();
    let mean = kept.iter().sum::<u64>() as f64 / (12.0 * 256.0);
    assert!((0.45..=0.5 + 1e-9).contains(&mean), "{kept:?}");
    ok(root, &[&search[..], &["--density", "0.5", "--decode-time", "1", "--out", "time"]].concat());
    for (options, parts) in [
        (&["--kv-bytes", "256:1KiB"][..], ["256", "at most"]),
        (&["--kv-bytes", "256"], ["--kv-bytes", "8192:64MiB"]),
        (&["--min-density", "0.9"], ["smallest density", "0.25"]),
        (&["--density", "0.5", "--decode-time", "0.0001"], ["at most 0.0001", "size"]),
        (&["--density", "0.5", "--decode-time", "0.0001"], ["at most 0.0001", "decode time"]),
        (&["--decode-time", "2"], ["--decode-time", "share of the time"]),
        (&["--sink", "300"], ["256", "(316 keys, 300 of them sink)"]),
        (&["--min-span", "1000"], ["256", "(1000 keys, "]),
        (&["--bound-lengths", "1"], ["length 1: ", "mean density is 1, that of"]),
    ] {
        refuses(root, &[&search[..], options, &["--out", "x"]].concat(), &parts);
    }
    let both = ["--kv-bytes", "256:384KiB", "--density", "0.5", "--out", "x"];
    refuses(root, &[&search[..], &both].concat(), &["--kv-bytes", "--density"]);
    // As rivals of a suite, all at one density.
    let suite = ["eval", "suite", "--model", tiny, "--preset", "recall-1k", "--tasks", "passkey"];
    let rivals = ["--samples", "1", "--windows", "0", "--profile", "p.safetensors"];
    let board = json_of(root, &[&suite[..], &rivals, &["--density", "0.25"]].concat());
    let rows = board["rows"].as_array().unwrap();
    let rivals = ["uniform", "fixed", "per-layer", "duo", "snapkv", "adakv", "kvzip"];
    assert_eq!(rows.len(), 1 + rivals.len(), "{board}");
    for (row, rival) in rows[1..].iter().zip(rivals) {
        let density = row["density"].as_f64().unwrap();
        // All use nearly all of it, duo as many heads as fit.
        let least = if rival == "duo" { 0.15 } else { 0.23 };
        assert!(density > least && density < 0.27, "{row}");
        let (name, kept) = row["cache"].as_str().unwrap().split_once(' ').unwrap();
        assert_eq!(name, rival);
        // At the preset's length, which questions nearly fill.
        assert!((kept.parse::<f64>().unwrap() - density).abs() < 0.015, "{row}");
        assert!(row["agreement"].is_null(), "{row}");
    }
}

#[test]
fn scores_of_other_methods_become_plans_and_plans_tables_of_other_engines() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path();
    let tiny = tiny();
    let tiny = tiny.to_str().unwrap();
    let import = ["plan", "import", "--model", tiny, "--out", "duo.json"];
    let gates = "0.9\t0.1\n".repeat(5) + "0.2\t0.3\n";
    fs::create_dir(root.join("duo")).unwrap();
    fs::write(root.join("duo/heads.tsv"), &gates).unwrap();
    fs::write(root.join("duo/config.json"), r#"{"sink_size": 16, "recent_size": 48}"#).unwrap();
    let from = [&import[..], &["--duo", "duo/heads.tsv"]].concat();
    ok(root, &from);
    let narrow = |wide: u64| [vec![[wide, 64]; 5], vec![[64, 64]]].concat();
    assert_eq!(json!(spans(root, "duo.json", "1024")), json!(narrow(1024)));
    // At a budget, three heads of twelve fit whole, and what is left widens the others.
    ok(root, &[&from[..], &["--density", "0.3", "--at", "1024"]].concat());
    let kept = spans(root, "duo.json", "1024").concat();
    let full = kept.iter().filter(|span| **span == 1024).count();
    assert_eq!((full, kept.iter().sum::<u64>()), (3, 3 * 1024 + 9 * 68));
    let list = "layer,head,score\n".to_string()
        + &(0..24).map(|i| format!("{},{},{}\n", i / 4, i % 4, i % 3)).collect::<String>();
    fs::write(root.join("queries.csv"), list).unwrap();
    let queries = ["--head-scores", "queries.csv", "--sparsity", "0.5", "--window", "8"];
    ok(root, &[&import[..], &queries[..]].concat());
    let kept = spans(root, "duo.json", "1024").concat();
    assert_eq!(kept.iter().filter(|span| **span == 72).count(), 6);
    fs::write(root.join("bad.tsv"), "1\t0\n").unwrap();
    let bad = [&import[..], &["--head-scores", "bad.tsv"]].concat();
    refuses(root, &bad, &["bad.tsv", "6 layers"]);
    let both = [&from[..], &["--published", "x.json"]].concat();
    assert_eq!(moa_in(root, &both).status.code(), Some(2));

    let export = ["plan", "export", "duo.json", "--at", "1024", "--out"];
    ok(root, &[&export[..], &["t.json", "--format", "json"]].concat());
    let table: Value = serde_json::from_slice(&fs::read(root.join("t.json")).unwrap()).unwrap();
    let sum = |row: usize, head: usize| {
        table["sink"][row][head].as_u64().unwrap() + table["window"][row][head].as_u64().unwrap()
    };
    let tables: Vec<u64> = (0..12).map(|i| sum(i / 2, i % 2)).collect();
    assert_eq!(tables, kept);
    ok(root, &[&export[..], &["t.tsv", "--format", "tsv"]].concat());
    ok(root, &[&import[..], &["--mask", "t.tsv", "--window", "8"]].concat());
    assert_eq!(spans(root, "duo.json", "1024").concat(), kept);
    ok(root, &[&export[..], &["t.safetensors", "--format", "safetensors"]].concat());
    assert!(fs::read(root.join("t.safetensors")).unwrap().len() > 12 * 17);
    let no_length = ["plan", "export", "duo.json", "--format", "json", "--out", "u.json"];
    assert_eq!(moa_in(root, &no_length).status.code(), Some(2));
    refuses(root, &[&export[..], &["p.json"]].concat(), &["--at", "published"]);
    assert!(!root.join("p.json").exists());
}
