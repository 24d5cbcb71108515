//! Weights that are made up.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use half::bf16;

use crate::checkpoint::mapped::MappedTensor;
use crate::checkpoint::random_blocks::RandomBlocks;
use crate::checkpoint::safetensors::Tensors;
use crate::decoder::config::ModelConfig;
use crate::{Error, Result, memory};
use moa_core::{BlockType, SplitMix64};

/// Weights that are made up, for measurements of speed and memory, which do not depend on their values:
/// matrices of uniform random bf16 numbers of variance `1 / hidden_size`, norms and biases of ones.
///
/// Tensors are parts of one memory that is as large as the model, but at most 1 GiB or the
/// largest tensor: those of a larger model overlap, far enough from each other that no CPU has the
/// earlier one in a cache. A device that keeps weights in its own memory holds as much as of a trained
/// model.
pub struct RandomTensors {
    words: Arc<Vec<u64>>,
    /// Where the next tensor begins, in words.
    next: AtomicUsize,
    seed: u32,
    /// Where matrices are in blocks.
    blocks: Option<InBlocks>,
}

struct InBlocks {
    all: RandomBlocks,
    output: RandomBlocks,
    /// The matrix of logits: the output matrix, or an embedding that serves as it.
    output_name: String,
}

impl InBlocks {
    fn of(&self, name: &str) -> &RandomBlocks {
        if name == self.output_name { &self.output } else { &self.all }
    }
}

/// Most bytes of made-up weights.
const MOST_BYTES: u64 = 1 << 30;

/// Words that repeat: a prime number, so that rows of matrices differ.
const PERIOD: usize = 131_071;

/// Tensors begin at multiples of so many words.
const ALIGNED: usize = 8;

impl fmt::Debug for RandomTensors {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "RandomTensors({})", self.seed)
    }
}

impl RandomTensors {
    /// Weights of a model of this configuration; equal seeds give equal weights.
    ///
    /// # Errors
    /// [`Error::Invalid`] if the configuration is out of its range, [`Error::OutOfMemory`].
    pub fn new(config: &ModelConfig, seed: u32) -> Result<Self> {
        Self::with(config, seed, None)
    }

    /// As [`new`](Self::new) with matrices in quantised blocks; the matrix of logits is in blocks of at least 6 bits,
    /// as files have it.
    ///
    /// # Errors
    /// [`Error::Invalid`] if the configuration is out of its range. Tensors whose rows are not whole blocks fail
    /// when they are asked for.
    pub fn in_blocks(config: &ModelConfig, seed: u32, blocks: BlockType) -> Result<Self> {
        Self::with(config, seed, Some(blocks))
    }

    fn with(config: &ModelConfig, seed: u32, blocks: Option<BlockType>) -> Result<Self> {
        config.validate()?;
        // Queries, keys and values may share a tensor, and so may gate and up.
        let heads = config.num_attention_heads + 2 * config.num_key_value_heads;
        let widest = (heads * config.head_dim).max(2 * config.intermediate_size);
        let widest = widest.max(config.vocab_size);
        let largest = 2 * (config.hidden_size * widest) as u64;
        let bytes = (2 * config.parameters()).min(MOST_BYTES).max(largest);
        let amplitude = (3.0 / config.hidden_size as f32).sqrt();
        let in_blocks = blocks.map(|kind| {
            let names = &config.tensor_names;
            let output = of_logits(kind, config.hidden_size);
            let tied = config.tie_word_embeddings;
            let output_name = if tied { &names.embedding } else { &names.output };
            let table = config.vocab_size * config.hidden_size;
            let count = |kind: BlockType, elements: usize| elements.div_ceil(kind.block_len());
            Ok::<_, Error>(InBlocks {
                all: RandomBlocks::new(kind, count(kind, bytes as usize / 2), amplitude, seed)?,
                output: RandomBlocks::new(output, count(output, table), amplitude, seed)?,
                output_name: output_name.to_string(),
            })
        });
        let in_blocks = in_blocks.transpose()?;
        let bytes = if in_blocks.is_some() { 0 } else { bytes };
        let len = bytes.div_ceil(8) as usize;
        let mut random = SplitMix64::new(seed.into());
        let mut element = || {
            let unit = (random.next_u64() >> 40) as f32 / (1u64 << 23) as f32;
            u64::from(bf16::from_f32((unit - 1.0) * amplitude).to_bits())
        };
        let mut words: Vec<u64> = memory::room(len, "made-up weights")?;
        words
            .extend((0..PERIOD.min(len)).map(|_| (0..4).fold(0, |word, _| word << 16 | element())));
        while words.len() < len && !words.is_empty() {
            words.extend_from_within(..words.len().min(len - words.len()));
        }
        Ok(Self { words: Arc::new(words), next: AtomicUsize::new(0), seed, blocks: in_blocks })
    }
}

/// The kind of a matrix of logits in files whose other matrices are of `kind`.
fn of_logits(kind: BlockType, hidden_size: usize) -> BlockType {
    match kind {
        BlockType::Q8_0 => kind,
        _ if hidden_size.is_multiple_of(BlockType::Q6K.block_len()) => BlockType::Q6K,
        _ => BlockType::Q8_0,
    }
}

impl Tensors for RandomTensors {
    fn blocks(&self, name: &str) -> Option<BlockType> {
        // Norms and biases have names of their own, which nobody asks for.
        self.blocks.as_ref().map(|blocks| blocks.of(name).kind())
    }

    fn tensor(&self, name: &str, shape: &[usize]) -> Result<MappedTensor> {
        let words = shape.iter().product::<usize>().div_ceil(4);
        if shape.len() == 1 {
            let one = u64::from(bf16::ONE.to_bits());
            let ones = Arc::new(vec![one * 0x0001_0001_0001_0001; words]);
            return Ok(MappedTensor::made(ones, 0, shape));
        }
        if let Some(blocks) = &self.blocks {
            return blocks.of(name).tensor(name, shape);
        }
        let Some(last) = self.words.len().checked_sub(words) else {
            let expected = format!("at most {} elements", 4 * self.words.len());
            return Err(Error::invalid("made-up tensor", expected, format!("{name} {shape:?}")));
        };
        let after = |first: usize| (first + words).next_multiple_of(ALIGNED);
        let begin = |next: usize| if next <= last { next } else { 0 };
        let order = Ordering::Relaxed;
        let next = self.next.fetch_update(order, order, |next| Some(after(begin(next))));
        let first = begin(next.unwrap_or(0));
        Ok(MappedTensor::made(Arc::clone(&self.words), 8 * first, shape))
    }

    fn fingerprint(&self) -> String {
        format!("random-{}", self.seed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// 2 layers, tied: more parameters than `PERIOD` words hold.
    fn config() -> ModelConfig {
        let text = r#"{"vocab_size": 3000, "hidden_size": 256, "intermediate_size": 512,
            "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 64,
            "rms_norm_eps": 1e-5, "tie_word_embeddings": true}"#;
        ModelConfig::from_json(text).unwrap()
    }

    #[test]
    fn tensors_differ_while_the_memory_lasts_and_then_overlap() {
        let tensors = RandomTensors::new(&config(), 7).unwrap();
        let [a, b] = [(); 2].map(|()| tensors.tensor("a", &[256, 256]).unwrap());
        assert_ne!(a.bytes(), b.bytes());
        // Each row differs from the one before.
        assert_ne!(a.bytes()[..512], a.bytes()[512..1024]);
        let mut repeated = (0..100).map(|_| tensors.tensor("c", &[256, 256]).unwrap());
        assert!(repeated.any(|c| c.bytes() == a.bytes()));
        assert!(tensors.tensor("d", &[1 << 12, 1 << 12]).is_err());
    }

    #[test]
    fn values_are_uniform_with_the_variance_of_one_input() {
        let tensors = RandomTensors::new(&config(), 7).unwrap();
        let values = tensors.tensor("a", &[3000, 256]).unwrap().to_f32().unwrap();
        let mean = values.iter().sum::<f32>() / values.len() as f32;
        let variance = values.iter().map(|x| x * x).sum::<f32>() / values.len() as f32;
        assert!(mean.abs() < 1e-3 && (variance * 256.0 - 1.0).abs() < 0.02, "{mean} {variance}");
        assert_eq!(tensors.tensor("norm", &[5]).unwrap().to_f32().unwrap(), [1.0; 5]);
    }
}
