use std::fs::{File, OpenOptions, TryLockError};
use std::io::{ErrorKind, Read, Write};
use std::marker::PhantomData;
use std::path::{Path, PathBuf};

use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use crate::checkpoint::fingerprint::fingerprint;
use crate::{Error, Result};

/// The field of a line that says under which settings its item was made.
const RUN: &str = "run";
/// The field of an item that is no object.
const ITEM: &str = "item";

/// Results that are written as they come, so that a run that was broken off goes on where it
/// stopped: a line with the settings, then one item a line.
///
/// The log is locked while it is open: a second run of the same file is refused, and never mixes its
/// items with the first one's. Each line names the settings that its item was made under. What a crash left of a
/// last line is cut off, and a file that is no log is left as it is.
#[derive(Debug)]
pub struct ItemLog<T> {
    path: PathBuf,
    /// Fingerprint of the settings.
    run: String,
    /// Bytes of whole lines.
    len: u64,
    file: File,
    /// A write failed, and what it left could not be cut off.
    broken: bool,
    items: PhantomData<fn(T)>,
}

impl<T: Serialize + DeserializeOwned> ItemLog<T> {
    /// Opens the log at `path`, locks it and returns the items it holds; a new one where there is no such
    /// file, or none with items.
    ///
    /// # Errors
    /// [`Error::OtherSettings`] if it was written under other settings, [`Error::Line`] if it is no such
    /// log or a whole line of it is not what it should be, [`Error::InUse`] if another run has it open,
    /// [`Error::Io`].
    pub fn open(path: impl AsRef<Path>, settings: &Value) -> Result<(Self, Vec<T>)> {
        let path = path.as_ref().to_path_buf();
        let io = |source| Error::io(&path, source);
        if std::fs::metadata(&path).is_ok_and(|found| !found.is_file()) {
            return Err(io(std::io::Error::new(ErrorKind::InvalidInput, "not a plain file")));
        }
        let mut options = OpenOptions::new();
        let mut file = options.read(true).append(true).create(true).open(&path).map_err(io)?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Err(Error::InUse { path }),
            // There are file systems without locks.
            Err(TryLockError::Error(error)) if error.kind() == ErrorKind::Unsupported => {}
            Err(TryLockError::Error(error)) => return Err(io(error)),
        }
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes).map_err(io)?;
        let header = format!("{}\n", json!({ "settings": settings }));
        let mut log =
            Self { run: run_of(settings), len: 0, file, broken: false, items: PhantomData, path };
        // A crash may have left a part of the first line.
        if header.as_bytes().starts_with(&bytes) && bytes.len() < header.len() {
            log.begin(&header)?;
            return Ok((log, Vec::new()));
        }
        let items = log.read(&bytes, settings, &header)?;
        Ok((log, items))
    }

    /// Reads what the file holds, and leaves whole lines alone in it.
    fn read(&mut self, bytes: &[u8], settings: &Value, header: &str) -> Result<Vec<T>> {
        let whole = bytes.iter().rposition(|byte| *byte == b'\n').map_or(0, |end| end + 1);
        let mut items = Vec::new();
        let mut lines = bytes[..whole].split_inclusive(|byte| *byte == b'\n').enumerate();
        let first = lines.next().map_or(&b""[..], |(_, line)| line);
        let first: Value = serde_json::from_slice(first).unwrap_or_default();
        let Some(found) = first.get("settings") else {
            let reason = "no settings: not a file that an evaluation can go on with";
            return Err(self.line_error(0, reason.into()));
        };
        if whole == bytes.len() && bytes.iter().filter(|byte| **byte == b'\n').count() == 1 {
            // Another run's beginning, of which nothing is lost.
            if found != settings && names(found) == names(settings) {
                self.begin(header)?;
                return Ok(items);
            }
        }
        compare(&self.path, settings, found)?;
        for (number, line) in lines {
            items.push(self.item(line).map_err(|reason| self.line_error(number, reason))?);
        }
        self.len = whole as u64;
        if whole < bytes.len() {
            let tail = &bytes[whole..];
            // The line end alone may be missing. Of a shorter line there is nothing to keep.
            let item = if tail.ends_with(b"}") { self.item(tail).ok() } else { None };
            self.file.set_len(self.len).map_err(|e| Error::io(&self.path, e))?;
            if let Some(item) = item {
                let mut line = tail.to_vec();
                line.push(b'\n');
                self.append(&line)?;
                items.push(item);
            }
        }
        Ok(items)
    }

    /// The item of a line, which must be of this run where the line says its run.
    fn item(&self, line: &[u8]) -> std::result::Result<T, String> {
        let mut value: Value = serde_json::from_slice(line).map_err(|e| e.to_string())?;
        if let Some(fields) = value.as_object_mut()
            && let Some(run) = fields.remove(RUN)
        {
            if run != self.run {
                return Err(format!("an item of other settings: {RUN} {run}, not {:?}", self.run));
            }
            if fields.len() == 1
                && let Some(item) = fields.remove(ITEM)
            {
                value = item;
            }
        }
        serde_json::from_value(value).map_err(|e| e.to_string())
    }

    /// Writes one more item; it is in the file when this returns. After a failed write the file ends with its
    /// last whole line.
    ///
    /// # Errors
    /// [`Error::NotFinite`] if a number of the item is none, so that it could not be read back; [`Error::Io`].
    pub fn push(&mut self, item: &T) -> Result<()> {
        let io = |source| Error::io(&self.path, source);
        let item = serde_json::to_string(item).map_err(|e| io(e.into()))?;
        let run = &self.run;
        let line = match item.strip_suffix('}') {
            Some(fields) if fields.len() > 1 => format!("{fields},\"{RUN}\":\"{run}\"}}\n"),
            _ => format!("{{\"{ITEM}\":{item},\"{RUN}\":\"{run}\"}}\n"),
        };
        if let Err(reason) = self.item(line.as_bytes()) {
            let what = format!("item for {}", self.path.display());
            return Err(Error::NotFinite { what, got: reason });
        }
        self.append(line.as_bytes())
    }

    fn begin(&mut self, header: &str) -> Result<()> {
        self.file.set_len(0).map_err(|e| Error::io(&self.path, e))?;
        self.len = 0;
        self.append(header.as_bytes())
    }

    /// Writes whole lines, or nothing.
    fn append(&mut self, lines: &[u8]) -> Result<()> {
        let io = |source| Error::io(&self.path, source);
        if self.broken {
            // It failed with the write that broke it.
            self.file.set_len(self.len).map_err(io)?;
            self.broken = false;
        }
        let written = self.file.write_all(lines).and_then(|()| self.file.sync_data());
        if let Err(error) = written {
            self.broken = self.file.set_len(self.len).is_err();
            return Err(io(error));
        }
        self.len += lines.len() as u64;
        Ok(())
    }

    fn line_error(&self, line: usize, reason: String) -> Error {
        Error::Line { path: self.path.clone(), line: line + 1, reason }
    }
}

/// Names of the settings, sorted.
fn names(settings: &Value) -> Vec<String> {
    let fields = settings.as_object();
    let mut names: Vec<String> = fields.map_or(Vec::new(), |f| f.keys().cloned().collect());
    names.sort();
    names
}

/// Fingerprint of settings, in whatever order they came.
fn run_of(settings: &Value) -> String {
    let named = |name: String| format!("{name}={}\n", settings[&name]);
    fingerprint(names(settings).into_iter().map(named).collect::<String>().as_bytes())
}

/// The first setting that differs, as an error.
fn compare(path: &Path, expected: &Value, got: &Value) -> Result<()> {
    if expected == got {
        return Ok(());
    }
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
    use std::fs;

    use super::*;

    type Log = ItemLog<(usize, f64)>;

    #[test]
    fn a_broken_off_log_goes_on_after_its_last_whole_line() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("items.jsonl");
        let settings = json!({ "seed": 1, "plan": "dense" });
        let (mut log, items) = Log::open(&path, &settings).unwrap();
        assert!(items.is_empty());
        log.push(&(0, 1.0)).unwrap();
        log.push(&(1, 0.5)).unwrap();
        drop(log);
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
        // An item of another run is never taken for one of this.
        fs::write(&path, text.clone() + &text.replace("\"run\":\"", "\"run\":\"0")).unwrap();
        let line = Log::open(&path, &json!({ "seed": 1 })).unwrap_err();
        assert!(matches!(line, Error::Line { line: 3, .. }), "{line}");
    }

    #[test]
    fn a_file_that_is_no_log_stays_as_it_is() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("items.jsonl");
        for text in ["{\"case\": 0}\n", "{\"a\": 1}", "no end", "{\n  \"settings\": {}\n}", "\n"] {
            fs::write(&path, text).unwrap();
            let error = Log::open(&path, &json!({ "seed": 1 })).unwrap_err();
            assert!(matches!(error, Error::Line { line: 1, .. }), "{text}: {error}");
            assert_eq!(fs::read_to_string(&path).unwrap(), text);
        }
        assert!(Log::open(dir.path(), &json!({})).is_err());
    }

    #[test]
    fn two_runs_of_one_log_do_not_mix() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("items.jsonl");
        let (mut log, _) = Log::open(&path, &json!({ "plan": 1 })).unwrap();
        let error = Log::open(&path, &json!({ "plan": 2 })).unwrap_err();
        assert!(matches!(error, Error::InUse { .. }), "{error}");
        log.push(&(0, 1.0)).unwrap();
        drop(log);
        let error = Log::open(&path, &json!({ "plan": 2 })).unwrap_err();
        assert!(matches!(error, Error::OtherSettings { .. }), "{error}");
    }

    #[test]
    fn the_beginning_of_a_run_that_answered_nothing_is_another_ones() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("items.jsonl");
        drop(Log::open(&path, &json!({ "plan": 1 })).unwrap());
        Log::open(&path, &json!({ "plan": 2 })).unwrap().0.push(&(0, 1.0)).unwrap();
        assert_eq!(Log::open(&path, &json!({ "plan": 2 })).unwrap().1, [(0, 1.0)]);
    }

    #[test]
    fn a_last_item_without_its_line_end_is_kept() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("items.jsonl");
        let settings = json!({ "plan": 1 });
        Log::open(&path, &settings).unwrap().0.push(&(0, 1.0)).unwrap();
        let whole = fs::read(&path).unwrap();
        fs::write(&path, &whole[..whole.len() - 1]).unwrap();
        assert_eq!(Log::open(&path, &settings).unwrap().1, [(0, 1.0)]);
        assert_eq!(fs::read(&path).unwrap(), whole);
    }

    #[test]
    fn an_item_that_could_not_be_read_back_is_not_written() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("items.jsonl");
        let (mut log, _) = Log::open(&path, &json!({ "plan": 1 })).unwrap();
        log.push(&(0, 1.0)).unwrap();
        for none in [f64::NAN, f64::INFINITY] {
            assert!(matches!(log.push(&(1, none)), Err(Error::NotFinite { .. })));
        }
        drop(log);
        assert_eq!(Log::open(&path, &json!({ "plan": 1 })).unwrap().1, [(0, 1.0)]);
    }

    /// `/dev/full` cannot be cut, and a limit of the file's size would be the whole process's: what is
    /// tested is that a log goes on after the bytes that a failed write left.
    #[test]
    fn what_a_failed_write_left_is_cut_off_before_the_next() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("items.jsonl");
        let settings = json!({ "plan": 1 });
        let (mut log, _) = Log::open(&path, &settings).unwrap();
        log.push(&(0, 1.0)).unwrap();
        log.file.write_all(b"{\"half").unwrap();
        log.broken = true;
        log.push(&(1, 2.0)).unwrap();
        drop(log);
        assert_eq!(Log::open(&path, &settings).unwrap().1, [(0, 1.0), (1, 2.0)]);
    }
}
