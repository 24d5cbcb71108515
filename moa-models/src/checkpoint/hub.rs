use std::fs;
use std::path::{Path, PathBuf};

use hf_hub::api::sync::{ApiBuilder, ApiRepo};
use hf_hub::{Repo, RepoType};

use crate::checkpoint::safetensors::{INDEX, read_index};
use crate::error::{Error, Result};

/// Files that a model may have beside its weights; only the first two are needed.
const FILES: [&str; 6] = [
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "generation_config.json",
    "chat_template.jinja",
];

/// Downloads the model `id` (`owner/name`) from the Hugging Face hub into the folder `dir`.
///
/// Takes the configuration, the tokenizer, the chat template and the safetensors weights, whole or
/// sharded, of `revision` (a branch, tag or commit; `main` when `None`). Files that are in `dir`
/// already are kept. A gated model needs the access token that the hub's own tools store.
///
/// Each file is written under a temporary name and renamed when it is complete, the
/// configuration last: a folder with a `config.json` has everything.
///
/// # Errors
/// [`Error::Download`] with the file that could not be had, [`Error::Io`] for the folder,
/// [`Error::Json`] and [`Error::ShardName`] for the index.
pub fn download(id: &str, revision: Option<&str>, dir: impl AsRef<Path>) -> Result<()> {
    let dir = dir.as_ref();
    fs::create_dir_all(dir).map_err(|source| Error::io(dir, source))?;
    let fail = |file: &str, reason: String| Error::Download {
        model: id.to_owned(),
        file: file.to_owned(),
        reason,
    };
    let api = ApiBuilder::from_env().with_progress(false).build();
    let api = api.map_err(|e| fail("list of files", e.to_string()))?;
    let revision = revision.unwrap_or("main").to_owned();
    let repo = api.repo(Repo::with_revision(id.to_owned(), RepoType::Model, revision));
    let info = repo.info().map_err(|e| fail("list of files", e.to_string()))?;
    let there: Vec<String> = info.siblings.into_iter().map(|file| file.rfilename).collect();
    let has = |file: &str| there.iter().any(|name| name == file);

    let mut files: Vec<String> = Vec::new();
    if has("model.safetensors") {
        files.push("model.safetensors".to_owned());
    } else if has(INDEX) {
        let index = get(&repo, INDEX, dir).map_err(|e| fail(INDEX, e))?;
        files.extend(read_index(&index)?.into_values());
        files.sort();
        files.dedup();
    } else {
        return Err(fail("model.safetensors", "the model has no safetensors weights".to_owned()));
    }
    for (number, file) in FILES.into_iter().enumerate().rev() {
        if has(file) || number < 2 {
            files.push(file.to_owned());
        }
    }
    for file in files {
        get(&repo, &file, dir).map_err(|e| fail(&file, e))?;
    }
    Ok(())
}

/// Makes sure that `file` is in `dir`; returns its path there.
fn get(repo: &ApiRepo, file: &str, dir: &Path) -> std::result::Result<PathBuf, String> {
    let path = dir.join(file);
    if path.is_file() {
        return Ok(path);
    }
    tracing::info!(file, "downloading");
    let cached = repo.get(file).map_err(|e| e.to_string())?;
    let partial = dir.join(format!("{file}.tmp"));
    // The cache holds links to its blobs. A hard link to a blob takes no space, but a file that a
    // person may edit must not share it.
    let blob = fs::canonicalize(&cached).map_err(|e| e.to_string())?;
    let copy = || fs::copy(&blob, &partial).map(drop);
    let _ = fs::remove_file(&partial);
    let placed = match file.ends_with(".safetensors") {
        true => fs::hard_link(&blob, &partial).or_else(|_| copy()),
        false => copy(),
    };
    placed.and_then(|()| fs::rename(&partial, &path)).map_err(|e| e.to_string())?;
    Ok(path)
}
