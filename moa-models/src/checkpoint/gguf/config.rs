//! The metadata as the `config.json` that a family reads.

use serde_json::{Map, Value as Json, json};

use super::{Gguf, Value, llama3_factor};
use crate::checkpoint::json::JsonObject;
use crate::checkpoint::reads;
use crate::decoder::config::ModelConfig;
use crate::decoder::names::TensorNames;
use crate::families::{self, Family};
use crate::{Error, Result};

/// Architectures, and the `model_type` of each.
const ARCHITECTURES: [(&str, &str); 3] =
    [("llama", "llama"), ("qwen2", "qwen2"), ("qwen3", "qwen3")];

/// Factors of rotary wavelengths, where the model has some.
pub(super) const FREQUENCIES: &str = "rope_freqs.weight";

/// Keys that change what a model computes in a way that no family here has.
const UNKNOWN_SCALES: [&str; 5] =
    ["attention.scale", "logit_scale", "embedding_scale", "residual_scale", "expert_count"];

/// Tokens that end an answer by their text, where they are control tokens: files name only one or two of
/// those that a model has.
const ENDS: [&str; 7] = [
    "<|eot_id|>",
    "<|eom_id|>",
    "<|im_end|>",
    "<|end|>",
    "<|endoftext|>",
    "<|end_of_text|>",
    "<end_of_turn>",
];

impl Gguf {
    /// The model's configuration, as one of these families reads it.
    pub(crate) fn config(&self, families: &[&dyn Family]) -> Result<ModelConfig> {
        let config = families::read(&self.config_object()?, families)?;
        Ok(ModelConfig { tensor_names: names(), ..config })
    }

    /// Query or KV heads, if `name` is a tensor whose rows are ordered by rotary pair.
    pub(super) fn rotary_heads(&self, name: &str) -> Result<Option<usize>> {
        let of = |part: &str| name.contains(&format!(".{part}."));
        if self.architecture()? != "llama" || !(of("attn_q") || of("attn_k")) {
            return Ok(None);
        }
        let heads = self.count("attention.head_count")?;
        let kv_heads = self.count("attention.head_count_kv")?;
        let own = if of("attn_q") { heads } else { kv_heads.or(heads) };
        self.require("llama.attention.head_count", "a number of heads", own).map(Some)
    }

    fn architecture(&self) -> Result<&str> {
        let key = "general.architecture";
        let known = || ARCHITECTURES.map(|(name, _)| name).join(", ");
        let name = self.require(key, &known(), self.text(key)?)?;
        match ARCHITECTURES.iter().find(|(known, _)| *known == name) {
            Some((name, _)) => Ok(name),
            None => Err(self.key_fault(key, &known(), name)),
        }
    }

    /// A key of the architecture as a count from 1 to 2^31 - 1.
    fn count(&self, key: &str) -> Result<Option<usize>> {
        let key = format!("{}.{key}", self.architecture()?);
        let count = |value: &Value| {
            // Layers that differ are written as an array, and so are some that do not.
            let n = match value {
                Value::Integers(all) => {
                    let first = all.first().filter(|first| all.iter().all(|n| n == *first));
                    first.and_then(|n| u64::try_from(*n).ok())
                }
                one => one.as_unsigned(),
            };
            n.filter(|n| (1..=i32::MAX as u64).contains(n))
        };
        let expected = "a whole number from 1 to 2147483647, the same for all layers";
        Ok(self.read(&key, expected, count)?.map(|n| n as usize))
    }

    fn config_object(&self) -> Result<JsonObject> {
        let architecture = self.architecture()?;
        let of = |key: &str| format!("{architecture}.{key}");
        for key in UNKNOWN_SCALES {
            if let Some(value) = self.get(&of(key))
                && value.as_number() != Some(0.0)
            {
                return Err(self.key_fault(&of(key), "absent or 0", value));
            }
        }
        let required = |key: &str| {
            let value = self.count(key)?;
            self.require(&of(key), "a whole number of at least 1", value)
        };
        let has = |tensor: &str| self.contains(tensor);
        let (hidden, heads) = (required("embedding_length")?, required("attention.head_count")?);
        let head_dim = self.head_dim(hidden / heads.max(1))?;
        let context = required("context_length")?;
        let epsilon = of("attention.layer_norm_rms_epsilon");
        let epsilon = self.require(&epsilon, "a number above 0", self.number(&epsilon)?)?;
        let model_type = ARCHITECTURES.iter().find(|(name, _)| *name == architecture);
        let mut fields = Map::from_iter([
            ("model_type".to_owned(), json!(model_type.map(|(_, name)| name))),
            ("vocab_size".to_owned(), json!(self.entry("token_embd.weight")?.info.shape[0])),
            ("hidden_size".to_owned(), json!(hidden)),
            ("intermediate_size".to_owned(), json!(required("feed_forward_length")?)),
            ("num_hidden_layers".to_owned(), json!(required("block_count")?)),
            ("num_attention_heads".to_owned(), json!(heads)),
            ("num_key_value_heads".to_owned(), json!(self.count("attention.head_count_kv")?)),
            ("head_dim".to_owned(), json!(head_dim)),
            ("max_position_embeddings".to_owned(), json!(context)),
            ("rms_norm_eps".to_owned(), json!(epsilon)),
            ("rope_theta".to_owned(), json!(self.number(&of("rope.freq_base"))?)),
            ("rope_scaling".to_owned(), self.rope_scaling(head_dim, context)?),
            ("tie_word_embeddings".to_owned(), json!(!has("output.weight"))),
            ("mlp_bias".to_owned(), json!(has("blk.0.ffn_gate.bias"))),
            ("hidden_act".to_owned(), json!("silu")),
            ("bos_token_id".to_owned(), json!(self.unsigned("tokenizer.ggml.bos_token_id")?)),
            ("eos_token_id".to_owned(), json!(self.end_tokens()?)),
        ]);
        if architecture == "llama" {
            fields.insert("attention_bias".to_owned(), json!(has("blk.0.attn_q.bias")));
        }
        if let Some(window) = self.count("attention.sliding_window")? {
            // The architecture `llama` is Mistral's too, which alone has windows.
            if architecture == "llama" {
                fields.insert("model_type".to_owned(), json!("mistral"));
            }
            fields.insert("sliding_window".to_owned(), json!(window));
            fields.insert("use_sliding_window".to_owned(), json!(true));
        }
        JsonObject::parse(&self.path, &Json::Object(fields).to_string())
    }

    fn head_dim(&self, default: usize) -> Result<usize> {
        let dim = self.count("attention.key_length")?.unwrap_or(default);
        for key in ["attention.value_length", "rope.dimension_count"] {
            if let Some(other) = self.count(key)?
                && other != dim
            {
                let key = format!("{}.{key}", self.architecture()?);
                return Err(self.key_fault(&key, &format!("{dim}, a head's width"), other));
            }
        }
        Ok(dim)
    }

    fn rope_scaling(&self, head_dim: usize, context: usize) -> Result<Json> {
        let of = |key: &str| Ok::<_, Error>(format!("{}.rope.{key}", self.architecture()?));
        let kind = of("scaling.type")?;
        let factor = match self.number(&of("scaling.factor")?)? {
            None => self.number(&of("scale_linear")?)?,
            factor => factor,
        };
        let original = self.count("rope.scaling.original_context_length")?;
        let scaling = match (self.text(&kind)?, factor) {
            (None, None) | (Some("none"), _) => Json::Null,
            (None | Some("linear"), factor) => json!({"rope_type": "linear", "factor": factor}),
            (Some("yarn"), factor) => json!({
                "rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original,
                "attention_factor": self.number(&of("scaling.attn_factor")?)?,
                "beta_fast": self.number(&of("scaling.yarn_beta_fast")?)?,
                "beta_slow": self.number(&of("scaling.yarn_beta_slow")?)?,
            }),
            (Some(other), _) => return Err(self.key_fault(&kind, "none, linear or yarn", other)),
        };
        match self.contains(FREQUENCIES) {
            false => Ok(scaling),
            true => self.llama3_scaling(head_dim, context),
        }
    }

    /// Llama 3.1's scaling, of which GGUF has the factors of the wavelengths, but not what they come from.
    ///
    /// All published models have the same constants but for the factor, which is that of the longest wave.
    fn llama3_scaling(&self, head_dim: usize, context: usize) -> Result<Json> {
        let tensor = self.entry(FREQUENCIES)?;
        let factors = self.mapped(tensor, &tensor.info.shape).to_f32()?;
        let factor = f64::from(factors.last().copied().unwrap_or(1.0));
        if factors.iter().all(|factor| *factor == 1.0) {
            return Ok(Json::Null);
        }
        let key = format!("{}.rope.freq_base", self.architecture()?);
        let theta = self.number(&key)?.unwrap_or(10_000.0);
        let original = context.min(8192);
        let expected = |index| llama3_factor(theta, head_dim, index, original, factor, (1.0, 4.0));
        let near = |(index, found): (usize, &f32)| {
            (f64::from(*found) / expected(index) - 1.0).abs() < 1e-3
        };
        if factors.len() != head_dim / 2 || !factors.iter().enumerate().all(near) {
            let expected = format!("Llama 3.1's factors of {} wavelengths", head_dim / 2);
            let got = format!("{} others, the last {factor}", factors.len());
            return Err(Error::gguf(
                &self.path,
                &format!("tensor `{FREQUENCIES}`"),
                &expected,
                got,
            ));
        }
        Ok(json!({
            "rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": original,
        }))
    }

    /// Tokens that end an answer.
    pub(super) fn end_tokens(&self) -> Result<Vec<u64>> {
        let mut ids = Vec::new();
        for key in ["eos_token_id", "eot_token_id", "eom_token_id"] {
            ids.extend(self.unsigned(&format!("tokenizer.ggml.{key}"))?);
        }
        if let Some(Value::Texts(tokens)) = self.get("tokenizer.ggml.tokens")
            && let Some(Value::Integers(types)) = self.get("tokenizer.ggml.token_type")
        {
            let ends = tokens.iter().zip(types).zip(0..).filter(|((token, kind), _)| {
                **kind == super::tokenizer::CONTROL && ENDS.contains(&token.as_str())
            });
            ids.extend(ends.map(|(_, id)| id));
        }
        ids.sort_unstable();
        ids.dedup();
        Ok(ids)
    }

    /// Checks that the model reads every tensor: one that it leaves out would change the text. With `ignore`, says which it
    /// leaves out.
    pub(crate) fn check_all_are_read(&self, c: &ModelConfig, ignore: bool) -> Result<()> {
        let asked = c.tensor_names.all(c);
        // Angles that every model computes itself.
        let is_angles = |name: &str| name == FREQUENCIES || name.ends_with(".attn_rot_embd.weight");
        let is_read = |name: &&str| asked.contains(*name) || is_angles(name);
        reads::unread(&self.path, self.names().filter(|name| !is_read(name)), ignore)
    }
}

/// What GGUF calls the tensors of a decoder.
pub(super) fn names() -> TensorNames {
    TensorNames {
        embedding: "token_embd.weight".into(),
        output: "output.weight".into(),
        norm: "output_norm.weight".into(),
        layers: "blk.{}.".into(),
        attention_norm: "attn_norm.weight".into(),
        query: "attn_q".into(),
        key: "attn_k".into(),
        value: "attn_v".into(),
        query_norm: "attn_q_norm.weight".into(),
        key_norm: "attn_k_norm.weight".into(),
        attention_output: "attn_output".into(),
        mlp_norm: "ffn_norm.weight".into(),
        gate: "ffn_gate".into(),
        up: "ffn_up".into(),
        down: "ffn_down".into(),
    }
}
