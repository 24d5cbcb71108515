use std::ops::Range;

use crate::checkpoint::safetensors::Tensors;
use crate::decoder::config::ModelConfig;
use crate::decoder::shard::Shard;
use crate::device::{Device, LinearWeights, Load};
use crate::{Error, Result};

/// A weight and its optional bias.
pub(crate) struct Linear<D: Device> {
    pub(crate) weight: D::Matrix,
    pub(crate) bias: Option<D::Vector>,
}

/// The weights of one layer, or of one device's part of it.
pub(crate) struct Layer<D: Device> {
    pub(crate) attention_norm: D::Vector,
    /// Queries, keys, values.
    pub(crate) qkv: D::Joined,
    /// Of each head's queries and keys, before they are rotated.
    pub(crate) head_norms: Option<[D::Vector; 2]>,
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
        weights: &dyn Tensors,
        index: usize,
        part: &LayerPart,
    ) -> Result<Self> {
        let names = &c.tensor_names;
        let (hidden, inner) = (c.hidden_size, c.intermediate_size);
        let (q, kv) = (c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim);
        let norm = |name: &str, width: usize| {
            device.vector(weights.tensor(&names.of_layer(index, name), &[width])?)
        };
        let tensor = |name: &str, kind: &str, shape: &[usize]| {
            weights.tensor(&(names.of_layer(index, name) + kind), shape)
        };
        let some = |name: &str, out: usize, rows: &[Range<usize>], has_bias: bool| {
            Ok::<_, Error>(LinearWeights {
                weight: tensor(name, ".weight", &[out, hidden])?.rows(rows)?,
                bias: match has_bias {
                    true => Some(tensor(name, ".bias", &[out])?.rows(rows)?),
                    false => None,
                },
            })
        };
        let sum = |name: &str, input: usize, columns: &[Range<usize>], has_bias: bool| {
            let weight = tensor(name, ".weight", &[hidden, input])?.columns(columns)?;
            let bias = match has_bias && part.brings_residual {
                true => Some(device.vector(tensor(name, ".bias", &[hidden])?)?),
                false => None,
            };
            Ok::<_, Error>(Linear { weight: device.linear_matrix(weight)?, bias })
        };
        Ok(Self {
            attention_norm: norm(&names.attention_norm, hidden)?,
            qkv: device.join(vec![
                some(&names.query, q, &part.query, c.qkv_bias)?,
                some(&names.key, kv, &part.kv, c.qkv_bias)?,
                some(&names.value, kv, &part.kv, c.qkv_bias)?,
            ])?,
            head_norms: match c.qk_norm {
                true => {
                    Some([norm(&names.query_norm, c.head_dim)?, norm(&names.key_norm, c.head_dim)?])
                }
                false => None,
            },
            o: sum(&names.attention_output, q, &part.query, c.o_bias)?,
            mlp_norm: norm(&names.mlp_norm, hidden)?,
            gate_up: device.join(vec![
                some(&names.gate, inner, &part.inner, c.mlp_bias)?,
                some(&names.up, inner, &part.inner, c.mlp_bias)?,
            ])?,
            down: sum(&names.down, inner, &part.inner, c.mlp_bias)?,
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
