//! Numbers that are none, tokens that are not in the vocabulary, and sequences of another model.

use std::fs;
use std::path::Path;
use std::sync::Arc;

use moa_core::{Influence, Plan};
use moa_models::{Checkpoint, Cpu, Decoder, Error, Item, LogitRows, Objective, Result};

use crate::{full, moa_tiny, text, tiny};

/// moa-tiny with a tensor whose first element is no number.
fn poisoned(folder: &Path, tensor: &str) -> Arc<Decoder<Cpu>> {
    for entry in fs::read_dir(moa_tiny()).unwrap() {
        let entry = entry.unwrap();
        fs::copy(entry.path(), folder.join(entry.file_name())).unwrap();
    }
    let path = folder.join("model.safetensors");
    let mut bytes = fs::read(&path).unwrap();
    let len = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let header: serde_json::Value = serde_json::from_slice(&bytes[8..8 + len]).unwrap();
    let at = 8 + len + header[tensor]["data_offsets"][0].as_u64().unwrap() as usize;
    let none: &[u8] = match header[tensor]["dtype"].as_str().unwrap() {
        "F32" => &[0, 0, 0xc0, 0x7f],
        "F16" => &[0, 0x7e],
        _ => &[0xc0, 0x7f],
    };
    bytes[at..at + none.len()].copy_from_slice(none);
    fs::write(&path, bytes).unwrap();
    Checkpoint::open(Cpu::default(), folder).unwrap().model
}

#[test]
fn a_weight_that_is_no_number_is_an_error_and_no_result() {
    let dir = tempfile::tempdir().unwrap();
    let model = poisoned(dir.path(), "model.layers.0.input_layernorm.weight");
    let tokens = text(40);
    let perplexity = model.perplexity(&tokens, None, 32, 1, &full(), &mut |_, _, _| {
        std::ops::ControlFlow::Continue(())
    });
    let message = perplexity.unwrap_err().to_string();
    assert!(message.contains("token 0 of window 1") && message.contains("finite"), "{message}");
    let item = Item::new(&tokens[..30], &tokens[30..]).unwrap();
    let loss = model.response_loss(std::slice::from_ref(&item), &full(), 40);
    assert!(matches!(loss, Err(Error::NotFinite { .. })), "{loss:?}");
    let mut influence = Influence::new(model.shape(), 64, 16).unwrap();
    let before = influence.clone();
    let profiled = model.profile(&item, Objective::CrossEntropy, &mut influence);
    assert!(profiled.is_err(), "{profiled:?}");
    assert_eq!(influence, before);
}

#[test]
fn targets_that_are_not_in_the_vocabulary_are_errors() {
    let model = tiny();
    let mut tokens = text(40);
    tokens[39] = model.config().vocab_size as u32;
    let go = &mut |_, _, _| std::ops::ControlFlow::Continue(());
    assert!(matches!(
        model.perplexity(&tokens, None, 40, 1, &full(), go),
        Err(Error::Invalid { .. })
    ));
    let item = Item::new(&tokens[..39], &tokens[39..]).unwrap();
    let loss = model.response_loss(std::slice::from_ref(&item), &full(), 40);
    assert!(matches!(loss, Err(Error::Invalid { .. })));
    let mut influence = Influence::new(model.shape(), 64, 16).unwrap();
    let profiled = model.profile(&item, Objective::CrossEntropy, &mut influence);
    assert!(matches!(profiled, Err(Error::Invalid { .. })));
}

#[test]
fn a_sequence_of_another_model_is_refused_everywhere() -> Result<()> {
    let other = Checkpoint::open(Cpu::default(), moa_tiny())?.model;
    let mut foreign = other.open(&Plan::full(other.shape())?, 20, 0)?;
    let model = tiny();
    let refused = |error: Error| {
        assert!(matches!(error, Error::Invalid { what: "sequence", .. }), "{error}");
    };
    refused(model.forward(&mut [&mut foreign], &[&[1, 2]], LogitRows::Last).unwrap_err());
    refused(model.prefill(&mut foreign, &[1, 2], 8).unwrap_err());
    refused(model.fork(&foreign).unwrap_err());
    refused(model.truncate(&mut foreign, 0).unwrap_err());
    refused(model.session(vec![other.fork(&foreign)?]).unwrap_err());
    let mut engine = crate::engine(moa_models::EngineOptions::default());
    engine.resume(other.fork(&foreign)?, vec![1, 2], crate::greedy(2));
    assert!(engine.complete_all().is_err());
    // Nothing happened to it.
    other.forward(&mut [&mut foreign], &[&[1, 2]], LogitRows::Last)?;
    assert_eq!(foreign.len(), 2);
    Ok(())
}
