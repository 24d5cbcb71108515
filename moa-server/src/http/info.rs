//! What the server says of itself.

use std::sync::atomic::Ordering::SeqCst;

use axum::http::{HeaderValue, StatusCode, header};
use axum::response::Response;
use serde_json::json;

use super::error::{ApiError, json_response, text_response};
use crate::state::State;

pub(crate) fn models(state: &State) -> Response {
    json_response(&json!({ "object": "list", "data": [state.model_object()] }))
}

pub(crate) fn model(state: &State, name: &str) -> Result<Response, ApiError> {
    match name == state.model.name {
        true => Ok(json_response(&state.model_object())),
        false => Err(ApiError {
            code: Some("model_not_found"),
            ..ApiError::new(StatusCode::NOT_FOUND, format!("the model `{name}` does not exist"))
        }),
    }
}

pub(crate) fn health(state: &State) -> Result<Response, ApiError> {
    match state.stopping.load(SeqCst) {
        false => Ok(json_response(&json!({ "status": "ok" }))),
        true => Err(ApiError::stopping()),
    }
}

pub(crate) fn page() -> Response {
    let mut response = text_response("text/html; charset=utf-8", include_str!("../page.html"));
    // The page is whole: nothing from elsewhere, and in no frame.
    let policy = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; \
                  connect-src 'self'; img-src data:; frame-ancestors 'none'; base-uri 'none'; \
                  form-action 'none'";
    let policy = HeaderValue::from_static(policy);
    response.headers_mut().insert(header::CONTENT_SECURITY_POLICY, policy);
    response
}
