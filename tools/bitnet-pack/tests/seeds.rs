//! What the fuzzers start from: the smallest files of each kind that are packed, and one of every element type.
//!
//! `BLESS=1 cargo test -p bitnet-pack --test seeds` writes them to `tests/fuzz/corpus`.
mod common;

use bitnet_kernel::Format;
use bitnet_pack::calibrate::{Linear, Plan};
use bitnet_pack::{Options, Preset, dummy, pack};
use bitnet_runtime::image::Kind;
use bitnet_runtime::{Config, Image, Limits};
use common::gguf::{F32, Gguf, I2_S, Q8_0, Value, floats, i2_s, text};
use common::{Checkpoint, Codes, Place, Shape, Storage, named, section};
use std::path::{Path, PathBuf};

/// Writes a seed, if asked to.
fn bless(target: &str, name: &str, bytes: &[u8]) -> PathBuf {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fuzz/corpus").join(target).join(name);
    if std::env::var_os("BLESS").is_some() {
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(&path, bytes).unwrap();
    }
    path
}

/// Compares a seed with what is committed, or writes it.
fn seed(target: &str, name: &str, bytes: &[u8]) {
    let path = bless(target, name, bytes);
    assert_eq!(std::fs::read(&path).unwrap_or_default(), bytes, "{}: BLESS=1 writes it anew", path.display());
}

/// A model of this width whose linears have one type.
fn model(architecture: &str, width: u64, tag: u32, linear: impl Fn(&[i8]) -> Vec<u8>) -> Gguf {
    let mut gguf = Gguf::model(architecture);
    let number = |gguf: &mut Gguf, key: &str, v: u64| gguf.set(&format!("{architecture}.{key}"), Value::U32(v as u32));
    for key in ["embedding_length", "feed_forward_length"] {
        number(&mut gguf, key, width);
    }
    number(&mut gguf, "attention.head_count", 2);
    number(&mut gguf, "attention.head_count_kv", 2);
    for key in ["attention.key_length", "attention.value_length", "rope.dimension_count"] {
        number(&mut gguf, key, width / 2);
    }
    let mut codes = Codes::new();
    for t in &mut gguf.tensors {
        let heads = t.name.contains("_q_norm") || t.name.contains("_k_norm");
        match t.dimensions.len() {
            1 => {
                let n = if heads { width / 2 } else { width };
                (t.dimensions, t.data) = (vec![n], floats(&vec![1.0; n as usize]));
            }
            _ if t.name.starts_with("token_embd") => {
                (t.dimensions, t.data) = (vec![width, 8], floats(&vec![0.5; 8 * width as usize]));
            }
            _ => {
                (t.dimensions, t.tag) = (vec![width, width], tag);
                t.data = linear(&codes.rows(width, width).concat());
            }
        }
    }
    gguf
}

fn q8_0(weights: &[i8]) -> Vec<u8> {
    weights
        .chunks(32)
        .flat_map(|w| [&[0, 0x38][..], &w.iter().map(|&w| w as u8).collect::<Vec<_>>()].concat())
        .collect()
}

#[test]
fn gguf_files() {
    let mut bitnet = model("bitnet-b1.58", 16, I2_S, |w| i2_s(w, 128, 0.5));
    bitnet.set("tokenizer.ggml.model", text("llama"));
    let tokens = ["<unk>", "<s>", "</s>", "<0x0A>", "a", "b", "ab", "\u{2581}"];
    bitnet.set("tokenizer.ggml.tokens", Value::Texts(tokens.map(String::from).into()));
    bitnet.set("tokenizer.ggml.scores", Value::F32s((0..8).map(|i| -(i as f32)).collect()));
    bitnet.set("tokenizer.ggml.token_type", Value::I32s(vec![2, 3, 3, 6, 1, 1, 1, 1]));
    bitnet.set("tokenizer.ggml.bos_token_id", Value::U32(1));
    bitnet.set("tokenizer.ggml.eos_token_id", Value::U32(2));
    seed("gguf", "bitnet", &bitnet.bytes());
    let mut llama = model("llama", 32, Q8_0, q8_0);
    llama.set("tokenizer.ggml.model", text("gpt2"));
    llama.set("tokenizer.ggml.pre", text("llama-bpe"));
    let tokens = ["a", "b", "ab", "<|eot_id|>", "c", "d", "e", "f"];
    llama.set("tokenizer.ggml.tokens", Value::Texts(tokens.map(String::from).into()));
    llama.set("tokenizer.ggml.token_type", Value::I32s(vec![1, 1, 1, 3, 1, 1, 1, 1]));
    llama.set("tokenizer.ggml.merges", Value::Texts(vec!["a b".into()]));
    llama.set("tokenizer.chat_template", text("{{ messages }}"));
    seed("gguf", "llama", &llama.bytes());
    seed(
        "gguf",
        "qwen3",
        &model("qwen3", 8, F32, |w| floats(&w.iter().map(|&w| w.into()).collect::<Vec<f32>>())).bytes(),
    );
    // One tensor of every type there may be, with room for two blocks of the largest.
    for tag in (0..44).chain([134, 135]) {
        let mut gguf = Gguf { version: 3, keys: Vec::new(), tensors: Vec::new(), alignment: 32 };
        gguf.set("general.architecture", text("llama"));
        gguf.add("blk.0.attn_q.weight", &[256, 2], tag, vec![0x55; 64]);
        seed("gguf", &format!("type-{tag}"), &gguf.bytes());
    }
    for seed_of in ["bitnet", "llama", "qwen3"] {
        let place = Place::new();
        let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fuzz/corpus/gguf");
        pack(&corpus.join(seed_of), &place.image(), &named(), &mut ()).unwrap_or_else(|e| panic!("{seed_of}: {e}"));
    }
}

const WIDTH_8: Shape = Shape { vocab: 6, hidden: 8, ffn: 8, layers: 1, heads: 2, kv_heads: 1, head_dim: 4 };

#[test]
fn safetensors_files() {
    for (name, storage) in [("multiply", Storage::Multiply), ("divide", Storage::Divide), ("online", Storage::Online)] {
        let checkpoint = Checkpoint::new(WIDTH_8, storage);
        let place = Place::new();
        checkpoint.write(&place.source());
        place.pack(&named());
        let config = serde_json::to_vec(&checkpoint.config).unwrap();
        let tensors = common::safetensors(&checkpoint.tensors);
        seed("safetensors", name, &[&config[..], &[0], &tensors].concat());
        seed("safetensors", &format!("{name}-tensors"), &tensors);
    }
}

/// The smallest model of llama2.c: width 4, one layer, zeros, and a head that is the embedding or is not.
#[test]
fn llama2c_files() {
    for (name, vocab, floats) in
        [("tied", 3i32, 3 * 4 + 8 + 64 + 48 + 4 + 16), ("untied", -3, 6 * 4 + 8 + 64 + 48 + 4 + 16)]
    {
        let mut bytes: Vec<u8> = [4, 4, 1, 1, 1, vocab, 4].iter().flat_map(|n: &i32| n.to_le_bytes()).collect();
        bytes.resize(28 + 4 * floats, 0);
        let place = Place::new();
        place.put("model.bin", &bytes);
        pack(&place.source().join("model.bin"), &place.image(), &named(), &mut ()).unwrap();
        seed("llama2c", name, &bytes);
    }
}

/// Plans for that model: as they are written, as a person may edit one, and one that lacks a line.
#[test]
fn plans_of_widths() {
    let kinds = [Kind::Query, Kind::Key, Kind::Value, Kind::Output, Kind::Gate, Kind::Up, Kind::Down];
    let linears: Vec<Linear> = kinds.map(|kind| Linear::new(0, kind)).into_iter().chain([Linear::HEAD]).collect();
    let plan = Plan::new(linears.iter().copied().zip(Plan::FORMATS.into_iter().cycle()));
    let text = plan.write(linears.iter().map(|linear| (*linear, "i3g128 0.01 4 B, i8 0 8 B".into())));
    seed("widths", "written", text.as_bytes());
    let inline: Vec<String> = linears.iter().map(|linear| format!("'{linear}' = \"\\u0069\\U00000038\"")).collect();
    seed("widths", "inline", format!("linears = {{ {} }}\r\n", inline.join(", ")).as_bytes());
    let dotted: Vec<String> = linears.iter().map(|linear| format!("linears.\"{linear}\" = \"i4g128\"\n")).collect();
    seed("widths", "dotted", dotted.concat().as_bytes());
    seed("widths", "no-head", text.rsplit_once("\"head\"").unwrap().0.as_bytes());
    for (name, sound) in [("written", true), ("inline", true), ("dotted", true), ("no-head", false)] {
        let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fuzz/corpus/widths");
        let read = Plan::read(&corpus.join(name), &linears);
        assert_eq!(read.is_ok(), sound, "{name}: {read:?}");
    }
}

/// The length of the file, then the header: of formats that differ in their sections. Those that are committed may be of an
/// older version of the format, which is as good a start.
#[test]
fn images() {
    let put = |name: &str, image: &[u8]| {
        let header = u32::from_le_bytes(image[12..16].try_into().unwrap()) as usize;
        bless("image", name, &[&(image.len() as u64).to_le_bytes()[..], &image[64..64 + header]].concat());
        let checked = Image::check(image, image.len() as u64).unwrap();
        let mut buffer = [0; 256];
        let pair: (Config, Limits) = (checked.header().config, checked.header().plan.limits);
        bless("plan", name, postcard::to_slice(&pair, &mut buffer).unwrap());
    };
    let plain = |options: Options| {
        let place = Place::new();
        Checkpoint::new(WIDTH_8, Storage::Multiply).write(&place.source());
        place.pack(&options)
    };
    put("tl", &plain(named()));
    put("t2-f16", &plain(Options { format: Format::T2, head: Format::F16, ..named() }));
    put("i4-i4g", &plain(Options { format: Format::I4, head: Format::I4G, ..named() }));
    put("live", &plain(Options { live_ffn: true, ..named() }));
    put("two-stage", &plain(Options { split_head: true, ..named() }));
    let place = Place::new();
    dummy(&place.image(), &Preset::Tiny.shape(), &named(), 1, &mut ()).unwrap();
    put("dummy", &std::fs::read(place.image()).unwrap());
}

#[test]
fn tokenizers() {
    let token = |id: u32| {
        let piece = if (3..259).contains(&id) { format!("<0x{:02X}>", id - 3) } else { format!("t{id}") };
        [&(-(id as f32)).to_le_bytes()[..], &(piece.len() as u32).to_le_bytes(), piece.as_bytes()].concat()
    };
    let tokens: Vec<u8> = (0..300).flat_map(token).collect();
    seed("tokenizer", "llama2c", &[&8u32.to_le_bytes()[..], &tokens].concat());
    let json = br#"{"version":"1.0","added_tokens":[{"id":4,"content":"<s>","special":true,"normalized":false,"single_word":false,"lstrip":false,"rstrip":false}],"normalizer":{"type":"NFC"},"pre_tokenizer":{"type":"Sequence","pretokenizers":[{"type":"Split","pattern":{"Regex":" ?\\p{L}+|\\s+"},"behavior":"Isolated","invert":false},{"type":"ByteLevel","add_prefix_space":false,"trim_offsets":true,"use_regex":false}]},"post_processor":null,"decoder":{"type":"ByteLevel","add_prefix_space":false,"trim_offsets":true,"use_regex":false},"model":{"type":"BPE","dropout":null,"unk_token":null,"fuse_unk":false,"byte_fallback":false,"vocab":{"a":0,"b":1,"ab":2,"c":3},"merges":["a b"]}}"#;
    seed("tokenizer", "json", json);
    seed("tokenizer", "tiktoken", b"YQ== 0\nYg== 1\nYWI= 2\n");
    let mut pieces = Vec::new();
    for (i, piece) in ["<unk>", "<s>", "</s>", "a"].iter().enumerate() {
        let kind = [2u8, 3, 3, 1][i];
        let message = [&[0x0a, piece.len() as u8][..], piece.as_bytes(), &[0x15, 0, 0, 0, 0, 0x18, kind]].concat();
        pieces.extend([&[0x0a, message.len() as u8][..], &message].concat());
    }
    pieces.extend([0x12, 2, 0x18, 2]);
    seed("tokenizer", "sentencepiece", &pieces);
    // As images have it: the converted one of a small model.
    let place = Place::new();
    let mut checkpoint = Checkpoint::new(WIDTH_8, Storage::Multiply);
    checkpoint.set("bos_token_id", 4.into());
    checkpoint.write(&place.source());
    place.put("tokenizer.json", json);
    let image = place.pack(&named());
    let (record, bytes) = section(&image, Kind::Tokenizer, None);
    let bytes = &bytes[..record.cols.get() as usize];
    bless("text", "json", bytes);
    // Word boundaries, which the engine of regular expressions has no tables for, in a pattern of the same length.
    let (pattern, hostile) = (br" ?\p{L}+|\s+", br" ?+|\B+|a\s+");
    let at = bytes.windows(pattern.len()).position(|w| w == pattern).unwrap();
    bless("text", "word-boundary", &[&bytes[..at], hostile, &bytes[at + pattern.len()..]].concat());
}
