use std::cell::Cell;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};

use moa_core::{BlockType, ModelShape};

use crate::Result;
use crate::checkpoint::mapped::MappedTensor;
use crate::checkpoint::safetensors::Tensors;
use crate::decoder::block_savings::BlockSavings;
use crate::decoder::config::ModelConfig;
use crate::decoder::layer::{Layer, LayerPart};
use crate::decoder::narrow_keys::NarrowKeys;
use crate::decoder::shard::Shard;
use crate::device::{Device, Math};

/// A language model on one device, or one device's part of it: an embedding, layers of attention and
/// feed-forward part, and an output matrix, as its [`ModelConfig`] says.
pub struct Decoder<D: Device> {
    /// No other model of this process has it.
    pub(crate) id: u64,
    pub(crate) device: D,
    pub(crate) config: ModelConfig,
    pub(crate) embedding: D::Matrix,
    pub(crate) layers: Vec<Layer<D>>,
    pub(crate) norm: D::Vector,
    /// `None` when the embedding is tied and whole.
    pub(crate) lm_head: Option<D::Matrix>,
    pub(crate) fingerprint: String,
    /// Bytes of the weights in their files that a step reads, other rows of the embedding left out.
    pub(crate) stored_bytes: u64,
    /// Bytes on the device that weights in blocks save.
    pub(crate) block_savings: BlockSavings,
    /// This rank's part, where several devices share the model.
    pub(crate) shard: Option<Shard<D>>,
    /// Dimensions of what is here.
    pub(crate) local: ModelShape,
    /// Tokens of running text, if it is known how to write any.
    pub(crate) sample: Vec<u32>,
    /// Once a sequence has needed them.
    pub(crate) narrow_keys: OnceLock<NarrowKeys<D>>,
}

impl<D: Device> std::fmt::Debug for Decoder<D> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Decoder").field("config", &self.config).finish_non_exhaustive()
    }
}

impl<D: Math> Decoder<D> {
    /// Brings a model's weights to a device: those of a checkpoint ([`Weights`](crate::Weights)), made-up
    /// ones ([`RandomTensors`](crate::RandomTensors)), or others.
    ///
    /// # Errors
    /// [`Error::TensorMissing`](crate::Error::TensorMissing) and
    /// [`Error::TensorShape`](crate::Error::TensorShape) if the weights are not those that the
    /// configuration says, [`Error::OutOfMemory`](crate::Error::OutOfMemory), and
    /// [`Error::Invalid`](crate::Error::Invalid) if the configuration is out of its range.
    pub fn load(device: D, config: ModelConfig, weights: &dyn Tensors) -> Result<Self> {
        Self::load_part(device, config, weights, None)
    }

    pub(crate) fn load_part(
        device: D,
        config: ModelConfig,
        weights: &dyn Tensors,
        shard: Option<Shard<D>>,
    ) -> Result<Self> {
        config.validate()?;
        let local = Shard::local_shape(shard.as_ref(), &config)?;
        let block_savings = BlockSavings::of(&device, &config, weights, shard.as_ref());
        let bytes = Shard::weights(shard.as_ref(), &config).bytes(&device);
        device.check_room("weights", bytes.saturating_sub(block_savings.all))?;
        let names = &config.tensor_names;
        let table = [config.vocab_size, config.hidden_size];
        let embedding = weights.tensor(&names.embedding, &table)?;
        let tied_bytes = if config.tie_word_embeddings { embedding.bytes().len() } else { 0 };
        let weights = &Counted { tensors: weights, bytes: Cell::new(tied_bytes as u64) };
        let layers = (0..config.num_hidden_layers)
            .map(|index| {
                let part = LayerPart::of(shard.as_ref(), &config, index);
                Layer::load(&device, &config, weights, index, &part)
            })
            .collect::<Result<_>>()?;
        let norm = weights.tensor(&names.norm, &[config.hidden_size])?;
        let norm = device.vector(match config.logits_scaling {
            1.0 => norm,
            scaling => norm.scaled(scaling.recip() as f32)?,
        })?;
        let output = match config.tie_word_embeddings {
            true => embedding.clone(),
            false => weights.tensor(&names.output, &table)?,
        };
        let lm_head = match &shard {
            None if config.tie_word_embeddings => None,
            None => Some(device.matrix(output)?),
            Some(shard) => Some(device.matrix(output.rows(&[shard.vocabulary(&config)])?)?),
        };
        let embedding = device.matrix(embedding)?;
        let fingerprint = weights.fingerprint();
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let id = NEXT.fetch_add(1, Ordering::Relaxed);
        let stored_bytes = weights.bytes.get();
        Ok(Self {
            id,
            device,
            config,
            embedding,
            layers,
            norm,
            lm_head,
            fingerprint,
            stored_bytes,
            block_savings,
            shard,
            local,
            sample: Vec::new(),
            narrow_keys: OnceLock::new(),
        })
    }

    /// The model's configuration.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// The device.
    pub fn device(&self) -> &D {
        &self.device
    }

    /// Bytes of the weights on the device, 0 where they stay in their file's map.
    pub fn weight_bytes(&self) -> u64 {
        let bytes = Shard::weights(self.shard.as_ref(), &self.config).bytes(&self.device);
        bytes.saturating_sub(self.block_savings.all)
    }

    /// Fingerprint of the weights, as plan files hold it.
    pub fn fingerprint(&self) -> &str {
        &self.fingerprint
    }

    /// The dimensions that plans depend on.
    pub fn shape(&self) -> ModelShape {
        self.config.shape()
    }

    pub(crate) fn output_matrix(&self) -> &D::Matrix {
        self.lm_head.as_ref().unwrap_or(&self.embedding)
    }
}

/// Weights whose bytes are counted as they are asked for.
struct Counted<'a> {
    tensors: &'a dyn Tensors,
    bytes: Cell<u64>,
}

impl Tensors for Counted<'_> {
    fn tensor(&self, name: &str, shape: &[usize]) -> Result<MappedTensor> {
        let tensor = self.tensors.tensor(name, shape)?;
        self.bytes.set(self.bytes.get() + tensor.bytes().len() as u64);
        Ok(tensor)
    }

    fn blocks(&self, name: &str) -> Option<BlockType> {
        self.tensors.blocks(name)
    }

    fn fingerprint(&self) -> String {
        self.tensors.fingerprint()
    }
}
