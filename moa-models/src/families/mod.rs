//! Families of models: how their `config.json` is read.

pub(crate) mod granite;
mod layer_kinds;
pub(crate) mod llama;
pub(crate) mod ministral3;
pub(crate) mod mistral;
pub(crate) mod phi3;
pub(crate) mod qwen2;
pub(crate) mod qwen3;
pub(crate) mod smollm3;

use std::borrow::Cow;
use std::path::Path;

use crate::Result;
use crate::checkpoint::found::config_file;
use crate::checkpoint::gguf::{Gguf, is_gguf};
use crate::checkpoint::json::JsonObject;
use crate::decoder::config::ModelConfig;
use crate::families::granite::Granite;
use crate::families::llama::Llama;
use crate::families::ministral3::Ministral3;
use crate::families::mistral::Mistral;
use crate::families::phi3::Phi3;
use crate::families::qwen2::Qwen2;
use crate::families::qwen3::Qwen3;
use crate::families::smollm3::SmolLm3;

/// A family of models that a [`Decoder`](crate::Decoder) can run: which checkpoints belong to it, and
/// how their `config.json` describes a model.
///
/// A family is data. What makes models differ stands in [`ModelConfig`]: dimensions, rotary
/// frequencies, biases, norms of queries and keys, kinds of layers, factors, names of tensors. A family of
/// one's own reads what [`Llama`] reads and says what is different:
///
/// ```
/// use moa_models::{Family, JsonObject, Llama, ModelConfig, Result};
///
/// /// Llama with biases on queries, keys and values.
/// struct Biased;
///
/// impl Family for Biased {
///     fn model_types(&self) -> &[&str] {
///         &["biased"]
///     }
///
///     fn config(&self, file: &JsonObject) -> Result<ModelConfig> {
///         Ok(ModelConfig { qkv_bias: true, ..Llama.config(file)? })
///     }
/// }
///
/// let text = r#"{"model_type": "biased", "vocab_size": 64, "hidden_size": 32,
///     "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
///     "rms_norm_eps": 1e-6, "max_position_embeddings": 128}"#;
/// let config = ModelConfig::from_json_with(text, &[&Llama, &Biased])?;
/// assert!(config.qkv_bias && !config.o_bias);
/// assert!(ModelConfig::from_json(text).is_err());
/// # Ok::<(), moa_models::Error>(())
/// ```
pub trait Family: Sync {
    /// Values of `model_type` that the family answers to.
    fn model_types(&self) -> &[&str];

    /// Reads a `config.json`, all of whose fields `file` has.
    ///
    /// # Errors
    /// [`Error::MissingField`](crate::Error::MissingField) and [`Error::Config`](crate::Error::Config)
    /// with the field.
    fn config(&self, file: &JsonObject) -> Result<ModelConfig>;
}

/// The families that are known without being named.
pub const FAMILIES: &[&dyn Family] =
    &[&Llama, &Mistral, &Ministral3, &Qwen2, &Qwen3, &SmolLm3, &Granite, &Phi3];

impl ModelConfig {
    /// Reads `config.json`, given its folder or the file itself, or the metadata of a GGUF file, of one of
    /// [`FAMILIES`].
    ///
    /// # Errors
    /// [`Error::Io`](crate::Error::Io) when it cannot be read, [`Error::NoConfig`](crate::Error::NoConfig) for a folder
    /// without one, [`Error::Json`](crate::Error::Json) when
    /// it is not a JSON object or names a field twice, [`Error::Gguf`](crate::Error::Gguf) for a GGUF file,
    /// [`Error::MissingField`](crate::Error::MissingField) and [`Error::Config`](crate::Error::Config)
    /// with the field otherwise.
    pub fn from_file(dir_or_file: impl AsRef<Path>) -> Result<Self> {
        Self::from_file_with(dir_or_file, FAMILIES)
    }

    /// [`from_file`](Self::from_file) of one of these families.
    ///
    /// # Errors
    /// As [`from_file`](Self::from_file).
    pub fn from_file_with(dir_or_file: impl AsRef<Path>, families: &[&dyn Family]) -> Result<Self> {
        let path = dir_or_file.as_ref();
        if is_gguf(path) {
            return Gguf::open(path)?.config(families);
        }
        read(&JsonObject::read(&config_file(path)?)?, families)
    }

    /// Parses the text of a `config.json` of one of [`FAMILIES`].
    ///
    /// # Errors
    /// As [`from_file`](Self::from_file), with `config.json` as the path.
    pub fn from_json(text: &str) -> Result<Self> {
        Self::from_json_with(text, FAMILIES)
    }

    /// [`from_json`](Self::from_json) of one of these families.
    ///
    /// # Errors
    /// As [`from_json`](Self::from_json).
    pub fn from_json_with(text: &str, families: &[&dyn Family]) -> Result<Self> {
        read(&JsonObject::parse(Path::new("config.json"), text)?, families)
    }
}

/// The part of a configuration that a family of these reads, by its name: all, or of a model of images and text, say, the
/// object `text_config`.
pub(crate) fn text_part<'f>(
    file: &'f JsonObject,
    families: &[&dyn Family],
) -> Result<Cow<'f, JsonObject>> {
    let is_known = |file: &JsonObject| {
        let kind = file.text("model_type")?;
        Ok::<_, crate::Error>(
            kind.is_some_and(|kind| families.iter().any(|f| f.model_types().contains(&kind))),
        )
    };
    match file.object("text_config")? {
        Some(text) if !is_known(file)? && is_known(&text)? => {
            let shared = ["tie_word_embeddings", "bos_token_id", "eos_token_id"];
            Ok(Cow::Owned(text.with_absent(shared, file)))
        }
        _ => Ok(Cow::Borrowed(file)),
    }
}

/// What the family of the file's `model_type` reads.
pub(crate) fn read(file: &JsonObject, families: &[&dyn Family]) -> Result<ModelConfig> {
    let file = &*text_part(file, families)?;
    // Early files do not say.
    let wanted = file.text("model_type")?.unwrap_or("llama");
    let Some(family) = families.iter().find(|family| family.model_types().contains(&wanted)) else {
        let known: Vec<&str> = families.iter().flat_map(|f| f.model_types()).copied().collect();
        return Err(file.invalid("model_type", &known.join(", "), wanted));
    };
    let config = family.config(file)?;
    match config.fault() {
        None => Ok(config),
        Some((field, expected, got)) => Err(file.invalid(field, &expected, got)),
    }
}
