//! A model folder: weights, tokenizer, chat template, generation defaults.

pub(crate) mod fingerprint;
pub(crate) mod generation_config;
pub(crate) mod gguf;
#[cfg(feature = "hub")]
pub(crate) mod hub;
pub(crate) mod json;
pub(crate) mod json_style;
pub(crate) mod mapped;
pub(crate) mod random;
pub(crate) mod safetensors;
pub(crate) mod special_tokens;
pub(crate) mod template;
pub(crate) mod tokenizer;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use moa_core::Plan;

use crate::checkpoint::generation_config::GenerationConfig;
use crate::checkpoint::gguf::{Gguf, is_gguf};
use crate::checkpoint::safetensors::Weights;
use crate::checkpoint::template::{ChatTemplate, Message};
use crate::checkpoint::tokenizer::Tokenizer;
use crate::decoder::config::ModelConfig;
use crate::decoder::model::Decoder;
use crate::decoder::shard::Shard;
use crate::device::Math;
use crate::engine::request::{Completion, GenerateOptions, Prompt};
use crate::engine::serve::{Engine, EngineOptions};
use crate::families::{FAMILIES, Family};
use crate::{Error, Result};

/// A Hugging Face model folder, ready to run: weights, tokenizer, chat template, defaults.
///
/// Clones share the network, so that a checkpoint, its engines and its conversations can be kept
/// side by side.
///
/// ```no_run
/// use moa_core::Plan;
/// use moa_models::{Checkpoint, Cpu};
///
/// let checkpoint = Checkpoint::open(Cpu::default(), "model")?;
/// let dense = Plan::full(checkpoint.model.shape())?;
/// println!("{}", checkpoint.complete(&dense, "Once upon a time", 64)?.text);
/// # Ok::<(), moa_models::Error>(())
/// ```
#[derive(Debug)]
pub struct Checkpoint<D: Math> {
    /// The network.
    pub model: Arc<Decoder<D>>,
    /// Text to tokens and back.
    pub tokenizer: Tokenizer,
    /// Generation defaults of the model's authors.
    pub generation: GenerationConfig,
    template: Option<ChatTemplate>,
    folder: PathBuf,
}

impl<D: Math> Clone for Checkpoint<D> {
    /// The network is shared, not copied.
    fn clone(&self) -> Self {
        Self {
            model: Arc::clone(&self.model),
            tokenizer: self.tokenizer.clone(),
            generation: self.generation.clone(),
            template: self.template.clone(),
            folder: self.folder.clone(),
        }
    }
}

impl<D: Math> Checkpoint<D> {
    /// Opens `config.json`, `*.safetensors`, `tokenizer.json`, and if they exist
    /// `tokenizer_config.json` and `generation_config.json`; or a GGUF file, which has all of them.
    ///
    /// # Errors
    /// [`Error::Io`] for a file that cannot be read; [`Error::Json`], [`Error::MissingField`] and
    /// [`Error::Config`] for a malformed one; [`Error::NoWeights`], [`Error::Safetensors`],
    /// [`Error::Gguf`] and the variants that begin with `Tensor` and `Shard` for the weights; [`Error::Tokenizer`] and
    /// [`Error::TokenizerVocabulary`] for the tokenizer; [`Error::Template`] for the chat template;
    /// [`Error::OutOfMemory`] or [`Error::Backend`] if the weights do not fit the device.
    pub fn open(device: D, folder: impl AsRef<Path>) -> Result<Self> {
        Self::open_part(device, folder.as_ref(), FAMILIES, None)
    }

    /// [`open`](Self::open) for a model of one of these families.
    ///
    /// # Errors
    /// As [`open`](Self::open).
    pub fn open_with(
        device: D,
        folder: impl AsRef<Path>,
        families: &[&dyn Family],
    ) -> Result<Self> {
        Self::open_part(device, folder.as_ref(), families, None)
    }

    /// [`open`](Self::open) with one rank's part of the network.
    ///
    /// # Errors
    /// As [`open`](Self::open) and [`Decoder::load_shard`].
    pub fn open_shard(device: D, folder: impl AsRef<Path>, shard: Shard<D>) -> Result<Self> {
        Self::open_part(device, folder.as_ref(), FAMILIES, Some(shard))
    }

    fn open_part(
        device: D,
        folder: &Path,
        families: &[&dyn Family],
        shard: Option<Shard<D>>,
    ) -> Result<Self> {
        if is_gguf(folder) {
            return Self::open_gguf(device, folder, families, shard);
        }
        let config = ModelConfig::from_file_with(folder, families)?;
        let tokenizer = Tokenizer::from_dir(folder)?;
        tokenizer.check_vocab_size(config.vocab_size)?;
        let generation = GenerationConfig::from_dir(folder)?;
        let template = ChatTemplate::from_dir(folder)?;
        let model = Arc::new(Decoder::load_part(device, config, &Weights::open(folder)?, shard)?);
        Ok(Self { model, tokenizer, generation, template, folder: folder.to_path_buf() })
    }

    fn open_gguf(
        device: D,
        path: &Path,
        families: &[&dyn Family],
        shard: Option<Shard<D>>,
    ) -> Result<Self> {
        let file = Gguf::open(path)?;
        let (config, tokenizer) = (file.config(families)?, file.tokenizer()?);
        tokenizer.check_vocab_size(config.vocab_size)?;
        let template = file.template()?;
        let model = Arc::new(Decoder::load_part(device, config, &file, shard)?);
        let generation = GenerationConfig::default();
        Ok(Self { model, tokenizer, generation, template, folder: path.to_path_buf() })
    }

    /// The folder, or the GGUF file, that it was opened from.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// The chat template.
    ///
    /// # Errors
    /// [`Error::NoChatTemplate`] if the folder has no chat template.
    pub fn template(&self) -> Result<&ChatTemplate> {
        self.template.as_ref().ok_or_else(|| Error::NoChatTemplate { path: self.folder.clone() })
    }

    /// Uses another chat template, such as [`ChatTemplate::vicuna`].
    pub fn set_template(&mut self, template: ChatTemplate) {
        self.template = Some(template);
    }

    /// Tokens of a conversation that the assistant is to answer.
    ///
    /// # Errors
    /// [`Error::NoChatTemplate`] if the folder has no chat template, [`Error::Template`] if the
    /// template refuses the messages, [`Error::Tokenizer`] if the tokenizer refuses their text.
    pub fn chat_tokens(&self, messages: &[Message]) -> Result<Vec<u32>> {
        // The template writes the begin-of-sequence token itself.
        self.tokenizer.encode(&self.template()?.render(messages, true)?, false)
    }

    /// End-of-sequence tokens: those of `generation_config.json`, else of `config.json`.
    pub fn eos_token_ids(&self) -> Vec<u32> {
        match self.generation.eos_token_ids.is_empty() {
            true => self.model.config().eos_token_ids.clone(),
            false => self.generation.eos_token_ids.clone(),
        }
    }

    /// Checks that a plan was made for this model.
    ///
    /// # Errors
    /// [`Error::Core`] with [`ShapeMismatch`](moa_core::Error::ShapeMismatch) or
    /// [`FingerprintMismatch`](moa_core::Error::FingerprintMismatch) if the plan is for a model of
    /// other dimensions, or for other weights.
    pub fn check_plan(&self, plan: &Plan) -> Result<()> {
        plan.check_shape(&self.model.shape())?;
        Ok(plan.check_fingerprint(self.model.fingerprint())?)
    }

    /// An engine for requests of this model, with its tokenizer, chat template and end tokens.
    pub fn engine(&self, options: EngineOptions) -> Engine<D> {
        Engine::with_text(self.clone(), options)
    }

    /// Answers a message, where there is a chat template, or continues a text, where there is none,
    /// with at most `max_new_tokens` of the likeliest tokens. See [`engine`](Self::engine) for
    /// anything else.
    ///
    /// ```no_run
    /// use moa_core::Plan;
    /// use moa_models::{Checkpoint, Cpu};
    ///
    /// let checkpoint = Checkpoint::open(Cpu::default(), "model")?;
    /// let plan = Plan::load("plan.json")?;
    /// println!("{}", checkpoint.complete(&plan, "What is in line 7?", 256)?.text);
    /// # Ok::<(), moa_models::Error>(())
    /// ```
    ///
    /// # Errors
    /// [`Error::Template`] and [`Error::Tokenizer`] for the text, [`Error::ContextExceeded`] if it
    /// is longer than the model's context, [`Error::Core`] with
    /// [`ShapeMismatch`](moa_core::Error::ShapeMismatch) if the plan is for a model of other
    /// dimensions, and those of [`Engine::step`].
    pub fn complete(&self, plan: &Plan, text: &str, max_new_tokens: usize) -> Result<Completion> {
        let prompt = match self.template {
            Some(_) => Prompt::chat(&[Message::user(text)]),
            None => Prompt::from(text),
        };
        let mut engine = self.engine(EngineOptions::default());
        engine.submit(prompt, plan, GenerateOptions { max_new_tokens, ..Default::default() });
        let missing = || Error::invalid("engine", "one completion", "none");
        engine.complete_all()?.pop().ok_or_else(missing)
    }
}
