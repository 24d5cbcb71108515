//! What a `tokenizer.json` must be before the tokenizers library sees it.

use std::panic::{AssertUnwindSafe, catch_unwind};

use serde::Deserialize;
use serde_json::Value;

/// Most times that replacements may make a text longer. Known files have one, by three bytes for one.
const MOST_GROWTH: usize = 4096;

/// The steps of a file that work on texts; everything else must only be JSON.
#[derive(Deserialize)]
struct Steps {
    #[serde(default)]
    normalizer: Value,
    #[serde(default)]
    pre_tokenizer: Value,
    #[serde(default)]
    post_processor: Value,
    #[serde(default)]
    decoder: Value,
    #[serde(default)]
    model: Model,
}

#[derive(Default, Deserialize)]
struct Model {
    #[serde(default)]
    dropout: Value,
}

/// The kinds of steps that known models of text have. What is not here, such as pieces of a fixed length, has nothing
/// that checks it.
const KNOWN: [(&str, &[&str]); 4] = [
    (
        "normalizer",
        &[
            "Sequence",
            "NFC",
            "NFD",
            "NFKC",
            "NFKD",
            "Lowercase",
            "Prepend",
            "Replace",
            "Strip",
            "StripAccents",
            "BertNormalizer",
            "ByteLevel",
            "Nmt",
            "Precompiled",
        ],
    ),
    (
        "pre_tokenizer",
        &[
            "Sequence",
            "ByteLevel",
            "Metaspace",
            "Split",
            "Digits",
            "Whitespace",
            "WhitespaceSplit",
            "Punctuation",
            "BertPreTokenizer",
            "CharDelimiterSplit",
            "UnicodeScripts",
        ],
    ),
    (
        "post_processor",
        &["Sequence", "ByteLevel", "TemplateProcessing", "BertProcessing", "RobertaProcessing"],
    ),
    (
        "decoder",
        &[
            "Sequence",
            "ByteLevel",
            "Replace",
            "ByteFallback",
            "Fuse",
            "Strip",
            "Metaspace",
            "WordPiece",
            "BPEDecoder",
        ],
    ),
];
/// Deepest nesting of sequences of steps.
const MOST_LEVELS: usize = 8;

/// Reads a tokenizer. `Err` says what is wrong: the file is no JSON, its replacements would fill the
/// memory, or the library refuses it or fails on it.
pub(crate) fn parse(bytes: &[u8]) -> Result<tokenizers::Tokenizer, String> {
    let steps: Steps = serde_json::from_slice(bytes).map_err(|e| e.to_string())?;
    let all = [&steps.normalizer, &steps.pre_tokenizer, &steps.post_processor, &steps.decoder];
    for ((place, known), step) in KNOWN.into_iter().zip(all) {
        check_kinds(place, known, step, 0)?;
    }
    // Equal texts are to have equal tokens: dropout is for training.
    let cleaned;
    let mut bytes = bytes;
    if !steps.model.dropout.is_null() {
        let mut file: Value = serde_json::from_slice(bytes).map_err(|e| e.to_string())?;
        file["model"]["dropout"] = Value::Null;
        cleaned = file.to_string();
        bytes = cleaned.as_bytes();
    }
    for step in [&steps.normalizer, &steps.pre_tokenizer, &steps.decoder] {
        if growth(step) > MOST_GROWTH {
            return Err(format!(
                "its replacements make a text more than {MOST_GROWTH} times longer"
            ));
        }
    }
    guarded(|| tokenizers::Tokenizer::from_bytes(bytes))
}

/// Runs what the library does with a file or a text: it slices texts at places that a file gives. A tokenizer that
/// fails holds nothing that a later call could find half done.
pub(crate) fn guarded<T>(work: impl FnOnce() -> tokenizers::Result<T>) -> Result<T, String> {
    match catch_unwind(AssertUnwindSafe(work)) {
        Ok(done) => done.map_err(|e| e.to_string()),
        Err(_) => Err("the tokenizers library fails on it".to_owned()),
    }
}

/// Checks that a step, and the steps in it, are of kinds that are known.
fn check_kinds(place: &str, known: &[&str], step: &Value, depth: usize) -> Result<(), String> {
    if step.is_null() {
        return Ok(());
    }
    let kind = step["type"].as_str().unwrap_or("none");
    if !known.contains(&kind) || depth > MOST_LEVELS {
        return Err(format!("{place} must be one of {}, got {kind}", known.join(", ")));
    }
    match kind {
        "TemplateProcessing" => check_template(step)?,
        "Precompiled" => check_character_map(step)?,
        _ => {}
    }
    let inner = ["normalizers", "pretokenizers", "processors", "decoders"];
    let inner = inner.iter().filter_map(|list| step[*list].as_array()).flatten();
    inner.into_iter().try_for_each(|step| check_kinds(place, known, step, depth + 1))
}

/// Checks that SentencePiece's map of characters has the bytes that it says: the library allocates what the first four
/// ask for. What it does with the rest is [`guarded`].
fn check_character_map(step: &Value) -> Result<(), String> {
    let map = step["precompiled_charsmap"].as_str().unwrap_or_default();
    let digit = |byte: u8| match byte {
        b'A'..=b'Z' => Some(byte - b'A'),
        b'a'..=b'z' => Some(byte - b'a' + 26),
        b'0'..=b'9' => Some(byte - b'0' + 52),
        b'+' => Some(62),
        b'/' => Some(63),
        _ => None,
    };
    // Six digits of base 64 hold the four bytes, the lowest first.
    let digits: Option<Vec<u8>> = map.bytes().take(6).map(digit).collect();
    let said = digits.filter(|digits| digits.len() == 6).map(|digits| {
        let bits = digits.iter().fold(0u64, |bits, digit| bits << 6 | u64::from(*digit)) >> 4;
        (bits as u32).swap_bytes() as usize
    });
    let held = map.trim_end_matches('=').len() * 3 / 4;
    match said {
        Some(said) if said.is_multiple_of(4) && said + 4 <= held => Ok(()),
        _ => {
            Err("normalizer Precompiled has a map of characters that does not hold what it says"
                .into())
        }
    }
}

/// Checks that a template adds only tokens that it says.
fn check_template(step: &Value) -> Result<(), String> {
    for piece in ["single", "pair"].iter().filter_map(|of| step[*of].as_array()).flatten() {
        let id = piece.get("SpecialToken").map(|token| token["id"].as_str().unwrap_or_default());
        if let Some(id) = id.filter(|id| step["special_tokens"].get(*id).is_none()) {
            return Err(format!("post_processor adds the token `{id}`, which it does not say"));
        }
    }
    Ok(())
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
    fn steps_of_unknown_kinds_are_refused() {
        for (place, step) in [
            ("normalizer", json!({"type": "Precompiled", "precompiled_charsmap": "////////"})),
            ("pre_tokenizer", json!({"type": "FixedLength", "length": 0})),
            ("decoder", json!({"type": "Sequence", "decoders": [{"type": "CTC"}]})),
            (
                "post_processor",
                json!({"type": "TemplateProcessing", "pair": [], "special_tokens": {},
                "single": [{"SpecialToken": {"id": "none", "type_id": 0}}]}),
            ),
            ("normalizer", json!({"strip_left": true, "strip_right": true})),
        ] {
            let error = fault(|file| file[place] = step).unwrap();
            assert!(error.starts_with(place), "{error}");
        }
    }

    #[test]
    fn dropout_is_off() {
        let mut file = tiny();
        file["model"]["dropout"] = json!(0.9);
        let tokenizer = parse(file.to_string().as_bytes()).unwrap();
        let plain = parse(tiny().to_string().as_bytes()).unwrap();
        let text = "The history of navigation is the history of people who trusted numbers.";
        let ids =
            |of: &tokenizers::Tokenizer| of.encode_fast(text, true).unwrap().get_ids().to_vec();
        for _ in 0..5 {
            assert_eq!(ids(&tokenizer), ids(&plain));
        }
    }

    #[test]
    fn files_that_the_library_fails_on_are_errors() {
        let prefix = "x".repeat(100);
        assert!(fault(|file| file["model"]["continuing_subword_prefix"] = prefix.into()).is_some());
        let text = tiny().to_string().replacen("\"decoder\":", "\"decoder\":NaN,\"other\":", 1);
        assert!(parse(text.as_bytes()).unwrap_err().contains("expected value"));
    }
}
