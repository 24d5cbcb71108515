use crate::checkpoint::json::JsonObject;
use crate::error::Result;

/// How the rotary frequencies are stretched beyond the context a model was pretrained on.
///
/// The names and the defaults are those of `rope_scaling` (or, since transformers 5,
/// `rope_parameters`) in `config.json`. The frequencies themselves are made by
/// [`RopeTable`](crate::RopeTable).
#[non_exhaustive]
#[derive(Clone, Debug, Default, PartialEq)]
pub enum RopeScaling {
    /// No stretching.
    #[default]
    Default,
    /// Position interpolation (arXiv 2306.15595): every frequency is divided by `factor`.
    Linear {
        /// How many times longer the context becomes.
        factor: f64,
    },
    /// Dynamic NTK: the base grows with the context once it is longer than `original`.
    Dynamic {
        /// The `factor` of the formula; with it the base grows for `original * factor` tokens.
        factor: f64,
        /// The context the model was pretrained on, `max_position_embeddings`.
        original: usize,
    },
    /// Llama 3.1: long wavelengths are divided by `factor`, short ones kept, a ramp between.
    Llama3 {
        /// How many times the long wavelengths are stretched.
        factor: f64,
        /// Wavelengths above `original_max_position_embeddings / low_freq_factor` are stretched.
        low_freq_factor: f64,
        /// Wavelengths below `original_max_position_embeddings / high_freq_factor` are kept.
        high_freq_factor: f64,
        /// The context the model was pretrained on.
        original_max_position_embeddings: usize,
    },
    /// YaRN (arXiv 2309.00071): a ramp over dimensions between keeping and dividing by `factor`,
    /// and a temperature on the attention.
    Yarn {
        /// How many times longer the context becomes.
        factor: f64,
        /// Rotations within `original` above which a dimension is kept; 32 in the paper.
        beta_fast: f64,
        /// Rotations within `original` below which a dimension is divided; 1 in the paper.
        beta_slow: f64,
        /// The context the model was pretrained on.
        original: usize,
        /// Multiplies cos and sin; derived from `factor` and the two `mscale`s when absent.
        attention_factor: Option<f64>,
        /// Numerator's weight of `ln(factor)` in the derived attention factor.
        mscale: Option<f64>,
        /// Denominator's weight of `ln(factor)` in the derived attention factor.
        mscale_all_dim: Option<f64>,
        /// Whether the ramp's ends are rounded to whole dimensions.
        truncate: bool,
    },
    /// LongRoPE (arXiv 2402.13753): every frequency is divided by a factor of its own, in sequences opened for
    /// more tokens than `original` by another than in shorter ones.
    LongRope {
        /// Divides each frequency of short sequences.
        short_factor: Vec<f64>,
        /// Divides each frequency of long sequences.
        long_factor: Vec<f64>,
        /// How many times longer the context becomes, which the attention factor is derived from.
        factor: f64,
        /// The context the model was pretrained on.
        original: usize,
        /// Multiplies cos and sin; `sqrt(1 + ln(factor) / ln(original))` when absent.
        attention_factor: Option<f64>,
    },
}

impl RopeScaling {
    /// Reads the `rope_scaling` or `rope_parameters` object of a configuration, `file`.
    ///
    /// `max_position_embeddings` is the default of `original_max_position_embeddings`.
    pub(crate) fn from_object(
        object: &JsonObject,
        file: &JsonObject,
        max_position_embeddings: usize,
    ) -> Result<Self> {
        let kind = object.text("rope_type")?.or(object.text("type")?).unwrap_or("default");
        let factor = || object.require("factor", object.number_from("factor", 1.0)?);
        let original = object.count("original_max_position_embeddings")?;
        // Early files of Phi-3 call LongRoPE "su" and even "yarn".
        let kind = match kind {
            "su" => "longrope",
            "yarn" if object.get("short_factor").is_some() => "longrope",
            kind => kind,
        };
        match kind {
            "default" => Ok(Self::Default),
            "linear" => Ok(Self::Linear { factor: factor()? }),
            "dynamic" => Ok(Self::Dynamic { factor: factor()?, original: max_position_embeddings }),
            "llama3" => {
                let low = object.number_above("low_freq_factor", 0.0)?;
                let low = object.require("low_freq_factor", low)?;
                let high = object.number_above("high_freq_factor", 0.0)?;
                let high = object.require("high_freq_factor", high)?;
                if high <= low {
                    let expected = format!("above low_freq_factor ({low})");
                    return Err(object.invalid("high_freq_factor", &expected, high));
                }
                Ok(Self::Llama3 {
                    factor: factor()?,
                    low_freq_factor: low,
                    high_freq_factor: high,
                    original_max_position_embeddings: original.unwrap_or(max_position_embeddings),
                })
            }
            "yarn" => {
                let original = original.unwrap_or(max_position_embeddings);
                let implied = max_position_embeddings as f64 / original as f64;
                let factor = match object.get("factor") {
                    None if implied >= 1.0 => implied,
                    _ => factor()?,
                };
                let beta_fast = object.number_above("beta_fast", 0.0)?.unwrap_or(32.0);
                let beta_slow = object.number_above("beta_slow", 0.0)?.unwrap_or(1.0);
                if beta_fast < beta_slow {
                    let expected = format!("at least beta_slow ({beta_slow})");
                    return Err(object.invalid("beta_fast", &expected, beta_fast));
                }
                Ok(Self::Yarn {
                    factor,
                    beta_fast,
                    beta_slow,
                    original,
                    attention_factor: object.number_above("attention_factor", 0.0)?,
                    mscale: object.number_from("mscale", 0.0)?,
                    mscale_all_dim: object.number_from("mscale_all_dim", 0.0)?,
                    truncate: object.flag("truncate")?.unwrap_or(true),
                })
            }
            "longrope" => {
                // Phi-3's files have it beside the object.
                const ORIGINAL: &str = "original_max_position_embeddings";
                let original = file.require(ORIGINAL, file.count(ORIGINAL)?.or(original))?;
                let factors = |field| object.require(field, object.numbers_above(field, 0.0)?);
                let factor = match object.get("factor") {
                    None => max_position_embeddings as f64 / original as f64,
                    _ => factor()?,
                };
                Ok(Self::LongRope {
                    short_factor: factors("short_factor")?,
                    long_factor: factors("long_factor")?,
                    factor,
                    original,
                    attention_factor: object.number_above("attention_factor", 0.0)?,
                })
            }
            other => {
                let known = "default, linear, dynamic, llama3, yarn or longrope";
                Err(object.invalid("rope_type", known, other))
            }
        }
    }

    /// What cos and sin are multiplied by.
    pub(crate) fn attention_factor(&self) -> f64 {
        match *self {
            Self::Yarn { factor, attention_factor, mscale, mscale_all_dim, .. } => {
                let derived = || match (mscale, mscale_all_dim) {
                    (Some(a), Some(b)) if a != 0.0 && b != 0.0 => {
                        yarn_mscale(factor, a) / yarn_mscale(factor, b)
                    }
                    _ => yarn_mscale(factor, 1.0),
                };
                attention_factor.unwrap_or_else(derived)
            }
            Self::LongRope { factor, original, attention_factor, .. } => {
                // LongRoPE, section 3.3.
                let derived = || match factor <= 1.0 {
                    true => 1.0,
                    false => (1.0 + factor.ln() / (original as f64).ln()).sqrt(),
                };
                attention_factor.unwrap_or_else(derived)
            }
            _ => 1.0,
        }
    }

    /// The longest context in tokens, as vLLM derives it.
    ///
    /// Linear and dynamic scaling leave `max_position_embeddings` at the pretraining length and
    /// multiply it by `factor` (Vicuna 16k: 4096 times 4). Llama 3.1 writes the extended length
    /// there. YaRN configs exist with either, but both give `original * factor`.
    pub(crate) fn context_length(&self, max_position_embeddings: usize) -> usize {
        let times = |length: usize, factor: f64| (length as f64 * factor).floor() as usize;
        match *self {
            Self::Default | Self::Llama3 { .. } | Self::LongRope { .. } => max_position_embeddings,
            Self::Linear { factor } => times(max_position_embeddings, factor),
            Self::Dynamic { factor, original } | Self::Yarn { factor, original, .. } => {
                times(original, factor)
            }
        }
    }
}

/// YaRN's temperature on cos and sin (arXiv 2309.00071, section 3.4).
pub(crate) fn yarn_mscale(factor: f64, mscale: f64) -> f64 {
    if factor <= 1.0 { 1.0 } else { 0.1 * mscale * factor.ln() + 1.0 }
}
