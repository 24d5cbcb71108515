use std::fs::{self, File, OpenOptions};
use std::io::{ErrorKind, Write};
use std::marker::PhantomData;
use std::path::{Path, PathBuf};

use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use crate::{Error, Result};

/// Results that are written as they come, so that a run that was broken off goes on where it
/// stopped: a line with the settings, then one item a line.
///
/// Nothing is written before the first item. What a crash left of a last line is cut off with the
/// next item.
#[derive(Debug)]
pub struct ItemLog<T> {
    path: PathBuf,
    settings: Value,
    /// Bytes of whole lines.
    len: u64,
    file: Option<File>,
    items: PhantomData<fn(T)>,
}

impl<T: Serialize + DeserializeOwned> ItemLog<T> {
    /// Opens the log at `path` and returns the items it holds; none if there is no such file.
    ///
    /// # Errors
    /// [`Error::OtherSettings`] if it was written under other settings, [`Error::Line`] if a whole
    /// line of it is not what it should be, [`Error::Io`].
    pub fn open(path: impl AsRef<Path>, settings: &Value) -> Result<(Self, Vec<T>)> {
        let path = path.as_ref().to_path_buf();
        let bytes = match fs::read(&path) {
            Ok(bytes) => bytes,
            Err(source) if source.kind() == ErrorKind::NotFound => Vec::new(),
            Err(source) => return Err(Error::Io { path, source }),
        };
        let len = bytes.iter().rposition(|byte| *byte == b'\n').map_or(0, |end| end + 1);
        let line_error = |line: usize, reason: String| Error::Line {
            path: path.clone(),
            line: line + 1,
            reason,
        };
        let mut items = Vec::new();
        for (number, line) in bytes[..len].split_inclusive(|byte| *byte == b'\n').enumerate() {
            if number == 0 {
                let header: Value = serde_json::from_slice(line).unwrap_or_default();
                let Some(found) = header.get("settings") else {
                    let reason = "no settings: not a file that an evaluation can go on with";
                    return Err(line_error(0, reason.into()));
                };
                compare(&path, settings, found)?;
                continue;
            }
            items
                .push(serde_json::from_slice(line).map_err(|e| line_error(number, e.to_string()))?);
        }
        let settings = settings.clone();
        Ok((Self { path, settings, len: len as u64, file: None, items: PhantomData }, items))
    }

    /// Writes one more item; it is in the file when this returns.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn push(&mut self, item: &T) -> Result<()> {
        let io = |source| Error::Io { path: self.path.clone(), source };
        let mut text = String::new();
        let file = match &mut self.file {
            Some(file) => file,
            none => {
                let file = OpenOptions::new().create(true).append(true).open(&self.path);
                let file = file.map_err(io)?;
                file.set_len(self.len).map_err(io)?;
                if self.len == 0 {
                    text = format!("{}\n", json!({ "settings": self.settings }));
                }
                none.insert(file)
            }
        };
        let line = serde_json::to_string(item).map_err(|e| io(e.into()))?;
        text.push_str(&line);
        text.push('\n');
        file.write_all(text.as_bytes()).and_then(|()| file.flush()).map_err(io)
    }
}

/// The first setting that differs, as an error.
fn compare(path: &Path, expected: &Value, got: &Value) -> Result<()> {
    if expected == got {
        return Ok(());
    }
    let names = |value: &Value| -> Vec<String> {
        value.as_object().map_or(Vec::new(), |fields| fields.keys().cloned().collect())
    };
    let differs = |name: &String| expected.get(name) != got.get(name);
    let name = names(expected).into_iter().chain(names(got)).find(differs).unwrap_or_default();
    let text = |value: &Value| value.get(&name).map_or("nothing".to_string(), Value::to_string);
    Err(Error::OtherSettings {
        path: path.to_path_buf(),
        expected: text(expected),
        got: text(got),
        setting: name,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    type Log = ItemLog<(usize, f64)>;

    #[test]
    fn a_broken_off_log_goes_on_after_its_last_whole_line() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("items.jsonl");
        let settings = json!({ "seed": 1, "plan": "dense" });
        let (mut log, items) = Log::open(&path, &settings).unwrap();
        assert!(items.is_empty() && !path.exists());
        log.push(&(0, 1.0)).unwrap();
        log.push(&(1, 0.5)).unwrap();
        let whole = fs::read(&path).unwrap();
        // Whatever byte it was cut at, the same file comes out.
        for cut in 0..whole.len() {
            fs::write(&path, &whole[..cut]).unwrap();
            let (mut log, items) = Log::open(&path, &settings).unwrap();
            for item in &[(0, 1.0), (1, 0.5)][items.len()..] {
                log.push(item).unwrap();
            }
            assert_eq!(fs::read(&path).unwrap(), whole, "cut at {cut}");
        }
    }

    #[test]
    fn other_settings_and_broken_lines_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("items.jsonl");
        Log::open(&path, &json!({ "seed": 1 })).unwrap().0.push(&(0, 1.0)).unwrap();
        match Log::open(&path, &json!({ "seed": 2 })) {
            Err(Error::OtherSettings { setting, expected, got, .. }) => {
                assert_eq!((setting.as_str(), expected.as_str(), got.as_str()), ("seed", "2", "1"));
            }
            other => panic!("{other:?}"),
        }
        let more = Log::open(&path, &json!({ "plan": "dense", "seed": 1 })).unwrap_err();
        assert!(
            matches!(more, Error::OtherSettings { setting, got, .. } if setting == "plan" && got == "nothing")
        );
        let text = fs::read_to_string(&path).unwrap();
        fs::write(&path, text.clone() + "[0]\n[1,2.0]\n").unwrap();
        let line = Log::open(&path, &json!({ "seed": 1 })).unwrap_err();
        assert!(matches!(line, Error::Line { line: 3, .. }), "{line}");
        fs::write(&path, "{\"case\": 0}\n").unwrap();
        let header = Log::open(&path, &json!({ "seed": 1 })).unwrap_err();
        assert!(matches!(header, Error::Line { line: 1, .. }), "{header}");
    }
}
