use crate::Result;
use crate::checkpoint::json::JsonObject;
use crate::decoder::config::{LayerKind, ModelConfig};
use crate::families::Family;
use crate::families::layer_kinds::{sliding, switched_window};
use crate::families::llama::Defaults;

/// Qwen2 and Qwen2.5: Llama with biases on queries, keys and values, which no field says. Upper layers may have
/// a sliding window.
#[derive(Clone, Copy, Debug)]
pub struct Qwen2;

impl Family for Qwen2 {
    fn model_types(&self) -> &[&str] {
        &["qwen2"]
    }

    fn config(&self, file: &JsonObject) -> Result<ModelConfig> {
        let config =
            Defaults { max_position_embeddings: 32_768, ..Defaults::default() }.config(file)?;
        let layer_kinds = layer_kinds(file, config.num_hidden_layers)?;
        Ok(ModelConfig { layer_kinds, qkv_bias: true, o_bias: false, mlp_bias: false, ..config })
    }
}

/// Qwen's layers from `max_window_layers` on slide, if `use_sliding_window` is set.
pub(super) fn layer_kinds(file: &JsonObject, layers: usize) -> Result<Vec<LayerKind>> {
    let window = switched_window(file, Some(4096))?;
    let first = file.number_from("max_window_layers", 0.0)?.unwrap_or(28.0);
    sliding(file, layers, window, |layer| window.is_some() && layer as f64 >= first)
}
