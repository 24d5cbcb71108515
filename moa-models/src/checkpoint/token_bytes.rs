//! How much of a text one token can stand for: a prompt that cannot fit is refused before it is cut into tokens,
//! which takes a hundred times its memory.

use serde_json::Value;
use tokenizers::models::ModelWrapper;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::{Model, Tokenizer};

/// What composition makes of a text may be so many times shorter: 7 bytes of U+1FBE, U+0308 and U+0301 are the 2 of
/// U+0390, and no other character has so many (Unicode 14).
const COMPOSED: usize = 4;

/// Most bytes of a text that become one token; `None` for a tokenizer that may leave out parts of a text, or make one
/// token of a long one that it does not know.
pub(crate) fn most(tokenizer: &Tokenizer) -> Option<usize> {
    let ModelWrapper::BPE(bpe) = tokenizer.get_model() else { return None };
    let pre = json(tokenizer.get_pre_tokenizer())?;
    let knows = |token: String| bpe.token_to_id(&token).is_some();
    let knows_all = match is_byte_level(&pre) {
        true => ByteLevel::alphabet().into_iter().all(|byte| knows(byte.to_string())),
        false => bpe.byte_fallback && (0..256).all(|byte| knows(format!("<0x{byte:02X}>"))),
    };
    let added = tokenizer.get_added_tokens_decoder();
    let swallows = added.values().any(|token| token.lstrip || token.rstrip);
    let affixes = bpe.continuing_subword_prefix.is_some() || bpe.end_of_word_suffix.is_some();
    if !knows_all || swallows || affixes || !keeps_all(&pre) {
        return None;
    }
    let factor = shrinks(&json(tokenizer.get_normalizer())?)?;
    // A byte of a token stands for at most one byte of its text.
    let longest = tokenizer.get_vocab(true).into_keys().map(|token| token.len()).max()?;
    longest.checked_mul(factor).filter(|most| *most > 0)
}

fn json(step: Option<&impl serde::Serialize>) -> Option<Value> {
    serde_json::to_value(step).ok()
}

fn steps<'a>(sequence: &'a Value, of: &str) -> &'a [Value] {
    sequence[of].as_array().map_or(&[], Vec::as_slice)
}

fn is_byte_level(pre: &Value) -> bool {
    pre["type"] == "ByteLevel" || steps(pre, "pretokenizers").iter().any(is_byte_level)
}

/// Whether all of a text goes through.
fn keeps_all(pre: &Value) -> bool {
    match pre["type"].as_str() {
        None => pre.is_null(),
        Some("Sequence") => steps(pre, "pretokenizers").iter().all(keeps_all),
        Some("Split") => pre["behavior"] != "Removed",
        Some("ByteLevel" | "Metaspace" | "Digits") => true,
        Some(_) => false,
    }
}

/// By how much a text may get shorter.
fn shrinks(normalizer: &Value) -> Option<usize> {
    match normalizer["type"].as_str() {
        None => normalizer.is_null().then_some(1),
        Some("Sequence") => steps(normalizer, "normalizers")
            .iter()
            .try_fold(1, |all: usize, step| all.checked_mul(shrinks(step)?)),
        Some("NFC") => Some(COMPOSED),
        Some("Prepend") => Some(1),
        Some("Replace") => {
            let (from, to) = (normalizer["pattern"]["String"].as_str()?, &normalizer["content"]);
            (to.as_str()?.len() >= from.len()).then_some(1)
        }
        Some(_) => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokenizers::normalizers::unicode::NFC;
    use tokenizers::{NormalizedString, Normalizer};

    #[test]
    fn no_composed_text_is_shorter_than_said() {
        // A Greek letter with two marks, Hangul, the sign of an angstrom and that of kelvins.
        for text in
            ["\u{1fbe}\u{308}\u{301}", "\u{1112}\u{1161}\u{11ab}", "\u{212b}\u{301}", "\u{212a}"]
        {
            let mut composed = NormalizedString::from(text);
            NFC.normalize(&mut composed).unwrap();
            assert!(composed.get().len() < text.len());
            assert!(composed.get().len() * COMPOSED >= text.len(), "{text:?}");
        }
    }
}
