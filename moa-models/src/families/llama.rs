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
        Defaults::default().config(file)
    }
}

/// What a family takes for fields that its files may leave out, as transformers does.
pub(super) struct Defaults {
    /// Where it is not the width that the residual stream divides into.
    pub(super) head_dim: Option<usize>,
    pub(super) rope_theta: f64,
    pub(super) rms_norm_eps: f64,
    pub(super) max_position_embeddings: usize,
    pub(super) tie_word_embeddings: bool,
    /// Whether files may have the field `partial_rotary_factor`.
    pub(super) partial_rotary: bool,
}

impl Default for Defaults {
    fn default() -> Self {
        Self {
            head_dim: None,
            rope_theta: 10_000.0,
            rms_norm_eps: 1e-6,
            max_position_embeddings: 2048,
            tie_word_embeddings: false,
            partial_rotary: false,
        }
    }
}

impl Defaults {
    /// Reads the fields that all families have in common.
    pub(super) fn config(&self, file: &JsonObject) -> Result<ModelConfig> {
        let required = |field| file.require(field, file.count(field)?);
        // A model of another activation would load and then compute something else.
        let activation = file.text("hidden_act")?.unwrap_or("silu");
        if activation != "silu" {
            return Err(file.invalid("hidden_act", "silu", activation));
        }
        let max_position_embeddings =
            file.count("max_position_embeddings")?.unwrap_or(self.max_position_embeddings);
        // transformers 5 moved both into `rope_parameters`, and reads the old name first.
        let rope = match file.object("rope_scaling")? {
            Some(rope) => Some(rope),
            None => file.object("rope_parameters")?,
        };
        let rope = rope.map(of_layers).transpose()?;
        let rope_scaling = match &rope {
            Some(rope) => RopeScaling::from_object(rope, file, max_position_embeddings)?,
            None => RopeScaling::Default,
        };
        let nested_theta = match &rope {
            Some(rope) => rope.number_above("rope_theta", 1.0)?,
            None => None,
        };
        let theta = file.number_above("rope_theta", 1.0)?;
        let hidden_size = required("hidden_size")?;
        let num_attention_heads = required("num_attention_heads")?;
        let head_dim = match file.count("head_dim")?.or(self.head_dim) {
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
        let rotary_dim = self.rotary_dim(file, rope.as_ref(), head_dim)?;
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
            rotary_dim,
            layer_kinds: Vec::new(),
            rms_norm_eps: eps.unwrap_or(self.rms_norm_eps),
            rope_theta: nested_theta.or(theta).unwrap_or(self.rope_theta),
            rope_scaling,
            max_position_embeddings,
            tie_word_embeddings: file
                .flag("tie_word_embeddings")?
                .unwrap_or(self.tie_word_embeddings),
            qkv_bias: attention_bias,
            o_bias: attention_bias,
            mlp_bias: file.flag("mlp_bias")?.unwrap_or(false),
            qk_norm: false,
            attention_multiplier: None,
            query_scaling: None,
            embedding_multiplier: 1.0,
            residual_multiplier: 1.0,
            logits_scaling: 1.0,
            bos_token_id: file.token_ids("bos_token_id")?.first().copied(),
            eos_token_ids: file.token_ids("eos_token_id")?,
            tensor_names: TensorNames::default(),
        })
    }

    /// Dimensions of a head that are rotated, where they are not all.
    fn rotary_dim(
        &self,
        file: &JsonObject,
        rope: Option<&JsonObject>,
        head_dim: usize,
    ) -> Result<Option<usize>> {
        const FIELD: &str = "partial_rotary_factor";
        for object in [rope, Some(file)].into_iter().flatten() {
            let Some(part) = object.number_above(FIELD, 0.0)? else { continue };
            return match part {
                1.0 => Ok(None),
                _ if !self.partial_rotary => Err(object.invalid(FIELD, "1 or absent", part)),
                _ if part > 1.0 => Err(object.invalid(FIELD, "at most 1", part)),
                _ => Ok(Some((head_dim as f64 * part) as usize)),
            };
        }
        Ok(None)
    }
}

/// The parameters of rotation, which newer files may have for each type of layers: all are to rotate alike.
fn of_layers(rope: JsonObject) -> Result<JsonObject> {
    let [full, sliding] = ["full_attention", "sliding_attention"];
    match (rope.object(full)?, rope.object(sliding)?) {
        (Some(_), Some(_)) if rope.get(full) != rope.get(sliding) => {
            let expected = format!("as `{full}`: all layers rotate alike");
            Err(rope.invalid(sliding, &expected, "another one"))
        }
        (Some(one), _) | (None, Some(one)) => Ok(one),
        (None, None) => Ok(rope),
    }
}
