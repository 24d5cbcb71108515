//! What plans are found on and judged by.

use std::fs;
use std::path::Path;

use moa_models::HELD_OUT_TEXT;
use serde_json::json;

use crate::common::{json_of, moa_in, model_copy, ok, refuses, tiny};

/// Lines of questions with prompts of so many sentences, of 9 to 11 tokens each.
fn questions(file: &Path, sentences: &[usize]) {
    let line = |(at, count): (usize, &usize)| {
        let prompt = format!("{at} {}", "The sea was calm and the ship went on. ".repeat(*count));
        format!("{}\n", json!({ "prompt": prompt, "answer": "It was calm." }))
    };
    fs::write(file, sentences.iter().enumerate().map(line).collect::<String>()).unwrap();
}

#[test]
fn held_out_items_are_not_profiled_and_plans_are_validated_on_them_alone() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path();
    let tiny = tiny();
    let model = ["--model", tiny.to_str().unwrap()];
    // One item has 256 tokens: the third, which is held out, or the first.
    questions(&root.join("held.jsonl"), &[1, 1, 20]);
    questions(&root.join("profiled.jsonl"), &[20, 1, 1]);
    let profile =
        [&["profile"][..], &model, &["--lengths", "256", "--out", "p", "--data"]].concat();
    let missing = ["256", "no prompt with its answer"];
    refuses(root, &[&profile[..], &["held.jsonl"]].concat(), &missing);
    ok(root, &[&profile[..], &["profiled.jsonl"]].concat());

    fs::create_dir(root.join("plans")).unwrap();
    let window = ["plan", "uniform", "--model", tiny.to_str().unwrap(), "--window", "16"];
    ok(root, &[&window[..], &["--sink", "4", "--out", "plans/plan-00.json"]].concat());
    let validate = [&["validate"][..], &model, &["--plans", "plans", "--length", "256"]].concat();
    let validate = [&validate[..], &["--out", "plan.json", "--data"]].concat();
    refuses(root, &[&validate[..], &["profiled.jsonl"]].concat(), &missing);
    ok(root, &[&validate[..], &["held.jsonl"]].concat());
}

#[test]
fn running_text_alone_is_cut_into_windows_whose_ends_are_predicted() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path();
    let tiny = tiny();
    let model = ["--model", tiny.to_str().unwrap(), "--lengths", "256", "--data"];
    let text = HELD_OUT_TEXT.split(' ').take(1500).collect::<Vec<_>>().join(" ");
    fs::write(root.join("book.MD"), &text).unwrap();
    let lines = text.split(". ").collect::<Vec<_>>();
    let lines = lines.chunks(lines.len() / 3).map(|part| json!({ "text": part.join(". ") }));
    fs::write(root.join("t.jsonl"), lines.map(|line| format!("{line}\n")).collect::<String>())
        .unwrap();
    for (data, samples) in [("book.MD", 3), ("t.jsonl", 2)] {
        let profile = [&["profile"][..], &model, &[data, "--samples", "3", "--out", "p"]].concat();
        let found = json_of(root, &[&profile[..], &["--objective", "cross-entropy"]].concat());
        assert!(found["lengths"][0]["samples"].as_u64() >= Some(samples), "{data}: {found}");
        let agreement = [&["eval", "agreement", "--uniform", "0.25", "--windows", "1"][..], &model];
        let rows = json_of(root, &[&agreement.concat()[..], &[data, "--samples", "2"]].concat());
        let answers = &rows["rows"][1];
        assert_eq!((&answers["of"], &answers["tokens"]), (&json!("answers"), &json!(2 * 48)));
    }
    let few = ["--validation-samples", "1", "--evaluations", "0", "--max-plans", "1"];
    let few = [&few[..], &["--validation-length", "256", "--out", "plan.json"]].concat();
    let found = json_of(root, &[&["compress"][..], &model, &["book.MD"], &few].concat());
    assert!(!found["warnings"].to_string().contains("plans were judged by"), "{found}");

    let profile = [&["profile"][..], &model].concat();
    fs::write(root.join("short.text"), "The sea was calm.").unwrap();
    let parts = ["256 tokens", "no running text", "longest has"];
    refuses(root, &[&profile[..], &["short.text", "--out", "q"]].concat(), &parts);
    for empty in ["none.jsonl", "none.txt"] {
        fs::write(root.join(empty), "\n").unwrap();
        let args = [&profile[..], &[empty, "--out", "q"]].concat();
        refuses(root, &args, &[empty, "the file is empty"]);
    }
}

#[test]
fn prompts_that_are_cut_and_few_items_are_told_of() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path();
    let tiny = tiny();
    let said = |sentences: &[usize]| {
        questions(&root.join("data.jsonl"), sentences);
        let args = ["profile", "--model", tiny.to_str().unwrap(), "--lengths", "256"];
        let output = moa_in(root, &[&args[..], &["--data", "data.jsonl", "--out", "p"]].concat());
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert!(output.status.success(), "{stderr}");
        let is_cut = stderr.contains("calibration prompts are longer than their lengths");
        let is_few = stderr.contains("calibration items of about 256 tokens: ");
        (is_cut, is_few, stderr)
    };
    let (is_cut, is_few, stderr) = said(&[20; 6]);
    assert!(!is_cut && !is_few, "{stderr}");
    // One of three is held out.
    let (is_cut, is_few, stderr) = said(&[40, 20, 20]);
    assert!(is_cut && stderr.contains("1 calibration prompts are longer"), "{stderr}");
    assert!(is_few && stderr.contains("about 256 tokens: 2, so few"), "{stderr}");
}

#[test]
fn few_samples_that_were_asked_for_are_told_of_too() {
    let dir = tempfile::tempdir().unwrap();
    let tiny = tiny();
    let args = ["profile", "--model", tiny.to_str().unwrap(), "--lengths", "256", "--data"];
    for (samples, is_told) in [("2", true), ("3", false)] {
        let own = ["records", "--samples", samples, "--out", "p"];
        let output = moa_in(dir.path(), &[&args[..], &own].concat());
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert!(output.status.success(), "{stderr}");
        for part in
            ["about 256 tokens: 2 of 2 asked for", "few calibration items at 256 tokens (2)"]
        {
            assert_eq!(stderr.contains(part), is_told, "{part}: {stderr}");
        }
    }
}

#[test]
fn a_model_that_answers_nothing_is_told_what_it_was_asked() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path();
    let model = model_copy(root, "blank");
    // All weights are 0, and all tokens as likely.
    let file = model.join("model.safetensors");
    let mut bytes = fs::read(&file).unwrap();
    let header = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    bytes[8 + header..].fill(0);
    fs::write(&file, bytes).unwrap();
    let args = ["profile", "--quiet", "--model", model.to_str().unwrap(), "--lengths", "256"];
    let tried = ["256", "answered none of the built-in tasks", "pass key 0 of 8", " 0 of "];
    let args = [&args[..], &["--samples", "1", "--out", "p"]].concat();
    refuses(root, &args, &tried);
    // Of the phrasings of records one is told.
    let told = moa_in(root, &args).stderr;
    assert_eq!(String::from_utf8_lossy(&told).matches("records 0 of").count(), 1);
}

#[test]
fn what_has_no_effect_beside_a_profile_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let tiny = tiny();
    let args = ["compress", "--model", tiny.to_str().unwrap(), "--profile", "p", "--out", "o.json"];
    for (flag, value) in [
        ("--samples", "12"),
        ("--objective", "margin"),
        ("--token-weight", "hard"),
        ("--lengths", "256"),
        ("--save-profile", "q"),
    ] {
        refuses(dir.path(), &[&args[..], &[flag, value]].concat(), &["--profile", flag]);
    }
}

#[test]
fn a_plan_is_compared_with_dense_attention_on_held_out_text() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path();
    let tiny = tiny();
    let model = ["--model", tiny.to_str().unwrap()];
    let profile = ["--lengths", "256", "--samples", "3", "--out", "p"];
    ok(root, &[&["profile"][..], &model, &profile].concat());
    let few = ["--profile", "p", "--validation-samples", "2", "--evaluations", "0"];
    let few = [&few[..], &["--max-plans", "1"]].concat();
    let compress = [&["compress"][..], &model, &few, &["--density", "0.2", "--out", "plan.json"]];
    let compress = compress.concat();
    let found = json_of(root, &compress);
    let held_out = &found["held_out"];
    let (text, length) = (&held_out[0]["plan"], &held_out[0]["length"]);
    assert_eq!((length.as_u64(), held_out.as_array().unwrap().len()), (Some(256), 1));
    let number = |field: &str| text[field].as_f64().unwrap();
    assert!(number("equal_greedy") > 0.3 && number("equal_greedy") < 1.0, "{text}");
    let growth = number("plan_perplexity") / number("dense_perplexity");
    assert!((number("perplexity_ratio") - growth).abs() < 1e-6 * growth, "{text}");
    // One window of the same size reads the same text.
    let limit = &held_out[0]["limit"];
    assert_eq!(
        (&limit["tokens"], &limit["dense_perplexity"]),
        (&text["tokens"], &text["dense_perplexity"])
    );
    assert!((limit["density"].as_f64().unwrap() - 0.2).abs() < 0.01, "{limit}");
    assert!(number("kl_worst") >= number("kl_p99") && number("kl_p99") > number("kl_mean"));
    let told = ok(root, &compress);
    assert!(told.contains("dense ppl") && told.contains("one window"), "{told}");
    assert!(told.contains("divergence from dense on text") && !told.contains("Budget"), "{told}");
    assert!(found["losses"]["divergence"].as_f64() > Some(0.0), "{found}");
    let without = json_of(root, &[&compress[..], &["--text-samples", "0"]].concat());
    assert_eq!(without["held_out"], json!([]));
    assert!(without["losses"]["divergence"].is_null(), "{without}");
    assert!(without["losses"]["start_divergence"].is_null(), "{without}");
    // Narrower heads keep more.
    let auto = ["--text-samples", "0", "--cache-dtype", "auto"];
    let told = ok(root, &[&compress[..], &auto].concat());
    assert!(told.contains("Budget: the bytes of 20.0 % of the keys in int8"), "{told}");
    assert!(!told.contains("divergence from dense on text"), "{told}");
}

#[test]
fn plans_that_are_validated_are_warned_of_as_those_of_compress() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path();
    let tiny = tiny();
    let model = ["--model", tiny.to_str().unwrap()];
    ok(
        root,
        &[&["profile"][..], &model, &["--lengths", "256", "--samples", "2", "--out", "p"]].concat(),
    );
    // Rules of 40 keys of 1024, which are as many of 512.
    let search = ["search", "--profile", "p", "--density", "0.04", "--bound-lengths", "1024"];
    let search = [&search[..], &["--space", "fixed", "--sink", "4", "--min-span", "20"]].concat();
    ok(root, &[&search[..], &["--max-plans", "1", "--out", "plans"]].concat());
    let validate = [&["validate"][..], &model, &["--plans", "plans", "--length", "512"]].concat();
    let validate = [&validate[..], &["--samples", "2", "--data", "records"]].concat();
    let validate = [&validate[..], &["--out", "plan.json"]].concat();
    let warned = |extra: &[&str]| {
        let found = json_of(root, &[&validate[..], extra].concat());
        (found["warnings"].to_string(), found)
    };
    let (warnings, _) = warned(&[]);
    assert!(warnings.contains("expect wrong answers"), "{warnings}");
    assert!(warnings.contains("below 1024 tokens"), "{warnings}");
    assert!(!warnings.contains("few calibration items"), "{warnings}");
    let (warnings, found) = warned(&["--refine", "1", "--profile", "p"]);
    assert!(warnings.contains("few calibration items at 256 tokens (2)"), "{warnings}");
    assert!(found["held_out"][0]["limit"].is_null(), "fixed spans are held to no window: {found}");
    let told = moa_in(root, &validate);
    assert!(String::from_utf8_lossy(&told.stderr).contains("warning: the plan's responses lose"));

    let search = ["search", "--profile", "p", "--density", "0.5", "--max-plans", "1", "--out", "e"];
    ok(root, &search);
    let refine = [&["validate"][..], &model, &["--plans", "e", "--length", "512"]].concat();
    let refine = [&refine[..], &["--samples", "2", "--refine", "1", "--profile", "p"]].concat();
    let found = json_of(root, &[&refine[..], &["--out", "e.json"]].concat());
    assert!(found["held_out"][0]["limit"]["tokens"].as_u64() > Some(0), "{found}");
}
