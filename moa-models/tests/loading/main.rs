//! Everything that is read from a model folder, against real models' files and bad ones.
//!
//! Files of real models are not part of the repository: `MOA_TEST_DATA` names the folder that has
//! them, as `configs`, `models` and `tokenizers`. Without it those tests are skipped, loudly.

mod chat;
mod config;
mod generation_config;
mod tokenizer;
mod weights;

use std::path::{Path, PathBuf};

/// The model that comes with the repository.
fn moa_tiny() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../assets/moa-tiny")
}

/// A file or folder of the test data, if there is any.
fn test_data(path: &str) -> Option<PathBuf> {
    let data = std::env::var_os("MOA_TEST_DATA");
    if data.is_none() {
        eprintln!("skipped: set MOA_TEST_DATA to the folder with `{path}`");
    }
    data.map(|data| Path::new(&data).join(path))
}
