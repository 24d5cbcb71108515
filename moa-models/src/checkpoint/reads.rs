//! Whether a decoder reads every tensor of a checkpoint.

use std::collections::BTreeSet;
use std::path::Path;

use crate::checkpoint::fp8;
use crate::checkpoint::safetensors::Weights;
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

/// How the names of the text part begin in models that have other parts, behind `model.` or without.
const TEXT_PARTS: [&str; 2] = ["language_model.", "text_model."];

/// Takes an output matrix of its own into the configuration, where that denies one, and says so.
pub(crate) fn own_output(weights: &Weights, config: &mut ModelConfig) -> Result<()> {
    let names = &config.tensor_names;
    if !config.tie_word_embeddings || !weights.contains(&names.output) {
        return Ok(());
    }
    let table = [config.vocab_size, config.hidden_size];
    let embedding = weights.tensor(&names.embedding, &table)?;
    let output = weights.tensor(&names.output, &table)?;
    if embedding.dtype() != output.dtype() || embedding.bytes() != output.bytes() {
        tracing::warn!(
            "`tie_word_embeddings` is true, but `{}` differs from `{}`; both are used",
            names.output,
            names.embedding,
        );
        config.tie_word_embeddings = false;
    }
    Ok(())
}

/// Checks that a decoder of this configuration reads everything; with `ignore`, says what it does not.
///
/// A tensor that nobody asks for says that the model is another one: one with biases, with norms or
/// with more layers than its configuration admits to. Its text would change silently.
pub(crate) fn check(weights: &Weights, config: &ModelConfig, ignore: bool) -> Result<()> {
    let asked = config.tensor_names.all(config);
    // A packed matrix is there in parts.
    let parts = asked.iter().filter_map(|name| name.strip_suffix(".weight")).flat_map(|stem| {
        let words = [".qweight", ".qzeros", ".scales", ".g_idx"].into_iter();
        words.chain(fp8::SCALES).chain(fp8::INPUTS).map(move |end| format!("{stem}{end}"))
    });
    let all: Vec<String> = asked.iter().cloned().chain(parts).collect();
    let asked: BTreeSet<&str> = all.iter().filter_map(|name| weights.actual_name(name)).collect();
    // An output matrix that equals the embedding is no harm.
    let output = weights.actual_name(&config.tensor_names.output);
    // Of a model of images and text, say, the text part is read.
    let embedding = weights.actual_name(&config.tensor_names.embedding);
    let text_part = embedding.and_then(|name| {
        TEXT_PARTS.iter().find_map(|part| Some(&name[..name.find(part)? + part.len()]))
    });
    let is_read = |name: &str| {
        asked.contains(name)
            || text_part.is_some_and(|part| !name.starts_with(part))
            || output == Some(name)
            || BUFFERS.iter().any(|end| name.ends_with(end))
            // Tools that pack weights give every matrix a bias.
            || name.ends_with(".bias") && weights.is_zero(name)
    };
    unread(weights.dir(), weights.names().filter(|name| !is_read(name)), ignore)
}

/// Refuses a model with tensors that nobody reads, if there are some; with `ignore`, says which they are.
pub(crate) fn unread<'n>(
    path: &Path,
    names: impl Iterator<Item = &'n str>,
    ignore: bool,
) -> Result<()> {
    let names: Vec<String> = names.map(str::to_owned).collect();
    if names.is_empty() {
        return Ok(());
    }
    let error = Error::TensorsUnread { path: path.to_owned(), names };
    if ignore {
        tracing::warn!("{error}");
        return Ok(());
    }
    Err(error)
}
