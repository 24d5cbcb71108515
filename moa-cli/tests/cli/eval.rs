//! Evaluations: by length and depth, resumed, in several tasks and lengths.

use std::fs;
use std::path::Path;

use serde_json::{Value, json};

use crate::common::{cases, json_of, moa_in, ok, refuses, tiny};

fn lines_of(path: &Path) -> Vec<String> {
    fs::read_to_string(path).unwrap().lines().map(str::to_string).collect()
}

/// The answers are those of the file: new ones would have taken another time.
fn same_seconds(a: &Value, b: &Value) {
    let seconds = |value: &Value| value["seconds"].as_f64().unwrap();
    assert!((seconds(a) - seconds(b)).abs() < 1e-9, "{a} and {b}");
}

#[test]
fn retrieval_is_grouped_by_length_and_depth_and_goes_on_where_it_stopped() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path();
    let tiny = tiny();
    let tiny = tiny.to_str().unwrap();
    cases(&root.join("cases.jsonl"), 3, 16);
    let eval = [
        "eval",
        "retrieval",
        "--model",
        tiny,
        "--data",
        "cases.jsonl",
        "--max-new-tokens",
        "30",
        "--lines",
        "12,4",
        "--items",
        "items.jsonl",
    ];
    let whole = json_of(root, &eval);
    let sizes = whole["sizes"].as_array().unwrap();
    let numbers =
        |field: &str| -> Vec<u64> { sizes.iter().filter_map(|s| s[field].as_u64()).collect() };
    assert_eq!((numbers("lines"), numbers("cases")), (vec![4, 12], vec![3, 3]));
    for size in sizes {
        let depths = size["depths"].as_array().unwrap();
        let asked: u64 = depths.iter().map(|d| d["asked"].as_u64().unwrap()).sum();
        assert_eq!(asked, 3, "{size}");
    }
    // The model answers all of them: the effective context is the longest, and dense.
    assert_eq!(whole["correct"], 6, "{whole}");
    assert_eq!(whole["effective_context"], sizes[1]["context_mean"]);
    assert_eq!(whole["ratio"], 1.0);

    // Cut at any place, the file is completed to what it was, but for the times.
    let path = root.join("items.jsonl");
    let lines = lines_of(&path);
    assert_eq!(lines.len(), 7);
    let text = fs::read_to_string(&path).unwrap();
    let cut = text.len() - lines[6].len() - lines[5].len() / 2;
    fs::write(&path, &text[..cut]).unwrap();
    let again = json_of(root, &eval);
    assert_eq!(lines_of(&path)[..5], lines[..5]);
    assert_eq!(lines_of(&path).len(), 7);
    same_seconds(&again["sizes"][0], &whole["sizes"][0]);
    for field in ["cases", "correct", "accuracy", "kv_bytes", "effective_context"] {
        assert_eq!(again[field], whole[field]);
    }

    // Fewer cases of the same settings need no model run; other settings are refused.
    let few = json_of(root, &[&eval[..], &["--limit", "1"]].concat());
    assert_eq!(few["cases"], 2);
    refuses(root, &[&eval[..], &["--uniform", "0.5"]].concat(), &["items.jsonl", "plan"]);
    refuses(root, &[&eval[..], &["--seed", "1"]].concat(), &["items.jsonl", "seed = 0, not 1"]);
    refuses(root, &[&eval[..], &["--depth-bins", "11"]].concat(), &["--depth-bins", "1 to 10"]);
    let table = ok(root, &[&eval[..], &["--depth-bins", "2"]].concat());
    assert!(table.contains("0-50 %") && table.contains("Effective context: "), "{table}");
    fs::write(&path, "{\"case\": 1}\n").unwrap();
    refuses(root, &eval, &["items.jsonl, line 1", "settings"]);
}

#[test]
fn generated_tasks_have_the_length_asked_for() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path();
    let tiny = tiny();
    let tiny = tiny.to_str().unwrap();
    for task in ["niah_multiquery", "mqar"] {
        let args = [
            "eval",
            "tasks",
            "--model",
            tiny,
            "--task",
            task,
            "--lengths",
            "448,512",
            "--samples",
            "1",
            "--max-new-tokens",
            "8",
            "--items",
            task,
        ];
        let report = json_of(root, &args);
        let sizes = report["sizes"].as_array().unwrap();
        for (size, length) in sizes.iter().zip([448.0, 512.0]) {
            assert_eq!(size["tokens"].as_f64(), Some(length), "{report}");
            let context = size["context_mean"].as_f64().unwrap();
            assert!(context <= length && context > length - 64.0, "{task}: {context} of {length}");
        }
        let items = lines_of(&root.join(task));
        assert_eq!(items.len(), 3);
        // Made again, nothing is left to ask.
        same_seconds(&json_of(root, &args), &report);
        assert_eq!(lines_of(&root.join(task)), items);
        let few = ["eval", "tasks", "--model", tiny, "--task", task, "--lengths", "64"];
        refuses(root, &few, &["--lengths", "at least"]);
    }
    let args = ["eval", "tasks", "--model", tiny, "--task", "qa_1", "--lengths", "512"];
    refuses(root, &args, &["SQuAD"]);
    let squad = json!({ "data": [{ "paragraphs": [{
        "context": "The lighthouse keeper was called Ambrose.",
        "qas": [{ "question": "Who kept the lighthouse?", "answers": [{ "text": "Ambrose" }] }],
    }] }] });
    fs::write(root.join("squad.json"), squad.to_string()).unwrap();
    let own = ["--squad", "squad.json", "--samples", "1", "--uniform", "0.5"];
    let report = json_of(root, &[&args[..], &own[..]].concat());
    assert!(report["kv_footprint"].as_f64().unwrap() > report["density"].as_f64().unwrap());
    assert!(report["prompt_tokens_mean"].as_f64().unwrap() > 384.0, "{report}");
    let args = ["eval", "tasks", "--model", tiny, "--task", "mqar", "--lengths", "512,9000"];
    refuses(root, &args, &["--lengths", "9000", "8192"]);
    let args = ["eval", "tasks", "--model", tiny, "--task", "needle"];
    refuses(root, &args, &["needle", "niah_single_1"]);
}

#[test]
fn perplexity_is_given_for_each_length_and_text() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path();
    let tiny = tiny();
    let tiny = tiny.to_str().unwrap();
    let text = |subject: &str| format!("The {subject} left the harbor before the sun was up. ");
    fs::write(root.join("a.txt"), text("ship").repeat(60)).unwrap();
    fs::write(root.join("b.txt"), text("pilot").repeat(40)).unwrap();
    let eval = ["eval", "perplexity", "--model", tiny, "--text", "a.txt", "--text", "b.txt"];
    let args = [&eval[..], &["--lengths", "128,64", "--windows", "2"]].concat();
    let report = json_of(root, &args);
    let lengths = report["lengths"].as_array().unwrap();
    assert_eq!(lengths.len(), 2);
    for (at, length) in lengths.iter().zip([64, 128]) {
        assert_eq!((at["length"].as_u64(), at["windows"].as_u64()), (Some(length), Some(4)));
        let texts = at["texts"].as_array().unwrap();
        let mean: f64 =
            texts.iter().map(|t| t["cross_entropy"].as_f64().unwrap()).sum::<f64>() / 2.0;
        assert!((at["cross_entropy"].as_f64().unwrap() - mean).abs() < 1e-9, "{at}");
    }
    assert_eq!(report["tokens"], 4 * 63 + 4 * 127);
    refuses(root, &[&eval[..], &["--lengths", "64,900"]].concat(), &["a.txt", "at least 900"]);
    let output = moa_in(root, &["eval", "perplexity", "--model", tiny, "--text", "a.txt"]);
    assert_eq!(output.status.code(), Some(2));
}

#[test]
fn agreement_is_given_for_texts_and_for_answers() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path();
    let tiny = tiny();
    let tiny = tiny.to_str().unwrap();
    let prompt = "The ship left the harbor before the sun was up. ".repeat(20);
    let line = json!({ "prompt": prompt, "answer": "It left early." });
    fs::write(root.join("prompts.jsonl"), format!("{line}\n")).unwrap();
    let eval = ["eval", "agreement", "--model", tiny, "--uniform", "0.5", "--windows", "1"];
    let args = [&eval[..], &["--lengths", "192,1024", "--data", "prompts.jsonl"]].concat();
    let args = [&args[..], &["--max-response", "8", "--samples", "1"]].concat();
    let refused = ["1024", "no prompt"];
    refuses(root, &args, &refused);
    let args = args.iter().map(|arg| if *arg == "192,1024" { "192" } else { arg });
    let report = json_of(root, &args.collect::<Vec<_>>());
    let rows = report["rows"].as_array().unwrap();
    assert_eq!(rows.iter().map(|r| &r["of"]).collect::<Vec<_>>(), ["text", "answers"]);
    for row in rows {
        assert_eq!((row["length"].as_u64(), row["items"].as_u64()), (Some(192), Some(1)));
        let number = |field: &str| row[field].as_f64().unwrap();
        assert!(number("kl_mean") > 0.0 && number("kl_p99") >= number("kl_mean"), "{row}");
        assert!(number("kl_worst") >= number("kl_p99"), "{row}");
        assert!((0.0..=1.0).contains(&number("equal_greedy")), "{row}");
        assert!(number("kv_bytes") * 2.0 <= number("kv_bytes_dense"), "{row}");
    }
    assert_eq!(rows[0]["tokens"], 191);
    let table = ok(root, &[&eval[..], &["--lengths", "128"]].concat());
    assert!(table.contains("equal greedy") && table.contains("uniform 0.5"), "{table}");
    let long = [&eval[..], &["--lengths", "9000"]].concat();
    refuses(root, &long, &["9000", "8192"]);
    // A rival evicts before the end of the window; text has no question that it could wait for.
    let rival = ["eval", "agreement", "--model", tiny, "--windows", "1", "--lengths", "256"];
    let rival = [&rival[..], &["--rival", "snapkv", "--density", "0.5"]].concat();
    let row = &json_of(root, &rival)["rows"][0];
    assert_eq!(row["tokens"], 32);
    refuses(root, &[&rival[..], &["--before-question"]].concat(), &["question"]);
    refuses(root, &[&rival[..], &["--continuation", "200"]].concat(), &["density", "at least 0.7"]);
}

#[test]
fn what_cannot_be_asked_is_refused_with_the_option_that_asks_it() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path();
    let tiny = tiny();
    let model = ["--model", tiny.to_str().unwrap()];
    let eval = |args: &[&str]| moa_in(root, &[&["eval"], args, &model[..]].concat());
    let refused = |args: &[&str], parts: &[&str]| {
        refuses(root, &[&["eval"], args, &model[..]].concat(), parts);
    };
    cases(&root.join("cases.jsonl"), 2, 16);
    let retrieval = ["retrieval", "--data", "cases.jsonl", "--lines"];
    refused(&[&retrieval[..], &["8,17"]].concat(), &["--lines must be at most 16", "got 17"]);
    cases(&root.join("short.jsonl"), 1, 8);
    let both = fs::read_to_string(root.join("cases.jsonl")).unwrap()
        + &fs::read_to_string(root.join("short.jsonl")).unwrap();
    fs::write(root.join("both.jsonl"), both).unwrap();
    let args = ["retrieval", "--data", "both.jsonl", "--lines", "12", "--max-new-tokens", "1"];
    let said = eval(&args).stderr;
    let said = String::from_utf8_lossy(&said);
    assert!(said.contains("warning: 1 of 3 cases have fewer than 12 record lines"), "{said}");

    // The model has a token for the beginning of a text.
    fs::write(root.join("text.txt"), "The sea was calm and the ship went on.").unwrap();
    for command in ["perplexity", "agreement"] {
        let of = |length| [command, "--text", "text.txt", "--lengths", length];
        for length in ["1", "2"] {
            refused(&of(length), &["--lengths must be at least 3 tokens", length]);
        }
        refused(&of("10000"), &["--lengths: ", "10000", "8192"]);
        let said = eval(&of("256")).stderr;
        let said = String::from_utf8_lossy(&said);
        assert!(said.contains("text.txt: text must be at least 256 tokens, got 1"), "{said}");
    }
    for (task, flag) in [("qa_1", "--squad"), ("qa_2", "--hotpotqa")] {
        refused(&["tasks", "--task", task], &[&format!("{flag} must be a file"), task]);
        refused(&["suite", "--tasks", task], &[&format!("{flag} must be a file"), task]);
    }
    // What is said to be enough is.
    let mqar = |length: &str, samples: &str| {
        let args = ["tasks", "--task", "mqar", "--lengths", length, "--samples", samples];
        eval(&[&args[..], &["--max-new-tokens", "1"]].concat())
    };
    let least = |length: &str| {
        let said = String::from_utf8(mqar(length, "1").stderr).unwrap();
        let (_, rest) = said.split_once("must be at least ").unwrap();
        rest.split(' ').next().unwrap().to_string()
    };
    let enough = least("1");
    assert_eq!(least("99"), enough);
    assert!(mqar(&enough, "12").status.success(), "{enough}");

    let case = json!({ "input": "a", "context": "b", "answers": [] });
    fs::write(root.join("qasper.jsonl"), format!("{case}\n")).unwrap();
    refused(&["longbench", "--data", "qasper.jsonl"], &["qasper.jsonl, line 1: ", "answers"]);
}

#[test]
fn a_suite_gives_a_row_for_each_cache() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path();
    let tiny = tiny();
    let tiny = tiny.to_str().unwrap();
    let made = ["plan", "retrieval-heads", "--model", tiny, "--heads", "0:1", "--window", "64"];
    ok(root, &[&made[..], &["--out", "duo.json"]].concat());
    let suite = ["eval", "suite", "--model", tiny, "--preset", "recall-1k", "--samples", "1"];
    let suite = [&suite[..], &["--tasks", "multi-key"]].concat();
    let with_plan = [&suite[..], &["--plan", "mine=duo.json", "--items", "answers"]].concat();
    let board = json_of(root, &[&with_plan[..], &["--windows", "1"]].concat());
    let rows = board["rows"].as_array().unwrap();
    let names: Vec<_> = rows.iter().map(|row| row["cache"].as_str().unwrap()).collect();
    assert_eq!(names[..2], ["dense", "mine"]);
    let rivals: Vec<_> = names[2..].iter().map(|name| name.split(' ').next().unwrap()).collect();
    assert_eq!(rivals, ["uniform", "snapkv", "adakv", "kvzip"]);
    assert_eq!(rows[0]["agreement"]["kl_mean"], 0.0);
    assert_eq!(rows[0]["kv_bytes"], rows[0]["kv_bytes_dense"]);
    let number = |row: &Value, field: &str| row[field].as_f64().unwrap();
    // Equal bytes at 1024 tokens, which questions nearly fill.
    for row in &rows[2..] {
        let (plan, rival) = (number(&rows[1], "kv_bytes"), number(row, "kv_bytes"));
        assert!((plan / rival - 1.0).abs() < 0.03, "{plan} {rival}");
    }
    for row in &rows[1..] {
        assert!(number(row, "kv_footprint") > number(row, "density"), "{row}");
        // All on the end of the window, before which rivals evict.
        let agreement = &row["agreement"];
        assert!(number(agreement, "kl_mean") > 0.0, "{row}");
        assert!(number(agreement, "tokens") <= 128.0, "{row}");
        assert!(row["scores"]["multi-key"]["score"].is_f64(), "{row}");
    }
    assert_eq!(fs::read_dir(root.join("answers")).unwrap().count(), 6);
    // Every answer is known.
    let table = ok(root, &[&with_plan[..], &["--windows", "0"]].concat());
    assert!(table.contains("multi-key") && !table.contains("KL worst 1 %"), "{table}");
    // Names of rows and of their files.
    let twice = |plans: &[&str]| {
        let plans = [&suite[..], &["--plan"], plans].concat();
        refuses(root, &plans, &["--plan", "different names", "twice"]);
    };
    fs::create_dir(root.join("other")).unwrap();
    fs::copy(root.join("duo.json"), root.join("other/duo.json")).unwrap();
    twice(&["duo.json", "other/duo.json"]);
    twice(&["a b=duo.json", "a-b=other/duo.json"]);
    twice(&["dense=duo.json"]);
    let same = ["--windows", "0", "--tasks", "multi-key,multi-key", "--density", "0.5"];
    let same = [&suite[..suite.len() - 2], &same, &["--rivals", "uniform,uniform"]].concat();
    let board = json_of(root, &same);
    assert_eq!(board["tasks"], serde_json::json!(["multi-key"]));
    assert_eq!(board["rows"].as_array().unwrap().len(), 2);
    let long = ["eval", "suite", "--model", tiny, "--preset", "ruler-16k"];
    refuses(root, &long, &["--preset", "16384", "8192"]);
    refuses(root, &[&suite[..], &["--rivals", "duo"]].concat(), &["--rivals", "--density"]);
    let duo = [&suite[..], &["--rivals", "duo", "--density", "0.5"]].concat();
    refuses(root, &duo, &["--rivals", "--profile"]);
    // What has no effect.
    for (wrong, parts) in [
        (&["--rivals", "none,uniform"][..], ["--rivals", "none alone"]),
        (&["--rivals", "uniform", "--before-question"], ["--before-question", "snapkv"]),
        (&["--rivals", "uniform", "--profile", "p"], ["--profile", "per-layer"]),
        (&["--rivals", "none", "--before-question"], ["--before-question", "kvzip"]),
    ] {
        refuses(root, &[&suite[..], &["--density", "0.5"], wrong].concat(), &parts);
    }
    refuses(
        root,
        &[&suite[..], &["--rivals", "none", "--density", "0.5"]].concat(),
        &["--density"],
    );
    // Too few bytes for the answer alone: an error where the rival was asked for, else a row less.
    let few = [&suite[..], &["--windows", "0", "--density", "0.04"]].concat();
    refuses(root, &[&few[..], &["--rivals", "adakv"]].concat(), &["adakv", "at least 0.0"]);
    let board = json_of(root, &few);
    assert_eq!(board["rows"].as_array().unwrap().len(), 2);
}

// A profile of shorter items says nothing of the keys that lie farther away.
#[test]
fn rivals_that_are_searched_use_the_bytes_of_the_plan_and_are_named_by_what_they_keep() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path();
    let tiny = tiny();
    let tiny = tiny.to_str().unwrap();
    let profile = ["profile", "--model", tiny, "--lengths", "256", "--samples", "2"];
    ok(root, &[&profile[..], &["--data", "records", "--out", "p"]].concat());
    let suite = ["eval", "suite", "--model", tiny, "--preset", "recall-1k", "--samples", "1"];
    let suite = [&suite[..], &["--tasks", "multi-key", "--windows", "0", "--profile", "p"]];
    let suite = [&suite.concat()[..], &["--rivals", "fixed,per-layer,duo", "--density", "0.468"]];
    let board = json_of(root, &suite.concat());
    let warnings = board["warnings"].as_array().unwrap();
    for row in &board["rows"].as_array().unwrap()[1..] {
        let name = row["cache"].as_str().unwrap();
        let (kind, kept) = name.split_once(' ').unwrap();
        let density = row["density"].as_f64().unwrap();
        assert!((density - kept.parse::<f64>().unwrap()).abs() < 0.01, "{row}");
        let is_short = density < 0.97 * 0.468;
        // A head more or less of a duo plan is a twelfth of the keys.
        assert!(!is_short || kind == "duo" && density > 0.37, "{row}");
        let is_told = warnings.iter().any(|of| of.as_str().unwrap().starts_with(kind));
        assert_eq!(is_told, is_short, "{name}: {warnings:?}");
    }
}

#[test]
fn questions_are_asked_of_what_an_eviction_leaves() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path();
    let tiny = tiny();
    let tiny = tiny.to_str().unwrap();
    let eval = ["eval", "tasks", "--model", tiny, "--task", "multi-key", "--lengths", "512"];
    let eval = [&eval[..], &["--samples", "1", "--rival"]].concat();
    let report = json_of(root, &[&eval[..], &["kvzip", "--density", "0.3"]].concat());
    assert_eq!((&report["plan"], &report["correct"]), (&json!("kvzip 0.3"), &json!(1)));
    let share = report["kv_bytes"].as_f64().unwrap() / report["kv_bytes_dense"].as_f64().unwrap();
    assert!(share > 0.29 && share <= 0.3, "{share}");
    let before = ["adakv", "--density", "0.5", "--before-question"];
    let report = json_of(root, &[&eval[..], &before].concat());
    assert_eq!(report["plan"], "adakv 0.5 before the question");
    let few = [&eval[..], &["snapkv", "--density", "0.05"]].concat();
    refuses(root, &few, &["multi-key", "density"]);
    for wrong in [&["kvzip"][..], &["h2o", "--density", "0.5"]] {
        assert_eq!(moa_in(root, &[&eval[..], wrong].concat()).status.code(), Some(2));
    }
}

#[test]
fn longbench_files_are_asked_by_their_dataset() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path();
    let tiny = tiny();
    let tiny = tiny.to_str().unwrap();
    let case = |dataset: &str| {
        json!({ "input": "Who left?", "context": "The ship left the harbor. ".repeat(200),
                "answers": ["the ship"], "all_classes": null, "dataset": dataset, "_id": "1" })
    };
    fs::write(root.join("a.jsonl"), format!("{}\n", case("hotpotqa"))).unwrap();
    fs::write(root.join("lcc.jsonl"), format!("{}\n", case("lcc_e"))).unwrap();
    let eval = ["eval", "longbench", "--model", tiny, "--max-length", "512", "--data"];
    let report = json_of(root, &[&eval[..], &["a.jsonl", "lcc.jsonl"]].concat());
    let sets = report["datasets"].as_array().unwrap();
    assert_eq!((&sets[0]["dataset"], &sets[1]["dataset"]), (&json!("hotpotqa"), &json!("lcc")));
    for (set, answer) in sets.iter().zip([32.0, 64.0]) {
        // Cut in the middle to just what fits.
        let prompt = set["prompt_tokens_mean"].as_f64().unwrap();
        assert!(prompt <= 512.0 - answer && prompt > 480.0 - answer, "{set}");
    }
    let mean = (sets[0]["score"].as_f64().unwrap() + sets[1]["score"].as_f64().unwrap()) / 2.0;
    assert!((report["average"].as_f64().unwrap() - mean).abs() < 1e-9);
    fs::write(root.join("x.jsonl"), format!("{}\n", case("squad"))).unwrap();
    refuses(root, &[&eval[..], &["x.jsonl"]].concat(), &["x.jsonl", "squad", "hotpotqa"]);
    let items = [&eval[..], &["a.jsonl", "lcc.jsonl", "--items", "i.jsonl"]].concat();
    refuses(root, &items, &["--items", "one file"]);
}
