//! Which tensors a file gets, and of which types.

use moa_backend_cpu::ops::BlockType;
use moa_core::Dtype;

use crate::Result;
use crate::checkpoint::gguf::config::{FREQUENCIES, names};
use crate::checkpoint::gguf::kind::Kind;
use crate::checkpoint::gguf::{Gguf, llama3_factor};
use crate::checkpoint::mapped::MappedTensor;
use crate::checkpoint::safetensors::Tensors;
use crate::decoder::config::ModelConfig;
use crate::decoder::names::TensorNames;
use crate::decoder::rope_scaling::RopeScaling;

/// A tensor and where its numbers come from.
pub(super) struct Source {
    pub(super) name: String,
    pub(super) shape: Vec<usize>,
    pub(super) from: From,
}

pub(super) enum From {
    Tensor {
        tensor: MappedTensor,
        /// Heads whose rows GGUF orders by rotary pair, where the tensor has them by halves.
        heads: Option<usize>,
    },
    Made(Vec<f32>),
}

impl Source {
    fn new(name: String, tensor: MappedTensor, heads: Option<usize>) -> Self {
        let shape = tensor.shape().to_owned();
        Self { name, shape, from: From::Tensor { tensor, heads } }
    }

    /// The type of a tensor in a file of such blocks: vectors as they are, what makes the logits in more
    /// bits, and other blocks where a row is not a whole number of those.
    pub(super) fn kind(&self, wanted: BlockType, tied: bool) -> Kind {
        let &[_, cols] = &self.shape[..] else { return Kind::Plain(Dtype::F32) };
        let is_output = self.name == "output.weight" || tied && self.name == "token_embd.weight";
        let blocks = match wanted {
            BlockType::Q8_0 => BlockType::Q8_0,
            _ if is_output => BlockType::Q6K,
            other => other,
        };
        let shorter = match blocks {
            BlockType::Q4K => BlockType::Q5_0,
            BlockType::Q5K => BlockType::Q5_1,
            BlockType::Q6K => BlockType::Q8_0,
            other => other,
        };
        let fits = |blocks: &BlockType| cols.is_multiple_of(blocks.block_len());
        match [blocks, shorter].into_iter().find(fits) {
            Some(blocks) => Kind::Blocks(blocks),
            None => Kind::Plain(Dtype::F16),
        }
    }

    /// Elements of a row and their number of rows.
    pub(super) fn rows(&self) -> (usize, usize) {
        match &self.shape[..] {
            [] => (1, 1),
            // The elements of a vector may have an order, too.
            [len] => (*len, 1),
            [first, rest @ ..] => (*first, rest.iter().product()),
        }
    }

    /// Appends a row as f32.
    pub(super) fn row(&self, row: usize, to: &mut Vec<f32>) {
        let (rows, cols) = self.rows();
        match &self.from {
            From::Made(values) => to.extend(&values[row * cols..(row + 1) * cols]),
            From::Tensor { tensor, heads } => {
                let row = stored_row(row, rows, *heads);
                tensor.extend_f32(row * cols..(row + 1) * cols, to);
            }
        }
    }

    /// The blocks of a row, if it is in such blocks already.
    pub(super) fn blocks(&self, row: usize, kind: BlockType) -> Option<&[u8]> {
        let From::Tensor { tensor, heads } = &self.from else { return None };
        let (rows, cols) = self.rows();
        let row = stored_row(row, rows, *heads);
        let bytes = cols / kind.block_len() * kind.block_bytes();
        (tensor.blocks() == Some(kind)).then(|| &tensor.bytes()[row * bytes..(row + 1) * bytes])
    }
}

/// The row of a tensor that becomes row `row` of the file: of a projection whose rotary halves lie apart, the row of
/// halves that stands there where the two rows of a pair lie side by side.
fn stored_row(row: usize, rows: usize, heads: Option<usize>) -> usize {
    let Some(heads) = heads else { return row };
    let dim = rows / heads.max(1);
    let (head, within) = (row / dim, row % dim);
    head * dim + within % 2 * (dim / 2) + within / 2
}

/// Tensors as a GGUF file has them already.
pub(super) fn of_gguf(gguf: &Gguf) -> Result<Vec<Source>> {
    let names = gguf.names().map(|name| {
        let entry = gguf.entry(name)?;
        Ok(Source::new(name.to_owned(), gguf.mapped(entry, &entry.info.shape), None))
    });
    names.collect()
}

/// Tensors of a folder under GGUF's names. `by_pair`: queries and keys are ordered by rotary pair.
pub(super) fn of_folder(
    c: &ModelConfig,
    weights: &dyn Tensors,
    by_pair: bool,
) -> Result<Vec<Source>> {
    let (from, to) = (&c.tensor_names, &names());
    let mut all = Vec::new();
    let mut add = |(from, to): (String, String), shape: &[usize], heads: Option<usize>| {
        all.push(Source::new(to, weights.tensor(&from, shape)?, heads.filter(|_| by_pair)));
        Ok::<_, crate::Error>(())
    };
    let whole = |of: fn(&TensorNames) -> &str| (of(from).to_owned(), of(to).to_owned());
    let (hidden, inner, vocab) = (c.hidden_size, c.intermediate_size, c.vocab_size);
    add(whole(|n| &n.embedding), &[vocab, hidden], None)?;
    add(whole(|n| &n.norm), &[hidden], None)?;
    if !c.tie_word_embeddings {
        add(whole(|n| &n.output), &[vocab, hidden], None)?;
    }
    let (heads, kv_heads) = (c.num_attention_heads, c.num_key_value_heads);
    let (queries, keys) = (heads * c.head_dim, kv_heads * c.head_dim);
    for layer in 0..c.num_hidden_layers {
        let own = |of: fn(&TensorNames) -> &str, end: &str| {
            let name = |names: &TensorNames| names.of_layer(layer, of(names)) + end;
            (name(from), name(to))
        };
        add(own(|n| &n.attention_norm, ""), &[hidden], None)?;
        add(own(|n| &n.mlp_norm, ""), &[hidden], None)?;
        if c.qk_norm {
            add(own(|n| &n.query_norm, ""), &[c.head_dim], None)?;
            add(own(|n| &n.key_norm, ""), &[c.head_dim], None)?;
        }
        type Of = fn(&TensorNames) -> &str;
        let linears: [(Of, usize, usize, bool, Option<usize>); 7] = [
            (|n| &n.query, queries, hidden, c.qkv_bias, Some(heads)),
            (|n| &n.key, keys, hidden, c.qkv_bias, Some(kv_heads)),
            (|n| &n.value, keys, hidden, c.qkv_bias, None),
            (|n| &n.attention_output, hidden, queries, c.o_bias, None),
            (|n| &n.gate, inner, hidden, c.mlp_bias, None),
            (|n| &n.up, inner, hidden, c.mlp_bias, None),
            (|n| &n.down, hidden, inner, c.mlp_bias, None),
        ];
        for (of, rows, cols, bias, heads) in linears {
            add(own(of, ".weight"), &[rows, cols], heads)?;
            if bias {
                add(own(of, ".bias"), &[rows], heads)?;
            }
        }
    }
    if let RopeScaling::Llama3 {
        factor,
        low_freq_factor,
        high_freq_factor,
        original_max_position_embeddings: original,
    } = c.rope_scaling
    {
        let bounds = (low_freq_factor, high_freq_factor);
        let of = |index| llama3_factor(c.rope_theta, c.head_dim, index, original, factor, bounds);
        let factors: Vec<f32> = (0..c.head_dim / 2).map(|index| of(index) as f32).collect();
        let (name, shape) = (FREQUENCIES.to_owned(), vec![factors.len()]);
        all.push(Source { name, shape, from: From::Made(factors) });
    }
    Ok(all)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_by_pair_and_by_half_are_each_others_way_back() {
        let by_half = crate::checkpoint::gguf::rows_by_half(24, 3);
        for (row, from) in by_half.iter().enumerate() {
            assert_eq!(stored_row(from.start, 24, Some(3)), row);
        }
    }
}
