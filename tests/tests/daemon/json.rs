//! Replies that are held to JSON, from a model that never saw any.
use crate::{Daemon, sse};
use serde_json::{Value, json};

/// A schema and what every value of it has to be.
type Case = (Value, fn(&Value) -> bool);

fn cases() -> Vec<Case> {
    vec![
        (
            json!({ "type": "object", "additionalProperties": false, "required": ["name", "age", "tags"], "properties": {
                "name": { "type": "string", "minLength": 1, "maxLength": 8 },
                "age": { "type": "integer", "minimum": 0, "maximum": 120 },
                "tags": { "type": "array", "minItems": 1, "maxItems": 3, "items": { "enum": ["red", "green", "\u{1f600}"] } },
            } }),
            |v| {
                let name = v["name"].as_str().unwrap().chars().count();
                let tags = v["tags"].as_array().unwrap();
                let known = |tag: &Value| ["red", "green", "\u{1f600}"].contains(&tag.as_str().unwrap());
                v.as_object().unwrap().len() == 3
                    && (1..=8).contains(&name)
                    && v["age"].as_u64().is_some_and(|age| age <= 120)
                    && (1..=3).contains(&tags.len())
                    && tags.iter().all(known)
            },
        ),
        (
            json!({ "type": "object", "required": ["answer"], "additionalProperties": false,
                    "properties": { "answer": { "anyOf": [{ "type": "boolean" }, { "type": "null" }] } } }),
            |v| v["answer"].is_boolean() || v["answer"].is_null(),
        ),
        // One that refers to itself, as deep as the model likes.
        (
            json!({ "$defs": { "list": { "type": "object", "required": ["next"], "additionalProperties": false,
                                         "properties": { "next": { "anyOf": [{ "type": "null" }, { "$ref": "#/$defs/list" }] } } } },
                    "$ref": "#/$defs/list" }),
            |v| v.as_object().is_some_and(|v| v.contains_key("next")),
        ),
    ]
}

#[test]
fn replies_fit_their_schema() {
    let daemon = Daemon::start(&[]);
    for (i, (schema, fits)) in cases().into_iter().enumerate() {
        let format = json!({ "type": "json_schema", "json_schema": { "name": "x", "strict": true, "schema": schema } });
        for seed in 0..8 {
            let temperature = f64::from(seed % 4) / 2.0;
            let body = json!({ "prompt": "Once", "temperature": temperature, "seed": seed, "max_tokens": 400, "response_format": format });
            let (text, finish) = daemon.text(&body);
            assert_eq!(finish, "stop", "{i}: {text}");
            let value: Value = serde_json::from_str(&text).unwrap_or_else(|e| panic!("{i}: {e}: {text}"));
            assert!(fits(&value), "{i}: {text}");
            if seed == 1 {
                let mut streamed = body;
                streamed["stream"] = json!(true);
                assert_eq!(sse::text(&sse::read(&daemon, "/v1/completions", &streamed)), text);
            }
        }
    }
}

/// What is cut off by the limit of tokens is the start of an object, and what ends by itself is one.
#[test]
fn json_mode_makes_objects() {
    let daemon = Daemon::start(&[]);
    let mut whole = 0;
    for seed in 0..12 {
        // A closing brace wherever it may be, more or less, so that some end.
        let body = json!({
            "messages": [{ "role": "user", "content": "JSON" }], "temperature": 1, "seed": seed, "max_tokens": 150,
            "logit_bias": { "128": 2 * seed }, "response_format": { "type": "json_object" },
        });
        let (status, reply) = daemon.post("/v1/chat/completions", &body);
        assert_eq!(status, 200, "{reply}");
        let choice = &reply["choices"][0];
        let text = choice["message"]["content"].as_str().unwrap();
        assert!(text.starts_with('{'), "{text}");
        let value = serde_json::from_str::<Value>(text);
        if choice["finish_reason"] == "stop" {
            assert!(value.unwrap().is_object(), "{text}");
            whole += 1;
        } else {
            assert!(value.unwrap_err().is_eof(), "{text}");
        }
    }
    assert!(whole > 0, "some end");
}

/// Replay A-22: schemas that are too deep, too large, circular or not understood.
#[test]
fn schemas_that_cannot_be_are_refused() {
    let daemon = Daemon::start(&[]);
    let nested = |depth: usize| {
        (0..depth).fold(json!({ "type": "null" }), |inner, _| json!({ "type": "array", "items": inner }))
    };
    let many: Vec<String> = (0..100_000).map(|i| i.to_string()).collect();
    for schema in [
        json!(5),
        json!({ "type": "nothing" }),
        json!({ "$ref": "#" }),
        json!({ "$ref": "https://example.com/schema.json" }),
        json!({ "$ref": "#/$defs/missing" }),
        json!({ "$defs": { "a": { "$ref": "#/$defs/b" }, "b": { "$ref": "#/$defs/a" } }, "$ref": "#/$defs/a" }),
        json!({ "type": "string", "pattern": "(?=a)b" }),
        json!({ "type": "string", "pattern": "(" }),
        json!({ "not": { "type": "null" } }),
        json!({ "type": "array", "items": { "type": "null" }, "uniqueItems": true }),
        json!({ "enum": many }),
        nested(100),
    ] {
        let format = json!({ "type": "json_schema", "json_schema": { "schema": schema } });
        let body = json!({ "prompt": "a", "max_tokens": 2, "response_format": format });
        let start = std::time::Instant::now();
        let (status, reply) = daemon.post("/v1/completions", &body);
        let schema = schema.to_string().chars().take(80).collect::<String>();
        assert_eq!((status, &reply["error"]["param"]), (400, &json!("response_format")), "{schema}: {reply}");
        println!("{schema}: {} ({:?})", reply["error"]["message"], start.elapsed());
    }
    for format in [json!({ "type": "json_schema" }), json!({ "type": "grammar" }), json!("json"), json!({})] {
        let (status, _) = daemon.post("/v1/completions", &json!({ "prompt": "a", "response_format": format }));
        assert_eq!(status, 400, "{format}");
    }
    assert_eq!(daemon.health(), 200);
}
