//! A model's configuration as keys.

use std::path::Path;

use super::container::Keys;
use crate::checkpoint::found::config_file;
use crate::checkpoint::gguf::architecture::{
    ARCHITECTURES, Architecture, FACTORS, LOG_MULTIPLIER, QUERY_SCALING,
};
use crate::checkpoint::gguf::tensor_type::TensorType;
use crate::checkpoint::json::JsonObject;
use crate::decoder::config::ModelConfig;
use crate::decoder::rope_scaling::{RopeScaling, yarn_mscale};
use crate::families::{FAMILIES, text_part};
use crate::{Error, Result};

/// The architecture of a folder's model.
pub(super) fn architecture(folder: &Path) -> Result<&'static Architecture> {
    let file = JsonObject::read(&config_file(folder)?)?;
    let file = &*text_part(&file, FAMILIES)?;
    let kind = file.text("model_type")?.unwrap_or("llama");
    let known = ARCHITECTURES.iter().find(|known| known.model_types.contains(&kind));
    known.ok_or_else(|| {
        let mut known: Vec<&str> =
            ARCHITECTURES.iter().flat_map(|a| a.model_types).copied().collect();
        known.sort_unstable();
        known.dedup();
        file.invalid("model_type", &format!("{}, to be written as GGUF", known.join(", ")), kind)
    })
}

/// What every file has of its types.
pub(super) fn types(keys: &mut Keys, wanted: TensorType) {
    keys.u32("general.file_type", wanted.file_type());
    keys.u32("general.quantization_version", 2);
}

/// Writes what a model's configuration says.
pub(super) fn write(
    keys: &mut Keys,
    folder: &Path,
    architecture: &Architecture,
    c: &ModelConfig,
) -> Result<()> {
    let &Architecture { name: architecture, has_factors, .. } = architecture;
    keys.text("general.architecture", architecture);
    keys.text("general.type", "model");
    let name = folder.canonicalize().ok();
    let name = name.as_deref().unwrap_or(folder).file_name().unwrap_or_default();
    keys.text("general.name", &name.to_string_lossy());
    let of = |key: &str| format!("{architecture}.{key}");
    for (key, count) in [
        ("vocab_size", c.vocab_size),
        ("context_length", c.max_position_embeddings),
        ("embedding_length", c.hidden_size),
        ("block_count", c.num_hidden_layers),
        ("feed_forward_length", c.intermediate_size),
        ("attention.head_count", c.num_attention_heads),
        ("attention.head_count_kv", c.num_key_value_heads),
        ("attention.key_length", c.head_dim),
        ("attention.value_length", c.head_dim),
        ("rope.dimension_count", c.rotated_dims()),
    ] {
        keys.u32(&of(key), count as u32);
    }
    keys.f32(&of("attention.layer_norm_rms_epsilon"), c.rms_norm_eps);
    keys.f32(&of("rope.freq_base"), c.rope_theta);
    if has_factors {
        FACTORS.iter().for_each(|(key, _, factor)| keys.f32(&of(key), factor(c)));
    }
    if let Some(scaling) = c.query_scaling {
        keys.f32(&of(QUERY_SCALING), scaling.beta);
    }
    match c.layer_kinds.iter().find_map(|kind| kind.sliding_window) {
        Some(window) => keys.u32(&of("attention.sliding_window"), window as u32),
        // Files of this architecture say that they have none.
        None if architecture == "phi3" => keys.u32(&of("attention.sliding_window"), 0),
        None => {}
    }
    match c.rope_scaling {
        // Llama 3.1's is a tensor of factors.
        RopeScaling::Default | RopeScaling::Llama3 { .. } => {}
        RopeScaling::Linear { factor } => {
            keys.text(&of("rope.scaling.type"), "linear");
            keys.f32(&of("rope.scaling.factor"), factor);
        }
        RopeScaling::Yarn {
            factor,
            beta_fast,
            beta_slow,
            original,
            attention_factor,
            mscale,
            mscale_all_dim,
            ..
        } => {
            keys.text(&of("rope.scaling.type"), "yarn");
            keys.f32(&of("rope.scaling.factor"), factor);
            keys.u32(&of("rope.scaling.original_context_length"), original as u32);
            keys.f32(&of("rope.scaling.yarn_beta_fast"), beta_fast);
            keys.f32(&of("rope.scaling.yarn_beta_slow"), beta_slow);
            // A factor of the usual one, and not one in its place.
            let own = c.rope_scaling.attention_factor() / yarn_mscale(factor, 1.0);
            match (mscale, mscale_all_dim) {
                (Some(1.0), Some(all))
                    if c.query_scaling.is_some() && attention_factor.is_none() =>
                {
                    keys.f32(&of(LOG_MULTIPLIER), all);
                }
                _ if own as f32 != 1.0 => keys.f32(&of("rope.scaling.attn_factor"), own),
                _ => {}
            }
        }
        // The factors of frequencies are tensors.
        RopeScaling::LongRope { original, .. } => {
            keys.text(&of("rope.scaling.type"), "longrope");
            keys.u32(&of("rope.scaling.original_context_length"), original as u32);
            keys.f32(&of("rope.scaling.attn_factor"), c.rope_scaling.attention_factor());
        }
        RopeScaling::Dynamic { .. } => {
            let expected = "none, linear, llama3, yarn or longrope, to be written as GGUF";
            let path = folder.join("config.json");
            return Err(Error::gguf(&path, "rope_scaling", expected, "dynamic"));
        }
    }
    Ok(())
}

/// A configuration as a file can say it, its attention factor as the one that it comes to; numbers that are those of
/// `source` but for their rounding are taken from there.
pub(super) fn as_written(mut c: ModelConfig, source: Option<&ModelConfig>) -> ModelConfig {
    let attention = c.rope_scaling.attention_factor();
    match &mut c.rope_scaling {
        RopeScaling::Yarn { attention_factor, mscale, mscale_all_dim, .. } => {
            (*attention_factor, *mscale, *mscale_all_dim) = (Some(attention), None, None);
        }
        RopeScaling::LongRope { attention_factor, factor, .. } => {
            (*attention_factor, *factor) = (Some(attention), 1.0);
        }
        _ => {}
    }
    let own =
        source.cloned().map(|mut source| numbers(&mut source).map(|x| *x).collect::<Vec<_>>());
    for (found, own) in numbers(&mut c).zip(own.into_iter().flatten()) {
        if (*found / own - 1.0).abs() < 1e-6 {
            *found = own;
        }
    }
    c
}

/// The numbers of a configuration that a file has as f32.
fn numbers(c: &mut ModelConfig) -> impl Iterator<Item = &mut f64> {
    let (some, more): (Vec<&mut f64>, [&mut [f64]; 2]) = match &mut c.rope_scaling {
        RopeScaling::Linear { factor } => (vec![factor], [&mut [], &mut []]),
        RopeScaling::Yarn { factor, beta_fast, beta_slow, attention_factor, .. } => {
            let some = [factor, beta_fast, beta_slow].into_iter().chain(attention_factor);
            (some.collect(), [&mut [], &mut []])
        }
        RopeScaling::LongRope { short_factor, long_factor, attention_factor, .. } => {
            (attention_factor.iter_mut().collect(), [short_factor, long_factor])
        }
        _ => (Vec::new(), [&mut [], &mut []]),
    };
    let fixed = [
        &mut c.rms_norm_eps,
        &mut c.rope_theta,
        &mut c.embedding_multiplier,
        &mut c.residual_multiplier,
        &mut c.logits_scaling,
    ];
    let scaling = some.into_iter().chain(more.into_iter().flatten());
    let beta = c.query_scaling.as_mut().map(|scaling| &mut scaling.beta);
    fixed.into_iter().chain(&mut c.attention_multiplier).chain(beta).chain(scaling)
}
