//! Each family against transformers: small random checkpoints with what `fixtures/families/make.py` computed of
//! them, dense and with a plan of short spans.

mod compress;
mod fields;
mod gguf;

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use moa_core::{ElasticRule, Influence, Plan, Sharding};
use moa_models::{
    Cpu, Decoder, Engine, EngineOptions, Error, GenerateOptions, Item, LogitRows, ModelConfig,
    Objective, RandomTensors, Result, Shard, ThreadRank, Weights, on_ranks,
};
use serde::Deserialize;

const FAMILIES: [&str; 9] = [
    "granite",
    "ministral",
    "ministral3",
    "mistral",
    "phi3-longrope",
    "phi3-window",
    "qwen2",
    "qwen3",
    "smollm3",
];

fn folder(family: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/families").join(family)
}

/// What transformers computed of a checkpoint.
#[derive(Deserialize)]
struct Golden {
    tokens: Vec<u32>,
    /// Logits of all tokens.
    dense: Vec<Vec<f32>>,
    /// Logits of a first few tokens that are all there are.
    prefix: Vec<Vec<f32>>,
    plan: GoldenPlan,
    /// Likeliest tokens after `tokens`.
    greedy: Vec<u32>,
    influence: GoldenInfluence,
}

#[derive(Deserialize)]
struct GoldenPlan {
    sink: usize,
    /// Span of each layer's KV heads.
    totals: Vec<Vec<usize>>,
    logits: Vec<Vec<f32>>,
}

#[derive(Deserialize)]
struct GoldenInfluence {
    prompt: usize,
    loss: f64,
    /// Of each layer's KV heads, below the diagonal row by row.
    layers: Vec<Vec<Vec<f64>>>,
}

/// A family's checkpoint.
struct Case {
    name: &'static str,
    config: ModelConfig,
    weights: Weights,
    golden: Golden,
}

fn cases() -> impl Iterator<Item = Case> {
    FAMILIES.into_iter().map(|name| {
        let folder = folder(name);
        let golden = fs::read_to_string(folder.join("golden.json")).unwrap();
        Case {
            name,
            config: ModelConfig::from_file(&folder).unwrap(),
            weights: Weights::open(&folder).unwrap(),
            golden: serde_json::from_str(&golden).unwrap(),
        }
    })
}

impl Case {
    fn model(&self) -> Decoder<Cpu> {
        Decoder::load(Cpu::default(), self.config.clone(), &self.weights).unwrap()
    }

    fn plan(&self) -> Plan {
        let GoldenPlan { sink, totals, .. } = &self.golden.plan;
        let rules = totals.iter().flatten().map(|&total| ElasticRule::fixed(total).into());
        Plan::new(self.config.shape(), *sink, sink + 1, rules.collect()).unwrap()
    }

    fn full(&self) -> Plan {
        Plan::full(self.config.shape()).unwrap()
    }

    #[track_caller]
    fn close(&self, got: &[f32], expected: &[Vec<f32>]) {
        close(self.name, got, expected);
    }
}

/// Whether logits are those that are expected, row by row.
#[track_caller]
fn close(name: &str, got: &[f32], expected: &[Vec<f32>]) {
    let vocab = expected[0].len();
    assert_eq!(got.len(), expected.len() * vocab, "{name}");
    for (at, (got, expected)) in got.iter().zip(expected.iter().flatten()).enumerate() {
        let error = (got - expected).abs();
        let (row, token) = (at / vocab, at % vocab);
        assert!(error < 2e-4, "{name}: row {row}, token {token}: {got}, not {expected}");
    }
}

/// Logits of all tokens, read in these chunks.
fn logits(model: &Decoder<Cpu>, plan: &Plan, tokens: &[u32], chunks: &[usize]) -> Vec<f32> {
    let mut sequence = model.open(plan, tokens.len(), 0).unwrap();
    let mut rest = tokens;
    let mut all = Vec::new();
    for chunk in chunks {
        let (now, later) = rest.split_at(*chunk);
        let rows: Vec<usize> = (0..*chunk).collect();
        let part = model.forward(&mut [&mut sequence], &[now], LogitRows::Rows(&rows)).unwrap();
        all.extend(part.into_data());
        rest = later;
    }
    assert!(rest.is_empty());
    all
}

#[test]
fn logits_equal_those_of_transformers_whole_and_in_chunks() {
    for case in cases() {
        let (model, golden) = (case.model(), &case.golden);
        let n = golden.tokens.len();
        let (full, plan) = (case.full(), case.plan());
        for chunks in [&[n][..], &[7, 1, 12], &vec![1; n]] {
            case.close(&logits(&model, &full, &golden.tokens, chunks), &golden.dense);
            case.close(&logits(&model, &plan, &golden.tokens, chunks), &golden.plan.logits);
        }
        // Shorter than every window, and than the context that LongRoPE stretches.
        let few = golden.prefix.len();
        case.close(&logits(&model, &full, &golden.tokens[..few], &[few]), &golden.prefix);
    }
}

#[test]
fn two_ranks_give_what_one_gives() -> Result<()> {
    for case in cases() {
        let (plan, golden) = (case.plan(), &case.golden);
        let sharding = Sharding::balanced(&plan, golden.tokens.len(), 2)?;
        let parts = on_ranks(ThreadRank::group(2)?, |rank: Arc<ThreadRank>| {
            let shard = Shard::new(&sharding, rank)?;
            let part =
                Decoder::load_shard(Cpu::default(), case.config.clone(), &case.weights, shard)?;
            Ok::<_, Error>(logits(&part, &plan, &golden.tokens, &[13, 7]))
        })?;
        parts.iter().for_each(|part| case.close(part, &golden.plan.logits));
    }
    Ok(())
}

// transformers' autograd gives the gradient by attention's output, in the lower layers through everything above.
#[test]
fn influence_equals_that_of_autograd() -> Result<()> {
    for case in cases() {
        let (model, golden) = (case.model(), &case.golden.influence);
        let (prompt, response) = case.golden.tokens.split_at(golden.prompt);
        let n = case.golden.tokens.len() - 1;
        let mut influence = Influence::new(model.shape(), n, 1)?;
        let item = Item::new(prompt, response)?;
        let loss = model.profile(&item, Objective::CrossEntropy, &mut influence)?;
        assert!((loss - golden.loss).abs() < 1e-4, "{}: {loss}", case.name);
        for (layer, heads) in golden.layers.iter().enumerate() {
            for (head, expected) in heads.iter().enumerate() {
                let largest = expected.iter().fold(0.0f64, |most, e| most.max(e.abs()));
                assert!(largest > 1e-3, "{}: layer {layer}, head {head}", case.name);
                let got = influence.head(layer, head);
                let below = (0..n).flat_map(|i| (0..i).map(move |j| i * n + j));
                for (place, expected) in below.zip(expected) {
                    let error = (got[place] - expected).abs();
                    let at = format!("{}: layer {layer}, head {head}, {place}", case.name);
                    assert!(error < 2e-3 * largest, "{at}: {}, not {expected}", got[place]);
                }
            }
        }
    }
    Ok(())
}

#[test]
fn response_losses_are_those_of_the_logits() -> Result<()> {
    for case in cases() {
        let (model, golden) = (case.model(), &case.golden);
        let cross_entropy = |prompt: usize, logits: &[Vec<f32>]| {
            let rows = logits[prompt - 1..].iter().zip(&golden.tokens[prompt..]);
            let loss = |(row, y): (&Vec<f32>, &u32)| {
                let sum: f64 = row.iter().map(|&z| f64::from(z).exp()).sum();
                sum.ln() - f64::from(row[*y as usize])
            };
            rows.map(loss).sum::<f64>() / (golden.tokens.len() - prompt) as f64
        };
        // Both share most of their tokens, which are computed once.
        let n = golden.tokens.len();
        let item = |prompt: usize| Item::new(&golden.tokens[..prompt], &golden.tokens[prompt..]);
        let items = [item(16)?, item(17)?];
        for (plan, logits) in [(case.full(), &golden.dense), (case.plan(), &golden.plan.logits)] {
            let expected = (cross_entropy(16, logits) + cross_entropy(17, logits)) / 2.0;
            let loss = model.response_loss(&items, &plan, n)?;
            assert!((loss - expected).abs() < 1e-4, "{}: {loss}, not {expected}", case.name);
        }
    }
    Ok(())
}

#[test]
fn greedy_text_is_that_of_transformers_alone_and_in_a_batch() -> Result<()> {
    for case in cases() {
        let (tokens, greedy) = (&case.golden.tokens, &case.golden.greedy);
        let mut engine = Engine::new(case.model().into(), EngineOptions::default());
        let options = GenerateOptions {
            max_new_tokens: greedy.len(),
            eos_token_ids: Some(Vec::new()),
            ..GenerateOptions::default()
        };
        engine.submit(tokens.clone(), &case.full(), options.clone());
        engine.submit(vec![5, 6, 7], &case.plan(), options.clone());
        engine.submit(tokens.clone(), &case.full(), options);
        let completions = engine.complete_all()?;
        assert_eq!(&completions[0].tokens, greedy, "{}", case.name);
        assert_eq!(&completions[2].tokens, greedy, "{}", case.name);
    }
    Ok(())
}

// A dense cache of a layer with a sliding window is as long as the window.
#[test]
fn caches_are_as_long_as_windows_and_no_longer() -> Result<()> {
    for case in cases() {
        let model = case.model();
        let windows = (0..3).map(|layer| model.config().layer_kind(layer).sliding_window);
        let slots: usize = windows.map(|window| 2 * window.unwrap_or(64).min(64)).sum();
        let sequence = model.open(&case.full(), 64, 0)?;
        let bytes = slots as u64 * 2 * case.config.head_dim as u64 * 4;
        assert_eq!(model.kv_bytes(&sequence), bytes, "{}", case.name);
        assert_eq!(model.dense_bytes(64)?, bytes, "{}", case.name);
        let plan = case.plan();
        let sequence = model.open(&plan, 64, 0)?;
        let slot_bytes = 2 * case.config.head_dim as u64 * 4;
        let expected = case.config.windowed(&plan)?.kv_bytes(64, slot_bytes);
        assert_eq!(model.kv_bytes(&sequence), expected, "{}", case.name);
    }
    Ok(())
}

#[test]
fn made_up_weights_do_for_every_family() -> Result<()> {
    for case in cases() {
        let weights = RandomTensors::new(&case.config, 1)?;
        let model = Decoder::load(Cpu::default(), case.config.clone(), &weights)?;
        let all = logits(&model, &case.full(), &case.golden.tokens, &[20]);
        assert!(all.iter().all(|x| x.is_finite()), "{}", case.name);
    }
    Ok(())
}
