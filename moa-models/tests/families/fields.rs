//! What fields of configurations say, and which values are refused.

use std::fs;

use moa_models::{Error, ModelConfig, Result};

use crate::folder;

/// A family's configuration with one field changed.
fn changed(family: &str, field: &str, value: &str) -> Result<ModelConfig> {
    let text = fs::read_to_string(folder(family).join("config.json")).unwrap();
    let mut file: serde_json::Map<_, _> = serde_json::from_str(&text).unwrap();
    file.insert(field.into(), serde_json::from_str(value).unwrap());
    ModelConfig::from_json(&serde_json::to_string(&file).unwrap())
}

#[test]
fn variants_that_are_not_known_are_named() {
    for (family, field, value, named) in [
        ("mistral", "hidden_act", r#""gelu""#, "hidden_act"),
        ("ministral", "layer_types", r#"["full_attention"]"#, "layer_types"),
        ("ministral", "layer_types", r#"["chunked_attention", "a", "b"]"#, "layer_types"),
        ("ministral", "sliding_window", "null", "sliding_window"),
        ("mistral", "sliding_window", "0", "sliding_window"),
        ("mistral", "partial_rotary_factor", "0.5", "partial_rotary_factor"),
        (
            "ministral3",
            "rope_parameters",
            r#"{"rope_type": "linear", "factor": 2}"#,
            "rope_parameters",
        ),
        (
            "ministral3",
            "rope_parameters",
            r#"{"rope_type": "yarn", "factor": 2, "llama_4_scaling_beta": -1}"#,
            "rope_parameters.llama_4_scaling_beta",
        ),
        ("qwen2", "use_sliding_window", r#""yes""#, "use_sliding_window"),
        ("qwen2", "max_window_layers", "-1", "max_window_layers"),
        ("smollm3", "no_rope_layers", "[1, 0]", "no_rope_layers"),
        ("smollm3", "no_rope_layers", "[1, 0, 2]", "no_rope_layers"),
        ("smollm3", "no_rope_layer_interval", "0", "no_rope_layer_interval"),
        ("granite", "residual_multiplier", "0", "residual_multiplier"),
        ("granite", "logits_scaling", r#""3""#, "logits_scaling"),
        ("qwen3", "rope_parameters", r#"{"rope_type": "mrope"}"#, "rope_parameters.rope_type"),
        (
            "phi3-longrope",
            "rope_parameters",
            r#"{"rope_type": "longrope", "short_factor": [1, 1, 1], "long_factor": [1, 0, 1]}"#,
            "rope_parameters.long_factor",
        ),
        (
            "phi3-longrope",
            "rope_parameters",
            r#"{"rope_type": "longrope", "short_factor": [1, 1, 1], "long_factor": [1, 1, 1]}"#,
            "short_factor",
        ),
        (
            "phi3-window",
            "rope_parameters",
            r#"{"rope_type": "linear", "factor": 2}"#,
            "rope_scaling",
        ),
        (
            "phi3-window",
            "rope_parameters",
            r#"{"rope_type": "default", "partial_rotary_factor": 1.5}"#,
            "rope_parameters.partial_rotary_factor",
        ),
    ] {
        let error = changed(family, field, value).unwrap_err();
        assert!(
            matches!(&error, Error::Config { field, .. } if field == named),
            "{family}, {field}: {error}"
        );
    }
    let yarn = r#"{"rope_type": "yarn", "factor": 2}"#;
    let error = changed("ministral3", "rope_parameters", yarn).unwrap_err();
    let named = "rope_parameters.llama_4_scaling_beta";
    assert!(matches!(&error, Error::MissingField { field, .. } if field == named), "{error}");
}

#[test]
fn fields_say_which_layers_slide_and_which_rotate() -> Result<()> {
    let windows = |config: ModelConfig| {
        config.layer_kinds.iter().map(|kind| kind.sliding_window).collect::<Vec<_>>()
    };
    let mistral = folder("mistral");
    assert_eq!(windows(ModelConfig::from_file(&mistral)?), [Some(6); 3]);
    assert_eq!(windows(changed("mistral", "sliding_window", "null")?), [None; 3]);
    // The first Mistral 7B's field was added when others did without a window.
    let text = fs::read_to_string(mistral.join("config.json")).unwrap();
    let without = text.replace("\"sliding_window\"", "\"other\"");
    assert_eq!(windows(ModelConfig::from_json(&without)?), [Some(4096); 3]);
    assert_eq!(windows(changed("qwen2", "layer_types", "null")?), [None, Some(7), Some(7)]);
    let full = r#"["full_attention", "full_attention", "full_attention"]"#;
    assert_eq!(windows(changed("qwen2", "layer_types", full)?), [None; 3]);
    let rotary =
        |config: ModelConfig| config.layer_kinds.iter().map(|kind| kind.rotary).collect::<Vec<_>>();
    assert_eq!(rotary(changed("smollm3", "no_rope_layers", "null")?), [true, false, true]);
    assert_eq!(rotary(changed("smollm3", "no_rope_layers", "[0, 1, 1]")?), [false, true, true]);
    let config = ModelConfig::from_file(folder("phi3-longrope"))?;
    assert_eq!((config.rotary_dim, config.head_dim), (Some(6), 8));
    Ok(())
}
