//! The HTTP side: routes, who may use them, and what is said of what does not exist.

pub(crate) mod answer;
pub(crate) mod chat;
pub(crate) mod completions;
pub(crate) mod error;
pub(crate) mod fields;
pub(crate) mod form;
pub(crate) mod info;
pub(crate) mod logprobs;
pub(crate) mod params;
pub(crate) mod responses;
pub(crate) mod submit;
pub(crate) mod tokens;
pub(crate) mod tools;

use std::future::{Future, poll_fn};
use std::net::IpAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use axum::body::{Body, HttpBody as _};
use axum::http::{HeaderMap, HeaderValue, Method, Request, StatusCode, header};
use axum::response::{IntoResponse, Response};
use percent_encoding::percent_decode_str;

use crate::connections::{Peer, Reading};
use crate::state::State;
use error::{ApiError, json_response, text_response};

/// Answers one request.
pub(crate) async fn answer(state: Arc<State>, request: Request<Body>) -> Response {
    let origin = request.headers().get(header::ORIGIN).cloned();
    let allowed = origin.filter(|origin| is_allowed(&state, origin));
    let is_preflight = request.method() == Method::OPTIONS
        && request.headers().contains_key(header::ACCESS_CONTROL_REQUEST_METHOD);
    let mut response = match is_preflight {
        true => preflight(),
        false => {
            let checked = authorise(&state, &request, allowed.is_some());
            match checked {
                Ok(()) => route(state, request).await.unwrap_or_else(ApiError::into_response),
                Err(error) => error.into_response(),
            }
        }
    };
    let headers = response.headers_mut();
    headers.insert(header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    if let Some(origin) = allowed {
        headers.insert(header::ACCESS_CONTROL_ALLOW_ORIGIN, origin);
        headers.append(header::VARY, HeaderValue::from_static("Origin"));
    }
    response
}

async fn route(state: Arc<State>, request: Request<Body>) -> Result<Response, ApiError> {
    let (get, post) = (Method::GET, Method::POST);
    let path = request.uri().path().to_owned();
    let expected = match path.as_str() {
        "/" | "/health" | "/metrics" | "/v1/models" | "/plan" => get,
        "/v1/chat/completions"
        | "/v1/completions"
        | "/v1/responses"
        | "/tokenize"
        | "/detokenize" => post,
        path if path.starts_with("/v1/models/") => get,
        path => {
            let message = format!(
                "there is no {path}: the server answers /v1/chat/completions, /v1/completions, \
                 /v1/responses, /v1/models, /tokenize, /detokenize, /health and /metrics"
            );
            let error = ApiError::new(StatusCode::NOT_FOUND, message);
            return Err(ApiError { code: Some("unknown_url"), ..error });
        }
    };
    let is_head = request.method() == Method::HEAD && expected == Method::GET;
    if *request.method() != expected && !is_head {
        let mut response = match *request.method() {
            Method::OPTIONS => StatusCode::NO_CONTENT.into_response(),
            ref method => {
                let message = format!("{path} takes {expected}, not {method}");
                ApiError::new(StatusCode::METHOD_NOT_ALLOWED, message).into_response()
            }
        };
        let allowed = if expected == Method::GET { "GET, HEAD, OPTIONS" } else { "POST, OPTIONS" };
        response.headers_mut().insert(header::ALLOW, HeaderValue::from_static(allowed));
        return Ok(response);
    }
    if let Some(name) = path.strip_prefix("/v1/models/") {
        // Clients write `%2F` for a slash.
        return info::model(&state, &percent_decode_str(name).decode_utf8_lossy());
    }
    match path.as_str() {
        "/" => Ok(info::page()),
        "/health" => info::health(&state),
        "/metrics" => Ok(text_response("text/plain; version=0.0.4", state.metrics.text())),
        "/plan" => Ok(json_response(&state.model.plan)),
        "/v1/models" => Ok(info::models(&state)),
        path => {
            let path = path.to_owned();
            let body = read(&state, request).await?;
            match path.as_str() {
                "/v1/chat/completions" => chat::complete(state, &body).await,
                "/v1/completions" => completions::complete(state, &body).await,
                "/v1/responses" => responses::respond(state, &body).await,
                "/tokenize" => tokens::tokenize(state, &body).await,
                _ => tokens::detokenize(state, &body).await,
            }
        }
    }
}

/// A request's body, if it is neither too large nor too slow.
async fn read(state: &State, request: Request<Body>) -> Result<Vec<u8>, ApiError> {
    let peer = request.extensions().get::<Arc<Peer>>().cloned();
    let _reading = peer.map(Reading::new);
    let limit = state.options.max_body;
    let length = request.headers().get(header::CONTENT_LENGTH);
    let length = length.and_then(|length| length.to_str().ok()?.parse::<u64>().ok());
    let expects = request.headers().contains_key(header::EXPECT);
    let is_too_large = length.is_some_and(|length| length > limit as u64);
    let mut body = request.into_body();
    let read =
        if is_too_large { Ok(Ok(None)) } else { within(state, take(&mut body, limit)).await };
    match read {
        Ok(Ok(Some(bytes))) => Ok(bytes),
        Ok(Ok(None)) => {
            // A client that is cut off while it writes never reads why. One that asked first does not
            // write.
            if !expects {
                let _ = tokio::time::timeout(LINGER, discard(&mut body)).await;
            }
            let message = format!("the body must have at most {limit} bytes");
            Err(ApiError::new(StatusCode::PAYLOAD_TOO_LARGE, message))
        }
        Ok(Err(error)) => Err(ApiError::invalid(format!("the body cannot be read: {error}"))),
        Err(_) => {
            let message = "the body took too long to come";
            Err(ApiError::new(StatusCode::REQUEST_TIMEOUT, message))
        }
    }
}

/// How long, and how much of, a body is read that is too large.
const LINGER: Duration = Duration::from_millis(300);
const MOST_DISCARDED: usize = 16 << 20;

async fn within<T>(
    state: &State,
    work: impl Future<Output = T>,
) -> Result<T, tokio::time::error::Elapsed> {
    tokio::time::timeout(state.options.client_timeout, work).await
}

/// Reads what a client is about to write, but not without end.
async fn discard(body: &mut Body) {
    let mut left = MOST_DISCARDED;
    while let Some(Ok(frame)) = poll_fn(|context| Pin::new(&mut *body).poll_frame(context)).await {
        match left.checked_sub(frame.data_ref().map_or(0, |data| data.len())) {
            Some(rest) => left = rest,
            None => return,
        }
    }
}

/// A body of at most so many bytes; `None` as soon as it is longer.
async fn take(body: &mut Body, limit: usize) -> Result<Option<Vec<u8>>, axum::Error> {
    let mut bytes = Vec::new();
    while let Some(frame) = poll_fn(|context| Pin::new(&mut *body).poll_frame(context)).await {
        let Ok(data) = frame?.into_data() else { continue };
        if bytes.len() + data.len() > limit {
            return Ok(None);
        }
        bytes.extend_from_slice(&data);
    }
    Ok(Some(bytes))
}

/// Checks the key, and that no page of a stranger uses the server by the browser of somebody else.
fn authorise(state: &State, request: &Request<Body>, allowed: bool) -> Result<(), ApiError> {
    let headers = request.headers();
    if !allowed
        && let Some(origin) = headers.get(header::ORIGIN)
        && !is_own(origin, headers)
    {
        let message = "pages of this origin may not use the server (--cors allows one)";
        return Err(ApiError::new(StatusCode::FORBIDDEN, message));
    }
    // A name of a stranger's that leads to this machine makes their page look like the server's own.
    let is_private = state.options.address.ip().is_loopback() && state.options.api_keys.is_empty();
    if is_private && !allowed && !is_local(headers) {
        let message =
            "without an API key, this machine's server answers to localhost and addresses alone";
        return Err(ApiError::new(StatusCode::FORBIDDEN, message));
    }
    let is_open = matches!(request.uri().path(), "/" | "/health");
    if is_open || state.options.api_keys.is_empty() {
        return Ok(());
    }
    let given = headers.get(header::AUTHORIZATION).and_then(|value| value.to_str().ok());
    let scheme_and_key = given.and_then(|value| value.split_once(' '));
    let key = scheme_and_key.filter(|(scheme, _)| scheme.eq_ignore_ascii_case("bearer"));
    let key = key.map_or("", |(_, key)| key.trim());
    // All keys are compared, and all bytes of each, so that the time tells nothing.
    let matches = state.options.api_keys.iter().fold(false, |found, own| found | same(own, key));
    match matches {
        true => Ok(()),
        false => Err(ApiError {
            code: Some("invalid_api_key"),
            ..ApiError::new(StatusCode::UNAUTHORIZED, "a valid API key is needed")
        }),
    }
}

fn same(a: &str, b: &str) -> bool {
    let differing = a.bytes().zip(b.bytes()).fold(0, |all, (a, b)| all | (a ^ b));
    a.len() == b.len() && differing == 0
}

/// Whether the host that the client asked for is `localhost` or an address, which no name server gives.
fn is_local(headers: &HeaderMap) -> bool {
    let Some(host) = headers.get(header::HOST) else { return true };
    let Ok(host) = host.to_str() else { return false };
    let is_address = |host: &str| host.parse::<IpAddr>().is_ok();
    let name = host.rsplit_once(':').map_or(host, |(name, _)| name);
    let inner =
        |host: &str| host.strip_prefix('[').and_then(|h| h.strip_suffix(']')).map(is_address);
    name.eq_ignore_ascii_case("localhost")
        || is_address(name)
        || inner(host).or_else(|| inner(name)).unwrap_or(false)
}

/// Whether the origin is that of the server's own page.
fn is_own(origin: &HeaderValue, headers: &HeaderMap) -> bool {
    let host = headers.get(header::HOST).and_then(|host| host.to_str().ok());
    let origin = origin.to_str().ok().and_then(|origin| origin.split_once("://"));
    matches!((host, origin), (Some(host), Some((_, origin))) if host == origin)
}

fn is_allowed(state: &State, origin: &HeaderValue) -> bool {
    state.options.cors_origins.iter().any(|own| own == "*" || own.as_bytes() == origin.as_bytes())
}

fn preflight() -> Response {
    let mut response = StatusCode::NO_CONTENT.into_response();
    let headers = response.headers_mut();
    let methods = HeaderValue::from_static("GET, POST");
    headers.insert(header::ACCESS_CONTROL_ALLOW_METHODS, methods);
    // `*` does not stand for this one.
    let allowed = HeaderValue::from_static("authorization, content-type, *");
    headers.insert(header::ACCESS_CONTROL_ALLOW_HEADERS, allowed);
    headers.insert(header::ACCESS_CONTROL_MAX_AGE, HeaderValue::from_static("600"));
    response
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_localhost_and_addresses_are_local() {
        let local = |host: &'static str| {
            is_local(&HeaderMap::from_iter([(header::HOST, HeaderValue::from_static(host))]))
        };
        for host in
            ["localhost", "LocalHost:8080", "127.0.0.1", "127.0.0.1:80", "[::1]", "[::1]:8080"]
        {
            assert!(local(host), "{host}");
        }
        for host in ["evil.example", "evil.example:8080", "localhost.evil.example", "", "[x]:1"] {
            assert!(!local(host), "{host}");
        }
        assert!(is_local(&HeaderMap::new()));
    }
}
