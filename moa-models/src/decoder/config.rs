use std::borrow::Cow;

use moa_core::{MAX_LENGTH, ModelShape, Plan};

use crate::decoder::names::TensorNames;
use crate::decoder::rope_scaling::RopeScaling;
use crate::error::{Error, Result};

/// What may differ from layer to layer of one model.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LayerKind {
    /// The layer sees only so many recent keys (`q - key < window`), of which a plan may hide more.
    pub sliding_window: Option<usize>,
    /// Queries and keys are rotated by their positions.
    pub rotary: bool,
}

impl Default for LayerKind {
    /// A layer that sees all keys and knows where they are.
    fn default() -> Self {
        Self { sliding_window: None, rotary: true }
    }
}

/// A factor of queries that grows with their position, as Llama 4 has it: `1 + beta * ln(1 + floor(position / original))`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct QueryScaling {
    /// How much it grows.
    pub beta: f64,
    /// Positions before it grows, and between two steps: the context that the model was pretrained on.
    pub original: usize,
}

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
    /// Dimensions of a head that are rotated, its first ones; all of them if `None`.
    pub rotary_dim: Option<usize>,
    /// What each layer is, where they are not all of the default kind; else empty.
    pub layer_kinds: Vec<LayerKind>,
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
    /// Factor of attention scores; `1 / sqrt(head_dim)` if `None`.
    pub attention_multiplier: Option<f64>,
    /// Factor of rotated queries by their position; 1 if `None`.
    pub query_scaling: Option<QueryScaling>,
    /// Factor of the embedding, 1 in most models.
    pub embedding_multiplier: f64,
    /// Factor of what attention and feed-forward part add to the residual stream, 1 in most models.
    pub residual_multiplier: f64,
    /// Divides the logits, 1 in most models.
    pub logits_scaling: f64,
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
        self.rope_scaling.context_length(self.max_position_embeddings).min(MAX_LENGTH)
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

    /// What a layer is.
    #[must_use]
    pub fn layer_kind(&self, layer: usize) -> LayerKind {
        self.layer_kinds.get(layer).copied().unwrap_or_default()
    }

    /// Dimensions of a head that are rotated.
    #[must_use]
    pub fn rotated_dims(&self) -> usize {
        self.rotary_dim.unwrap_or(self.head_dim)
    }

    /// A plan as this model can follow it: where layers have sliding windows, spans end there
    /// ([`Plan::within`]). A [`Decoder`](crate::Decoder) does this with every plan it is given; what a plan costs
    /// this model is what the result costs.
    ///
    /// # Errors
    /// [`Error::Core`] with [`ShapeMismatch`](moa_core::Error::ShapeMismatch) if the plan is for a model of other
    /// dimensions, with [`Invalid`](moa_core::Error::Invalid) if the configuration was changed by hand into
    /// something invalid.
    pub fn windowed<'a>(&self, plan: &'a Plan) -> Result<Cow<'a, Plan>> {
        plan.check_shape(&self.shape())?;
        let windows = self.windows();
        match windows.is_empty() {
            true => Ok(Cow::Borrowed(plan)),
            false => Ok(Cow::Owned(plan.clone().within(windows)?)),
        }
    }

    /// Most recent keys that each layer itself sees; none where no layer has a sliding window.
    #[must_use]
    pub fn windows(&self) -> Vec<Option<usize>> {
        let windows = self.layer_kinds.iter().map(|kind| kind.sliding_window);
        if windows.clone().all(|window| window.is_none()) { Vec::new() } else { windows.collect() }
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
        // Far beyond any model, and so small that no product of them is beyond 64 bits.
        let most = [1usize << 28, 1 << 20, 1 << 24, 1 << 14, 1 << 14, 1 << 14, 1 << 14, MAX_LENGTH];
        if let Some(((name, n), most)) =
            counts.into_iter().zip(most).find(|((_, n), most)| n > most)
        {
            return Some((name, format!("at most {most}"), n.to_string()));
        }
        let (heads, kv_heads) = (self.num_attention_heads, self.num_key_value_heads);
        if let Err(moa_core::Error::Invalid { expected, got, .. }) = self.shape().validate()
            && heads.is_multiple_of(kv_heads)
        {
            return Some(("num_attention_heads", expected, got));
        }
        if !heads.is_multiple_of(kv_heads) {
            let expected = format!("a divisor of num_attention_heads ({heads})");
            return Some(("num_key_value_heads", expected, kv_heads.to_string()));
        }
        if !self.head_dim.is_multiple_of(2) {
            return Some(("head_dim", "even, for rotary pairs".into(), self.head_dim.to_string()));
        }
        let (head_dim, rotated) = (self.head_dim, self.rotated_dims());
        if !(2..=head_dim).contains(&rotated) || !rotated.is_multiple_of(2) {
            let expected = format!("even, from 2 to head_dim ({head_dim})");
            return Some(("rotary_dim", expected, rotated.to_string()));
        }
        let above_0 = [
            ("rms_norm_eps", self.rms_norm_eps),
            ("attention_multiplier", self.attention_multiplier.unwrap_or(1.0)),
            ("embedding_multiplier", self.embedding_multiplier),
            ("residual_multiplier", self.residual_multiplier),
            ("logits_scaling", self.logits_scaling),
        ];
        if let Some((name, x)) = above_0.into_iter().find(|(_, x)| !(x.is_finite() && *x > 0.0)) {
            return Some((name, "a finite number above 0".into(), x.to_string()));
        }
        if let Some(QueryScaling { beta, original }) = self.query_scaling
            && !(beta.is_finite() && beta >= 0.0 && original > 0)
        {
            let expected = "a finite beta of at least 0, and 1 position or more";
            return Some(("query_scaling", expected.into(), format!("{beta}, {original}")));
        }
        let (layers, kinds) = (self.num_hidden_layers, self.layer_kinds.len());
        if kinds != 0 && kinds != layers {
            return Some(("layer_kinds", format!("none or {layers}"), kinds.to_string()));
        }
        if self.layer_kinds.iter().any(|kind| kind.sliding_window == Some(0)) {
            return Some(("sliding_window", "at least 1".into(), "0".into()));
        }
        if let RopeScaling::LongRope { short_factor, long_factor, .. } = &self.rope_scaling {
            let both = [("short_factor", short_factor), ("long_factor", long_factor)];
            if let Some((name, x)) = both.into_iter().find(|(_, x)| x.len() != rotated / 2) {
                return Some((name, format!("{} numbers", rotated / 2), x.len().to_string()));
            }
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
