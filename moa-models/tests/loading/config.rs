use std::fs;

use moa_models::{Error, ModelConfig, RopeScaling, RopeTable};

use crate::moa_tiny;

/// A small valid configuration with `changes`: a field and its JSON value, or "" to leave it out.
fn config(changes: &[(&str, &str)]) -> String {
    let mut fields = vec![
        ("vocab_size", "64"),
        ("hidden_size", "32"),
        ("intermediate_size", "48"),
        ("num_hidden_layers", "2"),
        ("num_attention_heads", "4"),
        ("rms_norm_eps", "1e-5"),
        ("max_position_embeddings", "128"),
    ];
    for &(name, value) in changes {
        fields.retain(|(field, _)| *field != name);
        if !value.is_empty() {
            fields.push((name, value));
        }
    }
    let fields: Vec<_> = fields.iter().map(|(k, v)| format!("\"{k}\": {v}")).collect();
    format!("{{{}}}", fields.join(", "))
}

fn scaled(rope_scaling: &str) -> Result<ModelConfig, Error> {
    ModelConfig::from_json(&config(&[("rope_scaling", rope_scaling)]))
}

#[test]
fn defaults_of_absent_fields() -> Result<(), Error> {
    let config = ModelConfig::from_json(&config(&[]))?;
    assert_eq!((config.num_key_value_heads, config.head_dim, config.group_size()), (4, 8, 1));
    assert_eq!((config.rope_theta, &config.rope_scaling), (10_000.0, &RopeScaling::Default));
    assert!(!config.tie_word_embeddings && !config.qkv_bias && !config.o_bias && !config.mlp_bias);
    assert_eq!((config.bos_token_id, config.eos_token_ids.len()), (None, 0));
    Ok(())
}

#[test]
fn each_needed_field_is_named_when_it_is_missing() {
    for field in [
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
    ] {
        for absent in ["", "null"] {
            let error = ModelConfig::from_json(&config(&[(field, absent)])).unwrap_err();
            assert!(
                matches!(&error, Error::MissingField { field: f, .. } if f == field),
                "{error}"
            );
        }
    }
}

#[test]
fn fields_with_a_default_of_transformers_may_be_absent() -> Result<(), Error> {
    let config = ModelConfig::from_json(&config(&[
        ("rms_norm_eps", ""),
        ("max_position_embeddings", "null"),
        ("rope_scaling", "false"),
        ("eos_token_id", "[2, null]"),
        ("unread", "[Infinity, -Infinity, NaN]"),
    ]))?;
    assert_eq!((config.rms_norm_eps, config.max_position_embeddings), (1e-6, 2048));
    assert_eq!(config.rope_scaling, RopeScaling::Default);
    assert_eq!(config.eos_token_ids, [2]);
    Ok(())
}

#[test]
fn values_out_of_range_are_named() {
    for (field, value) in [
        ("vocab_size", "0"),
        ("hidden_size", "-1"),
        ("hidden_size", "30"),
        ("intermediate_size", "1.5"),
        ("num_hidden_layers", "\"2\""),
        ("num_hidden_layers", "3000000000"),
        ("num_key_value_heads", "3"),
        ("head_dim", "7"),
        ("rms_norm_eps", "0"),
        ("rope_theta", "1"),
        ("tie_word_embeddings", "1"),
        ("eos_token_id", "64"),
        ("bos_token_id", "64"),
        ("eos_token_id", "[2, \"3\"]"),
        ("hidden_act", "\"gelu\""),
        ("model_type", "\"mixtral\""),
        ("rope_scaling", "4"),
    ] {
        let error = ModelConfig::from_json(&config(&[(field, value)])).unwrap_err();
        assert!(matches!(&error, Error::Config { field: f, .. } if f == field), "{error}");
    }
}

#[test]
fn numbers_json_has_not_and_keys_that_come_twice_are_errors() {
    for value in ["NaN", "Infinity"] {
        let result = ModelConfig::from_json(&config(&[("rms_norm_eps", value)]));
        assert!(matches!(result, Err(Error::Config { .. })), "{value}: {result:?}");
    }
    for value in ["1e999", "1e-5, \"vocab_size\": 64"] {
        let result = ModelConfig::from_json(&config(&[("rms_norm_eps", value)]));
        assert!(matches!(result, Err(Error::Json { .. })), "{value}: {result:?}");
    }
}

#[test]
fn file_and_field_stand_in_the_message() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("config.json");
    assert!(
        matches!(ModelConfig::from_file(dir.path()), Err(Error::NoConfig { path, .. }) if path == dir.path())
    );
    let file = dir.path().join("config.json");
    assert!(matches!(ModelConfig::from_file(file), Err(Error::Io { .. })));
    fs::write(&path, config(&[("vocab_size", "")])).unwrap();
    let message = ModelConfig::from_file(dir.path()).unwrap_err().to_string();
    assert!(message.contains("config.json") && message.contains("`vocab_size`"), "{message}");
    fs::write(&path, config(&[("rope_scaling", "{\"type\": \"linear\"}")])).unwrap();
    let message = ModelConfig::from_file(&path).unwrap_err().to_string();
    assert!(message.contains("`rope_scaling.factor`"), "{message}");
}

#[test]
fn rope_scaling_of_every_type() -> Result<(), Error> {
    assert_eq!(scaled("null")?.rope_scaling, RopeScaling::Default);
    assert_eq!(scaled(r#"{"rope_type": "default"}"#)?.rope_scaling, RopeScaling::Default);
    let linear = scaled(r#"{"type": "linear", "factor": 4}"#)?;
    assert_eq!(linear.rope_scaling, RopeScaling::Linear { factor: 4.0 });
    assert_eq!(linear.context_length(), 512);
    let dynamic = scaled(r#"{"rope_type": "dynamic", "type": "linear", "factor": 2.0}"#)?;
    assert_eq!(dynamic.rope_scaling, RopeScaling::Dynamic { factor: 2.0, original: 128 });
    assert_eq!(dynamic.context_length(), 256);
    let yarn =
        scaled(r#"{"type": "yarn", "factor": 2.0, "original_max_position_embeddings": 64}"#)?;
    let expected = RopeScaling::Yarn {
        factor: 2.0,
        beta_fast: 32.0,
        beta_slow: 1.0,
        original: 64,
        attention_factor: None,
        mscale: None,
        mscale_all_dim: None,
        truncate: true,
    };
    assert_eq!((&yarn.rope_scaling, yarn.context_length()), (&expected, 128));
    // Both ways to write it: `max_position_embeddings` extended, as above, or not, as here.
    assert_eq!(scaled(r#"{"type": "yarn", "factor": 2.0}"#)?.context_length(), 256);
    let implied = scaled(r#"{"type": "yarn", "original_max_position_embeddings": 64}"#)?;
    assert_eq!(implied.rope_scaling, expected);
    RopeTable::new(&yarn, yarn.context_length())?;
    Ok(())
}

#[test]
fn rope_parameters_of_newer_files() -> Result<(), Error> {
    let text = config(&[("rope_parameters", r#"{"rope_type": "default", "rope_theta": 5e5}"#)]);
    assert_eq!(ModelConfig::from_json(&text)?.rope_theta, 5e5);
    let text = config(&[
        ("rope_theta", "1e6"),
        ("rope_parameters", r#"{"rope_type": "linear", "factor": 2.0}"#),
    ]);
    let config = ModelConfig::from_json(&text)?;
    assert_eq!((config.rope_theta, config.context_length()), (1e6, 256));
    Ok(())
}

#[test]
fn bad_rope_scaling_is_named() {
    let llama3 =
        r#"{"rope_type": "llama3", "factor": 8, "low_freq_factor": 4, "high_freq_factor": 4}"#;
    for (value, field) in [
        (r#"{"type": "proportional"}"#, "rope_type"),
        (r#"{"type": "linear", "factor": 0.5}"#, "factor"),
        (r#"{"type": "linear", "factor": "4"}"#, "factor"),
        (r#"{"type": "default", "partial_rotary_factor": 0.5}"#, "partial_rotary_factor"),
        (llama3, "high_freq_factor"),
        (r#"{"type": "yarn", "factor": 2, "beta_fast": 1, "beta_slow": 2}"#, "beta_fast"),
    ] {
        let error = scaled(value).unwrap_err();
        let field = format!("rope_scaling.{field}");
        assert!(matches!(&error, Error::Config { field: f, .. } if *f == field), "{error}");
    }
    for missing in ["factor", "low_freq_factor", "high_freq_factor"] {
        let all = r#"{"type": "llama3", "factor": 8, "low_freq_factor": 1, "high_freq_factor": 4}"#;
        let error = scaled(&all.replace(&format!("\"{missing}\""), "\"other\"")).unwrap_err();
        let field = format!("rope_scaling.{missing}");
        assert!(matches!(&error, Error::MissingField { field: f, .. } if *f == field), "{error}");
    }
}

#[test]
fn config_of_moa_tiny() -> Result<(), Error> {
    let config = ModelConfig::from_file(moa_tiny())?;
    assert_eq!((config.num_hidden_layers, config.group_size(), config.head_dim), (6, 2, 64));
    assert_eq!((config.context_length(), config.tie_word_embeddings), (8192, true));
    assert_eq!((config.bos_token_id, config.eos_token_ids.as_slice()), (Some(1), &[2][..]));
    Ok(())
}
