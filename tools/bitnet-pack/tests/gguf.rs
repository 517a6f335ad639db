//! GGUF files that must be packed, and into exactly what.
mod common;

use bitnet_kernel::portable::Portable;
use bitnet_kernel::{Block, Format, format};
use bitnet_pack::checkpoint::Dtype;
use bitnet_pack::{Options, Report, pack};
use bitnet_runtime::image::Kind;
use bitnet_runtime::model::{Activation, Rope};
use bitnet_runtime::parallel::Serial;
use bitnet_runtime::source::Mapped;
use bitnet_runtime::{Image, Limits, Model, Plan, State};
use common::gguf::{F32, Gguf, I2_S, Q1_0, Q2_0, Q8_0, TQ1_0, TQ2_0, Value, WIDTH, floats, i2_s, text};
use common::{Checkpoint, Codes, Place, SMALL, Shape, Storage, Tensor, assert_says, named, rows, section, stories};
use kitoken::{Definition, Kitoken};
use serde_json::{Value as Json, json};
use std::collections::HashMap;
use std::path::{Path, PathBuf};
use zerocopy::IntoBytes;

fn golden(name: &str) -> Vec<u8> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name);
    std::fs::read(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

/// The data of a numpy file, whose header is one line that ends on a multiple of 64.
fn npy(name: &str) -> Vec<u8> {
    let file = golden(name);
    let header = usize::from(u16::from_le_bytes([file[8], file[9]]));
    file[10 + header..].into()
}

fn as_floats(bytes: &[u8]) -> Vec<f32> {
    bytes.chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect()
}

/// The golden matrix.
fn matrix() -> Vec<Vec<i8>> {
    let codes: Vec<i8> = npy("formats/ternary_4x256_i8.npy").iter().map(|&b| b as i8).collect();
    codes.chunks_exact(WIDTH as usize).map(<[i8]>::to_vec).collect()
}

/// Packs a file, which lies alone in its directory.
fn pack_gguf(gguf: &Gguf, options: &Options) -> (Report, Vec<u8>) {
    let place = Place::new();
    place.put("model.gguf", gguf.bytes());
    let report = pack(&place.source(), &place.image(), options, &mut ()).unwrap_or_else(|e| panic!("{e}"));
    (report, std::fs::read(place.image()).unwrap())
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|v| v.to_bits()).collect()
}

/// Every block type, against what another implementation reads in the same bytes.
#[test]
fn golden_blocks() {
    for (name, dtype) in [
        ("q4_0", Dtype::Q4_0),
        ("q4_1", Dtype::Q4_1),
        ("q5_0", Dtype::Q5_0),
        ("q5_1", Dtype::Q5_1),
        ("q8_0", Dtype::Q8_0),
        ("q4_k", Dtype::Q4_K),
        ("q5_k", Dtype::Q5_K),
        ("q6_k", Dtype::Q6_K),
        ("tq1_0", Dtype::TQ1_0),
        ("tq2_0", Dtype::TQ2_0),
    ] {
        let (raw, expected) = (golden(&format!("gguf/{name}.bin")), as_floats(&golden(&format!("gguf/{name}.f32"))));
        assert_eq!(dtype.bytes_of(expected.len() as u64), Some(raw.len() as u64), "{name}");
        let mut found = vec![0.0; expected.len()];
        dtype.decode(&raw, 1.0, &mut found).unwrap();
        for (i, (found, expected)) in found.iter().zip(&expected).enumerate() {
            // The order of two multiplications is another there, for one type.
            assert!((found - expected).abs() <= expected.abs() * 1e-6, "{name}, {i}: {found} {expected}");
        }
    }
}

/// The golden matrix in every ternary layout, and signs in Q1_0: decoded exactly.
#[test]
fn golden_ternary_blocks() {
    let expected: Vec<f32> = matrix().concat().iter().map(|&t| f32::from(t) * 0.5).collect();
    for (name, dtype) in [
        ("i2_s_x86_128", Dtype::I2_S),
        ("i2_s_arm_64", Dtype::I2_S_64),
        ("tq1_0", Dtype::TQ1_0),
        ("tq2_0", Dtype::TQ2_0),
        ("q2_0_g64_ternary", Dtype::Q2_0),
        ("q2_0_g128_ternary", Dtype::Q2_0_128),
    ] {
        let mut raw = golden(&format!("formats/{name}.bin"));
        assert_eq!(dtype.bytes_of(1024), Some(raw.len() as u64), "{name}");
        if matches!(dtype, Dtype::I2_S | Dtype::I2_S_64) {
            assert_eq!(as_floats(&raw[256..260]), [0.5]);
            raw.truncate(256);
        }
        let mut found = vec![0.0; 1024];
        dtype.decode(&raw, 0.5, &mut found).unwrap();
        assert_eq!(bits(&found), bits(&expected), "{name}");
    }
    let values = as_floats(&npy("formats/f32_2x256.npy"));
    let mut found = vec![0.0; 512];
    Dtype::Q1_0.decode(&golden("formats/q1_0_g128.bin"), 1.0, &mut found).unwrap();
    for (found, values) in found.chunks_exact(128).zip(values.chunks_exact(128)) {
        let mean = values.iter().map(|v| v.abs()).sum::<f32>() / 128.0;
        assert!((found[0].abs() - mean).abs() < 1e-3 * mean);
        assert!(found.iter().zip(values).all(|(f, v)| f.abs() == found[0].abs() && (*f > 0.0) == (*v >= 0.0)));
    }
}

/// The golden matrix in a file, in every layout: its type is told by its number, by the room it has and by the option, and
/// its codes and its scale are those of the image, bit for bit.
#[test]
fn golden_matrix_in_a_file() {
    for (name, tag, i2s) in [
        ("i2_s_x86_128", I2_S, Dtype::I2_S),
        ("i2_s_arm_64", I2_S, Dtype::I2_S_64),
        ("tq1_0", TQ1_0, Dtype::I2_S),
        ("tq2_0", TQ2_0, Dtype::I2_S),
        ("q2_0_g64_ternary", Q2_0, Dtype::I2_S),
        ("q2_0_g128_ternary", Q2_0, Dtype::I2_S),
    ] {
        let mut gguf = Gguf::model("bitnet-b1.58");
        *gguf.tensor("blk.0.attn_k.weight") = common::gguf::GgufTensor {
            name: "blk.0.attn_k.weight".into(),
            dimensions: vec![WIDTH, 4],
            tag,
            data: golden(&format!("formats/{name}.bin")),
            offset: None,
        };
        // The room of so small a matrix does not tell the groups of Q2_0; that of the others does.
        let query = gguf.tensor("blk.0.attn_q.weight");
        match name {
            "q2_0_g64_ternary" => (query.tag, query.data) = (Q2_0, [1, 0, 0x55, 0x55].repeat(1024 * 18 / 4)),
            "q2_0_g128_ternary" => (query.tag, query.data) = (Q2_0, [1, 0, 0x55, 0x55].repeat(512 * 34 / 4)),
            _ => {}
        }
        let (report, image) = pack_gguf(&gguf, &Options { i2s: Some(i2s), lossy: true, ..named() });
        assert_eq!(rows(&image, Kind::Key, Some(0)), matrix(), "{name}");
        let (record, _) = section(&image, Kind::Key, Some(0));
        assert_eq!(record.scale.get().to_bits(), 0.5f32.to_bits(), "{name}");
        let key = report.sections.iter().find(|s| s.kind == Kind::Key).unwrap();
        assert_eq!((key.format_name(), key.distance, key.error), ("tl", None, None), "{name}");
    }
}

/// the generator's codes in groups of 128 and of 64, and the file that is read as it is said to be.
#[test]
fn groups_of_i2_s() {
    let codes = Codes::new().rows(1, 256).concat();
    let hex = |bytes: &[u8]| bytes.iter().map(|b| format!("{b:02x}")).collect::<String>();
    assert_eq!(hex(&i2_s(&codes, 128, 1.0)[..16]), "a65022695894040428224682162585a0");
    assert_eq!(hex(&i2_s(&codes, 64, 1.0)[..16]), "8a44084a65962001080942a11529a1a8");
    let weights = Codes::new().rows(4, WIDTH);
    for (group, i2s) in [(128, Dtype::I2_S), (64, Dtype::I2_S_64)] {
        let mut gguf = Gguf::model("bitnet");
        gguf.tensor("blk.0.attn_v.weight").data = i2_s(&weights.concat(), group, 0.25);
        let (_, image) = pack_gguf(&gguf, &Options { i2s: Some(i2s), lossy: true, ..named() });
        assert_eq!(rows(&image, Kind::Value, Some(0)), weights, "{group}");
    }
}

/// Columns whose gain is large have fewer zeros, in this order: with the right groups the two go together.
#[test]
fn groups_of_i2_s_by_their_numbers() {
    let gain = |c: u64| 1.0 + (c * 37 % WIDTH) as f32;
    let weight = |r: u64, c: u64| if (r * 101 % WIDTH) as f32 + 1.0 < gain(c) { 1 } else { 0 };
    let weights: Vec<i8> = (0..WIDTH * WIDTH).map(|i| weight(i / WIDTH, i % WIDTH)).collect();
    let gains: Vec<f32> = (0..WIDTH).map(gain).collect();
    let run = |group: usize, gains: &[f32]| {
        let mut gguf = Gguf::model("bitnet-b1.58");
        gguf.tensor("blk.0.attn_output.weight").data = i2_s(&weights, group, 0.25);
        gguf.tensor("blk.0.attn_sub_norm.weight").data = floats(gains);
        let (report, image) = pack_gguf(&gguf, &named());
        let notes: Vec<String> = report.notes.into_iter().filter(|note| note.contains("groups of")).collect();
        (image, notes)
    };
    let (right, none) = run(128, &gains);
    assert_eq!(none, [""; 0], "the usual groups, and clearly so");
    let (found, notes) = run(64, &gains);
    assert_says("64", &notes[0], &["groups of 64: rank correlation", "1.00 in groups of 64"]);
    let output = |image: &[u8]| section(image, Kind::Output, Some(0)).0.checksum.get();
    assert_eq!(output(&found), output(&right));
    let (kept, notes) = run(64, &vec![1.0; WIDTH as usize]);
    assert_says("no evidence", &notes[0], &["groups of 128, but the weights do not say", "--i2s-group 64"]);
    assert_ne!(output(&kept), output(&right));
}

/// A-02 and the architectures: what each computes, and which tensors it has.
#[test]
fn architectures() {
    for (name, activation, rope, sub_norms, qk_norms) in [
        ("bitnet", Activation::Silu, Rope::HalfSplit, true, false),
        ("bitnet-b1.58", Activation::SquaredRelu, Rope::HalfSplit, true, false),
        ("bitnet-25", Activation::SquaredRelu, Rope::HalfSplit, true, false),
        ("llama", Activation::Silu, Rope::Interleaved, false, false),
        ("qwen3", Activation::Silu, Rope::HalfSplit, false, true),
    ] {
        let (report, _) = pack_gguf(&Gguf::model(name), &named());
        let c = report.config;
        assert_eq!((c.activation, c.rope, c.sub_norms, c.qk_norms), (activation, rope, sub_norms, qk_norms), "{name}");
        assert_eq!((c.hidden, c.heads, c.kv_heads, c.head_dim, c.vocab, c.tied), (256, 64, 1, 4, 8, true), "{name}");
        assert_eq!(report.architecture, name);
    }
}

/// The logits after the last of `ids`.
fn logits(image: &[u8], ids: &[u32]) -> Vec<f32> {
    let mut blocks = vec![Block::ZERO; image.len() / 64];
    blocks.as_mut_bytes().copy_from_slice(image);
    let image = Image::check(image, image.len() as u64).unwrap();
    let config = image.header().config;
    let limits = Limits::default_for(&config);
    let plan = Plan::new(&config, &limits);
    let (mut scratch, mut state) = (vec![Block::ZERO; plan.scratch], vec![Block::ZERO; plan.state]);
    let mut source = Mapped::new(&blocks);
    let mut state = State::new(&config, &limits, &mut state).unwrap();
    let mut model = Model::new(&image, limits, &Portable, &Serial, &mut source, &mut scratch).unwrap();
    model.prefill(&mut state, ids).unwrap().to_vec()
}

/// A file of architecture llama has rows of queries and keys in another order, for pairs that lie side by side. It is the
/// same model as the safetensors file that it was made from, and without the order it is not.
#[test]
fn rows_of_llama_are_interleaved() {
    let shape = Shape { vocab: 41, hidden: 36, ffn: 70, layers: 2, heads: 2, kv_heads: 1, head_dim: 18 };
    let place = Place::new();
    let mut checkpoint = Checkpoint::new(shape, Storage::Online);
    checkpoint.set("architectures", json!(["LlamaForCausalLM"]));
    checkpoint.set("hidden_act", json!("silu"));
    checkpoint.tensors.retain(|t| !t.name.contains("sub_norm"));
    checkpoint.config.remove("quantization_config");
    checkpoint.write(&place.source());
    let expected = logits(&place.pack(&named()), &[1, 5, 7, 40, 3]);
    let number = |name: &str, v: u64| (format!("llama.{name}"), Value::U32(v as u32));
    let keys = vec![
        ("general.architecture".into(), text("llama")),
        number("block_count", shape.layers),
        number("context_length", 64),
        number("embedding_length", shape.hidden),
        number("feed_forward_length", shape.ffn),
        number("attention.head_count", shape.heads),
        number("attention.head_count_kv", shape.kv_heads),
        number("vocab_size", shape.vocab),
        ("llama.attention.layer_norm_rms_epsilon".into(), Value::F32(1e-5)),
    ];
    for (permuted, same) in [(true, true), (false, false)] {
        let mut gguf = Gguf { version: 2, keys: keys.clone(), tensors: Vec::new(), alignment: 32 };
        for t in &checkpoint.tensors {
            let bf16 = |b: &[u8]| half::bf16::from_le_bytes([b[0], b[1]]).to_f32();
            let mut values: Vec<f32> = match t.dtype {
                "BF16" => t.data.chunks_exact(2).map(bf16).collect(),
                _ => as_floats(&t.data),
            };
            if permuted && (t.name.contains("q_proj") || t.name.contains("k_proj")) {
                values = permute(&values, shape.head_dim as usize, shape.hidden as usize);
            }
            let dimensions: Vec<u64> = t.shape.iter().rev().copied().collect();
            gguf.add(&gguf_name(&t.name), &dimensions, F32, floats(&values));
        }
        let (report, image) = pack_gguf(&gguf, &named());
        assert_eq!(report.sections.iter().find(|s| s.kind == Kind::Query).unwrap().format_name(), "tl");
        let found = logits(&image, &[1, 5, 7, 40, 3]);
        let difference = found.iter().zip(&expected).fold(0.0f32, |max, (a, b)| max.max((a - b).abs()));
        println!("permuted {permuted}: {difference}");
        assert_eq!(difference < 1e-5, same, "permuted {permuted}: {difference}");
    }
}

/// Row `i` and row `i + d / 2` of each head, one after the other.
fn permute(values: &[f32], head_dim: usize, cols: usize) -> Vec<f32> {
    let rows: Vec<&[f32]> = values.chunks_exact(cols).collect();
    let heads = rows.chunks_exact(head_dim);
    let pairs =
        |head: &[&[f32]]| (0..head_dim).flat_map(|r| head[r % 2 * head_dim / 2 + r / 2].to_vec()).collect::<Vec<_>>();
    heads.flat_map(pairs).collect()
}

fn gguf_name(name: &str) -> String {
    let replaced = [
        ("model.embed_tokens", "token_embd"),
        ("model.norm", "output_norm"),
        ("model.layers.", "blk."),
        ("input_layernorm", "attn_norm"),
        ("post_attention_layernorm", "ffn_norm"),
        ("self_attn.q_proj", "attn_q"),
        ("self_attn.k_proj", "attn_k"),
        ("self_attn.v_proj", "attn_v"),
        ("self_attn.o_proj", "attn_output"),
        ("mlp.gate_proj", "ffn_gate"),
        ("mlp.up_proj", "ffn_up"),
        ("mlp.down_proj", "ffn_down"),
    ];
    replaced.iter().fold(name.to_owned(), |name, (from, to)| name.replace(from, to))
}

/// Blocks of 32 of Q8_0, quantized here.
fn q8_0(values: &[f32]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for block in values.chunks_exact(32) {
        let d = half::f16::from_f32(block.iter().fold(0.0f32, |m, v| m.max(v.abs())) / 127.0);
        bytes.extend(d.to_le_bytes());
        bytes.extend(block.iter().map(|v| if d.to_f32() == 0.0 { 0 } else { (v / d.to_f32()).round() as i8 as u8 }));
    }
    bytes
}

/// Linears that are not ternary take the dense format, and the error is reported; ternary ones are recognised in any type.
#[test]
fn dense_and_ternary_in_one_file() {
    let mut gguf = Gguf::model("llama");
    let mut codes = Codes::new();
    let dense: Vec<f32> = (0..256 * 256).map(|_| (codes.next() % 2001) as f32 / 1e3 - 1.0).collect();
    let ternary = Codes::new().rows(4, WIDTH);
    let scaled: Vec<f32> = ternary.concat().iter().map(|&t| f32::from(t) * 0.5).collect();
    let up = gguf.tensor("blk.0.ffn_up.weight");
    (up.tag, up.data) = (Q8_0, q8_0(&dense));
    let value = gguf.tensor("blk.0.attn_v.weight");
    (value.tag, value.data) = (Q8_0, q8_0(&scaled));
    // The weights are spread evenly, so the error of `n` levels is about `1 / n`.
    for (dense, name, least, most) in [
        (Format::I8, "i8", 0.001, 0.01),
        (Format::I4, "i4", 0.02, 0.15),
        (Format::I4G, "i4g128", 0.02, 0.15),
        (Format::I3G, "i3g128", 0.11, 0.14),
        (Format::I2G, "i2g128", 0.23, 0.26),
    ] {
        let (report, image) = pack_gguf(&gguf, &Options { dense, ..named() });
        let of = |kind| report.sections.iter().find(|s| s.kind == kind).unwrap();
        assert_eq!(of(Kind::Up).format_name(), name);
        let error = of(Kind::Up).error.unwrap();
        assert!(least < error && error < most, "{name}: {error}");
        assert_eq!(of(Kind::Value).format_name(), "tl");
        assert_eq!(rows(&image, Kind::Value, Some(0)), ternary);
        assert_eq!(
            section(&image, Kind::Value, Some(0)).0.scale.get(),
            half::f16::from_f32(0.5 / 127.0).to_f32() * 127.0
        );
        assert!(report.to_string().contains("not ternary"), "{report}");
    }
}

/// Q1_0: groups whose scales differ are not one ternary matrix; where they do not, every weight is kept.
#[test]
fn binary_groups() {
    let signs: Vec<u8> = (0..128u32).map(|i| ((i * 37) >> 2) as u8).collect();
    let block = |scale: f32, signs: &[u8]| [&half::f16::from_f32(scale).to_le_bytes()[..], signs].concat();
    for (second, format) in [(0.5, "b1"), (0.25, "b1g128")] {
        let mut gguf = Gguf::model("llama");
        let blocks = signs.chunks_exact(16).zip([0.5, second].into_iter().cycle());
        let data: Vec<u8> = blocks.flat_map(|(signs, scale)| block(scale, signs)).collect();
        // The other linears are ternary, which b1 cannot hold: so all of them become this one, cut or repeated.
        for t in gguf.tensors.iter_mut().filter(|t| t.tag == I2_S) {
            let blocks = (t.dimensions[0] * t.dimensions[1] / 128) as usize;
            (t.tag, t.data) = (Q1_0, data.chunks_exact(18).cycle().take(blocks).flatten().copied().collect());
        }
        let (report, image) = pack_gguf(&gguf, &Options { format: Format::B1, ..named() });
        let key = report.sections.iter().find(|s| s.kind == Kind::Key).unwrap();
        assert_eq!((key.format_name(), key.error), (format, None));
        let bit = |i: usize| signs[i / 8] >> (i % 8) & 1 == 1;
        let expected: Vec<i8> = (0..1024).map(|i| if bit(i) { 1 } else { -1 }).collect();
        assert_eq!(rows(&image, Kind::Key, Some(0)).concat(), expected, "{format}");
        let (record, bytes) = section(&image, Kind::Key, Some(0));
        if format == "b1" {
            assert_eq!(record.scale.get(), 0.5);
            continue;
        }
        let blocks: Vec<Block> = bytes.chunks_exact(64).map(|b| Block(b.try_into().unwrap())).collect();
        for (group, scale) in [0.5, second].into_iter().enumerate() {
            let step = &blocks[group * Format::B1G.step_blocks()..][..Format::B1G.step_blocks()];
            for row in 0..4 {
                assert_eq!(format::scales(Format::B1G, step)[row], half::f16::from_f32(scale).to_le_bytes());
            }
        }
    }
}

/// A model in several files is the one in one file, whichever of them is named.
#[test]
fn several_files() {
    let whole = Gguf::model("bitnet-b1.58");
    let (_, expected) = pack_gguf(&whole, &named());
    let part = |i: usize| PathBuf::from(format!("model-{:05}-of-00003.gguf", i + 1));
    let write = |place: &Place, skip: usize, number: u16, tensors: i32| {
        for (i, chunk) in whole.tensors.chunks(whole.tensors.len().div_ceil(3)).enumerate().filter(|(i, _)| *i != skip)
        {
            let keys = if i == 0 { whole.keys.clone() } else { Vec::new() };
            let mut gguf = Gguf { keys, tensors: chunk.into(), ..whole.clone() };
            gguf.set("split.no", Value::U16(if i == 1 { number } else { i as u16 }));
            gguf.set("split.count", Value::U16(3));
            gguf.set("split.tensors.count", Value::I32(tensors));
            place.put(part(i).to_str().unwrap(), gguf.bytes());
        }
    };
    let place = Place::new();
    let count = whole.tensors.len() as i32;
    write(&place, 3, 1, count);
    assert!(place.pack(&named()) == expected);
    for i in 0..3 {
        std::fs::remove_file(place.image()).unwrap();
        pack(&place.source().join(part(i)), &place.image(), &named(), &mut ()).unwrap_or_else(|e| panic!("{e}"));
        assert!(std::fs::read(place.image()).unwrap() == expected, "{i}");
    }
    for (what, skip, number, tensors, expected) in [
        ("a part is missing", 1, 1, count, "model-00002-of-00003.gguf: GGUF: missing"),
        ("a part is another", 3, 2, count, "split.no = 2: 1 is expected"),
        ("tensors are missing", 3, 1, count + 1, "split.tensors.count"),
    ] {
        let place = Place::new();
        write(&place, skip, number, tensors);
        let error = place.refused(what, &named(), &mut ()).to_string();
        assert!(error.contains(expected), "{what}: {error}");
    }
}

/// Norms of linears' inputs and a multiplier beside the weights, which some converters write.
#[test]
fn what_lies_beside_the_linears() {
    let mut gguf = Gguf::model("qwen3");
    for name in ["attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"] {
        gguf.add(&format!("blk.0.{name}_norm_in.weight"), &[WIDTH], F32, floats(&[2.0; WIDTH as usize]));
    }
    gguf.add("blk.0.attn_k.scale", &[1], F32, floats(&[0.125]));
    let (report, image) = pack_gguf(&gguf, &named());
    assert_eq!(report.config.linear_norm_eps, Some(1e-5));
    assert_eq!(section(&image, Kind::Key, Some(0)).0.scale.get(), 0.0625);
    assert_eq!(as_floats(section(&image, Kind::DownInputNorm, Some(0)).1), [2.0; 256]);
}

/// BitNet embedding models: Qwen3's body without a prefix, a norm in every linear, masters.
#[test]
fn bitnet_embedding() {
    let place = Place::new();
    let mut checkpoint = Checkpoint::new(SMALL, Storage::Online);
    checkpoint.set("architectures", json!(["Qwen3Model"]));
    checkpoint.set("hidden_act", json!("silu"));
    checkpoint.config.remove("quantization_config");
    checkpoint.tensors.retain(|t| !t.name.contains("sub_norm"));
    for layer in 0..2 {
        for (linear, n) in [
            ("self_attn.q_proj", 36),
            ("self_attn.k_proj", 36),
            ("self_attn.v_proj", 36),
            ("self_attn.o_proj", 36),
            ("mlp.gate_proj", 36),
            ("mlp.up_proj", 36),
            ("mlp.down_proj", 70),
        ] {
            let name = format!("model.layers.{layer}.{linear}.norm.weight");
            checkpoint.tensors.push(Tensor::f32(&name, &[n], &vec![1.0; n as usize]));
        }
        for name in ["q_norm", "k_norm"] {
            let name = format!("model.layers.{layer}.self_attn.{name}.weight");
            checkpoint.tensors.push(Tensor::f32(&name, &[18], &[1.0; 18]));
        }
    }
    // Masters that are not ternary yet.
    let name = "model.layers.0.self_attn.q_proj.weight";
    let masters: Vec<f32> = (0..36 * 36).map(|i| (i % 7) as f32 / 4.0 - 0.75).collect();
    *checkpoint.tensor(name) = Tensor::f32(name, &[36, 36], &masters);
    checkpoint.tensors.iter_mut().for_each(|t| t.name = t.name.strip_prefix("model.").unwrap().into());
    checkpoint.write(&place.source());
    let report = pack(&place.source(), &place.image(), &named(), &mut ()).unwrap_or_else(|e| panic!("{e}"));
    assert_eq!((report.config.linear_norm_eps, report.config.qk_norms), (Some(1e-5), true));
    assert!(report.sections.iter().all(|s| !s.kind.is_linear() || s.format_name() == "tl"));
}

/// A tokenizer as a file's keys have it, with tokens for all bytes.
fn byte_level(pre: Option<&str>, more: &[&str], merges: &[&str], controls: &[&str]) -> Gguf {
    // GPT-2's letters for bytes.
    let plain = |b: u32| matches!(b, 33..=126 | 161..=172 | 174..=255);
    let mut next = 256;
    let letters: Vec<String> = (0..256u32)
        .map(|b| {
            let c = if plain(b) { b } else { next };
            next += u32::from(!plain(b));
            char::from_u32(c).unwrap().to_string()
        })
        .collect();
    let mut tokens = letters;
    tokens.extend(more.iter().map(|t| t.to_string()));
    let mut types = vec![1; tokens.len()];
    tokens.extend(controls.iter().map(|t| t.to_string()));
    types.extend(controls.iter().map(|_| 3));
    let mut gguf = Gguf::model("llama");
    gguf.set("llama.vocab_size", Value::U32(tokens.len() as u32));
    let table = vec![0.01; tokens.len() * WIDTH as usize];
    let embedding = gguf.tensor("token_embd.weight");
    (embedding.dimensions, embedding.data) = (vec![WIDTH, tokens.len() as u64], floats(&table));
    gguf.set("tokenizer.ggml.model", text("gpt2"));
    if let Some(pre) = pre {
        gguf.set("tokenizer.ggml.pre", text(pre));
    }
    gguf.set("tokenizer.ggml.tokens", Value::Texts(tokens));
    gguf.set("tokenizer.ggml.token_type", Value::I32s(types));
    gguf.set("tokenizer.ggml.merges", Value::Texts(merges.iter().map(|m| m.to_string()).collect()));
    gguf
}

/// The bytes of each token of a text, by the tokenizer that the image holds.
fn encoded(image: &[u8], text: &str) -> Vec<Vec<u8>> {
    let (record, bytes) = section(image, Kind::Tokenizer, None);
    let definition = Definition::from_slice(&bytes[..record.cols.get() as usize]).unwrap();
    let tokens: HashMap<u32, Vec<u8>> = definition.model.vocab().iter().map(|t| (t.id, t.bytes.to_vec())).collect();
    let ids = Kitoken::from_definition(definition).unwrap().encode(text, false).unwrap();
    ids.iter().map(|id| tokens[id].clone()).collect()
}

/// The pieces that a text is cut into.
fn pieces(image: &[u8], text: &str) -> Vec<String> {
    encoded(image, text).iter().map(|bytes| String::from_utf8_lossy(bytes).into_owned()).collect()
}

const DIGITS: [&str; 3] = ["12", "123", "1234"];
const DIGIT_MERGES: [&str; 3] = ["1 2", "12 3", "123 4"];

/// How digits are split before they are merged, by the name of the splitting.
#[test]
fn words_are_split_as_the_key_says() {
    for (pre, expected) in [
        ("gpt-2", vec!["1234", "1"]),
        ("smollm", vec!["1", "2", "3", "4", "1"]),
        ("qwen2", vec!["1", "2", "3", "4", "1"]),
        ("llama-bpe", vec!["123", "4", "1"]),
        ("falcon3", vec!["123", "4", "1"]),
    ] {
        let (report, image) = pack_gguf(&byte_level(Some(pre), &DIGITS, &DIGIT_MERGES, &["<|end|>"]), &named());
        assert_eq!(pieces(&image, "12341"), expected, "{pre}: {:?}", report.notes);
        // Whatever the splitting, no byte is lost.
        let odd = "a  b   c\t\n\r\n１２３ I'LL we'll naïve 👩‍👩‍👧 العربية \u{a0}x";
        assert_eq!(encoded(&image, odd).concat(), odd.as_bytes(), "{pre}");
        let checked = Image::check(&image, image.len() as u64).unwrap();
        assert_eq!(checked.header().text.stop.ids(), [259], "{pre}: a turn ends at a control token");
    }
}

/// without the key the vocabulary tells, and it is said; where it does not tell, it is an error.
#[test]
fn a_missing_split_is_recovered_or_refused() {
    let of = |controls: &[&str]| byte_level(None, &DIGITS, &DIGIT_MERGES, controls);
    let llama3 = ["<|begin_of_text|>", "<|start_header_id|>", "<|eot_id|>"];
    for (controls, expected, name) in [
        (&llama3[..], vec!["123", "4"], "Llama 3"),
        (&["<|im_start|>", "<|im_end|>", "<|fim_middle|>"][..], vec!["1", "2", "3", "4"], "Qwen 2"),
    ] {
        let (report, image) = pack_gguf(&of(controls), &named());
        assert_eq!(pieces(&image, "1234"), expected);
        let said = report.notes.iter().any(|n| n.contains("tokenizer.ggml.pre is missing") && n.contains(name));
        assert!(said, "{:?}", report.notes);
    }
    let place = Place::new();
    place.put("model.gguf", of(&["<|end|>"]).bytes());
    let error = place.refused("no signature", &named(), &mut ()).to_string();
    common::assert_says("no signature", &error, &["tokenizer.ggml.pre = (missing)", "--tokenizer FILE"]);
}

/// The official files of BitNet b1.58: no splitting or a wrong one, and a template of another model.
#[test]
fn bitnet_files_are_put_right() {
    for (architecture, pre) in [("bitnet-b1.58", None), ("bitnet-25", Some("default")), ("bitnet-b1.58", Some("gpt-2"))]
    {
        let tokens = byte_level(pre, &DIGITS, &DIGIT_MERGES, &["<|begin_of_text|>", "<|eot_id|>"]);
        let mut gguf = Gguf::model(architecture);
        for (key, value) in tokens.keys.iter().filter(|(key, _)| key.starts_with("tokenizer")) {
            gguf.set(key, value.clone());
        }
        gguf.set(&format!("{architecture}.vocab_size"), Value::U32(261));
        *gguf.tensor("token_embd.weight") = tokens.clone().tensor("token_embd.weight").clone();
        gguf.set("tokenizer.ggml.bos_token_id", Value::U32(259));
        gguf.set("tokenizer.ggml.eos_token_id", Value::U32(0));
        gguf.set("tokenizer.chat_template", text("{{ 'Human: ' + message + 'BITNETAssistant: ' }}"));
        let (report, image) = pack_gguf(&gguf, &named());
        assert_eq!(pieces(&image, "1234"), ["123", "4"], "{architecture}");
        let checked = Image::check(&image, image.len() as u64).unwrap();
        let text = checked.header().text;
        assert!(text.chat_template.contains("capitalize") && text.chat_template.contains("<|eot_id|>"));
        assert_eq!((text.bos, text.stop.ids()), (Some(259), &[0, 260][..]));
        assert_eq!(
            report.notes.iter().filter(|n| n.contains("template") || n.contains("tokenizer.ggml.pre")).count(),
            2
        );
    }
}

/// A vocabulary with scores gives the tokens of the same vocabulary with merges, which another library wrote.
#[test]
fn scores_equal_merges() {
    let file: Json = serde_json::from_slice(&std::fs::read(stories().join("tokenizer.json")).unwrap()).unwrap();
    let vocab = file["model"]["vocab"].as_object().unwrap();
    let mut tokens = vec![String::new(); vocab.len()];
    vocab.iter().for_each(|(token, id)| tokens[id.as_u64().unwrap() as usize] = token.clone());
    let types = (0..tokens.len()).map(|id| [2, 3, 3].get(id).copied().unwrap_or(if id < 259 { 6 } else { 1 }));
    let mut gguf = Gguf::model("llama");
    gguf.set("llama.vocab_size", Value::U32(512));
    let embedding = gguf.tensor("token_embd.weight");
    (embedding.dimensions, embedding.data) = (vec![WIDTH, 512], floats(&vec![0.01; 512 * WIDTH as usize]));
    gguf.set("tokenizer.ggml.model", text("llama"));
    gguf.set("tokenizer.ggml.token_type", Value::I32s(types.collect()));
    gguf.set("tokenizer.ggml.scores", Value::F32s((0..512).map(|id| 259.0 - id as f32).collect()));
    gguf.set("tokenizer.ggml.tokens", Value::Texts(tokens));
    gguf.set("tokenizer.ggml.unknown_token_id", Value::U32(0));
    gguf.set("tokenizer.ggml.bos_token_id", Value::U32(1));
    gguf.set("tokenizer.ggml.eos_token_id", Value::U32(2));
    let (_, image) = pack_gguf(&gguf, &named());
    let text = Image::check(&image, image.len() as u64).unwrap().header().text;
    assert_eq!((text.bos, text.stop.ids()), (Some(1), &[2][..]));
    let place = Place::new();
    pack(&stories(), &place.image(), &named(), &mut ()).unwrap();
    let other = std::fs::read(place.image()).unwrap();
    for text in
        ["Once upon a time, there was a little girl named Lily.", " two  spaces", "naïve\tcafé\n\n", "x", "1,000"]
    {
        assert_eq!(pieces(&image, text), pieces(&other, text), "{text:?}");
    }
}

/// Angles are divided by the factors that files of Llama 3.1 bring, and by a linear factor.
#[test]
fn factors_of_angles() {
    let mut gguf = Gguf::model("llama");
    gguf.add("rope_freqs.weight", &[2], F32, floats(&[1.0, 8.0]));
    let found = as_floats(section(&pack_gguf(&gguf, &named()).1, Kind::RopeFrequencies, None).1);
    assert_eq!(found[..2], [1.0, 0.01 / 8.0]);
    let mut gguf = Gguf::model("llama");
    gguf.set("llama.rope.scaling.type", text("linear"));
    gguf.set("llama.rope.scaling.factor", Value::F32(4.0));
    let found = as_floats(section(&pack_gguf(&gguf, &named()).1, Kind::RopeFrequencies, None).1);
    assert_eq!(found[..2], [0.25, 0.0025]);
}
