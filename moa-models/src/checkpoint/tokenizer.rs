use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

use crate::checkpoint::added_tokens::{self, Added};
use crate::checkpoint::found;
use crate::checkpoint::json::JsonObject;
use crate::checkpoint::safetensors::file_names;
use crate::checkpoint::sentencepiece_model::SentencePieceModel;
use crate::checkpoint::special_tokens::SpecialTokens;
use crate::checkpoint::text::{is_file, read_bytes};
use crate::checkpoint::token_bytes;
use crate::checkpoint::tokenizer_file::{self, guarded};
use crate::error::{Error, Result};

/// The tokenizer of a model folder; clones share it.
///
/// Truncation and padding that a `tokenizer.json` may ask for are switched off: a prompt is
/// never shortened silently.
#[derive(Clone, Debug)]
pub struct Tokenizer {
    inner: Arc<tokenizers::Tokenizer>,
    path: PathBuf,
    special: Arc<SpecialTokens>,
    bos: Option<u32>,
    eos: Option<u32>,
    /// Most bytes of a text that become one token, where that is known; found when it is first asked for.
    most_bytes: Arc<OnceLock<Option<usize>>>,
}

impl Tokenizer {
    /// Reads `tokenizer.json` in `dir`, or where there is none SentencePiece's `tokenizer.model`, the begin and end tokens' names from
    /// `tokenizer_config.json` or `special_tokens_map.json`, and further tokens from
    /// `tokenizer_config.json` and `added_tokens.json`, where they exist.
    ///
    /// # Errors
    /// [`Error::NoTokenizer`] if there is neither, [`Error::Io`], [`Error::DanglingLink`],
    /// [`Error::LfsPointer`] and [`Error::Tokenizer`] for it, [`Error::Json`] and
    /// [`Error::Config`] for the others.
    pub fn from_dir(dir: impl AsRef<Path>) -> Result<Self> {
        let dir = dir.as_ref();
        let path = dir.join("tokenizer.json");
        let mut special = SpecialTokens::from_dir(dir)?;
        if is_file(&path)? {
            let bytes = read_bytes(&path)?;
            let added = added_tokens::from_dir(dir, &special)?;
            return Self::from_bytes(&bytes, path, special, added);
        }
        let path = dir.join("tokenizer.model");
        let model = match is_file(&path)? {
            true => SentencePieceModel::parse(&read_bytes(&path)?),
            false => None,
        };
        let Some(model) = model else {
            return Err(Error::NoTokenizer { path: dir.to_owned(), got: other_tokenizer(dir) });
        };
        model.check().map_err(|reason| Error::Tokenizer { path: path.clone(), reason })?;
        special.complete_with(model.roles());
        let added = added_tokens::from_dir(dir, &special)?;
        let bytes = model.to_json(adds_ends(dir)?).to_string().into_bytes();
        Self::from_bytes(&bytes, path, special, added)
    }

    /// Reads the text of a `tokenizer.json` that came from `path`.
    pub(crate) fn from_bytes(
        bytes: &[u8],
        path: PathBuf,
        special: SpecialTokens,
        added: Vec<Added>,
    ) -> Result<Self> {
        let bytes = bytes.strip_prefix(b"\xef\xbb\xbf").unwrap_or(bytes);
        let fail = |reason: String| Error::Tokenizer { path: path.clone(), reason };
        let mut inner = tokenizer_file::parse(bytes).map_err(fail)?;
        added_tokens::complete(&mut inner, bytes, added).map_err(fail)?;
        inner.with_truncation(None).map_err(|e| fail(e.to_string()))?;
        inner.with_padding(None);
        let id = |role: &str| match special.get(role) {
            None => Ok(None),
            Some(token) => inner
                .token_to_id(token)
                .map(Some)
                .ok_or_else(|| fail(format!("{role} `{token}` is not in the vocabulary"))),
        };
        let (bos, eos) = (id("bos_token")?, id("eos_token")?);
        Ok(Self {
            inner: Arc::new(inner),
            path,
            special: Arc::new(special),
            bos,
            eos,
            most_bytes: Arc::default(),
        })
    }

    /// What its file would be if the tokenizer were saved, tokens from other files included.
    pub(crate) fn json(&self) -> Result<serde_json::Value> {
        let text = self.inner.to_string(false).map_err(|e| self.fail(e))?;
        serde_json::from_str(&text).map_err(|e| self.fail(e))
    }

    /// The file that it was read from.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// The token ids of `text`.
    ///
    /// With `add_special` the tokenizer adds what it was made to add, for Llama the begin token.
    /// A text from a [`ChatTemplate`](crate::ChatTemplate) has it already. Special tokens
    /// spelled out in `text` become those tokens.
    ///
    /// # Errors
    /// [`Error::Tokenizer`] when the tokenizer refuses the text.
    pub fn encode(&self, text: &str, add_special: bool) -> Result<Vec<u32>> {
        let encoding = guarded(|| self.inner.encode_fast(text, add_special));
        Ok(encoding.map_err(|e| self.fail(e))?.get_ids().to_vec())
    }

    /// The token ids of a text that is to have at most `limit`: one that cannot, by its bytes, is refused before
    /// it is cut into tokens, which takes much memory. A result may still be longer.
    ///
    /// # Errors
    /// [`Error::ContextExceeded`] with the fewest tokens that it could have, [`Error::Tokenizer`] as
    /// [`encode`](Self::encode).
    pub fn encode_within(&self, text: &str, add_special: bool, limit: usize) -> Result<Vec<u32>> {
        if text.len() > limit
            && let Some(most) = *self.most_bytes.get_or_init(|| token_bytes::most(&self.inner))
        {
            let asked = text.len().div_ceil(most);
            if asked > limit {
                return Err(Error::ContextExceeded { asked, limit });
            }
        }
        self.encode(text, add_special)
    }

    /// The text of `ids`, without special tokens when `skip_special`. Bytes that are not UTF-8
    /// become U+FFFD.
    ///
    /// # Errors
    /// [`Error::Tokenizer`] when the tokenizer refuses the ids.
    pub fn decode(&self, ids: &[u32], skip_special: bool) -> Result<String> {
        guarded(|| self.inner.decode(ids, skip_special)).map_err(|e| self.fail(e))
    }

    /// Whether [`decode`](Self::decode) drops a token before anything else, as it is special or none that is known.
    fn is_left_out(&self, id: u32) -> bool {
        let added = self.inner.get_added_vocabulary();
        let token = added.simple_id_to_token(id).or_else(|| self.inner.id_to_token(id));
        token.is_none_or(|token| added.is_special_token(&token))
    }

    /// A decoder that takes token by token and leaves out special tokens.
    #[must_use]
    pub fn stream(&self) -> TokenStream {
        TokenStream {
            tokenizer: self.clone(),
            window: Vec::new(),
            returned: 0,
            shown: String::new(),
        }
    }

    /// [`stream`](Self::stream) of a text that follows on `prompt`, whose first space it keeps: tokenizers
    /// of Llama 2's kind leave out the space before the first word of a text.
    ///
    /// # Errors
    /// [`Error::Tokenizer`] when the tokenizer refuses the ids of `prompt`.
    pub fn stream_after(&self, prompt: &[u32]) -> Result<TokenStream> {
        // Enough for a character that the prompt may end inside of.
        let window = prompt[prompt.len().saturating_sub(8)..].to_vec();
        let (returned, shown) = (window.len(), self.decode(&window, true)?);
        Ok(TokenStream { tokenizer: self.clone(), window, returned, shown })
    }

    /// The id of a token by its exact text.
    #[must_use]
    pub fn token_id(&self, token: &str) -> Option<u32> {
        self.inner.token_to_id(token)
    }

    /// The id of a token that is special, by its exact text: none that a text has to be searched for, as
    /// texts leave it out.
    #[must_use]
    pub fn special_token_id(&self, token: &str) -> Option<u32> {
        let is_special = self.inner.get_added_vocabulary().is_special_token(token);
        self.token_id(token).filter(|_| is_special)
    }

    /// Special tokens at which texts are cut whatever stands beside them, and their ids.
    pub(crate) fn marks(&self) -> Vec<(String, u32)> {
        let added = self.inner.get_added_tokens_decoder();
        let mut marks: Vec<(String, u32)> = added
            .iter()
            .filter(|(_, t)| t.special && !(t.single_word || t.lstrip || t.rstrip || t.normalized))
            .map(|(id, token)| (token.content.clone(), *id))
            .collect();
        // One that is a part of another is not always itself.
        let is_part = |text: &str, of: &str| of != text && of.contains(text);
        marks.retain(|(text, _)| !added.values().any(|other| is_part(text, &other.content)));
        marks
    }

    pub(crate) fn special_tokens(&self) -> &SpecialTokens {
        &self.special
    }

    /// The tokenizer as the text of a `tokenizer.json`, whatever file it came from.
    ///
    /// # Errors
    /// [`Error::Tokenizer`] if it cannot be written.
    pub fn to_json(&self) -> Result<String> {
        self.inner.to_string(false).map_err(|e| self.fail(e))
    }

    /// Number of tokens, added ones included.
    #[must_use]
    pub fn vocab_size(&self) -> usize {
        self.inner.get_vocab_size(true)
    }

    /// The begin-of-sequence token.
    #[must_use]
    pub fn bos_id(&self) -> Option<u32> {
        self.bos
    }

    /// The end-of-sequence token. A chat model may end its turn with others too; see
    /// [`GenerationConfig`](crate::GenerationConfig).
    #[must_use]
    pub fn eos_id(&self) -> Option<u32> {
        self.eos
    }

    /// Checks that every token has a row in an embedding of `vocab_size` rows.
    ///
    /// A model may have more rows than its tokenizer has tokens: they are padded. And a few tokens that
    /// were added to the tokenizer, such as `<pad>`, may have no row: a prompt that holds one is refused.
    ///
    /// # Errors
    /// [`Error::TokenizerVocabulary`] with the highest token that a text can be made of, or the begin or
    /// end token, beyond the embedding.
    pub fn check_vocab_size(&self, vocab_size: usize) -> Result<()> {
        let fail = |(token, id)| {
            Err(Error::TokenizerVocabulary { path: self.path.clone(), token, id, vocab_size })
        };
        let beyond = |id: &u32| *id as usize >= vocab_size;
        let role = [self.bos, self.eos].into_iter().flatten().find(beyond);
        if let Some(id) = role {
            return fail((self.inner.id_to_token(id).unwrap_or_default(), id));
        }
        let added = self.inner.get_added_tokens_decoder();
        let tokens = self.inner.get_vocab(true).into_iter().filter(|(_, id)| beyond(id));
        let (padding, tokens): (Vec<_>, Vec<_>) =
            tokens.partition(|(_, id)| added.contains_key(id));
        if let Some(highest) = tokens.into_iter().max_by_key(|(_, id)| *id) {
            return fail(highest);
        }
        if !padding.is_empty() {
            let names: Vec<_> = padding.iter().map(|(token, _)| token.as_str()).collect();
            tracing::info!("added tokens without a row in the embedding: {}", names.join(" "));
        }
        Ok(())
    }

    /// Checks that every token has the same id in another tokenizer.
    ///
    /// # Errors
    /// [`Error::DraftVocabulary`] with the first one that has not.
    pub(crate) fn check_same(&self, other: &Self) -> Result<()> {
        if Arc::ptr_eq(&self.inner, &other.inner) {
            return Ok(());
        }
        let differs = |(token, id): &(String, u32)| other.token_id(token) != Some(*id);
        let all = self.inner.get_vocab(true).into_iter();
        match all.filter(differs).min_by_key(|(_, id)| *id) {
            None => Ok(()),
            Some((token, id)) => {
                let got = other.token_id(&token);
                Err(Error::DraftVocabulary { path: other.path.clone(), token, id, got })
            }
        }
    }

    fn fail(&self, reason: impl std::fmt::Display) -> Error {
        Error::Tokenizer { path: self.path.clone(), reason: reason.to_string() }
    }
}

/// Whether texts get a begin and an end token, where the tokenizer's own file does not say: as Llama's do,
/// unless `tokenizer_config.json` says otherwise.
fn adds_ends(dir: &Path) -> Result<[bool; 2]> {
    let path = dir.join("tokenizer_config.json");
    if !is_file(&path)? {
        return Ok([true, false]);
    }
    let config = JsonObject::read(&path)?;
    let flag = |field, default| Ok::<_, Error>(config.flag(field)?.unwrap_or(default));
    Ok([flag("add_bos_token", true)?, flag("add_eos_token", false)?])
}

/// What a folder without `tokenizer.json` has instead.
fn other_tokenizer(dir: &Path) -> String {
    let files = ["tokenizer.model", "tekken.json", "vocab.json", "vocab.txt", "spiece.model"];
    let there: Vec<_> = files.into_iter().filter(|file| dir.join(file).is_file()).collect();
    match file_names(dir).ok().and_then(|names| found::gguf(&names)) {
        Some(file) if there.is_empty() => file,
        None if there.is_empty() => "no tokenizer at all".to_owned(),
        _ => there.join(", "),
    }
}

/// Turns tokens into text one by one, holding back bytes that do not yet make a character.
///
/// The pieces and the rest from [`finish`](Self::finish) join to what
/// [`Tokenizer::decode`] makes of all tokens at once without special ones, as long as the tokens are UTF-8.
/// (`tokenizers::DecodeStream` does the same, but fails for good on bytes that are not, which a
/// model may well generate, and cannot return its rest.)
#[derive(Clone, Debug)]
pub struct TokenStream {
    tokenizer: Tokenizer,
    /// Tokens since the last text but one was returned: those before have their influence on the
    /// spaces between.
    window: Vec<u32>,
    /// Tokens of the window whose text was returned.
    returned: usize,
    /// The text of those tokens.
    shown: String,
}

impl TokenStream {
    /// Takes the next token; returns the text that became certain, if any did.
    ///
    /// # Errors
    /// [`Error::Tokenizer`] when the tokenizer refuses the id.
    pub fn push(&mut self, id: u32) -> Result<Option<String>> {
        // They have no influence on other tokens' text, and would stay in the window until one has some.
        if self.tokenizer.is_left_out(id) {
            return Ok(None);
        }
        self.window.push(id);
        let text = self.tokenizer.decode(&self.window, true)?;
        // No character has more than 4 bytes and no token fewer than one, so a longer wait is for
        // nothing: the bytes are broken.
        let waiting = self.window.len() - self.returned;
        if text.ends_with(char::REPLACEMENT_CHARACTER) && waiting < 8 {
            return Ok(None);
        }
        let fresh = self.fresh(&text).to_owned();
        if fresh.is_empty() {
            return Ok(None);
        }
        self.window.drain(..self.returned);
        self.returned = self.window.len();
        self.shown = self.tokenizer.decode(&self.window, true)?;
        Ok(Some(fresh))
    }

    /// Ends the text; returns what was held back, broken bytes as U+FFFD. The stream can then
    /// take another text.
    ///
    /// # Errors
    /// [`Error::Tokenizer`] when the tokenizer refuses the ids.
    pub fn finish(&mut self) -> Result<Option<String>> {
        let text = self.tokenizer.decode(&self.window, true)?;
        let rest = self.fresh(&text).to_owned();
        *self = self.tokenizer.stream();
        Ok(Some(rest).filter(|rest| !rest.is_empty()))
    }

    /// What `text`, decoded from the window, adds to the text returned.
    fn fresh<'t>(&self, text: &'t str) -> &'t str {
        // Not a plain prefix: broken bytes after a character made of byte tokens turn that
        // character into U+FFFD in hindsight.
        let same = text.chars().zip(self.shown.chars()).take_while(|(a, b)| a == b);
        let len: usize = same.map(|(a, _)| a.len_utf8()).sum();
        &text[len..]
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    // They once stayed in the window until a token had text, so that each cost as much as all before it.
    #[test]
    fn tokens_without_text_are_not_kept() -> Result<()> {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../assets/moa-tiny");
        let tokenizer = Tokenizer::from_dir(folder)?;
        let Some(begin) = tokenizer.bos else { panic!("no begin token") };
        let word = tokenizer.encode(" word", false)?;
        let mut stream = tokenizer.stream();
        let (mut ids, mut text) = (Vec::new(), String::new());
        for without in [begin, 1 << 20] {
            for id in std::iter::repeat_n(without, 1000).chain(word.iter().copied()) {
                ids.push(id);
                text.push_str(&stream.push(id)?.unwrap_or_default());
                assert!(
                    stream.window.len() <= 2 * word.len(),
                    "{} of {}",
                    stream.window.len(),
                    ids.len()
                );
            }
        }
        text.push_str(&stream.finish()?.unwrap_or_default());
        assert_eq!(text, tokenizer.decode(&ids, true)?);
        Ok(())
    }
}
