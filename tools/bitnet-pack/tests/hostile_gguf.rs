//! GGUF files that must be refused, each with its reason: the classes of faults that readers of this format have had, one by
//! one, then every cut, then many small damages. Nothing is left behind, and nothing takes long or much memory.
mod common;

use bitnet_pack::checkpoint::{Checkpoint, Dtype};
use bitnet_pack::{Options, pack};
use cap::Cap;
use common::gguf::{F32, Gguf, GgufTensor, I2_S, Value, WIDTH, floats, string, text};
use common::{Codes, Place, assert_says, named};
use std::alloc::System;
use std::time::{Duration, Instant};

/// No file here is longer than 200 kB, so nothing may take much: whoever believes a length ends at once.
#[global_allocator]
static ALLOCATOR: Cap<System> = Cap::new(System, 256 << 20);

/// Packs the bytes, which must be refused within a tenth of a second, in at least one of twenty attempts.
fn refused(what: &str, file: &[u8], expected: &[&str]) {
    let place = Place::new();
    place.put("model.gguf", file);
    for attempt in 1.. {
        let start = Instant::now();
        let error = place.refused(what, &named(), &mut ());
        let took = start.elapsed();
        if took < Duration::from_millis(100) {
            let parts: Vec<&str> = ["model.gguf"].iter().chain(expected).copied().collect();
            return assert_says(what, &error.to_string(), &parts);
        }
        assert!(attempt < 20, "{what}: {took:?}");
    }
}

fn changed(what: &str, change: impl FnOnce(&mut Gguf), expected: &[&str]) {
    let mut gguf = Gguf::model("bitnet-b1.58");
    change(&mut gguf);
    refused(what, &gguf.bytes(), expected);
}

/// A file with one tensor of these dimensions and this type, and nothing else.
fn one_tensor(dimensions: &[u64], tag: u32) -> Gguf {
    let mut gguf = Gguf { version: 3, keys: Vec::new(), tensors: Vec::new(), alignment: 32 };
    gguf.set("general.architecture", text("llama"));
    gguf.add("blk.0.attn_q.weight", dimensions, tag, vec![0; 64]);
    gguf
}

/// Overwrites eight bytes.
fn with_u64(mut file: Vec<u8>, at: usize, value: u64) -> Vec<u8> {
    file[at..at + 8].copy_from_slice(&value.to_le_bytes());
    file
}

#[test]
fn versions_and_magic() {
    for (version, expected) in
        [(0, "GGUF version 0; 2 and 3"), (1, "version 1"), (4, "version 4"), (3 << 24, "big-endian")]
    {
        changed("version", |g| g.version = version, &[expected]);
    }
    refused(
        "too short",
        b"GGUF\x03\0\0\0\x01",
        &["the number of tensors at byte 8 takes 8 bytes", "ends at 9: truncated"],
    );
}

/// C1: numbers of keys and tensors that the file cannot hold.
#[test]
fn c1_counts() {
    let file = Gguf::model("bitnet").bytes();
    for (at, what) in [(8, "tensors"), (16, "keys")] {
        for count in [u64::MAX, 1 << 63, 1 << 32, 65_537, 65_536] {
            refused(what, &with_u64(file[..4096].into(), at, count), &[&format!("{count} {what}")]);
        }
    }
}

/// C2 and A-15: numbers of dimensions.
#[test]
fn c2_dimension_count() {
    for count in [0u32, 5, 8, 9, u32::MAX] {
        let mut gguf = one_tensor(&[32, 4], F32);
        let at = gguf.header().len() - 32;
        gguf.set("general.name", text("x"));
        let mut file = one_tensor(&[32, 4], F32).bytes();
        file[at..at + 4].copy_from_slice(&count.to_le_bytes());
        refused("dimensions", &file, &["blk.0.attn_q.weight", &format!("{count} dimensions; 1 to 4")]);
    }
}

/// C3 and A-15: dimensions of nothing, too large, and products that overflow.
#[test]
fn c3_dimensions() {
    for (dimensions, expected) in [
        (&[0][..], "a dimension of 0"),
        (&[32, 0], "a dimension of 0"),
        (&[1 << 63], "a dimension of 9223372036854775808"),
        (&[u64::MAX, 2], "a dimension of 18446744073709551615"),
        (&[(1 << 63) - 1, 2], "a dimension of 9223372036854775807"),
        (&[1 << 40, 1 << 40], "overflow"),
        (&[1 << 40, 1 << 20, 1 << 4], "overflow"),
        (&[1 << 32, 1 << 16, 1 << 8, 1 << 8], "overflow"),
    ] {
        refused("dimensions", &one_tensor(dimensions, F32).bytes(), &["blk.0.attn_q.weight", expected]);
    }
}

/// C4 and A-14: a count that fits while its bytes do not, in plain and in block types.
#[test]
fn c4_byte_sizes() {
    for (dimensions, tag) in [
        (&[4_611_686_018_427_387_903][..], F32),
        (&[1 << 40, 1 << 22], F32),
        (&[1 << 40, 1 << 23], 8),
        (&[1 << 40, 1 << 23], 14),
        (&[1 << 40, 1 << 23], I2_S),
    ] {
        refused("bytes", &one_tensor(dimensions, tag).bytes(), &["blk.0.attn_q.weight"]);
    }
    refused("blocks", &one_tensor(&[48, 2], 8).bytes(), &["rows of 48 in Q8_0, which has blocks of 32"]);
    refused("rows", &one_tensor(&[129, 128], I2_S).bytes(), &["[129, 128] in I2_S, which has groups of 128"]);
}

/// C5 and A-14: sizes that wrap when they are rounded up to the alignment.
#[test]
fn c5_padding() {
    let mut gguf = one_tensor(&[8], F32);
    for offset in [u64::MAX, u64::MAX - 31, 1 << 63] {
        gguf.tensors[0].offset = Some(offset);
        refused("offset", &gguf.bytes(), &["blk.0.attn_q.weight", &offset.to_string()]);
    }
}

/// C6 and A-14: many tensors whose sizes sum past 2^64.
#[test]
fn c6_sums() {
    let mut gguf = one_tensor(&[8], F32);
    gguf.tensors.clear();
    for i in 0..40 {
        let tensor = GgufTensor {
            name: format!("t{i}"),
            dimensions: vec![1 << 40, 1 << 20],
            tag: 8,
            data: Vec::new(),
            offset: Some((i << 60) & !31),
        };
        gguf.tensors.push(tensor);
    }
    refused("sums", &gguf.bytes(), &["tensor t"]);
}

/// C7: a tensor that lies beyond the end of the file, by one byte or by far; overlaps and gaps.
#[test]
fn c7_places() {
    let file = Gguf::model("bitnet").bytes();
    for cut in [1, 31, 33, 4096, 50_000] {
        refused(
            "cut",
            &file[..file.len() - cut],
            &["token_embd.weight", "truncated"].map(|s| if cut > 8192 { "truncated" } else { s }),
        );
    }
    changed("overlap", |g| g.tensors[1].offset = Some(0), &["of [256, "]);
    changed("gap", |g| g.tensors.last_mut().unwrap().offset = Some(1 << 20), &["where", "is expected"]);
    changed("unaligned", |g| g.tensors[1].offset = Some(33), &["no multiple of 32"]);
}

/// C8: alignments that are nothing, no power of two, too large or of another type.
#[test]
fn c8_alignment() {
    for value in [0u32, 1, 3, 24, 131_072, u32::MAX] {
        let key = format!("general.alignment = {value}");
        changed("alignment", |g| g.set("general.alignment", Value::U32(value)), &[&key, "a power of two"]);
    }
    changed("alignment", |g| g.set("general.alignment", text("32")), &["general.alignment = \"32\"", "unsigned"]);
    changed("alignment", |g| g.set("general.alignment", Value::I32(-32)), &["general.alignment = -32", "unsigned"]);
    // Another one that is right is taken.
    let place = Place::new();
    let mut gguf = Gguf::model("bitnet");
    gguf.set("general.alignment", Value::U32(4096));
    gguf.alignment = 4096;
    place.put("model.gguf", gguf.bytes());
    place.pack(&named());
}

/// C9: lengths of strings and arrays, and arrays of arrays.
#[test]
fn c9_lengths() {
    let array = |tag: u32, count: u64| Value::Raw(9, [&tag.to_le_bytes()[..], &count.to_le_bytes()].concat());
    let long = |length: u64| Value::Raw(8, length.to_le_bytes().into());
    for length in [u64::MAX, 1 << 63, 1 << 30] {
        changed("string", |g| g.set("general.name", long(length)), &["general.name", &format!("takes {length} bytes")]);
    }
    for count in [u64::MAX, 1 << 61, 1 << 25] {
        changed("array", |g| g.set("a.b", array(8, count)), &["a.b", &format!("{count} elements")]);
    }
    changed("array", |g| g.set("a.b", array(12, 1 << 24)), &["a.b", "takes 134217728 bytes"]);
    changed("strings", |g| g.set("a.b", array(8, 1 << 24)), &["a.b", "takes 134217728 bytes"]);
    changed("nested", |g| g.set("a.b", array(9, 1)), &["a.b", "arrays of arrays"]);
    changed("array of nothing", |g| g.set("a.b", array(13, 1)), &["a.b", "an array of type 13"]);
    changed("type", |g| g.set("a.b", Value::Raw(99, Vec::new())), &["a.b", "values of type 99 are unknown"]);
    changed("key", |g| g.set(&"k".repeat(257), Value::U32(1)), &["has 257 bytes; 1 to 256"]);
    changed("empty key", |g| g.set("", Value::U32(1)), &["has 0 bytes"]);
    changed("template", |g| g.set("tokenizer.chat_template", text(&"x".repeat(1 << 19))), &["tokenizer.chat_template"]);
    let mut file = Gguf::model("bitnet").bytes();
    file = with_u64(file, 24, 1 << 40);
    refused("name", &file, &["the name of key 0 has 1099511627776 bytes"]);
}

/// A tokenizer of three tokens.
fn tokenizer(gguf: &mut Gguf) {
    gguf.set("tokenizer.ggml.model", text("llama"));
    gguf.set("tokenizer.ggml.tokens", Value::Texts(["<unk>", "<0x0A>", "a"].map(String::from).into()));
    gguf.set("tokenizer.ggml.scores", Value::F32s(vec![0.0, -1.0, -2.0]));
    gguf.set("tokenizer.ggml.token_type", Value::I32s(vec![2, 6, 1]));
    gguf.set("tokenizer.ggml.unknown_token_id", Value::U32(0));
}

/// C10: arrays with elements of another type, of another number, or of other values.
#[test]
fn c10_arrays() {
    let bytes = |n: u64| Value::Raw(9, [&0u32.to_le_bytes()[..], &n.to_le_bytes(), &vec![0; n as usize]].concat());
    let cases: [(&str, Value, &str); 9] = [
        ("scores", bytes(3), "an array of f32 is expected"),
        ("scores", Value::F32s(vec![0.0; 2]), "3 are expected"),
        ("scores", Value::F32s(vec![0.0, f32::NAN, 1.0]), "NaN is no score"),
        ("scores", Value::F32(1.0), "an array of f32 is expected"),
        ("token_type", bytes(3), "an array of i32 or u32 is expected"),
        ("token_type", Value::I32s(vec![1, 1, 7]), "types from 1 to 6"),
        ("token_type", Value::I32s(vec![1; 4]), "3 are expected"),
        ("tokens", Value::I32s(vec![1; 3]), "an array of string is expected"),
        ("tokens", Value::U32(3), "an array of string is expected"),
    ];
    for (key, value, expected) in cases {
        let key = format!("tokenizer.ggml.{key}");
        changed(
            &key,
            |g| {
                tokenizer(g);
                g.set(&key, value);
            },
            &[&key, expected],
        );
    }
}

/// C11: keys that are missing, of another type, or nothing.
#[test]
fn c11_keys() {
    for (key, value, expected) in [
        ("general.architecture", None, "(missing)"),
        ("general.architecture", Some(Value::U32(1)), "a string is expected"),
        ("general.architecture", Some(text("")), "not supported; bitnet, bitnet-b1.58"),
        ("general.architecture", Some(text("mamba")), "not supported; bitnet, bitnet-b1.58"),
        ("general.architecture", Some(text("gemma3")), "not supported (of Gemma: its embedding is scaled"),
        ("general.architecture", Some(text("gemma-embedding")), "other angles); bitnet, bitnet-b1.58"),
        ("bitnet-b1.58.embedding_length", None, "(missing)"),
        ("bitnet-b1.58.embedding_length", Some(text("256")), "a whole number"),
        ("bitnet-b1.58.embedding_length", Some(Value::U32(0)), "1 to 65536"),
        ("bitnet-b1.58.embedding_length", Some(Value::U32(u32::MAX)), "1 to 65536"),
        ("bitnet-b1.58.attention.head_count", Some(Value::U32(0)), "1 to 65536"),
        ("bitnet-b1.58.attention.head_count", Some(Value::I32(-1)), "a whole number"),
        ("bitnet-b1.58.attention.head_count", Some(Value::I32s(vec![64, 32])), "one number for all layers"),
        ("bitnet-b1.58.attention.head_count", Some(Value::I32s(Vec::new())), "one number for all layers"),
        ("bitnet-b1.58.attention.head_count_kv", Some(Value::U32(3)), "a divisor"),
        ("bitnet-b1.58.rope.dimension_count", Some(Value::U32(2)), "the whole head"),
        ("bitnet-b1.58.rope.freq_base", Some(Value::F32(-1.0)), "a positive number"),
        ("bitnet-b1.58.rope.freq_base", Some(Value::F32(f32::NAN)), "a positive number"),
        ("bitnet-b1.58.rope.scaling.type", Some(text("yarn")), "\"none\" or \"linear\""),
        ("bitnet-b1.58.attention.layer_norm_rms_epsilon", Some(Value::F32(0.0)), "a positive number"),
        ("bitnet-b1.58.attention.layer_norm_rms_epsilon", Some(Value::F32(2.0)), "below 1"),
        ("bitnet-b1.58.expert_count", Some(Value::U32(8)), "change what the model computes"),
        ("bitnet-b1.58.final_logit_softcapping", Some(Value::F32(30.0)), "change what the model computes"),
        ("tokenizer.ggml.model", Some(text("bert")), "\"gpt2\" and \"llama\""),
        ("tokenizer.ggml.model", Some(text("gpt2")), "tokenizer.ggml.tokens"),
        ("split.count", Some(Value::U32(70_000)), "at most 1024"),
        ("split.count", Some(Value::U32(3)), "model-00001-of-00003.gguf"),
    ] {
        let change = |g: &mut Gguf| match value {
            Some(value) => g.set(key, value),
            None => g.without(key),
        };
        let named = if expected.contains("00001") || key.ends_with("gpt2") { "" } else { key };
        let named = if expected == "tokenizer.ggml.tokens" { "" } else { named };
        changed(key, change, &[named, expected]);
    }
}

/// C12: keys and tensors that occur twice, and tokens.
#[test]
fn c12_duplicates() {
    changed(
        "key",
        |g| g.keys.push(("general.architecture".into(), text("llama"))),
        &["general.architecture occurs twice"],
    );
    changed("tensor", |g| g.tensors[1].name = g.tensors[0].name.clone(), &["blk.0.attn_q.weight", "occurs twice"]);
    let twice = Value::Texts(["<unk>", "<0x0A>", "<unk>"].map(String::from).into());
    changed(
        "token",
        |g| {
            tokenizer(g);
            g.set("tokenizer.ggml.tokens", twice);
        },
        &["tokens 0 and 2 are both \"<unk>\""],
    );
}

/// C13: layers that the file has not, or has in addition.
#[test]
fn c13_layers() {
    let layers = |n: u32| move |g: &mut Gguf| g.set("bitnet-b1.58.block_count", Value::U32(n));
    changed("two layers", layers(2), &["blk.1.attn_norm.weight", "missing"]);
    changed("513 layers", layers(513), &["block_count = 513", "1 to 512"]);
    changed("no layers", layers(0), &["block_count = 0"]);
    changed("all layers", layers(u32::MAX), &["block_count = 4294967295"]);
    let rename = |name: &'static str| move |g: &mut Gguf| g.tensor("blk.0.ffn_up.weight").name = name.into();
    for name in ["blk.1.ffn_up.weight", "blk.-1.ffn_up.weight", "blk.00.ffn_up.weight", "blk.4294967296.ffn_up.weight"]
    {
        changed(name, rename(name), &["blk.0.ffn_up.weight", "missing"]);
    }
    let more = |g: &mut Gguf| g.add("blk.7.attn_q.bias", &[8], F32, floats(&[0.0; 8]));
    changed("another tensor", more, &["blk.7.attn_q.bias", "unknown to this class of model"]);
}

/// C14: tokens that claim to be bytes.
#[test]
fn c14_byte_tokens() {
    for token in ["<0x-1>", "<0x+1>", "<0x1>", "<0x100>", "<0xGG>", "<0x  >", "0x0A", "", "<0xé>"] {
        let tokens = Value::Texts(["<unk>", token, "a"].map(String::from).into());
        changed(
            token,
            |g| {
                tokenizer(g);
                g.set("tokenizer.ggml.tokens", tokens);
            },
            &["token 1 stands for a byte", &format!("{token:?}")],
        );
    }
}

/// C15: tokens outside the vocabulary, and ids outside the tokens.
#[test]
fn c15_tokens() {
    let vocab = |n: u32| {
        move |g: &mut Gguf| {
            tokenizer(g);
            let embedding = g.tensor("token_embd.weight");
            (embedding.dimensions, embedding.data) = (vec![WIDTH, n.into()], floats(&vec![0.1; n as usize * 256]));
            g.set("bitnet-b1.58.vocab_size", Value::U32(n));
        }
    };
    changed("too many tokens", vocab(2), &["token 2 lies outside the model's vocabulary of 2"]);
    for (key, id) in [("bos", 3), ("eos", u32::MAX), ("unknown", 3)] {
        changed(
            key,
            |g| {
                tokenizer(g);
                g.set(&format!("tokenizer.ggml.{key}_token_id"), Value::U32(id));
            },
            &[&format!("token {id} is named, but there are 3")],
        );
    }
    changed("eot", |g| g.set("tokenizer.ggml.eot_token_id", Value::U32(8)), &["8", "the vocabulary has 8 tokens"]);
    changed(
        "merges",
        |g| {
            tokenizer(g);
            g.set("tokenizer.ggml.model", text("gpt2"));
            g.set("tokenizer.ggml.pre", text("gpt-2"));
            g.set("tokenizer.ggml.merges", Value::Texts(vec!["ab".into()]));
        },
        &["tokenizer.ggml.merges", "\"ab\" is no pair"],
    );
}

/// Types that have several meanings, and types whose order of weights no file tells.
#[test]
fn types() {
    let with = |tag: u32| move |g: &mut Gguf| g.tensor("blk.0.ffn_up.weight").tag = tag;
    changed("TL1", with(38), &["blk.0.ffn_up.weight", "TL1 is not read", "tile sizes"]);
    changed("TL2", with(39), &["blk.0.ffn_up.weight", "TL2 is not read", "tile sizes"]);
    refused("39 elsewhere", &one_tensor(&[32], 39).bytes(), &["MXFP4 is not read"]);
    let mut converted = one_tensor(&[32], 39);
    converted.add("blk.0.attn_q.weight_scale", &[1], F32, floats(&[1.0]));
    refused("39 beside a scale", &converted.bytes(), &["TL2 is not read"]);
    changed("Q2_K", with(10), &["Q2_K is not read"]);
    changed("unknown", with(77), &["type 77: unknown"]);
    // file_type 40 is I2_S there and Q1_0 elsewhere: what tensors are tells, so it does not matter.
    let place = Place::new();
    let mut gguf = Gguf::model("bitnet-b1.58");
    gguf.set("general.file_type", Value::U32(40));
    place.put("model.gguf", gguf.bytes());
    place.pack(&named());
    changed("code 3", |g| g.tensor("blk.0.ffn_up.weight").data[70] = 0xff, &["ffn_up.weight", "row 1", "code 3"]);
    for scale in [0.0, -1.0, f32::NAN, f32::INFINITY] {
        let set = |g: &mut Gguf| g.tensor("blk.0.attn_k.weight").data[256..260].copy_from_slice(&scale.to_le_bytes());
        changed("scale", set, &["blk.0.attn_k.weight", "is no scale"]);
    }
    // 128 weights need 36 bytes in groups of 64, 34 in groups of 128: with padding both are 64.
    refused("both", &one_tensor(&[128], 42).bytes(), &["blk.0.attn_q.weight", "groups of 64 or of 128", "both fit"]);
    refused("neither", &one_tensor(&[1280], 42).bytes(), &["blk.0.attn_q.weight", "neither fits"]);
    changed(
        "not finite",
        |g| g.tensor("output_norm.weight").data[..4].copy_from_slice(&f32::NAN.to_le_bytes()),
        &["NaN"],
    );
    let blocks = |g: &mut Gguf| {
        let norm = g.tensor("output_norm.weight");
        (norm.tag, norm.data) = (8, vec![0; 272]);
    };
    changed("a norm of blocks", blocks, &["output_norm.weight", "dtype Q8_0, where F32, F16 or BF16 is expected"]);
}

/// Files of several models in one directory.
#[test]
fn directories() {
    let place = Place::new();
    let bytes = Gguf::model("bitnet").bytes();
    place.put("a.gguf", &bytes);
    place.put("b.gguf", &bytes);
    let error = place.refused("two", &named(), &mut ()).to_string();
    assert_says("two", &error, &["2 GGUF files, a.gguf and b.gguf", "name the one to pack"]);
    pack(&place.source().join("b.gguf"), &place.image(), &named(), &mut ()).unwrap();
}

/// cut at every byte before the tensors, and then at every 509th.
#[test]
fn every_cut_is_refused() {
    let mut gguf = Gguf::model("bitnet-b1.58");
    tokenizer(&mut gguf);
    let (file, header) = (gguf.bytes(), gguf.header().len());
    let place = Place::new();
    let cuts = (0..header + 64).chain((header + 64..file.len() - 32).step_by(509));
    for cut in cuts {
        place.put("model.gguf", &file[..cut]);
        let error = Checkpoint::open(&place.source().join("model.gguf"), Dtype::I2_S);
        let error = error.err().unwrap_or_else(|| panic!("{cut} of {} bytes", file.len())).to_string();
        assert!(
            ["truncated", "bytes are left", "are left", "empty", "no config.json"].iter().any(|p| error.contains(p)),
            "{cut}: {error}"
        );
    }
}

/// Bits turned and bytes overwritten: a file is packed or refused, never anything else. `MUTATIONS` sets their number.
#[test]
fn damaged_files() {
    let count: u64 = std::env::var("MUTATIONS").map_or(3000, |n| n.parse().expect("a number"));
    let mut gguf = Gguf::model("qwen3");
    tokenizer(&mut gguf);
    gguf.set("tokenizer.ggml.merges", Value::Texts(vec!["a b".into()]));
    let (file, header) = (gguf.bytes(), gguf.header().len() as u64);
    let place = Place::new();
    let mut random = Codes::new();
    let (mut packed, mut refused) = (0, 0);
    for i in 0..count {
        let mut damaged = file.clone();
        for _ in 0..=i % 3 {
            let at = ((random.next() << 15 | random.next()) % header) as usize;
            match random.next() % 4 {
                0 => damaged[at] ^= 1 << (random.next() % 8),
                1 => damaged[at] = random.next() as u8,
                2 => damaged[at] = 0xff,
                // A length or an offset.
                _ => {
                    let edge = [0, 1, u64::MAX, 1 << 63, 1 << 32, u64::from(u32::MAX), 1 << 31, header];
                    let value = edge[(random.next() % 8) as usize];
                    let end = (at + 8).min(damaged.len());
                    damaged[at..end].copy_from_slice(&value.to_le_bytes()[..end - at]);
                }
            }
        }
        place.put("model.gguf", &damaged);
        let start = Instant::now();
        match pack(&place.source().join("model.gguf"), &place.image(), &Options::default(), &mut ()) {
            Ok(_) => {
                packed += 1;
                std::fs::remove_file(place.image()).unwrap();
            }
            Err(error) => {
                refused += 1;
                assert!(
                    error.to_string().contains("source") || matches!(error, bitnet_pack::Error::Options(_)),
                    "{error}"
                );
                assert!(place.left().is_empty(), "{error}");
            }
        }
        assert!(start.elapsed() < Duration::from_secs(60), "damage {i}: {:?}", start.elapsed());
    }
    println!("{packed} packed, {refused} refused");
    assert!(packed > count / 100 && refused > count / 4, "{packed} packed, {refused} refused: too much of one kind");
}

/// Lengths of names are those of their bytes.
#[test]
fn names_that_are_no_text() {
    let name = string("blk.0.attn_k.weight");
    let mut file = Gguf::model("bitnet").bytes();
    let at = file.windows(name.len()).position(|w| w == name).unwrap();
    file[at + 8] = 0xff;
    refused("a name", &file, &["the name of tensor 1 is not UTF-8"]);
}
