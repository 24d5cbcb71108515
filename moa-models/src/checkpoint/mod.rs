//! A model folder: weights, tokenizer, chat template, generation defaults.

pub(crate) mod fingerprint;
pub(crate) mod generation_config;
#[cfg(feature = "hub")]
pub(crate) mod hub;
pub(crate) mod json;
pub(crate) mod json_style;
pub(crate) mod mapped;
pub(crate) mod safetensors;
pub(crate) mod special_tokens;
pub(crate) mod template;
pub(crate) mod tokenizer;

use std::path::{Path, PathBuf};

use moa_core::Plan;

use crate::checkpoint::generation_config::GenerationConfig;
use crate::checkpoint::safetensors::Weights;
use crate::checkpoint::template::{ChatTemplate, Message};
use crate::checkpoint::tokenizer::Tokenizer;
use crate::decoder::config::LlamaConfig;
use crate::decoder::llama::{Llama, Sequence};
use crate::decoder::shard::Shard;
use crate::device::Ops;
use crate::engine::generate::{Finish, GenerateOptions, GenerateProgress, Generation, Next};
use crate::engine::stop::StopStrings;
use crate::{Error, Result};

/// A Hugging Face model folder, ready to run: weights, tokenizer, chat template, defaults.
#[derive(Debug)]
pub struct Checkpoint<O: Ops> {
    /// The network.
    pub model: Llama<O>,
    /// Text to tokens and back.
    pub tokenizer: Tokenizer,
    /// Generation defaults of the model's authors.
    pub generation: GenerationConfig,
    template: Option<ChatTemplate>,
    folder: PathBuf,
}

/// Text of one sequence with how it came about.
#[derive(Clone, Debug, PartialEq)]
pub struct Completion {
    /// The text, without stop string.
    pub text: String,
    /// Why it ended.
    pub finish: Finish,
}

impl<O: Ops> Checkpoint<O> {
    /// Opens `config.json`, `*.safetensors`, `tokenizer.json`, and if they exist
    /// `tokenizer_config.json` and `generation_config.json`.
    ///
    /// # Errors
    /// If a file is missing or malformed, or the parts are not of one model.
    pub fn open(ops: O, folder: impl AsRef<Path>) -> Result<Self> {
        Self::open_part(ops, folder.as_ref(), None)
    }

    /// [`open`](Self::open) with one rank's part of the network.
    ///
    /// # Errors
    /// As [`open`](Self::open) and [`Llama::load_shard`].
    pub fn open_shard(ops: O, folder: impl AsRef<Path>, shard: Shard<O>) -> Result<Self> {
        Self::open_part(ops, folder.as_ref(), Some(shard))
    }

    fn open_part(ops: O, folder: &Path, shard: Option<Shard<O>>) -> Result<Self> {
        let config = LlamaConfig::from_file(folder)?;
        let tokenizer = Tokenizer::from_dir(folder)?;
        tokenizer.check_vocab_size(config.vocab_size)?;
        let generation = GenerationConfig::from_dir(folder)?;
        let template = ChatTemplate::from_dir(folder)?;
        let model = Llama::load_part(ops, config, &Weights::open(folder)?, shard)?;
        Ok(Self { model, tokenizer, generation, template, folder: folder.to_path_buf() })
    }

    /// The folder it was opened from.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// The chat template.
    ///
    /// # Errors
    /// If the folder has none.
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
    /// If there is no template, or it refuses the messages.
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

    /// Greedy options that end at this model's end-of-sequence tokens.
    pub fn greedy(&self, max_new_tokens: usize) -> GenerateOptions {
        GenerateOptions {
            max_new_tokens,
            eos_token_ids: self.eos_token_ids(),
            ..Default::default()
        }
    }

    /// Checks that a plan was made for this model.
    ///
    /// # Errors
    /// If its dimensions or its weights are others.
    pub fn check_plan(&self, plan: &Plan) -> Result<()> {
        plan.check_shape(&self.model.shape())?;
        Ok(plan.check_fingerprint(self.model.fingerprint())?)
    }

    /// Continues prompts as text, streamed: `on_text(sequence, piece)` gets whole characters, and
    /// nothing of a stop string.
    ///
    /// # Errors
    /// As [`Llama::generate`].
    pub fn generate_text(
        &self,
        batch: &mut [Sequence<O>],
        prompts: &[&[u32]],
        options: &GenerateOptions,
        stop: &[String],
        on_progress: &mut dyn FnMut(TextProgress<'_>) -> Next,
    ) -> Result<(Vec<Completion>, Generation)> {
        let mut streams = prompts.iter().map(|_| self.tokenizer.stream()).collect::<Vec<_>>();
        let mut stops =
            prompts.iter().map(|_| StopStrings::new(stop)).collect::<Result<Vec<_>>>()?;
        let mut texts = vec![String::new(); prompts.len()];
        let mut failed = None;
        let generation =
            self.model.generate(batch, prompts, options, &mut |progress| match progress {
                GenerateProgress::Prefill { done, total } => {
                    on_progress(TextProgress::Prefill { done, total })
                }
                GenerateProgress::Token { sequence, token } => {
                    let piece = match streams[sequence].push(token) {
                        Ok(piece) => piece.unwrap_or_default(),
                        Err(e) => {
                            failed = Some(e);
                            return Next::Cancel;
                        }
                    };
                    let (emit, stopped) = stops[sequence].push(&piece);
                    texts[sequence].push_str(&emit);
                    let next = on_progress(TextProgress::Text { sequence, piece: &emit });
                    if stopped && next == Next::Continue { Next::Stop } else { next }
                }
            });
        if let Some(error) = failed {
            return Err(error);
        }
        let generation = generation?;
        let mut completions = Vec::with_capacity(texts.len());
        let ends = streams.into_iter().zip(stops).zip(&generation.sequences);
        for (sequence, (mut text, ((mut stream, mut stop), generated))) in
            texts.into_iter().zip(ends).enumerate()
        {
            if generated.finish != Finish::Stopped {
                let (mut emit, stopped) = stop.push(&stream.finish()?.unwrap_or_default());
                if !stopped {
                    emit.push_str(&stop.finish());
                }
                on_progress(TextProgress::Text { sequence, piece: &emit });
                text.push_str(&emit);
            }
            completions.push(Completion { text, finish: generated.finish });
        }
        Ok((completions, generation))
    }
}

/// What [`Checkpoint::generate_text`] tells its caller.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TextProgress<'a> {
    /// `done` of `total` prompt tokens of the batch are read.
    Prefill {
        /// Tokens read.
        done: usize,
        /// Tokens to read.
        total: usize,
    },
    /// New text of one sequence; may be empty while a character or stop string is incomplete.
    Text {
        /// Index in the batch.
        sequence: usize,
        /// Whole characters.
        piece: &'a str,
    },
}
