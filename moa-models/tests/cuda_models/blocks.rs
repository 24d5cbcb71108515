//! Models whose weights stay in quantised blocks, against the CPU on the same file.

use std::path::PathBuf;
use std::sync::{Arc, LazyLock};

use moa_conformance::{Stop, Trial, Verdict, trials};
use moa_core::{Influence, Sharding};
use moa_models::{
    BlockType, Checkpoint, Cpu, Cuda, Decoder, Dtype, Error, Gguf, Item, Load, ModelConfig,
    Objective, Shard, ThreadRank, on_ranks,
};
use tempfile::TempDir;

use crate::laws::{decoder_equals_steps, join_and_leave};
use crate::profile::compare;
use crate::text::greedy_text_agrees;
use crate::{Models, close, file, loaded, moa_tiny, open, plans, prose, read, step};

pub(crate) fn trials() -> Vec<Trial> {
    trials![
        logits_are_the_cpus_on_the_same_blocks,
        greedy_text_is_the_cpus_on_the_same_blocks_or_parts_at_a_near_tie,
        a_decoder_with_blocks_equals_single_steps,
        bytes_are_those_of_the_blocks,
        two_ranks_of_blocks_agree_with_one,
        blocks_are_profiled_as_on_the_cpu,
        perplexity_of_a_real_file_is_that_of_widened_weights,
    ]
}

/// moa-tiny in blocks of 4 bits, its values' projections in those of 8, as files mix them.
fn path() -> PathBuf {
    static FILE: LazyLock<(TempDir, PathBuf)> = LazyLock::new(|| {
        let [mut four, eight] =
            [file::Q4_0, file::Q8_0].map(|kind| file::moa_tiny(&moa_tiny(), kind));
        for (tensor, other) in four.tensors.iter_mut().zip(eight.tensors) {
            if tensor.name.contains("attn_v") || tensor.name.contains("token_embd") {
                *tensor = other;
            }
        }
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("model.gguf");
        std::fs::write(&path, four.bytes()).expect("a file");
        (folder, path)
    });
    FILE.1.clone()
}

fn cpu() -> &'static Checkpoint<Cpu> {
    static TINY: LazyLock<Checkpoint<Cpu>> =
        LazyLock::new(|| Checkpoint::open(Cpu::default(), path()).expect("moa-tiny in blocks"));
    &TINY
}

fn cuda() -> Result<Vec<(&'static Checkpoint<Cuda>, f64)>, Stop> {
    static TINY: LazyLock<Models> = LazyLock::new(|| {
        let load = |(dtype, share)| Ok((Checkpoint::open(open(dtype)?, path())?, share));
        [(Dtype::F16, 0.01), (Dtype::Bf16, 0.06)].into_iter().map(load).collect()
    });
    loaded(&TINY)
}

fn logits_are_the_cpus_on_the_same_blocks() -> Verdict {
    for (checkpoint, share) in cuda()? {
        let (gpu, cpu) = (&checkpoint.model, &cpu().model);
        let tokens = prose(420);
        for plan in &plans(cpu.shape()) {
            // Weights widened in memory, and in registers.
            for chunk in [400, 30, 3] {
                let mut here = cpu.open(plan, 500, 0).unwrap();
                let mut there = gpu.open(plan, 500, 0).unwrap();
                let expected = read(cpu, &mut here, &tokens[..400], 400);
                let got = read(gpu, &mut there, &tokens[..400], chunk);
                close(&format!("prompt of 400 in {chunk}"), &got, &expected, share);
                if chunk != 400 {
                    continue;
                }
                let mut decoded = [Vec::new(), Vec::new()];
                for token in &tokens[400..] {
                    decoded[0].extend(step(gpu, &mut there, &[*token]).concat());
                    decoded[1].extend(step(cpu, &mut here, &[*token]).concat());
                }
                close("decode of 20", &decoded[0], &decoded[1], share);
            }
        }
    }
    Ok(())
}

fn greedy_text_is_the_cpus_on_the_same_blocks_or_parts_at_a_near_tie() -> Verdict {
    for (checkpoint, share) in cuda()? {
        greedy_text_agrees(&checkpoint.model, &cpu().model, share);
    }
    Ok(())
}

fn a_decoder_with_blocks_equals_single_steps() -> Verdict {
    for (checkpoint, _) in cuda()? {
        decoder_equals_steps(&checkpoint.model);
        join_and_leave(&checkpoint.model);
    }
    Ok(())
}

fn bytes_are_those_of_the_blocks() -> Verdict {
    for (checkpoint, _) in cuda()? {
        let model = &checkpoint.model;
        let bytes = |kind, shape| model.device().block_bytes(kind, shape).unwrap();
        // 6 layers of 4 + 2 + 2 heads of 64 and an MLP of 704, on 256; the embedding is the output matrix too.
        let four = [[256, 256], [128, 256], [256, 256], [704, 256], [704, 256], [256, 704]];
        let four: u64 = four.map(|shape| bytes(BlockType::Q4_0, shape)).iter().sum();
        let eight = bytes(BlockType::Q8_0, [128, 256]);
        let table = bytes(BlockType::Q8_0, [8192, 256]);
        assert_eq!(model.weight_bytes(), 6 * (four + eight) + table + 2 * 13 * 256);
        assert_eq!(table, 8192 * 256 / 32 * 34);
    }
    Ok(())
}

fn two_ranks_of_blocks_agree_with_one() -> Verdict {
    open(Dtype::F16)?;
    let config = ModelConfig::from_file(path()).unwrap();
    let weights = Gguf::open(path()).unwrap();
    let tokens = prose(200);
    let [_, plan] = plans(cpu().model.shape());
    let sharding = Sharding::balanced(&plan, 500, 2).unwrap();
    let run = |gpu: &Decoder<Cuda>| {
        let mut sequence = gpu.open(&plan, 250, 0).unwrap();
        [&tokens[..190], &tokens[190..191], &tokens[191..]]
            .map(|part| step(gpu, &mut sequence, part).concat())
            .concat()
    };
    let device = open(Dtype::F16)?;
    let whole = Decoder::load(device, config.clone(), &weights).unwrap();
    let expected = run(&whole);
    let parts = on_ranks(ThreadRank::group(2).unwrap(), |rank: Arc<ThreadRank>| {
        let device = Cuda::new(0, Dtype::F16)?;
        let shard = Shard::new(&sharding, rank)?;
        Ok::<_, Error>(run(&Decoder::load_shard(device, config.clone(), &weights, shard)?))
    });
    close("blocks on two ranks", &parts.unwrap()[0], &expected, 0.02);
    Ok(())
}

fn blocks_are_profiled_as_on_the_cpu() -> Verdict {
    let tokens = prose(330);
    let item = Item::new(&tokens[..300], &tokens[300..]).unwrap();
    let shape = cpu().model.shape();
    let new = || Influence::new(shape, item.tokens().len(), 64).unwrap();
    let all = |influence: &Influence, layer| -> Vec<f64> {
        (0..shape.kv_heads).flat_map(|head| influence.head(layer, head).to_vec()).collect()
    };
    let objective = Objective::CrossEntropyAbsolute;
    for (checkpoint, share) in cuda()? {
        let (mut expected, mut got) = (new(), new());
        let loss = cpu().model.profile(&item, objective, &mut expected).unwrap();
        let own = checkpoint.model.profile(&item, objective, &mut got).unwrap();
        assert!((own - loss).abs() <= share * (1.0 + loss.abs()), "{own}, not {loss}");
        for layer in 0..shape.layers {
            let (cosine, ratio) = compare(&all(&got, layer), &all(&expected, layer));
            println!("layer {layer}: cosine {cosine:.5}, size {ratio:.4}");
            assert!(cosine > 0.98 && (ratio - 1.0).abs() < 0.2, "{layer}: {cosine} {ratio}");
        }
    }
    Ok(())
}

/// Of the GGUF file that `MOA_TEST_GGUF` names: 16 tokens at a time multiply blocks, 512 at a time widen them first.
fn perplexity_of_a_real_file_is_that_of_widened_weights() -> Verdict {
    const TEXT: &str = include_str!("../../src/erewhon.txt");
    let Some(path) = std::env::var_os("MOA_TEST_GGUF") else {
        return Err(Stop::ignored("MOA_TEST_GGUF does not name a GGUF file"));
    };
    let checkpoint = Checkpoint::open(open(Dtype::Bf16)?, path)?;
    let (model, tokens) = (&checkpoint.model, checkpoint.tokenizer.encode(TEXT, true)?);
    let [dense, _] = plans(model.shape());
    let losses = [512, 16, 1].map(|chunk| {
        let (mut sum, mut count) = (0.0, 0);
        for window in tokens.chunks_exact(512).take(if chunk == 1 { 2 } else { 8 }) {
            let mut sequence = model.open(&dense, 512, 0).unwrap();
            let logits: Vec<Vec<f32>> =
                window.chunks(chunk).flat_map(|part| step(model, &mut sequence, part)).collect();
            for (logits, next) in logits.iter().zip(&window[1..]) {
                let most = logits.iter().copied().fold(f32::MIN, f32::max);
                let all: f64 = logits.iter().map(|z| f64::from(z - most).exp()).sum();
                sum += all.ln() - f64::from(logits[*next as usize] - most);
                count += 1;
            }
            if chunk != 1 && count == 2 * 511 {
                println!("chunks of {chunk}, 2 windows: perplexity {:.5}", (sum / 1022.0).exp());
            }
        }
        println!("chunks of {chunk}: perplexity {:.5}", (sum / f64::from(count)).exp());
        sum / f64::from(count)
    });
    let off = ((losses[1] - losses[0]).exp() - 1.0).abs();
    assert!(off < 1e-3, "{off} of the perplexity");
    Ok(())
}
