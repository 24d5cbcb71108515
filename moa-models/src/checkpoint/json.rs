use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};

use serde::de::{Deserialize, Deserializer, Error as _, MapAccess, SeqAccess, Visitor};
use serde_json::Value;

use crate::checkpoint::text::read_text;
use crate::error::{Error, Result};

/// A JSON object of a model folder, such as its `config.json`, read field by field with errors that name the file and the field.
///
/// The same key twice is an error at any depth: the reader that takes the first and the reader
/// that takes the last would see two different models. `null` counts as absent, as in Python.
#[derive(Clone, Debug)]
pub struct JsonObject {
    path: PathBuf,
    prefix: String,
    fields: BTreeMap<String, Value>,
}

impl JsonObject {
    /// Reads and parses `path`.
    pub(crate) fn read(path: &Path) -> Result<Self> {
        Self::parse(path, &read_text(path)?)
    }

    /// Parses `text`, which came from `path`.
    pub(crate) fn parse(path: &Path, text: &str) -> Result<Self> {
        let strict: StrictObject = serde_json::from_str(&quote_non_finite(text))
            .map_err(|e| Error::Json { path: path.to_owned(), reason: e.to_string() })?;
        Ok(Self { path: path.to_owned(), prefix: String::new(), fields: strict.0 })
    }

    /// The object with those of these fields that it has not and `other` has.
    pub(crate) fn with_absent<const N: usize>(mut self, fields: [&str; N], other: &Self) -> Self {
        for field in fields {
            if let (None, Some(value)) = (self.get(field), other.get(field)) {
                self.fields.insert(field.to_owned(), value.clone());
            }
        }
        self
    }

    /// The file.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// The field's value, unless it is absent or null.
    pub(crate) fn get(&self, field: &str) -> Option<&Value> {
        self.fields.get(field).filter(|value| !value.is_null())
    }

    /// All fields and their values, by name.
    pub(crate) fn iter(&self) -> impl Iterator<Item = (&str, &Value)> {
        self.fields.iter().map(|(name, value)| (name.as_str(), value))
    }

    /// The field as an object, unless it is absent or false.
    ///
    /// # Errors
    /// [`Error::Config`] if it is something else.
    pub fn object(&self, field: &str) -> Result<Option<Self>> {
        match self.get(field) {
            None | Some(Value::Bool(false)) => Ok(None),
            Some(Value::Object(map)) => Ok(Some(Self {
                path: self.path.clone(),
                prefix: format!("{}{field}.", self.prefix),
                fields: map.iter().map(|(k, v)| (k.clone(), v.clone())).collect(),
            })),
            Some(other) => Err(self.invalid(field, "an object or null", other)),
        }
    }

    /// The field as a whole number from 1 to 2^31 - 1, so that products of two counts fit 64 bits.
    ///
    /// # Errors
    /// [`Error::Config`] if it is something else.
    pub fn count(&self, field: &str) -> Result<Option<usize>> {
        let Some(value) = self.get(field) else { return Ok(None) };
        match value.as_u64() {
            Some(n) if (1..=i32::MAX as u64).contains(&n) => Ok(Some(n as usize)),
            _ => Err(self.invalid(field, "a whole number from 1 to 2147483647", value)),
        }
    }

    /// The field as a finite number above `above`.
    ///
    /// # Errors
    /// [`Error::Config`] if it is something else.
    pub fn number_above(&self, field: &str, above: f64) -> Result<Option<f64>> {
        let Some(value) = self.get(field) else { return Ok(None) };
        match value.as_f64() {
            Some(x) if x.is_finite() && x > above => Ok(Some(x)),
            _ => Err(self.invalid(field, &format!("a finite number above {above}"), value)),
        }
    }

    /// The field as a finite number of at least `least`.
    ///
    /// # Errors
    /// [`Error::Config`] if it is something else.
    pub fn number_from(&self, field: &str, least: f64) -> Result<Option<f64>> {
        let Some(value) = self.get(field) else { return Ok(None) };
        match value.as_f64() {
            Some(x) if x.is_finite() && x >= least => Ok(Some(x)),
            _ => Err(self.invalid(field, &format!("a finite number of at least {least}"), value)),
        }
    }

    /// The field as true or false.
    ///
    /// # Errors
    /// [`Error::Config`] if it is something else.
    pub fn flag(&self, field: &str) -> Result<Option<bool>> {
        let Some(value) = self.get(field) else { return Ok(None) };
        value.as_bool().map(Some).ok_or_else(|| self.invalid(field, "true or false", value))
    }

    /// The field as a string.
    ///
    /// # Errors
    /// [`Error::Config`] if it is something else.
    pub fn text(&self, field: &str) -> Result<Option<&str>> {
        let Some(value) = self.get(field) else { return Ok(None) };
        value.as_str().map(Some).ok_or_else(|| self.invalid(field, "a string", value))
    }

    /// The field as token ids: one id, a list of them, or null for none, also in a list.
    ///
    /// # Errors
    /// [`Error::Config`] if it is something else.
    pub fn token_ids(&self, field: &str) -> Result<Vec<u32>> {
        let id = |value: &Value| value.as_u64().and_then(|id| u32::try_from(id).ok());
        let ids = match self.get(field) {
            None => Some(Vec::new()),
            Some(Value::Array(values)) => values.iter().filter(|v| !v.is_null()).map(id).collect(),
            Some(value) => id(value).map(|id| vec![id]),
        };
        ids.ok_or_else(|| {
            let value = self.fields.get(field).unwrap_or(&Value::Null);
            self.invalid(field, "a token id, a list of token ids or null", value)
        })
    }

    /// The field as a list of finite numbers above `above`.
    ///
    /// # Errors
    /// [`Error::Config`] if it is something else.
    pub fn numbers_above(&self, field: &str, above: f64) -> Result<Option<Vec<f64>>> {
        let number = |x: &Value| x.as_f64().filter(|x| x.is_finite() && *x > above);
        self.list(field, &format!("a list of finite numbers above {above}"), number)
    }

    /// The field as a list of what `item` makes of each value; `expected` says what that is.
    pub(crate) fn list<T>(
        &self,
        field: &str,
        expected: &str,
        item: impl Fn(&Value) -> Option<T>,
    ) -> Result<Option<Vec<T>>> {
        let Some(value) = self.get(field) else { return Ok(None) };
        let items = value.as_array().and_then(|values| values.iter().map(item).collect());
        items.map(Some).ok_or_else(|| self.invalid(field, expected, value))
    }

    /// Whether the field is there, be it null.
    pub(crate) fn names(&self, field: &str) -> bool {
        self.fields.contains_key(field)
    }

    /// `value`, or an error that says that `field` is missing.
    ///
    /// # Errors
    /// [`Error::MissingField`] if there is none.
    pub fn require<T>(&self, field: &str, value: Option<T>) -> Result<T> {
        value.ok_or_else(|| Error::MissingField {
            path: self.path.clone(),
            field: format!("{}{field}", self.prefix),
        })
    }

    /// An error for a field whose value is not one of `expected`.
    pub fn invalid(&self, field: &str, expected: &str, got: impl fmt::Display) -> Error {
        let mut got = got.to_string();
        if let Some((end, _)) = got.char_indices().nth(80) {
            got.truncate(end);
            got.push_str("...");
        }
        Error::Config {
            path: self.path.clone(),
            field: format!("{}{field}", self.prefix),
            expected: expected.to_owned(),
            got,
        }
    }
}

/// The text with `NaN` and `Infinity`, which Python writes and JSON does not have, as strings: a field
/// that nobody reads may hold them, and one that is read is refused for it.
fn quote_non_finite(text: &str) -> Cow<'_, str> {
    const NAMES: [&str; 3] = ["-Infinity", "Infinity", "NaN"];
    if !NAMES[1..].iter().any(|name| text.contains(name)) {
        return Cow::Borrowed(text);
    }
    let mut out = String::with_capacity(text.len());
    let (mut rest, mut in_string) = (text, false);
    while let Some(c) = rest.chars().next() {
        let name = NAMES.iter().find(|name| !in_string && rest.starts_with(**name));
        let len = match (name, c) {
            (Some(name), _) => {
                out.extend(["\"", name, "\""]);
                name.len()
            }
            // What is escaped ends no string.
            (None, '\\') if in_string => 1 + rest[1..].chars().next().map_or(0, char::len_utf8),
            (None, c) => {
                in_string ^= c == '"';
                c.len_utf8()
            }
        };
        if name.is_none() {
            out.push_str(&rest[..len]);
        }
        rest = &rest[len..];
    }
    Cow::Owned(out)
}

/// The fields of an object that names none of them twice, at any depth.
struct StrictObject(BTreeMap<String, Value>);

/// A JSON value without duplicate keys.
struct Strict(Value);

impl<'de> Deserialize<'de> for StrictObject {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        match Strict::deserialize(deserializer)?.0 {
            Value::Object(map) => Ok(Self(map.into_iter().collect())),
            other => Err(D::Error::custom(format!("expected an object, got `{other}`"))),
        }
    }
}

impl<'de> Deserialize<'de> for Strict {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        deserializer.deserialize_any(StrictVisitor).map(Self)
    }
}

struct StrictVisitor;

impl<'de> Visitor<'de> for StrictVisitor {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a JSON value")
    }

    fn visit_bool<E>(self, v: bool) -> std::result::Result<Value, E> {
        Ok(v.into())
    }

    fn visit_i64<E>(self, v: i64) -> std::result::Result<Value, E> {
        Ok(v.into())
    }

    fn visit_u64<E>(self, v: u64) -> std::result::Result<Value, E> {
        Ok(v.into())
    }

    fn visit_f64<E>(self, v: f64) -> std::result::Result<Value, E> {
        Ok(v.into())
    }

    fn visit_str<E>(self, v: &str) -> std::result::Result<Value, E> {
        Ok(v.into())
    }

    fn visit_unit<E>(self) -> std::result::Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> std::result::Result<Value, A::Error> {
        let mut values = Vec::new();
        while let Some(Strict(value)) = seq.next_element()? {
            values.push(value);
        }
        Ok(Value::Array(values))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> std::result::Result<Value, A::Error> {
        let mut fields = serde_json::Map::new();
        while let Some(key) = map.next_key::<String>()? {
            let Strict(value) = map.next_value()?;
            if fields.contains_key(&key) {
                return Err(A::Error::custom(format!("duplicate key `{key}`")));
            }
            fields.insert(key, value);
        }
        Ok(Value::Object(fields))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<JsonObject> {
        JsonObject::parse(Path::new("x.json"), text)
    }

    #[test]
    fn same_key_twice_is_an_error_at_any_depth() {
        for text in [r#"{"a":1,"a":1}"#, r#"{"a":{"b":1,"b":2}}"#, r#"{"a":[{"b":1,"b":2}]}"#] {
            let error = parse(text).unwrap_err();
            assert!(matches!(&error, Error::Json { .. }), "{error}");
            assert!(error.to_string().contains("duplicate key"), "{error}");
        }
    }

    #[test]
    fn what_is_not_an_object_is_an_error() {
        for text in ["", "[1]", "3", "{\"a\":", "{\"a\":Nan}"] {
            assert!(matches!(parse(text), Err(Error::Json { .. })), "{text}");
        }
    }

    #[test]
    fn numbers_that_json_lacks_are_refused_where_they_are_read() -> Result<()> {
        let text = r#"{"a": NaN, "b": [-Infinity], "c": "NaN \\"", "d": 1, "e": Infinity}"#;
        let object = parse(&text.replace(r"\\", r"\"))?;
        assert_eq!(object.text("c")?, Some("NaN \""));
        assert_eq!(object.count("d")?, Some(1));
        for field in ["a", "e"] {
            let error = object.number_from(field, 0.0).unwrap_err();
            assert!(matches!(&error, Error::Config { field: f, .. } if f == field), "{error}");
        }
        Ok(())
    }

    #[test]
    fn token_ids_are_one_or_many_or_none() -> Result<()> {
        let object = parse(r#"{"one":7,"many":[7,null,8],"null":null,"minus":-1,"half":[1.5]}"#)?;
        assert_eq!(object.token_ids("one")?, [7]);
        assert_eq!(object.token_ids("many")?, [7, 8]);
        assert!(object.token_ids("null")?.is_empty() && object.token_ids("absent")?.is_empty());
        for field in ["minus", "half"] {
            assert!(matches!(object.token_ids(field), Err(Error::Config { .. })), "{field}");
        }
        Ok(())
    }
}
