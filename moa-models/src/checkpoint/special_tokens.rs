use std::collections::BTreeMap;
use std::path::Path;

use serde_json::Value;

use crate::checkpoint::json::JsonObject;
use crate::error::Result;

/// The texts of the tokens with a role: `bos_token`, `eos_token`, `unk_token`, `pad_token`.
///
/// Read from `tokenizer_config.json`, completed by `special_tokens_map.json`; either may be
/// absent. Each token is a string, or an object with the string as `content`.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct SpecialTokens(BTreeMap<String, String>);

impl SpecialTokens {
    const ROLES: [&str; 4] = ["bos_token", "eos_token", "unk_token", "pad_token"];

    pub(crate) fn from_dir(dir: &Path) -> Result<Self> {
        let mut tokens = Self::default();
        for file in ["tokenizer_config.json", "special_tokens_map.json"] {
            let path = dir.join(file);
            if path.is_file() {
                tokens.complete(&JsonObject::read(&path)?)?;
            }
        }
        Ok(tokens)
    }

    pub(crate) fn new(bos: &str, eos: &str) -> Self {
        let pair = [("bos_token", bos), ("eos_token", eos)];
        Self(pair.map(|(role, text)| (role.to_owned(), text.to_owned())).into())
    }

    /// The texts of these roles.
    pub(crate) fn of_roles<'a>(roles: impl IntoIterator<Item = (&'a str, &'a str)>) -> Self {
        Self(roles.into_iter().map(|(role, text)| (role.to_owned(), text.to_owned())).collect())
    }

    pub(crate) fn get(&self, role: &str) -> Option<&str> {
        self.0.get(role).map(String::as_str)
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = (&str, &str)> {
        self.0.iter().map(|(role, text)| (role.as_str(), text.as_str()))
    }

    /// Takes the roles that have no text yet from `object`.
    fn complete(&mut self, object: &JsonObject) -> Result<()> {
        for role in Self::ROLES {
            let text = match object.get(role) {
                None => continue,
                Some(Value::String(text)) => text,
                Some(value) => match value.get("content") {
                    Some(Value::String(text)) => text,
                    _ => {
                        let expected = "a string or an object with a string `content`";
                        return Err(object.invalid(role, expected, value));
                    }
                },
            };
            self.0.entry(role.to_owned()).or_insert_with(|| text.clone());
        }
        Ok(())
    }
}
