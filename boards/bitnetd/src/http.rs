//! Routes, and who may use them.
//!
//! Every request passes the same gate: its `Host` must be this machine by address or by a name that was allowed, so that no
//! page of the web reaches the daemon through a name that it owns; its `Origin`, which browsers send, must be the same; and
//! where there are keys it must have one. No part of a request names a file.
use crate::constraint::{Constraint, Format, Vocabulary};
use crate::error::{Refusal, json_response};
use crate::keeper::Ready;
use crate::log::Record;
use crate::order::{Event, Full};
use crate::reply::{self, Shape};
use crate::request::{Chat, Common, Completion, Prompt};
use crate::{Access, App};
use axum::Router;
use axum::body::{Body, Bytes};
use axum::extract::{Request, State};
use axum::http::uri::Authority;
use axum::http::{HeaderMap, HeaderValue, Method, StatusCode, header};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse as _, Response};
use axum::routing::{get, post};
use base64::prelude::{BASE64_STANDARD, Engine as _};
use bitnet_host::template;
use bitnet_runtime::tokenizer::TextStream;
use futures_util::FutureExt as _;
use http_body_util::{BodyExt as _, LengthLimitError, Limited};
use serde::de::DeserializeOwned;
use serde_json::json;
use sha2::{Digest as _, Sha256};
use std::net::IpAddr;
use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use subtle::{Choice, ConstantTimeEq as _};
use tokio::sync::mpsc;

type Answer = Result<Response, Refusal>;

/// Tokens of `/v1/completions` unless the request says how many, as OpenAI has it.
const COMPLETION_TOKENS: usize = 16;

/// The chat page, all of it.
const PAGE: &str = include_str!("page.html");

/// What browsers let the page do: run its own script and style, by their hashes, and ask this daemon.
pub(crate) fn page_policy() -> HeaderValue {
    let hash = |element: &str| {
        let (open, close) = (format!("<{element}>"), format!("</{element}>"));
        let inside = PAGE.split_once(&open).and_then(|(_, rest)| rest.split_once(&close));
        let (inside, _) = inside.expect("the page has a script and a style");
        format!("'sha256-{}'", BASE64_STANDARD.encode(Sha256::digest(inside)))
    };
    let (script, style) = (hash("script"), hash("style"));
    let policy = format!(
        "default-src 'none'; script-src {script}; style-src {style}; img-src data:; connect-src 'self'; base-uri 'none'; \
         form-action 'none'; frame-ancestors 'none'"
    );
    HeaderValue::try_from(policy).expect("the policy is plain text")
}

/// All paths, which `openapi.json` describes.
pub const ROUTES: [&str; 11] = [
    "/",
    "/health",
    "/metrics",
    "/openapi.json",
    "/props",
    "/v1/models",
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/embeddings",
    "/tokenize",
    "/detokenize",
];

pub(crate) fn router(app: Arc<App>) -> Router {
    Router::new()
        .route("/", get(page))
        .route("/health", get(health))
        .route("/metrics", get(metrics))
        .route("/openapi.json", get(openapi))
        .route("/props", get(props))
        .route("/v1/models", get(models))
        .route("/v1/chat/completions", post(chat))
        .route("/v1/completions", post(completions))
        .route("/v1/embeddings", post(embeddings))
        .route("/tokenize", post(tokenize))
        .route("/detokenize", post(detokenize))
        .fallback(|| async { Refusal::new(StatusCode::NOT_FOUND, "there is no such path") })
        .method_not_allowed_fallback(|| async { Refusal::new(StatusCode::METHOD_NOT_ALLOWED, "not by this method") })
        .layer(middleware::from_fn_with_state(app.clone(), gate))
        .with_state(app)
}

async fn gate(State(app): State<Arc<App>>, mut request: Request, next: Next) -> Response {
    let path = ROUTES.into_iter().find(|path| *path == request.uri().path());
    let record = Arc::new(Record::new(app.settings.serve.log, request.method().clone(), path));
    request.extensions_mut().insert(record.clone());
    let mut response = match admit(&app, &request) {
        Ok(()) => caught(next.run(request)).await,
        Err(refusal) => refusal.into_response(),
    };
    record.status(response.status());
    let headers = response.headers_mut();
    headers.insert(header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    headers.insert("cross-origin-resource-policy", HeaderValue::from_static("same-origin"));
    response
}

/// A panic answers its own request, and that is all it does.
async fn caught(answer: impl Future<Output = Response>) -> Response {
    let answer = AssertUnwindSafe(answer).catch_unwind().await;
    answer.unwrap_or_else(|_| {
        Refusal::new(StatusCode::INTERNAL_SERVER_ERROR, "the daemon made a mistake").into_response()
    })
}

fn admit(app: &App, request: &Request) -> Result<(), Refusal> {
    let headers = request.headers();
    let host = only(headers, header::HOST)?.ok_or_else(|| Refusal::bad("there is no Host"))?;
    let host: Authority = host.parse().map_err(|_| Refusal::bad("Host is not a name"))?;
    let named = request.uri().authority().unwrap_or(&host);
    let access = app.access();
    if !(is_here(&access, &host) && is_here(&access, named)) {
        return Err(Refusal::new(StatusCode::FORBIDDEN, "this host has another name; see --allow-host"));
    }
    if let Some(origin) = only(headers, header::ORIGIN)? {
        let same = origin.strip_prefix("http://").or_else(|| origin.strip_prefix("https://"));
        if same.is_none_or(|origin| !origin.eq_ignore_ascii_case(host.as_str())) {
            return Err(Refusal::new(StatusCode::FORBIDDEN, "pages of other origins may not ask"));
        }
    }
    // Who watches over a service has no key, and who gives one does so on the page.
    let open = matches!(request.uri().path(), "/" | "/health") && request.method() == Method::GET;
    if !open && !access.keys.is_empty() && !has_key(&access, headers)? {
        return Err(Refusal::new(StatusCode::UNAUTHORIZED, "a key is needed").code("invalid_api_key"));
    }
    Ok(())
}

/// A header that may be there once.
fn only(headers: &HeaderMap, name: header::HeaderName) -> Result<Option<&str>, Refusal> {
    let mut values = headers.get_all(&name).iter();
    let first = values.next();
    if values.next().is_some() {
        return Err(Refusal::bad(format!("{name} is there twice")));
    }
    first.map(|value| value.to_str().map_err(|_| Refusal::bad(format!("{name} is not text")))).transpose()
}

/// Whether a name is this machine's: an address cannot be anyone else's, and other names have to be allowed.
fn is_here(access: &Access, authority: &Authority) -> bool {
    let host = authority.host();
    let address = host.strip_prefix('[').and_then(|host| host.strip_suffix(']')).unwrap_or(host);
    !authority.as_str().contains('@')
        && (address.parse::<IpAddr>().is_ok()
            || host.eq_ignore_ascii_case("localhost")
            || access.hosts.iter().any(|name| name.eq_ignore_ascii_case(host)))
}

fn has_key(access: &Access, headers: &HeaderMap) -> Result<bool, Refusal> {
    let given = only(headers, header::AUTHORIZATION)?.unwrap_or_default();
    let given = given.split_once(' ').filter(|(scheme, _)| scheme.eq_ignore_ascii_case("bearer"));
    let given = given.map_or("", |(_, key)| key.trim()).as_bytes();
    // All are compared, each in a time that depends on lengths alone.
    let same = access.keys.iter().map(|key| key.as_bytes().ct_eq(given));
    Ok(same.fold(Choice::from(0), |all, one| all | one).into())
}

/// A body in JSON within the limits of size, depth and time.
async fn body<T: DeserializeOwned>(app: &App, request: Request) -> Result<T, Refusal> {
    let kind = only(request.headers(), header::CONTENT_TYPE)?.unwrap_or_default();
    let kind = kind.split(';').next().unwrap_or_default().trim();
    // Also what keeps forms of other pages out, which browsers send without asking.
    if !kind.eq_ignore_ascii_case("application/json") {
        return Err(Refusal::new(StatusCode::UNSUPPORTED_MEDIA_TYPE, "bodies are application/json"));
    }
    let limit = app.settings.serve.body_bytes;
    let too_large = || Refusal::new(StatusCode::PAYLOAD_TOO_LARGE, format!("a body has at most {limit} bytes"));
    let length = only(request.headers(), header::CONTENT_LENGTH)?.and_then(|length| length.parse::<u64>().ok());
    if length.is_some_and(|length| length > limit as u64) {
        return Err(too_large());
    }
    let bytes = Limited::new(request.into_body(), limit).collect();
    let bytes: Bytes = match tokio::time::timeout(app.settings.serve.read_seconds, bytes).await {
        Ok(Ok(bytes)) => bytes.to_bytes(),
        Ok(Err(e)) if e.is::<LengthLimitError>() => return Err(too_large()),
        Ok(Err(_)) => return Err(Refusal::bad("the body broke off")),
        Err(_) => return Err(Refusal::new(StatusCode::REQUEST_TIMEOUT, "the body took too long")),
    };
    // The parser goes no deeper than 128 levels.
    serde_json::from_slice(&bytes).map_err(|e| Refusal::bad(format!("the body is not what is asked for: {e}")))
}

async fn page(State(app): State<Arc<App>>) -> Response {
    let mut response = text_response("text/html; charset=utf-8", PAGE.to_owned());
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_SECURITY_POLICY, app.page_policy.clone());
    headers.insert(header::REFERRER_POLICY, HeaderValue::from_static("no-referrer"));
    response
}

async fn openapi() -> Response {
    text_response("application/json", include_str!("openapi.json").to_owned())
}

fn text_response(kind: &'static str, text: String) -> Response {
    let mut response = Response::new(Body::from(text));
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static(kind));
    response
}

async fn health(State(app): State<Arc<App>>) -> Response {
    let (status, word) = app.health();
    json_response(status, &json!({ "status": word, "self_test": app.self_test() }))
}

async fn metrics(State(app): State<Arc<App>>) -> Response {
    text_response("text/plain; version=0.0.4; charset=utf-8", app.metrics.text(app.places.waiting()))
}

async fn props(State(app): State<Arc<App>>) -> Answer {
    let ready = app.ready().await?;
    Ok(json_response(
        StatusCode::OK,
        &json!({
            "model": app.settings.name,
            "version": env!("CARGO_PKG_VERSION"),
            "context": ready.context,
            "vocabulary": ready.vocab,
            "sessions": app.settings.sessions,
            "queue": app.settings.serve.queue,
            "chat_template": ready.template,
            "backend": ready.backend,
            "threads": ready.threads,
            "memory": ready.memory,
        }),
    ))
}

async fn models(State(app): State<Arc<App>>) -> Answer {
    app.serves()?;
    let model = json!({ "id": app.settings.name, "object": "model", "created": app.boot, "owned_by": "local" });
    Ok(json_response(StatusCode::OK, &json!({ "object": "list", "data": [model] })))
}

async fn embeddings() -> Refusal {
    Refusal::new(StatusCode::NOT_IMPLEMENTED, "this daemon generates text and has no embeddings")
}

async fn chat(State(app): State<Arc<App>>, request: Request) -> Answer {
    let ready = app.ready().await?;
    let record = record(&request)?;
    let mut chat: Chat = body(&app, request).await?;
    if ready.template.is_empty() {
        return Err(Refusal::bad("this model has no chat template; /v1/completions continues a text"));
    }
    let (messages, logprobs) = (chat.messages()?, chat.logprobs()?);
    let tokenizer = ready.tokenizer.clone();
    let (template, eos) = (ready.template.clone(), ready.ends.first().copied());
    let prompt = blocking(move || template::encode(&template, &messages, eos, &tokenizer)).await?;
    let prompt = prompt.map_err(|e| Refusal::parameter("messages", format!("{e:#}")))?;
    answer(&app, Asked { ready, chat: true, prompt, logprobs, record }, chat.common).await
}

async fn completions(State(app): State<Arc<App>>, request: Request) -> Answer {
    let ready = app.ready().await?;
    let record = record(&request)?;
    let completion: Completion = body(&app, request).await?;
    let logprobs = completion.logprobs()?;
    let asked = |ready, prompt| Asked { ready, chat: false, prompt, logprobs, record };
    let text = match completion.prompt {
        Prompt::Tokens(tokens) => {
            if tokens.iter().any(|&token| token >= ready.vocab) {
                return Err(Refusal::parameter("prompt", format!("tokens are 0 to {}", ready.vocab - 1)));
            }
            return answer(&app, asked(ready, tokens), completion.common).await;
        }
        Prompt::Text(text) => text,
        Prompt::Texts(texts) => match <[String; 1]>::try_from(texts) {
            Ok([text]) => text,
            Err(_) => return Err(Refusal::parameter("prompt", "one text at a time")),
        },
    };
    let mut prompt: Vec<u32> = ready.tokenizer.bos().into_iter().collect();
    prompt.extend(encode(&ready, text).await?);
    answer(&app, asked(ready, prompt), completion.common).await
}

/// What is to be continued, and how.
struct Asked {
    ready: Arc<Ready>,
    chat: bool,
    prompt: Vec<u32>,
    logprobs: Option<usize>,
    record: Arc<Record>,
}

/// What [`gate`] gave a request for the log.
fn record(request: &Request) -> Result<Arc<Record>, Refusal> {
    let record = request.extensions().get().cloned();
    record.ok_or_else(|| Refusal::new(StatusCode::INTERNAL_SERVER_ERROR, "the request has no record"))
}

/// Puts a request in the queue and answers it.
async fn answer(app: &Arc<App>, asked: Asked, common: Common) -> Answer {
    let Asked { ready, chat, prompt, logprobs, record } = asked;
    if common.names_another(&app.settings.name) {
        let message = format!("the model here is `{}`", app.settings.name);
        return Err(Refusal::new(StatusCode::NOT_FOUND, message).code("model_not_found"));
    }
    if prompt.is_empty() {
        return Err(Refusal::parameter("prompt", "there is nothing to continue"));
    }
    if let Some(context) = ready.context.filter(|&context| prompt.len() > context) {
        let message = format!("the prompt has {} tokens, and the context has room for {context}", prompt.len());
        return Err(Refusal::bad(message).code("context_length_exceeded"));
    }
    let kind = if chat { "chatcmpl" } else { "cmpl" };
    let number = app.ids.fetch_add(1, Ordering::Relaxed);
    let shape = Shape {
        chat,
        id: format!("{kind}-{:x}-{number:x}", app.boot),
        created: crate::unix_time(),
        model: app.settings.name.clone(),
        include_usage: common.include_usage(),
        tokenizer: ready.tokenizer.clone(),
        record,
    };
    let streamed = common.stream.unwrap_or(false);
    let default = if chat { usize::MAX } else { COMPLETION_TOKENS };
    let (sender, events) = mpsc::channel(Event::ROOM);
    let format = common.format()?;
    let mut order = common.order(prompt, ready.vocab, default, logprobs, app.settings.serve.reply_seconds, sender)?;
    if let Some(format) = format {
        order.constraint = Some(constrain(ready.clone(), format).await?);
    }
    match ready.queue.push(order) {
        Ok(()) if streamed => Ok(reply::stream(shape, events)),
        Ok(()) => Ok(reply::whole(&shape, events).await),
        Err(Full::Busy) => {
            app.metrics.refused();
            let wait = app.metrics.wait(app.places.waiting(), app.settings.sessions.into());
            Err(Refusal::new(StatusCode::TOO_MANY_REQUESTS, "too many requests wait already").retry_after(wait))
        }
        Err(Full::Gone) => Err(Refusal::new(StatusCode::SERVICE_UNAVAILABLE, "the model is not running")),
    }
}

async fn constrain(ready: Arc<Ready>, format: Format) -> Result<Constraint, Refusal> {
    let made = blocking(move || {
        let vocabulary = ready.vocabulary.get_or_init(|| Vocabulary::new(&ready.tokenizer, ready.vocab, &ready.ends));
        let internal = |e: &String| Refusal::new(StatusCode::INTERNAL_SERVER_ERROR, format!("the vocabulary: {e}"));
        let vocabulary = vocabulary.as_ref().map_err(internal)?;
        vocabulary.constrain(format).map_err(|e| Refusal::parameter("response_format", e))
    });
    made.await?
}

#[derive(Debug, serde::Deserialize)]
struct Tokenize {
    content: String,
    #[serde(default)]
    add_special: bool,
}

async fn tokenize(State(app): State<Arc<App>>, request: Request) -> Answer {
    let ready = app.ready().await?;
    let Tokenize { content, add_special } = body(&app, request).await?;
    let mut tokens: Vec<u32> = ready.tokenizer.bos().filter(|_| add_special).into_iter().collect();
    tokens.extend(encode(&ready, content).await?);
    Ok(json_response(StatusCode::OK, &json!({ "tokens": tokens })))
}

#[derive(Debug, serde::Deserialize)]
struct Detokenize {
    tokens: Vec<u32>,
}

async fn detokenize(State(app): State<Arc<App>>, request: Request) -> Answer {
    let ready = app.ready().await?;
    let Detokenize { tokens } = body(&app, request).await?;
    let mut text = String::new();
    let mut stream = TextStream::new(&ready.tokenizer, Vec::new());
    let mut add = |piece: &str| text.push_str(piece);
    tokens.iter().for_each(|&token| stream.push(token, &mut add));
    stream.finish(&mut add);
    Ok(json_response(StatusCode::OK, &json!({ "content": text })))
}

/// The tokens of plain text.
async fn encode(ready: &Ready, text: String) -> Result<Vec<u32>, Refusal> {
    let tokenizer = ready.tokenizer.clone();
    blocking(move || tokenizer.encode(&text)).await?.map_err(|e| Refusal::bad(e.to_string()))
}

/// Does what takes long for a long text beside the threads that serve.
async fn blocking<R: Send + 'static>(f: impl FnOnce() -> R + Send + 'static) -> Result<R, Refusal> {
    let done = tokio::task::spawn_blocking(f).await;
    done.map_err(|_| Refusal::new(StatusCode::INTERNAL_SERVER_ERROR, "the tokenizer failed"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_panic_is_an_answer() {
        let panics = async { panic!("a request that nobody thought of") };
        assert_eq!(caught(panics).await.status(), StatusCode::INTERNAL_SERVER_ERROR);
        assert_eq!(caught(std::future::ready(Response::default())).await.status(), StatusCode::OK);
    }
}
