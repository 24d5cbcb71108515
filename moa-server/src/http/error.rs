use axum::body::Body;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};

/// A fault of a request, as OpenAI's API tells it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct ApiError {
    pub(crate) status: StatusCode,
    pub(crate) message: String,
    /// The field that is at fault.
    pub(crate) param: Option<String>,
    pub(crate) code: Option<&'static str>,
    /// Seconds after which to try again.
    pub(crate) retry_after: Option<u32>,
}

impl ApiError {
    pub(crate) fn new(status: StatusCode, message: impl Into<String>) -> Self {
        Self { status, message: message.into(), param: None, code: None, retry_after: None }
    }

    /// What the client sent cannot be served.
    pub(crate) fn invalid(message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, message)
    }

    /// A field is not what it should be.
    pub(crate) fn field(
        name: &str,
        expected: impl std::fmt::Display,
        got: impl std::fmt::Display,
    ) -> Self {
        let param = Some(name.to_owned());
        let message = format!("`{name}` must be {expected}, got {got}");
        Self { param, code: Some("invalid_value"), ..Self::invalid(message) }
    }

    /// The server has no room now.
    pub(crate) fn busy(message: impl Into<String>) -> Self {
        Self {
            code: Some("server_busy"),
            retry_after: Some(1),
            ..Self::new(StatusCode::SERVICE_UNAVAILABLE, message)
        }
    }

    /// The server is about to stop.
    pub(crate) fn stopping() -> Self {
        Self { code: Some("server_stopping"), ..Self::busy("the server is about to stop") }
    }

    /// The request took longer than it may.
    pub(crate) fn timeout(message: impl Into<String>) -> Self {
        Self { code: Some("timeout"), ..Self::new(StatusCode::GATEWAY_TIMEOUT, message) }
    }

    /// The same fault in this field, unless it is in another one.
    pub(crate) fn of(self, field: &str) -> Self {
        Self { param: self.param.or_else(|| Some(field.to_owned())), ..self }
    }

    /// A prompt is longer than the model's context; `asked` says how many tokens it has.
    pub(crate) fn too_long(asked: impl std::fmt::Display, limit: usize) -> Self {
        let message = format!("the model's context is {limit} tokens, the prompt has {asked}");
        Self { code: Some("context_length_exceeded"), ..Self::invalid(message) }
    }

    /// The model, or the device that it runs on, could not go on.
    pub(crate) fn of_model(error: &moa_models::Error) -> Self {
        use moa_models::Error as E;
        match error {
            E::Invalid { .. } | E::Template { .. } | E::Tokenizer { .. } => {
                Self::invalid(error.to_string())
            }
            // It was not cut into tokens.
            E::ContextExceeded { asked, limit } => {
                Self::too_long(format_args!("at least {asked}"), *limit)
            }
            error if error.is_out_of_memory() => Self::busy(error.to_string()),
            _ => Self::new(StatusCode::INTERNAL_SERVER_ERROR, error.to_string()),
        }
    }

    pub(crate) fn json(&self) -> Value {
        let kind = match self.status.as_u16() {
            401 => "authentication_error",
            403 => "permission_error",
            400..=499 => "invalid_request_error",
            503 => "service_unavailable_error",
            _ => "server_error",
        };
        json!({
            "error": {
                "message": self.message,
                "type": kind,
                "param": self.param,
                "code": self.code,
            }
        })
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let mut response = json_response(&self.json());
        *response.status_mut() = self.status;
        if let Some(seconds) = self.retry_after {
            response.headers_mut().insert(header::RETRY_AFTER, seconds.into());
        }
        if self.status == StatusCode::UNAUTHORIZED {
            let scheme = HeaderValue::from_static("Bearer");
            response.headers_mut().insert(header::WWW_AUTHENTICATE, scheme);
        }
        response
    }
}

/// A response of one JSON value.
pub(crate) fn json_response(value: &Value) -> Response {
    text_response("application/json", value.to_string())
}

/// A response of a text.
pub(crate) fn text_response(kind: &'static str, text: impl Into<Body>) -> Response {
    let mut response = Response::new(text.into());
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static(kind));
    response
}
