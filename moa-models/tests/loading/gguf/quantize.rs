//! Files that `quantize` writes.

use std::path::{Path, PathBuf};

use moa_models::{
    BlockType, Checkpoint, Cpu, Error, Gguf, Message, ModelConfig, Quantized, Tensors as _,
    Tokenizer, Weights, quantize,
};
use tempfile::TempDir;

use super::file::{F32, File};
use super::{TEXT, logits, written};
use crate::moa_tiny;

fn tiny(blocks: BlockType) -> (TempDir, PathBuf, Quantized) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("tiny.gguf");
    let quantized = quantize(moa_tiny(), blocks, &path, &mut ()).unwrap();
    (dir, path, quantized)
}

#[test]
fn a_folder_becomes_a_file_of_nearly_the_same_model() -> Result<(), Error> {
    let folder = Checkpoint::open(Cpu::default(), moa_tiny())?;
    let tokens = folder.tokenizer.encode(TEXT, true)?;
    let exact = logits(&folder, &tokens)?;
    let mut errors = Vec::new();
    for (blocks, most) in [(BlockType::Q8_0, 0.02), (BlockType::Q4K, 0.25), (BlockType::Q4_0, 0.3)]
    {
        let (dir, path, quantized) = tiny(blocks);
        let file = Checkpoint::open(Cpu::default(), &path)?;
        let names = folder.model.config().tensor_names.clone();
        let config = ModelConfig { tensor_names: names, ..file.model.config().clone() };
        assert_eq!(&config, folder.model.config());
        assert_eq!(file.eos_token_ids(), folder.eos_token_ids());
        assert_eq!(file.tokenizer.encode(TEXT, true)?, tokens);
        let chat = [Message::user("Hello!")];
        assert_eq!(file.chat_tokens(&chat)?, folder.chat_tokens(&chat)?);
        let square = |x: f32| f64::from(x) * f64::from(x);
        let near = logits(&file, &tokens)?;
        let error: f64 = near.iter().zip(&exact).map(|(a, b)| square(a - b)).sum();
        let size: f64 = exact.iter().copied().map(square).sum();
        assert!((error / size).sqrt() < most, "{blocks:?} {}", (error / size).sqrt());
        assert_eq!(std::fs::metadata(&path).unwrap().len(), quantized.bytes as u64);
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
        errors.push(quantized.error);
    }
    assert!(errors[0] < 0.007 && errors[1] < errors[2] && errors[2] < 0.12, "{errors:?}");
    Ok(())
}

#[test]
fn logits_come_from_more_bits_and_rows_of_other_lengths_from_other_blocks() -> Result<(), Error> {
    let (_dir, path, _) = tiny(BlockType::Q4K);
    let file = Gguf::open(path)?;
    for (name, shape, kind) in [
        ("token_embd.weight", [8192, 256], BlockType::Q6K),
        ("blk.0.attn_q.weight", [256, 256], BlockType::Q4K),
        // 704 is no multiple of 256.
        ("blk.0.ffn_down.weight", [256, 704], BlockType::Q5_0),
    ] {
        assert_eq!(file.tensor(name, &shape)?.blocks(), Some(kind), "{name}");
    }
    assert_eq!(file.tensor("output_norm.weight", &[256])?.blocks(), None);
    Ok(())
}

#[test]
fn a_file_becomes_another_one() -> Result<(), Error> {
    let (dir, first, _) = tiny(BlockType::Q8_0);
    let second = dir.path().join("again.gguf");
    quantize(&first, BlockType::Q8_0, &second, &mut ())?;
    assert_eq!(Gguf::open(&first)?.fingerprint(), Gguf::open(&second)?.fingerprint());
    let (a, b) = (Gguf::open(&first)?.tokenizer()?, Gguf::open(&second)?.tokenizer()?);
    assert_eq!(a.encode(TEXT, true)?, b.encode(TEXT, true)?);
    assert_eq!(std::fs::read(first).unwrap().len(), std::fs::read(second).unwrap().len());
    Ok(())
}

/// A file with one matrix of these numbers and a norm.
fn matrix(values: &[f32], kind: u32) -> File {
    let bytes = match kind {
        F32 => values.iter().flat_map(|x| x.to_le_bytes()).collect(),
        _ => {
            let mut bytes = Vec::new();
            BlockType::Q4K.narrow(values, &mut bytes);
            bytes
        }
    };
    let mut file = File::new();
    file.key("general.architecture", "llama");
    file.tensor("blk.0.ffn_up.weight", &[256, values.len() as u64 / 256], kind, bytes);
    file.tensor("output_norm.weight", &[4], F32, [1f32; 4].map(f32::to_le_bytes).concat());
    file
}

#[test]
fn blocks_of_the_same_type_are_copied() -> Result<(), Error> {
    let values: Vec<f32> =
        (0..4 * 256).map(|i| ((i * 7919 % 1009) as f32 - 500.0) / 300.0).collect();
    let (dir, first) = written(&matrix(&values, 12).bytes());
    let second = dir.path().join("again.gguf");
    let quantized = quantize(&first, BlockType::Q4K, &second, &mut ())?;
    assert_eq!(quantized.error, 0.0);
    let read = |path: &Path| Gguf::open(path)?.tensor("blk.0.ffn_up.weight", &[4, 256]);
    assert_eq!(read(&first)?.bytes(), read(&second)?.bytes());
    Ok(())
}

#[test]
fn weights_that_no_block_holds_are_refused() {
    for (value, kind) in [
        (f32::NAN, BlockType::Q4_0),
        (f32::INFINITY, BlockType::Q8_0),
        // The step is beyond f16.
        (1e9, BlockType::Q8_0),
        (1e9, BlockType::Q4K),
    ] {
        let mut values = vec![0.5; 2 * 256];
        values[300] = value;
        let (dir, path) = written(&matrix(&values, F32).bytes());
        let out = dir.path().join("out.gguf");
        let error = quantize(&path, kind, &out, &mut ()).unwrap_err();
        assert!(
            matches!(&error, Error::NotFinite { what, got } if *got == value.to_string()
                && what.contains("row 1, column 44 of tensor `blk.0.ffn_up")),
            "{error}"
        );
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
    }
    let mut file = matrix(&[0.5; 256], F32);
    file.tensors[1].bytes = f32::NAN.to_le_bytes().repeat(4);
    let (dir, path) = written(&file.bytes());
    let error = quantize(path, BlockType::Q8_0, dir.path().join("out.gguf"), &mut ()).unwrap_err();
    assert!(error.to_string().contains("output_norm"), "{error}");
}

/// A folder of a small random model, with the tokenizer of another model, cut to its vocabulary.
pub(super) fn family(name: &str, change: impl Fn(&mut serde_json::Value)) -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    let from = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name);
    std::fs::copy(from.join("model.safetensors"), dir.path().join("model.safetensors")).unwrap();
    let read = |path: PathBuf| -> serde_json::Value {
        serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
    };
    let mut config = read(from.join("config.json"));
    change(&mut config);
    let rows = config["vocab_size"].as_u64().unwrap();
    std::fs::write(dir.path().join("config.json"), config.to_string()).unwrap();
    let mut tokenizer = read(moa_tiny().join("tokenizer.json"));
    let vocabulary = tokenizer["model"]["vocab"].as_object_mut().unwrap();
    vocabulary.retain(|_, id| id.as_u64().unwrap() < rows);
    tokenizer["model"]["merges"] = serde_json::json!([]);
    std::fs::write(dir.path().join("tokenizer.json"), tokenizer.to_string()).unwrap();
    dir
}

#[test]
fn what_gguf_has_no_word_for_is_refused_and_leaves_no_file() {
    let refused = |dir: &TempDir, expected: &str| {
        let path = dir.path().join("model.gguf");
        let error = quantize(dir.path(), BlockType::Q8_0, &path, &mut ()).unwrap_err();
        assert!(error.to_string().contains(expected), "{error}");
        let names = std::fs::read_dir(dir.path()).unwrap();
        let names: Vec<_> = names.map(|entry| entry.unwrap().file_name()).collect();
        assert!(names.iter().all(|name| !name.to_string_lossy().contains("gguf")), "{names:?}");
    };
    let other = |field: &str, value: serde_json::Value| {
        family("families/qwen3", |config| config[field] = value.clone())
    };
    refused(&other("model_type", "gemma".into()), "to be written as GGUF");
    let dynamic = serde_json::json!({"type": "dynamic", "factor": 2.0});
    refused(&other("rope_scaling", dynamic), "rope_scaling");
    // Windows of some layers alone, and layers that do not rotate and are not every fourth.
    refused(&family("families/qwen2", |_| {}), "configuration");
    refused(&family("families/smollm3", |_| {}), "configuration");
    let other = family("families/qwen3", |_| {});
    let path = other.path().join("tokenizer.json");
    let text = std::fs::read_to_string(&path).unwrap();
    std::fs::write(
        &path,
        text.replace("\"individual_digits\":true", "\"individual_digits\":false"),
    )
    .unwrap();
    refused(&other, "pre_tokenizer");
    let cancelled = tempfile::tempdir().unwrap();
    let path = cancelled.path().join("tiny.gguf");
    let mut stop = |_, done, _| match done {
        0..3 => std::ops::ControlFlow::Continue(()),
        _ => std::ops::ControlFlow::Break(()),
    };
    let error = quantize(moa_tiny(), BlockType::Q8_0, &path, &mut stop).unwrap_err();
    assert!(matches!(error, Error::Cancelled));
    assert_eq!(std::fs::read_dir(cancelled.path()).unwrap().count(), 0);
    // As another run that ends first.
    let mut meanwhile = |_, _, _| {
        std::fs::write(&path, "mine").unwrap();
        std::ops::ControlFlow::Continue(())
    };
    let error = quantize(moa_tiny(), BlockType::Q8_0, &path, &mut meanwhile).unwrap_err();
    let Error::Io { source, .. } = error else { panic!("{error}") };
    assert_eq!(source.kind(), std::io::ErrorKind::AlreadyExists);
    assert_eq!(std::fs::read(&path).unwrap(), b"mine");
    assert_eq!(std::fs::read_dir(cancelled.path()).unwrap().count(), 1);
}

#[test]
fn pieces_get_scores_that_merge_as_the_merges_did() -> Result<(), Error> {
    let dir = tempfile::tempdir().unwrap();
    let copy = |name: &str| std::fs::copy(moa_tiny().join(name), dir.path().join(name)).unwrap();
    copy("config.json");
    copy("model.safetensors");
    let mut vocabulary = serde_json::Map::new();
    let bytes: Vec<String> = (0..=255).map(|byte| format!("<0x{byte:02X}>")).collect();
    let special = ["<unk>", "<s>", "</s>"].into_iter();
    let pieces = ["▁", "a", "b", "c", "bc", "ab", "▁ab", "abc"];
    for token in special.chain(bytes.iter().map(String::as_str)).chain(pieces) {
        vocabulary.insert(token.to_owned(), vocabulary.len().into());
    }
    let special = |id: u32, content: &str| {
        serde_json::json!({"id": id, "content": content, "special": true, "normalized": false,
            "single_word": false, "lstrip": false, "rstrip": false})
    };
    let tokenizer = serde_json::json!({
        "version": "1.0", "truncation": null, "padding": null,
        "added_tokens": [special(0, "<unk>"), special(1, "<s>"), special(2, "</s>")],
        "normalizer": {"type": "Sequence", "normalizers": [
            {"type": "Prepend", "prepend": "▁"},
            {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]},
        "pre_tokenizer": null, "post_processor": null,
        "decoder": {"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
            {"type": "ByteFallback"}, {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": 1, "stop": 0}]},
        "model": {"type": "BPE", "dropout": null, "unk_token": "<unk>",
            "continuing_subword_prefix": null, "end_of_word_suffix": null, "fuse_unk": true,
            "byte_fallback": true, "ignore_merges": false, "vocab": vocabulary,
            "merges": [["b", "c"], ["a", "b"], ["▁", "ab"], ["a", "bc"]]},
    });
    std::fs::write(dir.path().join("tokenizer.json"), tokenizer.to_string()).unwrap();
    std::fs::write(
        dir.path().join("tokenizer_config.json"),
        r#"{"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}"#,
    )
    .unwrap();
    let path = dir.path().join("model.gguf");
    quantize(dir.path(), BlockType::Q8_0, &path, &mut ())?;
    let (own, folder) = (Gguf::open(path)?.tokenizer()?, Tokenizer::from_dir(dir.path())?);
    for text in ["abc ab", "ababc bc é", "a  b", "xyz"] {
        assert_eq!(own.encode(text, false)?, folder.encode(text, false)?, "{text}");
    }
    assert!(Weights::open(dir.path()).is_ok());
    Ok(())
}
