//! What was read before is not read again, and no reply shows it.
use crate::{Daemon, pack_with};
use bitnet_tests::golden;
use serde_json::{Value, json};
use std::path::Path;

/// The reply and how many tokens of its prompt were there, which is the reply of a daemon that remembers nothing.
fn ask(daemon: &Daemon, prompt: &[u32]) -> (String, usize) {
    let body =
        |cache: bool| json!({ "prompt": prompt, "temperature": 1, "seed": 3, "max_tokens": 8, "cache_prompt": cache });
    let read = |cache: bool| {
        let (status, reply) = daemon.post("/v1/completions", &body(cache));
        assert_eq!(status, 200, "{reply}");
        let cached = reply["usage"]["prompt_tokens_details"]["cached_tokens"].as_u64().unwrap();
        (reply["choices"][0]["text"].as_str().unwrap().to_owned(), cached as usize)
    };
    let (text, cached) = read(true);
    assert_eq!(read(false), (text.clone(), 0), "{cached} were there");
    (text, cached)
}

fn tokens(seed: u32, n: u32) -> Vec<u32> {
    (0..n).map(|i| 3 + (i * i + seed * 31 + i * seed) % 100).collect()
}

#[test]
fn replies_are_the_same_from_memory() {
    // One conversation: each request drives out what the one before had read.
    let daemon = Daemon::start(&["--sessions", "1", "--prompt-cache", "64M"]);
    let system = tokens(1, 60);
    let with = |seed: u32| [&*system, &tokens(seed, 30)].concat();
    let (a, b) = (with(2), with(3));
    assert_eq!(ask(&daemon, &a).1, 0);
    assert_eq!(ask(&daemon, &b).1, system.len(), "from where they part");
    assert_eq!(ask(&daemon, &[&*a, &tokens(9, 5)].concat()).1, a.len());
    assert_eq!(ask(&daemon, &a).1, a.len() - 1, "the last token is read");
    assert_eq!(ask(&daemon, &tokens(7, 40)).1, 0);
    assert_eq!(ask(&daemon, &b).1, b.len() - 1);
    assert!(daemon.metric("bitnetd_prompts_restored_total") >= 2);
    assert!(daemon.metric("bitnetd_prompt_cache_bytes") > 0);
}

#[test]
fn a_conversation_that_is_busy_is_copied() {
    let daemon = Daemon::start(&["--sessions", "2", "--prompt-cache", "0"]);
    let system = tokens(1, 60);
    let long = json!({ "prompt": system, "max_tokens": 400, "stream": true, "logit_bias": { "2": -100 } });
    let first = daemon.send(&crate::request("POST /v1/completions", crate::JSON, &long.to_string()));
    daemon.until("it is read", || daemon.metric("bitnetd_generated_tokens_total") > 0);
    assert_eq!(ask(&daemon, &[&*system, &tokens(2, 30)].concat()).1, system.len());
    assert_eq!(daemon.metric("bitnetd_prompts_forked_total"), 1);
    drop(first);
}

/// A model with a memory, whose conversations cannot be cut: what begins as another did starts from a snapshot of where they parted.
#[test]
fn recurrent_models_start_from_snapshots() {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("recurrent");
    let characters: Vec<char> = (' '..='~').chain('\u{e0}'..='\u{ff}').collect();
    let mut vocab = serde_json::Map::new();
    for (i, name) in ["<unk>".to_owned(), "<s>".to_owned(), "</s>".to_owned()].into_iter().enumerate() {
        vocab.insert(name, json!(i));
    }
    for (i, character) in characters.iter().take(125).enumerate() {
        vocab.insert(character.to_string(), json!(i + 3));
    }
    let special = |id: u32, name: &str| json!({ "id": id, "content": name, "single_word": false, "lstrip": false, "rstrip": false, "normalized": false, "special": true });
    let tokenizer = json!({
        "version": "1.0", "truncation": null, "padding": null, "normalizer": null, "pre_tokenizer": null, "post_processor": null,
        "added_tokens": [special(0, "<unk>"), special(1, "<s>"), special(2, "</s>")],
        "decoder": { "type": "Fuse" },
        "model": { "type": "BPE", "dropout": null, "unk_token": "<unk>", "continuing_subword_prefix": null, "end_of_word_suffix": null,
                   "fuse_unk": true, "byte_fallback": false, "vocab": Value::Object(vocab), "merges": [] },
    });
    let image = pack_with(&golden("bitrnn_m"), &folder, &[("tokenizer.json", &tokenizer)]);
    let daemon = Daemon::of(&image, &["--sessions", "1", "--prompt-cache", "64M"]);
    let system = tokens(1, 60);
    let with = |seed: u32| [&*system, &tokens(seed, 30)].concat();
    assert_eq!(ask(&daemon, &with(2)).1, 0);
    assert_eq!(ask(&daemon, &with(3)).1, 0, "nothing was kept where they part");
    assert_eq!(ask(&daemon, &with(4)).1, system.len(), "but then it was");
    assert_eq!(ask(&daemon, &[&*with(2), &tokens(9, 5)].concat()).1, with(2).len(), "and after every prompt");
    assert!(ask(&daemon, &with(2)).1 > system.len(), "and before its last batch, for when it comes again");
    // Its conversations have no end, whatever the checkpoint says of positions.
    let (_, props) = daemon.get("/props");
    assert!(props.contains("\"context\":null"), "{props}");
    ask(&daemon, &tokens(5, 2000));
    let (status, reply) =
        daemon.post("/v1/completions", &json!({ "prompt": system, "max_tokens": 700, "logit_bias": { "2": -100 } }));
    assert_eq!((status, reply["usage"]["completion_tokens"].as_u64()), (200, Some(700)), "{reply}");
}
