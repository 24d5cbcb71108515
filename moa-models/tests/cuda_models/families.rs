//! Every family with made-up weights, in heads that the kernels take, against the CPU.

use moa_conformance::{Trial, Verdict, trials};
use moa_core::{Influence, Plan};
use moa_models::{Backward, Cpu, Decoder, Item, Math, ModelConfig, Objective, RandomTensors};

use crate::profile::compare;
use crate::{Dtype, close, open, plans, step};

pub(crate) fn trials() -> Vec<Trial> {
    trials![families_agree_with_the_cpu, influence_of_families_is_the_cpus]
}

/// What each family's configuration has of its own.
const FAMILIES: [&str; 7] = [
    r#""model_type": "mistral", "head_dim": 96, "sliding_window": 40"#,
    r#""model_type": "ministral3", "head_dim": 64, "rope_parameters": {"rope_type": "yarn", "factor": 8,
        "original_max_position_embeddings": 64, "mscale": 1, "mscale_all_dim": 1, "llama_4_scaling_beta": 0.3}"#,
    r#""model_type": "qwen2", "use_sliding_window": true, "max_window_layers": 1, "sliding_window": 70"#,
    r#""model_type": "qwen3", "head_dim": 128"#,
    r#""model_type": "smollm3", "no_rope_layer_interval": 2"#,
    r#""model_type": "granite", "embedding_multiplier": 3.0, "attention_multiplier": 0.03,
        "residual_multiplier": 0.4, "logits_scaling": 0.25, "tie_word_embeddings": true"#,
    r#""model_type": "phi3", "sliding_window": 100, "original_max_position_embeddings": 64,
        "rope_scaling": {"type": "longrope", "partial_rotary_factor": 0.125,
            "short_factor": [1, 1, 1, 1], "long_factor": [1, 1.5, 2, 4]}"#,
];

fn config(family: &str) -> ModelConfig {
    let common = r#""vocab_size": 320, "hidden_size": 256, "intermediate_size": 384, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5"#;
    ModelConfig::from_json(&format!("{{{common}, {family}}}")).unwrap()
}

fn model<D: Math>(device: D, config: &ModelConfig) -> Decoder<D> {
    let weights = RandomTensors::new(config, 5).unwrap();
    Decoder::load(device, config.clone(), &weights).unwrap()
}

fn tokens(len: usize) -> Vec<u32> {
    (0..len as u32).map(|i| (i * i + 7 * i) % 317).collect()
}

/// Logits of a prompt in two chunks, and of steps of a batch of two, most of which a device records.
fn logits<D: Math>(model: &Decoder<D>, plan: &Plan) -> [Vec<f32>; 2] {
    let tokens = tokens(212);
    let mut sequence = model.open(plan, 220, 0).unwrap();
    let mut prompt = step(model, &mut sequence, &tokens[..150]).concat();
    prompt.extend(step(model, &mut sequence, &tokens[150..200]).concat());
    let copy = model.fork(&sequence).unwrap();
    let mut session = model.session(vec![sequence, copy]).unwrap();
    let steps = tokens[200..].iter();
    let steps = steps.flat_map(|&token| session.step(model, &[token, 319 - token]).unwrap());
    let steps = steps.collect();
    [prompt, steps]
}

fn families_agree_with_the_cpu() -> Verdict {
    for family in FAMILIES {
        let config = config(family);
        let cpu = model(Cpu::default(), &config);
        for plan in &plans(config.shape()) {
            let expected = logits(&cpu, plan);
            for (dtype, share) in [(Dtype::F16, 0.02), (Dtype::Bf16, 0.1)] {
                let got = logits(&model(open(dtype)?, &config), plan);
                for ((got, expected), what) in got.iter().zip(&expected).zip(["prompt", "steps"]) {
                    let name = family.split(',').next().unwrap_or_default();
                    close(&format!("{name} in {dtype:?}, {what}"), got, expected, share);
                }
            }
        }
    }
    Ok(())
}

fn profile<D: Backward>(model: &Decoder<D>) -> (f64, Influence) {
    let tokens = tokens(200);
    let item = Item::new(&tokens[..170], &tokens[170..]).unwrap();
    let mut influence = Influence::new(model.shape(), 200, 64).unwrap();
    let loss = model.profile(&item, Objective::CrossEntropy, &mut influence).unwrap();
    (loss, influence)
}

fn influence_of_families_is_the_cpus() -> Verdict {
    for family in FAMILIES {
        let config = config(family);
        let (loss, expected) = profile(&model(Cpu::default(), &config));
        let (got_loss, got) = profile(&model(open(Dtype::F16)?, &config));
        assert!(
            (got_loss - loss).abs() < 0.02 * (1.0 + loss.abs()),
            "{family}: {got_loss}, {loss}"
        );
        for layer in 0..3 {
            let all = |influence: &Influence| -> Vec<f64> {
                (0..2).flat_map(|head| influence.head(layer, head).to_vec()).collect()
            };
            let (cosine, ratio) = compare(&all(&got), &all(&expected));
            println!("{family}, layer {layer}: cosine {cosine:.5}, size {ratio:.4}");
            assert!(cosine > 0.98 && (ratio - 1.0).abs() < 0.1, "{family}, layer {layer}");
        }
    }
    Ok(())
}
