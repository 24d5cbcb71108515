//! A family of one's own, in one file: tensors under other names, biases on queries, keys and values,
//! norms of each head's queries and keys, and heads wider than the residual stream divides into.
//!
//! What the decoder makes of it is compared with the same network in plain loops over f64.

use std::fs;
use std::sync::Arc;

use moa_core::{ElasticRule, Influence, Plan, Sharding};
use moa_models::{
    Cpu, Decoder, Error, Family, Item, JsonObject, Llama, LogitRows, ModelConfig, Objective,
    Result, Shard, TensorNames, ThreadRank, Weights, on_ranks,
};
use safetensors::Dtype;
use safetensors::tensor::TensorView;

struct Own;

impl Family for Own {
    fn model_types(&self) -> &[&str] {
        &["own"]
    }

    fn config(&self, file: &JsonObject) -> Result<ModelConfig> {
        let tensor_names = TensorNames {
            embedding: "embed.weight".into(),
            layers: "blocks.{}.".into(),
            query: "attention.query".into(),
            query_norm: "attention.query_norm.weight".into(),
            ..TensorNames::default()
        };
        Ok(ModelConfig { qkv_bias: true, qk_norm: true, tensor_names, ..Llama.config(file)? })
    }
}

const CONFIG: &str = r#"{"model_type": "own", "vocab_size": 40, "hidden_size": 16,
    "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "rms_norm_eps": 1e-5}"#;

const HIDDEN: usize = 16;
const DIM: usize = 8;
const TOKENS: [u32; 11] = [3, 17, 39, 0, 22, 8, 8, 31, 5, 12, 27];

/// The weights of a linear layer, `[out, in]`, and its bias or none.
struct Linear(Vec<f64>, Vec<f64>);

impl Linear {
    fn of(&self, x: &[f64]) -> Vec<f64> {
        let rows = self.0.chunks(x.len()).enumerate();
        let dot = |row: &[f64]| row.iter().zip(x).map(|(w, x)| w * x).sum::<f64>();
        rows.map(|(i, row)| dot(row) + self.1.get(i).unwrap_or(&0.0)).collect()
    }
}

struct Layer {
    attention_norm: Vec<f64>,
    q: Linear,
    k: Linear,
    v: Linear,
    head_norms: [Vec<f64>; 2],
    o: Linear,
    mlp_norm: Vec<f64>,
    gate: Linear,
    up: Linear,
    down: Linear,
}

/// The network in f64, with a folder that holds its weights.
struct Naive {
    embedding: Vec<f64>,
    layers: Vec<Layer>,
    norm: Vec<f64>,
    output: Linear,
    weights: Weights,
}

/// Makes up tensors and keeps them for the file.
struct Maker {
    state: u64,
    tensors: Vec<(String, Vec<usize>, Vec<u8>)>,
}

impl Maker {
    /// Values of `middle` and up to `spread` more or less, as f32 holds them.
    fn make(&mut self, name: String, shape: &[usize], middle: f32, spread: f32) -> Vec<f64> {
        let mut next = || {
            self.state = self.state.wrapping_mul(6364136223846793005).wrapping_add(1);
            middle + ((self.state >> 40) as f32 / (1u64 << 23) as f32 - 1.0) * spread
        };
        let values: Vec<f32> = (0..shape.iter().product()).map(|_| next()).collect();
        let bytes = values.iter().flat_map(|x| x.to_le_bytes()).collect();
        self.tensors.push((name, shape.to_vec(), bytes));
        values.into_iter().map(f64::from).collect()
    }

    fn linear(&mut self, name: &str, out: usize, input: usize, has_bias: bool) -> Linear {
        let weight = self.make(format!("{name}.weight"), &[out, input], 0.0, 0.6);
        let bias = match has_bias {
            true => self.make(format!("{name}.bias"), &[out], 0.0, 0.5),
            false => Vec::new(),
        };
        Linear(weight, bias)
    }
}

fn naive() -> Naive {
    let maker = &mut Maker { state: 7, tensors: Vec::new() };
    let embedding = maker.make("embed.weight".into(), &[40, HIDDEN], 0.0, 1.0);
    let output = Linear(maker.make("lm_head.weight".into(), &[40, HIDDEN], 0.0, 0.6), Vec::new());
    let norm = maker.make("model.norm.weight".into(), &[HIDDEN], 1.0, 0.3);
    let layers = (0..3).map(|layer| {
        let name = |part: &str| format!("blocks.{layer}.{part}");
        Layer {
            attention_norm: maker.make(name("input_layernorm.weight"), &[HIDDEN], 1.0, 0.3),
            q: maker.linear(&name("attention.query"), 4 * DIM, HIDDEN, true),
            k: maker.linear(&name("self_attn.k_proj"), 2 * DIM, HIDDEN, true),
            v: maker.linear(&name("self_attn.v_proj"), 2 * DIM, HIDDEN, true),
            head_norms: ["attention.query_norm.weight", "self_attn.k_norm.weight"]
                .map(|part| maker.make(name(part), &[DIM], 1.0, 0.5)),
            o: maker.linear(&name("self_attn.o_proj"), HIDDEN, 4 * DIM, false),
            mlp_norm: maker.make(name("post_attention_layernorm.weight"), &[HIDDEN], 1.0, 0.3),
            gate: maker.linear(&name("mlp.gate_proj"), 24, HIDDEN, false),
            up: maker.linear(&name("mlp.up_proj"), 24, HIDDEN, false),
            down: maker.linear(&name("mlp.down_proj"), HIDDEN, 24, false),
        }
    });
    let layers = layers.collect();
    let views = maker.tensors.iter().map(|(name, shape, bytes)| {
        (name, TensorView::new(Dtype::F32, shape.clone(), bytes).unwrap())
    });
    let folder = tempfile::tempdir().unwrap();
    let file = safetensors::serialize(views, None).unwrap();
    fs::write(folder.path().join("model.safetensors"), file).unwrap();
    let weights = Weights::open(folder.path()).unwrap();
    Naive { embedding, layers, norm, output, weights }
}

fn rms_norm(x: &[f64], weight: &[f64]) -> Vec<f64> {
    let mean = x.iter().map(|x| x * x).sum::<f64>() / x.len() as f64;
    let scale = (mean + 1e-5).sqrt().recip();
    x.iter().zip(weight).map(|(x, w)| x * scale * w).collect()
}

/// A head, normed and turned by its position.
fn head(x: &[f64], head: usize, norm: &[f64], position: usize) -> Vec<f64> {
    let x = rms_norm(&x[head * DIM..(head + 1) * DIM], norm);
    let half = DIM / 2;
    let turned = |i: usize| {
        let angle = position as f64 * 1e4f64.powf(-((i % half) as f64) / half as f64);
        let other = if i < half { -x[i + half] } else { x[i - half] };
        x[i] * angle.cos() + other * angle.sin()
    };
    (0..DIM).map(turned).collect()
}

/// An element of one layer's attention output that is changed: layer, row, query head, element, by how
/// much.
type Change = (usize, usize, usize, usize, f64);

impl Naive {
    /// Logits of all rows, and each layer's attention: `[heads][row][key]` weights and `[row]` values.
    /// Heads see the first key and the last `window - 1`.
    #[allow(clippy::type_complexity)]
    fn forward(
        &self,
        tokens: &[u32],
        window: usize,
        change: Option<Change>,
    ) -> (Vec<Vec<f64>>, Vec<(Vec<Vec<Vec<f64>>>, Vec<Vec<f64>>)>) {
        let row = |id: &u32| self.embedding[*id as usize * HIDDEN..][..HIDDEN].to_vec();
        let mut x: Vec<Vec<f64>> = tokens.iter().map(row).collect();
        let mut attention = Vec::new();
        for (number, layer) in self.layers.iter().enumerate() {
            let h: Vec<_> = x.iter().map(|x| rms_norm(x, &layer.attention_norm)).collect();
            let [q, k, v] = [&layer.q, &layer.k, &layer.v]
                .map(|linear| h.iter().map(|h| linear.of(h)).collect::<Vec<_>>());
            let mut all = vec![Vec::new(); 4];
            for i in 0..tokens.len() {
                let mut out = Vec::new();
                for (query, weights) in all.iter_mut().enumerate() {
                    let kv = query / 2;
                    let turned = head(&q[i], query, &layer.head_norms[0], i);
                    let score = |j: usize| match j == 0 || i - j < window - 1 {
                        false => f64::NEG_INFINITY,
                        true => {
                            let key = head(&k[j], kv, &layer.head_norms[1], j);
                            let dot = turned.iter().zip(key).map(|(q, k)| q * k).sum::<f64>();
                            dot / (DIM as f64).sqrt()
                        }
                    };
                    let scores: Vec<f64> = (0..=i).map(score).collect();
                    let sum: f64 = scores.iter().map(|s| s.exp()).sum();
                    let a: Vec<f64> = scores.iter().map(|s| s.exp() / sum).collect();
                    let sum =
                        |d: usize| a.iter().zip(&v).map(|(a, v)| a * v[kv * DIM + d]).sum::<f64>();
                    out.extend((0..DIM).map(sum));
                    weights.push(a);
                }
                if let Some((layer, row, query, element, by)) = change
                    && (layer, row) == (number, i)
                {
                    out[query * DIM + element] += by;
                }
                let add =
                    |x: &mut [f64], y: Vec<f64>| x.iter_mut().zip(y).for_each(|(x, y)| *x += y);
                add(&mut x[i], layer.o.of(&out));
                let h = rms_norm(&x[i], &layer.mlp_norm);
                let gated = layer.gate.of(&h).into_iter().zip(layer.up.of(&h));
                let act: Vec<f64> = gated.map(|(g, u)| g / (1.0 + (-g).exp()) * u).collect();
                add(&mut x[i], layer.down.of(&act));
            }
            attention.push((all, v));
        }
        let logits = x.iter().map(|x| self.output.of(&rms_norm(x, &self.norm))).collect();
        (logits, attention)
    }

    /// Mean cross entropy of the tokens after the first `prompt`.
    fn loss(&self, prompt: usize, change: Option<Change>) -> f64 {
        let (logits, _) = self.forward(&TOKENS[..TOKENS.len() - 1], usize::MAX, change);
        let rows = logits[prompt - 1..].iter().zip(&TOKENS[prompt..]);
        let loss = |(row, y): (&Vec<f64>, &u32)| {
            row.iter().map(|z| z.exp()).sum::<f64>().ln() - row[*y as usize]
        };
        rows.map(loss).sum::<f64>() / (TOKENS.len() - prompt) as f64
    }
}

fn config() -> ModelConfig {
    ModelConfig::from_json_with(CONFIG, &[&Llama, &Own]).unwrap()
}

fn model(naive: &Naive) -> Decoder<Cpu> {
    Decoder::load(Cpu::default(), config(), &naive.weights).unwrap()
}

/// Every head sees the first key and the last `window - 1`.
fn windows(model: &Decoder<Cpu>, window: usize) -> Plan {
    let rule = ElasticRule::fixed(window).into();
    Plan::new(model.shape(), 1, 2, vec![rule; 6]).unwrap()
}

/// Logits of all tokens, read in these chunks.
fn logits(model: &Decoder<Cpu>, plan: &Plan, chunks: &[usize]) -> Vec<f32> {
    let mut sequence = model.open(plan, TOKENS.len(), 0).unwrap();
    let mut rest = &TOKENS[..];
    let mut all = Vec::new();
    for chunk in chunks {
        let (now, later) = rest.split_at(*chunk);
        let rows: Vec<usize> = (0..*chunk).collect();
        let part = model.forward(&mut [&mut sequence], &[now], LogitRows::Rows(&rows)).unwrap();
        all.extend(part.into_data());
        rest = later;
    }
    all
}

fn close(got: &[f32], expected: &[f64], tolerance: f64) {
    assert_eq!(got.len(), expected.len());
    for (i, (got, expected)) in got.iter().zip(expected).enumerate() {
        assert!((f64::from(*got) - expected).abs() < tolerance, "{i}: {got}, not {expected}");
    }
}

#[test]
fn forward_equals_plain_loops_whole_and_in_chunks() {
    let naive = naive();
    let model = model(&naive);
    for (plan, window) in
        [(Plan::full(model.shape()).unwrap(), usize::MAX), (windows(&model, 4), 4)]
    {
        let expected = naive.forward(&TOKENS, window, None).0.concat();
        close(&logits(&model, &plan, &[11]), &expected, 2e-5);
        for chunks in [&[4, 5, 2][..], &[1; 11]] {
            close(&logits(&model, &plan, chunks), &expected, 2e-5);
        }
    }
}

#[test]
fn two_ranks_equal_the_whole_model() -> Result<()> {
    let naive = naive();
    let plan = windows(&model(&naive), 5);
    let whole = naive.forward(&TOKENS, 5, None).0.concat();
    let sharding = Sharding::balanced(&plan, 11, 2)?;
    let parts = on_ranks(ThreadRank::group(2)?, |rank: Arc<ThreadRank>| {
        let shard = Shard::new(&sharding, rank)?;
        let part = Decoder::load_shard(Cpu::default(), config(), &naive.weights, shard)?;
        Ok::<_, Error>(logits(&part, &plan, &[6, 5]))
    })?;
    parts.iter().for_each(|part| close(part, &whole, 2e-5));
    Ok(())
}

// `E_ij = A_ij / (1 - A_ij) * (D_i - dO_i . V_j)`, with `dO` by finite differences: in the lower layers
// it has come down through biases and norms of heads.
#[test]
fn influence_equals_finite_differences() -> Result<()> {
    const PROMPT: usize = 7;
    const STEP: f64 = 1e-5;
    let naive = naive();
    let model = model(&naive);
    let item = Item::new(&TOKENS[..PROMPT], &TOKENS[PROMPT..])?;
    let mut influence = Influence::new(model.shape(), 10, 1)?;
    let loss = model.profile(&item, Objective::CrossEntropy, &mut influence)?;
    assert!((loss - naive.loss(PROMPT, None)).abs() < 1e-5);
    let (_, attention) = naive.forward(&TOKENS[..10], usize::MAX, None);
    let mut compared = 0;
    for (layer, (weights, values)) in attention.iter().enumerate() {
        let mut expected = vec![vec![0.0; 100]; 2];
        for (query, weights) in weights.iter().enumerate() {
            for i in 1..10 {
                let gradient = |element: usize| {
                    let at = |by: f64| naive.loss(PROMPT, Some((layer, i, query, element, by)));
                    (at(STEP) - at(-STEP)) / (2.0 * STEP)
                };
                let d_out: Vec<f64> = (0..DIM).map(gradient).collect();
                let kv = query / 2;
                let along = |j: usize| {
                    let value = &values[j][kv * DIM..(kv + 1) * DIM];
                    d_out.iter().zip(value).map(|(d, v)| d * v).sum::<f64>()
                };
                let a = &weights[i];
                let mean: f64 = a.iter().enumerate().map(|(j, a)| a * along(j)).sum();
                // A token always sees itself.
                for (j, a) in a.iter().enumerate().take(i) {
                    expected[kv][10 * i + j] += a / (1.0 - a) * (mean - along(j));
                }
            }
        }
        for (kv, expected) in expected.iter().enumerate() {
            let largest = expected.iter().fold(0.0f64, |most, e| most.max(e.abs()));
            for (place, (got, expected)) in
                influence.head(layer, kv).iter().zip(expected).enumerate().skip(10)
            {
                let error = (got - expected).abs();
                assert!(error < 1e-3 * largest, "layer {layer}, {kv}, {place}: {got}, {expected}");
                compared += usize::from(expected.abs() > 0.01 * largest);
            }
        }
    }
    assert!(compared > 100, "{compared} entries are not about 0");
    Ok(())
}

#[test]
fn a_family_that_was_not_named_is_refused_with_those_that_were() {
    for (families, names) in
        [(&[&Llama as &dyn Family][..], "llama"), (&[&Own, &Llama], "own, llama")]
    {
        let text = CONFIG.replace("\"own\"", "\"other\"");
        let error = ModelConfig::from_json_with(&text, families).unwrap_err();
        let is_named = matches!(&error, Error::Config { field, expected, .. }
            if field == "model_type" && expected == names);
        assert!(is_named, "{error}");
    }
}
