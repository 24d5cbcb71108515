//! What GGUF files say of each kind of model: one table for those who read them and those who write them.

use crate::decoder::config::ModelConfig;
use crate::decoder::names::TensorNames;

/// What GGUF calls a kind of model, and what its files have of their own.
#[derive(Debug)]
pub(super) struct Architecture {
    pub(super) name: &'static str,
    /// The `model_type`s that are written so; the first one is what is read, unless a key says otherwise.
    pub(super) model_types: &'static [&'static str],
    /// The two rows of a rotary pair lie side by side in queries and keys, and not half a head apart.
    pub(super) by_pair: bool,
    /// Queries, keys and values are one tensor, and gate and up are.
    pub(super) is_joined: bool,
    /// A part of each head may be rotated.
    pub(super) has_rotary_part: bool,
    /// Files have [`FACTORS`].
    pub(super) has_factors: bool,
}

const LLAMA: Architecture = Architecture {
    name: "llama",
    model_types: &["llama", "mistral", "ministral"],
    by_pair: true,
    is_joined: false,
    has_rotary_part: false,
    has_factors: false,
};

/// A model type is written as the first architecture that has it.
pub(super) const ARCHITECTURES: [Architecture; 7] = [
    LLAMA,
    Architecture { name: "mistral3", model_types: &["mistral", "ministral3"], ..LLAMA },
    Architecture { name: "smollm3", model_types: &["smollm3"], ..LLAMA },
    Architecture { name: "granite", model_types: &["granite"], has_factors: true, ..LLAMA },
    Architecture { name: "qwen2", model_types: &["qwen2"], by_pair: false, ..LLAMA },
    Architecture { name: "qwen3", model_types: &["qwen3"], by_pair: false, ..LLAMA },
    Architecture {
        name: "phi3",
        model_types: &["phi3"],
        by_pair: false,
        is_joined: true,
        has_rotary_part: true,
        ..LLAMA
    },
];

/// Factors of rotary wavelengths, where the model has some.
pub(super) const FREQUENCIES: &str = "rope_freqs.weight";
/// Those of short and of long sequences, where they differ.
pub(super) const SHORT_AND_LONG: [&str; 2] =
    ["rope_factors_short.weight", "rope_factors_long.weight"];

/// Ministral 3's factor of queries, in files of Mistral's architecture.
pub(super) const QUERY_SCALING: &str = "attention.temperature_scale";
/// What YaRN's factor of attention is divided by, as `mscale_all_dim`.
pub(super) const LOG_MULTIPLIER: &str = "rope.scaling.yarn_log_multiplier";

/// A factor's key, what a `config.json` calls it, and its value.
type Factor = (&'static str, &'static str, fn(&ModelConfig) -> f64);

/// Factors that Granite alone has.
pub(super) const FACTORS: [Factor; 4] = [
    ("attention.scale", "attention_multiplier", |c| c.attention_multiplier.unwrap_or(1.0)),
    ("embedding_scale", "embedding_multiplier", |c| c.embedding_multiplier),
    ("residual_scale", "residual_multiplier", |c| c.residual_multiplier),
    ("logit_scale", "logits_scaling", |c| c.logits_scaling),
];

impl Architecture {
    /// What the tensors of a decoder are called.
    pub(super) fn tensor_names(&self) -> TensorNames {
        let joined = |joined: &'static str, own: &'static str| {
            if self.is_joined { joined.into() } else { own.into() }
        };
        TensorNames {
            embedding: "token_embd.weight".into(),
            output: "output.weight".into(),
            norm: "output_norm.weight".into(),
            layers: "blk.{}.".into(),
            attention_norm: "attn_norm.weight".into(),
            query: joined("attn_qkv", "attn_q"),
            key: joined("attn_qkv", "attn_k"),
            value: joined("attn_qkv", "attn_v"),
            query_norm: "attn_q_norm.weight".into(),
            key_norm: "attn_k_norm.weight".into(),
            attention_output: "attn_output".into(),
            mlp_norm: "ffn_norm.weight".into(),
            gate: joined("ffn_up", "ffn_gate"),
            up: "ffn_up".into(),
            down: "ffn_down".into(),
        }
    }
}
