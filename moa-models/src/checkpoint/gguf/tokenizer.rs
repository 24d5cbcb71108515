//! The vocabulary, its special tokens and the chat template.

use serde_json::{Map, Value as Json, json};

use super::pre_tokenizer::PreTokenizer;
use super::{Gguf, Value, sentencepiece};
use crate::checkpoint::special_tokens::SpecialTokens;
use crate::checkpoint::template::ChatTemplate;
use crate::checkpoint::tokenizer::Tokenizer;
use crate::{Error, Result};

/// Types of tokens.
pub(super) const NORMAL: i64 = 1;
pub(super) const UNKNOWN: i64 = 2;
pub(super) const CONTROL: i64 = 3;
pub(super) const USER_DEFINED: i64 = 4;
pub(super) const UNUSED: i64 = 5;
pub(super) const BYTE: i64 = 6;

/// Kinds of vocabularies.
const MODELS: &str = "gpt2 (byte-level BPE) or llama (SentencePiece BPE)";

/// The tokens and the type of each.
struct Vocabulary<'a> {
    tokens: &'a [String],
    types: &'a [i64],
}

impl<'a> Vocabulary<'a> {
    fn of(gguf: &'a Gguf) -> Result<Self> {
        let key = "tokenizer.ggml.tokens";
        let tokens = match gguf.get(key) {
            Some(Value::Texts(tokens)) => tokens,
            Some(other) => return Err(gguf.key_fault(key, "an array of texts", other)),
            None => return Err(gguf.key_fault(key, "an array of texts", "none")),
        };
        let key = "tokenizer.ggml.token_type";
        let types = match gguf.get(key) {
            None => &[][..],
            Some(Value::Integers(types)) if types.len() == tokens.len() => types,
            Some(other) => {
                let expected = format!("{} integers, one for each token", tokens.len());
                return Err(gguf.key_fault(key, &expected, other));
            }
        };
        Ok(Self { tokens, types })
    }

    fn iter(&self) -> impl Iterator<Item = (usize, &'a str, i64)> {
        let kind = |id: usize| self.types.get(id).copied().unwrap_or(NORMAL);
        self.tokens.iter().enumerate().map(move |(id, token)| (id, token.as_str(), kind(id)))
    }

    /// Ids by token; the first of two alike.
    fn ids(&self) -> Json {
        let mut ids = Map::new();
        for (id, token, _) in self.iter() {
            ids.entry(token).or_insert(json!(id));
        }
        Json::Object(ids)
    }

    /// Tokens that are found in a text before it is split.
    fn added(&self) -> Vec<Json> {
        let added = self.iter().filter(|(_, _, kind)| matches!(*kind, UNKNOWN..=USER_DEFINED));
        let json = added.map(|(id, content, kind)| {
            json!({"id": id, "content": content, "special": kind != USER_DEFINED, "normalized": false,
                "single_word": false, "lstrip": false, "rstrip": false})
        });
        json.collect()
    }
}

impl Gguf {
    /// The tokenizer of the file's vocabulary.
    ///
    /// # Errors
    /// [`Error::Gguf`] with the key that is missing or of a kind that is not known, [`Error::Tokenizer`] if the
    /// vocabulary contradicts itself.
    pub fn tokenizer(&self) -> Result<Tokenizer> {
        let vocabulary = Vocabulary::of(self)?;
        let key = "tokenizer.ggml.model";
        let (parts, adds_bos) = match self.text(key)? {
            Some("gpt2") => self.byte_level(&vocabulary)?,
            Some("llama") => self.sentencepiece(&vocabulary)?,
            other => return Err(self.key_fault(key, MODELS, other.unwrap_or("none"))),
        };
        let special = self.special_tokens(&vocabulary)?;
        let added = vocabulary.added();
        let bos = self.flag("tokenizer.ggml.add_bos_token")?.unwrap_or(adds_bos);
        let eos = self.flag("tokenizer.ggml.add_eos_token")?.unwrap_or(false);
        let ends = [bos.then_some("bos_token"), eos.then_some("eos_token")];
        let mut tokenizer = json!({
            "version": "1.0", "truncation": null, "padding": null, "added_tokens": added,
            "post_processor": self.post_processor(ends, &special)?,
        });
        if let (Json::Object(all), Json::Object(parts)) = (&mut tokenizer, parts) {
            all.extend(parts);
        }
        let bytes = tokenizer.to_string().into_bytes();
        Tokenizer::from_bytes(&bytes, self.path.clone(), special, Vec::new())
    }

    /// The chat template, if the file has one.
    pub(crate) fn template(&self) -> Result<Option<ChatTemplate>> {
        let Some(source) = self.text("tokenizer.chat_template")? else { return Ok(None) };
        let special = self.special_tokens(&Vocabulary::of(self)?)?;
        let role = |role| special.get(role).unwrap_or_default();
        Ok(Some(ChatTemplate::new(source, role("bos_token"), role("eos_token"))))
    }

    fn special_tokens(&self, vocabulary: &Vocabulary<'_>) -> Result<SpecialTokens> {
        let mut roles = Vec::new();
        for (role, key) in [
            ("bos_token", "bos"),
            ("eos_token", "eos"),
            ("unk_token", "unknown"),
            ("pad_token", "padding"),
        ] {
            let key = format!("tokenizer.ggml.{key}_token_id");
            let Some(id) = self.unsigned(&key)? else { continue };
            let token = usize::try_from(id).ok().and_then(|id| vocabulary.tokens.get(id));
            let Some(token) = token else {
                // Files name tokens beyond the vocabulary for padding, which nothing here does.
                if role == "pad_token" {
                    continue;
                }
                let expected = format!("below {}, the number of tokens", vocabulary.tokens.len());
                return Err(self.key_fault(&key, &expected, id));
            };
            roles.push((role, token.as_str()));
        }
        Ok(SpecialTokens::of_roles(roles))
    }

    /// Adds the tokens of these roles before and after a text.
    fn post_processor(
        &self,
        [bos, eos]: [Option<&str>; 2],
        special: &SpecialTokens,
    ) -> Result<Json> {
        let mut tokens = Map::new();
        let mut token = |role: &str| {
            let key = format!("tokenizer.ggml.{}_id", role);
            let text = self.require(&key, "a token to add to texts", special.get(role))?;
            let id = self.unsigned(&key)?;
            tokens.insert(text.into(), json!({"id": text, "ids": [id], "tokens": [text]}));
            Ok::<_, Error>(json!({"SpecialToken": {"id": text, "type_id": 0}}))
        };
        let text = |id: &str| json!({"Sequence": {"id": id, "type_id": 0}});
        let (bos, eos) = (bos.map(&mut token).transpose()?, eos.map(&mut token).transpose()?);
        if bos.is_none() && eos.is_none() {
            return Ok(Json::Null);
        }
        let around = |texts: Vec<Json>| {
            bos.clone().into_iter().chain(texts).chain(eos.clone()).collect::<Vec<_>>()
        };
        Ok(json!({
            "type": "TemplateProcessing", "single": around(vec![text("A")]),
            "pair": around(vec![text("A"), text("B")]), "special_tokens": tokens,
        }))
    }

    /// Parts of a tokenizer.json for bytes that merge, and whether the begin token is added by default.
    fn byte_level(&self, vocabulary: &Vocabulary<'_>) -> Result<(Json, bool)> {
        let key = "tokenizer.ggml.pre";
        let name = self.text(key)?.unwrap_or_else(|| {
            tracing::warn!(
                file = %self.path.display(),
                "the file does not say how text is split (`{key}`); taking `default`"
            );
            "default"
        });
        let Some(pre) = PreTokenizer::named(name) else {
            return Err(self.key_fault(key, &PreTokenizer::known(), name));
        };
        let key = "tokenizer.ggml.merges";
        let Some(Value::Texts(merges)) = self.get(key) else {
            let got = self.get(key).map_or("none".to_owned(), Value::to_string);
            return Err(self.key_fault(key, "an array of texts", got));
        };
        let mut pairs = Vec::with_capacity(merges.len());
        for merge in merges {
            let pair = merge.split_once(' ');
            pairs.push(self.require(key, "two tokens with a space between", pair)?);
        }
        let bytes = json!({"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true,
            "use_regex": true});
        let parts = json!({
            "normalizer": pre.nfc.then(|| json!({"type": "NFC"})),
            "pre_tokenizer": pre.json(),
            "decoder": bytes,
            "model": {
                "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
                "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false,
                "ignore_merges": pre.ignore_merges, "vocab": vocabulary.ids(), "merges": pairs,
            },
        });
        Ok((parts, pre.adds_bos))
    }

    /// The same for pieces with scores.
    fn sentencepiece(&self, vocabulary: &Vocabulary<'_>) -> Result<(Json, bool)> {
        let key = "tokenizer.ggml.scores";
        let scores = match self.get(key) {
            Some(Value::Floats(scores)) if scores.len() == vocabulary.tokens.len() => scores,
            other => {
                let expected = format!("{} numbers, one for each token", vocabulary.tokens.len());
                let got = other.map_or("none".to_owned(), Value::to_string);
                return Err(self.key_fault(key, &expected, got));
            }
        };
        let merged =
            || vocabulary.iter().filter(|(.., kind)| matches!(*kind, NORMAL | USER_DEFINED));
        if let Some(got) = sentencepiece::too_long(merged().map(|(id, token, _)| (id, token))) {
            let expected = format!("pieces of at most {} bytes", sentencepiece::MOST_BYTES);
            return Err(self.key_fault("tokenizer.ggml.tokens", &expected, got));
        }
        let pieces: Vec<(&str, f32)> = merged().map(|(id, token, _)| (token, scores[id])).collect();
        let prefix = self.flag("tokenizer.ggml.add_space_prefix")?.unwrap_or(true);
        let unknown = vocabulary.iter().find(|(.., kind)| *kind == UNKNOWN);
        let parts = json!({
            "normalizer": sentencepiece::normalizer(prefix),
            "pre_tokenizer": null,
            "decoder": sentencepiece::decoder(prefix),
            "model": {
                "type": "BPE", "dropout": null, "unk_token": unknown.map(|(_, token, _)| token),
                "continuing_subword_prefix": null, "end_of_word_suffix": null, "fuse_unk": true,
                "byte_fallback": true, "ignore_merges": false, "vocab": vocabulary.ids(),
                "merges": sentencepiece::merges(&pieces),
            },
        });
        Ok((parts, true))
    }
}
