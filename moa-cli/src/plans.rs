use std::fs;
use std::path::{Path, PathBuf};

use moa_core::{Plan, PlanRequest, search};

use crate::error::{Error, Result};

/// A plan with the file it came from.
#[derive(Clone, Debug)]
pub(crate) struct PlanFile {
    pub(crate) path: PathBuf,
    pub(crate) plan: Plan,
}

impl PlanFile {
    /// The file's name.
    pub(crate) fn name(&self) -> String {
        self.path.file_name().unwrap_or_default().to_string_lossy().into_owned()
    }
}

/// The `plan-*.json` of a folder, in the order of their names.
pub(crate) fn paths(folder: &Path) -> Result<Vec<PathBuf>> {
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
    let paths = paths(folder)?;
    if paths.is_empty() {
        return Err(Error::NoPlans { path: folder.to_path_buf() });
    }
    paths.into_iter().map(|path| Ok(PlanFile { plan: Plan::load(&path)?, path })).collect()
}

/// The search that a plan came out of, from its provenance.
pub(crate) fn request(file: &PlanFile) -> Result<PlanRequest> {
    let bounds = &file.plan.provenance.density_bounds;
    let lengths: Vec<usize> = bounds.iter().map(|b| b.length).collect();
    let Some(density) = bounds.iter().map(|b| b.value).reduce(f64::max) else {
        return Err(Error::Provenance {
            path: file.path.clone(),
            missing: "density bounds",
            remedy: "refine only plans of `moa search`",
        });
    };
    let mut request =
        PlanRequest::density(density, &lengths, file.plan.sink(), file.plan.min_span())?;
    request.bounds = bounds
        .iter()
        .map(|b| search::Bound { length: b.length, max: b.value, min: None })
        .collect();
    Ok(request)
}
