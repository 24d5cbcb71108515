use crate::Result;
use crate::checkpoint::json::JsonObject;
use crate::decoder::config::{ModelConfig, QueryScaling};
use crate::decoder::rope_scaling::RopeScaling;
use crate::families::Family;
use crate::families::layer_kinds::{sliding, window};
use crate::families::llama::Defaults;

/// Ministral 3, and the text part of its models of images: Mistral with YaRN, whose queries are scaled by their position.
#[derive(Clone, Copy, Debug)]
pub struct Ministral3;

impl Family for Ministral3 {
    fn model_types(&self) -> &[&str] {
        &["ministral3"]
    }

    fn config(&self, file: &JsonObject) -> Result<ModelConfig> {
        let defaults = Defaults {
            head_dim: Some(128),
            rms_norm_eps: 1e-5,
            max_position_embeddings: 262_144,
            ..Defaults::default()
        };
        let config = defaults.config(file)?;
        const ROPE: &str = "rope_parameters";
        let RopeScaling::Yarn { original, .. } = config.rope_scaling else {
            return Err(file.invalid(ROPE, "of type yarn", format!("{:?}", config.rope_scaling)));
        };
        const BETA: &str = "llama_4_scaling_beta";
        let rope = file.require(ROPE, file.object(ROPE)?.or(file.object("rope_scaling")?))?;
        let beta = rope.require(BETA, rope.number_from(BETA, 0.0)?)?;
        let window = window(file, None)?;
        let layer_kinds = sliding(file, config.num_hidden_layers, window, |_| window.is_some())?;
        Ok(ModelConfig {
            layer_kinds,
            query_scaling: (beta > 0.0).then_some(QueryScaling { beta, original }),
            qkv_bias: false,
            o_bias: false,
            mlp_bias: false,
            ..config
        })
    }
}
