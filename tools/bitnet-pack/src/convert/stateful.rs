//! A trained model gets states of fixed size: a checkpoint with a window, sinks and a memory beside attention in every layer,
//! of which nothing is added yet, so that within the window it computes what it did, bit for bit.
//!
//! What is added of a memory is multiplied by `rho`, which starts at zero; its linears do not, or the gradient of both would
//! stay zero for ever. `tools/train` then trains the memories and leaves the rest as it is (`--memory-only`).
use super::{copy, free, open, rewrite};
use crate::checkpoint::{Checkpoint, Dtype, Storage, TensorInfo, sections};
use crate::dummy::Random;
use crate::report::{Progress, size};
use crate::{Error, Options};
use bitnet_kernel::float::TAPS;
use bitnet_runtime::model::{Config, Matrices, Memory, Vector, Window};
use core::fmt;
use serde_json::{Map, Value, json};
use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::Path;

/// What is put in.
#[derive(Clone, Copy, Debug)]
pub struct Stateful {
    /// What attention sees. A model that has a window already must have this one.
    pub window: Window,
    /// Each layer's memory.
    pub memory: Memory,
    /// Whether it is given a token when that leaves the window, and not at once.
    pub delayed_writes: bool,
}

/// What was written.
#[derive(Clone, Debug)]
pub struct Converted {
    /// The model that it is now.
    pub config: Config,
    /// Weights of the memories.
    pub weights: u64,
    /// Length of the tensors' file.
    pub bytes: u64,
}

/// Tokens after which a head has forgotten half, before training; heads take them in turn.
const HALF_LIVES: [f64; 4] = [64.0, 512.0, 4096.0, 32768.0];
/// What is added to what decides how much is kept of a vector's first and last number, before training; those between are in equal
/// steps.
const FORGET_BIAS: [f32; 2] = [1.0, 6.0];
/// Standard deviation of the memories' masters, and the magnitude of those that are ternary from the start.
const DEVIATION: f32 = 0.02;
/// Standard deviation of what is added to the taps.
const TAP_NOISE: f32 = 0.05;

/// How linears of a memory are written, which is how those of the model are read.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Linears {
    /// Masters, BF16.
    Masters,
    /// Multiples of one magnitude by -1, 0 or 1, BF16.
    Values,
    /// Four rows a byte, and a scale beside them.
    Packed,
}

/// A tensor of a memory, made when it is written.
enum New {
    Masters(u64),
    Values(u64),
    /// Rows and columns of the matrix.
    Packed(u64, u64),
    Floats(Vec<f32>),
}

impl New {
    fn dtype(&self) -> &'static str {
        match self {
            Self::Masters(_) | Self::Values(_) => "BF16",
            Self::Packed(..) => "U8",
            Self::Floats(_) => "F32",
        }
    }
    fn bytes(self, random: &mut Random) -> Vec<u8> {
        let bf16 = |v: f32| ((v.to_bits() >> 16) as u16).to_le_bytes();
        match self {
            Self::Masters(n) => (0..n).flat_map(|_| bf16(DEVIATION * random.normal())).collect(),
            Self::Values(n) => (0..n).flat_map(|_| bf16(DEVIATION * f32::from(random.within(-1, 1)))).collect(),
            Self::Packed(rows, cols) => {
                let quarter = rows.div_ceil(4);
                let code = |plane, row, random: &mut Random| {
                    let code = if plane * quarter + row < rows { random.within(-1, 1) } else { 0 };
                    ((code + 1) as u8) << (2 * plane)
                };
                let at = (0..quarter).flat_map(|row| (0..cols).map(move |_| row));
                at.map(|row| (0..4).fold(0, |byte, plane| byte | code(plane, row, random))).collect()
            }
            Self::Floats(values) => values.iter().flat_map(|v| v.to_le_bytes()).collect(),
        }
    }
}

/// Writes the checkpoint `source` with states as the directory `output`.
///
/// # Errors
/// If `source` is no checkpoint that can be packed, has a memory or another window, or was made to see fewer positions, or if
/// something is there under the name `output`. Then nothing is there that was not before.
pub fn convert(source: &Path, output: &Path, new: &Stateful, progress: &mut dyn Progress) -> Result<Converted, Error> {
    let checkpoint = open(source)?;
    let mut table = checkpoint.table()?;
    sections::bind(&checkpoint, &mut table, &Options::default(), None, progress)?;
    let refuse = |what: String| Err(Error::Options(format!("{}: {what}", source.display())));
    if table.config.memory.is_some() {
        return refuse("it has a memory already".into());
    }
    if let Some(window) = table.config.window.filter(|window| *window != new.window) {
        return refuse(format!("it has a window of {} with {} sinks already", window.positions, window.sinks));
    }
    if table.config.linear_norm_eps.is_some() {
        return refuse("its linears have norms of their own, which a memory has not".into());
    }
    let (span, context) = (u64::from(new.window.positions) + u64::from(new.window.sinks), table.config.context);
    if span > context.into() {
        return refuse(format!("it was made for {context} positions, {span} in window and sinks are more"));
    }
    let (window, memory) = (Some(new.window), Some(new.memory));
    let config = Config { window, memory, delayed_writes: new.delayed_writes, ..table.config };
    config.check().map_err(|error| Error::Options(error.to_string()))?;
    free(output)?;

    let packed = checkpoint.tensors().any(|t| t.dtype == Dtype::U8);
    let linears = match table.storage {
        _ if packed => Linears::Packed,
        Storage::Found { masters: false } => Linears::Values,
        _ => Linears::Masters,
    };
    let prefix = if checkpoint.tensor("model.embed_tokens.weight").is_some() { "model." } else { "" };
    let mut random = Random(1);
    let added: Vec<_> =
        (0..config.layers).flat_map(|layer| tensors_of(&config, prefix, layer, linears, &mut random)).collect();

    let weights = added.iter().map(|(.., tensor)| weights(tensor)).sum();
    let configuration = configuration(&checkpoint, new)?;
    let bytes = rewrite(&checkpoint, output, &configuration, progress, |path, progress| {
        let bytes = tensors(&checkpoint, added, path, &mut random, progress)?;
        Ok((bytes, |written: &Config| {
            let of = |c: &Config| (c.window, c.memory, c.delayed_writes);
            of(written) == of(&config)
        }))
    })?;
    Ok(Converted { config, weights, bytes })
}

fn weights(tensor: &New) -> u64 {
    match tensor {
        New::Masters(n) | New::Values(n) => *n,
        New::Packed(rows, cols) => rows * cols,
        New::Floats(_) => 0,
    }
}

/// Name, shape and contents of every tensor of a layer's memory.
fn tensors_of(
    config: &Config,
    prefix: &str,
    layer: u32,
    linears: Linears,
    random: &mut Random,
) -> Vec<(String, Vec<u64>, New)> {
    let memory = config.memory.expect("it gets one");
    let name = |part: &str| format!("{prefix}layers.{layer}.self_attn.memory.{part}");
    let (hidden, query) = (u64::from(config.hidden), u64::from(config.query_width()));
    let [channels, results] = [memory.channels(), memory.results()].map(u64::from);
    let mut tensors = Vec::new();
    let matrices = memory.matrices(config);
    let gates = matrices.map_or(0, |m| 2 * u64::from(m.heads));
    let linears_of =
        [("in_proj", channels + results, hidden), ("gate_proj", gates, hidden), ("o_proj", query, results)];
    for (part, rows, cols) in linears_of.into_iter().filter(|(_, rows, cols)| rows * cols > 0) {
        let weight = name(&format!("{part}.weight"));
        match linears {
            Linears::Masters => tensors.push((weight, vec![rows, cols], New::Masters(rows * cols))),
            Linears::Values => tensors.push((weight, vec![rows, cols], New::Values(rows * cols))),
            Linears::Packed => {
                // A magnitude of one is right whether the scale multiplies or divides.
                tensors.push((name(&format!("{part}.weight_scale")), vec![1], New::Floats(vec![1.0])));
                tensors.push((weight, vec![rows.div_ceil(4), cols], New::Packed(rows, cols)));
            }
        }
    }
    // A key is what its predecessor was, its value what comes now: "key value" binds without help from attention.
    let tap = |channel: u64, tap: usize| {
        let is_key = matches!(memory, Memory::Matrices(m) if (m.keys()..2 * m.keys()).contains(&(channel as u32)));
        if tap == TAPS - 1 - usize::from(is_key) { 1.0 } else { 0.0 }
    };
    let taps = (0..channels).flat_map(|channel| (0..TAPS).map(move |i| tap(channel, i)));
    let taps: Vec<_> = taps.map(|tap: f32| tap + TAP_NOISE * random.normal()).collect();
    if !taps.is_empty() {
        tensors.push((name("taps"), vec![channels, TAPS as u64], New::Floats(taps)));
    }
    let vector = |part: &str, values: Vec<f32>| (name(part), vec![values.len() as u64], New::Floats(values));
    match (matrices, memory.results()) {
        (Some(Matrices { heads, value, .. }), _) => {
            let half_life = |h: u32| HALF_LIVES[h as usize % HALF_LIVES.len()];
            let bias = |h| libm::log(libm::expm1(core::f64::consts::LN_2 / half_life(h))) as f32;
            tensors.push(vector("log_rate", vec![0.0; heads as usize]));
            tensors.push(vector("decay_bias", (0..heads).map(bias).collect()));
            tensors.push(vector("write_bias", vec![0.0; heads as usize]));
            tensors.push(vector("norm", vec![1.0; value as usize]));
        }
        (None, width) => {
            let [first, last] = FORGET_BIAS;
            let step = (last - first) / (width - 1).max(1) as f32;
            tensors.push(vector("bound", vec![0.0; width as usize]));
            tensors.push(vector("forget_bias", (0..width).map(|i| first + step * i as f32).collect()));
            tensors.push(vector("norm", vec![1.0; width as usize]));
        }
    }
    tensors.push(vector("rho", vec![0.0; query as usize]));
    tensors
}

/// The model's own configuration with what is new.
fn configuration(checkpoint: &Checkpoint, new: &Stateful) -> Result<Value, Error> {
    let mut config = checkpoint.json("config.json")?.unwrap_or_default();
    config["sliding_window"] = new.window.positions.into();
    config["sink_tokens"] = new.window.sinks.into();
    config["memory"] = match new.memory {
        Memory::Matrices(Matrices { heads, key, value }) => {
            json!({"kind": "bitrnn-m", "heads": heads, "key_dim": key, "value_dim": value})
        }
        Memory::Vector(Vector { width }) => json!({"kind": "bitrnn-v", "width": width}),
        Memory::Shared => json!({"kind": "shared"}),
    };
    config["memory"]["write_delay"] = if new.delayed_writes { new.window.positions } else { 0 }.into();
    Ok(config)
}

/// Writes the model's tensors as they are and those of the memories; returns the file's length.
fn tensors(
    checkpoint: &Checkpoint,
    added: Vec<(String, Vec<u64>, New)>,
    path: &Path,
    random: &mut Random,
    progress: &mut dyn Progress,
) -> Result<u64, Error> {
    let mut header = Map::new();
    header.insert("__metadata__".into(), json!({"format": "pt"}));
    let mut end = 0;
    let mut enter = |name: &str, dtype: &str, shape: &[u64], bytes: u64| {
        let offsets = [end, end + bytes];
        end += bytes;
        header.insert(name.into(), json!({"dtype": dtype, "shape": shape, "data_offsets": offsets}));
    };
    let old: Vec<&TensorInfo> = checkpoint.tensors().collect();
    old.iter().for_each(|t| enter(&t.name, t.dtype.name(), &t.shape, t.bytes));
    for (name, shape, tensor) in &added {
        let width = match tensor.dtype() {
            "U8" => 1,
            "BF16" => 2,
            _ => 4,
        };
        enter(name, tensor.dtype(), shape, width * shape.iter().product::<u64>());
    }
    let mut header = Value::Object(header).to_string().into_bytes();
    header.resize(header.len().next_multiple_of(8), b' ');

    let failed = |e| Error::io(path, "write", e);
    let mut out = BufWriter::new(File::create(path).map_err(|e| Error::io(path, "create", e))?);
    out.write_all(&(header.len() as u64).to_le_bytes()).and_then(|()| out.write_all(&header)).map_err(failed)?;
    progress.start(end);
    let mut buffer = Vec::new();
    for tensor in old {
        progress.section(&tensor.name);
        copy(checkpoint, tensor, &mut buffer, progress, |_, part| out.write_all(part).map_err(failed))?;
    }
    for (name, _, tensor) in added {
        if progress.cancelled() {
            return Err(Error::Interrupted);
        }
        progress.section(&name);
        let bytes = tensor.bytes(random);
        out.write_all(&bytes).map_err(failed)?;
        progress.advance(bytes.len() as u64);
    }
    let file = out.into_inner().map_err(|e| failed(e.into_error()))?;
    file.sync_all().map_err(failed)?;
    Ok(8 + header.len() as u64 + end)
}

impl fmt::Display for Converted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (Some(window), Some(memory)) = (self.config.window, self.config.memory) else { return Ok(()) };
        writeln!(f, "attention sees {} positions and the first {}", window.positions, window.sinks)?;
        let layers = self.config.layers;
        match (memory, memory.matrices(&self.config)) {
            (_, Some(Matrices { heads, key, value })) => {
                writeln!(f, "memory: {heads} states of {value} x {key} in each of {layers} layers")?;
            }
            (memory, None) => writeln!(f, "memory: {} numbers in each of {layers} layers", memory.results())?,
        }
        if self.config.delayed_writes {
            writeln!(f, "of what has left the window")?;
        }
        writeln!(f, "{} weights added, {} of tensors", self.weights, size(self.bytes))
    }
}
