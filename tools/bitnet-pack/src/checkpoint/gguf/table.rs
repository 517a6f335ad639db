//! What a file's keys say of the model.
//!
//! The architecture decides what the pass computes. A key that would change it and is not known is an error that names it.
use super::{Metadata, Value};
use crate::Error;
use crate::checkpoint::rope::{self, Scaling};
use crate::checkpoint::{Storage, Table, why_not};
use bitnet_kernel::Format;
use bitnet_runtime::error::ImageError;
use bitnet_runtime::model::{Activation, Config, Quantizers, Rope};

/// What an architecture computes.
#[derive(Clone, Copy)]
struct Architecture {
    name: &'static str,
    activation: Activation,
    rope: Rope,
    sub_norms: bool,
    qk_norms: bool,
    /// Whether float matrices that are not ternary are masters of ternary ones.
    masters: bool,
}

/// The same graph is published under two names for BitNet b1.58; its activation is not that of `bitnet`, which readers have
/// confused.
const ARCHITECTURES: [Architecture; 5] = [
    BITNET,
    Architecture { name: "bitnet-b1.58", activation: Activation::SquaredRelu, ..BITNET },
    Architecture { name: "bitnet-25", activation: Activation::SquaredRelu, ..BITNET },
    Architecture { name: "llama", rope: Rope::Interleaved, sub_norms: false, masters: false, ..BITNET },
    Architecture { name: "qwen3", sub_norms: false, qk_norms: true, masters: false, ..BITNET },
];
const BITNET: Architecture = Architecture {
    name: "bitnet",
    activation: Activation::Silu,
    rope: Rope::HalfSplit,
    sub_norms: true,
    qk_norms: false,
    masters: true,
};

/// Keys after the architecture's name that are read.
const READ: [&str; 14] = [
    "block_count",
    "context_length",
    "embedding_length",
    "feed_forward_length",
    "attention.head_count",
    "attention.head_count_kv",
    "attention.key_length",
    "attention.value_length",
    "attention.layer_norm_rms_epsilon",
    "rope.dimension_count",
    "rope.freq_base",
    "rope.scaling.type",
    "rope.scaling.factor",
    "vocab_size",
];

/// Whether a value leaves the arithmetic as it is.
type Neutral = fn(Value) -> bool;

/// Keys that would change the arithmetic, and under which values they do not.
const NEUTRAL: [(&str, Neutral); 17] = [
    ("expert_count", zero),
    ("expert_used_count", zero),
    ("attention.sliding_window", zero),
    ("attention.max_alibi_bias", zero),
    ("attention.clamp_kqv", zero),
    ("attention.scale", zero),
    ("attn_logit_softcapping", zero),
    ("final_logit_softcapping", zero),
    ("logit_scale", one),
    ("embedding_scale", one),
    ("residual_scale", one),
    ("rope.scale_linear", one),
    ("rope.scaling.attn_factor", one),
    ("rope.scaling.yarn_log_multiplier", zero),
    ("use_parallel_residual", no),
    ("attention.causal", yes),
    ("leading_dense_block_count", zero),
];

fn zero(value: Value) -> bool {
    matches!(value, Value::Unsigned(0) | Value::Signed(0)) || matches!(value, Value::Float(v) if v == 0.0)
}
fn one(value: Value) -> bool {
    matches!(value, Value::Unsigned(1) | Value::Signed(1)) || matches!(value, Value::Float(v) if v == 1.0)
}
fn no(value: Value) -> bool {
    matches!(value, Value::Bool(false))
}
fn yes(value: Value) -> bool {
    matches!(value, Value::Bool(true))
}

/// Reads the configuration.
///
/// # Errors
/// [`Error::Config`] names the first key whose value is not known.
pub(in crate::checkpoint) fn table(metadata: &Metadata) -> Result<Table, Error> {
    const KEY: &str = "general.architecture";
    let named = metadata.text(KEY)?;
    let Some(architecture) = ARCHITECTURES.into_iter().find(|a| Some(a.name) == named.as_deref()) else {
        let known = ARCHITECTURES.map(|a| a.name).join(", ");
        let why = why_not(named.as_deref().unwrap_or_default());
        return metadata.refuse(KEY, format!("this architecture is not supported{why}; {known} are"));
    };
    let keys = Keys { metadata, prefix: architecture.name };
    for (name, neutral) in NEUTRAL {
        let key = keys.key(name);
        if metadata.get(&key).is_some_and(|value| !neutral(value)) {
            return metadata.refuse(&key, "not supported: it would change what the model computes");
        }
    }
    let mut notes = Vec::new();
    let own = |key: &&str| key.strip_prefix(architecture.name).and_then(|k| k.strip_prefix('.')).is_some();
    let known = |key: &str| READ.iter().chain(NEUTRAL.iter().map(|(k, _)| k)).any(|k| keys.key(k) == key);
    let unused: Vec<&str> = metadata.keys().filter(own).filter(|key| !known(key)).collect();
    if !unused.is_empty() {
        notes.push(format!("not looked at: {}", unused.join(", ")));
    }
    let config = config(&keys, architecture)?;
    let (theta, scaling) = rotation(&keys, &mut notes)?;
    let frequencies = rope::frequencies(theta, config.head_dim, scaling);
    if frequencies.iter().any(|f| !f.is_finite()) {
        return metadata.refuse(&keys.key("rope.freq_base"), "its angles are not finite numbers");
    }
    Ok(Table {
        architecture: architecture.name.into(),
        config,
        tie: None,
        storage: Storage::Found { masters: architecture.masters },
        frequencies,
        bos: None,
        eos: Vec::new(),
        notes,
    })
}

/// Keys of one architecture.
struct Keys<'a> {
    metadata: &'a Metadata,
    prefix: &'static str,
}

impl Keys<'_> {
    fn key(&self, name: &str) -> String {
        format!("{}.{name}", self.prefix)
    }
    fn refuse<T>(&self, name: &str, what: impl Into<String>) -> Result<T, Error> {
        self.metadata.refuse(&self.key(name), what)
    }
    fn u32_or_none(&self, name: &str) -> Result<Option<u32>, Error> {
        self.metadata.u32(&self.key(name))
    }
    fn u32(&self, name: &str) -> Result<u32, Error> {
        match self.u32_or_none(name)? {
            Some(v) => Ok(v),
            None => self.refuse(name, "a whole number is expected"),
        }
    }
    fn f64(&self, name: &str) -> Result<Option<f64>, Error> {
        self.metadata.f64(&self.key(name))
    }
    /// A number, or an array in which all are the same: some writers have one for each layer.
    fn same_in_all_layers(&self, name: &str) -> Result<Option<u32>, Error> {
        let key = self.key(name);
        if !matches!(self.metadata.get(&key), Some(Value::Array { .. })) {
            return self.metadata.u32(&key);
        }
        let list = self.metadata.integers(&key)?.unwrap_or_default();
        match list.first().map(|&first| (u32::try_from(first), list.iter().all(|&v| v == first))) {
            Some((Ok(value), true)) => Ok(Some(value)),
            _ => self.refuse(name, "one number for all layers is expected"),
        }
    }
}

fn config(keys: &Keys<'_>, architecture: Architecture) -> Result<Config, Error> {
    let hidden = keys.u32("embedding_length")?;
    let heads = match keys.same_in_all_layers("attention.head_count")? {
        Some(heads) => heads,
        None => return keys.refuse("attention.head_count", "a whole number is expected"),
    };
    let head_dim = match keys.u32_or_none("attention.key_length")? {
        Some(head_dim) => head_dim,
        None if heads > 0 && hidden.is_multiple_of(heads) => hidden / heads,
        None => return keys.refuse("attention.head_count", format!("does not divide embedding_length = {hidden}")),
    };
    for (name, what) in [("attention.value_length", "as long as a key"), ("rope.dimension_count", "the whole head")] {
        if keys.u32_or_none(name)?.is_some_and(|v| v != head_dim) {
            return keys.refuse(name, format!("{head_dim} is expected, {what}"));
        }
    }
    let vocab = match keys.u32_or_none("vocab_size")? {
        Some(vocab) => vocab,
        None => match keys.metadata.count("tokenizer.ggml.tokens")?.map(u32::try_from) {
            Some(Ok(count)) => count,
            _ => return keys.refuse("vocab_size", "a whole number, or tokens, are expected"),
        },
    };
    let norm_eps = match keys.f64("attention.layer_norm_rms_epsilon")? {
        Some(eps) if eps > 0.0 => eps as f32,
        _ => return keys.refuse("attention.layer_norm_rms_epsilon", "a positive number is expected"),
    };
    let ffn = match keys.same_in_all_layers("feed_forward_length")? {
        Some(ffn) => ffn,
        None => return keys.refuse("feed_forward_length", "a whole number is expected"),
    };
    let config = Config {
        vocab,
        hidden,
        ffn,
        layers: keys.u32("block_count")?,
        heads,
        kv_heads: keys.same_in_all_layers("attention.head_count_kv")?.unwrap_or(heads),
        head_dim,
        context: keys.u32("context_length")?,
        norm_eps,
        activation: architecture.activation,
        rope: architecture.rope,
        sub_norms: architecture.sub_norms,
        qk_norms: architecture.qk_norms,
        linear_norm_eps: None,
        live_ffn: false,
        sparse: false,
        window: None,
        memory: None,
        delayed_writes: false,
        recurrence: false,
        quantizers: Quantizers::INT8,
        tied: false,
        linear_head: false,
        split_head: false,
        formats: 1 << Format::TL as u8,
    };
    config.check().map_err(|error| {
        let ImageError::Config { field, value } = error else { unreachable!("{error}") };
        let name = match field {
            "vocab" => "vocab_size",
            "hidden" => "embedding_length",
            "ffn" => "feed_forward_length",
            "layers" => "block_count",
            "kv_heads" => "attention.head_count_kv",
            "head_dim" => "attention.key_length",
            "context" => "context_length",
            "norm_eps" => "attention.layer_norm_rms_epsilon",
            _ => "attention.head_count",
        };
        let what = crate::checkpoint::table::limits(field);
        Error::Config { path: keys.metadata.path().into(), key: keys.key(name), value: value.to_string(), what }
    })?;
    Ok(config)
}

fn rotation(keys: &Keys<'_>, notes: &mut Vec<String>) -> Result<(f64, Scaling), Error> {
    let theta = match keys.f64("rope.freq_base")? {
        Some(theta) if theta > 0.0 => theta,
        Some(_) => return keys.refuse("rope.freq_base", "a positive number is expected"),
        None => {
            notes.push(format!("no {}; 10000 is used", keys.key("rope.freq_base")));
            10_000.0
        }
    };
    let factor = keys.f64("rope.scaling.factor")?.unwrap_or(1.0);
    match keys.metadata.text(&keys.key("rope.scaling.type"))?.as_deref() {
        None | Some("none") if factor == 1.0 || factor == 0.0 => Ok((theta, Scaling::None)),
        Some("linear") if factor > 0.0 => Ok((theta, Scaling::Linear { factor: factor as f32 })),
        Some("linear") | None => keys.refuse("rope.scaling.factor", "a positive number and a type are expected"),
        Some(_) => keys.refuse("rope.scaling.type", "\"none\" or \"linear\" is supported"),
    }
}
