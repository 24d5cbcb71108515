use moa_models::{TokenLogprobs, Tokenizer};
use serde_json::{Map, Value, json};

/// Single tokens as texts.
pub(crate) struct TokenText<'a> {
    pub(crate) tokenizer: &'a Tokenizer,
}

impl TokenText<'_> {
    pub(crate) fn of(&self, id: u32) -> String {
        self.tokenizer.decode(&[id], false).unwrap_or_default()
    }

    /// Whether texts leave the token out.
    fn is_special(&self, id: u32) -> bool {
        self.tokenizer.decode(&[id], true).is_ok_and(|text| text.is_empty())
    }
}

/// A token as a text, with the logarithm of its probability; the first one of a prompt has none.
type Told = (String, Option<f32>);

struct Entry {
    own: Told,
    /// The likeliest in its place.
    top: Vec<Told>,
    /// Characters of the text that it stands for.
    chars: usize,
}

/// How likely the tokens of a choice were.
#[derive(Default)]
pub(crate) struct ChoiceLogprobs {
    tokens: Vec<Entry>,
}

impl ChoiceLogprobs {
    /// Adds a token; `is_literal` where the text has it though it is special.
    pub(crate) fn push(
        &mut self,
        text: &TokenText<'_>,
        token: u32,
        logprobs: Option<&TokenLogprobs>,
        is_literal: bool,
    ) {
        let top = logprobs.iter().flat_map(|own| &own.top);
        let top = top.map(|(id, logprob)| (text.of(*id), Some(*logprob))).collect();
        let own = text.of(token);
        let chars = if is_literal || !text.is_special(token) { own.chars().count() } else { 0 };
        self.tokens.push(Entry { own: (own, logprobs.map(|own| own.logprob)), top, chars });
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.tokens.is_empty()
    }

    /// In the shape of chat completions.
    pub(crate) fn chat(self) -> Value {
        json!({ "content": self.entries(), "refusal": null })
    }

    /// One object a token, as chat completions and responses tell it.
    pub(crate) fn entries(self) -> Vec<Value> {
        let one = |token: &String, logprob: Option<f32>| {
            // A part of a character has no text of its own.
            let is_whole = !token.contains(char::REPLACEMENT_CHARACTER);
            let bytes = is_whole.then_some(token.as_bytes());
            json!({ "token": token, "logprob": finite(logprob), "bytes": bytes })
        };
        self.tokens
            .iter()
            .map(|Entry { own: (token, logprob), top, .. }| {
                let mut entry = one(token, *logprob);
                let top: Vec<Value> = top.iter().map(|(token, p)| one(token, *p)).collect();
                entry["top_logprobs"] = top.into();
                entry
            })
            .collect()
    }

    /// In the shape of text completions. `offset` is the place in the text of the first token that was not told.
    pub(crate) fn text(self, offset: &mut usize) -> Value {
        let (mut tokens, mut logprobs, mut tops, mut offsets) =
            (Vec::new(), Vec::new(), Vec::<Value>::new(), Vec::new());
        for Entry { own: (token, logprob), top, chars } in self.tokens {
            offsets.push(*offset);
            *offset += chars;
            let top: Map<String, Value> =
                top.into_iter().map(|(token, p)| (token, finite(p))).collect();
            tokens.push(token);
            tops.push(if logprob.is_some() { top.into() } else { Value::Null });
            logprobs.push(finite(logprob));
        }
        json!({
            "tokens": tokens,
            "token_logprobs": logprobs,
            "top_logprobs": tops,
            "text_offset": offsets,
        })
    }
}

/// JSON has no infinity.
fn finite(logprob: Option<f32>) -> Value {
    json!(logprob.map(|logprob| logprob.max(-9999.0)))
}
