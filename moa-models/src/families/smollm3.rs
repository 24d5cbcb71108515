use crate::Result;
use crate::checkpoint::json::JsonObject;
use crate::decoder::config::{LayerKind, ModelConfig};
use crate::families::Family;
use crate::families::layer_kinds::{sliding, switched_window};
use crate::families::llama::Defaults;

/// SmolLM3: Llama with layers that do not rotate queries and keys, every fourth one.
#[derive(Clone, Copy, Debug)]
pub struct SmolLm3;

impl Family for SmolLm3 {
    fn model_types(&self) -> &[&str] {
        &["smollm3"]
    }

    fn config(&self, file: &JsonObject) -> Result<ModelConfig> {
        let defaults = Defaults {
            rope_theta: 2_000_000.0,
            tie_word_embeddings: true,
            max_position_embeddings: 32_768,
            ..Defaults::default()
        };
        let config = defaults.config(file)?;
        let layers = config.num_hidden_layers;
        let rotary = rotary(file, layers)?;
        let window = switched_window(file, None)?;
        let kinds = sliding(file, layers, window, |layer| window.is_some() && !rotary[layer])?;
        let kinds = kinds.into_iter().zip(rotary);
        let layer_kinds = kinds.map(|(kind, rotary)| LayerKind { rotary, ..kind }).collect();
        Ok(ModelConfig { layer_kinds, ..config })
    }
}

/// Whether each layer rotates. `no_rope_layers` has 1 for those that do, whatever its name says.
fn rotary(file: &JsonObject, layers: usize) -> Result<Vec<bool>> {
    const FIELD: &str = "no_rope_layers";
    let interval = file.count("no_rope_layer_interval")?.unwrap_or(4);
    let listed = file.list(FIELD, "a list of 0 and 1", |value| match value.as_u64() {
        Some(rotates @ 0..=1) => Some(rotates == 1),
        _ => None,
    })?;
    let mut rotary = listed
        .unwrap_or_else(|| (1..=layers).map(|number| !number.is_multiple_of(interval)).collect());
    if rotary.len() < layers {
        return Err(file.invalid(FIELD, &format!("one for each of {layers} layers"), rotary.len()));
    }
    rotary.truncate(layers);
    Ok(rotary)
}
