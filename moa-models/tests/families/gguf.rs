//! GGUF files that llama.cpp's converter made of small checkpoints, against what transformers computed of those
//! (`fixtures/gguf/make.py`).

use std::fs;
use std::path::{Path, PathBuf};

use moa_core::Plan;
use moa_models::{BlockType, Checkpoint, Cpu, Result, quantize};
use serde::Deserialize;

use crate::{close, logits};

const NAMES: [&str; 9] = [
    "granite",
    "ministral3",
    "mistral",
    "mistral3",
    "phi3-longrope",
    "phi3-window",
    "qwen2",
    "qwen3",
    "smollm3",
];

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

// Where queries, keys and values are one tensor, its rows are cut in their blocks.
#[test]
fn converted_files_in_blocks_are_nearly_the_same_models() -> Result<()> {
    let dir = tempfile::tempdir().unwrap();
    for name in NAMES {
        let file = dir.path().join(format!("{name}.gguf"));
        let quantized = quantize(fixture(name, "gguf"), BlockType::Q8_0, &file, &mut ())?;
        assert!(quantized.tensors["Q8_0"] >= 11, "{name}: {quantized:?}");
        let golden = fs::read_to_string(fixture(name, "json")).unwrap();
        let golden: Golden = serde_json::from_str(&golden).unwrap();
        let model = Checkpoint::open(Cpu::default(), &file)?.model;
        let near = logits(&model, &Plan::full(model.shape())?, &golden.tokens, &[20]);
        let square = |x: f32| f64::from(x) * f64::from(x);
        let exact = golden.dense.iter().flatten();
        let error: f64 = near.iter().zip(exact.clone()).map(|(a, b)| square(a - b)).sum();
        let error = (error / exact.copied().map(square).sum::<f64>()).sqrt();
        assert!(error < 0.06, "{name}: {error}");
    }
    Ok(())
}
