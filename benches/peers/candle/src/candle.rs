use std::path::Path;
use std::time::Instant;

use candle_core::{DType, Device, Error, IndexOp, Result, Tensor};
use candle_nn::VarBuilder;
use candle_transformers::models::llama::{Cache, Config, Llama, LlamaConfig};

use crate::{Run, checkpoint, prompt};

/// candle's own Llama in f32 on the CPU, loaded once and run many times.
pub(crate) struct CandleLlama {
    model: Llama,
    config: Config,
    device: Device,
}

impl CandleLlama {
    /// Loads a Hugging Face folder: `config.json` and one or many safetensors, widened to f32.
    ///
    /// # Errors
    /// A file that is missing or is not what candle's Llama expects.
    pub(crate) fn open(folder: &Path) -> Result<Self> {
        let device = Device::Cpu;
        let text = std::fs::read(folder.join("config.json"))?;
        let config: LlamaConfig = serde_json::from_slice(&text).map_err(Error::wrap)?;
        let config = config.into_config(false);
        let mut tensors = std::collections::HashMap::new();
        for path in checkpoint::shards(folder)? {
            tensors.extend(candle_core::safetensors::load(path, &device)?);
        }
        let weights = VarBuilder::from_tensors(tensors, DType::F32, &device);
        let model = Llama::load(weights, &config)?;
        Ok(Self { model, config, device })
    }

    /// Number of entries of the vocabulary.
    pub(crate) fn vocab(&self) -> usize {
        self.config.vocab_size
    }

    /// Logits `[vocab]` of the last of `ids`, which stand at `start..` of the sequence in `cache`.
    fn step(&self, ids: &[u32], start: usize, cache: &mut Cache) -> Result<Tensor> {
        let input = Tensor::new(ids, &self.device)?.unsqueeze(0)?;
        self.model.forward(&input, start, cache)?.i(0)
    }
}

/// Prefill of `tokens` ids in one call on an empty cache, then `decode` steps of one token.
///
/// The decoded ids go on with the prompt's rule, so that every engine does the same work.
///
/// # Errors
/// What candle reports, such as a shape that does not fit.
pub(crate) fn run_candle(llama: &CandleLlama, tokens: usize, decode: usize) -> Result<Run> {
    let ids = prompt(tokens + decode, llama.vocab());
    // candle precomputes its rope table up to this length and fails beyond it.
    let mut config = llama.config.clone();
    config.max_position_embeddings = config.max_position_embeddings.max(ids.len());
    let mut cache = Cache::new(true, DType::F32, &config, &llama.device)?;

    let start = Instant::now();
    let logits = llama.step(&ids[..tokens], 0, &mut cache)?;
    let prefill_seconds = start.elapsed().as_secs_f64();
    let argmax = logits.argmax(0)?.to_scalar::<u32>()?;
    let max_logit = logits.max(0)?.to_scalar::<f32>()?;

    let start = Instant::now();
    for at in tokens..ids.len() {
        llama.step(&ids[at..=at], at, &mut cache)?;
    }
    Ok(Run { prefill_seconds, decode_seconds: start.elapsed().as_secs_f64(), argmax, max_logit })
}
