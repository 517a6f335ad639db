//! Requests that no client of good will sends.
use crate::{Daemon, JSON, Signal, request};
use serde_json::json;
use std::io::{Read as _, Write as _};
use std::time::{Duration, Instant};

/// Longer than any refusal takes, and far shorter than what a refusal avoids.
const SOON: Duration = Duration::from_secs(60);

#[test]
fn hostile_requests_are_refused_and_nobody_else_notices() {
    let daemon = Daemon::start(&[]);
    let story = json!({ "prompt": "Once upon a time", "temperature": 0, "max_tokens": 30 });
    let (alone, _) = daemon.text(&story);
    let ask = || {
        let start = Instant::now();
        assert_eq!(daemon.text(&story).0, alone);
        start.elapsed()
    };
    let before: Vec<_> = (0..20).map(|_| ask()).collect();
    let post = |headers: &str, body: &str| request("POST /v1/completions", headers, body);
    let json = |body: &str| post(JSON, body);
    // Replay A-22: depth.
    let deep = |n: usize| json(&format!("{{\"prompt\":{}", "[".repeat(n)));
    let mut invalid_utf8 = json("{\"prompt\":\"??\"}");
    let n = invalid_utf8.len();
    invalid_utf8[n - 4..n - 2].copy_from_slice(&[0xc3, 0x28]);
    let raw = |headers: &str| {
        format!("POST /v1/completions HTTP/1.1\r\nConnection: close\r\n{JSON}{headers}\r\n{{}}").into_bytes()
    };
    let cases = [
        (400, deep(100)),
        (400, deep(3_000)),
        (400, deep(60_000)),
        (400, deep(1_000_000)),
        (413, json(&"[".repeat(2_000_000))),
        (400, json("")),
        (400, json("\u{0}")),
        (400, json("{\"prompt\":5}")),
        (400, json("{\"prompt\":\"\\ud800\"}")),
        (400, json("{\"prompt\":\"a\",\"n\":2}")),
        (400, json("{\"prompt\":\"a\",\"max_tokens\":-1}")),
        (400, json("{\"prompt\":\"a\",\"max_tokens\":99999999999999999999}")),
        (400, json("{\"prompt\":\"a\",\"temperature\":1e99}")),
        (400, json("{\"prompt\":\"a\",\"top_p\":-1}")),
        (400, json("{\"prompt\":\"a\",\"logit_bias\":{\"512\":1}}")),
        (400, json("{\"prompt\":\"a\",\"logit_bias\":{\"-1\":1}}")),
        (400, json("{\"prompt\":\"a\",\"response_format\":{\"type\":\"grammar\"}}")),
        (400, json("{\"prompt\":[512]}")),
        (400, json("{\"prompt\":[]}")),
        (400, json(&format!("{{\"prompt\":[{}1]}}", "1,".repeat(600)))),
        (404, json("{\"prompt\":\"a\",\"model\":\"../../etc/passwd\"}")),
        (415, post("Host: localhost\r\nContent-Type: text/plain\r\n", "{}")),
        (403, post(&JSON.replace("localhost", "evil.example"), "{}")),
        (403, post(&format!("{JSON}Origin: http://evil.example\r\n"), "{}")),
        (403, post(&format!("{JSON}Origin: null\r\n"), "{}")),
        (400, post("Content-Type: application/json\r\n", "{}")),
        (400, post(&format!("{JSON}Host: localhost\r\n"), "{}")),
        (403, request("GET http://evil.example/health", "Host: localhost\r\n", "")),
        (404, request("GET /../../etc/passwd", "Host: localhost\r\n", "")),
        (405, request("DELETE /v1/models", "Host: localhost\r\n", "")),
        (501, request("POST /v1/embeddings", JSON, "{}")),
        (431, request("GET /health", &format!("Host: localhost\r\nX: {}\r\n", "x".repeat(64 << 10)), "")),
        (403, post(&JSON.replace("localhost", "localhost.evil.example"), "{}")),
        (403, post(&JSON.replace("localhost", "localhost@evil.example"), "{}")),
        (400, post(&JSON.replace("localhost", "a b"), "{}")),
        (403, post(&format!("{JSON}Origin: http://localhost:1\r\n"), "{}")),
        (403, post(&format!("{JSON}Origin: file://localhost\r\n"), "{}")),
        (400, post(&format!("{JSON}Origin: \u{e9}\r\n"), "{}")),
        (415, post("Host: localhost\r\n", "{}")),
        (415, post("Host: localhost\r\nContent-Type: application/x-www-form-urlencoded\r\n", "{}")),
        (400, json("{\"prompt\":\"a\",\"stop\":[1]}")),
        (400, json(&format!("{{\"prompt\":\"a\",\"stop\":[{}\"x\"]}}", "\"x\",".repeat(100)))),
        (400, json("{\"prompt\":\"a\",\"seed\":1.5}")),
        (400, json("{\"prompt\":\"a\",\"temperature\":\"hot\"}")),
        (400, json("{\"prompt\":\"a\"} x")),
        (400, request("POST /tokenize", JSON, "{\"content\":5}")),
        (400, request("POST /detokenize", JSON, "{\"tokens\":[-1]}")),
        (400, request("POST /v1/chat/completions", JSON, "{\"messages\":[]}")),
        (400, request("POST /v1/chat/completions", JSON, "{\"messages\":[{\"role\":\"root\",\"content\":\"a\"}]}")),
        (400, invalid_utf8),
        (400, raw("Content-Length: 5\r\nContent-Length: 6\r\n")),
        (400, raw("Content-Length: -1\r\n")),
        (400, raw("Content-Length: 1e3\r\n")),
        (400, raw("Transfer-Encoding: gzip\r\n")),
        (400, raw("X: a\r\n folded\r\n")),
        (400, raw("X : a\r\n")),
        (400, b"GET /health HTTP/1.1\nHost: localhost\n\0\n\n".to_vec()),
        (431, request("GET /health", &format!("Host: localhost\r\n{}", "X: y\r\n".repeat(200)), "")),
        (431, request(&format!("GET /{}", "x".repeat(70_000)), "Host: localhost\r\n", "")),
        (400, b"\x16\x03\x01\x02\x00\r\n\r\n".to_vec()),
    ];
    let refuse = |i: usize, (expected, bytes): &(u16, Vec<u8>)| {
        let start = Instant::now();
        let (status, body) = daemon.exchange(bytes);
        assert_eq!(status, *expected, "{i}: {body}");
        assert!(start.elapsed() < SOON, "{i}: {:?}", start.elapsed());
        start.elapsed()
    };
    // A client of good will asks all the while.
    let (refusals, beside) = std::thread::scope(|scope| {
        let client = scope.spawn(|| (0..8).map(|_| ask()).collect::<Vec<_>>());
        let mut refusals = Vec::new();
        while refusals.is_empty() || !client.is_finished() {
            refusals.extend(cases.iter().enumerate().map(|(i, case)| refuse(i, case)));
        }
        (refusals, client.join().unwrap())
    });
    assert_eq!(daemon.health(), 200);
    for (what, times) in [("refusals", refusals), ("a reply alone", before), ("a reply beside them", beside)] {
        println!("{what}: {}", in_short(times));
    }
}

/// The median and the most of some times.
fn in_short(mut times: Vec<Duration>) -> String {
    times.sort();
    format!(
        "{:.1?} in the middle and {:.1?} at most, of {}",
        times[times.len() / 2],
        times[times.len() - 1],
        times.len()
    )
}

/// Two lengths of one body: what a proxy takes for the body may be a second request to us. Neither is answered.
#[test]
fn nothing_is_smuggled() {
    let daemon = Daemon::start(&[]);
    let second = "GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n";
    for lengths in
        ["Content-Length: 4\r\nTransfer-Encoding: chunked\r\n", "Transfer-Encoding: chunked\r\nContent-Length: 4\r\n"]
    {
        let bytes = format!("POST /tokenize HTTP/1.1\r\nConnection: close\r\n{JSON}{lengths}\r\n0\r\n\r\n{second}");
        let mut answer = String::new();
        let _ = daemon.send(bytes.as_bytes()).read_to_string(&mut answer);
        assert_eq!(answer.matches("HTTP/1.1 ").count(), 1, "{answer}");
        assert!(answer.starts_with("HTTP/1.1 400"), "{answer}");
    }
}

/// Headers and bodies that come byte by byte, or never, end after the time that they have; others are answered meanwhile.
#[test]
fn slow_requests_end() {
    let daemon = Daemon::start(&["--read-seconds", "2"]);
    let head = b"POST /tokenize HTTP/1.1\r\n";
    let body = format!("POST /tokenize HTTP/1.1\r\n{JSON}Content-Length: 50\r\n\r\n{{");
    let start = Instant::now();
    let mut slow: Vec<_> = [&head[..], body.as_bytes()].map(|bytes| daemon.send(bytes)).into();
    // Some bytes more do not buy more time.
    while start.elapsed() < Duration::from_millis(1500) {
        for stream in &mut slow {
            let _ = stream.write_all(b"a");
        }
        assert_eq!(daemon.health(), 200);
        std::thread::sleep(Duration::from_millis(50));
    }
    for (stream, expected) in slow.iter_mut().zip(["", "HTTP/1.1 408"]) {
        let mut answer = String::new();
        let _ = stream.read_to_string(&mut answer);
        assert!(answer.starts_with(expected), "{answer}");
    }
    assert!(start.elapsed() > Duration::from_millis(1900) && start.elapsed() < SOON, "{:?}", start.elapsed());
}

/// A key, where there are any, is asked for everywhere but for the state of the service.
#[test]
fn keys() {
    let keys = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(keys.path(), "first-key-of-some-length\nsecond-key-of-some-length\n").unwrap();
    let daemon = Daemon::start(&["--api-key-file", keys.path().to_str().unwrap()]);
    for (key, status) in [
        ("", 401),
        ("Authorization: Bearer first-key-of-some-lengtX\r\n", 401),
        ("Authorization: Bearer first-key-of-some-length-and-more\r\n", 401),
        ("Authorization: Basic first-key-of-some-length\r\n", 401),
        ("Authorization: Bearer first-key-of-some-length\r\n", 200),
        ("authorization: bearer second-key-of-some-length\r\n", 200),
    ] {
        let headers = format!("Host: localhost\r\n{key}");
        assert_eq!(daemon.exchange(&request("GET /v1/models", &headers, "")).0, status, "{key}");
        assert_eq!(daemon.exchange(&request("GET /metrics", &headers, "")).0, status, "{key}");
    }
    assert_eq!(daemon.health(), 200);
    let open = ["bitnetd", "--model", "x", "--listen", "0.0.0.0:0"];
    assert!(bitnetd::config::Task::new(open).unwrap_err().to_string().contains("--api-key-file"));
}

/// SIGHUP brings the keys and names that the files have now; what is wrong with them changes nothing.
#[test]
fn keys_and_names_change_while_it_runs() {
    let (keys, config) = (tempfile::NamedTempFile::new().unwrap(), tempfile::NamedTempFile::new().unwrap());
    let names = |names: &str| std::fs::write(config.path(), format!("allow-host = [{names}]\n")).unwrap();
    std::fs::write(keys.path(), "first-key-of-some-length\n").unwrap();
    names("'pi'");
    let path = |file: &tempfile::NamedTempFile| file.path().to_str().unwrap().to_owned();
    let daemon = Daemon::start(&["--api-key-file", &path(&keys), "--config", &path(&config)]);
    let status = |host: &str, key: &str| {
        let headers = format!("Host: {host}\r\nAuthorization: Bearer {key}-key-of-some-length\r\n");
        daemon.exchange(&request("GET /v1/models", &headers, "")).0
    };
    assert_eq!([status("pi", "first"), status("pi", "second"), status("pi.local", "first")], [200, 401, 403]);
    std::fs::write(keys.path(), "second-key-of-some-length\n").unwrap();
    names("'pi.local'");
    daemon.signal(Signal::Reload);
    daemon.until("the new key counts", || status("localhost", "second") == 200);
    assert_eq!([status("localhost", "first"), status("pi.local", "second"), status("pi", "second")], [401, 200, 403]);
    // A key that is too short: neither it nor the names of the same moment count.
    std::fs::write(keys.path(), "third\n").unwrap();
    names("'pi'");
    daemon.signal(Signal::Reload);
    // Signals are taken one after another, so that when the file is well again the wrong one has been read.
    assert_eq!([status("localhost", "second"), status("pi", "second")], [200, 403]);
    std::fs::write(keys.path(), "third-key-of-some-length\n").unwrap();
    daemon.signal(Signal::Reload);
    daemon.until("the third key counts", || status("pi", "third") == 200);
}
