use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use candle_core::{Error, Result};

/// The part of `model.safetensors.index.json` that names the shards.
#[derive(serde::Deserialize)]
struct Index {
    weight_map: std::collections::BTreeMap<String, String>,
}

/// The safetensors files of a checkpoint folder, single or sharded.
///
/// # Errors
/// The folder has neither `model.safetensors` nor a readable index.
pub(crate) fn shards(folder: &Path) -> Result<Vec<PathBuf>> {
    let single = folder.join("model.safetensors");
    if single.is_file() {
        return Ok(vec![single]);
    }
    let text = std::fs::read(folder.join("model.safetensors.index.json"))?;
    let index: Index = serde_json::from_slice(&text).map_err(Error::wrap)?;
    let names: BTreeSet<String> = index.weight_map.into_values().collect();
    Ok(names.iter().map(|name| folder.join(name)).collect())
}
