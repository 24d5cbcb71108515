use std::sync::Arc;

use moa_models::Constraint;
use serde_json::Value;

use crate::http::error::ApiError;
use crate::state::State;

/// What the texts of a request must be, which this build cannot see to.
#[derive(Debug)]
pub(crate) struct Grammar;

/// Nothing.
#[derive(Debug, Default)]
pub(crate) struct Vocabulary(());

impl Grammar {
    /// JSON of this schema.
    pub(crate) fn schema(_: Value) -> Arc<Self> {
        Arc::new(Self)
    }

    /// Texts that match a regular expression.
    pub(crate) fn regex(_: &str) -> Arc<Self> {
        Arc::new(Self)
    }

    /// Texts of a grammar.
    pub(crate) fn lark(_: String) -> Arc<Self> {
        Arc::new(Self)
    }

    /// Refuses.
    pub(crate) async fn prepare(self: &Arc<Self>, state: &Arc<State>) -> Result<(), ApiError> {
        let _ = &state.text.vocabulary;
        Err(refused())
    }

    /// None.
    pub(crate) fn constraint(&self) -> Result<Box<dyn Constraint>, ApiError> {
        Err(refused())
    }
}

fn refused() -> ApiError {
    ApiError {
        code: Some("unsupported_parameter"),
        ..ApiError::invalid(
            "this server was built without the feature `grammar`: a `response_format` of JSON, \
             `structured_outputs` and a `tool_choice` that asks for a call are not supported",
        )
    }
}
