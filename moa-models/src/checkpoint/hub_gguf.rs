//! Which of a repository's GGUF files a model is.

use std::collections::BTreeSet;

use crate::checkpoint::gguf::part_name;
use crate::checkpoint::hub_id::HubId;
use crate::checkpoint::safetensors::is_name;
use crate::error::{Error, Result};

/// The file of `files` that `id` means, with the other parts of its model: the one that is named, or the only one there
/// is, of the blocks that are named.
///
/// # Errors
/// [`Error::HubFile`] if it is none of them, or several.
pub(crate) fn choose(id: &HubId, files: &[String]) -> Result<Vec<String>> {
    let models: BTreeSet<Vec<String>> =
        files.iter().filter(|file| is_gguf(file)).map(|file| parts(file)).collect();
    let is_meant = |model: &&Vec<String>| match (id.file(), id.blocks()) {
        (Some(file), _) => model.iter().any(|part| part == file),
        (None, Some(blocks)) => is_model(&model[0]) && is_of(&model[0], blocks),
        (None, None) => is_model(&model[0]),
    };
    let mut meant = models.iter().filter(is_meant);
    match (meant.next(), meant.next()) {
        (Some(model), None) => Ok(model.clone()),
        (first, _) => Err(Error::HubFile {
            id: id.to_string(),
            several: first.is_some(),
            files: models.iter().map(|model| model[0].clone()).collect(),
        }),
    }
}

/// All files of the model that `file` is a part of, the first one first.
pub(crate) fn parts(file: &str) -> Vec<String> {
    let of_several = || {
        let (stem, ends) = file.split_at_checked(file.len().checked_sub(part_name(1, 1).len())?)?;
        let (number, count) = ends.strip_prefix('-')?.strip_suffix(".gguf")?.split_once("-of-")?;
        let (number, count) = (number.parse().ok()?, count.parse().ok()?);
        let is_part = part_name(number, count) == ends && (1..=count).contains(&number);
        is_part.then(|| (1..=count).map(|n| format!("{stem}{}", part_name(n, count))).collect())
    };
    of_several().unwrap_or_else(|| vec![file.to_owned()])
}

/// Whether a path is that of a GGUF file inside its repository.
pub(crate) fn is_gguf(path: &str) -> bool {
    path.to_ascii_lowercase().ends_with(".gguf") && path.split('/').all(is_name)
}

/// Whether a file is a model, by its name, and not what lies beside one: what makes tokens of images, or statistics for
/// whoever quantises.
fn is_model(file: &str) -> bool {
    let file = file.to_ascii_lowercase();
    !["mmproj", "imatrix"].iter().any(|other| file.contains(other))
}

/// Whether the name of a model's first file says that it is in these blocks: it ends with their name as a word.
fn is_of(file: &str, blocks: &str) -> bool {
    let (file, blocks) = (file.to_ascii_lowercase(), blocks.to_ascii_lowercase());
    let all = parts(&file).len();
    let end = if all > 1 { part_name(1, all as u64) } else { ".gguf".to_owned() };
    let before = file.strip_suffix(&end).and_then(|stem| stem.strip_suffix(&blocks));
    before.is_some_and(|before| !before.ends_with(|c: char| c.is_ascii_alphanumeric()))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The first file that a name means, and how many the model has; or whether several would do, and how many there are.
    fn chosen(id: &str, files: &[&str]) -> std::result::Result<(String, usize), (bool, usize)> {
        let files: Vec<String> = files.iter().map(|file| (*file).to_owned()).collect();
        match choose(&id.parse().unwrap(), &files) {
            Ok(parts) => Ok((parts[0].clone(), parts.len())),
            Err(Error::HubFile { several, files, .. }) => Err((several, files.len())),
            Err(other) => panic!("{other}"),
        }
    }

    #[test]
    fn the_only_model_is_meant_whatever_lies_beside_it() {
        let one = |file: &str, parts| Ok((file.to_owned(), parts));
        let files = ["README.md", "m-Q4_0.gguf", "mmproj-F16.gguf", "m.imatrix.gguf"];
        assert_eq!(chosen("a/b", &files), one("m-Q4_0.gguf", 1));
        assert_eq!(chosen("a/b/mmproj-F16.gguf", &files), one("mmproj-F16.gguf", 1));
        let split = ["x/m-00002-of-00002.gguf", "x/m-00001-of-00002.gguf"];
        assert_eq!(chosen("a/b", &split), one("x/m-00001-of-00002.gguf", 2));
        assert_eq!(
            chosen("a/b/x/m-00002-of-00002.gguf", &split),
            one("x/m-00001-of-00002.gguf", 2)
        );
        // These are no parts of anything.
        let numbers = ["m-00003-of-00002.gguf"];
        assert_eq!(chosen("a/b", &numbers), one(numbers[0], 1));
    }

    #[test]
    fn one_of_several_is_named() {
        let files = [
            "m-BF16.gguf",
            "m-F16.gguf",
            "m-Q4_K_M.gguf",
            "m-IQ4_K_M.gguf",
            "Q8_0/m.q8_0-00001-of-00003.gguf",
            "Q8_0/m.q8_0-00002-of-00003.gguf",
        ];
        let one = |file: &str, parts| Ok((file.to_owned(), parts));
        assert_eq!(chosen("a/b", &files), Err((true, 5)));
        assert_eq!(chosen("a/b:f16", &files), one("m-F16.gguf", 1));
        assert_eq!(chosen("a/b:Q4_K_M@v1", &files), one("m-Q4_K_M.gguf", 1));
        assert_eq!(chosen("a/b:Q8_0", &files), one("Q8_0/m.q8_0-00001-of-00003.gguf", 3));
        assert_eq!(chosen("a/b:Q4_K", &files), Err((false, 5)));
        assert_eq!(chosen("a/b/m-Q4.gguf", &files), Err((false, 5)));
        assert_eq!(chosen("a/b", &[]), Err((false, 0)));
        assert_eq!(chosen("a/b", &["../m.gguf", "/m.gguf", "x/../m.gguf"]), Err((false, 0)));
    }
}
