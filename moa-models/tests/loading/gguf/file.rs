//! Writes GGUF files, good ones and bad ones.

use std::path::Path;

use moa_models::Weights;
use serde_json::Value as Json;

/// A metadata value.
#[derive(Clone, Debug)]
pub(crate) enum Value {
    U32(u32),
    F32(f32),
    Bool(bool),
    Text(String),
    Texts(Vec<String>),
    I32s(Vec<i32>),
    F32s(Vec<f32>),
    /// A type and bytes that are written as they are.
    Raw(u32, Vec<u8>),
}

impl From<&str> for Value {
    fn from(text: &str) -> Self {
        Self::Text(text.to_owned())
    }
}

/// GGUF's numbers of types.
pub(crate) const F32: u32 = 0;
pub(crate) const BF16: u32 = 30;
pub(crate) const Q4_0: u32 = 2;
pub(crate) const Q8_0: u32 = 8;

#[derive(Clone, Debug)]
pub(crate) struct Tensor {
    pub(crate) name: String,
    /// The first axis contiguous.
    pub(crate) axes: Vec<u64>,
    pub(crate) kind: u32,
    pub(crate) bytes: Vec<u8>,
    /// Another place than behind the tensor before.
    pub(crate) offset: Option<u64>,
}

/// What a file has.
#[derive(Clone, Debug)]
pub(crate) struct File {
    pub(crate) version: u32,
    pub(crate) alignment: usize,
    pub(crate) keys: Vec<(String, Value)>,
    pub(crate) tensors: Vec<Tensor>,
}

impl File {
    pub(crate) fn new() -> Self {
        Self { version: 3, alignment: 32, keys: Vec::new(), tensors: Vec::new() }
    }

    pub(crate) fn key(&mut self, name: &str, value: impl Into<Value>) -> &mut Self {
        self.keys.push((name.to_owned(), value.into()));
        self
    }

    pub(crate) fn set(&mut self, name: &str, value: impl Into<Value>) -> &mut Self {
        self.keys.retain(|(key, _)| key != name);
        self.key(name, value)
    }

    pub(crate) fn tensor(&mut self, name: &str, axes: &[u64], kind: u32, bytes: Vec<u8>) {
        let (name, axes) = (name.to_owned(), axes.to_vec());
        self.tensors.push(Tensor { name, axes, kind, bytes, offset: None });
    }

    pub(crate) fn bytes(&self) -> Vec<u8> {
        let mut out = b"GGUF".to_vec();
        out.extend(self.version.to_le_bytes());
        out.extend((self.tensors.len() as u64).to_le_bytes());
        out.extend((self.keys.len() as u64).to_le_bytes());
        for (name, value) in &self.keys {
            text(&mut out, name);
            write(&mut out, value);
        }
        let mut place = 0;
        for tensor in &self.tensors {
            text(&mut out, &tensor.name);
            out.extend((tensor.axes.len() as u32).to_le_bytes());
            tensor.axes.iter().for_each(|axis| out.extend(axis.to_le_bytes()));
            out.extend(tensor.kind.to_le_bytes());
            out.extend(tensor.offset.unwrap_or(place).to_le_bytes());
            place += tensor.bytes.len().next_multiple_of(self.alignment) as u64;
        }
        for tensor in &self.tensors {
            out.resize(out.len().next_multiple_of(self.alignment), 0);
            out.extend(&tensor.bytes);
        }
        out
    }
}

fn text(out: &mut Vec<u8>, text: &str) {
    out.extend((text.len() as u64).to_le_bytes());
    out.extend(text.as_bytes());
}

fn array(out: &mut Vec<u8>, kind: u32, len: usize) {
    out.extend(9u32.to_le_bytes());
    out.extend(kind.to_le_bytes());
    out.extend((len as u64).to_le_bytes());
}

fn write(out: &mut Vec<u8>, value: &Value) {
    match value {
        Value::U32(n) => {
            out.extend(4u32.to_le_bytes());
            out.extend(n.to_le_bytes());
        }
        Value::F32(x) => {
            out.extend(6u32.to_le_bytes());
            out.extend(x.to_le_bytes());
        }
        Value::Bool(flag) => {
            out.extend(7u32.to_le_bytes());
            out.push((*flag).into());
        }
        Value::Text(value) => {
            out.extend(8u32.to_le_bytes());
            text(out, value);
        }
        Value::Texts(values) => {
            array(out, 8, values.len());
            values.iter().for_each(|value| text(out, value));
        }
        Value::I32s(values) => {
            array(out, 5, values.len());
            values.iter().for_each(|value| out.extend(value.to_le_bytes()));
        }
        Value::F32s(values) => {
            array(out, 6, values.len());
            values.iter().for_each(|value| out.extend(value.to_le_bytes()));
        }
        Value::Raw(kind, bytes) => {
            out.extend(kind.to_le_bytes());
            out.extend(bytes);
        }
    }
}

/// GGUF's names of a layer's tensors.
const LAYER: [(&str, &str); 9] = [
    ("attn_norm", "input_layernorm"),
    ("ffn_norm", "post_attention_layernorm"),
    ("attn_q", "self_attn.q_proj"),
    ("attn_k", "self_attn.k_proj"),
    ("attn_v", "self_attn.v_proj"),
    ("attn_output", "self_attn.o_proj"),
    ("ffn_gate", "mlp.gate_proj"),
    ("ffn_up", "mlp.up_proj"),
    ("ffn_down", "mlp.down_proj"),
];

/// The model folder `moa-tiny` as GGUF, with matrices of this type.
pub(crate) fn moa_tiny(folder: &Path, kind: u32) -> File {
    let json = |file: &str| -> Json {
        serde_json::from_slice(&std::fs::read(folder.join(file)).unwrap()).unwrap()
    };
    let (config, tokenizer) = (json("config.json"), json("tokenizer.json"));
    let number = |key: &str| config[key].as_f64().unwrap() as u32;
    let (heads, kv_heads) = (number("num_attention_heads"), number("num_key_value_heads"));
    let (hidden, inner) = (number("hidden_size"), number("intermediate_size"));
    let mut file = File::new();
    file.key("general.architecture", "llama")
        .key("general.alignment", Value::U32(32))
        .key("llama.block_count", Value::U32(number("num_hidden_layers")))
        .key("llama.context_length", Value::U32(number("max_position_embeddings")))
        .key("llama.embedding_length", Value::U32(hidden))
        .key("llama.feed_forward_length", Value::U32(inner))
        .key("llama.attention.head_count", Value::U32(heads))
        .key("llama.attention.head_count_kv", Value::U32(kv_heads))
        .key("llama.rope.freq_base", Value::F32(number("rope_theta") as f32))
        .key("llama.rope.dimension_count", Value::U32(hidden / heads))
        .key("llama.attention.layer_norm_rms_epsilon", Value::F32(1e-5));

    let model = &tokenizer["model"];
    let mut tokens = vec![String::new(); number("vocab_size") as usize];
    for (token, id) in model["vocab"].as_object().unwrap() {
        tokens[id.as_u64().unwrap() as usize] = token.clone();
    }
    let types = (0..tokens.len()).map(|id| if id < 3 { 3 } else { 1 }).collect();
    let merge =
        |pair: &Json| format!("{} {}", pair[0].as_str().unwrap(), pair[1].as_str().unwrap());
    let merges = model["merges"].as_array().unwrap().iter().map(merge).collect();
    let template = json("tokenizer_config.json")["chat_template"].as_str().unwrap().to_owned();
    file.key("tokenizer.ggml.model", "gpt2")
        .key("tokenizer.ggml.pre", "smollm")
        .key("tokenizer.ggml.tokens", Value::Texts(tokens))
        .key("tokenizer.ggml.token_type", Value::I32s(types))
        .key("tokenizer.ggml.merges", Value::Texts(merges))
        .key("tokenizer.ggml.bos_token_id", Value::U32(1))
        .key("tokenizer.ggml.eos_token_id", Value::U32(2))
        .key("tokenizer.ggml.unknown_token_id", Value::U32(0))
        .key("tokenizer.ggml.add_bos_token", Value::Bool(true))
        .key("tokenizer.chat_template", Value::Text(template));

    let weights = Weights::open(folder).unwrap();
    let vector = |name: &str| {
        let values = weights.tensor(name, &[hidden as usize]).unwrap().to_f32().unwrap();
        values.iter().flat_map(|x| x.to_le_bytes()).collect::<Vec<u8>>()
    };
    let matrix = |name: &str, out: u32, input: u32, heads: Option<u32>| {
        let tensor = weights.tensor(name, &[out as usize, input as usize]).unwrap();
        let values = tensor.to_f32().unwrap();
        let rows: Vec<&[f32]> = values.chunks(input as usize).collect();
        let dim = (out / heads.unwrap_or(1)) as usize;
        // The two rows of a rotary pair lie side by side.
        let place = |row: usize| match heads {
            None => row,
            Some(_) => row / dim * dim + row % 2 * (dim / 2) + row % dim / 2,
        };
        (0..rows.len()).flat_map(|row| encode(rows[place(row)], kind)).collect::<Vec<u8>>()
    };
    let embedding = "model.embed_tokens.weight";
    let vocabulary = number("vocab_size");
    let bytes = matrix(embedding, vocabulary, hidden, None);
    file.tensor("token_embd.weight", &[hidden.into(), vocabulary.into()], kind, bytes);
    file.tensor("output_norm.weight", &[hidden.into()], F32, vector("model.norm.weight"));
    for layer in 0..number("num_hidden_layers") {
        for (short, long) in LAYER {
            let name = format!("blk.{layer}.{short}.weight");
            let long = format!("model.layers.{layer}.{long}.weight");
            let own = |heads: u32| heads * (hidden / 4);
            let (out, input, order) = match short {
                "attn_norm" | "ffn_norm" => {
                    file.tensor(&name, &[hidden.into()], F32, vector(&long));
                    continue;
                }
                "attn_q" => (own(heads), hidden, Some(heads)),
                "attn_k" => (own(kv_heads), hidden, Some(kv_heads)),
                "attn_v" => (own(kv_heads), hidden, None),
                "attn_output" => (hidden, own(heads), None),
                "ffn_down" => (hidden, inner, None),
                _ => (inner, hidden, None),
            };
            let bytes = matrix(&long, out, input, order);
            file.tensor(&name, &[input.into(), out.into()], kind, bytes);
        }
    }
    file
}

/// A row of elements as this type.
fn encode(row: &[f32], kind: u32) -> Vec<u8> {
    match kind {
        F32 => row.iter().flat_map(|x| x.to_le_bytes()).collect(),
        BF16 => row.iter().flat_map(|x| half::bf16::from_f32(*x).to_le_bytes()).collect(),
        Q8_0 => {
            let block = |x: &[f32]| {
                let step = x.iter().fold(0.0f32, |most, x| most.max(x.abs())) / 127.0;
                let step = half::f16::from_f32(step);
                let inverse = if step.to_f32() > 0.0 { 1.0 / step.to_f32() } else { 0.0 };
                let codes = x.iter().map(|x| (x * inverse).round() as i8 as u8);
                step.to_le_bytes().into_iter().chain(codes.collect::<Vec<u8>>())
            };
            row.chunks(32).flat_map(block).collect()
        }
        Q4_0 => {
            let block = |x: &[f32]| {
                let most = x.iter().fold(0.0f32, |a, b| if b.abs() > a.abs() { *b } else { a });
                let step = half::f16::from_f32(most / -8.0);
                let inverse = if most == 0.0 { 0.0 } else { -8.0 / most };
                let code = |x: f32| (x * inverse + 8.5).clamp(0.0, 15.0) as u8;
                let pairs = x[..16].iter().zip(&x[16..]).map(|(a, b)| code(*a) | code(*b) << 4);
                step.to_le_bytes().into_iter().chain(pairs.collect::<Vec<u8>>())
            };
            row.chunks(32).flat_map(block).collect()
        }
        other => panic!("no code for type {other}"),
    }
}
