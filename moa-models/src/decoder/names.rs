use std::borrow::Cow;
use std::collections::BTreeSet;

use crate::decoder::config::ModelConfig;

/// What a checkpoint calls the tensors of a decoder: a table that a family fills in.
///
/// The default is what Hugging Face's Llama and most families after it write. Names of a layer stand
/// behind `layers`, where `{}` is the number of the layer from 0. Names of linear layers are without
/// `.weight` and `.bias`, all others are whole. Where queries, keys and values have one name, or gate and up
/// have, one tensor holds their rows one after the other.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorNames {
    /// The embedding, `[vocab, hidden]`.
    pub embedding: Cow<'static, str>,
    /// The output matrix, `[vocab, hidden]`, unless it is the embedding.
    pub output: Cow<'static, str>,
    /// The norm after the last layer.
    pub norm: Cow<'static, str>,
    /// What stands before all names of a layer.
    pub layers: Cow<'static, str>,
    /// The norm before attention.
    pub attention_norm: Cow<'static, str>,
    /// The linear layer of queries.
    pub query: Cow<'static, str>,
    /// The linear layer of keys.
    pub key: Cow<'static, str>,
    /// The linear layer of values.
    pub value: Cow<'static, str>,
    /// The norm of each query head, where [`ModelConfig::qk_norm`](crate::ModelConfig::qk_norm) is set.
    pub query_norm: Cow<'static, str>,
    /// The norm of each key head, where [`ModelConfig::qk_norm`](crate::ModelConfig::qk_norm) is set.
    pub key_norm: Cow<'static, str>,
    /// The linear layer after attention.
    pub attention_output: Cow<'static, str>,
    /// The norm before the feed-forward part.
    pub mlp_norm: Cow<'static, str>,
    /// The linear layer whose output SiLU gates with.
    pub gate: Cow<'static, str>,
    /// The linear layer that is gated.
    pub up: Cow<'static, str>,
    /// The linear layer back to the residual stream.
    pub down: Cow<'static, str>,
}

impl Default for TensorNames {
    fn default() -> Self {
        Self {
            embedding: "model.embed_tokens.weight".into(),
            output: "lm_head.weight".into(),
            norm: "model.norm.weight".into(),
            layers: "model.layers.{}.".into(),
            attention_norm: "input_layernorm.weight".into(),
            query: "self_attn.q_proj".into(),
            key: "self_attn.k_proj".into(),
            value: "self_attn.v_proj".into(),
            query_norm: "self_attn.q_norm.weight".into(),
            key_norm: "self_attn.k_norm.weight".into(),
            attention_output: "self_attn.o_proj".into(),
            mlp_norm: "post_attention_layernorm.weight".into(),
            gate: "mlp.gate_proj".into(),
            up: "mlp.up_proj".into(),
            down: "mlp.down_proj".into(),
        }
    }
}

impl TensorNames {
    /// All tensors that a decoder of this configuration asks for.
    pub(crate) fn all(&self, c: &ModelConfig) -> BTreeSet<String> {
        let output = (!c.tie_word_embeddings).then_some(&self.output);
        let whole = [&self.embedding, &self.norm].into_iter().chain(output);
        let mut all: BTreeSet<String> = whole.map(|name| name.to_string()).collect();
        let linears = [
            (&self.query, c.qkv_bias),
            (&self.key, c.qkv_bias),
            (&self.value, c.qkv_bias),
            (&self.attention_output, c.o_bias),
            (&self.gate, c.mlp_bias),
            (&self.up, c.mlp_bias),
            (&self.down, c.mlp_bias),
        ];
        let head_norms = [&self.query_norm, &self.key_norm];
        let norms = [&self.attention_norm, &self.mlp_norm];
        let norms = norms.into_iter().chain(head_norms.into_iter().filter(|_| c.qk_norm));
        for layer in 0..c.num_hidden_layers {
            all.extend(norms.clone().map(|name| self.of_layer(layer, name)));
            for (name, bias) in linears {
                let ends = [".weight", ".bias"].into_iter().take(1 + usize::from(bias));
                all.extend(ends.map(|end| self.of_layer(layer, name) + end));
            }
        }
        all
    }

    /// The whole name of a tensor of a layer.
    pub(crate) fn of_layer(&self, layer: usize, name: &str) -> String {
        self.layers.replace("{}", &layer.to_string()) + name
    }
}
