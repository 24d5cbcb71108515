//! Weights that are quantised, in ways that can be read and others.

use std::path::Path;

use crate::checkpoint::fp8;
use crate::checkpoint::json::JsonObject;
use crate::checkpoint::packed::Packing;
use crate::checkpoint::safetensors::Weights;
use crate::checkpoint::text::is_file;
use crate::{Error, Result};

/// How tensors end that a way of quantising puts beside or in place of weights.
const SIGNS: [(&str, &str); 8] = [
    (".g_idx", "GPTQ"),
    (".qweight", "GPTQ or AWQ"),
    (".weight_packed", "compressed-tensors"),
    (".weight_scale_inv", "blocks of FP8"),
    (".weight_scale", "FP8 or INT8 with scales"),
    (".weight.absmax", "bitsandbytes"),
    (".SCB", "bitsandbytes (LLM.int8)"),
    (".biases", "MLX"),
];

/// Tells weights how they are quantised, if they are; refuses ways that are not known, with their name.
pub(crate) fn prepare(dir: &Path, weights: &mut Weights) -> Result<()> {
    let sign = SIGNS.iter().find(|(end, _)| weights.names().any(|name| name.ends_with(end)));
    let Some((end, guess)) = sign else { return Ok(()) };
    if fp8::SCALES.contains(end) && weights.is_fp8(end) {
        weights.set_fp8_block(fp8_block(dir)?);
        return Ok(());
    }
    let (packing, scheme) = named(dir)?.unwrap_or_else(|| (None, (*guess).to_owned()));
    if packing.is_none() {
        return Err(Error::Quantized { path: dir.to_owned(), scheme });
    }
    weights.set_packing(packing);
    Ok(())
}

/// Rows and columns that a scale is for, where it is not for a matrix or a row: 128 each, if the configuration does not say.
fn fp8_block(dir: &Path) -> Result<[usize; 2]> {
    const FIELD: &str = "weight_block_size";
    let expected = "two counts of at least 1, or null";
    let Some(own) = JsonObject::read(&dir.join("config.json"))?.object("quantization_config")?
    else {
        return Ok([128; 2]);
    };
    let count = |count: &serde_json::Value| count.as_u64().filter(|n| *n > 0)?.try_into().ok();
    match own.list(FIELD, expected, count)?.as_deref() {
        None => Ok([128; 2]),
        Some(&[rows, cols]) => Ok([rows, cols]),
        Some(other) => Err(own.invalid(FIELD, expected, format!("{} of them", other.len()))),
    }
}

/// How the configuration says that weights are packed, and what it calls that, with its bits.
fn named(dir: &Path) -> Result<Option<(Option<Packing>, String)>> {
    for (file, field) in
        [("config.json", Some("quantization_config")), ("quantize_config.json", None)]
    {
        let path = dir.join(file);
        if !is_file(&path)? {
            continue;
        }
        let object = JsonObject::read(&path)?;
        let own = match field {
            Some(field) => match object.object(field)? {
                Some(own) => own,
                None => continue,
            },
            None => object,
        };
        let bits = own.get("bits").or(own.get("w_bit")).and_then(serde_json::Value::as_u64);
        let text = |field| own.text(field).ok().flatten();
        if let Some(method) = text("quant_method") {
            let packing = match (method, bits) {
                ("gptq", Some(4)) => match text("checkpoint_format") {
                    None | Some("gptq") => Some(Packing::Gptq { less_one: true }),
                    Some("gptq_v2") => Some(Packing::Gptq { less_one: false }),
                    Some(_) => None,
                },
                ("awq", Some(4)) => {
                    let version = text("version").unwrap_or("gemm").to_lowercase();
                    (version == "gemm").then_some(Packing::Awq)
                }
                _ => None,
            };
            let format = text("checkpoint_format").or(text("version"));
            let format = format.map_or(String::new(), |format| format!(", {format}"));
            let bits = bits.map_or(String::new(), |bits| format!(", {bits} bits"));
            return Ok(Some((packing, format!("{}{bits}{format}", display_name(method)))));
        }
    }
    Ok(None)
}

fn display_name(method: &str) -> String {
    match method {
        "gptq" | "awq" | "fp8" | "eetq" | "hqq" | "aqlm" => method.to_uppercase(),
        other => other.to_owned(),
    }
}
