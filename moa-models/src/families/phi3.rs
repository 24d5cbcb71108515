use crate::Result;
use crate::checkpoint::json::JsonObject;
use crate::decoder::config::ModelConfig;
use crate::decoder::names::TensorNames;
use crate::decoder::rope_scaling::RopeScaling;
use crate::families::Family;
use crate::families::layer_kinds::{sliding, window};
use crate::families::llama::Defaults;

/// Phi-3, Phi-3.5 mini and Phi-4: queries, keys and values in one tensor, gate and up in another; a part of each
/// head may be rotated, LongRoPE stretches the context, and layers may have a sliding window.
#[derive(Clone, Copy, Debug)]
pub struct Phi3;

impl Family for Phi3 {
    fn model_types(&self) -> &[&str] {
        &["phi3"]
    }

    fn config(&self, file: &JsonObject) -> Result<ModelConfig> {
        let defaults = Defaults {
            partial_rotary: true,
            rms_norm_eps: 1e-5,
            max_position_embeddings: 4096,
            ..Defaults::default()
        };
        let config = defaults.config(file)?;
        if !matches!(config.rope_scaling, RopeScaling::Default | RopeScaling::LongRope { .. }) {
            let got = format!("{:?}", config.rope_scaling);
            return Err(file.invalid("rope_scaling", "of type default or longrope", got));
        }
        let window = window(file, None)?;
        let layer_kinds = sliding(file, config.num_hidden_layers, window, |_| window.is_some())?;
        let tensor_names = TensorNames {
            query: "self_attn.qkv_proj".into(),
            key: "self_attn.qkv_proj".into(),
            value: "self_attn.qkv_proj".into(),
            gate: "mlp.gate_up_proj".into(),
            up: "mlp.gate_up_proj".into(),
            ..config.tensor_names
        };
        Ok(ModelConfig {
            layer_kinds,
            qkv_bias: false,
            o_bias: false,
            mlp_bias: false,
            tensor_names,
            ..config
        })
    }
}
