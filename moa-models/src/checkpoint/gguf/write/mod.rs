//! From a model folder, or another GGUF file, to a GGUF file of one type of numbers or blocks.

mod container;
mod metadata;
mod tensors;
mod vocabulary;

use std::collections::BTreeMap;
use std::path::Path;

use half::{bf16, f16};
use moa_core::Dtype;
use rayon::prelude::*;

use self::container::{Container, Keys, Row};
use self::tensors::Source;
use super::reader::Header;
use super::tensor_type::TensorType;
use super::{Gguf, is_gguf};
use crate::checkpoint::generation_config::GenerationConfig;
use crate::checkpoint::safetensors::Weights;
use crate::checkpoint::template::ChatTemplate;
use crate::checkpoint::tokenizer::Tokenizer;
use crate::checkpoint::{quantised, reads};
use crate::decoder::config::ModelConfig;
use crate::families::FAMILIES;
use crate::progress::{Progress, Stage};
use crate::{Error, Result};

/// Elements that are rounded before they are written.
const PIECE: usize = 1 << 22;
/// Elements of a task.
const TASK: usize = 1 << 15;

/// What [`quantize`] wrote.
#[derive(Clone, Debug, PartialEq, serde::Serialize)]
pub struct Quantized {
    /// Bytes of the file.
    pub bytes: usize,
    /// Bits for each weight, everything counted.
    pub bits_per_weight: f64,
    /// Tensors of each type, by GGUF's names.
    pub tensors: BTreeMap<&'static str, usize>,
    /// Root of the mean square of the errors of all weights, over that of the weights.
    pub error: f64,
}

/// Writes a model as a GGUF file of [blocks](moa_core::BlockType) or [numbers](moa_core::Dtype): one of a folder with
/// safetensors, of the architectures that [`Gguf`] reads, or another GGUF file.
///
/// Weights are rounded as the reference implementation of the format rounds them. Vectors stay in f32. In a file of
/// blocks the matrix that makes the logits gets Q6_K, in one of Q8_0 that; where rows are not whole blocks of a long
/// format, Q4_K becomes Q5_0, Q5_K Q5_1 and Q6_K Q8_0, as in llama.cpp. Metadata of a GGUF file are copied, and so are
/// weights that are in the blocks that they are to get.
///
/// The file is there when it is whole, and only if configuration and tokenizer that are read back from it are
/// those of the source. It takes the place of one that was there at the beginning, but of none that came meanwhile.
///
/// # Errors
/// [`Error::Gguf`] for a source that is none, or has something that GGUF has no word for; [`Error::Config`]
/// for a model of another family; those of [`Checkpoint::open`](crate::Checkpoint::open) for the source;
/// [`Error::NotFinite`] for a weight that is no number, or beyond what its type holds; [`Error::Cancelled`];
/// [`Error::Io`] if the file cannot be written, or another one came to be in its place.
pub fn quantize(
    model: impl AsRef<Path>,
    kind: impl Into<TensorType>,
    out: impl AsRef<Path>,
    progress: &mut dyn Progress,
) -> Result<Quantized> {
    let (model, wanted, out) = (model.as_ref(), kind.into(), out.as_ref());
    let out = (out, std::fs::symlink_metadata(out).is_err());
    let mut keys = Keys::default();
    if is_gguf(model) {
        let gguf = Gguf::open(model)?;
        let header = Header::parse(model, &gguf.files[0].map)?;
        for (key, bytes) in header.places {
            let is_own = ["general.file_type", "general.quantization_version", "general.alignment"];
            if !is_own.contains(&key.as_str()) && !key.starts_with("split.") {
                keys.copied(&gguf.files[0].map[bytes]);
            }
        }
        let tied = !gguf.contains("output.weight");
        return write(out, keys, &tensors::of_gguf(&gguf)?, (wanted, tied), progress, |_| Ok(()));
    }
    let architecture = metadata::architecture(model)?;
    let mut config = ModelConfig::from_file(model)?;
    let mut weights = Weights::open(model)?;
    quantised::prepare(model, &mut weights)?;
    reads::own_output(&weights, &mut config)?;
    reads::check(&weights, &config, false)?;
    let sources = tensors::of_folder(&config, &weights, architecture)?;
    let tokenizer = Tokenizer::from_dir(model)?;
    tokenizer.check_vocab_size(config.vocab_size)?;
    metadata::write(&mut keys, model, architecture, &config)?;
    let mut ends = GenerationConfig::from_dir(model)?.eos_token_ids;
    if ends.is_empty() {
        ends.clone_from(&config.eos_token_ids);
    }
    vocabulary::write(&mut keys, &tokenizer, config.vocab_size, &ends)?;
    if let Some(template) = ChatTemplate::from_dir(model)? {
        keys.text("tokenizer.chat_template", template.source());
    }
    let tied = config.tie_word_embeddings;
    write(out, keys, &sources, (wanted, tied), progress, |file| {
        check(model, file, &config, &tokenizer)
    })
}

/// A text of many kinds of characters, which tokenizers split in their own ways.
const TEXT: &str = "Hello,  world! I'll pay $1234.56 (or 50%)\n\n\tfor naïve cafés — Ünïcode: Привет, мир; \
                    你好世界, 日本語 🙂👍 x_1 == y[23]; don't  THEY'RE\r\nend ";

/// Checks that a file says what its source says.
fn check(model: &Path, file: &Path, config: &ModelConfig, tokenizer: &Tokenizer) -> Result<()> {
    let gguf = Gguf::open(file)?;
    let read = gguf.config(FAMILIES)?;
    let (names, ends) = (config.tensor_names.clone(), config.eos_token_ids.clone());
    let bos_token_id = config.bos_token_id;
    let read = ModelConfig { tensor_names: names, eos_token_ids: ends, bos_token_id, ..read };
    let config = &metadata::as_written(config.clone(), None);
    let mut read = metadata::as_written(read, Some(config));
    // Layers that are all of the default kind need not be told apart.
    let kinds = |c: &ModelConfig| (0..c.num_hidden_layers).map(|i| c.layer_kind(i)).collect();
    let (own, found): (Vec<_>, Vec<_>) = (kinds(config), kinds(&read));
    if own == found {
        read.layer_kinds.clone_from(&config.layer_kinds);
    }
    if &read != config {
        let expected = "one that GGUF has words for, layer by layer and scaling included";
        tracing::debug!("written {config:?}, read {read:?}");
        let path = model.join("config.json");
        return Err(Error::gguf(&path, "configuration", expected, "another one"));
    }
    let own = gguf.tokenizer()?;
    for special in [false, true] {
        if own.encode(TEXT, special)? != tokenizer.encode(TEXT, special)? {
            let expected = "one that GGUF has words for";
            return Err(Error::gguf(tokenizer.path(), "tokenizer", expected, "another one"));
        }
    }
    Ok(())
}

/// Writes keys and tensors; `check` looks at the file before it gets its name.
fn write(
    out: (&Path, bool),
    mut keys: Keys,
    sources: &[Source],
    (wanted, tied): (TensorType, bool),
    progress: &mut dyn Progress,
    check: impl FnOnce(&Path) -> Result<()>,
) -> Result<Quantized> {
    metadata::types(&mut keys, wanted);
    let rows = sources.iter().map(|source| Row {
        name: &source.name,
        shape: &source.shape,
        kind: source.kind(wanted, tied),
    });
    let rows: Vec<Row<'_>> = rows.collect();
    let mut container = Container::create(out, &keys, &rows)?;
    let (mut errors, mut weights, mut types) = ((0.0, 0.0), 0, BTreeMap::new());
    for (done, (source, row)) in sources.iter().zip(&rows).enumerate() {
        progress.advance(Stage::Quantize, done, rows.len())?;
        *types.entry(row.kind.name()).or_insert(0) += 1;
        let (count, cols) = source.rows();
        weights += count * cols;
        let (piece, task) = ((PIECE / cols).max(1), (TASK / cols).max(1));
        for first in (0..count).step_by(piece) {
            let tasks: Vec<usize> = (first..count.min(first + piece)).step_by(task).collect();
            let end = count.min(first + piece);
            let round = |start: &usize| rounded(source, *start..end.min(start + task), row.kind);
            let parts: Vec<_> = tasks.par_iter().map(round).collect();
            for part in parts {
                let (bytes, (error, size)) = part?;
                container.write(&bytes)?;
                errors = (errors.0 + error, errors.1 + size);
            }
        }
        container.align()?;
    }
    let bytes = container.finish(check)?;
    progress.advance(Stage::Quantize, rows.len(), rows.len())?;
    Ok(Quantized {
        bytes,
        bits_per_weight: 8.0 * bytes as f64 / weights.max(1) as f64,
        tensors: types,
        error: if errors.1 > 0.0 { f64::sqrt(errors.0 / errors.1) } else { 0.0 },
    })
}

/// Some rows as they are written, the sum of the squares of their errors, and that of their own. [`Error::NotFinite`] for a weight that is none, or is beyond what the type holds.
fn rounded(
    source: &Source,
    rows: std::ops::Range<usize>,
    kind: TensorType,
) -> Result<(Vec<u8>, (f64, f64))> {
    let (mut values, mut bytes) = (Vec::new(), Vec::new());
    rows.clone().for_each(|row| source.row(row, &mut values));
    let mut near = values.clone();
    match kind {
        // Blocks that are rounded to their own type again are not all the same.
        TensorType::Blocks(blocks) => {
            let own: Option<Vec<&[u8]>> =
                rows.clone().map(|row| source.blocks(row, blocks)).collect();
            match own {
                Some(own) => bytes = own.concat(),
                None => blocks.narrow(&values, &mut bytes),
            }
            blocks.widen(&bytes, 0, &mut near);
        }
        TensorType::Plain(Dtype::F32) => {
            bytes.extend(values.iter().flat_map(|x| x.to_le_bytes()));
        }
        TensorType::Plain(Dtype::F16) => {
            let halves = values.iter().map(|x| f16::from_f32(*x));
            bytes.extend(halves.clone().flat_map(f16::to_le_bytes));
            near.iter_mut().zip(halves).for_each(|(near, half)| *near = half.to_f32());
        }
        // There is no other type.
        TensorType::Plain(_) => {
            let halves = values.iter().map(|x| bf16::from_f32(*x));
            bytes.extend(halves.clone().flat_map(bf16::to_le_bytes));
            near.iter_mut().zip(halves).for_each(|(near, half)| *near = half.to_f32());
        }
    }
    // A weight that is none may be lost in its block, and one that is too large takes its block with it: it is the largest.
    let is_bad = |(_, (x, y)): &(usize, (&f32, &f32))| !(x.is_finite() && y.is_finite());
    let bad = values.iter().zip(&near).enumerate().filter(is_bad);
    if let Some((at, (worst, _))) = bad.max_by(|a, b| a.1.0.abs().total_cmp(&b.1.0.abs())) {
        let (name, cols) = (&source.name, source.rows().1);
        let (row, col) = (rows.start + at / cols, at % cols);
        let what = format!("row {row}, column {col} of tensor `{name}` as {}", kind.name());
        return Err(Error::NotFinite { what, got: worst.to_string() });
    }
    let square = |x: f32| f64::from(x) * f64::from(x);
    let error = values.iter().zip(&near).map(|(x, y)| square(x - y)).sum();
    Ok((bytes, (error, values.iter().copied().map(square).sum())))
}
