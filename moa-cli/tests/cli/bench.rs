//! `moa bench`: what it says, and what it refuses.

use crate::common::{json_of, ok, refuses, tiny};

#[test]
fn dense_and_plan_are_measured_for_every_prompt_and_batch() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path();
    let tiny = tiny();
    let tiny = tiny.to_str().unwrap();
    let args = ["bench", "--model", tiny, "--uniform", "0.25", "--new-tokens", "8"];
    let value = json_of(root, &[&args[..], &["--prompts", "120,248", "--batches", "1,3"]].concat());
    let all = value["measurements"].as_array().unwrap();
    assert_eq!(all.len(), 8);
    for one in all {
        let batch = one["batch"].as_u64().unwrap();
        assert_eq!(one["context"].as_u64(), one["prompt"].as_u64().map(|n| n + 8));
        for field in ["first_token_seconds", "decode_tokens_per_second", "step_seconds"] {
            assert!(one[field].as_f64().unwrap() > 0.0, "{one}");
        }
        // 6 layers x 2 KV heads x 64 x (K and V) x 2 bytes per token.
        let dense = batch * one["context"].as_u64().unwrap() * 6 * 2 * 64 * 2 * 2;
        assert_eq!(one["kv_bytes_dense"].as_u64(), Some(dense));
        let share = one["kv_bytes"].as_u64().unwrap() as f64 / dense as f64;
        let expected = if one["plan"] == "dense" { 1.0 } else { one["density"].as_f64().unwrap() };
        assert!((share - expected).abs() < 0.01, "{one}");
    }
    let config = format!("{tiny}/config.json");
    let args = ["bench", "--config", &config, "--random-weights", "3", "--new-tokens", "6"];
    assert!(ok(root, &[&args[..], &["--prompts", "30"]].concat()).contains("dense"));
    let args = ["bench", "--model", tiny, "--prompts", "40", "--new-tokens", "30", "--steps", "4"];
    let one = &json_of(root, &args)["measurements"][0];
    assert_eq!((one["steps"].as_u64(), one["context"].as_u64()), (Some(4), Some(70)));
}

#[test]
fn profiling_is_measured_by_length() {
    let dir = tempfile::tempdir().unwrap();
    let tiny = tiny();
    let args = ["bench", "--model", tiny.to_str().unwrap(), "--profile", "--prompts", "20,300"];
    let value = json_of(dir.path(), &args);
    let all = value["profiles"].as_array().unwrap();
    for (one, [tokens, response]) in all.iter().zip([[20, 10], [300, 64]]) {
        assert_eq!(one["tokens"].as_u64(), Some(tokens));
        assert_eq!(one["response"].as_u64(), Some(response));
        assert!(one["seconds"].as_f64().unwrap() > 0.0, "{one}");
    }
    assert_eq!(all.len(), 2);
}

#[test]
fn what_cannot_be_measured_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path();
    let tiny = tiny();
    let tiny = tiny.to_str().unwrap();
    let bench = |args: &[&str], parts: &[&str]| {
        refuses(root, &[&["bench"], args].concat(), parts);
    };
    bench(&[], &["--model"]);
    bench(&["--model", tiny, "--random-weights", "1"], &["--random-weights"]);
    bench(&["--config", "config.json"], &["--random-weights"]);
    bench(&["--model", tiny, "--no-dense"], &["--no-dense", "--plan or --uniform"]);
    bench(&["--model", tiny, "--profile", "--uniform", "0.5"], &["--profile"]);
    bench(&["--model", tiny, "--profile", "--prompts", "1"], &["calibration item"]);
    bench(&["--model", tiny, "--batches", "0"], &["--batches"]);
    bench(&["--model", tiny, "--batches", "max"], &["--batches", "max"]);
    bench(&["--model", tiny, "--new-tokens", "3"], &["new tokens", "3"]);
    bench(&["--model", tiny, "--new-tokens", "20", "--steps", "16"], &["new tokens", "20"]);
    let huge = "2147483647";
    bench(&["--model", tiny, "--prompts", huge], &["8192"]);
    bench(&["--model", tiny, "--prompts", huge, "--profile"], &[huge, "8192"]);
    for huge in ["100000000000", "18446744073709551615"] {
        bench(&["--model", tiny, "--prompts", huge], &["2^31"]);
    }
    bench(&["--model", tiny, "--new-tokens", "18446744073709551615"], &["2^31"]);
    bench(&["--model", tiny, "--prompts", "8190"], &["8254", "8192"]);
}
