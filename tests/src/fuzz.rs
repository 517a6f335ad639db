//! What reads files and numbers of others, as functions of bytes: none of them may panic, overflow, hang or take much memory.
//!
//! `cargo xtask fuzz TARGET SECONDS` searches for bytes that make one fail. The corpus that it starts from is in
//! `tests/fuzz/corpus`, with what it once found, and is replayed by an ordinary test.
use bitnet_kernel::Block;
use bitnet_pack::calibrate::{Adaptive, Linear, Plan as Widths, Reference, Rule};
use bitnet_pack::checkpoint::{Checkpoint, Dtype};
use bitnet_pack::{Options, pack, tokenizer};
use bitnet_runtime::image::{HEADER_BYTES_MAX, PREFIX_BYTES, encode_prefix};
use bitnet_runtime::parallel::Serial;
use bitnet_runtime::source::Mapped;
use bitnet_runtime::tokenizer::Tokenizer;
use bitnet_runtime::{Config, Image, Limits, Model, Plan, State, backend};
use serde_json::json;
use std::path::{Path, PathBuf};
use zerocopy::IntoBytes;

/// One reader.
pub type Target = fn(&[u8]);

/// All readers by name.
pub const TARGETS: [(&str, Target); 8] = [
    ("gguf", gguf),
    ("safetensors", safetensors),
    ("llama2c", llama2c),
    ("tokenizer", tokenizer_file),
    ("image", image),
    ("plan", plan),
    ("widths", widths),
    ("text", text),
];

/// The reader of this name.
pub fn target(name: &str) -> Option<Target> {
    TARGETS.iter().find(|(n, _)| *n == name).map(|(_, target)| *target)
}

/// Where the corpus lies: a directory for each target.
pub fn corpus() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus")
}

/// The largest model that is packed or run here; a larger one is right too, but takes long.
const BYTES_MAX: u64 = 4 << 20;

/// Packs what `write` puts into a directory, under the name it returns; nothing may be left if that fails.
fn packed(write: impl FnOnce(&Path) -> PathBuf) {
    let place = tempfile::tempdir().expect("a temporary directory");
    let out = place.path().join("out");
    std::fs::create_dir(&out).expect("a directory");
    let source = write(place.path());
    let options = Options { name: Some("fuzz".into()), ..Options::default() };
    let Ok(checkpoint) = Checkpoint::open(&source, Dtype::I2_S) else { return };
    let _ = checkpoint.table();
    match pack(&source, &out.join("image"), &options, &mut ()) {
        Ok(_) => drop(bitnet_pack::inspect(&out.join("image")).expect("the header was just written").to_string()),
        Err(error) => {
            assert!(!error.to_string().is_empty());
            assert_eq!(out.read_dir().expect("a directory").count(), 0, "{error}: nothing may be left");
        }
    }
}

/// A GGUF file.
fn gguf(bytes: &[u8]) {
    packed(|place| put(place, "model.gguf", bytes));
}

/// A safetensors file, behind a configuration that ends with a zero; without one it is that of a fixed small model.
fn safetensors(bytes: &[u8]) {
    let (config, tensors) = match bytes.iter().position(|&b| b == 0) {
        Some(end) if bytes[0] == b'{' => (bytes[..end].to_vec(), &bytes[end + 1..]),
        _ => (small_config().to_string().into_bytes(), bytes),
    };
    packed(|place| {
        put(place, "config.json", &config);
        put(place, "model.safetensors", tensors)
    });
}

/// The configuration of a model of width 8.
pub fn small_config() -> serde_json::Value {
    json!({
        "architectures": ["BitNetForCausalLM"], "vocab_size": 6, "hidden_size": 8, "intermediate_size": 8,
        "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "hidden_act": "relu2",
        "rms_norm_eps": 1e-5, "max_position_embeddings": 8, "tie_word_embeddings": true, "rope_theta": 10000.0,
        "quantization_config": {"quant_method": "bitnet", "linear_class": "autobitlinear", "quantization_mode": "offline"},
    })
}

/// A file of llama2.c.
fn llama2c(bytes: &[u8]) {
    packed(|place| put(place, "model.bin", bytes));
}

/// Seven numbers and the matrices of the smallest model of llama2.c, all of it zeros, with this many tokens.
pub fn llama2c_model(vocab: i32) -> Vec<u8> {
    let (hidden, ffn, context) = (4, 4, 4);
    let numbers = [hidden, ffn, 1, 1, 1, vocab, context];
    let floats = vocab * hidden + 2 * hidden + 4 * hidden * hidden + 3 * ffn * hidden + hidden + context * hidden;
    let mut bytes: Vec<u8> = numbers.iter().flat_map(|n: &i32| n.to_le_bytes()).collect();
    bytes.resize(28 + 4 * floats as usize, 0);
    bytes
}

/// A tokenizer of any kind, for a model of 300 tokens; what can be read is loaded as the runtime loads it, and used.
fn tokenizer_file(bytes: &[u8]) {
    let place = tempfile::tempdir().expect("a temporary directory");
    let model = put(place.path(), "model.bin", &llama2c_model(300));
    let file = put(place.path(), "tokenizer", bytes);
    let checkpoint = Checkpoint::open(&model, Dtype::I2_S).expect("a sound file of llama2.c");
    let mut table = checkpoint.table().expect("a sound file of llama2.c");
    let Ok(text) = tokenizer::read(&checkpoint, &mut table, Some(&file)) else { return };
    let serialized = text.tokenizer.expect("it was given");
    let about = bitnet_runtime::image::Text { bos: text.bos, stop: text.stop, chat_template: "" };
    let Ok(tokenizer) = Tokenizer::new(&serialized, &about, 300) else { return };
    for string in ["", "Once upon a time, 3333+777", "\u{1f600}\u{301} \r\n\t<s></s>"] {
        let Ok(tokens) = tokenizer.encode(string) else { continue };
        tokens.iter().for_each(|&token| drop(tokenizer.bytes(token).to_vec()));
    }
}

/// An image, from the length of its file on (eight bytes), then its header; sections hold zeros. A small one is also run.
fn image(bytes: &[u8]) {
    let Some((length, header)) = bytes.split_first_chunk() else { return };
    let length = u64::from_le_bytes(*length);
    if header.len() > HEADER_BYTES_MAX as usize {
        return;
    }
    let start = [&encode_prefix(header, length)[..], header].concat();
    assert_eq!(Image::header_bytes(&start).ok(), Some(PREFIX_BYTES + header.len()));
    let Ok(checked) = Image::check(&start, length) else { return };
    let (config, limits) = (checked.header().config, checked.header().plan.limits);
    let plan = Plan::new(&config, &limits);
    if length > BYTES_MAX || plan.bytes() > 4 * BYTES_MAX || config.layers > 64 {
        return;
    }
    let mut blocks = vec![Block::ZERO; length as usize / Block::BYTES];
    blocks.as_mut_bytes()[..start.len()].copy_from_slice(&start);
    let (mut scratch, mut state) = (vec![Block::ZERO; plan.scratch], vec![Block::ZERO; plan.state]);
    let mut source = Mapped::new(&blocks);
    let mut state = State::new(&config, &limits, &mut state).expect("planned memory");
    let model = Model::new(&checked, limits, backend::best(), &Serial, &mut source, &mut scratch);
    let mut model = model.unwrap_or_else(|e| panic!("{e}: the memory was planned"));
    // Whatever the weights, a pass ends with numbers or an error.
    let _ = model.prefill(&mut state, &[0, config.vocab - 1]);
}

/// A configuration and limits, in the encoding of headers: whatever is within its limits has a plan that does not overflow.
fn plan(bytes: &[u8]) {
    let Ok(((config, limits), _)) = postcard::take_from_bytes::<(Config, Limits)>(bytes) else { return };
    if config.check().is_err() || limits.check(&config).is_err() {
        return;
    }
    let plan = Plan::new(&config, &limits);
    let sum = plan.state as u128 + plan.scratch as u128 + plan.sampler as u128;
    assert_eq!(u128::from(plan.bytes()), 64 * sum);
}

/// A file of `--plan`, for a model of one layer: what can be read says the same when it is written and read again, and the model is
/// packed by it.
fn widths(bytes: &[u8]) {
    let place = tempfile::tempdir().expect("a temporary directory");
    let mut model = llama2c_model(3);
    // Seven values, so that no linear is ternary as it is, of which no plan may speak.
    let floats = model[28..].chunks_exact_mut(4).enumerate();
    floats.for_each(|(i, float)| float.copy_from_slice(&((i % 7) as f32 - 2.5).to_le_bytes()));
    let (model, file) = (put(place.path(), "model.bin", &model), put(place.path(), "plan.toml", bytes));
    let checkpoint = Checkpoint::open(&model, Dtype::I2_S).expect("a sound file of llama2.c");
    let reference = Reference::new(&checkpoint, &()).expect("a sound file of llama2.c");
    let linears: Vec<Linear> = reference.linears().chain([Linear::HEAD]).collect();
    assert!(linears.iter().all(|&linear| reference.is_dense(linear)));
    let read = Widths::read(&file, &linears);
    let image = place.path().join("image");
    let rule = Rule::Plan(file.clone());
    let adaptive = Some(Adaptive { rule, text: None, head: true });
    let options = Options { name: Some("fuzz".into()), adaptive, ..Options::default() };
    let packed = pack(&model, &image, &options, &mut ());
    match read {
        Ok(widths) => {
            let text = widths.write(linears.iter().map(|&linear| (linear, "a remark".into())));
            std::fs::write(&file, text).expect("a file");
            assert_eq!(Widths::read(&file, &linears).expect("it was just written"), widths);
            let adapted = packed.expect("a sound plan for a sound model").adapted.expect("by a plan");
            assert!(adapted.linears.iter().all(|of| widths.format(of.linear) == Some(of.format)));
        }
        Err(error) => {
            assert_eq!(packed.expect_err("no plan").to_string(), error.to_string());
            assert!(!image.exists(), "{error}: nothing may be left");
        }
    }
}

/// A tokenizer as an image holds it, which only its length limits.
fn text(bytes: &[u8]) {
    let about = bitnet_runtime::image::Text { bos: None, stop: Default::default(), chat_template: "" };
    let Ok(tokenizer) = Tokenizer::new(bytes, &about, 300) else { return };
    let _ = tokenizer.encode("Once upon a time");
}

fn put(place: &Path, name: &str, bytes: &[u8]) -> PathBuf {
    let path = place.join(name);
    std::fs::write(&path, bytes).expect("a file");
    path
}
