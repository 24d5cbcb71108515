use crate::checkpoint::safetensors::Tensors;
use crate::decoder::config::ModelConfig;
use crate::decoder::shard::Shard;
use crate::device::Load;

/// Bytes of a device that weights take less because they stay in quantised blocks there, known before any of them is
/// read.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct BlockSavings {
    pub(crate) all: u64,
    /// Of the embedding, or of what it shares with the output matrix.
    pub(crate) embedding: u64,
}

impl BlockSavings {
    pub(crate) fn of<D: Load>(
        device: &D,
        c: &ModelConfig,
        weights: &dyn Tensors,
        shard: Option<&Shard<D>>,
    ) -> Self {
        let wide = |[out, input]: [usize; 2], is_linear: bool| {
            let (outputs, elements) = (out as u64, (out * input) as u64);
            match is_linear {
                true => device.linear_bytes(elements, outputs),
                false => device.weight_bytes(elements),
            }
        };
        let saved = |name: &str, shape: [usize; 2], is_linear| {
            let kind = weights.blocks(name);
            // A part of a block is no block.
            let kind = kind.filter(|kind| shape[1].is_multiple_of(kind.block_len()));
            let own = kind.and_then(|kind| device.block_bytes(kind, shape));
            own.map_or(0, |own| wide(shape, is_linear).saturating_sub(own))
        };
        let names = &c.tensor_names;
        let embedding = saved(&names.embedding, [c.vocab_size, c.hidden_size], false);
        let output = match (c.tie_word_embeddings, shard) {
            (true, None) => 0,
            (tied, shard) => {
                let rows = shard.map_or(c.vocab_size, |shard| shard.vocabulary(c).len());
                let name = if tied { &names.embedding } else { &names.output };
                saved(name, [rows, c.hidden_size], false)
            }
        };
        let (hidden, inner) = (c.hidden_size, Shard::inner(shard, c));
        let layer = |index: usize| -> u64 {
            let heads = shard.map_or(c.num_key_value_heads, |shard| shard.heads(index).len());
            let kv = heads * c.head_dim;
            let q = kv * c.group_size();
            let shapes = [
                (&names.query, [q, hidden]),
                (&names.key, [kv, hidden]),
                (&names.value, [kv, hidden]),
                (&names.attention_output, [hidden, q]),
                (&names.gate, [inner, hidden]),
                (&names.up, [inner, hidden]),
                (&names.down, [hidden, inner]),
            ];
            let of = |(name, shape): &(&std::borrow::Cow<'static, str>, [usize; 2])| {
                saved(&(names.of_layer(index, name) + ".weight"), *shape, true)
            };
            shapes.iter().map(of).sum()
        };
        let layers: u64 = (0..c.num_hidden_layers).map(layer).sum();
        Self { all: embedding + output + layers, embedding }
    }
}
