//! What is written to standard error: one line for whatever happens, and one for each request, without any of its text.
use crate::order::{Finish, Usage};
use axum::http::{Method, StatusCode};
use clap::ValueEnum;
use serde_json::{Map, Value, json};
use std::fmt::Write as _;
use std::io::Write as _;
use std::sync::{Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant, SystemTime};

/// How lines look.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Form {
    /// Words for people; the journal adds the time.
    Plain,
    /// An object in JSON, with the time.
    Json,
}

impl Form {
    /// Writes one line about the daemon itself.
    pub fn say(self, message: &str) {
        match self {
            Self::Plain => write(message),
            Self::Json => write(&object([("message", json!(message))])),
        }
    }
}

/// Writes a line at once, so that those of several threads do not mix. If nobody reads it that is no reason to end.
fn write(line: &str) {
    // Whatever a message quotes, it stays one line.
    let mut line = line.replace(['\n', '\r'], " ");
    line.push('\n');
    let _ = std::io::stderr().write_all(line.as_bytes());
}

fn object<'a>(fields: impl IntoIterator<Item = (&'a str, Value)>) -> String {
    let mut object =
        Map::from_iter([("time".to_owned(), json!(humantime::format_rfc3339_millis(SystemTime::now()).to_string()))]);
    object.extend(fields.into_iter().map(|(name, value)| (name.to_owned(), value)));
    Value::Object(object).to_string()
}

/// What a request came to. Whoever works on it holds it, and with the last of them the line is written.
#[derive(Debug)]
pub(crate) struct Record {
    form: Form,
    start: Instant,
    method: Method,
    /// One of the daemon's own paths, or none: what else a client may have asked for is not repeated.
    path: Option<&'static str>,
    status: OnceLock<StatusCode>,
    reply: Mutex<Option<Reply>>,
}

/// What a reply came to.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Reply {
    /// It is on its way. If it stays at that, the client has left.
    Begun,
    /// It ended.
    Done(Finish, Usage),
    /// Its pass failed.
    Failed,
}

impl Record {
    pub(crate) fn new(form: Form, method: Method, path: Option<&'static str>) -> Self {
        let (status, reply) = (OnceLock::new(), Mutex::new(None));
        Self { form, start: Instant::now(), method, path, status, reply }
    }
    pub(crate) fn status(&self, status: StatusCode) {
        let _ = self.status.set(status);
    }
    pub(crate) fn reply(&self, reply: Reply) {
        *self.reply.lock().unwrap_or_else(PoisonError::into_inner) = Some(reply);
    }

    /// Whether somebody looked after the service and found it well: that happens every few seconds for years, and memory cards wear
    /// out.
    fn is_probe(&self) -> bool {
        matches!(self.path, Some("/health" | "/metrics")) && self.status.get() == Some(&StatusCode::OK)
    }

    /// The line, for a request that took so long.
    fn line(&self, time: Duration) -> String {
        let (status, path) = (self.status.get().map(StatusCode::as_u16), self.path);
        let reply = *self.reply.lock().unwrap_or_else(PoisonError::into_inner);
        let left = status.is_none() || matches!(reply, Some(Reply::Begun));
        let finish = match reply {
            _ if left => Some("left"),
            Some(Reply::Done(Finish::Stop, _)) => Some("stop"),
            Some(Reply::Done(Finish::Length, _)) => Some("length"),
            Some(Reply::Failed) => Some("failed"),
            Some(Reply::Begun) | None => None,
        };
        let usage = if let Some(Reply::Done(_, usage)) = reply { Some(usage) } else { None };
        if self.form == Form::Json {
            let mut fields = vec![
                ("method", json!(self.method.as_str())),
                ("path", json!(path)),
                ("status", json!(status)),
                ("seconds", json!(time.as_secs_f64())),
            ];
            fields.extend(finish.map(|finish| ("finish", json!(finish))));
            if let Some(usage) = usage {
                fields.extend([
                    ("prompt_tokens", json!(usage.prompt)),
                    ("cached_tokens", json!(usage.cached)),
                    ("completion_tokens", json!(usage.completion)),
                    ("queue_seconds", json!(usage.waited.as_secs_f64())),
                    ("first_token_seconds", json!(usage.first_token.map(|time| time.as_secs_f64()))),
                ]);
            }
            return object(fields);
        }
        let status = status.map_or_else(|| "-".to_owned(), |status| status.to_string());
        let seconds = |time: Duration| format!("{:.3} s", time.as_secs_f64());
        let mut line = format!("{} {} {status} in {}", self.method, path.unwrap_or("-"), seconds(time));
        if let Some(finish) = finish {
            let _ = write!(line, ", {finish}");
        }
        if let Some(usage) = usage {
            let Usage { prompt, cached, completion, waited, first_token } = usage;
            let _ = write!(
                line,
                ": {prompt} tokens ({cached} of them cached) and {completion} in reply; waited {}",
                seconds(waited)
            );
            if let Some(time) = first_token {
                let _ = write!(line, ", first token after {}", seconds(time));
            }
        }
        line
    }
}

impl Drop for Record {
    fn drop(&mut self) {
        if !self.is_probe() {
            write(&self.line(self.start.elapsed()));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(form: Form, status: Option<u16>, reply: Option<Reply>) -> String {
        let record = Record::new(form, Method::POST, Some("/v1/completions"));
        if let Some(status) = status {
            record.status(StatusCode::from_u16(status).unwrap());
        }
        if let Some(reply) = reply {
            record.reply(reply);
        }
        record.line(Duration::from_millis(1500))
    }

    const USAGE: Usage = Usage {
        prompt: 7,
        cached: 3,
        completion: 20,
        waited: Duration::from_millis(10),
        first_token: Some(Duration::from_millis(250)),
    };

    #[test]
    fn lines_for_people() {
        let plain = |status, reply| record(Form::Plain, status, reply);
        assert_eq!(
            plain(Some(200), Some(Reply::Done(Finish::Length, USAGE))),
            "POST /v1/completions 200 in 1.500 s, length: 7 tokens (3 of them cached) and 20 in reply; waited 0.010 s, \
             first token after 0.250 s"
        );
        assert_eq!(plain(Some(400), None), "POST /v1/completions 400 in 1.500 s");
        assert_eq!(plain(Some(200), Some(Reply::Begun)), "POST /v1/completions 200 in 1.500 s, left");
        assert_eq!(plain(Some(500), Some(Reply::Failed)), "POST /v1/completions 500 in 1.500 s, failed");
        assert_eq!(plain(None, None), "POST /v1/completions - in 1.500 s, left");
    }

    #[test]
    fn probes_leave_no_line() {
        for (path, status, probe) in
            [("/health", 200, true), ("/health", 503, false), ("/metrics", 200, true), ("/props", 200, false)]
        {
            let record = Record::new(Form::Plain, Method::GET, Some(path));
            record.status(StatusCode::from_u16(status).unwrap());
            assert_eq!(record.is_probe(), probe, "{path} {status}");
        }
        assert!(!Record::new(Form::Plain, Method::GET, Some("/health")).is_probe(), "nobody was told");
    }

    #[test]
    fn lines_for_programs() {
        let line = record(Form::Json, Some(200), Some(Reply::Done(Finish::Stop, USAGE)));
        let mut value: Value = serde_json::from_str(&line).unwrap();
        let time = value.as_object_mut().unwrap().remove("time").unwrap();
        assert!(humantime::parse_rfc3339(time.as_str().unwrap()).is_ok(), "{time}");
        assert_eq!(
            value,
            json!({
                "method": "POST", "path": "/v1/completions", "status": 200, "seconds": 1.5, "finish": "stop", "prompt_tokens": 7,
                "cached_tokens": 3, "completion_tokens": 20, "queue_seconds": 0.01, "first_token_seconds": 0.25,
            })
        );
        let refused: Value = serde_json::from_str(&record(Form::Json, Some(429), None)).unwrap();
        assert_eq!((&refused["status"], refused.get("finish")), (&json!(429), None));
    }
}
