//! From the engine's events to JSON, whole or as a stream of server-sent events.
use crate::error::{Refusal, json_response};
use crate::log::{Record, Reply};
use crate::order::{Event, Finish, Logprobs, Scored, Usage};
use axum::body::{Body, Bytes};
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse as _, Response};
use bitnet_runtime::tokenizer::Tokenizer;
use serde_json::{Value, json};
use std::collections::VecDeque;
use std::convert::Infallible;
use std::sync::Arc;
use tokio::sync::mpsc::Receiver;

/// What the answers to one request have in common.
#[derive(Clone, Debug)]
pub(crate) struct Shape {
    pub(crate) chat: bool,
    pub(crate) id: String,
    pub(crate) created: u64,
    pub(crate) model: String,
    pub(crate) include_usage: bool,
    pub(crate) tokenizer: Arc<Tokenizer>,
    pub(crate) record: Arc<Record>,
}

impl Shape {
    fn envelope(&self, object: &str, choices: &Value) -> Value {
        json!({
            "id": self.id, "object": object, "created": self.created, "model": self.model, "choices": choices,
        })
    }

    fn chunk(&self, content: &Value, logprobs: &Value, finish: Option<Finish>) -> Value {
        let (object, key) = if self.chat { ("chat.completion.chunk", "delta") } else { ("text_completion", "text") };
        let mut chunk = self.envelope(
            object,
            &json!([{ "index": 0, key: content, "logprobs": logprobs, "finish_reason": finish.map(name) }]),
        );
        if self.include_usage {
            chunk["usage"] = Value::Null;
        }
        chunk
    }

    fn text(&self, text: &str) -> Value {
        if self.chat { json!({ "content": text }) } else { json!(text) }
    }

    /// The probabilities of some tokens in the shape of this kind of completion. `offset` is where their text begins.
    fn logprobs(&self, tokens: &[Logprobs], offset: usize) -> Value {
        if tokens.is_empty() {
            return Value::Null;
        }
        let text = |token: u32| String::from_utf8_lossy(self.tokenizer.bytes(token)).into_owned();
        if self.chat {
            let one = |s: &Scored| json!({ "token": text(s.token), "logprob": s.logprob, "bytes": self.tokenizer.bytes(s.token) });
            let all = tokens.iter().map(|token| {
                let mut value = one(&token.chosen);
                value["top_logprobs"] = token.top.iter().map(one).collect();
                value
            });
            return json!({ "content": all.collect::<Vec<_>>() });
        }
        let mut at = offset;
        let offsets: Vec<usize> = tokens
            .iter()
            .map(|token| {
                let start = at;
                at += text(token.chosen.token).chars().count();
                start
            })
            .collect();
        let top = |token: &Logprobs| {
            token.top.iter().map(|s| (text(s.token), json!(s.logprob))).collect::<serde_json::Map<_, _>>()
        };
        json!({
            "tokens": tokens.iter().map(|token| text(token.chosen.token)).collect::<Vec<_>>(),
            "token_logprobs": tokens.iter().map(|token| token.chosen.logprob).collect::<Vec<_>>(),
            "top_logprobs": tokens.iter().map(top).collect::<Vec<_>>(),
            "text_offset": offsets,
        })
    }
}

const fn name(finish: Finish) -> &'static str {
    match finish {
        Finish::Stop => "stop",
        Finish::Length => "length",
    }
}

fn usage(usage: Usage) -> Value {
    json!({
        "prompt_tokens": usage.prompt,
        "completion_tokens": usage.completion,
        "total_tokens": usage.prompt + usage.completion,
        "prompt_tokens_details": { "cached_tokens": usage.cached },
    })
}

fn failure(message: String) -> Refusal {
    Refusal::new(StatusCode::INTERNAL_SERVER_ERROR, message)
}

/// The engine gave up the reply without a word.
fn broken_off() -> Refusal {
    failure("the reply broke off".to_owned())
}

/// Waits for the whole reply.
pub(crate) async fn whole(shape: &Shape, mut events: Receiver<Event>) -> Response {
    let (mut text, mut scored) = (String::new(), Vec::new());
    loop {
        match events.recv().await {
            Some(Event::Piece(piece, logprobs)) => {
                text.push_str(&piece);
                scored.extend(logprobs);
            }
            Some(Event::Done(finish, cost)) => {
                let logprobs = shape.logprobs(&scored, 0);
                let mut choice = json!({ "index": 0, "logprobs": logprobs, "finish_reason": name(finish) });
                let object = if shape.chat {
                    choice["message"] = json!({ "role": "assistant", "content": text });
                    "chat.completion"
                } else {
                    choice["text"] = json!(text);
                    "text_completion"
                };
                let mut reply = shape.envelope(object, &json!([choice]));
                reply["usage"] = usage(cost);
                shape.record.reply(Reply::Done(finish, cost));
                return json_response(StatusCode::OK, &reply);
            }
            Some(Event::Failed(e)) => {
                shape.record.reply(Reply::Failed);
                return failure(e).into_response();
            }
            None => return broken_off().into_response(),
        }
    }
}

/// The state of a stream: what is still to be sent.
struct Stream {
    shape: Shape,
    events: Receiver<Event>,
    ready: VecDeque<String>,
    /// Characters that were sent.
    sent: usize,
    ended: bool,
}

impl Stream {
    fn put(&mut self, value: &Value) {
        self.ready.push_back(format!("data: {value}\n\n"));
    }

    fn take(&mut self, event: Option<Event>) {
        match event {
            Some(Event::Piece(text, logprobs)) => {
                if text.is_empty() && logprobs.is_none() {
                    return;
                }
                let scored = self.shape.logprobs(logprobs.as_slice(), self.sent);
                self.sent += text.chars().count();
                let chunk = self.shape.chunk(&self.shape.text(&text), &scored, None);
                self.put(&chunk);
                return;
            }
            Some(Event::Done(finish, cost)) => {
                self.shape.record.reply(Reply::Done(finish, cost));
                let nothing = if self.shape.chat { json!({}) } else { json!("") };
                let chunk = self.shape.chunk(&nothing, &Value::Null, Some(finish));
                self.put(&chunk);
                if self.shape.include_usage {
                    let object = if self.shape.chat { "chat.completion.chunk" } else { "text_completion" };
                    let mut chunk = self.shape.envelope(object, &json!([]));
                    chunk["usage"] = usage(cost);
                    self.put(&chunk);
                }
            }
            Some(Event::Failed(e)) => {
                self.shape.record.reply(Reply::Failed);
                self.put(&failure(e).json());
            }
            None => {
                self.shape.record.reply(Reply::Failed);
                self.put(&broken_off().json());
            }
        }
        self.ready.push_back("data: [DONE]\n\n".to_owned());
        self.ended = true;
    }
}

/// Sends the reply piece by piece. When the client leaves, the stream is dropped, and the engine sees that.
pub(crate) fn stream(shape: Shape, events: Receiver<Event>) -> Response {
    shape.record.reply(Reply::Begun);
    let mut stream = Stream { shape, events, ready: VecDeque::new(), sent: 0, ended: false };
    if stream.shape.chat {
        let role = stream.shape.chunk(&json!({ "role": "assistant", "content": "" }), &Value::Null, None);
        stream.put(&role);
    }
    let body = futures_util::stream::unfold(stream, |mut stream| async {
        while stream.ready.is_empty() {
            if stream.ended {
                return None;
            }
            let event = stream.events.recv().await;
            stream.take(event);
        }
        let next = stream.ready.pop_front()?;
        Some((Ok::<_, Infallible>(Bytes::from(next)), stream))
    });
    let mut response = Response::new(Body::from_stream(body));
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("text/event-stream"));
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-cache"));
    // Proxies that gather a reply before they pass it on would make it wait.
    headers.insert("x-accel-buffering", HeaderValue::from_static("no"));
    response
}
