//! Everything that is read from a model folder, good files and bad ones. Those of real models are read in
//! `real_models`.

mod chat;
mod config;
mod extra_tensors;
mod found;
mod generation_config;
mod gguf;
mod sentencepiece;
#[path = "../streamed/mod.rs"]
mod streamed;
mod templates;
mod tokenizer;
mod tokenizer_kinds;
mod weights;

use std::path::{Path, PathBuf};

/// The model that comes with the repository.
fn moa_tiny() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../assets/moa-tiny")
}
