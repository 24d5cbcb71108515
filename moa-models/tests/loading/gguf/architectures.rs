//! Files that `quantize` writes of each architecture, against those that llama.cpp's converter wrote of the same checkpoints
//! (`fixtures/gguf/make.py`).

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use moa_models::{
    BlockType, Checkpoint, Cpu, Dtype, Error, Gguf, ModelConfig, RopeScaling, TensorType,
    Tensors as _, quantize,
};
use serde_json::{Value as Json, json};
use tempfile::TempDir;

use super::logits;
use super::quantize::family;

/// Files of the converter, the checkpoint of each, and what its configuration was changed to: the converter leaves windows
/// of Mistral and Qwen out.
fn converted() -> [(&'static str, &'static str, Json); 8] {
    let none = json!({});
    let no_window =
        json!({"sliding_window": null, "use_sliding_window": false, "layer_types": null});
    [
        ("mistral", "families/mistral", no_window.clone()),
        ("qwen2", "families/qwen2", no_window),
        ("ministral3", "families/ministral3", none.clone()),
        ("qwen3", "families/qwen3", none.clone()),
        ("smollm3", "gguf/smollm3", none.clone()),
        ("granite", "families/granite", none.clone()),
        ("phi3-longrope", "families/phi3-longrope", none.clone()),
        ("phi3-window", "families/phi3-window", none),
    ]
}

fn folder(from: &str, change: &Json) -> TempDir {
    family(from, |config| {
        for (field, value) in change.as_object().unwrap() {
            config[field] = value.clone();
        }
    })
}

fn theirs(name: &str) -> PathBuf {
    let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/gguf");
    fixtures.join(format!("{name}.gguf"))
}

/// Type and bytes of the keys of the architecture, arrays left out.
fn keys(path: &Path) -> BTreeMap<String, (u32, Vec<u8>)> {
    let file = std::fs::read(path).unwrap();
    let mut at = 16;
    let mut take = |len: usize| {
        at += len;
        &file[at - len..at]
    };
    fn number(bytes: &[u8]) -> usize {
        bytes.iter().rev().fold(0, |sum, byte| sum << 8 | usize::from(*byte))
    }
    let mut all = BTreeMap::new();
    for _ in 0..number(take(8)) {
        let len = number(take(8));
        let key = String::from_utf8(take(len).to_vec()).unwrap();
        let kind = number(take(4));
        let (element, count) = match kind {
            9 => (number(take(4)), number(take(8))),
            _ => (kind, 1),
        };
        for _ in 0..count {
            let len = match element {
                8 => number(take(8)),
                0 | 1 | 7 => 1,
                _ => 4,
            };
            let value = take(len).to_vec();
            if kind != 9 {
                all.insert(key.clone(), (kind as u32, value));
            }
        }
    }
    all.retain(|key, _| !key.starts_with("tokenizer.") && !key.starts_with("general."));
    all
}

#[test]
fn files_have_the_tensors_and_keys_that_llama_cpp_gives_them() -> Result<(), Error> {
    for (name, from, change) in converted() {
        let dir = folder(from, &change);
        let own = dir.path().join("model.gguf");
        let dtype = if name == "phi3-window" { Dtype::F32 } else { Dtype::Bf16 };
        quantize(dir.path(), dtype, &own, &mut ())?;
        // Names, types, shapes and first 4096 bytes of all tensors, which are their whole here.
        let fingerprint = |path: &Path| Ok::<_, Error>(Gguf::open(path)?.fingerprint());
        assert_eq!(fingerprint(&own)?, fingerprint(&theirs(name))?, "{name}");
        let (own_keys, mut keys) = (keys(&own), keys(&theirs(name)));
        if name == "phi3-window" {
            // Of scaled models alone is it read.
            keys.remove("phi3.rope.scaling.original_context_length").unwrap();
        }
        assert!(keys.len() >= 8, "{keys:?}");
        for (key, value) in keys {
            assert_eq!(own_keys.get(&key), Some(&value), "{name}: {key}");
        }
        // The vocabularies are not of one tokenizer.
        let config = |path: &Path| {
            let config = ModelConfig::from_file(path)?;
            Ok::<_, Error>(ModelConfig { bos_token_id: None, eos_token_ids: Vec::new(), ..config })
        };
        assert_eq!(config(&own)?, config(&theirs(name))?, "{name}");
    }
    Ok(())
}

#[test]
fn what_is_written_is_the_model_of_the_folder() -> Result<(), Error> {
    let tokens = [5, 17, 3, 40, 8, 9, 22, 60, 33, 12, 7, 61, 2, 50];
    // Mistral's window and those of Phi-3 are in the file.
    let windows = ("mistral", "families/mistral", json!({}));
    for (name, from, change) in converted().into_iter().chain([windows]) {
        let dir = folder(from, &change);
        let exact = logits(&Checkpoint::open(Cpu::default(), dir.path())?, &tokens)?;
        // Its weights are f32, the others' bf16, which f16 holds but for the smallest.
        let is_wide = name == "phi3-window";
        let types: [(TensorType, f64); 4] = [
            (Dtype::F32.into(), 1e-6),
            (Dtype::Bf16.into(), if is_wide { 0.01 } else { 1e-6 }),
            (Dtype::F16.into(), if is_wide { 0.002 } else { 1e-6 }),
            (BlockType::Q8_0.into(), 0.06),
        ];
        for (kind, most) in types {
            let path = dir.path().join("model.gguf");
            let quantized = quantize(dir.path(), kind, &path, &mut ())?;
            let near = logits(&Checkpoint::open(Cpu::default(), &path)?, &tokens)?;
            let square = |x: f32| f64::from(x) * f64::from(x);
            let error: f64 = near.iter().zip(&exact).map(|(a, b)| square(a - b)).sum();
            let size: f64 = exact.iter().copied().map(square).sum();
            let error = (error / size).sqrt();
            assert!(error <= most, "{name}, {kind:?}: {error}, {quantized:?}");
        }
    }
    Ok(())
}

#[test]
fn scalings_of_angles_are_written() -> Result<(), Error> {
    let yarn = json!({"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0,
        "original_max_position_embeddings": 16});
    let with = |field: &str, value: f64| {
        let mut yarn = yarn.clone();
        yarn[field] = json!(value);
        yarn
    };
    let mut two = with("mscale", 0.7);
    two["mscale_all_dim"] = json!(1.3);
    let long = json!({"rope_type": "longrope", "short_factor": [1.1, 1.2, 1.3, 1.4, 1.5, 1.6],
        "long_factor": [1.7, 2.2, 3.3, 4.4, 5.5, 6.6], "original_max_position_embeddings": 16});
    let llama3 = json!({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 64});
    let linear = json!({"rope_type": "linear", "factor": 2.5});
    let tokens: Vec<u32> = (3..40).collect();
    let scalings = [yarn.clone(), with("attention_factor", 0.9), with("beta_fast", 24.3), two];
    for scaling in scalings.into_iter().chain([long, llama3, linear]) {
        let dir = family("families/qwen3", |config| {
            config["rope_parameters"] = Json::Null;
            config["rope_scaling"] = scaling.clone();
        });
        let path = dir.path().join("model.gguf");
        quantize(dir.path(), Dtype::F32, &path, &mut ())?;
        let folder = Checkpoint::open(Cpu::default(), dir.path())?;
        assert_ne!(folder.model.config().rope_scaling, RopeScaling::Default);
        let exact = logits(&folder, &tokens)?;
        let near = logits(&Checkpoint::open(Cpu::default(), &path)?, &tokens)?;
        let far = near.iter().zip(&exact).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        assert!(far < 1e-4, "{scaling}: {far}");
    }
    Ok(())
}
