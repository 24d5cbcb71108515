use std::path::Path;

use crate::checkpoint::json::JsonObject;
use crate::engine::sampling::SamplingOptions;
use crate::error::Result;

/// How a model's authors want it to be sampled, from `generation_config.json`.
///
/// Every field may be absent. Fields that are not listed are ignored.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct GenerationConfig {
    /// Tokens that end a generation; may be empty.
    pub eos_token_ids: Vec<u32>,
    /// Sample, rather than take the likeliest token.
    pub do_sample: Option<bool>,
    /// Divides the logits.
    pub temperature: Option<f32>,
    /// Keep this many of the likeliest tokens; 0 keeps all.
    pub top_k: Option<usize>,
    /// Keep the fewest likeliest tokens with this much probability together.
    pub top_p: Option<f32>,
    /// Keep tokens with at least this share of the likeliest token's probability.
    pub min_p: Option<f32>,
    /// Divides positive and multiplies negative logits of tokens already in the sequence.
    pub repetition_penalty: Option<f32>,
    /// Tokens to generate at most.
    pub max_new_tokens: Option<usize>,
}

impl GenerationConfig {
    /// Reads `generation_config.json` in `dir`; all fields are absent when there is no such file. A number that is out of
    /// its field's range is warned of and left out.
    ///
    /// # Errors
    /// [`Error::Io`](crate::Error::Io), [`Error::Json`](crate::Error::Json), and
    /// [`Error::Config`](crate::Error::Config) for a field of another type.
    pub fn from_dir(dir: impl AsRef<Path>) -> Result<Self> {
        let path = dir.as_ref().join("generation_config.json");
        if !path.is_file() {
            return Ok(Self::default());
        }
        Self::from_object(&JsonObject::read(&path)?)
    }

    fn from_object(object: &JsonObject) -> Result<Self> {
        // Values beyond the range switch an option off in some tools: they are no reason not to run.
        let number = |field, least: f32, most: f32| -> Result<Option<f32>> {
            let Some(value) = object.get(field) else { return Ok(None) };
            match value.as_f64().map(|x| x as f32) {
                Some(x) if (least..=most).contains(&x) => Ok(Some(x)),
                None if value.as_str().is_none_or(|text| !is_no_number(text)) => {
                    Err(object.invalid(field, "a number", value))
                }
                _ => {
                    let path = object.path().display();
                    tracing::warn!("{path}: `{field}` is {value}; it is left out");
                    Ok(None)
                }
            }
        };
        // Some tools write whole numbers as fractions, and -1 for no limit.
        let count = |field, least| -> Result<Option<usize>> {
            Ok(number(field, least, 1e9)?.map(|n| n as usize))
        };
        const ABOVE_0: f32 = f32::MIN_POSITIVE;
        Ok(Self {
            eos_token_ids: object.token_ids("eos_token_id")?,
            do_sample: object.flag("do_sample")?,
            temperature: number("temperature", 0.0, f32::MAX)?,
            top_k: count("top_k", 0.0)?,
            top_p: number("top_p", 0.0, 1.0)?.map(SamplingOptions::share),
            min_p: number("min_p", 0.0, 1.0)?,
            repetition_penalty: number("repetition_penalty", ABOVE_0, f32::MAX)?,
            max_new_tokens: count("max_new_tokens", 1.0)?,
        })
    }

    /// The sampling these fields ask for: greedy unless `do_sample`, and 1 as the temperature
    /// where none is given. A `top_k` that is absent keeps all tokens.
    #[must_use]
    pub fn sampling(&self, seed: u64) -> SamplingOptions {
        let greedy = SamplingOptions {
            repetition_penalty: self.repetition_penalty.unwrap_or(1.0),
            seed,
            ..SamplingOptions::default()
        };
        if self.do_sample != Some(true) {
            return greedy;
        }
        SamplingOptions {
            temperature: self.temperature.unwrap_or(1.0),
            top_k: self.top_k.filter(|k| *k > 0),
            top_p: self.top_p.unwrap_or(1.0),
            min_p: self.min_p.unwrap_or(0.0),
            ..greedy
        }
    }
}

/// Whether a text stands for a number that JSON does not have.
fn is_no_number(text: &str) -> bool {
    matches!(text, "NaN" | "Infinity" | "-Infinity")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Error;

    fn parse(text: &str) -> Result<GenerationConfig> {
        GenerationConfig::from_object(&JsonObject::parse(
            Path::new("generation_config.json"),
            text,
        )?)
    }

    #[test]
    fn absent_fields_mean_greedy() -> Result<()> {
        let config = parse("{}")?;
        assert_eq!(config, GenerationConfig::default());
        assert_eq!(config.sampling(3), SamplingOptions { seed: 3, ..Default::default() });
        let config = parse(r#"{"do_sample":false,"temperature":0.6,"top_p":0.9}"#)?;
        assert_eq!(config.sampling(0), SamplingOptions::default());
        Ok(())
    }

    #[test]
    fn fields_of_a_sampling_model() -> Result<()> {
        let config = parse(
            r#"{"eos_token_id":[128001,128008],"do_sample":true,"temperature":0.6,"top_p":0.9,
                "top_k":0,"min_p":0.1,"repetition_penalty":1.2,"max_new_tokens":64}"#,
        )?;
        assert_eq!(config.eos_token_ids, [128001, 128008]);
        assert_eq!(config.max_new_tokens, Some(64));
        let expected = SamplingOptions {
            temperature: 0.6,
            top_k: None,
            top_p: 0.9,
            min_p: 0.1,
            repetition_penalty: 1.2,
            seed: 1,
            ..SamplingOptions::default()
        };
        assert_eq!(config.sampling(1), expected);
        assert_eq!(parse(r#"{"eos_token_id":2}"#)?.eos_token_ids, [2]);
        Ok(())
    }

    #[test]
    fn values_beyond_the_range_are_left_out() -> Result<()> {
        let config = parse(
            r#"{"eos_token_id":[2,null],"top_k":-1,"temperature":-1,"top_p":Infinity,"min_p":-0.5,
                "repetition_penalty":0,"max_new_tokens":-1,"do_sample":true}"#,
        )?;
        let expected = GenerationConfig {
            eos_token_ids: vec![2],
            do_sample: Some(true),
            ..GenerationConfig::default()
        };
        assert_eq!(config, expected);
        let zeros = parse(r#"{"top_p":0,"max_new_tokens":0}"#)?;
        assert_eq!((zeros.top_p, zeros.max_new_tokens), (Some(f32::MIN_POSITIVE), None));
        assert_eq!(parse(r#"{"top_k":50.0}"#)?.top_k, Some(50));
        Ok(())
    }

    #[test]
    fn field_of_another_type_is_named() {
        for (field, value) in [("temperature", "\"hot\""), ("top_k", "[]"), ("do_sample", "1")] {
            let error = parse(&format!("{{\"{field}\":{value}}}")).unwrap_err();
            assert!(matches!(&error, Error::Config { field: f, .. } if f == field), "{error}");
        }
    }
}
