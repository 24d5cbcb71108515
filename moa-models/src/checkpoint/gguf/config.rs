//! The metadata as the `config.json` that a family reads.

use serde_json::{Map, Value as Json, json};

use super::architecture::{
    ARCHITECTURES, Architecture, FACTORS, FREQUENCIES, LOG_MULTIPLIER, QUERY_SCALING,
    SHORT_AND_LONG,
};
use super::{Gguf, Value, llama3_factor};
use crate::checkpoint::json::JsonObject;
use crate::checkpoint::reads;
use crate::decoder::config::ModelConfig;
use crate::decoder::rope_scaling::RopeScaling;
use crate::families::{self, Family};
use crate::{Error, Result};

/// Keys that change what a model computes in a way that no family here has.
const UNKNOWN_SCALES: [&str; 3] = [QUERY_SCALING, LOG_MULTIPLIER, "expert_count"];
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
        Ok(ModelConfig { tensor_names: self.architecture()?.tensor_names(), ..config })
    }

    /// Query or KV heads, if `name` is a tensor whose rows are ordered by rotary pair.
    pub(super) fn rotary_heads(&self, name: &str) -> Result<Option<usize>> {
        let of = |part: &str| name.contains(&format!(".{part}."));
        let Architecture { name: architecture, by_pair, .. } = self.architecture()?;
        if !by_pair || !(of("attn_q") || of("attn_k")) {
            return Ok(None);
        }
        let heads = self.count("attention.head_count")?;
        let kv_heads = self.count("attention.head_count_kv")?;
        let own = if of("attn_q") { heads } else { kv_heads.or(heads) };
        let key = format!("{architecture}.attention.head_count");
        self.require(&key, "a number of heads", own).map(Some)
    }

    fn architecture(&self) -> Result<&'static Architecture> {
        const KEY: &str = "general.architecture";
        const TYPE: &str = "general.type";
        if let Some(other) = self.text(TYPE)?.filter(|kind| *kind != "model") {
            return Err(self.key_fault(TYPE, "model", other));
        }
        let known = || ARCHITECTURES.map(|known| known.name).join(", ");
        let name = self.require(KEY, &known(), self.text(KEY)?)?;
        let found = ARCHITECTURES.iter().find(|known| known.name == name);
        found.ok_or_else(|| self.key_fault(KEY, &known(), name))
    }

    /// A key as this architecture has it.
    fn own(&self, key: &str) -> Result<String> {
        Ok(format!("{}.{key}", self.architecture()?.name))
    }

    /// A key of the architecture as a count from 1 to 2^31 - 1.
    fn count(&self, key: &str) -> Result<Option<usize>> {
        let key = self.own(key)?;
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
        let &Architecture { name: architecture, model_types, has_factors, .. } =
            self.architecture()?;
        let of = |key: &str| format!("{architecture}.{key}");
        let factors = FACTORS.into_iter().filter(|_| !has_factors);
        let beta = match architecture {
            "mistral3" => self.number(&of(QUERY_SCALING))?.filter(|beta| *beta != 0.0),
            _ => None,
        };
        let unknown = UNKNOWN_SCALES.iter().filter(|key| beta.is_none() || **key == "expert_count");
        for key in unknown.copied().chain(factors.map(|(key, ..)| key)) {
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
        let rotary_dim = self.rotary_dim(head_dim)?;
        let context = required("context_length")?;
        let epsilon = of("attention.layer_norm_rms_epsilon");
        let epsilon = self.require(&epsilon, "a number above 0", self.number(&epsilon)?)?;
        let mut fields = Map::from_iter([
            ("model_type".to_owned(), json!(model_types[0])),
            ("vocab_size".to_owned(), json!(self.entry("token_embd.weight")?.info.shape[0])),
            ("hidden_size".to_owned(), json!(hidden)),
            ("intermediate_size".to_owned(), json!(required("feed_forward_length")?)),
            ("num_hidden_layers".to_owned(), json!(required("block_count")?)),
            ("num_attention_heads".to_owned(), json!(heads)),
            ("num_key_value_heads".to_owned(), json!(self.count("attention.head_count_kv")?)),
            ("head_dim".to_owned(), json!(head_dim)),
            ("max_position_embeddings".to_owned(), json!(context)),
            ("rms_norm_eps".to_owned(), json!(epsilon)),
            ("rope_theta".to_owned(), json!(self.rope_theta()?)),
            ("rope_scaling".to_owned(), self.rope_scaling(rotary_dim, context)?),
            ("attention_bias".to_owned(), json!(has("blk.0.attn_q.bias"))),
            ("tie_word_embeddings".to_owned(), json!(!has("output.weight"))),
            ("mlp_bias".to_owned(), json!(has("blk.0.ffn_gate.bias"))),
            ("hidden_act".to_owned(), json!("silu")),
            ("bos_token_id".to_owned(), json!(self.unsigned("tokenizer.ggml.bos_token_id")?)),
            ("eos_token_id".to_owned(), json!(self.end_tokens()?)),
        ]);
        if rotary_dim != head_dim {
            // The half makes sure that the product is not rounded to less.
            let part = (rotary_dim as f64 + 0.5) / head_dim as f64;
            fields.insert("partial_rotary_factor".to_owned(), json!(part));
        }
        if has_factors {
            fields.extend(self.factors(head_dim)?);
        }
        // No window is 0 in Phi-3's files.
        const WINDOW: &str = "attention.sliding_window";
        let window = match self.get(&of(WINDOW)).and_then(Value::as_unsigned) {
            Some(0) => None,
            _ => self.count(WINDOW)?,
        };
        fields.insert("sliding_window".to_owned(), json!(window));
        fields.insert("use_sliding_window".to_owned(), json!(window.is_some()));
        // The architecture `llama` is Mistral's too, which alone has windows.
        if window.is_some() && architecture == "llama" {
            fields.insert("model_type".to_owned(), json!("mistral"));
        }
        if let Some(beta) = beta {
            fields.insert("model_type".to_owned(), json!("ministral3"));
            fields["rope_scaling"]["llama_4_scaling_beta"] = json!(beta);
        }
        JsonObject::parse(&self.path, &Json::Object(fields).to_string())
    }

    fn head_dim(&self, default: usize) -> Result<usize> {
        let dim = self.count("attention.key_length")?.unwrap_or(default);
        match self.count("attention.value_length")? {
            Some(other) if other != dim => {
                let key = self.own("attention.value_length")?;
                Err(self.key_fault(&key, &format!("{dim}, the width of a key"), other))
            }
            _ => Ok(dim),
        }
    }

    /// Dimensions of a head that are rotated: in Phi-3 maybe a part of it.
    fn rotary_dim(&self, head_dim: usize) -> Result<usize> {
        const KEY: &str = "rope.dimension_count";
        let dim = self.count(KEY)?.unwrap_or(head_dim);
        if dim == head_dim || dim < head_dim && self.architecture()?.has_rotary_part {
            return Ok(dim);
        }
        Err(self.key_fault(&self.own(KEY)?, &format!("{head_dim}, a head's width"), dim))
    }

    fn rope_theta(&self) -> Result<f64> {
        Ok(self.number(&self.own("rope.freq_base")?)?.unwrap_or(10_000.0))
    }

    /// Granite's factors. Scores have the usual one where the file has none.
    fn factors(&self, head_dim: usize) -> Result<Map<String, Json>> {
        let rotates = self.own("rope.scaling.finetuned")?;
        if self.flag(&rotates)? == Some(false) {
            return Err(self.key_fault(&rotates, "absent or true: layers rotate", false));
        }
        let mut fields = Map::new();
        fields.insert("attention_multiplier".to_owned(), json!((head_dim as f64).powf(-0.5)));
        for (key, field, _) in FACTORS {
            if let Some(factor) = self.number(&self.own(key)?)?.filter(|factor| *factor != 0.0) {
                fields.insert(field.to_owned(), json!(factor));
            }
        }
        Ok(fields)
    }

    fn rope_scaling(&self, rotary_dim: usize, context: usize) -> Result<Json> {
        let of = |key: &str| self.own(&format!("rope.{key}"));
        let kind = of("scaling.type")?;
        let factor = match self.number(&of("scaling.factor")?)? {
            None => self.number(&of("scale_linear")?)?,
            factor => factor,
        };
        let original = self.count("rope.scaling.original_context_length")?;
        let attention = self.number(&of("scaling.attn_factor")?)?.filter(|factor| *factor != 1.0);
        let [short, long] = SHORT_AND_LONG;
        match (self.text(&kind)?, factor) {
            (None | Some("longrope"), _) if self.contains(long) => {
                let factors = |name: &str| {
                    let tensor = self.entry(name)?;
                    self.mapped(tensor, &tensor.info.shape).to_f32()
                };
                Ok(json!({
                    "rope_type": "longrope", "original_max_position_embeddings": original.unwrap_or(context),
                    "short_factor": factors(short)?, "long_factor": factors(long)?,
                    "attention_factor": attention.unwrap_or(1.0),
                }))
            }
            _ if self.contains(FREQUENCIES) => self.llama3_scaling(rotary_dim, context),
            (None | Some("none" | "linear"), None) | (Some("none"), _) => Ok(Json::Null),
            (None | Some("linear"), factor) => Ok(json!({"rope_type": "linear", "factor": factor})),
            (Some("yarn"), factor) => Ok(json!({
                "rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original,
                // GGUF's multiplies the one that is derived, and does not replace it.
                "attention_factor": attention
                    .map(|own| own * (0.1 * factor.unwrap_or(1.0).max(1.0).ln() + 1.0)),
                "mscale": 1.0, "mscale_all_dim": self.number(&self.own(LOG_MULTIPLIER)?)?,
                "beta_fast": self.number(&of("scaling.yarn_beta_fast")?)?,
                "beta_slow": self.number(&of("scaling.yarn_beta_slow")?)?,
            })),
            (Some(other), _) => {
                let expected = "none, linear, yarn, or longrope with tensors of factors";
                Err(self.key_fault(&kind, expected, other))
            }
        }
    }

    /// Llama 3.1's scaling, of which GGUF has the factors of the wavelengths, but not what they come from.
    ///
    /// All published models have the same constants but for the factor, which is that of the longest wave.
    fn llama3_scaling(&self, rotary_dim: usize, context: usize) -> Result<Json> {
        let tensor = self.entry(FREQUENCIES)?;
        let factors = self.mapped(tensor, &tensor.info.shape).to_f32()?;
        let factor = f64::from(factors.last().copied().unwrap_or(1.0));
        if factors.iter().all(|factor| *factor == 1.0) {
            return Ok(Json::Null);
        }
        let theta = self.rope_theta()?;
        let original = context.min(8192);
        let expected =
            |index| llama3_factor(theta, rotary_dim, index, original, factor, (1.0, 4.0));
        let near = |(index, found): (usize, &f32)| {
            (f64::from(*found) / expected(index) - 1.0).abs() < 1e-3
        };
        if factors.len() != rotary_dim / 2 || !factors.iter().enumerate().all(near) {
            let expected = format!("Llama 3.1's factors of {} wavelengths", rotary_dim / 2);
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
        let of_rope = match c.rope_scaling {
            RopeScaling::LongRope { .. } => &SHORT_AND_LONG[..],
            _ => &[FREQUENCIES],
        };
        // Angles that every model computes itself.
        let is_angles =
            |name: &str| of_rope.contains(&name) || name.ends_with(".attn_rot_embd.weight");
        let is_read = |name: &&str| asked.contains(*name) || is_angles(name);
        reads::unread(&self.path, self.names().filter(|name| !is_read(name)), ignore)
    }
}
