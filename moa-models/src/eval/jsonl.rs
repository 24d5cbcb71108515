use std::fs;
use std::path::Path;

use serde::de::DeserializeOwned;

use crate::{Error, Result};

/// Reads a file of one JSON object a line; blank lines are passed over.
pub(crate) fn load<T: DeserializeOwned>(path: &Path) -> Result<Vec<T>> {
    let text = fs::read_to_string(path)
        .map_err(|source| Error::Io { path: path.to_path_buf(), source })?;
    let mut items = Vec::new();
    for (number, line) in text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()) {
        items.push(serde_json::from_str(line).map_err(|e| Error::Line {
            path: path.to_path_buf(),
            line: number + 1,
            reason: e.to_string(),
        })?);
    }
    if items.is_empty() {
        return Err(Error::Line {
            path: path.to_path_buf(),
            line: 1,
            reason: "the file holds no object".into(),
        });
    }
    Ok(items)
}
