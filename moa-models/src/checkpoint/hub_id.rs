use std::fmt;
use std::str::FromStr;

use crate::error::{Error, Result};

/// The name of a model on the Hugging Face hub: `owner/name`, `owner/name/FILE.gguf` for one of several GGUF files, or
/// `owner/name:Q4_K_M` for the one of these blocks; each may end with `@revision`.
///
/// ```
/// use moa_models::HubId;
///
/// let id: HubId = "owner/model-1.5B@v2".parse()?;
/// assert_eq!((id.model(), id.revision()), ("owner/model-1.5B", Some("v2")));
/// let id: HubId = "owner/model/small/model-q4_0.gguf".parse()?;
/// assert_eq!((id.model(), id.file()), ("owner/model", Some("small/model-q4_0.gguf")));
/// assert!("path/to/model".parse::<HubId>().is_err());
/// # Ok::<(), moa_models::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HubId {
    model: String,
    file: Option<String>,
    blocks: Option<String>,
    revision: Option<String>,
}

impl HubId {
    /// `owner/name`.
    #[must_use]
    pub fn model(&self) -> &str {
        &self.model
    }

    /// The GGUF file that is named, with its folders in the repository; of a model in several files any one.
    #[must_use]
    pub fn file(&self) -> Option<&str> {
        self.file.as_deref()
    }

    /// What the name of the GGUF file that is meant ends with, such as `Q4_K_M`.
    #[must_use]
    pub fn blocks(&self) -> Option<&str> {
        self.blocks.as_deref()
    }

    /// The branch, tag or commit; `None` for the hub's default, `main`.
    #[must_use]
    pub fn revision(&self) -> Option<&str> {
        self.revision.as_deref()
    }
}

impl FromStr for HubId {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let (rest, revision) = match text.split_once('@') {
            Some((rest, revision)) => (rest, Some(revision)),
            None => (text, None),
        };
        let (rest, blocks) = match rest.split_once(':') {
            Some((rest, blocks)) => (rest, Some(blocks)),
            None => (rest, None),
        };
        let name_end = rest.match_indices('/').nth(1).map_or(rest.len(), |(at, _)| at);
        let (model, file) = (&rest[..name_end], rest.get(name_end + 1..));
        // Names become parts of paths.
        let is_plain = |part: &str| {
            let is_allowed = |c: char| c.is_ascii_alphanumeric() || "._-".contains(c);
            !part.is_empty() && !part.starts_with('.') && part.chars().all(is_allowed)
        };
        let is_path = |path: &str| path.split('/').all(is_plain);
        let is_file = |file: &str| blocks.is_none() && file.ends_with(".gguf") && is_path(file);
        if model.contains('/')
            && is_path(model)
            && file.is_none_or(is_file)
            && blocks.is_none_or(is_plain)
            && revision.is_none_or(is_path)
        {
            return Ok(Self {
                model: model.to_owned(),
                file: file.map(str::to_owned),
                blocks: blocks.map(str::to_owned),
                revision: revision.map(str::to_owned),
            });
        }
        let expected = "owner/name, owner/name/FILE.gguf or owner/name:BLOCKS, and maybe @revision";
        Err(Error::invalid("model of the hub", expected, text))
    }
}

impl fmt::Display for HubId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.model)?;
        for (mark, part) in [('/', &self.file), (':', &self.blocks), ('@', &self.revision)] {
            if let Some(part) = part {
                write!(f, "{mark}{part}")?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_plain_parts() {
        for good in [
            "a/b",
            "Owner_1/Model-7B.v2",
            "a/b@main",
            "a/b@refs/pr/1",
            "a/b/c.gguf",
            "a/b/c/d-00001-of-00002.gguf@v1",
            "a/b:Q4_K_M",
            "a/b:q8_0@v1",
        ] {
            assert_eq!(good.parse::<HubId>().unwrap().to_string(), good);
        }
        for bad in [
            "",
            "a",
            "a/",
            "/b",
            "a/b/c",
            "./a",
            "../a",
            "a/..",
            "a/b@",
            "a/b@../c",
            "a b/c",
            "a/b/",
            "a/b/../c.gguf",
            "a/b//c.gguf",
            "a/b/.gguf",
            "a/b:",
            "a/b:x/y",
            "a/b:x:y",
            "a/b/c.gguf:x",
        ] {
            assert!(bad.parse::<HubId>().is_err(), "{bad}");
        }
    }
}
