//! The report: one page from plans and answers, complete and self-contained.

use std::fs;
use std::path::Path;

use serde_json::json;

use crate::common::{edit, json_of, ok, refuses, tiny};

/// Answers to questions of two lengths at ten depths; right where `is_right` says so.
fn items(file: &Path, is_right: impl Fn(usize, f64) -> bool) {
    let mut text = json!({ "settings": { "seed": 0, "plan": "x" } }).to_string() + "\n";
    for length in [1000, 2000] {
        for step in 0..10 {
            let depth = f64::from(step) / 9.0;
            let right = is_right(length, depth);
            let item = json!({
                "lines": length / 25, "depth": depth, "prompt_tokens": length + 3 * step as usize,
                "right": right, "expected": 7, "got": 7, "text": "<b>7</b>", "later": [1],
            });
            text.push_str(&format!("{item}\n"));
        }
    }
    fs::write(file, text).unwrap();
}

/// A plan with the provenance that searches and refinement leave.
fn plan(root: &Path, name: &str, density: &str, losses: [f64; 2]) {
    let tiny = tiny();
    let args = ["plan", "uniform", "--model", tiny.to_str().unwrap(), "--density", density];
    ok(root, &[&args[..], &["--out", name]].concat());
    edit(&root.join(name), |plan| {
        let at = |values: [f64; 2]| json!([{ "length": 1024, "value": values[0] }, { "length": 2048, "value": values[1] }]);
        let trial = |round: usize, predicted: f64, measured: f64| {
            json!({ "round": round, "predicted_at": 1024, "predicted": predicted,
                    "measured_at": 1024, "measured": measured })
        };
        plan["provenance"] = json!({
            "method": "moa <test>", "objective": "margin", "profile_lengths": [1024, 2048],
            "density_bounds": at([0.25, 0.25]), "predicted_losses": at(losses),
            "trials": [trial(0, -1.0, 2.5), trial(0, 0.5, 0.004), trial(1, 2.0, 0.01)],
        });
    });
}

#[test]
fn answers_to_other_questions_are_not_compared() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path();
    let write = |name: &str, evaluation: &str| {
        let header = json!({ "settings": { "evaluation": evaluation } });
        let item = json!({ "size": 40, "case": 0, "prompt_tokens": 3, "right": true });
        fs::write(root.join(name), format!("{header}\n{item}\n")).unwrap();
    };
    write("a.jsonl", "mqar");
    write("b.jsonl", "mqar");
    write("c.jsonl", "passkey");
    let report = ["report", "--out", "r.html", "--items", "a.jsonl", "--items"];
    ok(root, &[&report[..], &["b.jsonl"]].concat());
    refuses(root, &[&report[..], &["c.jsonl"]].concat(), &["c: answers", "mqar", "passkey"]);
}

#[test]
fn report_shows_all_that_it_is_given() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path();
    fs::create_dir(root.join("plans")).unwrap();
    plan(root, "plans/plan-00.json", "0.25", [3.0, 1.0]);
    plan(root, "plans/plan-01.json", "0.2", [2.0, 4.0]);
    items(&root.join("dense.jsonl"), |_, _| true);
    items(&root.join("uniform.jsonl"), |_, depth| depth > 0.7);
    let args = [
        "report",
        "--plan",
        "best & small=plans/plan-00.json",
        "--plans",
        "plans",
        "--items",
        "dense.jsonl",
        "--items",
        "a <window>=uniform.jsonl",
        "--title",
        "Spans </title>",
        "--at",
        "512,4096",
        "--svg",
        "figures",
        "--out",
        "report.html",
    ];
    let report = json_of(root, &args);
    let ids = ["heads", "retrieval", "kv-bytes", "pareto", "predicted-measured"];
    assert_eq!(report["figures"], json!(ids));
    let html = fs::read_to_string(root.join("report.html")).unwrap();
    for id in ids {
        assert!(html.contains(&format!("<section id=\"{id}\">")), "{id}");
        let svg = fs::read_to_string(root.join(format!("figures/{id}.svg"))).unwrap();
        assert!(svg.starts_with("<svg xmlns=") && svg.ends_with("</svg>\n"), "{id}");
    }
    for (text, count) in [
        ("Spans &lt;/title&gt;", 2),
        ("N = 512<", 2),
        ("a &lt;window&gt;: 30.0 % of 20 right", 2),
        ("layer 5, KV head 1: 1024 of 4096 keys (25.0 %)", 1),
        ("12.00 MiB", 2),
        ("plan-01.json: predicted loss at 1024 2.0000, predicted loss at 2048 4.0000", 1),
        ("round 1: predicted 2.0000 at 1024, measured 0.0100 at 1024", 1),
    ] {
        assert_eq!(html.matches(text).count(), count, "{text}");
    }
    for outside in ["http", "url(", "@import", "<script", "src=", "<b>"] {
        assert!(!html.contains(outside), "{outside}");
    }
    // Without measurements it shows what a plan alone says.
    let alone = ["report", "--plan", "plans/plan-01.json", "--out", "alone.html", "--at", "256"];
    let report = json_of(root, &alone);
    assert_eq!(report["figures"], json!(["heads", "kv-bytes", "predicted-measured"]));
}

#[test]
fn report_refuses_what_it_cannot_show() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path();
    let to = ["--out", "report.html", "--svg", "figures"];
    let report = |args: &[&str], parts: &[&str]| {
        refuses(root, &[&["report"], args, &to[..]].concat(), parts);
    };
    report(&[], &["--plan"]);
    report(&["--plan", "none.json"], &["none.json"]);
    report(&["--plans", "."], &["no plan-*.json"]);
    report(&["--items", "none.jsonl"], &["none.jsonl"]);
    fs::write(root.join("empty.jsonl"), "{\"settings\": {}}\n").unwrap();
    report(&["--items", "empty.jsonl"], &["empty.jsonl", "at least one question"]);
    let line = json!({ "right": true, "prompt_tokens": 5, "depth": 0.5 }).to_string();
    fs::write(root.join("bad.jsonl"), format!("{line}\n{{\"right\": true}}\n{{\"ri")).unwrap();
    report(&["--items", "bad.jsonl"], &["bad.jsonl, line 2", "prompt_tokens"]);
    plan(root, "a.json", "0.5", [0.0, 0.0]);
    fs::copy(root.join("a.json"), root.join("b.json")).unwrap();
    edit(&root.join("b.json"), |plan| plan["model"]["head_dim"] = json!(128));
    report(&["--plan", "a.json", "--plan", "b.json"], &["b.json", "head_dim 128"]);
    refuses(root, &["report", "--plan", "a.json", "--out", "none/r.html"], &["cannot be written"]);
}
