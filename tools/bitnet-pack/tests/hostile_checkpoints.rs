//! Checkpoints that must be refused: with what is wrong, where, and what was expected, and with nothing left behind.
mod common;

use bitnet_kernel::Format;
use bitnet_pack::{Error, Options, pack};
use cap::Cap;
use common::{
    Checkpoint, Place, SMALL, Storage, Tensor, assert_says, container, named, safetensors, stories, write_index,
};
use serde_json::{Map, Value, json};
use std::alloc::System;
use std::io::{Seek, SeekFrom, Write};
use std::time::{Duration, Instant};

/// Whoever asks for more, all tests of this file together, ends the process: most of it are values of JSON, of 72 bytes.
#[global_allocator]
static ALLOCATOR: Cap<System> = Cap::new(System, 144 << 20);

/// Packs what must be refused in under 100 ms; a busy machine has more tries.
fn refused_with(what: &str, place: &Place, options: &Options) -> Error {
    for attempt in 1.. {
        let start = Instant::now();
        let error = place.refused(what, options, &mut ());
        let took = start.elapsed();
        if took < Duration::from_millis(100) {
            return error;
        }
        assert!(attempt < 20, "{what}: {took:?}");
    }
    unreachable!()
}

fn refused(what: &str, place: &Place, expected: &[&str]) {
    assert_says(what, &refused_with(what, place, &named()).to_string(), expected);
}

fn entry(dtype: &str, shape: &str, begin: u64, end: u64) -> String {
    format!(r#"{{"dtype":"{dtype}","shape":{shape},"data_offsets":[{begin},{end}]}}"#)
}

/// A-16: the container, byte by byte, each below 1 kB.
#[test]
fn malformed_containers() {
    let one = |dtype, shape, begin, end| format!(r#"{{"a":{}}}"#, entry(dtype, shape, begin, end));
    let two = |a: (u64, u64), b: (u64, u64)| {
        let shape = |(begin, end)| format!("[{}]", (end - begin) / 4);
        let (x, y) = (entry("F32", &shape(a), a.0, a.1), entry("F32", &shape(b), b.0, b.1));
        format!(r#"{{"a":{x},"b":{y}}}"#)
    };
    let with_length = |length: u64| [&length.to_le_bytes()[..], br#"{"a":1}"#].concat();
    let data = [0; 16];
    let cases: Vec<(&str, Vec<u8>, &[&str])> = vec![
        ("length 2^63", with_length(1 << 63), &["9223372036854775808", "at most"]),
        ("length 2^64 - 1", with_length(u64::MAX), &["18446744073709551615", "at most"]),
        ("longer than the file", with_length(1000), &["ends at byte 15", "header at 1008", "truncated"]),
        ("length 0", with_length(0), &["header"]),
        ("too short for a length", vec![1, 2, 3], &["3 bytes are too few"]),
        ("no object", container("[1,2,3]", &data), &["does not start with `{`"]),
        ("cut in the header", container(r#"{"a":{"dtype":"F32""#, &data), &["header", "EOF"]),
        ("not UTF-8", [&8u64.to_le_bytes()[..], b"{\"\xff\xff\":1}"].concat(), &["header"]),
        ("text after the object", container(&format!("{}x", one("F32", "[4]", 0, 16)), &data), &["trailing"]),
        (
            "duplicate names",
            container(&format!(r#"{{"a":{0},"a":{0}}}"#, entry("F32", "[4]", 0, 16)), &data),
            &["tensor a", "twice"],
        ),
        ("overlap", container(&two((0, 12), (8, 16)), &data), &["tensor b", "starts at 8, inside", "ends at 12"]),
        ("gap", container(&two((0, 4), (8, 16)), &data), &["tensor b", "starts at 8, after a gap from 4"]),
        ("gap at the start", container(&one("F32", "[3]", 4, 16), &data), &["tensor a", "after a gap from 0"]),
        ("gap at the end", container(&one("F32", "[3]", 0, 12), &data), &["the tensors end at", "the file at"]),
        ("shape times dtype", container(&one("F32", "[5]", 0, 16), &data), &["tensor a", "span 16 bytes", "needs 20"]),
        ("dtype's size", container(&one("F16", "[4]", 0, 16), &data), &["tensor a", "span 16 bytes", "F16", "needs 8"]),
        (
            "begin after end",
            container(&one("F32", "[4]", 16, 0), &data),
            &["tensor a", "[16, 0] end before they begin"],
        ),
        ("past the file", container(&one("F32", "[8]", 0, 32), &data), &["tensor a", "ends at byte", "truncated"]),
        ("unknown dtype", container(&one("F4", "[4]", 0, 16), &data), &["tensor a", "\"F4\" is unknown"]),
        ("empty list", container("{}", &[]), &["lists no tensors"]),
        ("only metadata", container(r#"{"__metadata__":{"format":"pt"}}"#, &[]), &["lists no tensors"]),
        ("metadata of numbers", container(r#"{"__metadata__":{"a":1}}"#, &[]), &["header"]),
        ("metadata twice", container(r#"{"__metadata__":{},"__metadata__":{}}"#, &[]), &["twice"]),
        ("unknown field", container(r#"{"a":{"dtype":"F32","shape":[],"data_offsets":[0,4],"x":1}}"#, &[0; 4]), &["x"]),
        ("field missing", container(r#"{"a":{"dtype":"F32","shape":[]}}"#, &[]), &["\"a\"", "data_offsets"]),
        ("negative offset", container(r#"{"a":{"dtype":"F32","shape":[],"data_offsets":[-4,0]}}"#, &[]), &["\"a\""]),
        // Products that are small once they have wrapped.
        ("size wraps to 0", container(&one("F32", "[4611686018427387904]", 0, 0), &[]), &["tensor a", "overflows"]),
        ("count wraps", container(&one("U8", "[4294967296,4294967296]", 0, 0), &[]), &["tensor a", "overflows"]),
        ("dimension 2^64", container(&one("U8", "[18446744073709551616]", 0, 0), &[]), &["\"a\""]),
        (
            "end near 2^64",
            container(&one("U8", "[18446744073709551615]", 0, u64::MAX), &[]),
            &["tensor a", "truncated"],
        ),
        ("deep nesting", container(&format!(r#"{{"a":{}"#, "[".repeat(900)), &[]), &["\"a\""]),
    ];
    for (what, bytes, expected) in cases {
        assert!(bytes.len() < 1024, "{what}");
        let place = Place::new();
        Checkpoint::new(SMALL, Storage::Online).write_config(&place.source());
        place.put("model.safetensors", bytes);
        refused(what, &place, expected);
        refused(what, &place, &["model.safetensors"]);
    }
}

/// Writes a file piece by piece: in one piece it would take the memory that is being tested for.
fn put_long(place: &Place, name: &str, safetensors: bool, start: &str, more: impl Iterator<Item = String>) {
    let path = place.source().join(name);
    let mut out = std::io::BufWriter::new(std::fs::File::create(&path).unwrap());
    out.write_all(if safetensors { &[0; 8] } else { &[] }).unwrap();
    out.write_all(start.as_bytes()).unwrap();
    more.for_each(|piece| out.write_all(piece.as_bytes()).unwrap());
    let mut file = out.into_inner().unwrap();
    if safetensors {
        let length = path.metadata().unwrap().len() - 8;
        file.seek(SeekFrom::Start(0)).unwrap();
        file.write_all(&length.to_le_bytes()).unwrap();
    }
}

/// A file must not become an allocation many times its length: a dimension takes eight bytes for two of text, entries cost
/// more than their text, and so does any JSON value.
#[test]
fn text_that_grows_in_memory() {
    let place = Place::new();
    Checkpoint::new(SMALL, Storage::Online).write_config(&place.source());
    let numbers = |n: usize| (0..n >> 10).map(|_| "1,".repeat(1 << 10));
    let tensors = "model.safetensors";
    put_long(&place, tensors, true, r#"{"a":{"dtype":"F32","shape":["#, numbers(6 << 20));
    refused("dimensions", &place, &[tensors, "more than 8 dimensions"]);
    let entries = (0..200_000).map(|i| format!(r#""{i}":{},"#, entry("U8", "[0]", 0, 0)));
    put_long(&place, tensors, true, "{", entries);
    let error = place.refused("entries", &named(), &mut ()).to_string();
    assert_says("entries", &error, &[tensors, "more than 65536 tensors"]);
    put_long(&place, tensors, true, "{\"", numbers(20 << 20));
    refused("one name", &place, &[tensors, "at most 16777216"]);
    std::fs::remove_file(place.source().join(tensors)).unwrap();

    let index = "model.safetensors.index.json";
    put_long(&place, index, false, r#"{"weight_map":{"#, (0..900_000).map(|i| format!(r#""{i}":"a","#)));
    let error = place.refused("entries", &named(), &mut ()).to_string();
    assert_says("index", &error, &[index, "more than 65536 tensors"]);

    Checkpoint::new(SMALL, Storage::Online).write(&place.source());
    put_long(&place, "tokenizer_config.json", false, "[", numbers(6 << 20));
    refused("tokenizer_config", &place, &["tokenizer_config.json", "at most 2097152"]);
    put_long(&place, "tokenizer_config.json", false, "[", numbers(1 << 19).chain(["0]".into()]));
    place.pack(&named());
    std::fs::remove_file(place.image()).unwrap();
    put_long(&place, "config.json", false, "[", numbers(600_000));
    refused("config", &place, &["config.json", "at most 1048576"]);
}

/// What looks odd and is legal: spaces after the header, tensors without elements, scalars without a shape.
#[test]
fn legal_containers() {
    let place = Place::new();
    Checkpoint::new(SMALL, Storage::Multiply).write(&place.source());
    let expected = place.pack(&named());

    let mut checkpoint = Checkpoint::new(SMALL, Storage::Multiply);
    for scale in checkpoint.tensors.iter_mut().filter(|t| t.name.ends_with("weight_scale")) {
        scale.shape = Vec::new();
    }
    let empty = Tensor::f32("model.layers.0.self_attn.rotary_emb.inv_freq", &[0], &[]);
    checkpoint.tensors.insert(3, empty);
    let plain = safetensors(&checkpoint.tensors);
    let length = u64::from_le_bytes(plain[..8].try_into().unwrap()) as usize;
    let (header, data) = (std::str::from_utf8(&plain[8..8 + length]).unwrap(), &plain[8 + length..]);
    let metadata = header.replacen('{', r#"{"__metadata__":{"format":"pt"},"#, 1);
    for (what, header) in
        [("as it is", header.to_string()), ("spaces", format!("{header}{}", " ".repeat(13))), ("metadata", metadata)]
    {
        place.put("model.safetensors", container(&header, data));
        assert!(place.pack(&named()) == expected, "{what}");
    }
}

/// Shards and their index.
#[test]
fn malformed_indexes() {
    type Change = fn(&Place, &mut Map<String, Value>);
    let cases: [(&str, Change, &[&str]); 9] = [
        (
            "missing shard",
            |_, m| _ = m.insert("z".into(), json!("none.safetensors")),
            &["none.safetensors is missing", "z"],
        ),
        ("missing tensor", |_, m| _ = m.insert("z".into(), json!("a.safetensors")), &["tensor z", "a.safetensors"]),
        (
            "parent",
            |_, m| _ = m.insert("z".into(), json!("../a.safetensors")),
            &["\"../a.safetensors\"", "not the name"],
        ),
        ("absolute", |_, m| _ = m.insert("z".into(), json!("/etc/passwd")), &["\"/etc/passwd\"", "not the name"]),
        ("two dots", |_, m| _ = m.insert("z".into(), json!("..")), &["\"..\"", "not the name"]),
        ("number", |_, m| _ = m.insert("z".into(), json!(1)), &["not a shard index"]),
        (
            "wrong shard",
            |p, m| {
                p.put("b.safetensors", container(&format!(r#"{{"b":{}}}"#, entry("U8", "[0]", 0, 0)), &[]));
                m.insert("b".into(), json!("b.safetensors"));
                m.insert("model.norm.weight".into(), json!("b.safetensors"));
            },
            &["tensor model.norm.weight", "b.safetensors, which has no such tensor"],
        ),
        ("not listed", |_, m| _ = m.remove("model.norm.weight"), &["tensor model.norm.weight", "does not list it"]),
        ("empty", |_, m| m.clear(), &["lists no tensors"]),
    ];
    for (what, change, expected) in cases {
        let place = Place::new();
        let checkpoint = Checkpoint::new(SMALL, Storage::Online);
        checkpoint.write_config(&place.source());
        place.put("a.safetensors", safetensors(&checkpoint.tensors));
        let mut map = checkpoint.tensors.iter().map(|t| (t.name.clone(), json!("a.safetensors"))).collect();
        change(&place, &mut map);
        write_index(&place.source(), &map);
        refused(what, &place, expected);
    }
    let place = Place::new();
    Checkpoint::new(SMALL, Storage::Online).write_sharded(&place.source(), 2);
    std::fs::copy(
        place.source().join("model-00001-of-00002.safetensors"),
        place.source().join("model-00002-of-00002.safetensors"),
    )
    .unwrap();
    refused("the same in two shards", &place, &["occurs in", "model-00001-of-00002.safetensors"]);
    place.put("model.safetensors.index.json", r#"{"weight_map":{"a":"x","a":"x"}}"#);
    refused("twice in the index", &place, &["tensor a", "twice in the index"]);
}

/// Values of `config.json` that are not known or cannot be, each named with its key.
#[test]
fn configurations() {
    let cases: Vec<(&str, Value, &[&str])> = vec![
        ("hidden_act", json!("gelu"), &["\"gelu\"", "\"relu2\" or \"silu\""]),
        ("hidden_act", json!(null), &["null", "\"relu2\" or \"silu\""]),
        ("architectures", json!(["BitNetForMusic"]), &["BitNetForMusic", "BitNetForCausalLM, BitnetForCausalLM"]),
        ("architectures", json!(["BitNetForCausalLM", "LlamaForCausalLM"]), &["a list with one of"]),
        ("architectures", json!(null), &["a list with one of"]),
        (
            "rope_scaling",
            json!({"rope_type": "yarn", "factor": 2.0}),
            &["rope_scaling.rope_type", "\"yarn\"", "llama3"],
        ),
        ("rope_scaling", json!({"type": "dynamic", "factor": 2.0}), &["rope_scaling.type", "\"dynamic\""]),
        ("rope_scaling", json!({"type": "linear"}), &["rope_scaling.factor", "(missing)", "positive"]),
        ("rope_scaling", json!({"type": "linear", "factor": 0}), &["rope_scaling.factor = 0", "positive"]),
        ("rope_scaling", json!({"type": "linear", "factor": 2, "mscale": 1}), &["rope_scaling.mscale", "unknown"]),
        // Angles that are infinite once divided, or by a base of next to nothing: infinite in f32, not in the file.
        ("rope_scaling", json!({"type": "linear", "factor": 1e-40}), &["rope_theta", "not finite"]),
        ("rope_theta", json!(1e-300), &["rope_theta = ", "not finite"]),
        ("rope_theta", json!(0), &["rope_theta = 0", "positive"]),
        ("rope_theta", json!("10000"), &["rope_theta", "number"]),
        ("num_attention_heads", json!(0), &["num_attention_heads = 0", "1 to 65536"]),
        ("num_key_value_heads", json!(3), &["num_key_value_heads = 3", "divisor of num_attention_heads"]),
        ("num_key_value_heads", json!(0), &["num_key_value_heads = 0", "divisor"]),
        ("head_dim", json!(17), &["head_dim = 17", "even number"]),
        ("vocab_size", json!(-1), &["vocab_size = -1", "whole number"]),
        ("vocab_size", json!(1 << 23), &["vocab_size = 8388608", "1 to 4194304"]),
        ("vocab_size", json!(41.5), &["vocab_size = 41.5", "whole number"]),
        ("vocab_size", json!(42), &["model.embed_tokens.weight", "[41, 36]", "[42, 36]"]),
        ("hidden_size", json!(1u64 << 32), &["hidden_size = 4294967296", "below 2^32"]),
        ("hidden_size", json!(65_537), &["hidden_size = 65537", "1 to 65536"]),
        ("hidden_size", json!(0), &["hidden_size = 0", "1 to 65536"]),
        ("num_hidden_layers", json!(513), &["num_hidden_layers = 513", "1 to 512"]),
        ("num_hidden_layers", json!(3), &["tensor model.layers.2.input_layernorm.weight", "missing"]),
        ("num_hidden_layers", json!(1), &["tensor model.layers.1.input_layernorm.weight", "unknown"]),
        ("intermediate_size", json!(null), &["intermediate_size = null", "whole number"]),
        ("max_position_embeddings", json!(u32::MAX), &["max_position_embeddings = 4294967295", "1 to 1048576"]),
        ("rms_norm_eps", json!(1), &["rms_norm_eps", "below 1"]),
        ("rms_norm_eps", json!(-1e-5), &["rms_norm_eps = -0.00001", "positive"]),
        ("attention_bias", json!(true), &["attention_bias = true", "only false"]),
        ("mlp_bias", json!(true), &["mlp_bias = true", "only false"]),
        ("sliding_window", json!(4096), &["sliding_window = 4096", "only null"]),
        ("partial_rotary_factor", json!(0.5), &["partial_rotary_factor = 0.5", "only 1"]),
        ("tie_word_embeddings", json!("yes"), &["tie_word_embeddings = \"yes\"", "true or false"]),
        ("tie_word_embeddings", json!(false), &["tensor lm_head.weight", "missing", "tie_word_embeddings = false"]),
        ("bos_token_id", json!(1.5), &["bos_token_id = 1.5", "whole number"]),
        ("eos_token_id", json!("</s>"), &["eos_token_id = \"</s>\"", "a token"]),
        ("eos_token_id", json!(41), &["eos_token_id = 41", "41 tokens"]),
        ("eos_token_id", json!([3, 4, 5, 6, 7, 8, 9, 10, 11]), &["9 tokens end a reply, at most 8"]),
        ("quantization_config", json!("bitnet"), &["quantization_config = \"bitnet\"", "object"]),
        ("quantization_config", json!(null), &["packed", "no quantization_config", "multiplies or divides"]),
        (
            "quantization_config.quant_method",
            json!("gptq"),
            &["quantization_config.quant_method = \"gptq\"", "\"bitnet\""],
        ),
        ("quantization_config.linear_class", json!("bitblas"), &["linear_class = \"bitblas\"", "\"autobitlinear\""]),
        ("quantization_config.quantization_mode", json!("later"), &["quantization_mode = \"later\"", "\"online\""]),
        ("quantization_config.quantization_mode", json!("online"), &["q_proj.weight", "packed", "online"]),
        ("quantization_config.group_size", json!(128), &["quantization_config.group_size = 128", "unknown"]),
        ("quantization_config.modules_to_not_convert", json!(["down_proj"]), &["[\"down_proj\"]", "\"lm_head\""]),
        ("quantization_config.use_rms_norm", json!(true), &["q_proj.rms_norm.weight", "missing"]),
    ];
    for (key, value, expected) in cases {
        let what = format!("{key} = {value}");
        let place = Place::new();
        let mut checkpoint = Checkpoint::new(SMALL, Storage::Multiply);
        checkpoint.set(key, value);
        checkpoint.write(&place.source());
        refused(&what, &place, expected);
    }
    let place = Place::new();
    let mut checkpoint = Checkpoint::new(SMALL, Storage::Multiply);
    checkpoint.set("head_dim", json!(null));
    checkpoint.set("num_attention_heads", json!(5));
    checkpoint.write(&place.source());
    refused("heads", &place, &["num_attention_heads = 5", "does not divide hidden_size = 36"]);
    for (what, text, expected) in [
        ("list", "[]", "object"),
        ("cut", "{\"architectures\":", "not valid JSON"),
        ("number too large", "{\"rms_norm_eps\":1e999}", "not valid JSON"),
        ("deep", &"[".repeat(100_000), "not valid JSON"),
    ] {
        place.put("config.json", text);
        refused(what, &place, &["config.json", expected]);
    }
}

/// A-05: the class is one of the names that are known.
#[test]
fn class_names() {
    for (name, sub_norms) in [("BitNetForCausalLM", true), ("BitnetForCausalLM", true), ("LlamaForCausalLM", false)] {
        let place = Place::new();
        let mut checkpoint = Checkpoint::new(SMALL, Storage::Divide);
        checkpoint.set("architectures", json!([name]));
        if !sub_norms {
            checkpoint.write(&place.source());
            refused(name, &place, &["sub_norm.weight", "unknown to this class"]);
            checkpoint.tensors.retain(|t| !t.name.contains("sub_norm"));
        }
        checkpoint.write(&place.source());
        let report = pack(&place.source(), &place.image(), &named(), &mut ()).unwrap();
        assert_eq!((report.architecture.as_str(), report.config.sub_norms), (name, sub_norms));
    }
    let place = Place::new();
    let mut other = Checkpoint::new(SMALL, Storage::Online);
    other.set("architectures", json!(["GPT2LMHeadModel"]));
    other.write(&place.source());
    refused("another class", &place, &["architectures = [\"GPT2LMHeadModel\"]", "LlamaForCausalLM"]);
    other.set("architectures", json!(["Gemma3ForCausalLM"]));
    other.write(&place.source());
    refused(
        "Gemma",
        &place,
        &["architectures = [\"Gemma3ForCausalLM\"]", "its embedding is scaled", "LlamaForCausalLM"],
    );
}

/// The MatMul-free language model: what would change its arithmetic is refused, and widths that follow from others are.
#[test]
fn recurrent_configurations() {
    let golden = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden/matmul_free");
    let config: Value = serde_json::from_slice(&std::fs::read(golden.join("config.json")).unwrap()).unwrap();
    let tensors = std::fs::read(golden.join("model.safetensors")).unwrap();
    let gate = "model.layers.0.mlp.gate_proj.weight";
    let cases: [(&str, Value, &[&str]); 12] = [
        ("attn_mode", json!("chunk"), &["attn_mode = \"chunk\"", "fused_recurrent"]),
        ("expand_ratio", json!(2), &["expand_ratio = 2", "only 1 is"]),
        ("use_short_conv", json!(true), &["use_short_conv = true", "only false is"]),
        ("use_lower_bound", json!(false), &["use_lower_bound = false", "only true is"]),
        ("hidden_act", json!("relu2"), &["hidden_act", "\"swish\""]),
        ("quantization_config", json!({ "quant_method": "bitnet" }), &["quantization_config", "not supported"]),
        ("memory", json!({"kind": "shared"}), &["memory", "no attention"]),
        ("sliding_window", json!(8), &["sliding_window", "sink_tokens"]),
        ("tie_word_embeddings", json!(true), &["linear_head"]),
        ("num_hidden_layers", json!(4), &["lower_bounds", "[3, 48]", "[4, 48]"]),
        // 256 times what 48 · 4 · 2 / 3 is in steps of 256, rounded up; gate and up are one matrix.
        ("intermediate_size", json!(null), &[gate, "[160, 48]", "[512, 48]"]),
        ("intermediate_size", json!(4_000_000_000u32), &["intermediate_size = 4000000000", "1 to 65536"]),
    ];
    for (key, value, what) in cases {
        let place = Place::new();
        let mut config = config.clone();
        config[key] = value;
        place.put("config.json", config.to_string().as_bytes());
        place.put("model.safetensors", &tensors);
        refused(key, &place, what);
    }
    let place = Place::new();
    place.put("config.json", config.to_string().as_bytes());
    place.put("model.safetensors", &tensors);
    let two_stage = Options { split_head: true, ..named() };
    let error = pack(&place.source(), &place.image(), &two_stage, &mut ()).unwrap_err().to_string();
    assert!(error.contains("head is ternary"), "{error}");
    let ternary = Options { head: bitnet_kernel::Format::TL, ..named() };
    let error = pack(&place.source(), &place.image(), &ternary, &mut ()).unwrap_err().to_string();
    assert!(error.contains("--head cannot be tl"), "{error}");
    pack(&place.source(), &place.image(), &named(), &mut ()).unwrap();
}

/// A memory beside attention: every key of its section is read, and what would change its arithmetic is refused.
#[test]
fn memory_configurations() {
    let golden = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden/bitrnn_v_late");
    let config: Value = serde_json::from_slice(&std::fs::read(golden.join("config.json")).unwrap()).unwrap();
    let tensors = std::fs::read(golden.join("model.safetensors")).unwrap();
    let cases: [(&str, Value, &[&str]); 8] = [
        ("kind", json!("bitrnn"), &["memory.kind = \"bitrnn\"", "\"bitrnn-v\" or \"shared\""]),
        ("kind", json!("bitrnn-m"), &["memory.width"]),
        ("kind", json!("shared"), &["memory.width"]),
        ("width", json!(0), &["memory.width = 0"]),
        ("width", json!(45), &["memory.in_proj", "135", "132"]),
        ("write_delay", json!(11), &["memory.write_delay = 11", "0 or the number of sliding_window"]),
        ("write_delay", json!(-1), &["memory.write_delay = -1"]),
        ("heads", json!(2), &["memory.heads"]),
    ];
    for (key, value, what) in cases {
        let place = Place::new();
        let mut config = config.clone();
        config["memory"][key] = value;
        place.put("config.json", config.to_string().as_bytes());
        place.put("model.safetensors", &tensors);
        refused(key, &place, what);
    }
    // Norms inside linears, which its own have not.
    let place = Place::new();
    let mut normed = config.clone();
    normed["quantization_config"] = json!({"quant_method": "bitnet", "linear_class": "autobitlinear",
        "quantization_mode": "online", "use_rms_norm": true, "rms_norm_eps": 1e-5});
    place.put("config.json", normed.to_string().as_bytes());
    place.put("model.safetensors", &tensors);
    refused("norms", &place, &["memory", "not beside linears with norms"]);
    // Without a window nothing ever leaves it.
    let place = Place::new();
    let mut endless = config.clone();
    endless.as_object_mut().unwrap().retain(|key, _| !matches!(&**key, "sliding_window" | "sink_tokens"));
    place.put("config.json", endless.to_string().as_bytes());
    place.put("model.safetensors", &tensors);
    refused("no window", &place, &["memory.write_delay = 12"]);
    place.put("config.json", config.to_string().as_bytes());
    assert!(pack(&place.source(), &place.image(), &named(), &mut ()).unwrap().config.delayed_writes);
}

/// What is rotated has no zeros to skip, and is not what floats multiply.
#[test]
fn rotated_activations() {
    let golden = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden/rotated");
    let image = tempfile::tempdir().unwrap();
    let image = image.path().join("image");
    for options in [Options { live_ffn: true, ..named() }, Options { dense: bitnet_kernel::Format::F16, ..named() }] {
        let error = pack(&golden, &image, &options, &mut ()).unwrap_err().to_string();
        assert!(error.contains("activation_quantization rotates activations"), "{error}");
    }
    pack(&golden, &image, &named(), &mut ()).unwrap();
}

/// A-05: the tokenizer is chosen by the files that are there; two that disagree are not chosen from.
#[test]
fn tokenizers() {
    let place = Place::new();
    let shape = common::Shape { vocab: 512, ..SMALL };
    Checkpoint::new(shape, Storage::Online).write(&place.source());
    let json = std::fs::read(stories().join("tokenizer.json")).unwrap();
    place.put("tokenizer.json", &json);
    let of_json = place.pack(&named());
    std::fs::remove_file(place.image()).unwrap();
    // 256 bytes as tokens, in the form of tiktoken: base64 and rank.
    let digits = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let digit = |d: u8| char::from(digits[usize::from(d)]);
    let line = |b: u8| format!("{}{}== {b}\n", digit(b >> 2), digit((b & 3) << 4));
    let tiktoken: String = (0..=255).map(line).collect();
    place.put("other.tiktoken", &tiktoken);
    refused("two", &place, &["other.tiktoken", "tokens, but tokenizer.json has", "--tokenizer"]);
    let chosen = |name: &str| Options { tokenizer: Some(place.source().join(name)), ..named() };
    assert!(place.pack(&chosen("tokenizer.json")) == of_json);
    std::fs::remove_file(place.image()).unwrap();
    // The special tokens that this kind of tokenizer has by its size lie beyond the model's vocabulary.
    let error = refused_with("chosen", &place, &chosen("other.tiktoken")).to_string();
    assert_says("chosen", &error, &["other.tiktoken: token 50283 lies outside the model's vocabulary of 512"]);
    std::fs::remove_file(place.source().join("other.tiktoken")).unwrap();

    for (what, bytes, expected) in [
        ("LFS", &b"version https://git-lfs.github.com/spec/v1\n"[..], "git lfs pull"),
        ("HTML", b"<!DOCTYPE html>", "web page"),
        ("empty", b"", "empty"),
        ("cut", &json[..json.len() / 2], "cannot be read as tokenizer.json"),
        ("object", b"{}", "cannot be read as tokenizer.json"),
        ("bytes", &[0xff; 64], "neither tokenizer.json nor"),
    ] {
        place.put("tokenizer.json", bytes);
        refused(what, &place, &["tokenizer.json", expected]);
    }
    let place = Place::new();
    Checkpoint::new(SMALL, Storage::Online).write(&place.source());
    place.put("tokenizer.json", &json);
    refused("vocabulary", &place, &["tokenizer.json", "token 511", "vocabulary of 41"]);
}

const QUERY: &str = "model.layers.1.self_attn.q_proj.weight";
const SCALE: &str = "model.layers.1.self_attn.q_proj.weight_scale";

/// Tensors that are missing, left over, of another kind, or hold what no weight is.
#[test]
fn tensors() {
    type Change = fn(&mut Checkpoint);
    let packed: [(&str, Change, &[&str]); 16] = [
        ("unknown", |c| c.tensors.push(Tensor::f32("model.extra", &[1], &[0.0])), &["tensor model.extra", "unknown"]),
        (
            "bias",
            |c| c.tensors.push(Tensor::f32("model.layers.0.mlp.up_proj.bias", &[70], &[0.0; 70])),
            &["up_proj.bias", "unknown"],
        ),
        ("no weight", |c| _ = c.remove(QUERY), &[QUERY, "missing"]),
        ("no scale", |c| _ = c.remove(SCALE), &[SCALE, "missing"]),
        ("no embedding", |c| _ = c.remove("model.embed_tokens.weight"), &["model.embed_tokens.weight", "missing"]),
        ("no norm", |c| _ = c.remove("model.norm.weight"), &["model.norm.weight", "missing"]),
        ("code 3", |c| c.tensor(QUERY).data[36 * 2 + 5] = 0b0011_0101, &[QUERY, "row 20, column 5", "code 3"]),
        ("scale 0", |c| *c.tensor(SCALE) = Tensor::f32(SCALE, &[1], &[0.0]), &[SCALE, "0 is no scale"]),
        ("scale negative", |c| *c.tensor(SCALE) = Tensor::f32(SCALE, &[1], &[-0.5]), &[SCALE, "-0.5 is no scale"]),
        (
            "scale NaN",
            |c| *c.tensor(SCALE) = Tensor::f32(SCALE, &[1], &[f32::NAN]),
            &[SCALE, "NaN is not a finite number"],
        ),
        (
            "scale infinite",
            |c| *c.tensor(SCALE) = Tensor::f32(SCALE, &[1], &[f32::INFINITY]),
            &[SCALE, "inf is not a finite number"],
        ),
        ("scale inverted", |c| *c.tensor(SCALE) = Tensor::f32(SCALE, &[1], &[1e6]), &[SCALE, "1000000", "outside"]),
        ("two scales", |c| *c.tensor(SCALE) = Tensor::f32(SCALE, &[2], &[1.0; 2]), &[SCALE, "[2]", "one number"]),
        ("scale of codes", |c| c.tensor(SCALE).dtype = "I32", &[SCALE, "I32", "F32, F16 or BF16"]),
        ("int8", |c| c.tensor(QUERY).dtype = "I8", &[QUERY, "I8", "F32, F16 or BF16"]),
        ("transposed", |c| c.tensor(QUERY).shape.reverse(), &[QUERY, "[36, 9]", "[9, 36]"]),
    ];
    let online: [(&str, Change, &[&str]); 6] = [
        (
            "NaN",
            |c| c.tensor(QUERY).data[2 * (36 * 3 + 7)..][..2].copy_from_slice(&[0xc0, 0x7f]),
            &[QUERY, "row 3, column 7", "NaN"],
        ),
        ("infinity", |c| c.tensor(QUERY).data[..2].copy_from_slice(&[0x80, 0xff]), &[QUERY, "row 0, column 0", "-inf"]),
        (
            "NaN norm",
            |c| c.tensor("model.norm.weight").data[..4].copy_from_slice(&f32::NAN.to_le_bytes()),
            &["model.norm.weight", "NaN"],
        ),
        (
            "NaN embedding",
            |c| c.tensor("model.embed_tokens.weight").data[2..4].copy_from_slice(&[0xc0, 0x7f]),
            &["model.embed_tokens.weight", "row 0, column 1", "NaN"],
        ),
        (
            "f64 masters",
            |c| {
                *c.tensor(QUERY) =
                    Tensor { name: QUERY.into(), dtype: "F64", shape: vec![36, 36], data: vec![0; 36 * 36 * 8] }
            },
            &[QUERY, "F64"],
        ),
        (
            "norm of a matrix",
            |c| c.tensor("model.norm.weight").shape = vec![1, 36],
            &["model.norm.weight", "[1, 36]", "[36]"],
        ),
    ];
    for (storage, (what, change, expected)) in
        packed.map(|c| (Storage::Multiply, c)).into_iter().chain(online.map(|c| (Storage::Online, c)))
    {
        let place = Place::new();
        let mut checkpoint = Checkpoint::new(SMALL, storage);
        change(&mut checkpoint);
        checkpoint.write(&place.source());
        refused(what, &place, expected);
    }
}

/// Files that are not what their names say, and directories that are no checkpoints.
#[test]
fn other_files() {
    let lfs = "version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 4996440\n";
    for name in ["model.safetensors", "config.json"] {
        for (what, text, expected) in [
            ("LFS", lfs, "git lfs pull"),
            ("HTML", "<!DOCTYPE html><html>", "web page"),
            ("empty", "", "empty"),
            ("GGUF", "GGUF\x03\0\0\0\0\0\0\0\0\0\0\0", "GGUF"),
        ] {
            let place = Place::new();
            Checkpoint::new(SMALL, Storage::Online).write(&place.source());
            place.put(name, text);
            refused(&format!("{what} as {name}"), &place, &[name, expected]);
        }
    }
    let place = Place::new();
    refused("nothing", &place, &["no config.json", "a GGUF file"]);
    place.put("model.gguf", "GGUF");
    refused("GGUF", &place, &["model.gguf: GGUF: the version at byte 4", "truncated"]);
    Checkpoint::new(SMALL, Storage::Online).write_config(&place.source());
    std::fs::remove_file(place.source().join("model.gguf")).unwrap();
    refused("no tensors", &place, &["no model.safetensors and no model.safetensors.index.json"]);
    place.put("pytorch_model.bin", "PK");
    refused("PyTorch", &place, &["pytorch_model.bin is PyTorch", "convert it to safetensors"]);
    std::fs::create_dir(place.source().join("model.safetensors")).unwrap();
    refused("directory", &place, &["model.safetensors", "a directory"]);
}

/// Cut in the header at every byte, and in the tensors.
#[test]
fn cut_at_every_length() {
    let place = Place::new();
    let checkpoint = Checkpoint::new(common::Shape { layers: 1, ..SMALL }, Storage::Multiply);
    checkpoint.write(&place.source());
    let path = place.source().join("model.safetensors");
    let bytes = std::fs::read(&path).unwrap();
    let header = 8 + u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let file = std::fs::OpenOptions::new().write(true).open(&path).unwrap();
    let mut cuts: Vec<usize> =
        (0..=header).chain((header..bytes.len()).step_by(4096)).chain([bytes.len() - 1]).collect();
    cuts.sort_unstable();
    for cut in cuts.into_iter().rev() {
        file.set_len(cut as u64).unwrap();
        let expected = match cut {
            0 => "empty".into(),
            1..9 => format!("{cut} bytes are too few"),
            _ if cut < header => format!("ends at byte {cut}, its header at {header}: truncated"),
            _ => format!("the file at {cut}: truncated"),
        };
        refused(&format!("cut at {cut}"), &place, &["model.safetensors", &expected]);
    }
}

/// Options that the checkpoint or the format cannot serve, and targets that are not replaced.
#[test]
fn options_and_targets() {
    let place = Place::new();
    Checkpoint::new(SMALL, Storage::Online).write(&place.source());
    let cases = [
        (Options { format: Format::F16, ..named() }, "--format cannot be f16"),
        (Options { head: Format::TL, ..named() }, "--head cannot be tl"),
        (Options { embedding: Some(Format::B1), ..named() }, "--embedding cannot be b1"),
        (Options { context: Some(65), ..named() }, "context of 65 asked for, 1 to 64"),
        (Options { batch: Some(0), ..named() }, "batch of 0 asked for, 1 to 16"),
        (Options { format: Format::B1, ..named() }, "is zero, which b1 cannot hold"),
    ];
    for (options, expected) in cases {
        assert_says(expected, &refused_with(expected, &place, &options).to_string(), &[expected]);
    }
    std::fs::write(place.image(), "a letter").unwrap();
    let error = pack(&place.source(), &place.image(), &named(), &mut ()).unwrap_err();
    assert_says("a letter", &error.to_string(), &["image.bitnet", "is not an image, so it is not replaced"]);
    assert_eq!(std::fs::read(place.image()).unwrap(), b"a letter");
    assert_eq!(place.left(), ["image.bitnet"]);
    let nowhere = place.out().join("none/image.bitnet");
    let error = pack(&place.source(), &nowhere, &named(), &mut ()).unwrap_err();
    assert_says("nowhere", &error.to_string(), &["cannot create", "none/image.bitnet"]);
}
