use std::path::Path;

use serde::de::DeserializeOwned;

use crate::checkpoint::text::read_text;
use crate::{Error, Result};

/// Reads a file of one JSON object a line; blank lines are passed over.
pub(crate) fn load<T: DeserializeOwned>(path: &Path) -> Result<Vec<T>> {
    let text = read_text(path)?;
    let mut items = Vec::new();
    for (number, line) in text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()) {
        items.push(serde_json::from_str(line).map_err(|e| Error::Line {
            path: path.to_path_buf(),
            line: number + 1,
            reason: reason(&e),
        })?);
    }
    if items.is_empty() {
        return Err(empty(path, "a JSON object a line"));
    }
    Ok(items)
}

/// The error of a file that has nothing but blanks where something is expected.
pub(crate) fn empty(path: &Path, expected: &str) -> Error {
    let reason = format!("the file is empty: expected {expected}");
    Error::Line { path: path.to_path_buf(), line: 1, reason }
}

/// What the parser says of a line, without the number that it gives it: every line is its first.
fn reason(error: &serde_json::Error) -> String {
    let (text, column) = (error.to_string(), error.column());
    match text.strip_suffix(&format!(" at line {} column {column}", error.line())) {
        Some(what) if column > 0 => format!("{what}, at column {column}"),
        Some(what) => what.to_owned(),
        None => text,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_line_is_that_of_the_file_and_a_byte_order_mark_is_no_fault() -> Result<()> {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), "\u{feff}[1]\r\n\n[2]\n").unwrap();
        assert_eq!(load::<Vec<u32>>(file.path())?, [[1], [2]]);
        std::fs::write(file.path(), "[1]\n\n[2,]\n").unwrap();
        let message = load::<Vec<u32>>(file.path()).unwrap_err().to_string();
        assert!(message.contains("line 3: ") && message.ends_with("at column 4"), "{message}");
        assert!(!message.contains("line 1"), "{message}");
        Ok(())
    }
}
