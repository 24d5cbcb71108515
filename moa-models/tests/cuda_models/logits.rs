//! Logits against the CPU's and against those of an independent implementation.

use std::path::{Path, PathBuf};

use moa_conformance::{Stop, Trial, Verdict, trials};
use moa_models::{Decoder, ModelConfig, Weights};
use serde::Deserialize;

use crate::{Dtype, alternating, close, cpu, cuda, moa_tiny, open, plans, prose, read, step};

pub(crate) fn trials() -> Vec<Trial> {
    trials![
        prefill_and_decode_agree_with_the_cpu,
        long_prompts_agree_with_the_cpu,
        moa_tiny_agrees_with_an_independent_implementation,
        moa_small_agrees_with_an_independent_implementation,
    ]
}

fn prefill_and_decode_agree_with_the_cpu() -> Verdict {
    for (checkpoint, share) in cuda()? {
        let (gpu, cpu) = (&checkpoint.model, &cpu().model);
        let tokens = prose(420);
        for (plan, name) in plans(cpu.shape()).iter().zip(["dense", "sparse"]) {
            let mut here = cpu.open(plan, 500, 0).unwrap();
            let mut there = gpu.open(plan, 500, 0).unwrap();
            let expected = step(cpu, &mut here, &tokens[..400]).concat();
            let got = step(gpu, &mut there, &tokens[..400]).concat();
            close(&format!("{name} prefill of 400"), &got, &expected, share);
            let mut decoded = [Vec::new(), Vec::new()];
            for token in &tokens[400..] {
                decoded[0].extend(step(gpu, &mut there, &[*token]).concat());
                decoded[1].extend(step(cpu, &mut here, &[*token]).concat());
            }
            close(&format!("{name} decode of 20"), &decoded[0], &decoded[1], share);
        }
    }
    Ok(())
}

fn long_prompts_agree_with_the_cpu() -> Verdict {
    for (checkpoint, share) in cuda()? {
        let (gpu, cpu) = (&checkpoint.model, &cpu().model);
        let tokens = prose(3000);
        let plan = alternating(cpu.shape(), 64, 300, 900);
        let mut here = cpu.open(&plan, 3000, 0).unwrap();
        let mut there = gpu.open(&plan, 3000, 0).unwrap();
        let expected = read(cpu, &mut here, &tokens, 1000);
        close("prompt of 3000", &read(gpu, &mut there, &tokens, 1000), &expected, share);
    }
    Ok(())
}

#[derive(Deserialize)]
struct Golden {
    ids: Vec<u32>,
    /// The tokens whose logits are given; all of them where it is absent.
    logit_ids: Option<Vec<usize>>,
    dense_last_logits: Vec<f32>,
    sparse_last_logits: Vec<f32>,
}

/// Compares with a golden file, in which odd heads see 96 keys and even ones 160.
fn golden(folder: &Path, golden: &Path) -> Verdict {
    let golden: Golden = serde_json::from_str(&std::fs::read_to_string(golden).unwrap()).unwrap();
    for (dtype, share) in [(Dtype::F16, 0.01), (Dtype::Bf16, 0.06)] {
        let device = open(dtype)?;
        let config = ModelConfig::from_file(folder).unwrap();
        let model = Decoder::load(device, config, &Weights::open(folder).unwrap()).unwrap();
        let all: Vec<usize> = (0..model.config().vocab_size).collect();
        let ids = golden.logit_ids.as_ref().unwrap_or(&all);
        let dense = (plans(model.shape())[0].clone(), &golden.dense_last_logits);
        let sparse = (alternating(model.shape(), 16, 96, 160), &golden.sparse_last_logits);
        for (plan, expected) in [dense, sparse] {
            for chunk in [golden.ids.len(), 50] {
                let mut sequence = model.open(&plan, golden.ids.len(), 0).unwrap();
                let logits = read(&model, &mut sequence, &golden.ids, chunk);
                let got: Vec<f32> = ids.iter().map(|id| logits[*id]).collect();
                let name = model.device().gpu().name();
                close(&format!("golden {dtype:?} in {chunk} on {name}"), &got, expected, share);
            }
        }
    }
    Ok(())
}

fn models() -> Result<PathBuf, Stop> {
    match std::env::var_os("MOA_TEST_DATA") {
        Some(data) => Ok(Path::new(&data).join("models")),
        None => Err(Stop::ignored("MOA_TEST_DATA does not name the folder with `models`")),
    }
}

fn moa_tiny_agrees_with_an_independent_implementation() -> Verdict {
    let models = models()?;
    golden(&moa_tiny(), &models.join("moa-tiny.golden.json"))
}

fn moa_small_agrees_with_an_independent_implementation() -> Verdict {
    let models = models()?;
    golden(&models.join("moa-small"), &models.join("moa-small.golden.json"))
}
