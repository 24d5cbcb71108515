use crate::Result;
use crate::checkpoint::json::JsonObject;
use crate::decoder::config::ModelConfig;
use crate::decoder::names::TensorNames;
use crate::decoder::rope_scaling::RopeScaling;
use crate::families::Family;

/// Llama 2, 3, 3.1 and 3.2, and what was trained from them, such as Vicuna.
#[derive(Clone, Copy, Debug)]
pub struct Llama;

impl Family for Llama {
    fn model_types(&self) -> &[&str] {
        &["llama"]
    }

    fn config(&self, file: &JsonObject) -> Result<ModelConfig> {
        let required = |field| file.require(field, file.count(field)?);
        // A model of another activation would load and then compute something else.
        let activation = file.text("hidden_act")?.unwrap_or("silu");
        if activation != "silu" {
            return Err(file.invalid("hidden_act", "silu", activation));
        }
        // Both have defaults in transformers, which leaves them out of some files.
        let max_position_embeddings = file.count("max_position_embeddings")?.unwrap_or(2048);
        // transformers 5 moved both into `rope_parameters`, and reads the old name first.
        let rope = match file.object("rope_scaling")? {
            Some(rope) => Some(rope),
            None => file.object("rope_parameters")?,
        };
        let rope_scaling = match &rope {
            Some(rope) => RopeScaling::from_object(rope, max_position_embeddings)?,
            None => RopeScaling::Default,
        };
        let nested_theta = match &rope {
            Some(rope) => rope.number_above("rope_theta", 1.0)?,
            None => None,
        };
        let theta = file.number_above("rope_theta", 1.0)?;
        let hidden_size = required("hidden_size")?;
        let num_attention_heads = required("num_attention_heads")?;
        let head_dim = match file.count("head_dim")? {
            Some(head_dim) => head_dim,
            None if hidden_size.is_multiple_of(num_attention_heads) => {
                hidden_size / num_attention_heads
            }
            None => {
                let expected = format!(
                    "a multiple of num_attention_heads ({num_attention_heads}) where head_dim is absent"
                );
                return Err(file.invalid("hidden_size", &expected, hidden_size));
            }
        };
        let eps = file.number_above("rms_norm_eps", 0.0)?;
        let attention_bias = file.flag("attention_bias")?.unwrap_or(false);
        Ok(ModelConfig {
            vocab_size: required("vocab_size")?,
            hidden_size,
            intermediate_size: required("intermediate_size")?,
            num_hidden_layers: required("num_hidden_layers")?,
            num_attention_heads,
            num_key_value_heads: file.count("num_key_value_heads")?.unwrap_or(num_attention_heads),
            head_dim,
            rms_norm_eps: eps.unwrap_or(1e-6),
            rope_theta: nested_theta.or(theta).unwrap_or(10_000.0),
            rope_scaling,
            max_position_embeddings,
            tie_word_embeddings: file.flag("tie_word_embeddings")?.unwrap_or(false),
            qkv_bias: attention_bias,
            o_bias: attention_bias,
            mlp_bias: file.flag("mlp_bias")?.unwrap_or(false),
            qk_norm: false,
            bos_token_id: file.token_ids("bos_token_id")?.first().copied(),
            eos_token_ids: file.token_ids("eos_token_id")?,
            tensor_names: TensorNames::default(),
        })
    }
}
