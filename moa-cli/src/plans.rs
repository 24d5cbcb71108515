use std::fs;
use std::path::{Path, PathBuf};

use moa_core::Plan;

use crate::error::{Error, Result};
use crate::files::finish;

/// A plan with the file it came from.
#[derive(Clone, Debug)]
pub(crate) struct PlanFile {
    pub(crate) path: PathBuf,
    pub(crate) plan: Plan,
    /// What people call it: a name that was given, or the file's without its ending.
    pub(crate) label: String,
}

impl PlanFile {
    /// Loads `NAME=FILE` or `FILE`.
    pub(crate) fn load(argument: &str) -> Result<Self> {
        let (label, path) = labelled(argument);
        Ok(Self { plan: Plan::load(&path)?, path, label })
    }

    /// The file's name.
    pub(crate) fn name(&self) -> String {
        self.path.file_name().unwrap_or_default().to_string_lossy().into_owned()
    }
}

/// The `plan-*.json` of a folder, in the order of their names.
pub(crate) fn names(folder: &Path) -> Result<Vec<PathBuf>> {
    let fail = |source| Error::Read { path: folder.to_path_buf(), source };
    let mut paths = Vec::new();
    for entry in fs::read_dir(folder).map_err(fail)? {
        let path = entry.map_err(fail)?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        if name.starts_with("plan-") && name.ends_with(".json") {
            paths.push(path);
        }
    }
    paths.sort();
    Ok(paths)
}

/// Loads the `plan-*.json` of a folder.
pub(crate) fn load_folder(folder: &Path) -> Result<Vec<PlanFile>> {
    // A search that replaces the plans waits, and one that was killed doing so is finished.
    let lock =
        finish(folder).map_err(|source| Error::Read { path: folder.to_path_buf(), source })?;
    let paths = names(folder)?;
    if paths.is_empty() {
        return Err(Error::NoPlans { path: folder.to_path_buf() });
    }
    let load = |path: PathBuf| Ok(PlanFile { plan: Plan::load(&path)?, label: stem(&path), path });
    let files = paths.into_iter().map(load).collect();
    drop(lock);
    files
}

/// Splits `NAME=FILE`; a `FILE` alone goes by its name without the ending.
pub(crate) fn labelled(argument: &str) -> (String, PathBuf) {
    match argument.split_once('=') {
        Some((name, path)) if !name.is_empty() => (name.to_string(), PathBuf::from(path)),
        _ => (stem(Path::new(argument)), PathBuf::from(argument)),
    }
}

fn stem(path: &Path) -> String {
    path.file_stem().unwrap_or_default().to_string_lossy().into_owned()
}
