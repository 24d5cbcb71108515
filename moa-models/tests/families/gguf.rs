//! GGUF files that llama.cpp's converter made of small checkpoints, against what transformers computed of those
//! (`fixtures/gguf/make.py`).

use std::fs;
use std::path::{Path, PathBuf};

use moa_core::Plan;
use moa_models::{Checkpoint, Cpu, Result};
use serde::Deserialize;

use crate::{close, logits};

const NAMES: [&str; 8] =
    ["granite", "mistral", "mistral3", "phi3-longrope", "phi3-window", "qwen2", "qwen3", "smollm3"];

#[derive(Deserialize)]
struct Golden {
    tokens: Vec<u32>,
    /// Logits of all tokens.
    dense: Vec<Vec<f32>>,
    /// Logits of a first few tokens that are all there are.
    prefix: Vec<Vec<f32>>,
}

fn fixture(name: &str, end: &str) -> PathBuf {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/gguf");
    folder.join(format!("{name}.{end}"))
}

#[test]
fn logits_of_converted_files_equal_those_of_transformers() -> Result<()> {
    for name in NAMES {
        let golden = fs::read_to_string(fixture(name, "json")).unwrap();
        let golden: Golden = serde_json::from_str(&golden).unwrap();
        let model = Checkpoint::open(Cpu::default(), fixture(name, "gguf"))?.model;
        let plan = Plan::full(model.shape())?;
        let n = golden.tokens.len();
        for chunks in [&[n][..], &[7, 1, 12]] {
            close(name, &logits(&model, &plan, &golden.tokens, chunks), &golden.dense);
        }
        let few = golden.prefix.len();
        close(name, &logits(&model, &plan, &golden.tokens[..few], &[few]), &golden.prefix);
    }
    Ok(())
}
