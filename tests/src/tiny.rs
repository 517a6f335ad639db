//! TINY: a small checkpoint, written on the spot, whose every value follows from a sentence.
//!
//! Hidden size 256, two layers, four heads of 64 over two key-value heads, feed-forward 512, vocabulary 320, RoPE base
//! 10,000. Weights come from one generator, `s ← (1103515245 s + 12345) mod 2³¹` starting at 1, in the order in which a pass
//! uses the matrices (q, k, v, o, gate, up, down of each layer; row by row): `(s >> 16) mod 3 − 1`, with a scale of 0.02. Then
//! the embedding and, where it is not tied, the head: `((s >> 16) mod 2001 − 1000) / 20000`. Norms are 1.
//!
//! ```
//! # let dir = tempfile::tempdir().unwrap();
//! use bitnet_tests::{reference::Reference, tiny::Tiny};
//! Tiny::n().hidden_act("silu").tokenizer().write(dir.path());
//! let logits = Reference::load(dir.path()).logits(&[97, 98, 99]);
//! ```
use half::{bf16, f16};
use safetensors::tensor::TensorView;
use serde_json::{Map, Value, json};
use std::collections::{BTreeMap, HashMap};
use std::path::Path;

pub use safetensors::Dtype;

/// Hidden size.
pub const HIDDEN: usize = 256;
/// Heads, of [`HEAD_DIM`] each.
pub const HEADS: usize = 4;
/// Key-value heads.
pub const KV_HEADS: usize = 2;
/// The size of a head.
pub const HEAD_DIM: usize = 64;
/// Feed-forward size.
pub const FFN: usize = 512;
/// Ids: 256 bytes, [`MERGES`], and special ones.
pub const VOCABULARY: usize = 320;
/// What a matrix's ternary weights are multiplied by.
pub const SCALE: f32 = 0.02;
/// The begin token.
pub const BOS: u32 = 264;
/// The end of a document.
pub const EOS: u32 = 265;
/// The end of a turn.
pub const EOT: u32 = 266;
/// The merges of the tokenizer, ids 256 and on. `Ġ` is how a byte-level vocabulary writes a space.
pub const MERGES: [(&str, &str); 8] =
    [("h", "e"), ("Ġ", "t"), ("Ġt", "he"), ("i", "n"), ("Ġ", "a"), ("r", "e"), ("o", "n"), ("e", "r")];

/// The chat template of BitNet b1.58 2B4T.
pub const CHAT_TEMPLATE: &str = "{% for m in messages %}{{ m.role|capitalize + ': ' + m.content|trim + '<|eot_id|>' }}\
    {% endfor %}{% if add_generation_prompt %}{{ 'Assistant: ' }}{% endif %}";

/// A tensor as it goes into the file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tensor {
    /// The type of its values.
    pub dtype: Dtype,
    /// Its shape.
    pub shape: Vec<usize>,
    /// Its values, little-endian.
    pub bytes: Vec<u8>,
}

/// Whether a row and column of a matrix is one of those that are meant.
pub type Place = fn(usize, usize) -> bool;

/// How the ternary matrices are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Weights {
    /// Four to a byte, with a scale to multiply or to divide by.
    Packed { divide: bool },
    /// As floats, to be made ternary by the reader.
    Masters,
    /// As floats of one magnitude, of which only some are zero because [`Tiny::zeros`] says so.
    Signs,
}

/// A checkpoint to be written: [`Tiny::n`] or [`Tiny::l`], then what is to be different.
#[derive(Clone, Debug)]
pub struct Tiny {
    config: Map<String, Value>,
    weights: Weights,
    dtype: Dtype,
    layers: usize,
    sub_norms: [&'static str; 2],
    varied_norms: bool,
    shards: usize,
    tokenizer: bool,
    zeros: Vec<(&'static str, Place)>,
}

impl Tiny {
    /// TINY-N, like BitNet b1.58 2B4T: sub-norms, squared ReLU, tied, packed with a scale to multiply by.
    pub fn n() -> Self {
        let own = json!({
            "architectures": ["BitNetForCausalLM"],
            "model_type": "bitnet",
            "hidden_act": "relu2",
            "tie_word_embeddings": true,
            "quantization_config": {
                "quant_method": "bitnet", "linear_class": "autobitlinear", "quantization_mode": "offline",
            },
        });
        Self::new(&own, Weights::Packed { divide: false })
    }

    /// TINY-L, like Llama3-8B-1.58: no sub-norms, SiLU, untied, packed with a scale to divide by.
    pub fn l() -> Self {
        let own = json!({
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_act": "silu",
            "tie_word_embeddings": false,
            "quantization_config": { "quant_method": "bitnet", "modules_to_not_convert": null },
        });
        Self::new(&own, Weights::Packed { divide: true })
    }

    /// TINY-Q, like Qwen3 with ternary weights: a norm of each query and key head, SiLU, tied, heads of a width of their own.
    pub fn q() -> Self {
        let own = json!({
            "architectures": ["Qwen3ForCausalLM"],
            "model_type": "qwen3",
            "hidden_act": "silu",
            "head_dim": HEAD_DIM,
            "tie_word_embeddings": true,
            "quantization_config": { "quant_method": "bitnet" },
        });
        Self::new(&own, Weights::Packed { divide: true }).varied_norms()
    }

    fn new(own: &Value, weights: Weights) -> Self {
        let mut config = json!({
            "vocab_size": VOCABULARY,
            "hidden_size": HIDDEN,
            "intermediate_size": FFN,
            "num_attention_heads": HEADS,
            "num_key_value_heads": KV_HEADS,
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0,
            "max_position_embeddings": 256,
            "bos_token_id": BOS,
            "eos_token_id": EOS,
        });
        let config = config.as_object_mut().expect("an object");
        config.extend(own.as_object().expect("an object").clone());
        Self {
            config: core::mem::take(config),
            weights,
            dtype: Dtype::F32,
            layers: 2,
            sub_norms: ["self_attn.attn_sub_norm", "mlp.ffn_sub_norm"],
            varied_norms: false,
            shards: 1,
            tokenizer: false,
            zeros: Vec::new(),
        }
    }

    /// Sets one entry of `config.json`, whether or not the tensors agree with it.
    pub fn config(mut self, name: &str, value: impl Into<Value>) -> Self {
        self.config.insert(name.to_owned(), value.into());
        self
    }

    /// Leaves one entry out of `config.json`.
    pub fn without(mut self, name: &str) -> Self {
        self.config.remove(name);
        self
    }

    /// The name of the class in `architectures`.
    pub fn class_name(self, class: &str) -> Self {
        self.config("architectures", json!([class]))
    }

    /// The activation in the feed-forward.
    pub fn hidden_act(self, name: &str) -> Self {
        self.config("hidden_act", name)
    }

    /// The type of all floats in the file: F32, if nothing is said, F16 or BF16.
    ///
    /// # Panics
    /// On other types.
    pub fn dtype(mut self, dtype: Dtype) -> Self {
        assert!(matches!(dtype, Dtype::F32 | Dtype::F16 | Dtype::BF16), "{dtype:?}");
        self.dtype = dtype;
        self
    }

    /// Matrices as floats, for the reader to make ternary (`autobitlinear`, `online`). Their scale is then their mean
    /// magnitude and no longer 0.02.
    pub fn masters(mut self) -> Self {
        self.weights = Weights::Masters;
        self.quantization("linear_class", "autobitlinear").quantization("quantization_mode", "online")
    }

    /// Matrices as floats of one magnitude, 0.02, none of which is zero, and nothing that says so: the reader has to see it.
    pub fn signs(mut self) -> Self {
        self.weights = Weights::Signs;
        self.without("quantization_config")
    }

    /// A norm inside every linear.
    pub fn linear_norms(self) -> Self {
        self.quantization("use_rms_norm", true).quantization("rms_norm_eps", 1e-5)
    }

    /// Norms that are not 1 but, from the generator, between 0.5 and 1.5: mistaking one for another shows.
    pub const fn varied_norms(mut self) -> Self {
        self.varied_norms = true;
        self
    }

    /// The embedding is the head too, or is not.
    pub fn tied(self, tied: bool) -> Self {
        self.config("tie_word_embeddings", tied)
    }

    /// Another number of layers than two.
    pub const fn layers(mut self, layers: usize) -> Self {
        self.layers = layers;
        self
    }

    /// The names of the sub-norms in the first checkpoints that were published (`BitnetForCausalLM`).
    pub fn first_names(mut self) -> Self {
        self.sub_norms = ["self_attn.inner_attn_ln", "mlp.ffn_layernorm"];
        self.class_name("BitnetForCausalLM")
    }

    /// So many files with an index, if it is more than one.
    ///
    /// # Panics
    /// If it is zero.
    pub const fn shards(mut self, shards: usize) -> Self {
        assert!(shards > 0);
        self.shards = shards;
        self
    }

    /// A byte-level tokenizer too, in which every byte is its own id, with the files around it.
    pub const fn tokenizer(mut self) -> Self {
        self.tokenizer = true;
        self
    }

    /// Zeros in a matrix of every layer, where `at(row, column)` says so: a model that was pruned.
    pub fn zeros(mut self, matrix: &'static str, at: Place) -> Self {
        self.zeros.push((matrix, at));
        self
    }

    /// Sets one entry of the configuration's `quantization_config`.
    pub fn quantization(mut self, name: &str, value: impl Into<Value>) -> Self {
        let quantization = self.config.entry("quantization_config").or_insert_with(|| json!({}));
        quantization[name] = value.into();
        self
    }

    /// The tensors by name.
    pub fn tensors(&self) -> BTreeMap<String, Tensor> {
        let mut random = Generator(1);
        let mut tensors = BTreeMap::new();
        for layer in 0..self.layers {
            for (name, rows, cols) in MATRICES {
                let mut codes: Vec<u8> = (0..rows * cols).map(|_| random.code()).collect();
                if self.weights == Weights::Signs {
                    codes.iter_mut().filter(|code| **code == 1).for_each(|code| *code = 2);
                }
                for (_, at) in self.zeros.iter().filter(|(matrix, _)| *matrix == name) {
                    codes
                        .iter_mut()
                        .enumerate()
                        .filter(|(i, _)| at(i / cols, i % cols))
                        .for_each(|(_, code)| *code = 1);
                }
                self.matrix(&mut tensors, &format!("model.layers.{layer}.{name}"), &codes, cols);
            }
        }
        let mut table = || (0..VOCABULARY * HIDDEN).map(|_| random.table()).collect::<Vec<f32>>();
        let shape = [VOCABULARY, HIDDEN];
        tensors.insert("model.embed_tokens.weight".to_owned(), self.floats(&table(), &shape));
        if self.config.get("tie_word_embeddings") != Some(&Value::Bool(true)) {
            tensors.insert("lm_head.weight".to_owned(), self.floats(&table(), &shape));
        }
        for (name, n) in self.norms() {
            let gains: Vec<f32> = (0..n).map(|_| if self.varied_norms { random.gain() } else { 1.0 }).collect();
            tensors.insert(format!("{name}.weight"), self.floats(&gains, &[n]));
        }
        tensors
    }

    /// One matrix, its codes being its weights plus one, and what belongs to it.
    fn matrix(&self, tensors: &mut BTreeMap<String, Tensor>, name: &str, codes: &[u8], cols: usize) {
        let rows = codes.len() / cols;
        let weight = match self.weights {
            Weights::Masters | Weights::Signs => {
                let masters: Vec<f32> = codes.iter().map(|&code| (f32::from(code) - 1.0) * SCALE).collect();
                self.floats(&masters, &[rows, cols])
            }
            Weights::Packed { divide } => {
                let scale = if divide { 1.0 / SCALE } else { SCALE };
                tensors.insert(format!("{name}.weight_scale"), self.floats(&[scale], &[1]));
                Tensor { dtype: Dtype::U8, shape: vec![rows / 4, cols], bytes: pack(codes) }
            }
        };
        tensors.insert(format!("{name}.weight"), weight);
    }

    /// The norms and their lengths, in the order in which a pass uses them.
    fn norms(&self) -> Vec<(String, usize)> {
        let inside = self.config.get("quantization_config").is_some_and(|q| q["use_rms_norm"] == true);
        let sub_norms = self.config["model_type"] == "bitnet";
        let mut norms = Vec::new();
        for layer in 0..self.layers {
            let mut add = |name: &str, n| norms.push((format!("model.layers.{layer}.{name}"), n));
            add("input_layernorm", HIDDEN);
            if self.config["model_type"] == "qwen3" {
                add("self_attn.q_norm", HEAD_DIM);
                add("self_attn.k_norm", HEAD_DIM);
            }
            if sub_norms {
                add(self.sub_norms[0], HEADS * HEAD_DIM);
            }
            add("post_attention_layernorm", HIDDEN);
            if sub_norms {
                add(self.sub_norms[1], FFN);
            }
            if inside {
                MATRICES.iter().for_each(|(name, _, cols)| add(&format!("{name}.rms_norm"), *cols));
            }
        }
        norms.push(("model.norm".to_owned(), HIDDEN));
        norms
    }

    fn floats(&self, values: &[f32], shape: &[usize]) -> Tensor {
        let bytes = match self.dtype {
            Dtype::F16 => values.iter().flat_map(|&v| f16::from_f32(v).to_le_bytes()).collect(),
            Dtype::BF16 => values.iter().flat_map(|&v| bf16::from_f32(v).to_le_bytes()).collect(),
            _ => values.iter().flat_map(|v| v.to_le_bytes()).collect(),
        };
        Tensor { dtype: self.dtype, shape: shape.to_vec(), bytes }
    }

    /// Writes the checkpoint into a folder that exists.
    ///
    /// # Panics
    /// If a file cannot be written.
    pub fn write(&self, dir: impl AsRef<Path>) {
        let dir = dir.as_ref();
        let save = |name: &str, value: &Value| {
            let text = serde_json::to_vec_pretty(value).expect("JSON");
            std::fs::write(dir.join(name), text).unwrap_or_else(|e| panic!("{name}: {e}"));
        };
        let mut config = self.config.clone();
        config.entry("num_hidden_layers").or_insert(self.layers.into());
        config.entry("torch_dtype").or_insert(dtype_name(self.dtype).into());
        save("config.json", &config.into());

        let tensors = self.tensors();
        if self.shards == 1 {
            write_safetensors(&dir.join("model.safetensors"), &tensors);
        } else {
            save("model.safetensors.index.json", &self.write_shards(dir, tensors));
        }
        if self.tokenizer {
            save("tokenizer.json", &tokenizer_json());
            let config = json!({
                "bos_token": special(BOS), "eos_token": special(EOS), "chat_template": CHAT_TEMPLATE,
                "tokenizer_class": "PreTrainedTokenizerFast",
            });
            save("tokenizer_config.json", &config);
            save("generation_config.json", &json!({ "bos_token_id": BOS, "eos_token_id": [EOS, EOT] }));
        }
    }

    /// Writes the shards, each with every so many-th tensor, and returns their index.
    fn write_shards(&self, dir: &Path, tensors: BTreeMap<String, Tensor>) -> Value {
        let total: usize = tensors.values().map(|tensor| tensor.bytes.len()).sum();
        let mut shards = vec![BTreeMap::new(); self.shards];
        for (i, (name, tensor)) in tensors.into_iter().enumerate() {
            shards[i % self.shards].insert(name, tensor);
        }
        let mut map = Map::new();
        for (i, shard) in shards.iter().enumerate() {
            let file = format!("model-{:05}-of-{:05}.safetensors", i + 1, self.shards);
            write_safetensors(&dir.join(&file), shard);
            map.extend(shard.keys().map(|name| (name.clone(), file.clone().into())));
        }
        json!({ "metadata": { "total_size": total }, "weight_map": map })
    }
}

/// The matrices of a layer: name, rows, columns.
const MATRICES: [(&str, usize, usize); 7] = [
    ("self_attn.q_proj", HEADS * HEAD_DIM, HIDDEN),
    ("self_attn.k_proj", KV_HEADS * HEAD_DIM, HIDDEN),
    ("self_attn.v_proj", KV_HEADS * HEAD_DIM, HIDDEN),
    ("self_attn.o_proj", HIDDEN, HEADS * HEAD_DIM),
    ("mlp.gate_proj", FFN, HIDDEN),
    ("mlp.up_proj", FFN, HIDDEN),
    ("mlp.down_proj", HIDDEN, FFN),
];

/// Where all values come from.
#[derive(Clone, Debug)]
pub struct Generator(pub u32);

impl Generator {
    fn next(&mut self) -> u32 {
        self.0 = self.0.wrapping_mul(1_103_515_245).wrapping_add(12_345) & 0x7fff_ffff;
        self.0 >> 16
    }

    /// A ternary weight plus one.
    pub fn code(&mut self) -> u8 {
        (self.next() % 3) as u8
    }

    /// A value of the embedding or the head.
    pub fn table(&mut self) -> f32 {
        ((self.next() % 2001) as f32 - 1000.0) / 20000.0
    }

    fn gain(&mut self) -> f32 {
        0.5 + (self.next() % 1001) as f32 / 1000.0
    }
}

/// Four codes to a byte: the first quarter of them in the lowest bits.
fn pack(codes: &[u8]) -> Vec<u8> {
    let quarter = codes.len() / 4;
    let byte = |i| (0..4).fold(0, |byte, plane| byte | codes[plane * quarter + i] << (2 * plane));
    (0..quarter).map(byte).collect()
}

/// Writes a safetensors file.
///
/// # Panics
/// If it cannot be written.
pub fn write_safetensors(path: &Path, tensors: &BTreeMap<String, Tensor>) {
    let views = tensors.iter().map(|(name, tensor)| {
        let view = TensorView::new(tensor.dtype, tensor.shape.clone(), &tensor.bytes);
        (name.as_str(), view.unwrap_or_else(|e| panic!("{name}: {e}")))
    });
    let metadata = HashMap::from([("format".to_owned(), "pt".to_owned())]);
    safetensors::serialize_to_file(views, Some(metadata), path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
}

const fn dtype_name(dtype: Dtype) -> &'static str {
    match dtype {
        Dtype::F16 => "float16",
        Dtype::BF16 => "bfloat16",
        _ => "float32",
    }
}

/// How a special token is written.
fn special(id: u32) -> String {
    match id {
        BOS => "<|begin_of_text|>".to_owned(),
        EOS => "<|end_of_text|>".to_owned(),
        EOT => "<|eot_id|>".to_owned(),
        id => format!("<|reserved_special_token_{}|>", id - EOT - 1),
    }
}

/// The character that stands for a byte in a byte-level vocabulary: itself if it is visible, else one from 256 on.
fn byte_char(byte: u8) -> char {
    let visible = |b: u8| matches!(b, b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff);
    if visible(byte) {
        return byte.into();
    }
    let before = (0..byte).filter(|&b| !visible(b)).count() as u32;
    char::from_u32(256 + before).expect("a character")
}

fn tokenizer_json() -> Value {
    let mut vocabulary = Map::new();
    for byte in 0..=u8::MAX {
        vocabulary.insert(byte_char(byte).to_string(), byte.into());
    }
    for (id, (left, right)) in (256..).zip(MERGES) {
        vocabulary.insert(format!("{left}{right}"), id.into());
    }
    let added = |id| {
        json!({
            "id": id, "content": special(id), "single_word": false, "lstrip": false, "rstrip": false,
            "normalized": false, "special": true,
        })
    };
    let byte_level = json!({ "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true });
    let begin = json!({ "SpecialToken": { "id": special(BOS), "type_id": 0 } });
    let a = json!({ "Sequence": { "id": "A", "type_id": 0 } });
    let b = json!({ "Sequence": { "id": "B", "type_id": 1 } });
    json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": (BOS..VOCABULARY as u32).map(added).collect::<Vec<_>>(),
        "normalizer": null,
        "pre_tokenizer": byte_level,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [begin, a],
            "pair": [begin, a, b],
            "special_tokens": { special(BOS): { "id": special(BOS), "ids": [BOS], "tokens": [special(BOS)] } },
        },
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": null,
            "unk_token": null,
            "continuing_subword_prefix": null,
            "end_of_word_suffix": null,
            "fuse_unk": false,
            "byte_fallback": false,
            "ignore_merges": false,
            "vocab": vocabulary,
            "merges": MERGES.map(|(left, right)| [left, right]),
        },
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::max_difference;
    use crate::reference::Reference;
    use kitoken::Kitoken;

    fn logits(tiny: &Tiny) -> Vec<f32> {
        let dir = tempfile::tempdir().unwrap();
        tiny.write(dir.path());
        Reference::load(dir.path()).logits(&[97, 98, 99]).concat()
    }

    fn differ(a: &Tiny, b: &Tiny) -> bool {
        max_difference(&logits(a), &logits(b)) > 1e-2
    }

    #[test]
    fn the_generator_is_the_one_described() {
        let mut random = Generator(1);
        let codes: Vec<u8> = (0..16).map(|_| random.code()).collect();
        assert_eq!(codes, [2, 1, 0, 1, 1, 2, 0, 0, 0, 0, 1, 2, 0, 0, 2, 2]);
        // The same codes, further on: 256 of them begin so where bitnet.cpp writes four to a byte.
        let mut random = Generator(1);
        let codes: Vec<u8> = (0..256).map(|_| random.code()).collect();
        let byte = |p: usize| codes[p] << 6 | codes[p + 32] << 4 | codes[p + 64] << 2 | codes[p + 96];
        let bytes: Vec<u8> = (0..16).map(byte).collect();
        assert_eq!(bytes, 0xa65022695894040428224682162585a0_u128.to_be_bytes());
    }

    #[test]
    fn packing_goes_by_quarters_of_the_rows() {
        let rows: [[i8; 4]; 8] = [
            [-1, 0, 1, 1],
            [0, 0, 0, 1],
            [1, 1, -1, -1],
            [0, 1, 0, -1],
            [1, 0, 0, 1],
            [-1, -1, 0, 0],
            [0, 1, 1, 0],
            [1, -1, 1, -1],
        ];
        let codes: Vec<u8> = rows.concat().iter().map(|w| (w + 1) as u8).collect();
        assert_eq!(pack(&codes), [0x68, 0x99, 0x92, 0x62, 0x85, 0x09, 0x95, 0x12]);
    }

    #[test]
    fn variants_give_different_logits() {
        let n = Tiny::n();
        assert!(differ(&n, &n.clone().hidden_act("silu")), "the activation");
        assert!(differ(&n, &n.clone().masters()), "the scale");
        assert!(differ(&n, &n.clone().varied_norms()), "the norms");
        assert!(differ(&n, &n.clone().tied(false)), "the head");
        assert!(differ(&n, &n.clone().layers(1)), "the layers");
        let l = Tiny::l().varied_norms();
        assert!(differ(&l, &l.clone().linear_norms()), "the norms inside");
        assert!(differ(&l, &l.clone().config("rope_theta", 500_000.0)), "the angles");
        let rope = json!({
            "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        });
        assert!(differ(&l, &l.clone().config("rope_scaling", rope)), "stretched angles");
    }

    #[test]
    fn the_form_of_storage_changes_nothing() {
        let n = Tiny::n().varied_norms();
        for other in [n.clone().shards(3), n.clone().class_name("BitnetForCausalLM"), n.clone().first_names()] {
            assert_eq!(logits(&n), logits(&other));
        }
        let scale = |tiny: &Tiny| tiny.tensors()["model.layers.1.mlp.up_proj.weight_scale"].bytes.clone();
        assert_eq!(scale(&n), 0.02_f32.to_le_bytes());
        assert_eq!(scale(&Tiny::l()), 50_f32.to_le_bytes());
        for dtype in [Dtype::BF16, Dtype::F16] {
            let short = max_difference(&logits(&n), &logits(&n.clone().dtype(dtype)));
            assert!(short > 0.0 && short < 0.2, "{dtype:?}: {short}");
        }
        let l = Tiny::l().dtype(Dtype::BF16);
        assert_eq!(l.tensors()["model.layers.0.self_attn.k_proj.weight"].shape, [KV_HEADS * HEAD_DIM / 4, HIDDEN]);
    }

    #[test]
    fn writing_twice_gives_the_same_bytes() {
        let [one, two] = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
        let tiny = Tiny::l().tokenizer().shards(2);
        tiny.write(one.path());
        tiny.write(two.path());
        let mut files = 0;
        for entry in std::fs::read_dir(one.path()).unwrap() {
            let name = entry.unwrap().file_name();
            let [a, b] = [&one, &two].map(|dir| std::fs::read(dir.path().join(&name)).unwrap());
            assert!(a == b, "{}", name.display());
            files += 1;
        }
        // Configuration, index, two shards, tokenizer, its configuration, that of generation.
        assert_eq!(files, 7);
    }

    #[test]
    fn the_tokenizer_is_a_byte_level_one() {
        let tokenizer = serde_json::to_vec(&tokenizer_json()).unwrap();
        let tokenizer = Kitoken::from_tokenizers_slice(&tokenizer).unwrap();
        let ids = |text: &str| tokenizer.encode(text, false).unwrap();
        assert_eq!(ids("abc"), [97, 98, 99]);
        let odd = "\0\n\x7f \u{e9}\u{1f600}";
        assert_eq!(ids(odd), odd.bytes().map(u32::from).collect::<Vec<_>>());
        // " the" is one id and so is "in"; the space before that is a byte.
        assert_eq!(ids("the the in"), [u32::from(b't'), 256, 258, 32, 259]);
        for text in ["the the in", odd, ""] {
            assert_eq!(tokenizer.decode(ids(text), false).unwrap(), text.as_bytes());
        }
        // kitoken leaves the first token to its caller.
        let expected = [ids("User: hi"), vec![EOT], ids("Assistant: ")].concat();
        assert_eq!(tokenizer.encode("User: hi<|eot_id|>Assistant: ", true).unwrap(), expected);
    }
}
