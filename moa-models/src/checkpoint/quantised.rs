//! Weights that are quantised in a way that cannot be read.

use std::path::Path;

use crate::checkpoint::json::JsonObject;
use crate::checkpoint::safetensors::Weights;
use crate::checkpoint::text::is_file;
use crate::{Error, Result};

/// How tensors end that a way of quantising puts beside or in place of weights.
const SIGNS: [(&str, &str); 7] = [
    (".g_idx", "GPTQ"),
    (".qweight", "GPTQ or AWQ"),
    (".weight_packed", "compressed-tensors"),
    (".weight_scale_inv", "blocks of FP8"),
    (".weight_scale", "FP8 or INT8 with scales"),
    (".weight.absmax", "bitsandbytes"),
    (".SCB", "bitsandbytes (LLM.int8)"),
];

/// Refuses weights that are quantised, with the name of how.
pub(crate) fn refuse(dir: &Path, weights: &Weights) -> Result<()> {
    let sign = SIGNS.iter().find(|(end, _)| weights.names().any(|name| name.ends_with(end)));
    let Some((_, guess)) = sign else { return Ok(()) };
    let scheme = named(dir)?.unwrap_or_else(|| (*guess).to_owned());
    Err(Error::Quantized { path: dir.to_owned(), scheme })
}

/// What the configuration calls it, with its bits.
fn named(dir: &Path) -> Result<Option<String>> {
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
        let bits = bits.map_or(String::new(), |bits| format!(", {bits} bits"));
        if let Ok(Some(method)) = own.text("quant_method") {
            return Ok(Some(format!("{}{bits}", display_name(method))));
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
