//! `moa quantize`.

use std::fs;

use crate::common::{json_of, ok, refuses, tiny};

#[test]
fn a_file_is_written_once_and_over_another_one_by_force() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path();
    let model = tiny();
    let model = model.to_str().unwrap();
    let args = ["quantize", "--model", model, "--type", "q8_0", "--out", "tiny.gguf"];
    let written = json_of(root, &args);
    assert_eq!(written["tensors"]["Q8_0"], 43);
    assert!(written["error"].as_f64().unwrap() < 0.007, "{written}");
    refuses(root, &args, &["tiny.gguf", "--force"]);
    fs::write(root.join("tiny.gguf"), "x").unwrap();
    assert!(ok(root, &[&args[..], &["--force"]].concat()).contains("bits a weight"));
    let again = ["quantize", "--model", "tiny.gguf", "--type", "q4_k", "--out", "small.gguf"];
    assert!(json_of(root, &again)["bits_per_weight"].as_f64().unwrap() < 6.5);
    let generate = ["generate", "--model", "small.gguf", "--prompt", "Hello"];
    ok(root, &[&generate[..], &["--max-new-tokens", "2"]].concat());
    let exact = ["quantize", "--model", model, "--type", "bf16", "--out", "exact.gguf"];
    let exact = json_of(root, &exact);
    assert_eq!((&exact["tensors"]["BF16"], &exact["error"]), (&43.into(), &0.0.into()), "{exact}");
    let bad = ["quantize", "--model", model, "--type", "q9", "--out", "x.gguf"];
    let output = crate::common::moa_in(root, &bad);
    assert_eq!(output.status.code(), Some(2));
    refuses(root, &["quantize", "--model", "none", "--type", "q8_0", "--out", "x.gguf"], &["none"]);
}
