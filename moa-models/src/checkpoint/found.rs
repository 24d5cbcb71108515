//! What a folder has that is no model's, for messages that say what to name instead.

use std::path::{Path, PathBuf};

use crate::checkpoint::json::JsonObject;
use crate::checkpoint::safetensors::file_names;
use crate::checkpoint::text::{is_file, read_text};
use crate::{Error, Result};

const ADAPTER: &str = "adapter_config.json";

/// The configuration file of a model folder, or the path itself where it is no folder.
pub(crate) fn config_file(path: &Path) -> Result<PathBuf> {
    if !path.is_dir() {
        return Ok(path.to_owned());
    }
    let file = path.join("config.json");
    match is_file(&file)? {
        true => Ok(file),
        false => Err(Error::NoConfig { path: path.to_owned(), got: found(path)? }),
    }
}

/// What lies in a folder without `config.json`.
fn found(dir: &Path) -> Result<String> {
    let mut names = file_names(dir)?;
    names.sort();
    let of_child = |name: &&String| dir.join(name).join("config.json").is_file();
    Ok(if let Some(adapter) = adapter(dir) {
        adapter
    } else if let Some(file) = gguf(&names) {
        file
    } else if names.iter().any(|name| name == "params.json") {
        "params.json, Mistral's own format; transformers has another one".to_owned()
    } else if let Some(revision) = snapshot(dir) {
        format!("a folder of the hub's cache; name its snapshots/{revision}")
    } else if let Some(child) = names.iter().find(of_child) {
        format!("{child}/config.json; name that folder")
    } else if names.is_empty() {
        "an empty folder".to_owned()
    } else {
        names.truncate(4);
        names.join(", ")
    })
}

/// The snapshot of a model of the hub's cache, that of `main` if there is one.
fn snapshot(dir: &Path) -> Option<String> {
    let all = file_names(&dir.join("snapshots")).ok()?;
    let main = read_text(dir.join("refs/main")).unwrap_or_default();
    all.iter().find(|name| **name == main.trim()).or(all.iter().min()).cloned()
}

/// The adapter that lies in a folder, if there is one.
pub(crate) fn adapter(dir: &Path) -> Option<String> {
    let file = JsonObject::read(&dir.join(ADAPTER)).ok()?;
    let of = file.text("base_model_name_or_path").ok().flatten().unwrap_or("another model");
    Some(format!(
        "{ADAPTER}, an adapter of {of}, to be merged into that (peft's `merge_and_unload`)"
    ))
}

/// The first GGUF file of these, as one that can be named itself.
pub(crate) fn gguf(names: &[String]) -> Option<String> {
    let is_model = |name: &&String| name.ends_with(".gguf") && !name.starts_with("mmproj");
    let file = names.iter().find(is_model)?;
    Some(format!("{file}; name the GGUF file itself"))
}
