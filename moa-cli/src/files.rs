use std::fs::{self, File};
use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};

use moa_core::write_atomic;

use crate::error::{Error, Result};

/// The files of one command: what it reads, and what it may write, which is none of the former.
#[derive(Debug, Default)]
pub(crate) struct Files<'a> {
    inputs: Vec<&'a Path>,
    outputs: Vec<(&'static str, PathBuf)>,
}

impl<'a> Files<'a> {
    /// Adds files that are read, or a model's folder.
    pub(crate) fn reads<P: AsRef<Path> + ?Sized + 'a>(
        mut self,
        inputs: impl IntoIterator<Item = &'a P>,
    ) -> Self {
        self.inputs.extend(inputs.into_iter().map(AsRef::as_ref));
        self
    }

    /// Checks, before the work whose result it will hold, that a file can be written at `path` and is
    /// nothing that the command reads.
    pub(crate) fn writes(mut self, flag: &'static str, path: &Path) -> Result<Self> {
        let refused = |expected: String| Err(Error::argument(flag, expected, path.display()));
        if path.as_os_str() == "-" {
            return refused("the name of a file (`./-` is one)".into());
        }
        for input in &self.inputs {
            let is_part: fn(&Path, &Path) -> bool =
                if input.is_dir() { is_of_model } else { is_of_split };
            if is_same(path, input) || is_part(path, input) {
                return refused(format!("another file than {}, which is read", input.display()));
            }
        }
        for (other, output) in &self.outputs {
            // Neither need be there yet.
            if is_same(path, output)
                || (path.file_name() == output.file_name() && is_same(parent(path), parent(output)))
            {
                return refused(format!("another file than {other}"));
            }
        }
        check_file(path)?;
        self.outputs.push((flag, path.to_path_buf()));
        Ok(self)
    }

    /// [`writes`](Self::writes) for an output that was asked for.
    pub(crate) fn may_write(self, flag: &'static str, path: Option<&Path>) -> Result<Self> {
        match path {
            Some(path) => self.writes(flag, path),
            None => Ok(self),
        }
    }
}

/// Whether both names lead to one file.
pub(crate) fn is_same(a: &Path, b: &Path) -> bool {
    #[cfg(unix)]
    if let (Ok(a), Ok(b)) = (fs::metadata(a), fs::metadata(b)) {
        use std::os::unix::fs::MetadataExt;
        return (a.dev(), a.ino()) == (b.dev(), b.ino());
    }
    match (fs::canonicalize(a), fs::canonicalize(b)) {
        (Ok(a), Ok(b)) => a == b,
        _ => false,
    }
}

/// Whether `path` is a file that a model's folder is made of. Plans, profiles and reports may lie there too.
fn is_of_model(path: &Path, folder: &Path) -> bool {
    const ENDS: [&str; 4] = [".bin", ".jinja", ".index.json", ".model"];
    const NAMES: [&str; 9] = [
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "added_tokens.json",
        "vocab.json",
        "merges.txt",
        "preprocessor_config.json",
    ];
    let Some(name) = path.file_name().and_then(|name| name.to_str()) else { return false };
    let is_weights = |name: &str| {
        name.ends_with(".safetensors") && (name.starts_with("model") || name.starts_with("consol"))
    };
    // A new GGUF file beside the weights is none of them.
    let is_gguf = name.ends_with(".gguf") && path.exists();
    (NAMES.contains(&name)
        || ENDS.iter().any(|end| name.ends_with(end))
        || is_gguf
        || is_weights(name))
        && is_same(parent(path), folder)
}

/// Whether `path` is a part of the split GGUF file that another part stands for.
fn is_of_split(path: &Path, part: &Path) -> bool {
    // NAME-00001-of-00002.gguf
    fn split(path: &Path) -> Option<(&str, &str)> {
        let (first, count) = path.file_name()?.to_str()?.rsplit_once("-of-")?;
        Some((first.rsplit_once('-')?.0, count.strip_suffix(".gguf")?))
    }
    split(path).is_some_and(|own| split(part) == Some(own)) && is_same(parent(path), parent(part))
}

/// The folder that a file lies in.
fn parent(path: &Path) -> &Path {
    path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

/// Checks that a file can be written at `path`, before the work whose result it will hold.
pub(crate) fn check_file(path: &Path) -> Result<()> {
    let fail = |source| Error::Output { path: path.to_path_buf(), source };
    match fs::metadata(path) {
        Ok(found) if found.is_dir() => return Err(fail(ErrorKind::IsADirectory.into())),
        Ok(found) if !found.is_file() => {
            let what = "a pipe or a device, not a file";
            return Err(fail(io::Error::new(ErrorKind::InvalidInput, what)));
        }
        _ => {}
    }
    let name = path.file_name();
    if name.is_none() {
        return Err(fail(io::Error::new(ErrorKind::InvalidInput, "not a file name")));
    }
    // A name that is too long is found here too.
    if let Err(error) = fs::symlink_metadata(path)
        && error.kind() != ErrorKind::NotFound
    {
        return Err(fail(error));
    }
    let probe = path.with_file_name(format!(".moa-{}.probe", std::process::id()));
    let made = File::create_new(&probe).map(drop);
    match made {
        // That of another thread: it could be made.
        Err(error) if error.kind() == ErrorKind::AlreadyExists => Ok(()),
        made => made.and_then(|()| fs::remove_file(&probe)).map_err(fail),
    }
}

/// New files of a folder, kept until all of them are there.
const STAGED: &str = ".moa-new";
/// All new files of a folder, which take the place of the old ones.
const READY: &str = ".moa-ready";

/// A folder of results: checked before the work, written as a whole after it.
///
/// The files are written beside the old ones, on the disk, before the first of those is touched; from then on
/// whoever opens the folder next finishes what was begun ([`finish`]). A full disk, a killed process and another
/// run at the same time so leave the old files or the new ones, and never some of each.
#[derive(Debug)]
pub(crate) struct OutputFolder {
    path: PathBuf,
    files: Vec<(String, Vec<u8>)>,
}

impl OutputFolder {
    /// Checks that the folder can be made, or written into. Nothing is made before the results are there.
    pub(crate) fn create(path: &Path) -> Result<Self> {
        let fail = |source| Error::Output { path: path.to_path_buf(), source };
        let there = path.ancestors().find(|p| p.as_os_str().is_empty() || p.exists());
        let there = there.filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
        if !there.is_dir() {
            return Err(fail(io::Error::from(ErrorKind::NotADirectory)));
        }
        check_file(&there.join("writable")).map_err(|error| match error {
            Error::Output { source, .. } => fail(source),
            other => other,
        })?;
        Ok(Self { path: path.to_path_buf(), files: Vec::new() })
    }

    /// Adds a file; its path once the folder is written.
    pub(crate) fn add(&mut self, name: &str, bytes: Vec<u8>) -> PathBuf {
        self.files.push((name.to_string(), bytes));
        self.path.join(name)
    }

    /// Writes all files, and then takes away those of an earlier run that have no successor. `old` are their
    /// names, given what lies in the folder now, and may refuse.
    pub(crate) fn write(self, old: impl FnOnce(&Path) -> Result<Vec<PathBuf>>) -> Result<()> {
        let fail = |source| Error::Output { path: self.path.clone(), source };
        fs::create_dir_all(&self.path).map_err(fail)?;
        let _lock = lock(&self.path, File::lock).map_err(fail)?;
        finish_locked(&self.path).map_err(fail)?;
        let gone = old(&self.path)?;
        let staged = self.path.join(STAGED);
        let written = self.stage(&staged, &gone);
        if written.is_err() {
            let _ = fs::remove_dir_all(&staged);
            // Only one that is empty, so none of anybody else.
            let _ = fs::remove_dir(&self.path);
        }
        written?;
        fs::rename(&staged, self.path.join(READY)).map_err(fail)?;
        finish_locked(&self.path).map_err(fail)
    }

    fn stage(&self, staged: &Path, gone: &[PathBuf]) -> Result<()> {
        let fail = |source| Error::Output { path: self.path.clone(), source };
        fs::create_dir(staged).map_err(fail)?;
        for (name, bytes) in &self.files {
            write_atomic(&staged.join(name), bytes)?;
        }
        let names = gone.iter().filter_map(|path| path.file_name()?.to_str());
        let names: Vec<&str> =
            names.filter(|old| self.files.iter().all(|(name, _)| name != old)).collect();
        write_atomic(&staged.join(GONE), names.join("\n").as_bytes())?;
        Ok(())
    }
}

/// Names of the files that the new ones do not replace, but which go with them.
const GONE: &str = ".gone";

/// Finishes what a run that was killed had begun in a folder, and keeps others from writing there as long
/// as the answer lives.
pub(crate) fn finish(folder: &Path) -> io::Result<Option<File>> {
    if !folder.join(READY).exists() {
        let lock = lock(folder, File::lock_shared)?;
        if !folder.join(READY).exists() {
            return Ok(lock);
        }
    }
    let lock = lock(folder, File::lock)?;
    finish_locked(folder)?;
    Ok(lock)
}

fn finish_locked(folder: &Path) -> io::Result<()> {
    // What was not yet complete is of no use: whoever wrote it held the lock.
    match fs::remove_dir_all(folder.join(STAGED)) {
        Err(error) if error.kind() != ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let ready = folder.join(READY);
    let entries = match fs::read_dir(&ready) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
        entries => entries?,
    };
    for entry in entries {
        let name = entry?.file_name();
        if name != GONE {
            fs::rename(ready.join(&name), folder.join(&name))?;
        }
    }
    let gone = moa_core::read_text_file(&ready.join(GONE)).unwrap_or_default();
    for name in gone.lines().filter(|name| Path::new(name).file_name().is_some_and(|f| f == *name))
    {
        match fs::remove_file(folder.join(name)) {
            Err(error) if error.kind() != ErrorKind::NotFound => return Err(error),
            _ => {}
        }
    }
    fs::remove_dir_all(&ready)?;
    File::open(folder)?.sync_all()
}

/// A folder's lock, where the system has such.
fn lock(folder: &Path, take: fn(&File) -> io::Result<()>) -> io::Result<Option<File>> {
    if cfg!(not(unix)) {
        return Ok(None);
    }
    let file = File::open(folder)?;
    match take(&file) {
        Err(error) if error.kind() == ErrorKind::Unsupported => Ok(None),
        taken => taken.map(|()| Some(file)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn nothing_old(_: &Path) -> Result<Vec<PathBuf>> {
        Ok(Vec::new())
    }

    fn names(folder: &Path) -> Vec<String> {
        let entry = |e: io::Result<fs::DirEntry>| e.unwrap().file_name().into_string().unwrap();
        let mut names: Vec<String> = fs::read_dir(folder).unwrap().map(entry).collect();
        names.sort();
        names
    }

    #[test]
    fn unfinished_work_leaves_nothing_and_finished_work_its_files() {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join("a/b");
        let mut folder = OutputFolder::create(&path).unwrap();
        folder.add("x.json", b"1".to_vec());
        drop(folder);
        assert!(!root.path().join("a").exists());
        let mut folder = OutputFolder::create(&path).unwrap();
        let file = folder.add("x.json", b"1".to_vec());
        folder.write(nothing_old).unwrap();
        assert_eq!((names(&path), fs::read(file).unwrap()), (vec!["x.json".into()], b"1".into()));
    }

    #[test]
    fn a_set_that_cannot_be_written_leaves_the_old_one() {
        let root = tempfile::tempdir().unwrap();
        let write = |files: &[&str], old: &[&str]| {
            let mut folder = OutputFolder::create(root.path()).unwrap();
            for name in files {
                folder.add(name, name.as_bytes().to_vec());
            }
            let old: Vec<PathBuf> = old.iter().map(PathBuf::from).collect();
            folder.write(|_| Ok(old))
        };
        write(&["plan-00", "plan-01"], &[]).unwrap();
        // As on a full disk: the last file of the set cannot be written.
        assert!(write(&["plan-00", "none/plan-01"], &["plan-00", "plan-01"]).is_err());
        assert_eq!(names(root.path()), ["plan-00", "plan-01"]);
        assert!(
            OutputFolder::create(root.path())
                .unwrap()
                .write(|_| Err(Error::NoPlans { path: "".into() }))
                .is_err()
        );
        write(&["plan-00"], &["plan-00", "plan-01"]).unwrap();
        assert_eq!(names(root.path()), ["plan-00"]);
    }

    #[test]
    fn what_a_killed_run_had_begun_is_finished_and_what_it_had_not_is_forgotten() {
        let root = tempfile::tempdir().unwrap();
        let ready = root.path().join(READY);
        fs::write(root.path().join("plan-00"), "old").unwrap();
        fs::write(root.path().join("plan-01"), "old").unwrap();
        fs::create_dir(&ready).unwrap();
        fs::write(ready.join("plan-00"), "new").unwrap();
        fs::write(ready.join(GONE), "plan-01\n../plan-02").unwrap();
        fs::create_dir(root.path().join(STAGED)).unwrap();
        drop(finish(root.path()).unwrap());
        assert_eq!(names(root.path()), ["plan-00"]);
        assert_eq!(fs::read(root.path().join("plan-00")).unwrap(), b"new");
    }

    #[test]
    fn places_that_cannot_be_written_are_found_before_the_work() {
        let root = tempfile::tempdir().unwrap();
        let file = root.path().join("file");
        fs::write(&file, b"").unwrap();
        assert!(matches!(OutputFolder::create(&file), Err(Error::Output { .. })));
        assert!(matches!(OutputFolder::create(&file.join("below")), Err(Error::Output { .. })));
        assert!(matches!(check_file(root.path()), Err(Error::Output { .. })));
        for bad in ["none/plan.json".to_string(), "x".repeat(300)] {
            assert!(matches!(check_file(&root.path().join(bad)), Err(Error::Output { .. })));
        }
        check_file(&root.path().join("plan.json")).unwrap();
        assert_eq!(fs::read_dir(root.path()).unwrap().count(), 1);
        #[cfg(unix)]
        assert!(check_file(Path::new("/dev/null")).is_err());
    }

    #[test]
    fn what_is_read_is_not_written() {
        let root = tempfile::tempdir().unwrap();
        let path = |name: &str| root.path().join(name);
        for name in ["data.jsonl", "config.json", "plan.json", "old.gguf"] {
            fs::write(path(name), "").unwrap();
        }
        let data = path("data.jsonl");
        let files = || Files::default().reads([&data]).reads([root.path()]);
        for (name, refused) in [
            ("data.jsonl", true),
            ("./data.jsonl", true),
            ("config.json", true),
            ("tokenizer.json", true),
            ("model.safetensors", true),
            ("model-00001-of-00002.safetensors", true),
            ("old.gguf", true),
            ("new.gguf", false),
            ("plan.json", false),
            ("new.json", false),
            ("profile.safetensors", false),
        ] {
            assert_eq!(files().writes("--out", &path(name)).is_err(), refused, "{name}");
        }
        fs::write(path("m-00001-of-00002.gguf"), "").unwrap();
        let part = path("m-00001-of-00002.gguf");
        for (name, refused) in [("m-00002-of-00002.gguf", true), ("m-00002-of-00003.gguf", false)] {
            let split = Files::default().reads([&part]).writes("--out", &path(name));
            assert_eq!(split.is_err(), refused, "{name}");
        }
        let dash = files().writes("--out", Path::new("-")).unwrap_err().to_string();
        assert!(dash.starts_with("--out must be the name of a file"), "{dash}");
        let twice = files().writes("--out", &path("a")).unwrap().writes("--svg", &path("a"));
        assert!(twice.unwrap_err().to_string().contains("--svg must be another file than --out"));
        #[cfg(unix)]
        {
            fs::hard_link(&data, path("link")).unwrap();
            assert!(files().writes("--out", &path("link")).is_err());
        }
    }
}
