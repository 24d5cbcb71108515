use std::cell::RefCell;
use std::collections::BTreeSet;

use crate::checkpoint::mapped::MappedTensor;
use crate::checkpoint::safetensors::{Tensors, Weights};
use crate::decoder::config::ModelConfig;
use crate::{Error, Result};

/// Tensors that models once saved and compute themselves: buffers of rotary embeddings and masks.
const BUFFERS: [&str; 5] = [
    "rotary_emb.inv_freq",
    "rotary_emb.cos_cached",
    "rotary_emb.sin_cached",
    "rotary_pos_emb.inv_freq",
    "attn.masked_bias",
];

/// The weights of a folder, and which of them a decoder has asked for.
///
/// A tensor that nobody asks for says that the model is another one: one with biases, with norms or
/// with more layers than its configuration admits to. Its text would change silently.
pub(crate) struct Reads<'a> {
    weights: &'a Weights,
    read: RefCell<BTreeSet<&'a str>>,
}

impl<'a> Reads<'a> {
    /// The weights of a model of this configuration, which is told where it denies an output matrix of
    /// its own.
    pub(crate) fn new(weights: &'a Weights, config: &mut ModelConfig) -> Result<Self> {
        let reads = Self { weights, read: RefCell::new(BTreeSet::new()) };
        let names = &config.tensor_names;
        if config.tie_word_embeddings && weights.contains(&names.output) {
            let table = [config.vocab_size, config.hidden_size];
            let embedding = weights.tensor(&names.embedding, &table)?;
            let output = reads.tensor(&names.output, &table)?;
            if embedding.dtype() != output.dtype() || embedding.bytes() != output.bytes() {
                tracing::warn!(
                    "`tie_word_embeddings` is true, but `{}` differs from `{}`; both are used",
                    names.output,
                    names.embedding,
                );
                config.tie_word_embeddings = false;
            }
        }
        Ok(reads)
    }

    /// Checks that the decoder has asked for everything; with `ignore`, says what it has not.
    pub(crate) fn check(&self, ignore: bool) -> Result<()> {
        let read = self.read.borrow();
        let is_buffer = |name: &str| BUFFERS.iter().any(|end| name.ends_with(end));
        let unread = self.weights.names().filter(|name| !read.contains(name) && !is_buffer(name));
        let names: Vec<String> = unread.map(str::to_owned).collect();
        if names.is_empty() {
            return Ok(());
        }
        let error = Error::TensorsUnread { path: self.weights.dir().to_owned(), names };
        if ignore {
            tracing::warn!("{error}");
            return Ok(());
        }
        Err(error)
    }
}

impl Tensors for Reads<'_> {
    fn tensor(&self, name: &str, shape: &[usize]) -> Result<MappedTensor> {
        let tensor = self.weights.tensor(name, shape)?;
        self.read.borrow_mut().extend(self.weights.actual_name(name));
        Ok(tensor)
    }

    fn fingerprint(&self) -> String {
        self.weights.fingerprint()
    }
}
