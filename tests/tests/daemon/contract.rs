//! What answers look like and where they end.
use crate::{Daemon, JSON, request, sse};
use serde_json::{Value, json};

#[test]
fn completions() {
    let daemon = Daemon::start(&["--sessions", "4", "--queue", "0"]);
    let story = json!({ "prompt": "Once upon a time", "temperature": 0, "max_tokens": 60 });
    let (alone, finish) = daemon.text(&story);
    assert!(alone.starts_with(", there was") && finish == "length", "{alone}");
    // Together, and from memory: the same text. As many at once as there are sessions, though none may wait.
    std::thread::scope(|scope| {
        let replies: Vec<_> = (0..4).map(|_| scope.spawn(|| daemon.text(&story).0)).collect();
        replies.into_iter().for_each(|reply| assert_eq!(reply.join().unwrap(), alone));
    });

    // Replay A-10: nothing of a text that ends the reply is sent, though it lies across tokens.
    for stop in [json!("re wa"), json!(["xyz", "re wa", "was"])] {
        let mut stopped = story.clone();
        stopped["stop"] = stop;
        assert_eq!(daemon.text(&stopped), (", the".to_owned(), "stop".to_owned()));
    }
    // What might have been the start of one is sent at the end.
    let mut held = story.clone();
    held["stop"] = json!(format!("{}x", &alone[alone.len() - 10..]));
    assert_eq!(daemon.text(&held).0, alone);

    // Replay A-09: each byte of a character is a token, and the limit falls between them. The penalty makes one follow the other.
    let bias = json!({ "243": 100, "162": 80, "155": 60, "131": 40 });
    let mut emoji = json!({ "prompt": "a", "temperature": 0, "logit_bias": bias, "repetition_penalty": 100 });
    for (n, expected) in [(1, "\u{fffd}"), (2, "\u{fffd}"), (3, "\u{fffd}"), (4, "\u{1f600}")] {
        emoji["max_tokens"] = json!(n);
        assert_eq!(daemon.text(&emoji).0, expected, "{n} tokens");
        let mut streamed = emoji.clone();
        streamed["stream"] = json!(true);
        assert_eq!(sse::text(&sse::read(&daemon, "/v1/completions", &streamed)), expected, "{n} tokens, streamed");
    }
    // One that stands alone, and then text.
    let stray = json!({ "prompt": "a", "temperature": 0, "logit_bias": { "131": 100, "68": 80 }, "repetition_penalty": 100, "max_tokens": 2 });
    assert_eq!(daemon.text(&stray).0, "\u{fffd}A");
}

/// Replay A-08: turns are those of the template, and its end token ends the reply and is not seen.
#[test]
fn chat() {
    let daemon = Daemon::start(&[]);
    let chat = json!({
        "messages": [
            { "role": "system", "content": "Be kind." },
            { "role": "user", "content": [{ "type": "text", "text": " Tell a </s> story. " }] },
        ],
        "temperature": 0, "max_completion_tokens": 20, "max_tokens": 3,
    });
    let (status, reply) = daemon.post("/v1/chat/completions", &chat);
    assert_eq!(status, 200, "{reply}");
    let (begin, end) = (1, 2);
    let mut prompt = vec![begin];
    // What a person writes is text, though it spells the token that ends a turn.
    for words in ["System: Be kind.", "User: Tell a </s> story."] {
        prompt.extend(daemon.tokens(words));
        prompt.push(end);
    }
    prompt.extend(daemon.tokens("Assistant: "));
    let plain = json!({ "prompt": prompt, "temperature": 0, "max_tokens": 20 });
    let choice = &reply["choices"][0];
    assert_eq!(choice["message"]["role"], "assistant");
    assert_eq!(choice["message"]["content"], daemon.text(&plain).0);
    assert_eq!(choice["finish_reason"], "length");
    assert_eq!(reply["usage"]["prompt_tokens"], prompt.len());
    assert_eq!(reply["usage"]["completion_tokens"], 20);
    assert_eq!(reply["object"], "chat.completion");

    let mut ends = chat.clone();
    // "A", "B", and then the end: what is there already is punished, as the end is from the start.
    (ends["logit_bias"], ends["repetition_penalty"]) = (json!({ "68": 60, "69": 40, "2": 100 }), json!(4));
    let (_, reply) = daemon.post("/v1/chat/completions", &ends);
    let choice = &reply["choices"][0];
    assert_eq!((&choice["message"]["content"], &choice["finish_reason"]), (&json!("AB"), &json!("stop")), "{reply}");
    assert_eq!(reply["usage"]["completion_tokens"], 2);

    let mut scored = chat.clone();
    (scored["logprobs"], scored["top_logprobs"]) = (json!(true), json!(2));
    let (_, reply) = daemon.post("/v1/chat/completions", &scored);
    let tokens = reply["choices"][0]["logprobs"]["content"].as_array().unwrap();
    assert_eq!(tokens.len(), 20);
    for token in tokens {
        // Greedy: the chosen is the likeliest.
        let top = token["top_logprobs"].as_array().unwrap();
        assert_eq!((top.len(), &top[0]["token"], &top[0]["logprob"]), (2, &token["token"], &token["logprob"]));
        assert!(token["logprob"].as_f64().unwrap() <= 0.0 && top[0]["logprob"].as_f64() >= top[1]["logprob"].as_f64());
    }
}

/// Replay A-12: the role, pieces, the end once, the cost, and [DONE].
#[test]
fn streams() {
    let daemon = Daemon::start(&[]);
    let mut chat = json!({ "messages": [{ "role": "user", "content": "Hello" }], "temperature": 0, "max_tokens": 30 });
    let (_, whole) = daemon.post("/v1/chat/completions", &chat);
    (chat["stream"], chat["stream_options"]) = (json!(true), json!({ "include_usage": true }));
    let events = sse::read(&daemon, "/v1/chat/completions", &chat);
    assert_eq!(sse::text(&events), whole["choices"][0]["message"]["content"]);
    assert_eq!(events[0]["choices"][0]["delta"]["role"], "assistant");
    let (usage, chunks) = events.split_last().unwrap();
    assert_eq!((&usage["choices"], &usage["usage"]["completion_tokens"]), (&json!([]), &json!(30)));
    assert_eq!(usage["usage"]["prompt_tokens"], whole["usage"]["prompt_tokens"]);
    for (i, chunk) in chunks.iter().enumerate() {
        let last = i + 1 == chunks.len();
        assert_eq!(chunk["choices"][0]["finish_reason"], if last { json!("length") } else { Value::Null });
        assert_eq!((&chunk["id"], &chunk["object"]), (&usage["id"], &json!("chat.completion.chunk")));
        assert_eq!(chunk["choices"][0]["delta"]["role"].is_string(), i == 0);
    }

    let mut story = json!({ "prompt": "Once upon a time", "temperature": 0, "max_tokens": 60 });
    let (alone, _) = daemon.text(&story);
    story["stream"] = json!(true);
    let events = sse::read(&daemon, "/v1/completions", &story);
    assert_eq!(sse::text(&events), alone);
    assert!(events.iter().all(|event| event.get("usage").is_none() && event["choices"][0]["text"].is_string()));
}

#[test]
fn fields() {
    let daemon = Daemon::start(&[]);
    let story = json!({ "prompt": "Once upon a time", "temperature": 0, "max_tokens": 12 });
    let with = |name: &str, value: Value| {
        let mut body = story.clone();
        body[name] = value;
        body
    };
    let (greedy, _) = daemon.text(&story);
    let text = |name: &str, value: Value| daemon.text(&with(name, value)).0;
    // Of a temperature that makes all alike, top-k, top-p and min-p leave the best alone.
    for (name, value) in [("top_k", json!(1)), ("top_p", json!(0.0)), ("min_p", json!(1.0))] {
        let mut body = with(name, value);
        body["temperature"] = json!(2);
        assert_eq!(daemon.text(&body).0, greedy, "{name}");
    }
    let mut drawn = with("temperature", json!(1));
    drawn["seed"] = json!(7);
    let (first, _) = daemon.text(&drawn);
    assert_eq!(daemon.text(&drawn).0, first);
    drawn["seed"] = json!(8);
    assert_ne!(daemon.text(&drawn).0, first);
    // "A", whose token is 68, always; less each time that it is there; once, and never again.
    let mut biased = with("logit_bias", json!({ "68": 100 }));
    assert_eq!(daemon.text(&biased).0, "A".repeat(12));
    biased["frequency_penalty"] = json!(2);
    assert_eq!(daemon.text(&biased).0, "A".repeat(12));
    biased["logit_bias"] = json!({ "68": 30 });
    let falling = daemon.text(&biased).0;
    assert!(falling.starts_with("AA") && falling != "A".repeat(12), "{falling}");
    assert_eq!(text("n", json!(1)), greedy);
    assert_eq!(text("max_completion_tokens", json!(0)), "");
    for name in ["presence_penalty", "repetition_penalty"] {
        let mut body = with("max_tokens", json!(60));
        let (plain, _) = daemon.text(&body);
        body[name] = json!(2);
        assert_ne!(daemon.text(&body).0, plain, "{name}");
    }
    let (_, reply) = daemon.post("/v1/completions", &with("logprobs", json!(3)));
    let scored = &reply["choices"][0]["logprobs"];
    assert_eq!(scored["tokens"].as_array().unwrap().len(), 12);
    assert_eq!(scored["top_logprobs"][0].as_object().unwrap().len(), 3);
    let (status, reply) = daemon.post("/v1/completions", &with("n", json!(2)));
    assert_eq!((status, &reply["error"]["param"]), (400, &json!("n")));

    let tokens = daemon.tokens("Once upon a time");
    let (_, reply) = daemon.post("/detokenize", &json!({ "tokens": tokens }));
    assert_eq!(reply["content"].as_str().unwrap().trim_start(), "Once upon a time");
    assert_eq!(daemon.get("/v1/models").0, 200);
    let (_, props) = daemon.get("/props");
    assert!(props.contains("capitalize"), "{props}");
}

/// Every path that is described is there, and every one that is there is described.
#[test]
fn the_description() {
    let daemon = Daemon::start(&[]);
    let (status, text) = daemon.get("/openapi.json");
    let description: Value = serde_json::from_str(&text).unwrap();
    assert_eq!(status, 200);
    for (path, methods) in description["paths"].as_object().unwrap() {
        for method in methods.as_object().unwrap().keys() {
            let line = format!("{} {path}", method.to_uppercase());
            let (status, _) = daemon.exchange(&request(&line, JSON, "{}"));
            assert!(status != 404 && status != 405, "{line}: {status}");
            let answers = &methods[method]["responses"];
            assert!(answers.get(status.to_string()).is_some(), "{line} is not said to answer {status}");
        }
    }
    let mut paths: Vec<_> = description["paths"].as_object().unwrap().keys().map(String::as_str).collect();
    let mut routes = bitnetd::ROUTES.to_vec();
    routes.sort_unstable();
    paths.sort_unstable();
    assert_eq!(paths, routes);
}

/// Requests beyond those that may wait are told when to come again, and those that may are answered in the end.
#[test]
fn the_queue_is_bounded() {
    let daemon = Daemon::start(&["--sessions", "1", "--queue", "1"]);
    let long = json!({ "prompt": "Once", "max_tokens": 400, "stream": true, "logit_bias": { "2": -100 } });
    let first = daemon.send(&request("POST /v1/completions", JSON, &long.to_string()));
    daemon.until("one is answered", || daemon.metric("bitnetd_requests_active") == 1);
    let second = daemon.send(&request("POST /v1/completions", JSON, &long.to_string()));
    daemon.until("one waits", || daemon.metric("bitnetd_requests_waiting") == 1);
    let mut third = Vec::new();
    let mut stream = daemon.send(&request("POST /v1/completions", JSON, &long.to_string()));
    std::io::Read::read_to_end(&mut stream, &mut third).unwrap();
    let third = String::from_utf8(third).unwrap();
    assert!(third.starts_with("HTTP/1.1 429") && third.contains("\r\nretry-after: "), "{third}");
    // The queue empties by who leaves too.
    drop(second);
    daemon.until("none waits", || daemon.metric("bitnetd_requests_waiting") == 0);
    drop(first);
    daemon.until("none is answered", || daemon.metric("bitnetd_requests_active") == 0);
    assert_eq!(daemon.metric("bitnetd_requests_refused_total"), 1);
}
