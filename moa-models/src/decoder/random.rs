//! Models of random weights, for measurements of speed and memory.

use crate::decoder::block::{Layer, Linear};
use crate::decoder::config::ModelConfig;
use crate::decoder::model::Decoder;
use crate::decoder::shard::Shard;
use crate::device::{Math, RandomWeights};
use crate::{Error, Result};

impl<D: RandomWeights + Math> Decoder<D> {
    /// A model of random weights made on the device: as fast and as large as one that was trained.
    ///
    /// # Errors
    /// [`Error::Invalid`] if the model has biases, which are not made up; if the memory cannot be
    /// had.
    pub fn random(device: D, config: ModelConfig, seed: u32) -> Result<Self> {
        Self::random_part(device, config, seed, None)
    }

    /// One rank's part of a model of random weights: of the same sizes as one that was loaded, but not
    /// the numbers that [`random`](Self::random) makes of the same seed.
    ///
    /// # Errors
    /// As [`random`](Self::random) and [`load_shard`](Self::load_shard).
    pub fn random_shard(
        device: D,
        config: ModelConfig,
        seed: u32,
        shard: Shard<D>,
    ) -> Result<Self> {
        Self::random_part(device, config, seed, Some(shard))
    }

    fn random_part(
        device: D,
        config: ModelConfig,
        seed: u32,
        shard: Option<Shard<D>>,
    ) -> Result<Self> {
        config.validate()?;
        if config.attention_bias || config.mlp_bias {
            return Err(Error::invalid("random weights", "of a model without biases", "biases"));
        }
        let local = Shard::local_shape(shard.as_ref(), &config)?;
        device.check_room("weights", Shard::weights(shard.as_ref(), &config).bytes(&device))?;
        let c = &config;
        let seed_of = |number: usize| seed.wrapping_mul(0x9e37).wrapping_add(number as u32);
        let matrix = |out, input, number| device.random_matrix(out, input, seed_of(number));
        let joined =
            |outs: &[usize], input, number| device.random_joined(outs, input, seed_of(number));
        let (hidden, inner) = (c.hidden_size, Shard::inner(shard.as_ref(), c));
        let (q, kv) = (local.query_heads * c.head_dim, local.kv_heads * c.head_dim);
        let linear = |out, input, number| -> Result<Linear<D>> {
            Ok(Linear { weight: device.random_linear(out, input, seed_of(number))?, bias: None })
        };
        let layer = |index: usize| -> Result<Layer<D>> {
            let first = 4 * index + 2;
            Ok(Layer {
                attention_norm: device.ones(hidden)?,
                qkv: joined(&[q, kv, kv], hidden, first)?,
                o: linear(hidden, q, first + 1)?,
                mlp_norm: device.ones(hidden)?,
                gate_up: joined(&[inner, inner], hidden, first + 2)?,
                down: linear(hidden, inner, first + 3)?,
            })
        };
        let layers = (0..c.num_hidden_layers).map(layer).collect::<Result<_>>()?;
        let embedding = matrix(c.vocab_size, hidden, 0)?;
        let lm_head = match &shard {
            None if c.tie_word_embeddings => None,
            None => Some(matrix(c.vocab_size, hidden, 1)?),
            Some(shard) => Some(matrix(shard.vocabulary(c).len(), hidden, 1)?),
        };
        let norm = device.ones(hidden)?;
        let fingerprint = format!("random-{seed}");
        Ok(Self { device, config, embedding, layers, norm, lm_head, fingerprint, shard, local })
    }
}
