//! Refusals, in the shape that clients of OpenAI's API know.
use axum::body::Body;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde_json::json;
use std::time::Duration;

/// Why a request gets no answer.
#[derive(Debug)]
pub(crate) struct Refusal {
    status: StatusCode,
    kind: &'static str,
    code: Option<&'static str>,
    parameter: Option<&'static str>,
    message: String,
    /// Seconds.
    retry_after: u64,
}

/// The longest time after which a client is asked to come again, in seconds.
const RETRY_MAX: u64 = 60;

impl Refusal {
    /// A refusal with a status.
    pub(crate) fn new(status: StatusCode, message: impl Into<String>) -> Self {
        let kind = match status.as_u16() {
            401 => "authentication_error",
            403 => "permission_error",
            429 => "rate_limit_error",
            500.. => "server_error",
            _ => "invalid_request_error",
        };
        Self { status, kind, code: None, parameter: None, message: message.into(), retry_after: 1 }
    }
    /// A request that cannot be read.
    pub(crate) fn bad(message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, message)
    }
    /// A field that cannot be.
    pub(crate) fn parameter(name: &'static str, message: impl Into<String>) -> Self {
        Self { parameter: Some(name), message: format!("{name}: {}", message.into()), ..Self::bad("") }
    }
    /// With one of the codes that clients look at.
    pub(crate) const fn code(mut self, code: &'static str) -> Self {
        self.code = Some(code);
        self
    }
    /// With a time after which it is worth to come again.
    pub(crate) fn retry_after(mut self, time: Duration) -> Self {
        self.retry_after = (time.as_secs() + 1).min(RETRY_MAX);
        self
    }
    /// The body.
    pub(crate) fn json(&self) -> serde_json::Value {
        json!({ "error": {
            "message": self.message, "type": self.kind, "param": self.parameter, "code": self.code,
        } })
    }
}

impl IntoResponse for Refusal {
    fn into_response(self) -> Response {
        let mut response = json_response(self.status, &self.json());
        let headers = response.headers_mut();
        if matches!(self.status, StatusCode::TOO_MANY_REQUESTS | StatusCode::SERVICE_UNAVAILABLE) {
            headers.insert(header::RETRY_AFTER, self.retry_after.into());
        }
        if self.status == StatusCode::UNAUTHORIZED {
            headers.insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        response
    }
}

/// An answer in JSON.
pub(crate) fn json_response(status: StatusCode, value: &serde_json::Value) -> Response {
    let mut response = Response::new(Body::from(value.to_string()));
    *response.status_mut() = status;
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
    response
}
