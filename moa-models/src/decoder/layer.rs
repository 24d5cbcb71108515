use std::ops::Range;

use crate::checkpoint::safetensors::Tensors;
use crate::decoder::config::{LayerKind, ModelConfig};
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
    /// How many layers come before it.
    pub(crate) index: usize,
    pub(crate) kind: LayerKind,
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
        let norm =
            |name: &str, width: usize| weights.tensor(&names.of_layer(index, name), &[width]);
        let tensor = |name: &str, kind: &str, shape: &[usize]| {
            weights.tensor(&(names.of_layer(index, name) + kind), shape)
        };
        let some = |Rows { name, before, all }: Rows<'_>, rows: &[Range<usize>], has_bias| {
            let rows: Vec<_> = rows.iter().map(|r| before + r.start..before + r.end).collect();
            Ok::<_, Error>(LinearWeights {
                weight: tensor(name, ".weight", &[all, hidden])?.rows(&rows)?,
                bias: match has_bias {
                    true => Some(tensor(name, ".bias", &[all])?.rows(&rows)?),
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
        let head_norm = |name: &str| {
            let order = rotary_order(c, std::slice::from_ref(&(0..c.head_dim)));
            device.vector(norm(name, c.head_dim)?.rows(&order)?)
        };
        let [query, key, value] =
            Rows::of([(&names.query, q), (&names.key, kv), (&names.value, kv)]);
        let [gate, up] = Rows::of([(&names.gate, inner), (&names.up, inner)]);
        Ok(Self {
            index,
            kind: c.layer_kind(index),
            attention_norm: device.vector(norm(&names.attention_norm, hidden)?)?,
            qkv: device.join(vec![
                some(query, &rotary_order(c, &part.query), c.qkv_bias)?,
                some(key, &rotary_order(c, &part.kv), c.qkv_bias)?,
                some(value, &part.kv, c.qkv_bias)?,
            ])?,
            head_norms: match c.qk_norm {
                true => Some([head_norm(&names.query_norm)?, head_norm(&names.key_norm)?]),
                false => None,
            },
            o: sum(&names.attention_output, q, &part.query, c.o_bias)?,
            mlp_norm: device.vector(norm(&names.mlp_norm, hidden)?)?,
            gate_up: device.join(vec![
                some(gate, &part.inner, c.mlp_bias)?,
                some(up, &part.inner, c.mlp_bias)?,
            ])?,
            down: sum(&names.down, inner, &part.inner, c.mlp_bias)?,
        })
    }
}

/// Where a linear layer's rows are: in a tensor of its own, or between those of others in one of theirs.
struct Rows<'a> {
    name: &'a str,
    /// Rows of the tensor before the layer's own.
    before: usize,
    /// Rows of the tensor.
    all: usize,
}

impl<'a> Rows<'a> {
    /// Layers by their tensors' names and their outputs: those of equal names share a tensor, in this order.
    fn of<const N: usize>(layers: [(&'a str, usize); N]) -> [Self; N] {
        let rows = |name: &str, layers: &[(&str, usize)]| {
            layers.iter().filter(|(other, _)| *other == name).map(|(_, rows)| rows).sum()
        };
        std::array::from_fn(|at| {
            let name = layers[at].0;
            Self { name, before: rows(name, &layers[..at]), all: rows(name, &layers) }
        })
    }
}

/// Rows of queries or keys, in whole heads, in an order in which the half-split rotation of a head turns the
/// pairs of its first `rotary_dim` dimensions and comes upon the others in pairs that do not turn. Scores do not
/// depend on the order of dimensions, if queries and keys have the same.
fn rotary_order(c: &ModelConfig, heads: &[Range<usize>]) -> Vec<Range<usize>> {
    let (dim, turned) = (c.head_dim, c.rotated_dims());
    if turned == dim {
        return heads.to_vec();
    }
    let middle = turned + (dim - turned) / 2;
    let parts = [0..turned / 2, turned..middle, turned / 2..turned, middle..dim];
    let firsts = heads.iter().flat_map(|rows| rows.clone().step_by(dim));
    firsts.flat_map(|first| parts.clone().map(|p| first + p.start..first + p.end)).collect()
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
