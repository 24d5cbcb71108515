//! What a `tokenizer.json` must be before the tokenizers library sees it.

use std::panic::{AssertUnwindSafe, catch_unwind};

use serde::Deserialize;
use serde_json::Value;

/// Most times that replacements may make a text longer. Known files have one, by three bytes for one.
const MOST_GROWTH: usize = 4096;

/// The steps of a file that rewrite texts; everything else must only be JSON.
#[derive(Deserialize)]
struct Steps {
    #[serde(default)]
    normalizer: Value,
    #[serde(default)]
    pre_tokenizer: Value,
    #[serde(default)]
    decoder: Value,
}

/// Reads a tokenizer. `Err` says what is wrong: the file is no JSON, its replacements would fill the
/// memory, or the library refuses it or fails on it.
pub(crate) fn parse(bytes: &[u8]) -> Result<tokenizers::Tokenizer, String> {
    let steps: Steps = serde_json::from_slice(bytes).map_err(|e| e.to_string())?;
    for step in [&steps.normalizer, &steps.pre_tokenizer, &steps.decoder] {
        if growth(step) > MOST_GROWTH {
            return Err(format!(
                "its replacements make a text more than {MOST_GROWTH} times longer"
            ));
        }
    }
    // The library slices texts at places that a file gives. Nothing is left of a tokenizer that failed.
    match catch_unwind(AssertUnwindSafe(|| tokenizers::Tokenizer::from_bytes(bytes))) {
        Ok(read) => read.map_err(|e| e.to_string()),
        Err(_) => Err("the tokenizers library fails on it".to_owned()),
    }
}

/// How many times longer the replacements of a step, and of the steps in it, may make a text.
fn growth(step: &Value) -> usize {
    let parts = |list: &Value| {
        let own = list.as_array().into_iter().flatten().map(growth);
        own.fold(1, usize::saturating_mul)
    };
    let inner = ["normalizers", "pretokenizers", "decoders"].map(|list| parts(&step[list]));
    let own = match (step["content"].as_str(), &step["pattern"]) {
        (Some(content), Value::Object(pattern)) => {
            // A regular expression may match a byte, and a text without one everywhere.
            let matched = pattern.get("String").and_then(Value::as_str).map_or(1, str::len);
            content.len().div_ceil(matched.max(1)) + usize::from(matched == 0)
        }
        _ => 1,
    };
    inner.into_iter().fold(own.max(1), usize::saturating_mul)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn tiny() -> Value {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../assets/moa-tiny/tokenizer.json");
        serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
    }

    fn fault(change: impl FnOnce(&mut Value)) -> Option<String> {
        let mut file = tiny();
        change(&mut file);
        parse(file.to_string().as_bytes()).err()
    }

    #[test]
    fn replacements_that_double_a_text_again_and_again_are_refused() {
        let double = json!({"type": "Replace", "pattern": {"String": "l"}, "content": "ll"});
        let doubles =
            |count: usize| json!({"type": "Sequence", "normalizers": vec![&double; count]});
        assert_eq!(fault(|file| file["normalizer"] = doubles(2)), None);
        let error = fault(|file| file["normalizer"] = doubles(60)).unwrap();
        assert!(error.contains("longer"), "{error}");
    }

    #[test]
    fn files_that_the_library_fails_on_are_errors() {
        let prefix = "x".repeat(100);
        assert!(fault(|file| file["model"]["continuing_subword_prefix"] = prefix.into()).is_some());
        let text = tiny().to_string().replacen("\"decoder\":", "\"decoder\":NaN,\"other\":", 1);
        assert!(parse(text.as_bytes()).unwrap_err().contains("expected value"));
    }
}
