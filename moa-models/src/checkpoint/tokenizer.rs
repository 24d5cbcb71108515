use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::checkpoint::added_tokens::{self, Added};
use crate::checkpoint::special_tokens::SpecialTokens;
use crate::checkpoint::text::{is_file, read_bytes};
use crate::checkpoint::tokenizer_file;
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
}

impl Tokenizer {
    /// Reads `tokenizer.json` in `dir`, the begin and end tokens' names from
    /// `tokenizer_config.json` or `special_tokens_map.json`, and further tokens from
    /// `tokenizer_config.json` and `added_tokens.json`, where they exist.
    ///
    /// # Errors
    /// [`Error::NoTokenizer`] if there is no `tokenizer.json`, [`Error::Io`], [`Error::DanglingLink`],
    /// [`Error::LfsPointer`] and [`Error::Tokenizer`] for it, [`Error::Json`] and
    /// [`Error::Config`] for the others.
    pub fn from_dir(dir: impl AsRef<Path>) -> Result<Self> {
        let dir = dir.as_ref();
        let path = dir.join("tokenizer.json");
        if !is_file(&path)? {
            return Err(Error::NoTokenizer { path: dir.to_owned(), got: other_tokenizer(dir) });
        }
        let bytes = read_bytes(&path)?;
        let special = SpecialTokens::from_dir(dir)?;
        let added = added_tokens::from_dir(dir, &special)?;
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
        Ok(Self { inner: Arc::new(inner), path, special: Arc::new(special), bos, eos })
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

    pub(crate) fn special_tokens(&self) -> &SpecialTokens {
        &self.special
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

    fn fail(&self, reason: impl std::fmt::Display) -> Error {
        Error::Tokenizer { path: self.path.clone(), reason: reason.to_string() }
    }
}

/// What a folder without `tokenizer.json` has instead.
fn other_tokenizer(dir: &Path) -> String {
    let files = ["tokenizer.model", "tekken.json", "vocab.json", "vocab.txt", "spiece.model"];
    let there: Vec<_> = files.into_iter().filter(|file| dir.join(file).is_file()).collect();
    if there.is_empty() { "no tokenizer at all".to_owned() } else { there.join(", ") }
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
