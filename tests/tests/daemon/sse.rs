//! Server-sent events, taken apart byte by byte.
use crate::{Daemon, JSON, request};
use serde_json::Value;
use std::io::Read as _;

/// Reads a stream that ends well, in reads of one byte, and gives its events but the last, `[DONE]`.
///
/// # Panics
/// If a chunk of the transfer is not one whole event, an event is not JSON, or something follows the last.
pub(crate) fn read(daemon: &Daemon, path: &str, body: &Value) -> Vec<Value> {
    let mut stream = daemon.send(&request(&format!("POST {path}"), JSON, &body.to_string()));
    let mut byte = [0];
    let mut next = || (stream.read(&mut byte).unwrap() == 1).then_some(byte[0]);
    let mut line = || {
        let mut line = Vec::new();
        while !line.ends_with(b"\r\n") {
            line.push(next()?);
        }
        line.truncate(line.len() - 2);
        Some(String::from_utf8(line).expect("a line of text"))
    };
    assert_eq!(line().unwrap(), "HTTP/1.1 200 OK");
    let headers: Vec<String> = std::iter::from_fn(|| line().filter(|line| !line.is_empty())).collect();
    assert!(headers.iter().any(|header| header == "content-type: text/event-stream"), "{headers:?}");
    let mut events = Vec::new();
    loop {
        let size = usize::from_str_radix(&line().expect("a size"), 16).unwrap();
        if size == 0 {
            break;
        }
        // Event lines end with single line feeds, so what the transfer adds is all that a line here ends with.
        let chunk = line().expect("a chunk");
        assert_eq!(chunk.len(), size);
        let event = chunk.strip_prefix("data: ").and_then(|event| event.strip_suffix("\n\n")).expect("one event");
        assert!(!event.contains('\n'), "{event}");
        events.push(event.to_owned());
    }
    assert_eq!((line().as_deref(), line()), (Some(""), None), "nothing follows");
    assert_eq!(events.pop().unwrap(), "[DONE]");
    events.iter().map(|event| serde_json::from_str(event).unwrap_or_else(|e| panic!("{e}: {event}"))).collect()
}

/// The text of all events.
pub(crate) fn text(events: &[Value]) -> String {
    let choice = |event: &Value| {
        let choice = &event["choices"][0];
        Some(choice["text"].as_str().or_else(|| choice["delta"]["content"].as_str())?.to_owned())
    };
    events.iter().filter_map(choice).collect()
}
