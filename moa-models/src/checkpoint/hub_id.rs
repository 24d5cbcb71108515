use std::fmt;
use std::str::FromStr;

use crate::error::{Error, Result};

/// The name of a model on the Hugging Face hub, `owner/name` or `owner/name@revision`.
///
/// ```
/// use moa_models::HubId;
///
/// let id: HubId = "owner/model-1.5B@v2".parse()?;
/// assert_eq!((id.model(), id.revision()), ("owner/model-1.5B", Some("v2")));
/// assert!("path/to/model".parse::<HubId>().is_err());
/// # Ok::<(), moa_models::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HubId {
    model: String,
    revision: Option<String>,
}

impl HubId {
    /// `owner/name`.
    #[must_use]
    pub fn model(&self) -> &str {
        &self.model
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
        let (model, revision) = match text.split_once('@') {
            Some((model, revision)) => (model, Some(revision)),
            None => (text, None),
        };
        // Names become parts of paths.
        let is_plain = |part: &str| {
            let is_allowed = |c: char| c.is_ascii_alphanumeric() || "._-".contains(c);
            !part.is_empty() && !part.starts_with('.') && part.chars().all(is_allowed)
        };
        let is_model =
            model.split_once('/').is_some_and(|(owner, name)| is_plain(owner) && is_plain(name));
        if is_model && revision.is_none_or(|revision| revision.split('/').all(is_plain)) {
            return Ok(Self { model: model.to_owned(), revision: revision.map(str::to_owned) });
        }
        Err(Error::invalid("model of the hub", "owner/name or owner/name@revision", text))
    }
}

impl fmt::Display for HubId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.model)?;
        match &self.revision {
            Some(revision) => write!(f, "@{revision}"),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_two_plain_parts() {
        for good in ["a/b", "Owner_1/Model-7B.v2", "a/b@main", "a/b@refs/pr/1"] {
            assert_eq!(good.parse::<HubId>().unwrap().to_string(), good);
        }
        for bad in
            ["", "a", "a/", "/b", "a/b/c", "./a", "../a", "a/..", "a/b@", "a/b@../c", "a b/c"]
        {
            assert!(bad.parse::<HubId>().is_err(), "{bad}");
        }
    }
}
