use crate::Result;
use crate::checkpoint::json::JsonObject;
use crate::decoder::config::ModelConfig;
use crate::families::Family;
use crate::families::layer_kinds::{sliding, window};
use crate::families::llama::Defaults;

/// Mistral 7B, Nemo, Small 3 and Ministral 8B: Llama without biases, whose layers may have a sliding window.
#[derive(Clone, Copy, Debug)]
pub struct Mistral;

/// The first Mistral 7B's, whose early files leave it out.
const WINDOW: usize = 4096;

impl Family for Mistral {
    fn model_types(&self) -> &[&str] {
        &["mistral", "ministral"]
    }

    fn config(&self, file: &JsonObject) -> Result<ModelConfig> {
        let config =
            Defaults { max_position_embeddings: 131_072, ..Defaults::default() }.config(file)?;
        let window = window(file, Some(WINDOW))?;
        let layer_kinds = sliding(file, config.num_hidden_layers, window, |_| window.is_some())?;
        Ok(ModelConfig { layer_kinds, qkv_bias: false, o_bias: false, mlp_bias: false, ..config })
    }
}
