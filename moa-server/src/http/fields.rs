use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

use super::error::ApiError;

/// The fields of a request's body, each of which is named where it is not what it should be.
pub(crate) struct Fields(Map<String, Value>);

impl Fields {
    /// Those of a JSON object.
    pub(crate) fn parse(body: &[u8]) -> Result<Self, ApiError> {
        match serde_json::from_slice(body) {
            Ok(Value::Object(fields)) => Ok(Self(fields)),
            Ok(_) => Err(ApiError::invalid("the body must be a JSON object")),
            Err(error) => Err(ApiError::invalid(format!("the body is not JSON: {error}"))),
        }
    }

    /// A field that may be absent or null.
    pub(crate) fn get<T: DeserializeOwned>(
        &mut self,
        name: &str,
        expected: &str,
    ) -> Result<Option<T>, ApiError> {
        match self.0.remove(name) {
            None | Some(Value::Null) => Ok(None),
            Some(value) => {
                let got = short(&value);
                let fault = |_| ApiError::field(name, expected, got);
                serde_json::from_value(value).map(Some).map_err(fault)
            }
        }
    }

    /// Whether a field is there and not null.
    pub(crate) fn has(&self, name: &str) -> bool {
        self.0.get(name).is_some_and(|value| !value.is_null())
    }

    /// A field as it is.
    pub(crate) fn value(&mut self, name: &str) -> Option<Value> {
        self.0.remove(name).filter(|value| !value.is_null())
    }

    /// A number in a range.
    pub(crate) fn number(
        &mut self,
        name: &str,
        least: f32,
        most: f32,
    ) -> Result<Option<f32>, ApiError> {
        let expected = format!("a number from {least} to {most}");
        let number: Option<f64> = self.get(name, &expected)?;
        match number {
            Some(x) if !(f64::from(least)..=f64::from(most)).contains(&x) => {
                Err(ApiError::field(name, expected, x))
            }
            number => Ok(number.map(|x| x as f32)),
        }
    }

    /// A whole number in a range.
    pub(crate) fn count(
        &mut self,
        name: &str,
        least: usize,
        most: usize,
    ) -> Result<Option<usize>, ApiError> {
        let expected = match most {
            usize::MAX => format!("a whole number of at least {least}"),
            _ => format!("a whole number from {least} to {most}"),
        };
        let count: Option<usize> = self.get(name, &expected)?;
        match count {
            Some(n) if n < least || n > most => Err(ApiError::field(name, expected, n)),
            count => Ok(count),
        }
    }

    /// An array of token ids, each of which the model has.
    pub(crate) fn ids(
        &mut self,
        name: &str,
        vocab_size: usize,
    ) -> Result<Option<Vec<u32>>, ApiError> {
        let ids: Option<Vec<u32>> = self.get(name, "an array of ids")?;
        match ids.iter().flatten().find(|id| **id as usize >= vocab_size) {
            Some(id) => Err(ApiError::field(name, format!("ids below {vocab_size}"), id)),
            None => Ok(ids),
        }
    }

    /// A switch, off where it is absent.
    pub(crate) fn flag(&mut self, name: &str) -> Result<bool, ApiError> {
        Ok(self.get(name, "true or false")?.unwrap_or(false))
    }

    /// Refuses a field that asks for what is not there.
    pub(crate) fn refuse(&mut self, name: &str, reason: &str) -> Result<(), ApiError> {
        match self.value(name) {
            None | Some(Value::Bool(false)) => Ok(()),
            Some(Value::Array(list)) if list.is_empty() => Ok(()),
            Some(Value::String(text)) if text.is_empty() => Ok(()),
            Some(_) => Err(ApiError {
                param: Some(name.to_owned()),
                code: Some("unsupported_parameter"),
                ..ApiError::invalid(format!("`{name}` is not supported: {reason}"))
            }),
        }
    }
}

/// A value for a message: its text where it is short, else its kind.
pub(crate) fn short(value: &Value) -> String {
    match value {
        Value::Array(list) if list.is_empty() => "an empty array".to_owned(),
        Value::Array(_) => "an array".to_owned(),
        Value::Object(_) => "an object".to_owned(),
        Value::String(text) if text.len() > 40 => "a long text".to_owned(),
        value => value.to_string(),
    }
}
