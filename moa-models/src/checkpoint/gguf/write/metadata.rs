//! A model's configuration as keys.

use std::path::Path;

use moa_backend_cpu::ops::BlockType;

use super::container::Keys;
use crate::checkpoint::json::JsonObject;
use crate::decoder::config::ModelConfig;
use crate::decoder::rope_scaling::RopeScaling;
use crate::{Error, Result};

/// What GGUF calls the architecture of a `model_type`. Mistral's is Llama's.
const ARCHITECTURES: [(&str, &str); 5] = [
    ("llama", "llama"),
    ("mistral", "llama"),
    ("ministral", "llama"),
    ("qwen2", "qwen2"),
    ("qwen3", "qwen3"),
];

/// The architecture of a folder's model.
pub(super) fn architecture(folder: &Path) -> Result<&'static str> {
    let file = JsonObject::read(&folder.join("config.json"))?;
    let kind = file.text("model_type")?.unwrap_or("llama");
    let known = ARCHITECTURES.iter().find(|(name, _)| *name == kind);
    known.map(|(_, architecture)| *architecture).ok_or_else(|| {
        let known = ARCHITECTURES.map(|(name, _)| name).join(", ");
        file.invalid("model_type", &format!("{known}, to be written as GGUF"), kind)
    })
}

/// What llama.cpp calls a file by what most of it is.
fn file_type(blocks: BlockType) -> u32 {
    match blocks {
        BlockType::Q4_0 => 2,
        BlockType::Q4_1 => 3,
        BlockType::Q8_0 => 7,
        BlockType::Q5_0 => 8,
        BlockType::Q5_1 => 9,
        BlockType::Q4K => 14,
        BlockType::Q5K => 16,
        // There is no other type.
        _ => 18,
    }
}

/// What every file has of its blocks.
pub(super) fn blocks(keys: &mut Keys, blocks: BlockType) {
    keys.u32("general.file_type", file_type(blocks));
    keys.u32("general.quantization_version", 2);
}

/// Writes what a model's configuration says.
pub(super) fn write(
    keys: &mut Keys,
    folder: &Path,
    architecture: &str,
    c: &ModelConfig,
) -> Result<()> {
    keys.text("general.architecture", architecture);
    keys.text("general.type", "model");
    let name = folder.canonicalize().ok();
    let name = name.as_deref().unwrap_or(folder).file_name().unwrap_or_default();
    keys.text("general.name", &name.to_string_lossy());
    let of = |key: &str| format!("{architecture}.{key}");
    for (key, count) in [
        ("vocab_size", c.vocab_size),
        ("context_length", c.max_position_embeddings),
        ("embedding_length", c.hidden_size),
        ("block_count", c.num_hidden_layers),
        ("feed_forward_length", c.intermediate_size),
        ("attention.head_count", c.num_attention_heads),
        ("attention.head_count_kv", c.num_key_value_heads),
        ("attention.key_length", c.head_dim),
        ("attention.value_length", c.head_dim),
        ("rope.dimension_count", c.head_dim),
    ] {
        keys.u32(&of(key), count as u32);
    }
    keys.f32(&of("attention.layer_norm_rms_epsilon"), c.rms_norm_eps);
    keys.f32(&of("rope.freq_base"), c.rope_theta);
    if let Some(window) = c.layer_kinds.iter().find_map(|kind| kind.sliding_window) {
        keys.u32(&of("attention.sliding_window"), window as u32);
    }
    match c.rope_scaling {
        // Llama 3.1's is a tensor of factors.
        RopeScaling::Default | RopeScaling::Llama3 { .. } => {}
        RopeScaling::Linear { factor } => {
            keys.text(&of("rope.scaling.type"), "linear");
            keys.f32(&of("rope.scaling.factor"), factor);
        }
        // GGUF has no attention factor of one's own, only a factor of the usual one.
        RopeScaling::Yarn {
            factor,
            beta_fast,
            beta_slow,
            original,
            attention_factor: None,
            ..
        } => {
            keys.text(&of("rope.scaling.type"), "yarn");
            keys.f32(&of("rope.scaling.factor"), factor);
            keys.u32(&of("rope.scaling.original_context_length"), original as u32);
            keys.f32(&of("rope.scaling.yarn_beta_fast"), beta_fast);
            keys.f32(&of("rope.scaling.yarn_beta_slow"), beta_slow);
        }
        _ => {
            let expected =
                "none, linear, llama3, or yarn without attention_factor, to be written as GGUF";
            let path = folder.join("config.json");
            return Err(Error::gguf(&path, "rope_scaling", expected, "another one"));
        }
    }
    Ok(())
}
