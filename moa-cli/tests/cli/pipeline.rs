//! The commands one after the other, on short contexts.

use std::fs;
use std::io::Write;
use std::path::Path;
use std::process::{Command, Stdio};

use crate::common::{cases, json_of, moa_in, ok, refuses, tiny};

#[test]
fn profile_search_validate_generate_eval() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path();
    let tiny = tiny();
    let tiny = tiny.to_str().unwrap();

    let lengths = ["--lengths", "512,256", "--samples", "1"];
    let args = [&["profile", "--model", tiny, "--out", "p.safetensors"], &lengths[..]].concat();
    let profile = json_of(root, &args);
    assert_eq!(profile["lengths"][0]["length"], 256);
    assert_eq!(profile["lengths"][1]["samples"], 1);
    assert_eq!(profile["lengths"][1]["heads"].as_array().unwrap().len(), 12);
    let warnings = profile["warnings"].as_array().unwrap();
    for (warning, length) in warnings.iter().zip([256, 512]) {
        let few = format!("few calibration items at {length} tokens (1)");
        assert!(warning.as_str().unwrap().contains(&few), "{profile}");
    }
    assert_eq!(warnings.len(), 2, "{profile}");
    assert!(profile["lengths"][0]["far_loss_standard_error"].is_null(), "{profile}");

    refuses(
        root,
        &["search", "--profile", "p.safetensors", "--lengths", "300", "--out", "plans"],
        &["300", "[256, 512]"],
    );
    let search = ["search", "--profile", "p.safetensors", "--density", "0.5", "--out", "plans"];
    let found = json_of(root, &search);
    let plans = found["plans"].as_array().unwrap();
    assert!(!plans.is_empty());
    for plan in plans {
        for density in plan["densities"].as_array().unwrap() {
            assert!(density["value"].as_f64() <= density["bound"].as_f64(), "{plan}");
        }
        assert!(root.join(plan["file"].as_str().unwrap()).is_file());
    }
    refuses(root, &search, &["plans", "--force"]);
    fs::write(root.join("plans/plan-99.json"), "stale").unwrap();
    let text = ok(root, &[&search[..], &["--force"]].concat());
    assert!(text.contains("plan-00.json") && text.contains("density at 512"), "{text}");
    assert!(!root.join("plans/plan-99.json").exists());
    // A budget of bytes is spent on keys in int8, which plans and text say.
    let bytes = ["search", "--profile", "p.safetensors", "--kv-bytes", "30%", "--out", "bytes"];
    assert!(ok(root, &bytes).contains("plans in bytes, keys and values in int8"));
    assert_eq!(json_of(root, &[&bytes[..], &["--force"]].concat())["cache_type"], "int8");
    assert!(found["cache_type"].is_null(), "{found}");

    let validate =
        ["validate", "--model", tiny, "--plans", "plans", "--samples", "1", "--out", "plan.json"];
    let best = json_of(root, &validate);
    assert_eq!(best["length"], 1024);
    let losses = best["plans"].as_array().unwrap().iter().map(|p| p["loss"].as_f64().unwrap());
    let lowest = losses.fold(f64::INFINITY, f64::min);
    assert_eq!(best["measured_losses"][0]["value"].as_f64().unwrap(), lowest);
    let refine =
        [&validate[..], &["--length", "512", "--refine", "4", "--profile", "p.safetensors"]]
            .concat();
    let refined = json_of(root, &refine);
    let growth = |of: &str| {
        let value = |end: &str| refined[format!("refined{of}_{end}")].as_f64().unwrap();
        value("to") - value("from")
    };
    // Responses give up little, and only where text gains.
    let (loss, divergence) = (growth(""), growth("_divergence"));
    assert!(loss <= 0.0 || loss < 0.025 && divergence < 0.0, "{refined}");

    let args = ["plan", "show", "plan.json", "--at", "256,1024", "--svg", "heads.svg"];
    let text = ok(root, &args);
    assert!(text.contains("layer 5") && text.contains("N = 1024") && text.contains('█'), "{text}");
    assert_eq!(fs::read_to_string(root.join("heads.svg")).unwrap().matches("<title>").count(), 24);
    let twice = json_of(root, &["plan", "show", "plan.json", "--at", "512,256,512"]);
    assert_eq!(twice["at"].as_array().unwrap().len(), 2);
    ok(root, &["plan", "export", "plan.json", "--out", "published.json"]);
    let plan: serde_json::Value =
        serde_json::from_str(&fs::read_to_string(root.join("plan.json")).unwrap()).unwrap();
    let (sink, min_span) = (plan["sink"].to_string(), plan["min_span"].to_string());
    let import = ["plan", "import", "--published", "published.json", "--model", tiny];
    let import = [&import[..], &["--sink", &sink, "--min-span", &min_span]].concat();
    ok(root, &[&import[..], &["--out", "again.json"]].concat());
    let spans =
        |file: &str| json_of(root, &["plan", "show", file, "--at", "512,4096"])["at"].clone();
    assert_eq!(spans("plan.json"), spans("again.json"));

    fs::write(root.join("a.txt"), "Tell me a story about the sea.\n").unwrap();
    fs::write(root.join("b.txt"), "And one about the mountains and their birds.").unwrap();
    let generate = ["generate", "--model", tiny, "--plan", "plan.json", "--max-new-tokens", "6"];
    let batch = json_of(
        root,
        &[&generate[..], &["--prompt-file", "a.txt", "--prompt-file", "b.txt"]].concat(),
    );
    for (index, file) in ["a.txt", "b.txt"].into_iter().enumerate() {
        let alone = json_of(root, &[&generate[..], &["--prompt-file", file]].concat());
        assert_eq!(alone["completions"][0], batch["completions"][index]);
        let text = alone["completions"][0]["text"].as_str().unwrap().to_string();
        assert_eq!(ok(root, &[&generate[..], &["--prompt-file", file]].concat()), text + "\n");
    }

    cases(&root.join("cases.jsonl"), 2, 16);
    let eval =
        ["eval", "retrieval", "--model", tiny, "--data", "cases.jsonl", "--max-new-tokens", "16"];
    let dense = json_of(root, &[&eval[..], &["--items", "items.jsonl"]].concat());
    assert_eq!((dense["cases"].as_u64(), dense["density"].as_f64()), (Some(2), Some(1.0)));
    assert_eq!(dense["kv_bytes"], dense["kv_bytes_dense"]);
    assert_eq!(fs::read_to_string(root.join("items.jsonl")).unwrap().lines().count(), 3);
    let planned = json_of(root, &[&eval[..], &["--plan", "plan.json", "--lines", "8"]].concat());
    assert!(planned["kv_bytes"].as_u64() < planned["kv_bytes_dense"].as_u64());
    assert!(planned["prompt_tokens_mean"].as_f64() < dense["prompt_tokens_mean"].as_f64());
    for field in ["correct", "accuracy", "seconds"] {
        assert!(planned[field].is_number(), "{planned}");
    }

    fs::write(root.join("text.txt"), "The ship left the harbor before the sun was up. ".repeat(60))
        .unwrap();
    let args = [
        "eval",
        "perplexity",
        "--model",
        tiny,
        "--text",
        "text.txt",
        "--length",
        "256",
        "--windows",
        "2",
    ];
    let perplexity = json_of(root, &[&args[..], &["--uniform", "0.5"]].concat());
    assert_eq!(perplexity["windows"], 2);
    assert!(perplexity["perplexity"].as_f64().unwrap() > 1.0);
}

#[test]
fn compress_reads_calibration_prompts_of_a_file() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path();
    let tiny = tiny();
    let prompt = "The sea was calm and the ship went on. ".repeat(40);
    // Every third is held out.
    let lines: String = (0..5)
        .map(|i| {
            format!(
                "{}\n",
                serde_json::json!({ "prompt": format!("{i} {prompt}"), "answer": "It was calm." })
            )
        })
        .collect();
    fs::write(root.join("data.jsonl"), lines).unwrap();
    let args = [
        "compress",
        "--model",
        tiny.to_str().unwrap(),
        "--data",
        "data.jsonl",
        "--lengths",
        "256",
        "--samples",
        "3",
        "--validation-samples",
        "1",
        "--evaluations",
        "0",
        "--density",
        "0.6",
        "--max-rules-per-layer",
        "1",
        "--save-profile",
        "p.safetensors",
        "--out",
        "plan.json",
    ];
    let found = json_of(root, &args);
    assert!(root.join("p.safetensors").is_file());
    assert_eq!(found["plan"]["provenance"]["method"], "moa compress");
    // A sentence over and over again, and an answer that any of them gives.
    let warning = found["warnings"][0].as_str().unwrap();
    assert!(warning.contains("no long dependency at 256 tokens"), "{warning}");
    let search = ["search", "--profile", "p.safetensors", "--density", "0.6", "--out", "plans"];
    assert_eq!(json_of(root, &search)["warnings"], found["warnings"]);
    let plan: serde_json::Value =
        serde_json::from_str(&fs::read_to_string(root.join("plan.json")).unwrap()).unwrap();
    for layer in plan["rules"].as_array().unwrap() {
        assert_eq!(layer[0], layer[1], "one rule per layer was asked for");
    }
    let long = ["--lengths", "4096", "--data", "data.jsonl"];
    refuses(
        root,
        &[&["profile", "--model", tiny.to_str().unwrap(), "--out", "q"], &long[..]].concat(),
        &["4096"],
    );
}

// Spans alone lose answers where as many bytes in int8 do not.
#[test]
fn a_budget_of_bytes_is_one_of_keys_in_int8_that_every_command_takes_from_the_plan() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path();
    let tiny = tiny();
    let model = ["--model", tiny.to_str().unwrap()];
    let prompt = "The sea was calm and the ship went on. ".repeat(40);
    let line = |i: usize| {
        let prompt = format!("{i} {prompt}");
        format!("{}\n", serde_json::json!({ "prompt": prompt, "answer": "It was calm." }))
    };
    fs::write(root.join("data.jsonl"), (0..3).map(line).collect::<String>()).unwrap();
    let data = ["--data", "data.jsonl", "--lengths", "256", "--samples", "2"];
    let few = ["--validation-samples", "1", "--evaluations", "0", "--text-samples", "0"];
    let compress = [&["compress"][..], &model, &data, &few, &["--kv-bytes", "30%"]].concat();
    let found = json_of(root, &[&compress[..], &["--out", "plan.json"]].concat());
    assert_eq!(found["plan"]["cache_types"], serde_json::json!(vec!["int8"; 12]));
    let at = |found: &serde_json::Value, field: &str| found["plan"]["at"][0][field].as_f64();
    let share = |found: &serde_json::Value| at(found, "kv_bytes").zip(at(found, "kv_bytes_dense"));
    let (kept, dense) = share(&found).unwrap();
    assert!(kept <= 0.3 * dense && at(&found, "density").unwrap() > 0.45, "{}", found["plan"]);
    let wide = [&compress[..], &["--cache-dtype", "bf16", "--out", "wide.json"]].concat();
    let wide = json_of(root, &wide);
    assert!(wide["plan"]["cache_types"].is_null() && at(&wide, "density").unwrap() <= 0.3);

    let with_plan = [&model[..], &["--plan", "plan.json"]].concat();
    let generate = ["--prompt", "Hello", "--max-new-tokens", "2"];
    ok(root, &[&["generate"][..], &with_plan, &generate].concat());
    let tasks =
        ["--task", "passkey", "--lengths", "512", "--samples", "1", "--max-new-tokens", "4"];
    let answered = json_of(root, &[&["eval", "tasks"][..], &with_plan, &tasks].concat());
    let agreement = ["--lengths", "512", "--windows", "1"];
    let agreed = json_of(root, &[&["eval", "agreement"][..], &with_plan, &agreement].concat());
    for row in [&answered, &agreed["rows"][0]] {
        let bytes = |field: &str| row[field].as_f64().unwrap();
        assert!(bytes("kv_bytes") <= 0.31 * bytes("kv_bytes_dense"), "{row}");
    }
    // Rivals have the plan's bytes: windows in its type, keys that are evicted in the device's.
    let suite = ["--preset", "recall-1k", "--samples", "1", "--tasks", "passkey", "--windows", "0"];
    let suite = [&suite[..], &["--rivals", "uniform,snapkv"]].concat();
    let board = json_of(root, &[&["eval", "suite"][..], &with_plan, &suite].concat());
    let rows = board["rows"].as_array().unwrap();
    assert!(rows[2]["cache"].as_str().unwrap().ends_with(" int8"), "{board}");
    let bytes = |row: &serde_json::Value| row["kv_bytes"].as_f64().unwrap();
    for row in &rows[2..] {
        assert!((bytes(&rows[1]) / bytes(row) - 1.0).abs() < 0.03, "{board}");
    }
    let export = moa_in(root, &["plan", "export", "plan.json", "--out", "published.json"]);
    assert!(String::from_utf8_lossy(&export.stderr).contains("cache types"), "{export:?}");
    let auto = [&["eval", "tasks"][..], &with_plan, &["--cache-dtype", "auto"]].concat();
    refuses(root, &[&auto[..], &["--task", "passkey"]].concat(), &["--cache-dtype", "auto"]);
}

#[test]
fn quickstart_writes_its_four_files() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path();
    let args = [
        "quickstart",
        "--out",
        "out",
        "--density",
        "0.5",
        "--lengths",
        "512",
        "--samples",
        "1",
        "--evaluations",
        "2",
        "--length",
        "512",
        "--questions",
        "1",
    ];
    let result = json_of(root, &args);
    for name in ["plan.json", "profile.safetensors", "heads.svg", "results.json"] {
        assert!(root.join("out").join(name).is_file(), "{name}");
    }
    let results = result["results"].as_array().unwrap();
    let bytes: Vec<u64> = results.iter().map(|r| r["kv_bytes"].as_u64().unwrap()).collect();
    assert!(bytes[2] < bytes[0] && bytes[1].abs_diff(bytes[2]) * 100 < bytes[2], "{bytes:?}");
}

#[test]
fn chat_takes_a_turn_per_line() {
    let dir = tempfile::tempdir().unwrap();
    let tiny = tiny();
    let mut child = Command::new(env!("CARGO_BIN_EXE_moa"))
        .args([
            "generate",
            "--model",
            tiny.to_str().unwrap(),
            "--chat",
            "--max-new-tokens",
            "4",
            "--json",
        ])
        .args(["--context", "512"])
        .current_dir(dir.path())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(b"Hello.\n\nAnd again.\n").unwrap();
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success());
    let value: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(value["turns"].as_array().unwrap().len(), 2);
    assert!(
        value["turns"][1]["cached_tokens"].as_u64() > value["turns"][0]["cached_tokens"].as_u64()
    );
}

#[test]
fn made_plans_have_the_spans_they_were_asked_for() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path();
    let tiny = tiny();
    let tiny = tiny.to_str().unwrap();
    let args = [
        "plan",
        "retrieval-heads",
        "--model",
        tiny,
        "--heads",
        "0:1,3:0",
        "--window",
        "192",
        "--out",
        "duo.json",
    ];
    ok(root, &args);
    let spans =
        json_of(root, &["plan", "show", "duo.json", "--at", "1000"])["at"][0]["spans"].clone();
    assert_eq!(spans[0], serde_json::json!([256, 1000]));
    assert_eq!(spans[3], serde_json::json!([1000, 256]));
    ok(
        root,
        &["plan", "uniform", "--model", tiny, "--window", "36", "--sink", "4", "--out", "u.json"],
    );
    let shown = json_of(root, &["plan", "show", "u.json", "--at", "100"]);
    assert_eq!(shown["at"][0]["density"], 0.4);
    // 6 layers x 2 heads x 40 keys x 64 elements x key and value x 2 bytes.
    assert_eq!(shown["at"][0]["kv_bytes"], 6 * 2 * 40 * 64 * 2 * 2);
}

#[test]
fn help_of_every_subcommand_has_an_example() {
    let all: &[&[&str]] = &[
        &[],
        &["quickstart"],
        &["profile"],
        &["search"],
        &["validate"],
        &["compress"],
        &["plan"],
        &["plan", "show"],
        &["plan", "import"],
        &["plan", "export"],
        &["plan", "uniform"],
        &["plan", "retrieval-heads"],
        &["generate"],
        &["eval"],
        &["eval", "retrieval"],
        &["eval", "tasks"],
        &["eval", "perplexity"],
        &["eval", "agreement"],
        &["eval", "longbench"],
        &["eval", "suite"],
        &["report"],
    ];
    for command in all {
        let text = ok(Path::new("."), &[command, &["--help"][..]].concat());
        assert!(text.contains("Example") && text.contains("\n  moa "), "{command:?}\n{text}");
        assert!(text.contains("--json") && text.contains("--seed"), "{command:?}\n{text}");
    }
    let version = moa_in(Path::new("."), &["--version"]);
    assert!(version.status.success());
}
