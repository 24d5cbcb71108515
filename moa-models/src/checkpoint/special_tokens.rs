use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use serde_json::Value;

use crate::checkpoint::json::JsonObject;
use crate::checkpoint::text::is_file;
use crate::error::Result;

/// The texts of the tokens with a role, such as `bos_token` and `eos_token`, and of other special ones.
///
/// Read from `tokenizer_config.json`, completed by `special_tokens_map.json`; either may be
/// absent. Each token is a string, or an object with the string as `content`.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct SpecialTokens {
    roles: BTreeMap<String, String>,
    additional: BTreeSet<String>,
}

impl SpecialTokens {
    const ROLES: [&str; 7] = [
        "bos_token",
        "eos_token",
        "unk_token",
        "pad_token",
        "sep_token",
        "cls_token",
        "mask_token",
    ];

    pub(crate) fn from_dir(dir: &Path) -> Result<Self> {
        let mut tokens = Self::default();
        for file in ["tokenizer_config.json", "special_tokens_map.json"] {
            let path = dir.join(file);
            if is_file(&path)? {
                tokens.complete(&JsonObject::read(&path)?)?;
            }
        }
        Ok(tokens)
    }

    pub(crate) fn new(bos: &str, eos: &str) -> Self {
        let pair = [("bos_token", bos), ("eos_token", eos)];
        let roles = pair.map(|(role, text)| (role.to_owned(), text.to_owned())).into();
        Self { roles, additional: BTreeSet::new() }
    }

    /// The texts of these roles.
    pub(crate) fn of_roles<'a>(roles: impl IntoIterator<Item = (&'a str, &'a str)>) -> Self {
        let own = |(role, text): (&str, &str)| (role.to_owned(), text.to_owned());
        Self { roles: roles.into_iter().map(own).collect(), additional: BTreeSet::new() }
    }

    /// Gives roles that have no text yet one.
    pub(crate) fn complete_with<'r, 't>(
        &mut self,
        roles: impl Iterator<Item = (&'r str, &'t str)>,
    ) {
        for (role, text) in roles {
            self.roles.entry(role.to_owned()).or_insert_with(|| text.to_owned());
        }
    }

    pub(crate) fn get(&self, role: &str) -> Option<&str> {
        self.roles.get(role).map(String::as_str)
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = (&str, &str)> {
        self.roles.iter().map(|(role, text)| (role.as_str(), text.as_str()))
    }

    /// Whether a text is one of them.
    pub(crate) fn contains(&self, text: &str) -> bool {
        self.additional.contains(text) || self.roles.values().any(|own| own == text)
    }

    /// Takes the roles that have no text yet from `object`.
    fn complete(&mut self, object: &JsonObject) -> Result<()> {
        for role in Self::ROLES {
            let Some(value) = object.get(role) else { continue };
            let Some(text) = content(value) else {
                let expected = "a string or an object with a string `content`";
                return Err(object.invalid(role, expected, value));
            };
            self.roles.entry(role.to_owned()).or_insert_with(|| text.to_owned());
        }
        // Some files have a mapping by names of their own here.
        match object.get("additional_special_tokens") {
            Some(Value::Array(list)) => self.additional.extend(texts(list.iter())),
            Some(Value::Object(map)) => self.additional.extend(texts(map.values())),
            _ => {}
        }
        Ok(())
    }
}

/// The text of a token that is a string, or an object with a string.
fn content(value: &Value) -> Option<&str> {
    value.as_str().or_else(|| value.get("content")?.as_str())
}

fn texts<'v>(values: impl Iterator<Item = &'v Value>) -> impl Iterator<Item = String> {
    values.filter_map(content).map(str::to_owned)
}
