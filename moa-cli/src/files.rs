use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use moa_core::write_atomic;

use crate::error::{Error, Result};

/// Checks that a file can be written at `path`, before the work whose result it will hold.
pub(crate) fn check_file(path: &Path) -> Result<()> {
    let fail = |source| Error::Output { path: path.to_path_buf(), source };
    if path.is_dir() {
        return Err(fail(io::Error::from(io::ErrorKind::IsADirectory)));
    }
    let Some(name) = path.file_name() else {
        return Err(fail(io::Error::new(io::ErrorKind::InvalidInput, "not a file name")));
    };
    let mut probe = name.to_os_string();
    probe.push(format!(".{}.tmp", std::process::id()));
    let probe = path.with_file_name(probe);
    fs::File::create(&probe).and_then(|_| fs::remove_file(&probe)).map_err(fail)
}

/// [`check_file`] for an output that was asked for.
pub(crate) fn check_optional(path: Option<&Path>) -> Result<()> {
    path.map_or(Ok(()), check_file)
}

/// A folder of results: made and checked before the work, gone again if the work fails.
#[derive(Debug)]
pub(crate) struct OutputFolder {
    path: PathBuf,
    /// Folders that did not exist before, outermost first.
    made: Vec<PathBuf>,
    written: Vec<PathBuf>,
    keep: bool,
}

impl OutputFolder {
    /// Makes the folder where it does not exist, and checks that files can be written into it.
    pub(crate) fn create(path: &Path) -> Result<Self> {
        let fail = |source| Error::Output { path: path.to_path_buf(), source };
        let mut folder =
            Self { path: path.to_path_buf(), made: Vec::new(), written: Vec::new(), keep: false };
        if path.exists() && !path.is_dir() {
            return Err(fail(io::Error::from(io::ErrorKind::NotADirectory)));
        }
        let missing: Vec<&Path> = path
            .ancestors()
            .filter(|p| !p.as_os_str().is_empty())
            .take_while(|p| !p.exists())
            .collect();
        for ancestor in missing.into_iter().rev() {
            fs::create_dir(ancestor).map_err(fail)?;
            folder.made.push(ancestor.to_path_buf());
        }
        check_file(&path.join("writable")).map_err(|error| match error {
            Error::Output { source, .. } => fail(source),
            other => other,
        })?;
        Ok(folder)
    }

    /// Writes a file of the folder.
    pub(crate) fn write(&mut self, name: &str, bytes: &[u8]) -> Result<PathBuf> {
        let path = self.path.join(name);
        write_atomic(&path, bytes)?;
        Ok(self.wrote(path))
    }

    /// Remembers a file that was written into the folder.
    pub(crate) fn wrote(&mut self, path: PathBuf) -> PathBuf {
        self.written.push(path.clone());
        path
    }

    /// The folder.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// All results are there: leaves them.
    pub(crate) fn keep(mut self) {
        self.keep = true;
    }
}

impl Drop for OutputFolder {
    fn drop(&mut self) {
        if self.keep {
            return;
        }
        // Best effort after an error that is being reported: an incomplete set of results would be
        // taken for a complete one.
        for file in &self.written {
            let _ = fs::remove_file(file);
        }
        for folder in self.made.iter().rev() {
            let _ = fs::remove_dir(folder);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn failed_work_leaves_nothing_and_finished_work_its_files() {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join("a/b");
        let mut folder = OutputFolder::create(&path).unwrap();
        folder.write("x.json", b"1").unwrap();
        drop(folder);
        assert!(!root.path().join("a").exists());
        let mut folder = OutputFolder::create(&path).unwrap();
        folder.write("x.json", b"1").unwrap();
        folder.keep();
        assert_eq!(fs::read_dir(&path).unwrap().count(), 1);
    }

    #[test]
    fn places_that_cannot_be_written_are_found_before_the_work() {
        let root = tempfile::tempdir().unwrap();
        let file = root.path().join("file");
        fs::write(&file, b"").unwrap();
        assert!(matches!(OutputFolder::create(&file), Err(Error::Output { .. })));
        assert!(matches!(OutputFolder::create(&file.join("below")), Err(Error::Output { .. })));
        assert!(matches!(check_file(root.path()), Err(Error::Output { .. })));
        assert!(matches!(
            check_file(&root.path().join("none/plan.json")),
            Err(Error::Output { .. })
        ));
        check_file(&root.path().join("plan.json")).unwrap();
        assert_eq!(fs::read_dir(root.path()).unwrap().count(), 1);
    }
}
