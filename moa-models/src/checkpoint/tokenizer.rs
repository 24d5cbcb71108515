use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::checkpoint::special_tokens::SpecialTokens;
use crate::error::{Error, Result};

/// The tokenizer of a model folder; clones share it.
///
/// Truncation and padding that a `tokenizer.json` may ask for are switched off: a prompt is
/// never shortened silently.
#[derive(Clone, Debug)]
pub struct Tokenizer {
    inner: Arc<tokenizers::Tokenizer>,
    path: PathBuf,
    bos: Option<u32>,
    eos: Option<u32>,
}

impl Tokenizer {
    /// Reads `tokenizer.json` in `dir`, and the begin and end tokens' names from
    /// `tokenizer_config.json` or `special_tokens_map.json` where they exist.
    ///
    /// # Errors
    /// [`Error::Io`] and [`Error::Tokenizer`] for `tokenizer.json`, [`Error::Json`] and
    /// [`Error::Config`] for the other two.
    pub fn from_dir(dir: impl AsRef<Path>) -> Result<Self> {
        let dir = dir.as_ref();
        let path = dir.join("tokenizer.json");
        let bytes = std::fs::read(&path).map_err(|source| Error::io(&path, source))?;
        Self::from_bytes(&bytes, path, &SpecialTokens::from_dir(dir)?)
    }

    /// Reads the text of a `tokenizer.json` that came from `path`.
    pub(crate) fn from_bytes(bytes: &[u8], path: PathBuf, special: &SpecialTokens) -> Result<Self> {
        let fail = |reason: String| Error::Tokenizer { path: path.clone(), reason };
        let mut inner =
            tokenizers::Tokenizer::from_bytes(bytes).map_err(|e| fail(e.to_string()))?;
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
        Ok(Self { inner: Arc::new(inner), path, bos, eos })
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
        let encoding = self.inner.encode_fast(text, add_special).map_err(|e| self.fail(e))?;
        Ok(encoding.get_ids().to_vec())
    }

    /// The text of `ids`, without special tokens when `skip_special`. Bytes that are not UTF-8
    /// become U+FFFD.
    ///
    /// # Errors
    /// [`Error::Tokenizer`] when the tokenizer refuses the ids.
    pub fn decode(&self, ids: &[u32], skip_special: bool) -> Result<String> {
        self.inner.decode(ids, skip_special).map_err(|e| self.fail(e))
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

    /// The id of a token by its exact text.
    #[must_use]
    pub fn token_id(&self, token: &str) -> Option<u32> {
        self.inner.token_to_id(token)
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
    /// A model may have more rows than its tokenizer has tokens: they are padded.
    ///
    /// # Errors
    /// [`Error::TokenizerVocabulary`] with the highest token.
    pub fn check_vocab_size(&self, vocab_size: usize) -> Result<()> {
        match self.inner.get_vocab(true).into_iter().max_by_key(|(_, id)| *id) {
            Some((token, id)) if id as usize >= vocab_size => {
                Err(Error::TokenizerVocabulary { path: self.path.clone(), token, id, vocab_size })
            }
            _ => Ok(()),
        }
    }

    fn fail(&self, reason: impl std::fmt::Display) -> Error {
        Error::Tokenizer { path: self.path.clone(), reason: reason.to_string() }
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
