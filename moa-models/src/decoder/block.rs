use std::ops::Range;

use crate::checkpoint::safetensors::Weights;
use crate::decoder::config::ModelConfig;
use crate::decoder::shard::Shard;
use crate::device::{Device, LinearWeights, Load};
use crate::{Error, Result};

/// A weight and its optional bias.
pub(crate) struct Linear<D: Device> {
    pub(crate) weight: D::Matrix,
    pub(crate) bias: Option<D::Vector>,
}

impl<D: Load> Linear<D> {
    fn load(device: &D, LinearWeights { weight, bias }: LinearWeights) -> Result<Self> {
        let bias = bias.map(|bias| device.vector(bias)).transpose()?;
        Ok(Self { weight: device.linear_matrix(weight)?, bias })
    }
}

pub(crate) struct Layer<D: Device> {
    pub(crate) attention_norm: D::Vector,
    /// Queries, keys, values.
    pub(crate) qkv: D::Joined,
    pub(crate) o: Linear<D>,
    pub(crate) mlp_norm: D::Vector,
    /// Gate and up.
    pub(crate) gate_up: D::Joined,
    pub(crate) down: Linear<D>,
}

impl<D: Load> Layer<D> {
    /// Outputs of q, k, v, gate and up that `part` names, and the inputs of o and down that come of
    /// them.
    pub(crate) fn load(
        device: &D,
        c: &ModelConfig,
        weights: &Weights,
        index: usize,
        part: &LayerPart,
    ) -> Result<Self> {
        let name = |part: &str| format!("model.layers.{index}.{part}");
        let (hidden, inner) = (c.hidden_size, c.intermediate_size);
        let (q, kv) = (c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim);
        let norm = |part: &str| device.vector(weights.tensor(&name(part), &[hidden])?);
        let weight = |part: &str, out: usize, input: usize| {
            weights.tensor(&format!("{}.weight", name(part)), &[out, input])
        };
        let bias = |part: &str, out: usize| weights.tensor(&format!("{}.bias", name(part)), &[out]);
        let some = |part: &str, out: usize, rows: &[Range<usize>], has_bias: bool| {
            Ok::<_, Error>(LinearWeights {
                weight: weight(part, out, hidden)?.rows(rows)?,
                bias: match has_bias {
                    true => Some(bias(part, out)?.rows(rows)?),
                    false => None,
                },
            })
        };
        let sum = |name: &str, input: usize, columns: &[Range<usize>], has_bias: bool| {
            let weight = weight(name, hidden, input)?.columns(columns)?;
            let bias = match has_bias && part.brings_residual {
                true => Some(bias(name, hidden)?),
                false => None,
            };
            Linear::load(device, LinearWeights { weight, bias })
        };
        Ok(Self {
            attention_norm: norm("input_layernorm.weight")?,
            qkv: device.join(vec![
                some("self_attn.q_proj", q, &part.query, c.attention_bias)?,
                some("self_attn.k_proj", kv, &part.kv, c.attention_bias)?,
                some("self_attn.v_proj", kv, &part.kv, c.attention_bias)?,
            ])?,
            o: sum("self_attn.o_proj", q, &part.query, c.attention_bias)?,
            mlp_norm: norm("post_attention_layernorm.weight")?,
            gate_up: device.join(vec![
                some("mlp.gate_proj", inner, &part.inner, c.mlp_bias)?,
                some("mlp.up_proj", inner, &part.inner, c.mlp_bias)?,
            ])?,
            down: sum("mlp.down_proj", inner, &part.inner, c.mlp_bias)?,
        })
    }
}

/// Rows and columns of one layer's weights that are here.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct LayerPart {
    /// Of queries and attention's output.
    pub(crate) query: Vec<Range<usize>>,
    /// Of keys and values.
    pub(crate) kv: Vec<Range<usize>>,
    /// Of gate and up.
    pub(crate) inner: Vec<Range<usize>>,
    /// One rank brings the residual stream and the biases of the sums.
    pub(crate) brings_residual: bool,
}

impl LayerPart {
    pub(crate) fn of<D: Device>(shard: Option<&Shard<D>>, c: &ModelConfig, layer: usize) -> Self {
        let every: Vec<usize> = (0..c.num_key_value_heads).collect();
        let (heads, rank) = match shard {
            Some(shard) => (shard.heads(layer), shard.rank()),
            None => (&every[..], 0),
        };
        let of_width = |width: usize| heads.iter().map(|h| h * width..(h + 1) * width).collect();
        let inner = Shard::inner(shard, c);
        let inner = rank * inner..(rank + 1) * inner;
        Self {
            query: of_width(c.group_size() * c.head_dim),
            kv: of_width(c.head_dim),
            inner: vec![inner],
            brings_residual: rank == 0,
        }
    }
}
