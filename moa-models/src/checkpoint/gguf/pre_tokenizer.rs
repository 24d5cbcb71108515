//! How byte-level vocabularies split a text before they merge: GGUF names the way, tokenizer.json spells it
//! out.

use serde_json::{Value as Json, json};

/// What a name of `tokenizer.ggml.pre` stands for.
pub(super) struct PreTokenizer {
    names: &'static [&'static str],
    split: Split,
    /// Text is brought into NFC first.
    pub(super) nfc: bool,
    /// A piece that is a token is that token, whatever the merges.
    pub(super) ignore_merges: bool,
    /// The begin token goes before a text where the file does not say.
    pub(super) adds_bos: bool,
}

enum Split {
    /// GPT-2's pattern, which the byte level brings along.
    Gpt2,
    /// Single digits, then GPT-2's pattern.
    DigitsAndGpt2,
    /// The matches of one pattern.
    Pattern(&'static str),
    /// The matches of a pattern, and within them those of the next one.
    Patterns(&'static [&'static str]),
}

const LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const QWEN2: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const TEKKEN: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const GPT2: &str = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+";

/// Those that are known. Names stand together that split alike.
const KNOWN: [PreTokenizer; 7] = [
    PreTokenizer {
        names: &["gpt-2", "phi-2", "jina-es", "jina-de", "olmo", "gigachat", "mellum"],
        split: Split::Gpt2,
        nfc: false,
        ignore_merges: false,
        adds_bos: false,
    },
    PreTokenizer {
        names: &["smollm", "starcoder", "refact", "command-r", "codeshell", "exaone"],
        split: Split::DigitsAndGpt2,
        nfc: false,
        ignore_merges: false,
        adds_bos: false,
    },
    PreTokenizer {
        names: &["llama-bpe", "llama3", "llama-v3", "falcon3"],
        split: Split::Pattern(LLAMA3),
        nfc: false,
        ignore_merges: true,
        adds_bos: true,
    },
    PreTokenizer {
        names: &["dbrx", "smaug-bpe"],
        split: Split::Pattern(LLAMA3),
        nfc: false,
        ignore_merges: false,
        adds_bos: false,
    },
    PreTokenizer {
        names: &["qwen2", "deepseek-r1-qwen", "stablelm2"],
        split: Split::Pattern(QWEN2),
        nfc: true,
        ignore_merges: false,
        adds_bos: false,
    },
    PreTokenizer {
        names: &["tekken"],
        split: Split::Pattern(TEKKEN),
        nfc: false,
        ignore_merges: true,
        adds_bos: true,
    },
    // What llama.cpp does where a file does not say.
    PreTokenizer {
        names: &["default"],
        split: Split::Patterns(&[r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", "[0-9][0-9][0-9]"]),
        nfc: false,
        ignore_merges: false,
        adds_bos: false,
    },
];

impl PreTokenizer {
    pub(super) fn named(name: &str) -> Option<&'static Self> {
        KNOWN.iter().find(|known| known.names.contains(&name))
    }

    /// All names, for a message.
    pub(super) fn known() -> String {
        KNOWN.iter().flat_map(|known| known.names).copied().collect::<Vec<_>>().join(", ")
    }

    /// The name of what a tokenizer.json says, if there is one.
    pub(super) fn name_of(json: &Json, nfc: bool, ignore_merges: bool) -> Option<&'static str> {
        let wanted = steps(json)?;
        let known = KNOWN.iter().find(|known| {
            (known.nfc, known.ignore_merges) == (nfc, ignore_merges)
                && steps(&known.json()).as_ref() == Some(&wanted)
        });
        known.map(|known| known.names[0])
    }

    /// As tokenizer.json has it.
    pub(super) fn json(&self) -> Json {
        let bytes = |use_regex: bool| {
            json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true,
                "use_regex": use_regex})
        };
        let split = |pattern: &str| {
            json!({"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated",
                "invert": false})
        };
        let steps = match &self.split {
            Split::Gpt2 => vec![bytes(true)],
            Split::DigitsAndGpt2 => {
                vec![json!({"type": "Digits", "individual_digits": true}), bytes(true)]
            }
            Split::Pattern(pattern) => vec![split(pattern), bytes(false)],
            Split::Patterns(patterns) => {
                patterns.iter().map(|pattern| split(pattern)).chain([bytes(false)]).collect()
            }
        };
        json!({"type": "Sequence", "pretokenizers": steps})
    }
}

/// A step of a pre-tokenizer, as far as it changes tokens.
#[derive(Debug, PartialEq)]
enum Step<'a> {
    Split(&'a str),
    Digits,
    Bytes { use_regex: bool },
}

/// The steps of a pre-tokenizer, if all are of kinds that are known here.
fn steps(json: &Json) -> Option<Vec<Step<'_>>> {
    let flag = |name: &str, default: bool| json[name].as_bool().unwrap_or(default);
    match json["type"].as_str()? {
        "Sequence" => {
            let parts = json["pretokenizers"].as_array()?.iter().map(steps);
            Some(parts.collect::<Option<Vec<_>>>()?.into_iter().flatten().collect())
        }
        "Split" => {
            let matches = match json["behavior"].as_str()? {
                "Isolated" => true,
                "Removed" => flag("invert", false),
                _ => false,
            };
            matches
                .then(|| json["pattern"]["Regex"].as_str().map(|regex| vec![Step::Split(regex)]))?
        }
        "Digits" => flag("individual_digits", false).then(|| vec![Step::Digits]),
        "ByteLevel" => {
            let use_regex = flag("use_regex", true);
            (!flag("add_prefix_space", true)).then(|| vec![Step::Bytes { use_regex }])
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_name_is_there_once() {
        let mut names: Vec<&str> = KNOWN.iter().flat_map(|known| known.names).copied().collect();
        names.sort_unstable();
        assert!(names.array_windows().all(|[a, b]| a != b), "{names:?}");
        for known in &KNOWN {
            let found = PreTokenizer::name_of(&known.json(), known.nfc, known.ignore_merges);
            assert_eq!(found, Some(known.names[0]));
        }
        assert!(PreTokenizer::named("qwen2").is_some() && PreTokenizer::named("").is_none());
    }
}
