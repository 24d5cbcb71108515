//! Tokens that a folder adds to those of its `tokenizer.json`.

use std::path::Path;

use serde_json::Value;
use tokenizers::AddedToken;

use crate::checkpoint::json::JsonObject;
use crate::checkpoint::special_tokens::SpecialTokens;
use crate::checkpoint::text::is_file;
use crate::error::Result;

/// A token with its id.
#[derive(Clone, Debug)]
pub(crate) struct Added {
    id: u32,
    token: AddedToken,
}

/// The tokens that `added_tokens_decoder` in `tokenizer_config.json` and `added_tokens.json` name, by
/// their ids. Either may be absent.
pub(crate) fn from_dir(dir: &Path, special: &SpecialTokens) -> Result<Vec<Added>> {
    let mut added = Vec::new();
    let path = dir.join("tokenizer_config.json");
    if is_file(&path)?
        && let Some(tokens) = JsonObject::read(&path)?.object("added_tokens_decoder")?
    {
        for (id, value) in tokens.iter() {
            let expected = "a token with a string `content`, under its id";
            match (id.parse(), value.get("content").and_then(Value::as_str)) {
                (Ok(id), Some(content)) => {
                    let flag = |name: &str| value.get(name).and_then(Value::as_bool);
                    let is_special = flag("special").unwrap_or_else(|| special.contains(content));
                    let token = AddedToken::from(content, is_special)
                        .single_word(flag("single_word").unwrap_or(false))
                        .lstrip(flag("lstrip").unwrap_or(false))
                        .rstrip(flag("rstrip").unwrap_or(false))
                        .normalized(flag("normalized").unwrap_or(!is_special));
                    added.push(Added { id, token });
                }
                _ => return Err(tokens.invalid(id, expected, value)),
            }
        }
    }
    let path = dir.join("added_tokens.json");
    if is_file(&path)? {
        let tokens = JsonObject::read(&path)?;
        for (content, value) in tokens.iter() {
            let Some(id) = value.as_u64().and_then(|id| u32::try_from(id).ok()) else {
                return Err(tokens.invalid(content, "a token id", value));
            };
            let token = AddedToken::from(content, special.contains(content));
            added.push(Added { id, token });
        }
    }
    added.sort_by_key(|one| one.id);
    Ok(added)
}

/// Gives a tokenizer, which `bytes` describe, the tokens that it lacks, under their ids.
///
/// Where its own file says otherwise, the file is right: other files may be those of an earlier state.
pub(crate) fn complete(
    inner: &mut tokenizers::Tokenizer,
    bytes: &[u8],
    mut added: Vec<Added>,
) -> std::result::Result<(), String> {
    let known = inner.get_added_tokens_decoder();
    added.retain(|one| !known.values().any(|token| token.content == one.token.content));
    added.dedup_by(|a, b| a.token.content == b.token.content);
    added.retain(|one| {
        let content = &one.token.content;
        let own = (inner.token_to_id(content), inner.id_to_token(one.id));
        let is_free = match &own {
            (None, None) => true,
            (Some(id), _) => *id == one.id,
            (None, Some(_)) => false,
        };
        if !is_free {
            let id = one.id;
            tracing::warn!(
                "added token `{content}` with id {id} is left out: tokenizer.json has {own:?}"
            );
        }
        is_free
    });
    // Where ids have holes, the library would number the tokens itself.
    let missing = added.iter().filter(|one| inner.token_to_id(&one.token.content).is_none());
    let end = inner.get_vocab_size(true) as u32;
    if missing.clone().zip(end..).any(|(one, id)| one.id != id) {
        let mut file: Value = serde_json::from_slice(bytes).map_err(|e| e.to_string())?;
        if let Some(vocab) = file.pointer_mut("/model/vocab").and_then(Value::as_object_mut) {
            vocab.extend(missing.map(|one| (one.token.content.clone(), one.id.into())));
            *inner = tokenizers::Tokenizer::from_bytes(file.to_string().as_bytes())
                .map_err(|e| e.to_string())?;
        }
    }
    for one in &added {
        let token = one.token.clone();
        let added = match token.special {
            true => inner.add_special_tokens([token]),
            false => inner.add_tokens([token]),
        };
        added.map_err(|e| e.to_string())?;
        let content = &one.token.content;
        match inner.token_to_id(content) {
            Some(id) if id == one.id => {}
            got => {
                let (id, got) = (one.id, got.map_or("none".to_owned(), |id| id.to_string()));
                return Err(format!(
                    "added token `{content}` has id {id}, and {got} in the tokenizer"
                ));
            }
        }
    }
    Ok(())
}
