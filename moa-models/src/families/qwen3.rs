use crate::Result;
use crate::checkpoint::json::JsonObject;
use crate::decoder::config::ModelConfig;
use crate::families::Family;
use crate::families::llama::Defaults;
use crate::families::qwen2::layer_kinds;

/// Qwen3, without experts: Llama with norms of each head's queries and keys.
#[derive(Clone, Copy, Debug)]
pub struct Qwen3;

impl Family for Qwen3 {
    fn model_types(&self) -> &[&str] {
        &["qwen3"]
    }

    fn config(&self, file: &JsonObject) -> Result<ModelConfig> {
        let config = Defaults {
            head_dim: Some(128),
            max_position_embeddings: 32_768,
            ..Defaults::default()
        }
        .config(file)?;
        let layer_kinds = layer_kinds(file, config.num_hidden_layers)?;
        Ok(ModelConfig { layer_kinds, qk_norm: true, mlp_bias: false, ..config })
    }
}
