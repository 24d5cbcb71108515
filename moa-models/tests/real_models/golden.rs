//! Logits against those of an independent implementation in float32, dense and sparse.

use std::path::Path;

use moa_conformance::{Trial, Verdict, trials};
use moa_core::{ModelShape, Plan};
use moa_models::{Cpu, Decoder, Dtype, LogitRows, ModelConfig, Weights};
use serde::Deserialize;

use crate::{alternating, moa_tiny, test_data};

pub(crate) fn trials() -> Vec<Trial> {
    trials![
        moa_tiny_agrees_with_an_independent_implementation,
        all_logits_of_moa_tiny_agree,
        all_logits_of_moa_small_agree,
    ]
}

#[derive(Deserialize)]
struct Golden {
    ids: Vec<u32>,
    mean_cross_entropy: f64,
    /// The tokens whose logits are given; all of them where it is absent.
    logit_ids: Option<Vec<usize>>,
    dense_last_logits: Vec<f32>,
    sparse_last_logits: Vec<f32>,
}

impl Golden {
    fn load(path: &Path) -> Self {
        serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap()
    }

    #[track_caller]
    fn check(&self, expected: &[f32], logits: &[f32]) {
        let all: Vec<usize> = (0..logits.len()).collect();
        let ids = self.logit_ids.as_ref().unwrap_or(&all);
        assert_eq!(ids.len(), expected.len());
        for (id, expected) in ids.iter().zip(expected) {
            assert!(
                (logits[*id] - expected).abs() < 1e-3,
                "token {id}: {expected}, got {}",
                logits[*id]
            );
        }
    }
}

fn sparse(shape: ModelShape) -> Plan {
    alternating(shape, 16, 96, 160)
}

fn agrees(model: &Path, golden: &Path) -> Verdict {
    let golden = Golden::load(golden);
    let model = Decoder::load(
        Cpu::new(Dtype::F32),
        ModelConfig::from_file(model)?,
        &Weights::open(model)?,
    )?;
    let (n, vocab) = (golden.ids.len(), model.config().vocab_size);
    for (plan, expected) in [
        (Plan::full(model.shape())?, &golden.dense_last_logits),
        (sparse(model.shape()), &golden.sparse_last_logits),
    ] {
        for chunk in [n, 50] {
            let mut sequence = model.open(&plan, n, 0)?;
            golden.check(expected, &model.prefill(&mut sequence, &golden.ids, chunk)?);
        }
    }

    let rows: Vec<usize> = (0..n - 1).collect();
    let mut sequence = model.open(&Plan::full(model.shape())?, n, 0)?;
    let logits =
        model.forward(&mut [&mut sequence], &[&golden.ids[..n - 1]], LogitRows::Rows(&rows))?;
    let losses = logits.data().chunks(vocab).zip(&golden.ids[1..]).map(|(row, y)| {
        let sum: f64 = row.iter().map(|z| f64::from(*z).exp()).sum();
        sum.ln() - f64::from(row[*y as usize])
    });
    let mean = losses.sum::<f64>() / (n - 1) as f64;
    assert!(
        (mean - golden.mean_cross_entropy).abs() < 1e-4,
        "{mean}, not {}",
        golden.mean_cross_entropy
    );
    Ok(())
}

fn moa_tiny_agrees_with_an_independent_implementation() -> Verdict {
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/real_models/golden_tiny.json");
    agrees(&moa_tiny(), &golden)
}

fn all_logits_of_moa_tiny_agree() -> Verdict {
    let models = test_data("models")?;
    agrees(&moa_tiny(), &models.join("moa-tiny.golden.json"))
}

fn all_logits_of_moa_small_agree() -> Verdict {
    let models = test_data("models")?;
    agrees(&models.join("moa-small"), &models.join("moa-small.golden.json"))
}
