//! Which tensors a file gets, and of which types.

use moa_core::{BlockType, Dtype};

use crate::Result;
use crate::checkpoint::gguf::architecture::{Architecture, FREQUENCIES, SHORT_AND_LONG};
use crate::checkpoint::gguf::tensor_type::TensorType;
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
    pub(super) fn kind(&self, wanted: TensorType, tied: bool) -> TensorType {
        let &[_, cols] = &self.shape[..] else { return TensorType::Plain(Dtype::F32) };
        let TensorType::Blocks(wanted) = wanted else { return wanted };
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
            Some(blocks) => TensorType::Blocks(blocks),
            None => TensorType::Plain(Dtype::F16),
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

/// Tensors of a folder under GGUF's names, and in its order.
pub(super) fn of_folder(
    c: &ModelConfig,
    weights: &dyn Tensors,
    architecture: &Architecture,
) -> Result<Vec<Source>> {
    let (from, to) = (&c.tensor_names, &architecture.tensor_names());
    let mut all = Vec::new();
    let mut add = |(from, to): (String, String), shape: &[usize], heads: Option<usize>| {
        all.push(Source::new(
            to,
            weights.tensor(&from, shape)?,
            heads.filter(|_| architecture.by_pair),
        ));
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
        // Layers of one name are one tensor.
        for joined in linears.chunk_by(|a, b| a.0(from) == b.0(from)) {
            let &(of, _, cols, bias, heads) = &joined[0];
            let rows = joined.iter().map(|(_, rows, ..)| rows).sum();
            add(own(of, ".weight"), &[rows, cols], heads)?;
            if bias {
                add(own(of, ".bias"), &[rows], heads)?;
            }
        }
    }
    let mut add = |name: &str, factors: Vec<f32>| {
        let (name, shape) = (name.to_owned(), vec![factors.len()]);
        all.push(Source { name, shape, from: From::Made(factors) });
    };
    match &c.rope_scaling {
        &RopeScaling::Llama3 {
            factor,
            low_freq_factor,
            high_freq_factor,
            original_max_position_embeddings: original,
        } => {
            let bounds = (low_freq_factor, high_freq_factor);
            let of = |i| llama3_factor(c.rope_theta, c.head_dim, i, original, factor, bounds);
            add(FREQUENCIES, (0..c.head_dim / 2).map(|i| of(i) as f32).collect());
        }
        RopeScaling::LongRope { short_factor, long_factor, .. } => {
            for (name, factors) in SHORT_AND_LONG.iter().zip([short_factor, long_factor]) {
                add(name, factors.iter().map(|factor| *factor as f32).collect());
            }
        }
        _ => {}
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
