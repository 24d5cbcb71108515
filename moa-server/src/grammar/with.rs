use std::fmt::Display;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use llguidance::api::TopLevelGrammar;
use llguidance::toktrie::{ApproximateTokEnv, TokEnv, TokRxInfo, TokTrie};
use llguidance::{Matcher, ParserFactory, token_bytes_from_tokenizer_json};
use moa_models::{Constraint, Error};
use serde_json::{Value, json};

use crate::http::error::ApiError;
use crate::http::submit::blocking;
use crate::state::{State, TextSide};

/// The bytes of all tokens, which are laid out when they are first needed.
#[derive(Default)]
pub(crate) struct Vocabulary(OnceLock<Result<Arc<ParserFactory>, String>>);

impl Vocabulary {
    fn factory(&self, text: &TextSide, vocab_size: usize) -> Result<Arc<ParserFactory>, String> {
        self.0.get_or_init(|| build(text, vocab_size).map_err(|e| e.to_string())).clone()
    }
}

type BuildResult<T> = Result<T, Box<dyn std::error::Error + Send + Sync>>;

fn build(text: &TextSide, vocab_size: usize) -> BuildResult<Arc<ParserFactory>> {
    let tokenizer: Value = serde_json::from_str(&text.tokenizer.to_json()?)?;
    let mut bytes = token_bytes_from_tokenizer_json(&tokenizer)?;
    bytes.resize(vocab_size, Vec::new());
    let eos = text.eos.first().copied().ok_or("the model has no end token")?;
    let info = TokRxInfo::new(u32::try_from(vocab_size)?, eos);
    let env: TokEnv = Arc::new(ApproximateTokEnv::new(TokTrie::from(&info, &bytes)));
    let mut factory = ParserFactory::new_simple(&env)?;
    factory.quiet();
    Ok(Arc::new(factory))
}

/// What the texts of a request must be.
pub(crate) struct Grammar {
    grammar: TopLevelGrammar,
    /// At the beginning of a text, with the tokens that may end it.
    begun: Mutex<Option<(Matcher, Vec<u32>)>>,
}

impl Grammar {
    /// JSON of this schema.
    pub(crate) fn schema(mut schema: Value) -> Arc<Self> {
        if let Some(object) = schema.as_object_mut() {
            // Small models go on with white space for as long as they may.
            let compact = json!({ "whitespace_flexible": false, "item_separator": ", ", "key_separator": ": " });
            object.insert("x-guidance".to_owned(), compact);
        }
        Self::of(TopLevelGrammar::from_json_schema(schema))
    }

    /// Texts that match a regular expression as a whole.
    pub(crate) fn regex(regex: &str) -> Arc<Self> {
        Self::of(TopLevelGrammar::from_regex(regex))
    }

    /// Texts of a grammar in Lark's notation.
    pub(crate) fn lark(grammar: String) -> Arc<Self> {
        Self::of(TopLevelGrammar::from_lark(grammar))
    }

    fn of(grammar: TopLevelGrammar) -> Arc<Self> {
        Arc::new(Self { grammar, begun: Mutex::new(None) })
    }

    /// Checks that it can be kept to.
    pub(crate) async fn prepare(self: &Arc<Self>, state: &Arc<State>) -> Result<(), ApiError> {
        let (own, of) = (Arc::clone(self), Arc::clone(state));
        blocking(move || own.begin(&of)).await?
    }

    fn begin(&self, state: &State) -> Result<(), ApiError> {
        let fault = |reason: &dyn Display| {
            ApiError::invalid(format!("the schema or grammar cannot be kept to: {reason}"))
        };
        let factory = state.text.vocabulary.factory(&state.text, state.model.vocab_size);
        let factory = factory.map_err(|reason| fault(&reason))?;
        let mut matcher = Matcher::new(factory.create_parser(self.grammar.clone()));
        // It notes what is wrong with a schema, and says so when it is first asked.
        matcher.compute_mask().map_err(|error| fault(&error))?;
        let mut begun = self.begun.lock().unwrap_or_else(PoisonError::into_inner);
        *begun = Some((matcher, state.text.eos.clone()));
        Ok(())
    }

    /// A constraint for one choice.
    pub(crate) fn constraint(&self) -> Result<Box<dyn Constraint>, ApiError> {
        let begun = self.begun.lock().unwrap_or_else(PoisonError::into_inner);
        let begun =
            begun.as_ref().ok_or_else(|| ApiError::invalid("a grammar that was not begun"))?;
        Ok(Box::new(Guide { matcher: begun.0.deep_clone(), eos: begun.1.clone() }))
    }
}

/// One text on its way through a grammar.
struct Guide {
    matcher: Matcher,
    eos: Vec<u32>,
}

impl std::fmt::Debug for Guide {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Guide")
    }
}

impl Constraint for Guide {
    fn restrict(&mut self, logits: &mut [f32]) -> moa_models::Result<()> {
        let mask = self.matcher.compute_mask_or_eos().map_err(failed)?;
        let may_end = self.eos.first().is_some_and(|eos| mask.is_allowed(*eos));
        for (id, logit) in (0..).zip(logits) {
            let is_end = self.eos.contains(&id);
            if !(if is_end { may_end } else { mask.is_allowed(id) }) {
                *logit = f32::NEG_INFINITY;
            }
        }
        Ok(())
    }

    fn accept(&mut self, token: u32) -> moa_models::Result<bool> {
        // The parser knows one token that ends a text; a model may have several.
        if self.eos.contains(&token) {
            return Ok(true);
        }
        self.matcher.consume_token(token).map_err(failed)?;
        Ok(self.matcher.is_stopped())
    }
}

fn failed(error: impl Display) -> Error {
    Error::Backend(format!("grammar: {error}").into())
}
