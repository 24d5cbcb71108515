//! A model that says what is written here: each token of a script is followed by the next one.

use std::fs;
use std::path::Path;

use moa_core::{Plan, SplitMix64};
use moa_models::{Checkpoint, Cpu, Dtype};
use moa_server::ServerOptions;
use serde_json::{Value, json};

use crate::{Running, folder};

/// Elements of an embedding: so many random signs are unlike those of any other token.
const HIDDEN: usize = 64;

/// A server of a model that answers the first text of a script with the others, a token each. No text may come twice.
pub(crate) fn serve(scripts: &[&[&str]]) -> Running {
    let own = tempfile::tempdir().expect("a folder");
    write(own.path(), scripts);
    let checkpoint = Checkpoint::open(Cpu::new(Dtype::F32), own.path()).expect("a model");
    let plan = Plan::full(checkpoint.model.shape()).expect("a shape");
    Running::of(checkpoint, plan, ServerOptions::default())
}

fn read(name: &str) -> Value {
    let text = fs::read_to_string(folder().join(name)).expect("a file of moa-tiny");
    serde_json::from_str(&text).expect("JSON")
}

fn write(own: &Path, scripts: &[&[&str]]) {
    let (mut config, mut tokenizer) = (read("config.json"), read("tokenizer.json"));
    let first = config["vocab_size"].as_u64().expect("a number") as usize;
    let eos = config["eos_token_id"].as_u64().expect("a number") as usize;
    let texts: Vec<&str> = scripts.concat();
    let added = tokenizer["added_tokens"].as_array_mut().expect("tokens");
    for (id, text) in (first..).zip(&texts) {
        added.push(json!({
            "id": id, "content": text, "single_word": false, "lstrip": false, "rstrip": false,
            "normalized": false, "special": false,
        }));
    }
    let mut chat = read("tokenizer_config.json");
    // The model sees the last message alone.
    chat["chat_template"] = "{{ messages[-1]['content'] }}{# tools #}".into();
    let vocab = first + texts.len();
    for (field, value) in [
        ("vocab_size", vocab),
        ("hidden_size", HIDDEN),
        ("intermediate_size", HIDDEN),
        ("num_hidden_layers", 1),
        ("num_attention_heads", 1),
        ("num_key_value_heads", 1),
    ] {
        config[field] = value.into();
    }
    config["tie_word_embeddings"] = false.into();
    for (name, value) in
        [("config.json", config), ("tokenizer.json", tokenizer), ("tokenizer_config.json", chat)]
    {
        fs::write(own.join(name), value.to_string()).expect("written");
    }

    let mut random = SplitMix64::new(1);
    let mut sign = |_| if random.next_u64() >> 63 == 0 { 1.0 } else { -1.0 };
    let embedding: Vec<f32> = (0..vocab * HIDDEN).map(&mut sign).collect();
    // What follows a token has its embedding as row of the output matrix.
    let mut output = vec![0.0; vocab * HIDDEN];
    let mut id = first;
    for script in scripts {
        for at in 0..script.len() {
            let next = if at + 1 == script.len() { eos } else { id + 1 };
            for (out, x) in
                output[next * HIDDEN..].iter_mut().zip(&embedding[id * HIDDEN..][..HIDDEN])
            {
                *out += x;
            }
            id += 1;
        }
    }
    let (one, square) = (vec![1.0; HIDDEN], vec![0.0; HIDDEN * HIDDEN]);
    let layer = |name: &str| format!("model.layers.0.{name}.weight");
    let mut tensors = vec![
        ("model.embed_tokens.weight".to_owned(), embedding, vec![vocab, HIDDEN]),
        ("lm_head.weight".to_owned(), output, vec![vocab, HIDDEN]),
        ("model.norm.weight".to_owned(), one.clone(), vec![HIDDEN]),
        (layer("input_layernorm"), one.clone(), vec![HIDDEN]),
        (layer("post_attention_layernorm"), one, vec![HIDDEN]),
    ];
    // The layer adds nothing.
    let of_attention =
        ["q_proj", "k_proj", "v_proj", "o_proj"].map(|name| format!("self_attn.{name}"));
    let of_mlp = ["gate_proj", "up_proj", "down_proj"].map(|name| format!("mlp.{name}"));
    for name in of_attention.iter().chain(&of_mlp) {
        tensors.push((layer(name), square.clone(), vec![HIDDEN, HIDDEN]));
    }
    let (mut header, mut data) = (json!({}), Vec::new());
    for (name, values, shape) in tensors {
        let start = data.len();
        data.extend(values.iter().flat_map(|x| x.to_le_bytes()));
        header[name] =
            json!({ "dtype": "F32", "shape": shape, "data_offsets": [start, data.len()] });
    }
    let header = header.to_string();
    let bytes = [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), &data].concat();
    fs::write(own.join("model.safetensors"), bytes).expect("written");
}
