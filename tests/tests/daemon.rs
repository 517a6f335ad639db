//! The daemon over real connections, on the bundled model: shapes, ends, leaving, and requests that no client would send.
use bitnet_pack::Options;
use bitnet_tests::model;
use serde_json::{Value, json};
use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

/// A daemon in this process, which ends with it, and the folder of its image.
fn start() -> (SocketAddr, tempfile::TempDir) {
    let folder = tempfile::tempdir().unwrap();
    let image = folder.path().join("stories.bitnet");
    bitnet_pack::pack(&model("stories-ternary"), &image, &Options::default(), &mut ()).unwrap();
    let args = ["bitnetd", "--model", image.to_str().unwrap(), "--threads", "1", "--sessions", "4", "--queue", "8"];
    let settings = bitnetd::config::Settings::parse(args).unwrap();
    let (sender, receiver) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
            sender.send(listener.local_addr().unwrap()).unwrap();
            bitnetd::serve(settings, listener, std::future::pending()).await.unwrap();
        });
    });
    (receiver.recv().unwrap(), folder)
}

/// Sends bytes and reads until the daemon closes: status and all after the headers.
fn exchange(address: SocketAddr, bytes: &[u8]) -> (u16, String) {
    let mut stream = TcpStream::connect(address).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
    // A daemon that refuses may close before it has read all.
    let _ = stream.write_all(bytes);
    let mut answer = Vec::new();
    let _ = stream.read_to_end(&mut answer);
    let answer = String::from_utf8(answer).expect("whole characters");
    let (head, body) = answer.split_once("\r\n\r\n").unwrap_or((&answer, ""));
    (head.split(' ').nth(1).and_then(|status| status.parse().ok()).unwrap_or(0), body.to_owned())
}

fn request(line: &str, headers: &str, body: &str) -> Vec<u8> {
    let length = body.len();
    format!("{line} HTTP/1.1\r\nConnection: close\r\nContent-Length: {length}\r\n{headers}\r\n{body}").into_bytes()
}

const JSON: &str = "Host: localhost\r\nContent-Type: application/json\r\n";

fn complete(address: SocketAddr, body: &Value) -> (u16, Value) {
    let (status, body) = exchange(address, &request("POST /v1/completions", JSON, &body.to_string()));
    (status, serde_json::from_str(&body).unwrap())
}

fn text(address: SocketAddr, body: &Value) -> (String, String) {
    let (status, reply) = complete(address, body);
    assert_eq!(status, 200, "{reply}");
    let choice = &reply["choices"][0];
    (choice["text"].as_str().unwrap().to_owned(), choice["finish_reason"].as_str().unwrap().to_owned())
}

fn metric(address: SocketAddr, name: &str) -> u64 {
    let (_, text) = exchange(address, &request("GET /metrics", "Host: localhost\r\n", ""));
    text.lines().find_map(|line| line.strip_prefix(name)?.trim().parse().ok()).unwrap()
}

fn ready(address: SocketAddr) {
    let end = Instant::now() + Duration::from_secs(60);
    while exchange(address, &request("GET /health", "Host: localhost\r\n", "")).0 != 200 {
        assert!(Instant::now() < end, "the model loads");
        std::thread::sleep(Duration::from_millis(10));
    }
}

#[test]
fn the_contract() {
    let (address, _folder) = start();
    ready(address);
    let story = json!({ "prompt": "Once upon a time", "temperature": 0, "max_tokens": 60 });
    let (alone, finish) = text(address, &story);
    assert!(alone.starts_with(", there was") && finish == "length", "{alone}");
    // Together, and from memory: the same text.
    std::thread::scope(|scope| {
        let replies: Vec<_> = (0..4).map(|_| scope.spawn(|| text(address, &story).0)).collect();
        replies.into_iter().for_each(|reply| assert_eq!(reply.join().unwrap(), alone));
    });

    // Replay A-10: nothing of a text that ends the reply is sent, though it lies across tokens.
    let mut stopped = story.clone();
    stopped["stop"] = json!(["re wa"]);
    assert_eq!(text(address, &stopped), (", the".to_owned(), "stop".to_owned()));

    // Replay A-09: each byte of a character is a token, and the limit falls between them. The penalty makes one follow the other.
    let bias = json!({ "243": 100, "162": 80, "155": 60, "131": 40 });
    let mut emoji = json!({ "prompt": "a", "temperature": 0, "logit_bias": bias, "repetition_penalty": 100 });
    for (n, expected) in [(1, "\u{fffd}"), (2, "\u{fffd}"), (3, "\u{fffd}"), (4, "\u{1f600}")] {
        emoji["max_tokens"] = json!(n);
        assert_eq!(text(address, &emoji).0, expected, "{n} tokens");
    }

    // Replay A-12: pieces, the end once, the cost, and [DONE].
    let mut streamed = story.clone();
    streamed["stream"] = json!(true);
    streamed["stream_options"] = json!({ "include_usage": true });
    let (status, body) = exchange(address, &request("POST /v1/completions", JSON, &streamed.to_string()));
    let chunks: Vec<Value> =
        body.lines().filter_map(|l| serde_json::from_str(l.strip_prefix("data: ")?).ok()).collect();
    let pieces: String = chunks.iter().filter_map(|chunk| chunk["choices"][0]["text"].as_str()).collect();
    let ends = chunks.iter().filter(|chunk| chunk["choices"][0]["finish_reason"].is_string()).count();
    assert_eq!((status, &pieces, ends), (200, &alone, 1));
    assert_eq!(chunks.last().unwrap()["usage"]["completion_tokens"], 60);
    assert!(body.contains("data: [DONE]\n\n"), "{body}");

    // Replay A-11: whoever leaves costs no more.
    let mut stream = TcpStream::connect(address).unwrap();
    let long = json!({ "prompt": "Once", "max_tokens": 500, "stream": true, "logit_bias": { "2": -100 } });
    stream.write_all(&request("POST /v1/completions", JSON, &long.to_string())).unwrap();
    stream.read_exact(&mut [0; 200]).unwrap();
    drop(stream);
    let end = Instant::now() + Duration::from_secs(20);
    while metric(address, "bitnetd_requests_active ") > 0 {
        assert!(Instant::now() < end, "it stops");
    }
    assert_eq!(text(address, &story).0, alone);
}

#[test]
fn hostile_requests_are_refused_and_nobody_else_notices() {
    let (address, _folder) = start();
    ready(address);
    let post = |headers: &str, body: &str| request("POST /v1/completions", headers, body);
    let json = |body: &str| post(JSON, body);
    // Replay A-22: depth.
    let deep = |n: usize| json(&format!("{{\"prompt\":{}", "[".repeat(n)));
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
        (400, json("{\"prompt\":\"a\",\"response_format\":{\"type\":\"json_object\"}}")),
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
        (400, b"\x16\x03\x01\x02\x00\r\n\r\n".to_vec()),
    ];
    for (i, (expected, bytes)) in cases.into_iter().enumerate() {
        let (status, body) = exchange(address, &bytes);
        assert_eq!(status, expected, "{i}: {body}");
    }
    ready(address);
}
