//! The way to a plan, of every family.

use std::fs;

use moa_core::Plan;
use moa_models::{
    CalibrationData, CalibrationPrompt, Checkpoint, CompressOptions, Cpu, Message, Result, compress,
};

use crate::{FAMILIES, folder};

const LENGTH: usize = 96;

/// A family's checkpoint with room for more tokens, and a tokenizer of one token a letter.
fn checkpoint(family: &str) -> Result<Checkpoint<Cpu>> {
    let dir = tempfile::tempdir().unwrap();
    let read = |path: &std::path::Path| -> serde_json::Value {
        serde_json::from_slice(&fs::read(path).unwrap()).unwrap()
    };
    let from = folder(family);
    fs::copy(from.join("model.safetensors"), dir.path().join("model.safetensors")).unwrap();
    let mut config = read(&from.join("config.json"));
    config["max_position_embeddings"] = LENGTH.into();
    fs::write(dir.path().join("config.json"), config.to_string()).unwrap();
    let tiny = from.join("../../../../../assets/moa-tiny/tokenizer.json");
    let mut tokenizer = read(&tiny);
    let rows = config["vocab_size"].as_u64().unwrap();
    tokenizer["model"]["vocab"]
        .as_object_mut()
        .unwrap()
        .retain(|_, id| id.as_u64().unwrap() < rows);
    tokenizer["model"]["merges"] = serde_json::json!([]);
    fs::write(dir.path().join("tokenizer.json"), tokenizer.to_string()).unwrap();
    Checkpoint::open(Cpu::default(), dir.path())
}

/// Letters and digits, each a token.
fn text(seed: usize, len: usize) -> String {
    (0..len)
        .map(|i| char::from(b"ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"[(seed + i * i * 7) % 36]))
        .collect()
}

#[test]
fn a_plan_of_every_family_is_found_and_run() -> Result<()> {
    let question = |i: usize| CalibrationPrompt::Question {
        messages: vec![Message::user(text(i, LENGTH - 10))],
        answer: Some(text(3 * i + 1, 4)),
    };
    let prompts = (0..9).map(question).collect();
    let data = CalibrationData::Prompts(prompts);
    let options = CompressOptions {
        density: 0.5,
        lengths: vec![LENGTH],
        bound_lengths: vec![LENGTH],
        validation_length: Some(LENGTH),
        samples: 2,
        max_response: 8,
        validation_samples: 1,
        text_samples: 0,
        evaluations: Some(12),
        ..CompressOptions::default()
    };
    for family in FAMILIES {
        let checkpoint = checkpoint(family)?;
        let (model, config) = (&checkpoint.model, checkpoint.model.config());
        let found = compress(&checkpoint, &data, &options, &mut ())?;
        checkpoint.check_plan(&found.plan)?;
        let context = config.context_length();
        let request = options.request(context)?.with_windows(config.windows());
        assert!(request.allows(&found.plan)?, "{family}");

        // What it measured of plans is what the model says of them.
        let judged =
            checkpoint.calibrate(&data, &options.validation_calibration(context), &mut ())?;
        let dense = Plan::full(config.shape())?;
        let refined = &found.refined;
        assert!(refined.loss <= refined.start_loss, "{family}: {refined:?}");
        for (plan, loss) in [(&found.plan, refined.loss), (&dense, refined.dense_loss)] {
            let own = model.response_loss(&judged.items[&LENGTH], plan, LENGTH)?;
            assert!((own - loss).abs() < 1e-5, "{family}: {loss}, not {own}");
            checkpoint.complete(plan, &text(5, 40), 4)?;
        }
    }
    Ok(())
}
