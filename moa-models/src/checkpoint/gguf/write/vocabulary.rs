//! A tokenizer as keys.

use std::collections::HashMap;
use std::path::Path;

use serde_json::Value as Json;

use super::container::Keys;
use crate::checkpoint::gguf::pre_tokenizer::PreTokenizer;
use crate::checkpoint::gguf::tokenizer::{BYTE, CONTROL, NORMAL, UNKNOWN, UNUSED, USER_DEFINED};
use crate::checkpoint::tokenizer::Tokenizer;
use crate::{Error, Result};

/// Tokens of a model with so many, in their order, each with its type.
struct Tokens {
    texts: Vec<String>,
    types: Vec<i64>,
}

/// Writes the tokenizer of a model whose embedding has `rows` rows; `ends` are tokens that end an answer.
pub(super) fn write(
    keys: &mut Keys,
    tokenizer: &Tokenizer,
    rows: usize,
    ends: &[u32],
) -> Result<()> {
    let json = tokenizer.json()?;
    let file = File { path: tokenizer.path(), json: &json };
    let mut tokens = file.tokens(rows, tokenizer)?;
    let merges = file.merges()?;
    if json["model"]["byte_fallback"] == true {
        keys.text("tokenizer.ggml.model", "llama");
        keys.text("tokenizer.ggml.pre", "default");
        tokens.name_bytes();
        let ranks = ranks(&merges);
        let rank = |text: &String| ranks.get(text.as_str()).map_or(-1e6, |rank| -(*rank as f32));
        let scores = tokens.texts.iter().zip(&tokens.types);
        let scores = scores.map(|(text, kind)| if *kind == NORMAL { rank(text) } else { 0.0 });
        keys.f32s("tokenizer.ggml.scores", scores);
        keys.flag("tokenizer.ggml.add_space_prefix", file.prefixes_space()?);
    } else {
        keys.text("tokenizer.ggml.model", "gpt2");
        keys.text("tokenizer.ggml.pre", file.pre_tokenizer()?);
        let merges: Vec<String> = merges.iter().map(|[a, b]| format!("{a} {b}")).collect();
        keys.texts("tokenizer.ggml.merges", merges.iter().map(String::as_str));
    }
    keys.texts("tokenizer.ggml.tokens", tokens.texts.iter().map(String::as_str));
    keys.i32s("tokenizer.ggml.token_type", tokens.types.iter().map(|kind| *kind as i32));
    special(keys, tokenizer, ends)
}

/// Tokens with a role, and whether texts get them.
fn special(keys: &mut Keys, tokenizer: &Tokenizer, ends: &[u32]) -> Result<()> {
    let id = |role: &str| {
        tokenizer.special_tokens().get(role).and_then(|token| tokenizer.token_id(token))
    };
    let (text, plain) = (tokenizer.encode("a", true)?, tokenizer.encode("a", false)?);
    // Where no file gives a token the role, what texts begin with has it.
    let added = (text.len() > plain.len() && text.first() != plain.first()).then(|| text[0]);
    let bos = tokenizer.bos_id().or(added);
    let eos = tokenizer.eos_id().or(ends.first().copied());
    let others: Vec<u32> = ends.iter().copied().filter(|end| Some(*end) != eos).collect();
    for (key, id) in [
        ("bos", bos),
        ("eos", eos),
        ("eot", others.first().copied()),
        ("eom", others.get(1).copied()),
        ("unknown", id("unk_token")),
        ("padding", id("pad_token")),
    ] {
        if let Some(id) = id {
            keys.u32(&format!("tokenizer.ggml.{key}_token_id"), id);
        }
    }
    let has = |token: Option<&u32>, role: Option<u32>| role.is_some() && token.copied() == role;
    keys.flag("tokenizer.ggml.add_bos_token", has(text.first(), bos));
    keys.flag("tokenizer.ggml.add_eos_token", has(text.last(), eos));
    Ok(())
}

/// The place of each piece among the merges that make one.
fn ranks(merges: &[[&str; 2]]) -> HashMap<String, usize> {
    let mut ranks = HashMap::new();
    for merge in merges {
        let next = ranks.len();
        ranks.entry(merge.concat()).or_insert(next);
    }
    ranks
}

impl Tokens {
    /// Bytes are tokens of a type of their own.
    fn name_bytes(&mut self) {
        for (text, kind) in self.texts.iter().zip(&mut self.types) {
            let byte = text.strip_prefix("<0x").and_then(|text| text.strip_suffix('>'));
            if *kind == NORMAL
                && byte.is_some_and(|b| b.len() == 2 && u8::from_str_radix(b, 16).is_ok())
            {
                *kind = BYTE;
            }
        }
    }
}

/// A tokenizer as tokenizer.json has it.
struct File<'a> {
    path: &'a Path,
    json: &'a Json,
}

impl<'a> File<'a> {
    fn fault(&self, place: &str, expected: &str, got: impl std::fmt::Display) -> Error {
        Error::gguf(self.path, place, expected, got)
    }

    fn tokens(&self, rows: usize, tokenizer: &Tokenizer) -> Result<Tokens> {
        let mut texts: Vec<Option<(String, i64)>> = vec![None; rows];
        let mut put = |id: Option<u64>, text: &str, kind: i64| {
            // Tokens beyond the embedding are none that a model can read.
            if let Some(place) = id.and_then(|id| texts.get_mut(id as usize)) {
                *place = Some((text.to_owned(), kind));
            }
        };
        let Some(vocabulary) = self.json["model"]["vocab"].as_object() else {
            let kind = &self.json["model"]["type"];
            return Err(self.fault("model", "BPE, the one kind that GGUF files have here", kind));
        };
        vocabulary.iter().for_each(|(text, id)| put(id.as_u64(), text, NORMAL));
        let unknown = tokenizer.special_tokens().get("unk_token");
        for added in self.json["added_tokens"].as_array().into_iter().flatten() {
            let text = added["content"].as_str().unwrap_or_default();
            let is_unknown = self.json["model"]["unk_token"] == text && unknown == Some(text);
            let kind = match added["special"] == true {
                true if is_unknown => UNKNOWN,
                true => CONTROL,
                false => USER_DEFINED,
            };
            put(added["id"].as_u64(), text, kind);
        }
        let padding = |(id, token): (usize, Option<_>)| {
            token.unwrap_or_else(|| (format!("[PAD{id}]"), UNUSED))
        };
        let (texts, types) = texts.into_iter().enumerate().map(padding).unzip();
        Ok(Tokens { texts, types })
    }

    fn merges(&self) -> Result<Vec<[&'a str; 2]>> {
        let pair = |merge: &'a Json| match merge {
            Json::String(text) => text.split_once(' ').map(|(a, b)| [a, b]),
            Json::Array(pair) => match &pair[..] {
                [Json::String(a), Json::String(b)] => Some([a.as_str(), b.as_str()]),
                _ => None,
            },
            _ => None,
        };
        let merges = self.json["model"]["merges"].as_array();
        let merges = merges.and_then(|merges| merges.iter().map(pair).collect());
        merges.ok_or_else(|| self.fault("merges of the model", "pairs of tokens", "others"))
    }

    fn pre_tokenizer(&self) -> Result<&'static str> {
        let nfc = match &self.json["normalizer"] {
            Json::Null => false,
            step if step["type"] == "NFC" => true,
            other => return Err(self.fault("normalizer", "none or NFC", &other["type"])),
        };
        let ignore_merges = self.json["model"]["ignore_merges"] == true;
        PreTokenizer::name_of(&self.json["pre_tokenizer"], nfc, ignore_merges).ok_or_else(|| {
            let expected = format!("one that GGUF has a name for ({})", PreTokenizer::known());
            self.fault("pre_tokenizer", &expected, "another one")
        })
    }

    /// Whether a space goes before each text.
    fn prefixes_space(&self) -> Result<bool> {
        let metaspace = &self.json["pre_tokenizer"];
        if metaspace["type"] == "Metaspace" {
            return Ok(metaspace["prepend_scheme"] != "never");
        }
        let steps = match &self.json["normalizer"] {
            step if step["type"] == "Sequence" => step["normalizers"].as_array(),
            _ => None,
        };
        let steps = steps.map_or(&[][..], |steps| steps);
        match steps.iter().any(|step| step["type"] == "Replace" && step["content"] == "▁") {
            true => Ok(steps.iter().any(|step| step["type"] == "Prepend")),
            false => Err(self.fault("normalizer", "spaces replaced by `▁`", "another one")),
        }
    }
}
