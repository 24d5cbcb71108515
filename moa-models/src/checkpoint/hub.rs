use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use hf_hub::api::sync::{ApiBuilder, ApiRepo};
use hf_hub::{Cache, Repo, RepoType};

use crate::checkpoint::hub_id::HubId;
use crate::checkpoint::safetensors::{INDEX, read_index};
use crate::error::{Error, Result};
use crate::progress::{Progress, Stage};

/// Files that a model may have beside its weights; only the first two are needed.
const FILES: [&str; 8] = [
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "generation_config.json",
    "chat_template.jinja",
    "chat_template.json",
];

/// Downloads the model `id` (`owner/name`) from the Hugging Face hub into the folder `dir`.
///
/// Takes the configuration, the tokenizer, the chat template and the safetensors weights, whole or
/// sharded, of `revision` (a branch, tag or commit; `main` when `None`). Files that are in `dir`
/// already are kept. A gated model needs the access token that the hub's own tools store.
///
/// Each file is written under a temporary name and renamed when it is complete, the
/// configuration last: a folder with a `config.json` has everything. A download that broke off goes on
/// where it was.
///
/// # Errors
/// [`Error::Download`] with the file that could not be had, [`Error::Io`] for the folder,
/// [`Error::Json`] and [`Error::ShardName`] for the index.
pub fn download(id: &str, revision: Option<&str>, dir: impl AsRef<Path>) -> Result<()> {
    let dir = dir.as_ref();
    fs::create_dir_all(dir).map_err(|source| Error::io(dir, source))?;
    let remote = Remote::new(id, revision)?;
    remote.files(|file| place(&remote.fetch(file, &mut ())?, &dir.join(file)))
}

/// The folder of a model of the Hugging Face hub: in the cache that the hub's own tools share
/// (`HF_HUB_CACHE`, or `hub` in `HF_HOME`), or downloaded into it. With `HF_HUB_OFFLINE=1` nothing is
/// downloaded; `HF_ENDPOINT` names another hub.
///
/// A folder of the cache that has the configuration, the tokenizer and all weights is taken without
/// asking the hub. `progress` hears of each file in MiB.
///
/// # Errors
/// As [`download`].
pub fn fetch(id: &HubId, progress: &mut dyn Progress) -> Result<PathBuf> {
    let repo = Repo::with_revision(
        id.model().to_owned(),
        RepoType::Model,
        id.revision().unwrap_or(MAIN).to_owned(),
    );
    if let Some(folder) = cached(&repo) {
        return Ok(folder);
    }
    let offline = std::env::var("HF_HUB_OFFLINE").unwrap_or_default().to_lowercase();
    if matches!(offline.as_str(), "1" | "true" | "yes" | "on") {
        return Err(Error::Download {
            model: id.to_string(),
            file: "the model".to_owned(),
            reason: format!(
                "it is not whole in the cache {}, and HF_HUB_OFFLINE forbids to ask the hub",
                cache().path().display()
            ),
        });
    }
    let remote = Remote::new(id.model(), id.revision())?;
    remote.files(|file| remote.fetch(file, progress))?;
    Ok(remote.folder())
}

const MAIN: &str = "main";

/// The cache that the hub's own tools use.
fn cache() -> Cache {
    match std::env::var_os("HF_HUB_CACHE") {
        Some(path) => Cache::new(path.into()),
        None => Cache::from_env(),
    }
}

/// The folder of the cache that has all files that a model needs.
fn cached(repo: &Repo) -> Option<PathBuf> {
    let own = cache().repo(repo.clone());
    let by_name = own.get("config.json").and_then(|file| file.parent().map(Path::to_path_buf));
    // A commit has no name of its own.
    let folder = by_name.unwrap_or_else(|| own.pointer_path(repo.revision()));
    let has = |file: &str| folder.join(file).is_file();
    let has_weights = has("model.safetensors")
        || has(INDEX) && read_index(&folder.join(INDEX)).ok()?.values().all(|shard| has(shard));
    (has("config.json") && has("tokenizer.json") && has_weights).then_some(folder)
}

/// What stands for a file where the hub does not tell its files.
const LISTING: &str = "list of files";

/// One commit of a model on the hub: its files belong together whatever comes to the branch meanwhile.
struct Remote {
    id: String,
    /// The branch, tag or commit that was asked for.
    name: Repo,
    commit: String,
    files: Vec<String>,
    repo: ApiRepo,
}

impl Remote {
    fn new(id: &str, revision: Option<&str>) -> Result<Self> {
        let fail = |reason: String| Error::Download {
            model: id.to_owned(),
            file: LISTING.to_owned(),
            reason,
        };
        let builder = ApiBuilder::from_env().with_progress(false).with_retries(2);
        let api = builder.with_cache_dir(cache().path().clone()).build();
        let api = api.map_err(|e| fail(e.to_string()))?;
        let repo = |revision: &str| {
            Repo::with_revision(id.to_owned(), RepoType::Model, revision.to_owned())
        };
        let name = repo(revision.unwrap_or(MAIN));
        let info = api.repo(name.clone()).info().map_err(|e| fail(e.to_string()))?;
        Ok(Self {
            id: id.to_owned(),
            name,
            repo: api.repo(repo(&info.sha)),
            commit: info.sha,
            files: info.siblings.into_iter().map(|file| file.rfilename).collect(),
        })
    }

    fn fault(&self, file: &str, reason: impl ToString) -> Error {
        let (model, file) = (self.id.clone(), file.to_owned());
        Error::Download { model, file, reason: reason.to_string() }
    }

    /// The folder of the cache that the files are in.
    fn folder(&self) -> PathBuf {
        cache().repo(self.name.clone()).pointer_path(&self.commit)
    }

    /// Gives every file of the model to `get`, which makes it a local one: weights first, the
    /// configuration last. The cache then knows the commit by the name that was asked for.
    fn files(&self, mut get: impl FnMut(&str) -> Result<PathBuf>) -> Result<()> {
        let has = |file: &str| self.files.iter().any(|name| name == file);
        let weights: BTreeSet<String> = if has("model.safetensors") {
            BTreeSet::from(["model.safetensors".to_owned()])
        } else if has(INDEX) {
            read_index(&get(INDEX)?)?.into_values().collect()
        } else {
            return Err(self.fault("model.safetensors", "the model has no safetensors weights"));
        };
        for file in &weights {
            get(file)?;
        }
        for (number, file) in FILES.into_iter().enumerate().rev() {
            if has(file) || number < 2 {
                get(file)?;
            }
        }
        let named = cache().repo(self.name.clone()).create_ref(&self.commit);
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
    let mut partial = path.as_os_str().to_owned();
    partial.push(".tmp");
    let partial = PathBuf::from(partial);
    // The cache holds links to its blobs. A hard link to a blob takes no space, but a file that a
    // person may edit must not share it.
    let blob = fs::canonicalize(cached).map_err(|source| Error::io(cached, source))?;
    let copy = || fs::copy(&blob, &partial).map(drop);
    let _ = fs::remove_file(&partial);
    let placed = match path.extension().is_some_and(|end| end == "safetensors") {
        true => fs::hard_link(&blob, &partial).or_else(|_| copy()),
        false => copy(),
    };
    placed.and_then(|()| fs::rename(&partial, path)).map_err(|source| Error::io(path, source))?;
    Ok(path.to_owned())
}
