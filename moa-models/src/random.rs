//! Models of random weights, for measurements of speed and memory.

use crate::config::LlamaConfig;
use crate::llama::{Layer, Linear, Llama, weight_bytes};
use crate::ops::RandomWeights;
use crate::{Error, Result};

impl<O: RandomWeights> Llama<O> {
    /// A model of random weights made on the device: as fast and as large as one that was trained.
    ///
    /// # Errors
    /// [`Error::Invalid`] if the model has biases, which are not made up; if the memory cannot be
    /// had.
    pub fn random(ops: O, config: LlamaConfig, seed: u32) -> Result<Self> {
        config.validate()?;
        if config.attention_bias || config.mlp_bias {
            return Err(Error::invalid("random weights", "of a model without biases", "biases"));
        }
        ops.check_room("weights", weight_bytes(&ops, &config))?;
        let c = &config;
        let seed_of = |number: usize| seed.wrapping_mul(0x9e37).wrapping_add(number as u32);
        let matrix = |out, input, number| ops.random_matrix(out, input, seed_of(number));
        let joined =
            |outs: &[usize], input, number| ops.random_joined(outs, input, seed_of(number));
        let (hidden, inner) = (c.hidden_size, c.intermediate_size);
        let (q, kv) = (c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim);
        let linear = |out, input, number| -> Result<Linear<O>> {
            Ok(Linear { weight: ops.random_linear(out, input, seed_of(number))?, bias: None })
        };
        let layer = |index: usize| -> Result<Layer<O>> {
            let first = 4 * index + 2;
            Ok(Layer {
                attention_norm: ops.ones(hidden)?,
                qkv: joined(&[q, kv, kv], hidden, first)?,
                o: linear(hidden, q, first + 1)?,
                mlp_norm: ops.ones(hidden)?,
                gate_up: joined(&[inner, inner], hidden, first + 2)?,
                down: linear(hidden, inner, first + 3)?,
            })
        };
        let layers = (0..c.num_hidden_layers).map(layer).collect::<Result<_>>()?;
        let embedding = matrix(c.vocab_size, hidden, 0)?;
        let lm_head = match c.tie_word_embeddings {
            true => None,
            false => Some(matrix(c.vocab_size, hidden, 1)?),
        };
        let norm = ops.ones(hidden)?;
        let fingerprint = format!("random-{seed}");
        Ok(Self { ops, config, embedding, layers, norm, lm_head, fingerprint })
    }
}
