//! A Decoder trained by others (llama2.c's stories260K: grouped queries, interleaved RoPE), converted
//! to the Hugging Face layout, writes the story that its authors published.

use std::path::Path;

use moa_conformance::{Trial, Verdict, trials};
use moa_core::Plan;
use moa_models::{Cpu, Decoder, Engine, EngineOptions, GenerateOptions, ModelConfig, Weights};
use serde_json::json;

use crate::test_data;

pub(crate) fn trials() -> Vec<Trial> {
    trials![stories260k_tells_its_published_story]
}

const BOS: u32 = 1;

/// Header and tensors of a llama2.c checkpoint, version 0.
struct Export {
    dim: usize,
    hidden: usize,
    layers: usize,
    heads: usize,
    kv_heads: usize,
    vocab: usize,
    context: usize,
    floats: Vec<f32>,
}

impl Export {
    fn read(path: &Path) -> Self {
        let bytes = std::fs::read(path).unwrap();
        let words: Vec<[u8; 4]> = bytes.as_chunks().0.to_vec();
        let header: Vec<i32> = words[..7].iter().map(|w| i32::from_le_bytes(*w)).collect();
        // A negative vocabulary would announce an output head of its own.
        assert!(header.iter().all(|n| *n > 0), "{header:?}");
        let n = |i: usize| header[i] as usize;
        Self {
            dim: n(0),
            hidden: n(1),
            layers: n(2),
            heads: n(3),
            kv_heads: n(4),
            vocab: n(5),
            context: n(6),
            floats: words[7..].iter().map(|w| f32::from_le_bytes(*w)).collect(),
        }
    }

    fn head_dim(&self) -> usize {
        self.dim / self.heads
    }

    /// All tensors with the names and the order of dimensions that Hugging Face gives them.
    fn tensors(&self) -> Vec<(String, Vec<usize>, Vec<f32>)> {
        let (dim, hidden, kv) = (self.dim, self.hidden, self.kv_heads * self.head_dim());
        let mut rest = &self.floats[..];
        let mut take = |n: usize| {
            let (own, after) = rest.split_at(n);
            rest = after;
            own.to_vec()
        };
        let mut tensors =
            vec![("embed_tokens.weight".to_owned(), vec![self.vocab, dim], take(self.vocab * dim))];
        // In the file each kind of tensor comes for all layers before the next kind.
        for (part, shape) in [
            ("input_layernorm", vec![dim]),
            ("self_attn.q_proj", vec![dim, dim]),
            ("self_attn.k_proj", vec![kv, dim]),
            ("self_attn.v_proj", vec![kv, dim]),
            ("self_attn.o_proj", vec![dim, dim]),
            ("post_attention_layernorm", vec![dim]),
            ("mlp.gate_proj", vec![hidden, dim]),
            ("mlp.down_proj", vec![dim, hidden]),
            ("mlp.up_proj", vec![hidden, dim]),
        ] {
            for layer in 0..self.layers {
                let mut data = take(shape.iter().product());
                if part.ends_with("q_proj") || part.ends_with("k_proj") {
                    data = self.half_split(&data);
                }
                tensors.push((format!("layers.{layer}.{part}.weight"), shape.clone(), data));
            }
        }
        tensors.push(("norm.weight".to_owned(), vec![dim], take(dim)));
        assert_eq!(rest.len(), self.context * self.head_dim(), "only the rotary table is left");
        tensors
    }

    /// Rows of each head from interleaved rotary pairs (2i, 2i + 1) to (i, i + head_dim / 2).
    fn half_split(&self, data: &[f32]) -> Vec<f32> {
        let d = self.head_dim();
        let order: Vec<usize> = (0..d).step_by(2).chain((1..d).step_by(2)).collect();
        let head = |head: &[f32]| {
            order.iter().flat_map(|i| head[i * self.dim..][..self.dim].to_vec()).collect::<Vec<_>>()
        };
        data.chunks(d * self.dim).flat_map(head).collect()
    }

    /// Writes `config.json` and `model.safetensors`.
    fn convert(&self, folder: &Path) {
        let config = json!({
            "model_type": "llama", "hidden_size": self.dim, "intermediate_size": self.hidden,
            "num_hidden_layers": self.layers, "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads, "vocab_size": self.vocab,
            "max_position_embeddings": self.context, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
            "tie_word_embeddings": true, "bos_token_id": BOS, "eos_token_id": 2,
        });
        std::fs::write(folder.join("config.json"), config.to_string()).unwrap();
        let (mut header, mut data) = (serde_json::Map::new(), Vec::new());
        for (name, shape, values) in self.tensors() {
            let begin = data.len();
            data.extend(values.iter().flat_map(|x| x.to_le_bytes()));
            let entry =
                json!({"dtype": "F32", "shape": shape, "data_offsets": [begin, data.len()]});
            header.insert(format!("model.{name}"), entry);
        }
        let header = serde_json::to_string(&header).unwrap();
        let mut file = (header.len() as u64).to_le_bytes().to_vec();
        file.extend(header.as_bytes());
        file.extend(data);
        std::fs::write(folder.join("model.safetensors"), file).unwrap();
    }
}

/// The pieces of llama2.c's tokenizer file: longest length, then score, length and bytes of each.
fn vocabulary(path: &Path) -> Vec<Vec<u8>> {
    let bytes = std::fs::read(path).unwrap();
    let mut rest = &bytes[4..];
    let mut pieces = Vec::new();
    while let Some((head, after)) = rest.split_first_chunk::<8>() {
        let len = i32::from_le_bytes([head[4], head[5], head[6], head[7]]) as usize;
        pieces.push(after[..len].to_vec());
        rest = &after[len..];
    }
    pieces
}

fn decode(vocabulary: &[Vec<u8>], ids: &[u32]) -> String {
    let mut text = Vec::new();
    for (i, id) in ids.iter().enumerate() {
        let piece = &vocabulary[*id as usize][..];
        let byte = std::str::from_utf8(piece)
            .ok()
            .and_then(|p| p.strip_prefix("<0x")?.strip_suffix('>'))
            .and_then(|hex| u8::from_str_radix(hex, 16).ok());
        match (byte, i) {
            (Some(byte), _) => text.push(byte),
            (None, 0) => text.extend(piece.strip_prefix(b" ").unwrap_or(piece)),
            (None, _) => text.extend(piece),
        }
    }
    String::from_utf8(text).unwrap()
}

/// What the command line with temperature 0 prints.
fn published(readme: &Path) -> String {
    let readme = std::fs::read_to_string(readme).unwrap();
    let (_, after) = readme.split_once("-t 0.0\n").unwrap();
    after.split_once("\n```").unwrap().0.to_owned()
}

fn stories260k_tells_its_published_story() -> Verdict {
    let source = test_data("checkpoints/stories260K")?;
    let folder = tempfile::tempdir().unwrap();
    Export::read(&source.join("stories260K.bin")).convert(folder.path());
    let model = Decoder::load(
        Cpu::default(),
        ModelConfig::from_file(folder.path())?,
        &Weights::open(folder.path())?,
    )?;
    let vocabulary = vocabulary(&source.join("tok512.bin"));
    assert_eq!(vocabulary.len(), model.config().vocab_size);

    let options = GenerateOptions { eos_token_ids: Some(vec![BOS]), ..Default::default() };
    let sequence = model.open(&Plan::full(model.shape())?, 256, 0)?;
    let mut engine = Engine::new(model.into(), EngineOptions::default());
    engine.resume(sequence, vec![BOS], options);
    let text = decode(&vocabulary, &engine.complete_all()?[0].tokens);
    assert_eq!(text, published(&source.join("stories260K.md")));
    Ok(())
}
