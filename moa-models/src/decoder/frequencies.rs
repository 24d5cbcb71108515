//! Rotary frequencies of a model.

use std::f64::consts::PI;

use crate::decoder::config::ModelConfig;
use crate::decoder::rope_scaling::RopeScaling;
use crate::device::rope_table::RopeTable;
use crate::error::{Error, Result};

impl RopeTable {
    /// The table of a sequence opened for `context_length` tokens.
    ///
    /// # Errors
    /// [`Error::ContextExceeded`] when the model allows fewer tokens, [`Error::Invalid`] when
    /// `context_length` is 0 or `config` was changed by hand into something invalid.
    pub fn new(config: &ModelConfig, context_length: usize) -> Result<Self> {
        config.validate()?;
        if context_length == 0 {
            return Err(Error::invalid("context_length", "at least 1", 0));
        }
        config.check_context(context_length)?;
        let mut inv_freq = frequencies(config, context_length);
        let attention_scale = config.rope_scaling.attention_factor();
        if let Some(bad) = inv_freq.iter().find(|f| !(f.is_finite() && **f > 0.0)) {
            return Err(Error::invalid("rotary inverse frequency", "finite and above 0", bad));
        }
        inv_freq.resize(config.head_dim / 2, 0.0);
        let query_scaling = config.query_scaling;
        Ok(Self { inv_freq, attention_scale, context_length, query_scaling })
    }
}

/// Inverse frequencies of the dimensions that are rotated, as in transformers' `modeling_rope_utils.py`.
fn frequencies(config: &ModelConfig, context_length: usize) -> Vec<f64> {
    let dim = config.rotated_dims() as f64;
    let theta = config.rope_theta;
    // RoFormer (arXiv 2104.09864), section 3.2.2.
    let plain =
        |theta: f64| (0..config.rotated_dims() / 2).map(move |i| theta.powf(-2.0 * i as f64 / dim));
    match config.rope_scaling {
        RopeScaling::Default => plain(theta).collect(),
        RopeScaling::Linear { factor } => plain(theta).map(|f| f / factor).collect(),
        RopeScaling::Dynamic { factor, original } => {
            let stretch = context_length.max(original) as f64 / original as f64;
            // Two dimensions have one frequency, 1, whatever the base.
            let theta = if config.rotated_dims() == 2 {
                theta
            } else {
                theta * (factor * stretch - (factor - 1.0)).powf(dim / (dim - 2.0))
            };
            plain(theta).collect()
        }
        RopeScaling::Llama3 {
            factor,
            low_freq_factor,
            high_freq_factor,
            original_max_position_embeddings,
        } => {
            let original = original_max_position_embeddings as f64;
            let scaled = plain(theta).map(|frequency| {
                let turns = original * frequency / (2.0 * PI);
                // The ramp is below 0 for the wavelengths to stretch and above 1 for those to keep.
                let keep = (turns - low_freq_factor) / (high_freq_factor - low_freq_factor);
                let keep = keep.clamp(0.0, 1.0);
                (1.0 - keep) * frequency / factor + keep * frequency
            });
            scaled.collect()
        }
        RopeScaling::Yarn { factor, beta_fast, beta_slow, original, truncate, .. } => {
            // The (fractional) pair that turns `rotations` times within the original context.
            let pair = |rotations: f64| {
                dim * (original as f64 / (rotations * 2.0 * PI)).ln() / (2.0 * theta.ln())
            };
            let (mut low, mut high) = (pair(beta_fast), pair(beta_slow));
            if truncate {
                (low, high) = (low.floor(), high.ceil());
            }
            (low, high) = (low.max(0.0), high.min(dim - 1.0));
            if low == high {
                high += 0.001;
            }
            let scaled = plain(theta).enumerate().map(|(i, frequency)| {
                let divide = ((i as f64 - low) / (high - low)).clamp(0.0, 1.0);
                divide * frequency / factor + (1.0 - divide) * frequency
            });
            scaled.collect()
        }
        RopeScaling::LongRope { ref short_factor, ref long_factor, original, .. } => {
            let factors = if context_length > original { long_factor } else { short_factor };
            let divided = plain(theta).zip(factors).map(|(frequency, factor)| frequency / factor);
            divided.collect()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SMALL: &str = r#"{"vocab_size": 32, "hidden_size": 8, "intermediate_size": 8,
        "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1,
        "rms_norm_eps": 1e-5, "max_position_embeddings": 8}"#;

    fn config(head_dim: usize, theta: f64, longest: usize, scaling: RopeScaling) -> ModelConfig {
        ModelConfig {
            hidden_size: 2 * head_dim,
            head_dim,
            rope_theta: theta,
            rope_scaling: scaling,
            max_position_embeddings: longest,
            ..ModelConfig::from_json(SMALL).unwrap()
        }
    }

    #[track_caller]
    fn check(table: &RopeTable, expected: &[(usize, f64)]) {
        for &(pair, frequency) in expected {
            let got = table.inv_freq()[pair];
            let error = (got / frequency - 1.0).abs();
            assert!(error < 1e-12, "pair {pair}: {got:e} for {frequency:e}");
        }
    }

    // The expected numbers are transformers' formulas (5.23) evaluated with numpy in f64.

    #[test]
    fn default_and_linear_frequencies() -> Result<()> {
        let table = RopeTable::new(&config(128, 1e4, 4096, RopeScaling::Default), 4096)?;
        let plain = [(0, 1.0), (1, 8.659643233600653e-1), (63, 1.154781984689458e-4)];
        check(&table, &plain);
        assert_eq!(table.attention_scale(), 1.0);
        assert_eq!(table.inv_freq().len(), 64);
        let linear = RopeScaling::Linear { factor: 4.0 };
        let table = RopeTable::new(&config(128, 1e4, 4096, linear), 16384)?;
        check(&table, &plain.map(|(pair, frequency)| (pair, frequency / 4.0)));
        Ok(())
    }

    #[test]
    fn dynamic_base_grows_with_the_context_a_sequence_is_opened_for() -> Result<()> {
        let scaling = RopeScaling::Dynamic { factor: 2.0, original: 4096 };
        let config = config(128, 1e4, 4096, scaling);
        check(
            &RopeTable::new(&config, 2048)?,
            &[(0, 1.0), (1, 8.659643233600653e-1), (63, 1.154781984689458e-4)],
        );
        check(
            &RopeTable::new(&config, 8192)?,
            &[
                (0, 1.0),
                (1, 8.509942913412162e-1),
                (32, 5.723381508381237e-3),
                (63, 3.849273282298194e-5),
            ],
        );
        Ok(())
    }

    #[test]
    fn llama3_keeps_short_and_stretches_long_wavelengths() -> Result<()> {
        let scaling = |factor| RopeScaling::Llama3 {
            factor,
            low_freq_factor: 1.0,
            high_freq_factor: 4.0,
            original_max_position_embeddings: 8192,
        };
        let table = RopeTable::new(&config(128, 5e5, 131_072, scaling(8.0)), 131_072)?;
        check(
            &table,
            &[
                (1, 8.146172338565447e-1),
                (28, 3.211445994752591e-3),
                (32, 5.248461609929547e-4),
                (40, 3.428102195952591e-5),
                (63, 3.068925988914511e-7),
            ],
        );
        let (cos, sin) = table.cos_sin(12345).nth(20).unwrap_or_default();
        assert!((cos + 0.972_488_65).abs() < 1e-6 && (sin + 0.232_950_27).abs() < 1e-6);
        let table = RopeTable::new(&config(64, 5e5, 131_072, scaling(32.0)), 131_072)?;
        check(
            &table,
            &[
                (14, 3.211445994752591e-3),
                (16, 4.295567965593682e-4),
                (17, 9.70828780262767e-5),
                (18, 1.946163818483112e-5),
                (31, 9.418306725434911e-8),
            ],
        );
        Ok(())
    }

    #[test]
    fn yarn_ramp_and_attention_scale() -> Result<()> {
        let yarn = RopeScaling::Yarn {
            factor: 32.0,
            beta_fast: 32.0,
            beta_slow: 1.0,
            original: 4096,
            attention_factor: None,
            mscale: None,
            mscale_all_dim: None,
            truncate: true,
        };
        let table = RopeTable::new(&config(128, 1e4, 131_072, yarn), 131_072)?;
        check(
            &table,
            &[
                (20, 5.62341325190349e-2),
                (24, 2.690976662739438e-2),
                (40, 8.057726730236735e-4),
                (48, 3.125e-5),
                (63, 3.608693702154557e-6),
            ],
        );
        assert!((table.attention_scale() - 1.346_573_590_279_972_7).abs() < 1e-12);
        let (cos, sin) = table.cos_sin(1000).nth(40).unwrap_or_default();
        assert!((cos - 0.932_575).abs() < 1e-6 && (sin - 0.971_372_4).abs() < 1e-6);

        let yarn = RopeScaling::Yarn {
            factor: 4.0,
            beta_fast: 24.0,
            beta_slow: 2.0,
            original: 32768,
            attention_factor: None,
            mscale: Some(0.707),
            mscale_all_dim: Some(1.3),
            truncate: false,
        };
        let table = RopeTable::new(&config(128, 1e6, 131_072, yarn), 131_072)?;
        check(
            &table,
            &[
                (24, 5.623413251903491e-3),
                (28, 1.896836087026755e-3),
                (32, 5.392749057181446e-4),
                (63, 3.102344401879299e-7),
            ],
        );
        let scale = (0.0707 * 4f64.ln() + 1.0) / (0.13 * 4f64.ln() + 1.0);
        assert!((table.attention_scale() - scale).abs() < 1e-12);
        Ok(())
    }

    // Phi-4-mini rotates three quarters of 128 dimensions; its temperature leaves the others alone.
    #[test]
    fn longrope_divides_by_length_and_leaves_dimensions_that_do_not_turn() -> Result<()> {
        let scaling = RopeScaling::LongRope {
            short_factor: vec![1.0; 48],
            long_factor: (1..=48).map(f64::from).collect(),
            factor: 32.0,
            original: 4096,
            attention_factor: None,
        };
        let config = ModelConfig { rotary_dim: Some(96), ..config(128, 1e4, 131_072, scaling) };
        let plain = |pair: usize| 1e4f64.powf(-2.0 * pair as f64 / 96.0);
        let short = RopeTable::new(&config, 4096)?;
        check(&short, &[(0, 1.0), (1, plain(1)), (47, plain(47))]);
        let long = RopeTable::new(&config, 4097)?;
        check(&long, &[(0, 1.0), (1, plain(1) / 2.0), (47, plain(47) / 48.0)]);
        assert_eq!((long.inv_freq().len(), &long.inv_freq()[48..]), (64, &[0.0; 16][..]));
        assert!((long.attention_scale() - 1.190_238_071_423_808_3).abs() < 1e-12);
        assert!((long.cos_sin(0).next().unwrap_or_default().0 - 1.190_238).abs() < 1e-6);
        assert_eq!(long.cos_sin(77).nth(48), Some((1.0, 0.0)));
        Ok(())
    }

    #[test]
    fn context_length_out_of_range_is_an_error() {
        let config = config(64, 1e4, 4096, RopeScaling::Linear { factor: 4.0 });
        assert!(matches!(
            RopeTable::new(&config, 16385),
            Err(Error::ContextExceeded { asked: 16385, limit: 16384 })
        ));
        assert!(matches!(RopeTable::new(&config, 0), Err(Error::Invalid { .. })));
        let odd = ModelConfig { head_dim: 7, ..config };
        assert!(matches!(RopeTable::new(&odd, 16), Err(Error::Invalid { what: "head_dim", .. })));
    }
}
