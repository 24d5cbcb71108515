//! A model folder: weights, tokenizer, chat template, generation defaults.

pub(crate) mod added_tokens;
pub(crate) mod fingerprint;
pub(crate) mod found;
mod fp8;
pub(crate) mod generation_config;
pub(crate) mod gguf;
#[cfg(feature = "hub")]
pub(crate) mod hub;
#[cfg(feature = "hub")]
mod hub_gguf;
pub(crate) mod hub_id;
pub(crate) mod json;
pub(crate) mod known_texts;
pub(crate) mod mapped;
pub(crate) mod open_options;
pub(crate) mod packed;
pub(crate) mod prompt_style;
pub(crate) mod quantised;
pub(crate) mod random;
mod random_blocks;
pub(crate) mod reads;
pub(crate) mod safetensors;
pub(crate) mod sentencepiece_model;
pub(crate) mod special_tokens;
pub(crate) mod template;
pub(crate) mod text;
mod token_bytes;
pub(crate) mod tokenizer;
pub(crate) mod tokenizer_file;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use moa_core::Plan;

use crate::book::BOOK;
use crate::checkpoint::generation_config::GenerationConfig;
use crate::checkpoint::gguf::{Gguf, is_gguf};
use crate::checkpoint::open_options::OpenOptions;
use crate::checkpoint::prompt_style::PromptStyle;
use crate::checkpoint::random::RandomTensors;
use crate::checkpoint::safetensors::Weights;
use crate::checkpoint::template::{ChatTemplate, Message};
use crate::checkpoint::tokenizer::Tokenizer;
use crate::decoder::config::ModelConfig;
use crate::decoder::model::Decoder;
use crate::decoder::narrow_keys;
use crate::decoder::shard::Shard;
use crate::device::Math;
use crate::engine::draft_model::DraftModel;
use crate::engine::request::{Completion, GenerateOptions, Prompt};
use crate::engine::serve::{Engine, EngineOptions};
use crate::engine::speculate::Speculation;
use crate::families::Family;
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
    /// Fingerprint of a template that is not the folder's.
    pub(crate) own_template: Option<String>,
    style: PromptStyle,
    folder: PathBuf,
    /// A model that guesses for the engines.
    pub(crate) draft: Option<DraftModel<D>>,
}

impl<D: Math> Clone for Checkpoint<D> {
    /// The network is shared, not copied.
    fn clone(&self) -> Self {
        Self {
            model: Arc::clone(&self.model),
            tokenizer: self.tokenizer.clone(),
            generation: self.generation.clone(),
            template: self.template.clone(),
            own_template: self.own_template.clone(),
            style: self.style,
            folder: self.folder.clone(),
            draft: self.draft.clone(),
        }
    }
}

/// The model, which is told some running text in its own tokens. Where the tokenizer refuses any, the model does without.
fn shown<D: Math>(mut model: Decoder<D>, tokenizer: &Tokenizer) -> Arc<Decoder<D>> {
    // Tokens that are longer on average are rare.
    let mut sample = tokenizer.encode(&BOOK[..8 * narrow_keys::TOKENS], false).unwrap_or_default();
    sample.truncate(narrow_keys::TOKENS);
    model.set_sample(sample);
    Arc::new(model)
}

impl<D: Math> Checkpoint<D> {
    /// Opens `config.json`, `*.safetensors`, `tokenizer.json`, and if they exist
    /// `tokenizer_config.json` and `generation_config.json`; or a GGUF file, which has all of them.
    ///
    /// # Errors
    /// [`Error::Io`], [`Error::DanglingLink`] and [`Error::LfsPointer`] for a file that cannot be read;
    /// [`Error::NoConfig`], [`Error::Json`], [`Error::MissingField`] and [`Error::Config`] for a malformed one;
    /// [`Error::NoWeights`], [`Error::Safetensors`], [`Error::Quantized`], [`Error::Gguf`] and the
    /// variants that begin with `Tensor` and `Shard` for the weights; [`Error::NoTokenizer`],
    /// [`Error::Tokenizer`] and [`Error::TokenizerVocabulary`] for the tokenizer; [`Error::OutOfMemory`] or [`Error::Backend`] if the weights do not fit the device.
    pub fn open(device: D, folder: impl AsRef<Path>) -> Result<Self> {
        OpenOptions::default().open(device, folder)
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
        OpenOptions::default().families(families).open(device, folder)
    }

    /// [`open`](Self::open) with one rank's part of the network.
    ///
    /// # Errors
    /// As [`open`](Self::open) and [`Decoder::load_shard`].
    pub fn open_shard(device: D, folder: impl AsRef<Path>, shard: Shard<D>) -> Result<Self> {
        OpenOptions::default().open_shard(device, folder, shard)
    }

    fn open_part(
        device: D,
        folder: &Path,
        options: &OpenOptions<'_>,
        shard: Option<Shard<D>>,
    ) -> Result<Self> {
        if is_gguf(folder) {
            return Self::open_gguf(device, folder, options, shard);
        }
        let mut config = ModelConfig::from_file_with(folder, options.families)?;
        let tokenizer = Tokenizer::from_dir(folder)?;
        tokenizer.check_vocab_size(config.vocab_size)?;
        let generation = GenerationConfig::from_dir(folder)?;
        let template = ChatTemplate::from_dir(folder)?;
        let model = match options.random_weights {
            Some(seed) => {
                let weights = RandomTensors::new(&config, seed)?;
                Decoder::load_part(device, config, &weights, shard)?
            }
            None => {
                let mut weights = Weights::open_with(folder, options.mmap)?;
                quantised::prepare(folder, &mut weights)?;
                reads::own_output(&weights, &mut config)?;
                reads::check(&weights, &config, options.ignore_extra_tensors)?;
                if let Some(adapter) = found::adapter(folder) {
                    tracing::warn!("{}: {adapter}, is left out", folder.display());
                }
                Decoder::load_part(device, config, &weights, shard)?
            }
        };
        let style = PromptStyle::of(template.as_ref());
        Ok(Self {
            model: shown(model, &tokenizer),
            tokenizer,
            generation,
            template,
            own_template: None,
            style,
            folder: folder.to_path_buf(),
            draft: None,
        })
    }

    fn open_gguf(
        device: D,
        path: &Path,
        options: &OpenOptions<'_>,
        shard: Option<Shard<D>>,
    ) -> Result<Self> {
        let file = Gguf::open_with(path, options.mmap)?;
        let config = file.config(options.families)?;
        file.check_all_are_read(&config, options.ignore_extra_tensors)?;
        let tokenizer = file.tokenizer()?;
        tokenizer.check_vocab_size(config.vocab_size)?;
        let template = file.template()?;
        let model = shown(Decoder::load_part(device, config, &file, shard)?, &tokenizer);
        let style = PromptStyle::of(template.as_ref());
        Ok(Self {
            model,
            tokenizer,
            generation: GenerationConfig::default(),
            template,
            own_template: None,
            style,
            folder: path.to_path_buf(),
            draft: None,
        })
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

    /// Uses another chat template, such as [`ChatTemplate::vicuna`], for all prompts.
    pub fn set_template(&mut self, template: ChatTemplate) {
        self.own_template = Some(template.fingerprint());
        self.template = Some(template);
        self.style = PromptStyle::Chat;
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

    /// The same for a prompt of at most `limit` tokens, see [`Tokenizer::encode_within`].
    pub(crate) fn chat_tokens_within(
        &self,
        messages: &[Message],
        limit: usize,
    ) -> Result<Vec<u32>> {
        self.tokenizer.encode_within(&self.template()?.render(messages, true)?, false, limit)
    }

    /// End-of-sequence tokens: those of `generation_config.json`, else of `config.json`, and the
    /// tokenizer's, with which chat models end their turns even where the other files name another.
    pub fn eos_token_ids(&self) -> Vec<u32> {
        let mut ids = match self.generation.eos_token_ids.is_empty() {
            true => self.model.config().eos_token_ids.clone(),
            false => self.generation.eos_token_ids.clone(),
        };
        ids.extend(self.tokenizer.eos_id().filter(|id| !ids.contains(id)));
        ids
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

    /// Takes a model that guesses tokens for this one, which checks them, where [`EngineOptions::speculation`] is
    /// [`Speculation::Draft`]: a smaller one of the same tokens, or this one itself with a plan of shorter spans.
    /// Answers stay the same. Its sequences have the spans of `plan`, and take memory beside those of requests.
    ///
    /// ```no_run
    /// use moa_core::Plan;
    /// use moa_models::{Checkpoint, Cpu, EngineOptions, Speculation};
    ///
    /// let mut checkpoint = Checkpoint::open(Cpu::default(), "model")?;
    /// let itself = checkpoint.clone();
    /// checkpoint.set_draft(&itself, &Plan::load("plan.json")?)?;
    /// let options = EngineOptions { speculation: Speculation::draft(), ..Default::default() };
    /// let engine = checkpoint.engine(options);
    /// # Ok::<(), moa_models::Error>(())
    /// ```
    ///
    /// # Errors
    /// [`Error::DraftVocabulary`] if a token has another id there, [`Error::Core`] if the plan is for a model of other
    /// dimensions or other weights than the draft's, [`Error::Invalid`] if several devices share one of the two.
    pub fn set_draft(&mut self, draft: &Self, plan: &Plan) -> Result<()> {
        if self.model.ranks() > 1 || draft.model.ranks() > 1 {
            let expected = "one that a single device has, as the model that answers";
            return Err(Error::invalid("draft model", expected, "a part of one"));
        }
        self.tokenizer.check_same(&draft.tokenizer)?;
        draft.check_plan(plan)?;
        self.draft = Some(DraftModel { model: Arc::clone(&draft.model), plan: plan.clone() });
        Ok(())
    }

    /// Bytes of keys and values that a request takes in a sequence of `capacity` tokens with this plan, those of
    /// guesses included.
    ///
    /// # Errors
    /// As [`Decoder::cache_bytes`].
    pub fn request_bytes(
        &self,
        plan: &Plan,
        capacity: usize,
        speculation: Speculation,
    ) -> Result<u64> {
        let slack = speculation.draft_tokens();
        let own = self.model.cache_bytes(plan, capacity, slack)?;
        let beside = match (&self.draft, speculation) {
            (Some(DraftModel { model, plan }), Speculation::Draft { .. }) => {
                model.cache_bytes(plan, capacity.min(model.config().context_length()), slack)?
            }
            _ => 0,
        };
        Ok(own + beside)
    }

    /// An engine for requests of this model, with its tokenizer, chat template and end tokens.
    pub fn engine(&self, options: EngineOptions) -> Engine<D> {
        Engine::with_text(self.clone(), options)
    }

    /// Answers a message or, in [`PromptStyle::Raw`], continues a text with at most `max_new_tokens` of the likeliest tokens. See [`engine`](Self::engine) for
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
        let prompt = match self.style {
            PromptStyle::Chat => Prompt::chat(&[Message::user(text)]),
            PromptStyle::Raw => Prompt::from(text),
        };
        let mut engine = self.engine(EngineOptions::default());
        engine.submit(prompt, plan, GenerateOptions { max_new_tokens, ..Default::default() });
        let missing = || Error::invalid("engine", "one completion", "none");
        engine.complete_all()?.pop().ok_or_else(missing)
    }
}
