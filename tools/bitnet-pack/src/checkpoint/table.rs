//! The one table: everything that a checkpoint's `config.json` decides, and nothing that depends on its name.
//!
//! A value that is not listed here is an error that names it. A wrong guess would pack a model that talks fluent nonsense.
use super::rope::{self, Scaling};
use crate::Error;
use bitnet_runtime::model::{Activation, Config, Matrices, Memory, Quantizer, Quantizers, Rope, Vector, Window};
use serde_json::{Map, Value};
use std::path::{Path, PathBuf};

/// What the configuration says of a model.
#[derive(Clone, Debug)]
pub struct Table {
    /// The class, as spelled in the file.
    pub architecture: String,
    /// The model's shape and choices. `tied` and `formats` are decided later, by the tensors and the options.
    pub config: Config,
    /// `tie_word_embeddings`, if the file has it.
    pub tie: Option<bool>,
    /// How linears are stored.
    pub storage: Storage,
    /// `head_dim / 2` angles a position.
    pub frequencies: Vec<f32>,
    /// `bos_token_id`.
    pub bos: Option<u32>,
    /// `eos_token_id`.
    pub eos: Vec<u32>,
    /// What a person should know.
    pub notes: Vec<String>,
}

/// How the linears of a checkpoint are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Storage {
    /// No quantization section, or one without a class that packs: only float masters can be read.
    Masters,
    /// `autobitlinear`, online: float masters and nothing else.
    Online,
    /// `autobitlinear`, offline: packed, `y = (x · T) · weight_scale`.
    Multiply,
    /// `bitlinear`, or no class: packed, `y = (x · T) / weight_scale`; float masters are read too.
    Divide,
    /// Nothing is said: ternary where all numbers are a multiple of one magnitude by -1, 0 or 1, else dense, or if `masters`
    /// masters of ternary weights.
    Found {
        /// What floats that are not ternary are.
        masters: bool,
    },
}

/// Classes that are read.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Class {
    /// Sub-norms; `BitNetForCausalLM` of transformers, `BitnetForCausalLM` of 1bitLLM.
    BitNet,
    /// No sub-norms.
    Llama,
    /// As Llama, with a norm of each query and key head.
    Qwen3,
    /// The MatMul-free language model: a recurrence in place of attention, norms in all linears, a ternary head.
    MatMulFree,
}

const CLASSES: [(&str, Class, f64); 6] = [
    ("BitNetForCausalLM", Class::BitNet, 500_000.0),
    ("BitnetForCausalLM", Class::BitNet, 10_000.0),
    ("LlamaForCausalLM", Class::Llama, 10_000.0),
    ("Qwen3ForCausalLM", Class::Qwen3, 10_000.0),
    ("Qwen3Model", Class::Qwen3, 10_000.0),
    ("HGRNBitForCausalLM", Class::MatMulFree, 10_000.0),
];

/// Keys that would change the arithmetic, and the values under which they do not.
const NEUTRAL: [(&str, &[&str]); 16] = [
    ("attention_bias", &["false", "null"]),
    ("mlp_bias", &["false", "null"]),
    ("use_sliding_window", &["false", "null"]),
    ("partial_rotary_factor", &["1", "1.0", "null"]),
    ("logit_scale", &["1", "1.0", "null"]),
    ("logits_scaling", &["1", "1.0", "null"]),
    ("embedding_multiplier", &["1", "1.0", "null"]),
    ("residual_multiplier", &["1", "1.0", "null"]),
    ("attention_multiplier", &["null"]),
    ("final_logit_softcapping", &["null"]),
    ("attn_logit_softcapping", &["null"]),
    ("num_experts", &["null", "0"]),
    ("num_local_experts", &["null", "0"]),
    ("qk_norm", &["false", "null"]),
    ("use_qk_norm", &["false", "null"]),
    ("input_bits", &["8", "null"]),
];

/// Keys that are looked at elsewhere, and keys that say nothing about inference.
const KNOWN: [&str; 36] = [
    "_name_or_path",
    "activation_quantization",
    "architectures",
    "attention_dropout",
    "auto_map",
    "bos_token_id",
    "decoder_start_token_id",
    "dtype",
    "eos_token_id",
    "generation_config",
    "head_dim",
    "hidden_act",
    "hidden_size",
    "initializer_range",
    "intermediate_size",
    "max_position_embeddings",
    "max_window_layers",
    "memory",
    "model_type",
    "num_attention_heads",
    "num_hidden_layers",
    "num_key_value_heads",
    "pad_token_id",
    "pretraining_tp",
    "quantization_config",
    "rms_norm_eps",
    "rope_parameters",
    "rope_scaling",
    "rope_theta",
    "sink_tokens",
    "sliding_window",
    "tie_word_embeddings",
    "torch_dtype",
    "transformers_version",
    "use_cache",
    "vocab_size",
];

/// Such keys of [`Class::MatMulFree`].
const RECURRENT: [(&str, &[&str]); 5] = [
    ("attn_mode", &["\"fused_recurrent\"", "null"]),
    ("expand_ratio", &["1", "1.0", "null"]),
    ("quantization_config", &["null"]),
    ("use_lower_bound", &["true", "null"]),
    ("use_short_conv", &["false", "null"]),
];

/// And those that are looked at elsewhere or say nothing: heads are but a way to number the channels.
const RECURRENT_KNOWN: [&str; 5] =
    ["conv_size", "fuse_cross_entropy", "hidden_ratio", "num_heads", "share_conv_kernel"];

/// What its linears add to the mean square of their input: the default of the function that computes them, which nothing sets.
const RECURRENT_LINEAR_EPS: f32 = 1e-6;

/// Reads values of one file, and names key and value where one is refused.
struct Reader<'a> {
    path: &'a Path,
    object: &'a Map<String, Value>,
    /// `"quantization_config."` inside that object.
    prefix: &'static str,
}

impl<'a> Reader<'a> {
    fn get(&self, key: &str) -> &'a Value {
        self.object.get(key).unwrap_or(&Value::Null)
    }
    fn refuse<T>(&self, key: &str, what: impl Into<String>) -> Result<T, Error> {
        let value = self.object.get(key).map_or("(missing)".into(), Value::to_string);
        let value =
            if value.len() > 200 { format!("{}…", value.chars().take(200).collect::<String>()) } else { value };
        Err(Error::Config { path: self.path.into(), key: format!("{}{key}", self.prefix), value, what: what.into() })
    }
    fn u32_or_null(&self, key: &str) -> Result<Option<u32>, Error> {
        match self.get(key) {
            Value::Null => Ok(None),
            value => match value.as_u64().and_then(|v| u32::try_from(v).ok()) {
                Some(v) => Ok(Some(v)),
                None => self.refuse(key, "a whole number below 2^32 is expected"),
            },
        }
    }
    fn u32(&self, key: &str) -> Result<u32, Error> {
        match self.u32_or_null(key)? {
            Some(v) => Ok(v),
            None => self.refuse(key, "a whole number is expected"),
        }
    }
    fn f64_or_null(&self, key: &str) -> Result<Option<f64>, Error> {
        match self.get(key) {
            Value::Null => Ok(None),
            value => match value.as_f64() {
                Some(v) => Ok(Some(v)),
                None => self.refuse(key, "a number is expected"),
            },
        }
    }
    fn positive(&self, key: &str) -> Result<f64, Error> {
        match self.f64_or_null(key)? {
            Some(v) if v > 0.0 => Ok(v),
            _ => self.refuse(key, "a positive number is expected"),
        }
    }
    fn bool_or_null(&self, key: &str) -> Result<Option<bool>, Error> {
        match self.get(key) {
            Value::Null => Ok(None),
            Value::Bool(b) => Ok(Some(*b)),
            _ => self.refuse(key, "true or false is expected"),
        }
    }
    fn str_or_null(&self, key: &str) -> Result<Option<&'a str>, Error> {
        match self.get(key) {
            Value::Null => Ok(None),
            Value::String(s) => Ok(Some(s)),
            _ => self.refuse(key, "a string is expected"),
        }
    }
    fn object_or_null(&self, key: &str, prefix: &'static str) -> Result<Option<Reader<'a>>, Error> {
        match self.get(key) {
            Value::Null => Ok(None),
            Value::Object(object) => Ok(Some(Reader { path: self.path, object, prefix })),
            _ => self.refuse(key, "an object is expected"),
        }
    }
    /// Refuses the first key that is not among `known`.
    fn only(&self, known: &[&str]) -> Result<(), Error> {
        match self.object.keys().find(|key| !known.contains(&key.as_str())) {
            Some(key) => self.refuse(key, "unknown; it may change what the model computes"),
            None => Ok(()),
        }
    }
}

impl Table {
    /// Reads `config.json`.
    ///
    /// # Errors
    /// [`Error::Config`] names the first key whose value is not known.
    pub fn read(path: &Path, config: &Value) -> Result<Self, Error> {
        let Value::Object(object) = config else {
            return Err(Error::not_readable(path, "an object is expected"));
        };
        let reader = Reader { path, object, prefix: "" };
        let mut notes = Vec::new();
        let (architecture, class, default_theta) = class(&reader)?;
        for (key, neutral) in NEUTRAL {
            let value = reader.get(key);
            if !neutral.contains(&value.to_string().as_str()) {
                return reader.refuse(key, format!("not supported; only {} is", neutral[0]));
            }
        }
        let recurrent = class == Class::MatMulFree;
        for (key, neutral) in RECURRENT.iter().filter(|_| recurrent) {
            let value = reader.get(key);
            if !neutral.contains(&value.to_string().as_str()) {
                return reader.refuse(key, format!("not supported; only {} is", neutral[0]));
            }
        }
        let of_class =
            |key: &str| recurrent && (RECURRENT_KNOWN.contains(&key) || RECURRENT.iter().any(|(k, _)| *k == key));
        let known = |key: &str| {
            KNOWN.contains(&key) || key == "weight_bits" || NEUTRAL.iter().any(|(k, _)| *k == key) || of_class(key)
        };
        let unused: Vec<&str> = object.keys().map(String::as_str).filter(|key| !known(key)).collect();
        if !unused.is_empty() {
            notes.push(format!("config.json: not looked at: {}", unused.join(", ")));
        }
        let (storage, linear_norm_eps) = quantization(&reader, class)?;
        let shape = shape(&reader, class, linear_norm_eps)?;
        let frequencies = if recurrent {
            Vec::new()
        } else {
            let (theta, scaling) = rotation(&reader, default_theta, &mut notes)?;
            rope::frequencies(theta, shape.head_dim, scaling)
        };
        if frequencies.iter().any(|f| !f.is_finite()) {
            return reader
                .refuse("rope_theta", "with the scaling of rope_parameters, its angles are not finite numbers");
        }
        Ok(Self {
            architecture: architecture.into(),
            config: shape,
            tie: reader.bool_or_null("tie_word_embeddings")?,
            storage,
            frequencies,
            bos: reader.u32_or_null("bos_token_id")?,
            eos: ids(&reader, "eos_token_id")?,
            notes,
        })
    }
}

/// `eos_token_id` and the like: a number, a list of numbers, or null.
fn ids(reader: &Reader<'_>, key: &str) -> Result<Vec<u32>, Error> {
    let id = |value: &Value| value.as_u64().and_then(|id| u32::try_from(id).ok());
    let ids = match reader.get(key) {
        Value::Null => Some(Vec::new()),
        Value::Array(list) => list.iter().map(id).collect(),
        value => id(value).map(|id| vec![id]),
    };
    match ids {
        Some(ids) => Ok(ids),
        None => reader.refuse(key, "a token, a list of tokens or null is expected"),
    }
}

/// `bos_token_id` and `eos_token_id` of `generation_config.json`.
pub(crate) fn generation_ids(path: &PathBuf, config: &Value) -> Result<(Option<u32>, Vec<u32>), Error> {
    let Value::Object(object) = config else {
        return Err(Error::not_readable(path, "an object is expected"));
    };
    let reader = Reader { path, object, prefix: "" };
    Ok((reader.u32_or_null("bos_token_id")?, ids(&reader, "eos_token_id")?))
}

fn class<'a>(reader: &Reader<'a>) -> Result<(&'a str, Class, f64), Error> {
    let named = match reader.get("architectures") {
        Value::Array(list) if list.len() == 1 => list[0].as_str(),
        _ => None,
    };
    let known = CLASSES.map(|(name, ..)| name).join(", ");
    let Some(named) = named else {
        return reader.refuse("architectures", format!("a list with one of {known} is expected"));
    };
    match CLASSES.into_iter().find(|(name, ..)| *name == named) {
        Some((_, class, theta)) => Ok((named, class, theta)),
        None => {
            reader.refuse("architectures", format!("this class is not supported{}; {known} are", super::why_not(named)))
        }
    }
}

fn quantization(reader: &Reader<'_>, class: Class) -> Result<(Storage, Option<f32>), Error> {
    if class == Class::MatMulFree {
        return Ok((Storage::Masters, Some(RECURRENT_LINEAR_EPS)));
    }
    let Some(section) = reader.object_or_null("quantization_config", "quantization_config.")? else {
        let storage = if class == Class::BitNet { Storage::Masters } else { Storage::Found { masters: false } };
        return Ok((storage, None));
    };
    section.only(&[
        "quant_method",
        "linear_class",
        "quantization_mode",
        "offline_quantization",
        "use_rms_norm",
        "rms_norm_eps",
        "modules_to_not_convert",
    ])?;
    if section.str_or_null("quant_method")? != Some("bitnet") {
        return section.refuse("quant_method", "only \"bitnet\" is supported");
    }
    let online = match section.str_or_null("quantization_mode")? {
        None => section.bool_or_null("offline_quantization")?.map(|offline| !offline),
        Some("online") => Some(true),
        Some("offline") => Some(false),
        // Our training's: linears are written as they are multiplied, each with a kind of its own.
        Some("values") => return Ok((Storage::Found { masters: false }, None)),
        Some(_) => return section.refuse("quantization_mode", "\"online\", \"offline\" or \"values\" is expected"),
    };
    let bitnet = reader.str_or_null("model_type")? == Some("bitnet");
    let storage = match (section.str_or_null("linear_class")?, online) {
        (Some("autobitlinear"), Some(true)) => Storage::Online,
        (Some("autobitlinear"), _) => Storage::Multiply,
        // An early upload of the 2B-4T model says so and nothing more.
        (None, Some(false)) if bitnet && section.get("offline_quantization") == &Value::Bool(true) => Storage::Multiply,
        (None | Some("bitlinear"), _) => Storage::Divide,
        (Some(_), _) => return section.refuse("linear_class", "\"bitlinear\" or \"autobitlinear\" is expected"),
    };
    kept_dense(&section)?;
    let eps = section.f64_or_null("rms_norm_eps")?.unwrap_or(1e-6) as f32;
    let own_norms = section.bool_or_null("use_rms_norm")?.unwrap_or(false);
    Ok((storage, own_norms.then_some(eps)))
}

/// Modules that are not converted may only be those that never are: the head and the embedding.
fn kept_dense(section: &Reader<'_>) -> Result<(), Error> {
    const KEY: &str = "modules_to_not_convert";
    let dense = |value: &Value| matches!(value.as_str(), Some("lm_head" | "embed_tokens" | "model.embed_tokens"));
    match section.get(KEY) {
        Value::Null => Ok(()),
        Value::Array(list) if list.iter().all(dense) => Ok(()),
        _ => section.refuse(KEY, "null or a list of \"lm_head\" and \"embed_tokens\" is expected"),
    }
}

/// Width of the feed-forward layer, which the MatMul-free language model may leave to a ratio.
fn ffn(reader: &Reader<'_>, class: Class, hidden: u32) -> Result<u32, Error> {
    if class != Class::MatMulFree || !reader.get("intermediate_size").is_null() {
        return reader.u32("intermediate_size");
    }
    let ratio = if reader.get("hidden_ratio").is_null() { 4.0 } else { reader.positive("hidden_ratio")? };
    // Cut to a whole number, as its code does. What is too wide is found with the other widths.
    let width = (f64::from(hidden) * ratio * 2.0 / 3.0) as u32;
    Ok(width.div_ceil(256).saturating_mul(256))
}

fn shape(reader: &Reader<'_>, class: Class, linear_norm_eps: Option<f32>) -> Result<Config, Error> {
    let recurrence = class == Class::MatMulFree;
    let activation = match reader.str_or_null("hidden_act")? {
        Some("relu2") if !recurrence => Activation::SquaredRelu,
        Some("silu" | "swish") => Activation::Silu,
        _ if recurrence => return reader.refuse("hidden_act", "\"swish\" is expected"),
        _ => return reader.refuse("hidden_act", "\"relu2\" or \"silu\" is expected"),
    };
    let hidden = reader.u32("hidden_size")?;
    let heads = if recurrence { 1 } else { reader.u32("num_attention_heads")? };
    let head_dim = match reader.u32_or_null("head_dim")? {
        _ if recurrence => hidden,
        Some(head_dim) => head_dim,
        None if heads > 0 && hidden.is_multiple_of(heads) => hidden / heads,
        None => return reader.refuse("num_attention_heads", format!("does not divide hidden_size = {hidden}")),
    };
    let window = window(reader)?;
    let (memory, delayed_writes) = memory(reader, window)?;
    for (key, there) in [("sliding_window", window.is_some()), ("memory", memory.is_some())] {
        if recurrence && there {
            return reader.refuse(key, "only null is supported where there is no attention");
        }
    }
    let config = Config {
        vocab: reader.u32("vocab_size")?,
        hidden,
        ffn: ffn(reader, class, hidden)?,
        layers: reader.u32("num_hidden_layers")?,
        heads,
        kv_heads: if recurrence { 1 } else { reader.u32_or_null("num_key_value_heads")?.unwrap_or(heads) },
        head_dim,
        context: reader.u32("max_position_embeddings")?,
        norm_eps: reader.positive("rms_norm_eps")? as f32,
        activation,
        rope: Rope::HalfSplit,
        sub_norms: class == Class::BitNet,
        qk_norms: class == Class::Qwen3,
        linear_norm_eps,
        live_ffn: false,
        sparse: false,
        window,
        memory,
        delayed_writes,
        recurrence,
        quantizers: quantizers(reader)?,
        tied: false,
        linear_head: recurrence,
        split_head: false,
        formats: 1 << bitnet_kernel::Format::TL as u8,
    };
    config.check().map_err(|error| {
        let bitnet_runtime::error::ImageError::Config { field, value } = error else { unreachable!("{error}") };
        let (key, value) = (config_key(field).into(), value.to_string());
        Error::Config { path: reader.path.into(), key, value, what: limits(field) }
    })?;
    Ok(config)
}

/// Attention to a window, which our training writes with the number of sinks. Other models' windows have none, and positions that
/// count from the start.
fn window(reader: &Reader<'_>) -> Result<Option<Window>, Error> {
    match (reader.u32_or_null("sliding_window")?, reader.u32_or_null("sink_tokens")?) {
        (None, None) => Ok(None),
        (Some(positions), Some(sinks)) => Ok(Some(Window { positions, sinks })),
        (Some(_), None) => reader.refuse("sliding_window", "not supported without sink_tokens; only null is"),
        (None, Some(_)) => reader.refuse("sink_tokens", "only with a sliding_window"),
    }
}

/// The memory, and whether it is given a token when that leaves the window.
fn memory(reader: &Reader<'_>, window: Option<Window>) -> Result<(Option<Memory>, bool), Error> {
    let Some(section) = reader.object_or_null("memory", "memory.")? else { return Ok((None, false)) };
    let memory = match section.str_or_null("kind")? {
        Some("bitrnn-m") => {
            section.only(&["kind", "heads", "key_dim", "value_dim", "write_delay"])?;
            let (heads, key, value) = (section.u32("heads")?, section.u32("key_dim")?, section.u32("value_dim")?);
            Memory::Matrices(Matrices { heads, key, value })
        }
        Some("bitrnn-v") => {
            section.only(&["kind", "width", "write_delay"])?;
            Memory::Vector(Vector { width: section.u32("width")? })
        }
        Some("shared") => {
            section.only(&["kind", "write_delay"])?;
            Memory::Shared
        }
        _ => return section.refuse("kind", "\"bitrnn-m\", \"bitrnn-v\" or \"shared\" is expected"),
    };
    let delay = section.u32_or_null("write_delay")?.unwrap_or(0);
    if delay != 0 && window.is_none_or(|window| window.positions != delay) {
        return section.refuse("write_delay", "0 or the number of sliding_window is expected");
    }
    Ok((Some(memory), delay != 0))
}

fn quantizers(reader: &Reader<'_>) -> Result<Quantizers, Error> {
    let Some(section) = reader.object_or_null("activation_quantization", "activation_quantization.")? else {
        return Ok(Quantizers::INT8);
    };
    section.only(&["attention", "output", "ffn", "down"])?;
    let of = |key| match section.str_or_null(key)? {
        None | Some("int8") => Ok(Quantizer::Int8),
        Some("int4") => Ok(Quantizer::Int4),
        Some("int8_largest_half") => Ok(Quantizer::Int8LargestHalf),
        Some("int4_absmax") => Ok(Quantizer::Int4Absmax),
        Some("fp4") => Ok(Quantizer::Fp4),
        Some("int8_hadamard") => Ok(Quantizer::Int8Hadamard),
        Some("int4_hadamard") => Ok(Quantizer::Int4Hadamard),
        Some(_) => {
            let what = "int8, int4, int4_absmax, int8_largest_half, fp4, int8_hadamard or int4_hadamard is expected";
            section.refuse(key, what)
        }
    };
    Ok(Quantizers { attention: of("attention")?, output: of("output")?, ffn: of("ffn")?, down: of("down")? })
}

/// The key of `config.json` behind a field of [`Config`].
fn config_key(field: &str) -> &str {
    match field {
        "vocab" => "vocab_size",
        "hidden" => "hidden_size",
        "ffn" => "intermediate_size",
        "layers" => "num_hidden_layers",
        "heads" => "num_attention_heads",
        "kv_heads" => "num_key_value_heads",
        "context" => "max_position_embeddings",
        "norm_eps" => "rms_norm_eps",
        "window" => "sliding_window",
        "sinks" => "sink_tokens",
        "memory heads" => "memory.heads",
        "memory key" => "memory.key_dim",
        "memory value" => "memory.value_dim",
        "memory width" => "memory.width",
        "linear_norm_eps" => "quantization_config.rms_norm_eps",
        other => other,
    }
}

/// What the image format allows.
pub(crate) fn limits(field: &str) -> String {
    match field {
        "vocab" => format!("1 to {} is supported", Config::VOCAB_MAX),
        "layers" => format!("1 to {} is supported", Config::LAYERS_MAX),
        "kv_heads" => "a divisor of num_attention_heads is expected".into(),
        "head_dim" => format!("an even number from 2 to {} is supported", Config::HEAD_DIM_MAX),
        "context" => format!("1 to {} is supported", Config::CONTEXT_MAX),
        "window" | "sinks" => format!("1 to {} together with the sinks is supported", Config::CONTEXT_MAX),
        "memory heads" | "memory key" | "memory value" => format!("1 to {} is supported", Config::MEMORY_MAX),
        "norm_eps" | "linear_norm_eps" => "a number below 1 is expected".into(),
        "memory" => "not beside linears with norms of their own (use_rms_norm)".into(),
        _ => format!("1 to {} is supported", Config::WIDTH_MAX),
    }
}

fn rotation(reader: &Reader<'_>, default_theta: f64, notes: &mut Vec<String>) -> Result<(f64, Scaling), Error> {
    let parameters = reader.object_or_null("rope_parameters", "rope_parameters.")?;
    let older = reader.object_or_null("rope_scaling", "rope_scaling.")?;
    if let (Some(parameters), Some(older)) = (&parameters, &older)
        && parameters.object != older.object
    {
        return reader.refuse("rope_scaling", "disagrees with rope_parameters");
    }
    let section = parameters.or(older);
    let scaling = section.as_ref().map_or(Ok(Scaling::None), scaling)?;
    let inner = match &section {
        Some(section) if !section.get("rope_theta").is_null() => Some(section.positive("rope_theta")?),
        _ => None,
    };
    let outer = if reader.get("rope_theta").is_null() { None } else { Some(reader.positive("rope_theta")?) };
    let theta = match (inner, outer) {
        (Some(a), Some(b)) if a != b => return reader.refuse("rope_theta", format!("rope_parameters has {a}")),
        (Some(theta), _) | (None, Some(theta)) => theta,
        (None, None) => {
            notes.push(format!("config.json: no rope_theta; {default_theta}, the default of the class, is used"));
            default_theta
        }
    };
    Ok((theta, scaling))
}

fn scaling(section: &Reader<'_>) -> Result<Scaling, Error> {
    let key = if section.get("rope_type").is_null() { "type" } else { "rope_type" };
    let plain = ["rope_type", "type", "rope_theta", "partial_rotary_factor"];
    if !matches!(section.get("partial_rotary_factor").as_f64(), None | Some(1.0)) {
        return section.refuse("partial_rotary_factor", "only 1 is supported");
    }
    match section.str_or_null(key)? {
        None | Some("default") => {
            section.only(&plain)?;
            Ok(Scaling::None)
        }
        Some("linear") => {
            section.only(&[&plain[..], &["factor"]].concat())?;
            Ok(Scaling::Linear { factor: section.positive("factor")? as f32 })
        }
        Some("llama3") => {
            let own = ["factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"];
            section.only(&[&plain[..], &own[..]].concat())?;
            let [factor, low, high, original] = own.map(|key| section.positive(key));
            let (low_freq_factor, high_freq_factor) = (low? as f32, high? as f32);
            if low_freq_factor >= high_freq_factor {
                return section.refuse("high_freq_factor", "it must be greater than low_freq_factor");
            }
            let (factor, original_context) = (factor? as f32, original? as f32);
            Ok(Scaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_context })
        }
        Some(_) => section.refuse(key, "\"default\", \"linear\" or \"llama3\" is supported"),
    }
}
