use moa_core::ModelShape;

use crate::decoder::names::TensorNames;
use crate::decoder::rope_scaling::RopeScaling;
use crate::error::{Error, Result};

/// What a [`Decoder`](crate::Decoder) needs to know of a model: its dimensions, constants and tensor
/// names, which a [`Family`](crate::Family) reads from a `config.json`.
///
/// A value that was read is checked: all counts are positive, query heads are a multiple of KV heads,
/// `head_dim` is even. A value changed by hand can be checked with [`validate`](Self::validate).
#[derive(Clone, Debug, PartialEq)]
pub struct ModelConfig {
    /// Rows of the embedding and of the output head.
    pub vocab_size: usize,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Width inside the feed-forward layer.
    pub intermediate_size: usize,
    /// Decoder layers.
    pub num_hidden_layers: usize,
    /// Query heads.
    pub num_attention_heads: usize,
    /// KV heads, each shared by `num_attention_heads / num_key_value_heads` query heads.
    pub num_key_value_heads: usize,
    /// Width of one head; `hidden_size / num_attention_heads` when the file does not say.
    pub head_dim: usize,
    /// Added to the mean square in RMSNorm.
    pub rms_norm_eps: f64,
    /// Base of the rotary frequencies; 10000 when the file does not say.
    pub rope_theta: f64,
    /// How the rotary frequencies are stretched.
    pub rope_scaling: RopeScaling,
    /// The file's `max_position_embeddings`; see [`context_length`](Self::context_length) for the
    /// number of tokens that may really be used.
    pub max_position_embeddings: usize,
    /// The output head is the embedding.
    pub tie_word_embeddings: bool,
    /// The linear layers of queries, keys and values have a bias.
    pub qkv_bias: bool,
    /// The linear layer after attention has a bias.
    pub o_bias: bool,
    /// The three linear layers of the feed-forward part have a bias.
    pub mlp_bias: bool,
    /// Each head's queries and keys pass an RMS norm before they are rotated.
    pub qk_norm: bool,
    /// Begin-of-sequence token.
    pub bos_token_id: Option<u32>,
    /// Tokens that end a generation; may be empty.
    pub eos_token_ids: Vec<u32>,
    /// What the checkpoint calls its tensors.
    pub tensor_names: TensorNames,
}

impl ModelConfig {
    /// Checks what reading a `config.json` checks, for a value changed by hand.
    ///
    /// # Errors
    /// [`Error::Invalid`] with the first field that is out of its range.
    pub fn validate(&self) -> Result<()> {
        match self.fault() {
            None => Ok(()),
            Some((what, expected, got)) => Err(Error::invalid(what, expected, got)),
        }
    }

    /// The most tokens, prompt and answer together, that one sequence may hold.
    ///
    /// This is `max_position_embeddings`, extended by the rotary scaling where the file gives the
    /// pretraining length: times `factor` for linear and dynamic (Vicuna 16k: 4096 times 4), and
    /// `original_max_position_embeddings * factor` for YaRN. Llama 3.1's is extended already.
    /// vLLM derives the same; transformers enforces nothing.
    #[must_use]
    pub fn context_length(&self) -> usize {
        self.rope_scaling.context_length(self.max_position_embeddings)
    }

    /// Whether the model's context holds so many tokens.
    pub(crate) fn check_context(&self, asked: usize) -> Result<()> {
        let limit = self.context_length();
        match asked <= limit {
            true => Ok(()),
            false => Err(Error::ContextExceeded { asked, limit }),
        }
    }

    /// Weights of the model, biases not counted.
    #[must_use]
    pub fn parameters(&self) -> u64 {
        let tables = if self.tie_word_embeddings { 1 } else { 2 };
        let norms = 2 * self.num_hidden_layers + 1;
        let rest = self.hidden_size * (tables * self.vocab_size + norms);
        self.linear_parameters() + rest as u64
    }

    /// Those of linear layers, output matrix not counted.
    pub(crate) fn linear_parameters(&self) -> u64 {
        let heads = 2 * (self.num_attention_heads + self.num_key_value_heads) * self.head_dim;
        let layer = self.hidden_size * (heads + 3 * self.intermediate_size);
        (self.num_hidden_layers * layer) as u64
    }

    /// Outputs of those layers.
    pub(crate) fn linear_outputs(&self) -> u64 {
        let heads = self.num_attention_heads + 2 * self.num_key_value_heads;
        let layer = heads * self.head_dim + 2 * self.hidden_size + 2 * self.intermediate_size;
        (self.num_hidden_layers * layer) as u64
    }

    /// The dimensions that plans depend on.
    #[must_use]
    pub fn shape(&self) -> ModelShape {
        ModelShape {
            layers: self.num_hidden_layers,
            query_heads: self.num_attention_heads,
            kv_heads: self.num_key_value_heads,
            head_dim: self.head_dim,
        }
    }

    /// Query heads that share one KV head.
    #[must_use]
    pub fn group_size(&self) -> usize {
        self.num_attention_heads / self.num_key_value_heads
    }

    /// The first field that is out of its range, with the range and the value.
    pub(crate) fn fault(&self) -> Option<(&'static str, String, String)> {
        let counts = [
            ("vocab_size", self.vocab_size),
            ("hidden_size", self.hidden_size),
            ("intermediate_size", self.intermediate_size),
            ("num_hidden_layers", self.num_hidden_layers),
            ("num_attention_heads", self.num_attention_heads),
            ("num_key_value_heads", self.num_key_value_heads),
            ("head_dim", self.head_dim),
            ("max_position_embeddings", self.max_position_embeddings),
        ];
        if let Some((name, n)) = counts.into_iter().find(|(_, n)| *n == 0) {
            return Some((name, "at least 1".into(), n.to_string()));
        }
        let (heads, kv_heads) = (self.num_attention_heads, self.num_key_value_heads);
        if !heads.is_multiple_of(kv_heads) {
            let expected = format!("a divisor of num_attention_heads ({heads})");
            return Some(("num_key_value_heads", expected, kv_heads.to_string()));
        }
        if !self.head_dim.is_multiple_of(2) {
            return Some(("head_dim", "even, for rotary pairs".into(), self.head_dim.to_string()));
        }
        if !(self.rms_norm_eps.is_finite() && self.rms_norm_eps > 0.0) {
            let got = self.rms_norm_eps.to_string();
            return Some(("rms_norm_eps", "a finite number above 0".into(), got));
        }
        if !(self.rope_theta.is_finite() && self.rope_theta > 1.0) {
            let got = self.rope_theta.to_string();
            return Some(("rope_theta", "a finite number above 1".into(), got));
        }
        let below = format!("below vocab_size ({})", self.vocab_size);
        let outside = |id: &u32| *id as usize >= self.vocab_size;
        if let Some(id) = self.bos_token_id.filter(outside) {
            return Some(("bos_token_id", below, id.to_string()));
        }
        let eos = self.eos_token_ids.iter().copied().find(outside);
        eos.map(|id| ("eos_token_id", below, id.to_string()))
    }
}
