use std::collections::VecDeque;
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::Result;
use crate::checkpoint::tokenizer::Tokenizer;

/// Remembers the tokens of texts that end with a special token, so that of a conversation which goes on only the
/// last turns are cut into tokens.
///
/// Tokenizers cut a text at special tokens before they do anything else, and nothing on one side of such a token
/// changes what is on the other.
///
/// ```no_run
/// use moa_models::{KnownTexts, Tokenizer};
///
/// let tokenizer = Tokenizer::from_dir("model")?;
/// let known = KnownTexts::new(&tokenizer, 4 << 20);
/// let first = known.encode_within("<s>How are you?</s><s>Well.</s>", 1024)?;
/// // Cuts the last sentence into tokens.
/// let second = known.encode_within("<s>How are you?</s><s>Well.</s><s>Good!", 1024)?;
/// assert_eq!(second[..first.len()], first);
/// # Ok::<(), moa_models::Error>(())
/// ```
#[derive(Debug)]
pub struct KnownTexts {
    tokenizer: Tokenizer,
    /// Special tokens that take nothing of the text beside them, and their ids.
    marks: Vec<(String, u32)>,
    limit: usize,
    /// The longest unused first.
    known: Mutex<VecDeque<Known>>,
}

/// A text that ends with a special token.
#[derive(Debug)]
struct Known {
    text: Box<str>,
    tokens: Box<[u32]>,
    /// Bytes of that token in the text.
    mark: usize,
}

impl Known {
    fn bytes(&self) -> usize {
        self.text.len() + size_of_val(&self.tokens[..])
    }
}

impl KnownTexts {
    /// One that remembers at most so many bytes of texts and tokens.
    pub fn new(tokenizer: &Tokenizer, limit: usize) -> Self {
        let (tokenizer, known) = (tokenizer.clone(), Mutex::default());
        Self { marks: tokenizer.marks(), tokenizer, limit, known }
    }

    /// The tokens of a text as [`Tokenizer::encode_within`] gives them without `add_special`.
    ///
    /// # Errors
    /// As [`Tokenizer::encode_within`].
    pub fn encode_within(&self, text: &str, limit: usize) -> Result<Vec<u32>> {
        let tokens = match self.beginning(text) {
            Some((mut tokens, read, mark)) => {
                let rest = self.tokenizer.encode_within(&text[read - mark..], false, limit)?;
                match rest.split_first() {
                    Some((first, rest)) if tokens.last() == Some(first) => {
                        tokens.extend_from_slice(rest);
                        tokens
                    }
                    _ => self.tokenizer.encode_within(text, false, limit)?,
                }
            }
            None => self.tokenizer.encode_within(text, false, limit)?,
        };
        self.remember(text, &tokens);
        Ok(tokens)
    }

    fn known(&self) -> MutexGuard<'_, VecDeque<Known>> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The tokens of the longest known beginning of a text, its bytes, and those of its last token.
    fn beginning(&self, text: &str) -> Option<(Vec<u32>, usize, usize)> {
        let mut known = self.known();
        let fits = |(_, known): &(usize, &Known)| text.starts_with(&*known.text);
        let longest = known.iter().enumerate().filter(fits).max_by_key(|(_, k)| k.text.len());
        let at = longest.map(|(at, _)| at)?;
        let one = known.remove(at)?;
        let found = (one.tokens.to_vec(), one.text.len(), one.mark);
        known.push_back(one);
        Some(found)
    }

    fn remember(&self, text: &str, tokens: &[u32]) {
        fn last<'m>(text: &str, (mark, id): &'m (String, u32)) -> Option<(usize, &'m str, u32)> {
            text.rfind(mark.as_str()).map(|at| (at + mark.len(), mark.as_str(), *id))
        }
        let Some((end, mark, id)) = self.marks.iter().filter_map(|mark| last(text, mark)).max()
        else {
            return;
        };
        let Some(at) = tokens.iter().rposition(|token| *token == id) else { return };
        // Not where one of them became something else.
        if text.matches(mark).count() != tokens.iter().filter(|token| **token == id).count() {
            return;
        }
        let mark = mark.len();
        let new = Known { text: text[..end].into(), tokens: tokens[..=at].into(), mark };
        let mut known = self.known();
        if new.bytes() > self.limit || known.iter().any(|known| known.text == new.text) {
            return;
        }
        known.push_back(new);
        let mut bytes: usize = known.iter().map(Known::bytes).sum();
        while bytes > self.limit
            && let Some(oldest) = known.pop_front()
        {
            bytes -= oldest.bytes();
        }
    }
}
