use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};

use hf_hub::api::sync::{ApiBuilder, ApiRepo};
use hf_hub::{Cache, Repo, RepoType};

use crate::checkpoint::hub_gguf::{choose, is_gguf, parts};
use crate::checkpoint::hub_id::HubId;
use crate::checkpoint::safetensors::{INDEX, SINGLE, read_index};
use crate::error::{Error, Result};
use crate::progress::{Progress, Stage};

/// Files that a folder of safetensors may have beside its weights and its tokenizer; the first one is needed.
const FILES: [&str; 8] = [
    "config.json",
    "quantize_config.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "generation_config.json",
    "chat_template.jinja",
    "chat_template.json",
];
/// Either is the tokenizer; the second one is asked for where there is no first.
const TOKENIZERS: [&str; 2] = ["tokenizer.json", "tokenizer.model"];

/// Downloads a model from the Hugging Face hub into the folder `dir`; returns what to open.
///
/// That is `dir`, with the configuration, the tokenizer, the chat template and the safetensors weights, whole or
/// sharded; or the GGUF file that `id` names, or that is the only one of a repository without safetensors. Files that
/// are in `dir` already are kept. A gated model needs the access token that the hub's own tools store.
///
/// Each file is written under a temporary name and renamed when it is complete, the
/// configuration last: a folder with a `config.json` has everything. A download that broke off goes on
/// where it was.
///
/// # Errors
/// [`Error::Download`] with the file that could not be had, [`Error::HubFile`] if the repository has several GGUF files
/// or not the one that is named, [`Error::Io`] for the folder, [`Error::Json`] and [`Error::ShardName`] for the index.
pub fn download(id: &HubId, dir: impl AsRef<Path>) -> Result<PathBuf> {
    let dir = dir.as_ref();
    fs::create_dir_all(dir).map_err(|source| Error::io(dir, source))?;
    let remote = Remote::new(id)?;
    remote.files(dir, |file| place(&remote.fetch(file, &mut ())?, &dir.join(file)))
}

/// A model of the Hugging Face hub, as a folder or a GGUF file: in the cache that the hub's own tools share
/// (`HF_HUB_CACHE`, or `hub` in `HF_HOME`), or downloaded into it. With `HF_HUB_OFFLINE=1` nothing is
/// downloaded; `HF_ENDPOINT` names another hub.
///
/// What is whole in the cache is taken without asking the hub: a folder that has the configuration, the tokenizer and
/// all weights, a GGUF file that `id` names. Which of the GGUF files is meant where it names none, the hub is asked,
/// and offline the cache. `progress` hears of each file in MiB.
///
/// # Errors
/// As [`download`].
pub fn fetch(id: &HubId, progress: &mut dyn Progress) -> Result<PathBuf> {
    let folder = snapshot(id);
    if let Some(path) = whole(&folder, id) {
        return Ok(path);
    }
    let offline = std::env::var("HF_HUB_OFFLINE").unwrap_or_default().to_lowercase();
    if !matches!(offline.as_str(), "1" | "true" | "yes" | "on") {
        let remote = Remote::new(id)?;
        return remote.files(&remote.folder(), |file| remote.fetch(file, progress));
    }
    let mut files = Vec::new();
    list_gguf(&folder, "", &mut files);
    if id.file().is_none() && !files.is_empty() {
        let parts = choose(id, &files)?;
        if has_all(&folder, &parts) {
            return Ok(folder.join(&parts[0]));
        }
    }
    Err(Error::Download {
        model: id.to_string(),
        file: "the model".to_owned(),
        reason: format!(
            "it is not whole in the cache {}, and HF_HUB_OFFLINE forbids to ask the hub",
            cache().path().display()
        ),
    })
}

const MAIN: &str = "main";

/// The cache that the hub's own tools use.
fn cache() -> Cache {
    match std::env::var_os("HF_HUB_CACHE") {
        Some(path) => Cache::new(path.into()),
        None => Cache::from_env(),
    }
}

/// A model's repository, at the revision that is asked for.
fn repo(id: &HubId) -> Repo {
    let revision = id.revision().unwrap_or(MAIN).to_owned();
    Repo::with_revision(id.model().to_owned(), RepoType::Model, revision)
}

/// The folder that the cache has of a revision, if it has one.
fn snapshot(id: &HubId) -> PathBuf {
    let own = cache().repo(repo(id));
    // Without the dot at its end.
    let by_name = own.get(".").map(|folder| folder.components().collect());
    // A commit has no name of its own.
    by_name.unwrap_or_else(|| own.pointer_path(repo(id).revision()))
}

/// What is to be opened of a folder of the cache, if it has all files of it: the GGUF file that is named, or the folder.
fn whole(folder: &Path, id: &HubId) -> Option<PathBuf> {
    if let Some(file) = id.file() {
        let parts = parts(file);
        return has_all(folder, &parts).then(|| folder.join(&parts[0]));
    }
    let has = |file: &str| folder.join(file).is_file();
    let has_weights = || {
        has(SINGLE)
            || has(INDEX)
                && read_index(&folder.join(INDEX))
                    .is_ok_and(|index| index.values().all(|shard| has(shard)))
    };
    let is_whole = id.blocks().is_none() && has(FILES[0]) && TOKENIZERS.into_iter().any(has);
    (is_whole && has_weights()).then(|| folder.to_owned())
}

fn has_all(folder: &Path, files: &[String]) -> bool {
    files.iter().all(|file| folder.join(file).is_file())
}

/// Adds the names of all GGUF files in `folder`, those of its folders with their names before them.
fn list_gguf(folder: &Path, before: &str, files: &mut Vec<String>) {
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        let Ok(name) = entry.file_name().into_string() else { continue };
        let (name, path) = (format!("{before}{name}"), entry.path());
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            list_gguf(&path, &format!("{name}/"), files);
        } else if is_gguf(&name) && path.is_file() {
            files.push(name);
        }
    }
}

/// What stands for a file where the hub does not tell its files.
const LISTING: &str = "list of files";

/// One commit of a model on the hub: its files belong together whatever comes to the branch meanwhile.
struct Remote {
    id: HubId,
    commit: String,
    files: Vec<String>,
    repo: ApiRepo,
}

impl Remote {
    fn new(id: &HubId) -> Result<Self> {
        let fail = |reason: String| Error::Download {
            model: id.to_string(),
            file: LISTING.to_owned(),
            reason,
        };
        let builder = ApiBuilder::from_env().with_progress(false).with_retries(2);
        let api = builder.with_cache_dir(cache().path().clone()).build();
        let api = api.map_err(|e| fail(e.to_string()))?;
        let info = api.repo(repo(id)).info().map_err(|e| fail(e.to_string()))?;
        let at_commit = Repo::with_revision(id.model().into(), RepoType::Model, info.sha.clone());
        Ok(Self {
            id: id.clone(),
            repo: api.repo(at_commit),
            commit: info.sha,
            files: info.siblings.into_iter().map(|file| file.rfilename).collect(),
        })
    }

    fn fault(&self, file: &str, reason: impl ToString) -> Error {
        let (model, file) = (self.id.to_string(), file.to_owned());
        Error::Download { model, file, reason: reason.to_string() }
    }

    /// The folder of the cache that the files are in.
    fn folder(&self) -> PathBuf {
        cache().repo(repo(&self.id)).pointer_path(&self.commit)
    }

    /// Gives every file of the model to `get`, which makes it one in `folder`: weights first, the configuration last.
    /// The cache then knows the commit by the name that was asked for. Returns what to open.
    fn files(
        &self,
        folder: &Path,
        mut get: impl FnMut(&str) -> Result<PathBuf>,
    ) -> Result<PathBuf> {
        let has = |file: &str| self.files.iter().any(|name| name == file);
        let is_folder = self.id.file().is_none() && self.id.blocks().is_none();
        let weights = [SINGLE, INDEX].into_iter().find(|file| is_folder && has(file));
        let Some(weights) = weights else {
            if is_folder && !self.files.iter().any(|file| is_gguf(file)) {
                let reason = "the model has weights neither in safetensors nor in GGUF";
                return Err(self.fault(SINGLE, reason));
            }
            let parts = choose(&self.id, &self.files)?;
            for file in &parts {
                get(file)?;
            }
            self.name_commit()?;
            return Ok(folder.join(&parts[0]));
        };
        let Some(tokenizer) = TOKENIZERS.into_iter().find(|file| has(file)) else {
            let reason = format!("the model has no such file, and no {}", TOKENIZERS[1]);
            return Err(self.fault(TOKENIZERS[0], reason));
        };
        let weights: BTreeSet<String> = match weights {
            INDEX => read_index(&get(INDEX)?)?.into_values().collect(),
            single => BTreeSet::from([single.to_owned()]),
        };
        let beside = FILES.into_iter().rev().filter(|file| has(file) || *file == FILES[0]);
        for file in weights.iter().map(String::as_str).chain([tokenizer]).chain(beside) {
            get(file)?;
        }
        self.name_commit()?;
        Ok(folder.to_owned())
    }

    fn name_commit(&self) -> Result<()> {
        let named = cache().repo(repo(&self.id)).create_ref(&self.commit);
        named.map_err(|source| Error::io(self.folder(), source))
    }

    /// The file in the cache, downloaded if it is not there.
    fn fetch(&self, file: &str, progress: &mut dyn Progress) -> Result<PathBuf> {
        let path = self.folder().join(file);
        if path.is_file() {
            return Ok(path);
        }
        tracing::info!(file, "downloading");
        progress.remark(file);
        let bar = Bar { progress, done: 0, total: 0 };
        self.repo.download_with_progress(file, bar).map_err(|e| self.fault(file, e))
    }
}

/// Tells a listener of a file in MiB.
struct Bar<'p> {
    progress: &'p mut dyn Progress,
    done: usize,
    total: usize,
}

impl hf_hub::api::Progress for Bar<'_> {
    fn init(&mut self, size: usize, _: &str) {
        (self.done, self.total) = (0, size);
    }

    fn update(&mut self, size: usize) {
        self.done += size;
        // The library gives no way to break off.
        let _ =
            self.progress.update(Stage::Download, self.done >> 20, self.total.div_ceil(1 << 20));
    }

    fn finish(&mut self) {}
}

/// Makes sure that a file of the cache is at `path`; returns `path`.
fn place(cached: &Path, path: &Path) -> Result<PathBuf> {
    if path.is_file() {
        return Ok(path.to_owned());
    }
    if let Some(folder) = path.parent() {
        fs::create_dir_all(folder).map_err(|source| Error::io(folder, source))?;
    }
    let mut partial = path.as_os_str().to_owned();
    partial.push(".tmp");
    let partial = PathBuf::from(partial);
    // The cache holds links to its blobs. A hard link to a blob takes no space, but a file that a
    // person may edit must not share it.
    let blob = fs::canonicalize(cached).map_err(|source| Error::io(cached, source))?;
    let copy = || fs::copy(&blob, &partial).map(drop);
    let _ = fs::remove_file(&partial);
    let is_weights = |end: &OsStr| end == "safetensors" || end == "gguf";
    let placed = match path.extension().is_some_and(is_weights) {
        true => fs::hard_link(&blob, &partial).or_else(|_| copy()),
        false => copy(),
    };
    placed.and_then(|()| fs::rename(&partial, path)).map_err(|source| Error::io(path, source))?;
    Ok(path.to_owned())
}
