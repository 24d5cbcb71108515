//! Folders whose tensors are not those of their configuration.

use std::fs;
use std::path::Path;

use moa_core::Plan;
use moa_models::{Checkpoint, Cpu, Error, OpenOptions, PromptStyle};
use serde_json::{Value, json};

use crate::moa_tiny;

/// A copy of the small model.
pub(crate) fn copy() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    for entry in fs::read_dir(moa_tiny()).unwrap() {
        let entry = entry.unwrap();
        fs::copy(entry.path(), dir.path().join(entry.file_name())).unwrap();
    }
    dir
}

/// Changes the header and the data of the weights.
pub(crate) fn edit(dir: &Path, change: impl FnOnce(&mut Value, &mut Vec<u8>)) {
    let path = dir.join("model.safetensors");
    let bytes = fs::read(&path).unwrap();
    let len = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let mut header: Value = serde_json::from_slice(&bytes[8..8 + len]).unwrap();
    let mut data = bytes[8 + len..].to_vec();
    change(&mut header, &mut data);
    let header = header.to_string().into_bytes();
    fs::write(&path, [&(header.len() as u64).to_le_bytes()[..], &header, &data].concat()).unwrap();
}

/// Adds a tensor of these bytes.
pub(crate) fn add(
    header: &mut Value,
    data: &mut Vec<u8>,
    name: &str,
    dtype: &str,
    shape: &[usize],
    own: &[u8],
) {
    let begin = data.len();
    data.extend(own);
    header[name] = json!({"dtype": dtype, "shape": shape, "data_offsets": [begin, data.len()]});
}

pub(crate) fn set(dir: &Path, file: &str, field: &str, value: Value) {
    let path = dir.join(file);
    let mut object: Value = serde_json::from_str(&fs::read_to_string(&path).unwrap()).unwrap();
    object[field] = value;
    fs::write(&path, object.to_string()).unwrap();
}

pub(crate) fn open(dir: &Path) -> Result<Checkpoint<Cpu>, Error> {
    Checkpoint::open(Cpu::default(), dir)
}

pub(crate) fn answer(checkpoint: &Checkpoint<Cpu>) -> String {
    let dense = Plan::full(checkpoint.model.shape()).unwrap();
    checkpoint.complete(&dense, "Hello", 4).unwrap().text
}

#[test]
fn tensors_that_nobody_reads_are_named() -> Result<(), Error> {
    let dir = copy();
    edit(dir.path(), |header, data| {
        for layer in 0..6 {
            let name = format!("model.layers.{layer}.self_attn.q_proj.bias");
            add(header, data, &name, "F32", &[2], &[1; 8]);
        }
        add(header, data, "model.layers.0.self_attn.rotary_emb.inv_freq", "F32", &[1], &[0; 4]);
    });
    let error = open(dir.path()).unwrap_err();
    assert!(matches!(&error, Error::TensorsUnread { names, .. } if names.len() == 6), "{error}");
    let message = error.to_string();
    assert!(message.contains("model.layers.0.self_attn.q_proj.bias"), "{message}");
    assert!(message.contains("--ignore-extra-tensors"), "{message}");
    let options = OpenOptions::default().ignore_extra_tensors(true);
    options.open(Cpu::default(), dir.path())?;

    let dir = copy();
    set(dir.path(), "config.json", "num_hidden_layers", json!(5));
    let message = open(dir.path()).unwrap_err().to_string();
    assert!(message.contains("model.layers.5."), "{message}");
    Ok(())
}

#[test]
fn an_output_matrix_of_its_own_is_kept() -> Result<(), Error> {
    let table = |header: &Value, data: &[u8]| {
        let entry = &header["model.embed_tokens.weight"];
        let end = |i: usize| entry["data_offsets"][i].as_u64().unwrap() as usize;
        let shape: Vec<usize> = serde_json::from_value(entry["shape"].clone()).unwrap();
        (entry["dtype"].as_str().unwrap().to_owned(), shape, data[end(0)..end(1)].to_vec())
    };
    let dir = copy();
    edit(dir.path(), |header, data| {
        let (dtype, shape, own) = table(header, data);
        add(header, data, "lm_head.weight", &dtype, &shape, &own);
    });
    let same = open(dir.path())?;
    assert!(same.model.config().tie_word_embeddings);
    let expected = answer(&same);
    let dir = copy();
    edit(dir.path(), |header, data| {
        let (dtype, shape, mut own) = table(header, data);
        // Whole rows, of which each token has another's.
        let half = own.len() / 2;
        own.rotate_left(half);
        add(header, data, "lm_head.weight", &dtype, &shape, &own);
    });
    let other = open(dir.path())?;
    assert!(!other.model.config().tie_word_embeddings);
    assert_ne!(answer(&other), expected);
    Ok(())
}

#[test]
fn a_model_under_other_names_is_the_same_model() -> Result<(), Error> {
    let expected = answer(&open(&moa_tiny())?);
    for prefix in ["", "language_model.model."] {
        let dir = copy();
        edit(dir.path(), |header, _| {
            let names: Vec<String> = header.as_object().unwrap().keys().cloned().collect();
            for name in names.iter().filter(|name| name.starts_with("model.")) {
                let tensor = header.as_object_mut().unwrap().remove(name).unwrap();
                header[name.replacen("model.", prefix, 1)] = tensor;
            }
        });
        assert_eq!(answer(&open(dir.path())?), expected, "{prefix}");
    }
    Ok(())
}

#[test]
fn a_quantised_folder_says_how() {
    let dir = copy();
    let quantise = |name: &'static str| {
        edit(dir.path(), |header, data| add(header, data, name, "I32", &[1], &[0; 4]));
    };
    quantise("model.layers.0.self_attn.q_proj.qweight");
    let error = open(dir.path()).unwrap_err();
    assert!(
        matches!(&error, Error::Quantized { scheme, .. } if scheme == "GPTQ or AWQ"),
        "{error}"
    );
    let config = json!({"quant_method": "awq", "bits": 3, "group_size": 128});
    set(dir.path(), "config.json", "quantization_config", config);
    let error = open(dir.path()).unwrap_err();
    assert!(
        matches!(&error, Error::Quantized { scheme, .. } if scheme == "AWQ, 3 bits"),
        "{error}"
    );
}

#[test]
fn the_tokenizers_end_ends_a_turn_too() -> Result<(), Error> {
    let dir = copy();
    set(dir.path(), "generation_config.json", "eos_token_id", json!([5, null]));
    assert_eq!(open(dir.path())?.eos_token_ids(), [5, 2]);
    Ok(())
}

#[test]
fn a_model_without_a_template_continues_texts() -> Result<(), Error> {
    let dir = copy();
    let chat = open(dir.path())?;
    assert_eq!(chat.prompt_style(), PromptStyle::Chat);
    // A template that does not compile is no matter to whoever does not use it.
    for template in [Some("{% if %}"), None] {
        set(dir.path(), "tokenizer_config.json", "chat_template", json!(template));
        let mut base = open(dir.path())?;
        if template.is_some() {
            let dense = Plan::full(base.model.shape())?;
            let error = base.complete(&dense, "Hello", 2).unwrap_err();
            assert!(matches!(&error, Error::Template { .. }), "{error}");
            base.set_prompt_style(PromptStyle::Raw);
        }
        assert_eq!(base.prompt_style(), PromptStyle::Raw);
        let messages = ["a", "b"].map(moa_models::Message::user);
        assert_eq!(base.prompt_tokens(&messages)?, base.tokenizer.encode("a\nb", true)?);
        answer(&base);
    }
    Ok(())
}

#[test]
fn a_folder_without_weights_runs_with_random_ones() -> Result<(), Error> {
    let dir = copy();
    fs::remove_file(dir.path().join("model.safetensors")).unwrap();
    let open = |seed| OpenOptions::default().random_weights(seed).open(Cpu::default(), dir.path());
    assert!(matches!(open(None), Err(Error::NoWeights { .. })));
    let answer = |seed| {
        let checkpoint = open(Some(seed))?;
        let dense = Plan::full(checkpoint.model.shape())?;
        Ok::<_, Error>(checkpoint.complete(&dense, "Once upon a time", 4)?.tokens)
    };
    assert_eq!(answer(1)?, answer(1)?);
    assert_ne!(answer(1)?, answer(2)?);
    Ok(())
}
