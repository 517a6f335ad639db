//! What `config.json` says, as transformers understands it. What is not known is refused: an oracle does not guess.
use super::checkpoint::Checkpoint;
use serde_json::Value;
use std::f64::consts::TAU;
use std::path::Path;

/// The function between the gate and the product.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Activation {
    Relu2,
    Silu,
}

/// The two layouts of a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Block {
    /// With norms before `o_proj` and `down_proj`.
    BitNet,
    Llama,
}

/// Where a linear's scale comes from and how it is applied.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Scaling {
    /// The file holds masters; they are made ternary, and their mean magnitude is the scale.
    Online,
    /// The file holds packed weights and a scale to multiply by.
    Multiply,
    /// The file holds packed weights and a scale to divide by.
    Divide,
}

#[derive(Debug)]
pub(super) struct Config {
    pub(super) block: Block,
    /// A norm of each query and key head before it is rotated.
    pub(super) head_norms: bool,
    pub(super) activation: Activation,
    pub(super) scaling: Scaling,
    /// The epsilon of the norm inside every linear, if there is one.
    pub(super) linear_norm_eps: Option<f32>,
    pub(super) eps: f32,
    pub(super) hidden: usize,
    pub(super) ffn: usize,
    pub(super) layers: usize,
    pub(super) heads: usize,
    pub(super) kv_heads: usize,
    pub(super) head_dim: usize,
    pub(super) vocabulary: usize,
    pub(super) tied: bool,
    /// Radians a position, for each pair of a head.
    pub(super) frequencies: Vec<f32>,
}

impl Config {
    pub(super) fn read(dir: &Path, checkpoint: &Checkpoint) -> Self {
        let json = crate::json(dir.join("config.json"));
        let class = json["architectures"][0].as_str().expect("a class name in architectures");
        let block = match class {
            "BitNetForCausalLM" | "BitnetForCausalLM" => Block::BitNet,
            "LlamaForCausalLM" | "Qwen3ForCausalLM" => Block::Llama,
            _ => panic!("class {class} is not known"),
        };
        let activation = match json["hidden_act"].as_str() {
            Some("relu2") => Activation::Relu2,
            Some("silu") => Activation::Silu,
            other => panic!("hidden_act {other:?} is not known"),
        };
        assert!(json["attention_bias"] != true && json["mlp_bias"] != true, "biases are not known");
        let (hidden, heads) = (number(&json, "hidden_size"), number(&json, "num_attention_heads"));
        let head_dim = optional(&json, "head_dim").unwrap_or(hidden / heads);
        let quantization = &json["quantization_config"];
        Self {
            block,
            head_norms: class == "Qwen3ForCausalLM",
            activation,
            scaling: scaling(quantization, block, checkpoint),
            linear_norm_eps: (quantization["use_rms_norm"] == true)
                .then(|| quantization["rms_norm_eps"].as_f64().unwrap_or(1e-6) as f32),
            eps: json["rms_norm_eps"].as_f64().expect("rms_norm_eps") as f32,
            hidden,
            ffn: number(&json, "intermediate_size"),
            layers: number(&json, "num_hidden_layers"),
            heads,
            kv_heads: optional(&json, "num_key_value_heads").unwrap_or(heads),
            head_dim,
            vocabulary: number(&json, "vocab_size"),
            tied: json["tie_word_embeddings"] == true,
            frequencies: frequencies(&json, head_dim),
        }
    }
}

fn optional(json: &Value, name: &str) -> Option<usize> {
    json[name].as_u64().map(|n| usize::try_from(n).expect("a size"))
}

fn number(json: &Value, name: &str) -> usize {
    optional(json, name).unwrap_or_else(|| panic!("config.json has no number {name}"))
}

fn scaling(quantization: &Value, block: Block, checkpoint: &Checkpoint) -> Scaling {
    let packed = checkpoint.get("model.layers.0.self_attn.q_proj.weight").dtype == safetensors::Dtype::U8;
    if quantization.is_null() {
        assert!(block == Block::BitNet && !packed, "a model that is not quantized");
        return Scaling::Online;
    }
    assert_eq!(quantization["quant_method"], "bitnet", "the quant_method");
    let kept = quantization["modules_to_not_convert"].as_array().map_or(&[][..], Vec::as_slice);
    assert!(kept.iter().all(|module| module == "lm_head"), "modules kept in full precision: {kept:?}");
    let mode = quantization["quantization_mode"].as_str().unwrap_or("offline");
    let class = match quantization["linear_class"].as_str() {
        Some(class) => class,
        // How the first configuration of BitNet b1.58 2B4T said it.
        None if quantization["offline_quantization"] == true => "autobitlinear",
        None => "bitlinear",
    };
    match (class, mode, packed) {
        ("autobitlinear", "online", false) | ("bitlinear", "offline", false) => Scaling::Online,
        ("autobitlinear", "offline", true) => Scaling::Multiply,
        ("bitlinear", "offline", true) => Scaling::Divide,
        _ => panic!("linear_class {class}, quantization_mode {mode}, packed {packed} do not go together"),
    }
}

/// The angles a position of a head's pairs; pair `i` is dimensions `i` and `i + head_dim / 2`.
fn frequencies(json: &Value, head_dim: usize) -> Vec<f32> {
    let (old, new) = (&json["rope_scaling"], &json["rope_parameters"]);
    let rope = if new.is_null() { old } else { new };
    let theta = new["rope_theta"].as_f64().or(json["rope_theta"].as_f64()).expect("rope_theta");
    let kind = rope["rope_type"].as_str().or(rope["type"].as_str()).unwrap_or("default");
    let plain = (0..head_dim / 2).map(|i| 1.0 / theta.powf(2.0 * i as f64 / head_dim as f64));
    match kind {
        "default" => plain.map(|f| f as f32).collect(),
        "llama3" => plain.map(|f| llama3(f, rope) as f32).collect(),
        _ => panic!("rope_type {kind} is not known"),
    }
}

/// Short waves stay, long ones are stretched, and those between are mixed.
fn llama3(frequency: f64, rope: &Value) -> f64 {
    let value = |name: &str| rope[name].as_f64().unwrap_or_else(|| panic!("llama3 RoPE without {name}"));
    let (factor, low, high) = (value("factor"), value("low_freq_factor"), value("high_freq_factor"));
    let context = value("original_max_position_embeddings");
    let wave = TAU / frequency;
    if wave < context / high {
        frequency
    } else if wave > context / low {
        frequency / factor
    } else {
        let smooth = (context / wave - low) / (high - low);
        (1.0 - smooth) * frequency / factor + smooth * frequency
    }
}
