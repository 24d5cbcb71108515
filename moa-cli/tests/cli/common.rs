//! Runs the command, and makes model folders that are broken in one way.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use serde_json::{Value, json};

/// The small model of this project.
pub(crate) fn tiny() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../assets/moa-tiny")
}

pub(crate) fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// Runs `moa` with arguments, in `folder`.
pub(crate) fn moa_in(folder: &Path, args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_moa")).args(args).current_dir(folder).output().unwrap()
}

/// stdout of a run that must succeed.
pub(crate) fn ok(folder: &Path, args: &[&str]) -> String {
    let output = moa_in(folder, args);
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{args:?}: {:?}\n{stderr}", output.status);
    String::from_utf8(output.stdout).unwrap()
}

/// The one JSON object that a run with `--json` prints.
pub(crate) fn json_of(folder: &Path, args: &[&str]) -> Value {
    let text = ok(folder, &[args, &["--json"]].concat());
    assert_eq!(text.lines().count(), 1, "{text}");
    serde_json::from_str(&text).unwrap()
}

/// A run that must fail with exit code 2, say all of `parts` on stderr, print nothing on stdout and
/// leave the folder as it was.
pub(crate) fn refuses(folder: &Path, args: &[&str], parts: &[&str]) {
    let before = listing(folder);
    let output = moa_in(folder, args);
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(2), "{args:?}\n{stderr}");
    // Stages may have begun.
    let first = stderr.lines().find(|line| !is_progress(line)).unwrap_or_default();
    assert!(first.starts_with("error: "), "{args:?}\n{stderr}");
    assert!(output.stdout.is_empty(), "{args:?}");
    for part in parts {
        assert!(stderr.contains(part), "{args:?}: no `{part}` in\n{stderr}");
    }
    assert_eq!(listing(folder), before, "{args:?} left something behind");
}

/// Whether a line of stderr says how far a stage is: `NAME: DONE/TOTAL, HH:MM:SS`.
pub(crate) fn is_progress(line: &str) -> bool {
    let is_number = |text: &str| !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
    let Some((steps, time)) = line.rsplit_once(", ") else { return false };
    let count = steps.rsplit_once(": ").and_then(|(_, count)| count.split_once('/'));
    count.is_some_and(|(done, total)| is_number(done) && is_number(total))
        && time.split(':').count() == 3
        && time.split(':').all(is_number)
}

/// Every file below a folder with its size.
fn listing(folder: &Path) -> Vec<(PathBuf, u64)> {
    let mut files = Vec::new();
    for entry in fs::read_dir(folder).unwrap() {
        let entry = entry.unwrap();
        let metadata = entry.metadata().unwrap();
        files.push((entry.path(), metadata.len()));
        if metadata.is_dir() {
            files.extend(listing(&entry.path()));
        }
    }
    files.sort();
    files
}

/// A copy of the small model below `root`.
pub(crate) fn model_copy(root: &Path, name: &str) -> PathBuf {
    let folder = root.join(name);
    fs::create_dir(&folder).unwrap();
    for entry in fs::read_dir(tiny()).unwrap() {
        let entry = entry.unwrap();
        fs::copy(entry.path(), folder.join(entry.file_name())).unwrap();
    }
    folder
}

/// Changes a JSON file of a folder.
pub(crate) fn edit(file: &Path, change: impl FnOnce(&mut Value)) {
    let mut value: Value = serde_json::from_str(&fs::read_to_string(file).unwrap()).unwrap();
    change(&mut value);
    fs::write(file, value.to_string()).unwrap();
}

/// Changes the header of a safetensors file; the tensors' bytes stay.
pub(crate) fn edit_header(file: &Path, change: impl FnOnce(&mut Value)) {
    let bytes = fs::read(file).unwrap();
    let len = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let mut header: Value = serde_json::from_slice(&bytes[8..8 + len]).unwrap();
    change(&mut header);
    let header = header.to_string().into_bytes();
    let out = [&(header.len() as u64).to_le_bytes()[..], &header, &bytes[8 + len..]].concat();
    fs::write(file, out).unwrap();
}

/// Retrieval cases of `lines` lines in LongEval's wording.
pub(crate) fn cases(file: &Path, count: usize, lines: usize) {
    const NAMES: [&str; 8] =
        ["amber", "basalt", "cedar", "delta", "ember", "falcon", "granite", "harbor"];
    let mut text = String::new();
    for case in 0..count {
        let record: Vec<String> = (0..lines)
            .map(|i| {
                let name = format!("{}-{}", NAMES[i % 8], NAMES[(i / 8 + case) % 8]);
                format!("line {name}: REGISTER_CONTENT is <{}>\n", 1000 + 37 * i + case)
            })
            .collect();
        let right = &record[(lines / 3 + case) % lines];
        let key = right["line ".len()..].split(':').next().unwrap();
        let number: i64 = right.split(['<', '>']).nth(1).unwrap().parse().unwrap();
        let prompt = format!(
            "Below is a record of lines I want you to remember.\n\n{}\nNow the record is over. Tell me \
             what is the <REGISTER_CONTENT> in line {key}? I need the number.",
            record.concat()
        );
        let case = json!({ "prompt": prompt, "expected_number": number, "correct_line": right });
        text.push_str(&format!("{case}\n"));
    }
    fs::write(file, text).unwrap();
}
