//! What a person is told: while it runs, and at the end.
use crate::calibrate::Adapted;
use crate::prune::Pruned;
use crate::reorder::Reordered;
use crate::tune::Tuning;
use bitnet_kernel::Format;
use bitnet_runtime::image::{Encoding, Image, Kind, Record, UNIT_ROWS};
use bitnet_runtime::{Config, Limits, Plan};
use core::fmt;

/// Hears how far a long operation is. `()` does not listen.
pub trait Progress {
    /// Before it starts: the number of bytes that will be written or checked. Packing does one after the other.
    fn start(&mut self, bytes: u64) {
        let _ = bytes;
    }
    /// A line for the person, in between.
    fn say(&mut self, line: &str) {
        let _ = line;
    }
    /// A section begins.
    fn section(&mut self, name: &str) {
        let _ = name;
    }
    /// Bytes done since the last call.
    fn advance(&mut self, bytes: u64) {
        let _ = bytes;
    }
    /// Asked now and then: whether to stop.
    fn cancelled(&self) -> bool {
        false
    }
}

impl Progress for () {}

/// One section of a packed image.
#[derive(Clone, Debug)]
pub struct SectionReport {
    /// What it holds.
    pub kind: Kind,
    /// Its layer.
    pub layer: Option<u32>,
    /// How it is encoded.
    pub encoding: Encoding,
    /// Rows.
    pub rows: u32,
    /// Columns.
    pub cols: u32,
    /// Bytes, padding included.
    pub bytes: u64,
    /// What all weights are multiplied by; `None` where rows have scales of their own, and of vectors.
    pub scale: Option<f32>,
    /// How far float masters were from ternary, if it was made from such: see [`crate::quantize::Distance`].
    pub distance: Option<f32>,
    /// The root of the energy of what quantizing a dense matrix lost, over that of its weights.
    pub error: Option<f32>,
}

impl SectionReport {
    /// A report of what a section table says.
    pub fn of(record: &Record) -> Option<Self> {
        let layer = record.layer.get();
        let encoding = Encoding::from_tag(record.encoding)?;
        let one_scale = match encoding {
            Encoding::Matrix(format) => format.has_matrix_scale(),
            Encoding::Blocks(_) => true,
            _ => false,
        };
        Some(Self {
            kind: kind(record.kind)?,
            layer: (layer != Record::NO_LAYER).then_some(layer.into()),
            encoding,
            rows: record.rows.get(),
            cols: record.cols.get(),
            bytes: u64::from(record.blocks.get()) * 64,
            scale: one_scale.then_some(record.scale.get()),
            distance: None,
            error: None,
        })
    }
    /// Weights of a matrix. Those of a head in two planes count in the first, wherever they are.
    pub const fn weights(&self) -> u64 {
        match self.encoding {
            _ if matches!(self.kind, Kind::HeadApart | Kind::HeadLow) => 0,
            Encoding::Matrix(_) | Encoding::Blocks(_) => self.rows as u64 * self.cols as u64,
            _ => 0,
        }
    }
    /// `"tl"`, `"f32"`, `"bytes"`.
    pub const fn format_name(&self) -> &'static str {
        match self.encoding {
            Encoding::Matrix(format) => format.name(),
            Encoding::Vector => "f32",
            Encoding::Bytes => "bytes",
            Encoding::Whole => "whole",
            Encoding::Kept => "kept",
            Encoding::Starts => "starts",
            Encoding::Blocks(shape) => shape.name(),
        }
    }
}

/// The kind with this tag.
pub(crate) fn kind(tag: u8) -> Option<Kind> {
    const ALL: [Kind; 55] = [
        Kind::Tokenizer,
        Kind::RopeFrequencies,
        Kind::Embedding,
        Kind::AttentionNorm,
        Kind::Query,
        Kind::Key,
        Kind::Value,
        Kind::AttentionSubNorm,
        Kind::Output,
        Kind::FfnNorm,
        Kind::Gate,
        Kind::Up,
        Kind::FfnSubNorm,
        Kind::Down,
        Kind::UpRows,
        Kind::DownColumns,
        Kind::QueryInputNorm,
        Kind::KeyInputNorm,
        Kind::ValueInputNorm,
        Kind::OutputInputNorm,
        Kind::GateInputNorm,
        Kind::UpInputNorm,
        Kind::DownInputNorm,
        Kind::MemoryInput,
        Kind::MemoryGates,
        Kind::MemoryTaps,
        Kind::MemoryDecay,
        Kind::MemoryNorm,
        Kind::MemoryOutput,
        Kind::MemoryShare,
        Kind::MemoryForget,
        Kind::QueryNorm,
        Kind::KeyNorm,
        Kind::FinalNorm,
        Kind::Head,
        Kind::HeadColumns,
        Kind::HeadApart,
        Kind::HeadLow,
        Kind::HeadNorms,
        Kind::HeadInputNorm,
        Kind::RecurrenceInput,
        Kind::RecurrenceForget,
        Kind::RecurrenceGate,
        Kind::RecurrenceBound,
        Kind::RecurrenceNorm,
        Kind::RecurrenceInputInputNorm,
        Kind::RecurrenceForgetInputNorm,
        Kind::RecurrenceGateInputNorm,
        Kind::QueryIndex,
        Kind::KeyIndex,
        Kind::ValueIndex,
        Kind::OutputIndex,
        Kind::GateIndex,
        Kind::UpIndex,
        Kind::DownIndex,
    ];
    ALL.into_iter().find(|&k| k as u8 == tag)
}

/// Bits that one layer's linears take, padding included; the embedding and the head count as layer `None`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LayerBits {
    /// The layer.
    pub layer: Option<u32>,
    /// Weights.
    pub weights: u64,
    /// Bits.
    pub bits: u64,
}

impl LayerBits {
    /// Sums sections by layer, in their order.
    pub fn sum(sections: impl Iterator<Item = (Option<u32>, u64, u64)>) -> Vec<Self> {
        let mut layers: Vec<Self> = Vec::new();
        for (layer, weights, bits) in sections {
            if !layers.iter().any(|l| l.layer == layer) {
                layers.push(Self { layer, weights: 0, bits: 0 });
            }
            let sum = layers.iter_mut().rev().find(|l| l.layer == layer).expect("just pushed");
            sum.weights += weights;
            sum.bits += bits;
        }
        layers
    }
    /// What a section table holds.
    pub fn of(image: &Image<'_>) -> Vec<Self> {
        let sections = image.sections().records().iter().filter_map(SectionReport::of);
        Self::sum(
            sections
                .filter(|s| matches!(s.encoding, Encoding::Matrix(_) | Encoding::Blocks(_)))
                .map(|s| (s.layer, s.weights(), s.bytes * 8)),
        )
    }
    /// Bits a weight.
    pub fn average(&self) -> f64 {
        self.bits as f64 / self.weights as f64
    }
}

/// Bits of a matrix by the definition of its format: whole steps of whole tiles, and one f32 a row where rows have scales.
/// Written without the image format's own arithmetic, which it is compared with.
pub(crate) fn planned_bits(format: Format, rows: u64, cols: u64) -> u64 {
    let tile = (format.tile_rows() * format.step_cols()) as f64 * f64::from(format.bits());
    let tiles = rows.div_ceil(format.tile_rows() as u64) * cols.div_ceil(format.step_cols() as u64);
    let scales = |rows: u64| if format.has_row_scales() { rows.next_multiple_of(16) * 32 } else { 0 };
    let (units, rest) = (rows / UNIT_ROWS as u64, rows % UNIT_ROWS as u64);
    tiles * tile.round() as u64 + units * scales(UNIT_ROWS as u64) + scales(rest)
}

/// What was packed.
#[derive(Clone, Debug)]
pub struct Report {
    /// The model's name.
    pub name: String,
    /// The checkpoint's class.
    pub architecture: String,
    /// The model.
    pub config: Config,
    /// What the memory plan is for.
    pub limits: Limits,
    /// Length of the image.
    pub image_bytes: u64,
    /// The packer's own peak memory, as promised before it started.
    pub peak_bytes: u64,
    /// All sections in their order.
    pub sections: Vec<SectionReport>,
    /// Bits a layer, read back from the image and equal to those planned.
    pub layers: Vec<LayerBits>,
    /// What a person should know.
    pub notes: Vec<String>,
    /// The formats of linears, where they were chosen one by one.
    pub adapted: Option<Adapted>,
    /// What was left out, where that was asked for.
    pub pruned: Option<Pruned>,
    /// What the order of the neurons is worth, where one was chosen.
    pub reordered: Option<Reordered>,
    /// The layouts of linears with zeros, where a CPU decided.
    pub tuning: Option<Tuning>,
}

/// `"731.5 MiB"`, and `"4096 B"` where that would show as next to nothing.
pub(crate) fn size(bytes: u64) -> String {
    match bytes {
        0..0x10_0000 => format!("{bytes} B"),
        _ => format!("{:.1} MiB", bytes as f64 / f64::from(1 << 20)),
    }
}

/// A text from a file, without what would move a terminal's cursor or change its colours.
pub(crate) fn printable(text: &str) -> String {
    text.replace(char::is_control, "\u{fffd}")
}

/// Writes the table of sections, those of one kind and format in one line.
fn table(f: &mut dyn fmt::Write, sections: &[SectionReport]) -> fmt::Result {
    writeln!(f, "{:<19} {:>4}  {:<6} {:>14} {:>7} {:>10}  scale", "section", "n", "format", "shape", "bits", "size")?;
    let mut done: Vec<(Kind, Encoding)> = Vec::new();
    for s in sections {
        if done.contains(&(s.kind, s.encoding)) {
            continue;
        }
        done.push((s.kind, s.encoding));
        let same = || sections.iter().filter(|t| (t.kind, t.encoding) == (s.kind, s.encoding));
        let (n, bytes): (usize, u64) = (same().count(), same().map(|t| t.bytes).sum());
        let shape = if s.weights() > 0 { format!("{}x{}", s.rows, s.cols) } else { s.cols.to_string() };
        let bits = match s.weights() {
            0 => String::new(),
            weights => format!("{:.3}", (bytes * 8) as f64 / (weights * n as u64) as f64),
        };
        write!(f, "{:<19} {n:>4}  {:<6} {shape:>14} {bits:>7} {:>10}", s.kind.name(), s.format_name(), size(bytes))?;
        let scales = || same().filter_map(|t| t.scale);
        let (low, high) = (scales().fold(f32::INFINITY, f32::min), scales().fold(f32::NEG_INFINITY, f32::max));
        match (s.weights() > 0, scales().count()) {
            (true, 0) if matches!(s.encoding, Encoding::Matrix(f) if f.has_row_scales()) => write!(f, "  one a row")?,
            (_, 0) => {}
            _ if low == high => write!(f, "  {low:.4}")?,
            _ => write!(f, "  {low:.4} to {high:.4}")?,
        }
        if let Some(distance) = same().filter_map(|t| t.distance).reduce(f32::max) {
            write!(f, ", masters {:.0}% from ternary", distance * 100.0)?;
        }
        if let Some(error) = same().filter_map(|t| t.error).reduce(f32::max) {
            write!(f, ", error {:.2}%", error * 100.0)?;
        }
        writeln!(f)?;
    }
    Ok(())
}

/// Writes the lines about totals and memory.
pub(crate) fn totals(
    f: &mut dyn fmt::Write,
    image_bytes: u64,
    layers: &[LayerBits],
    config: &Config,
    limits: &Limits,
) -> fmt::Result {
    let linears = || layers.iter().filter(|l| l.layer.is_some());
    let (weights, bits): (u64, u64) = (linears().map(|l| l.weights).sum(), linears().map(|l| l.bits).sum());
    writeln!(f, "linears: {:.1} M weights, {:.3} bits each", weights as f64 / 1e6, bits as f64 / weights as f64)?;
    writeln!(f, "image:   {image_bytes} bytes, {:.1} MiB", image_bytes as f64 / f64::from(1 << 20))?;
    let plan = Plan::new(config, limits);
    let bytes = |blocks: usize| size(blocks as u64 * 64);
    writeln!(
        f,
        "running: {} of memory besides the image\n         \
         state {} (context {}, keys and values as {}), scratch {} (batch {}), sampler {}",
        size(plan.bytes()),
        bytes(plan.state),
        limits.context,
        crate::inspect::kv(limits.kv),
        bytes(plan.scratch),
        limits.batch,
        bytes(plan.sampler),
    )
}

impl Report {
    /// Bytes of weights that a token reads: all sections but the tokenizer and an embedding that is not the head. Of the
    /// feed-forward layer with [`Config::live_ffn`] and of a head in two planes it is the most that can be.
    pub fn token_bytes(&self) -> u64 {
        let is_read = |s: &&SectionReport| !matches!(s.kind, Kind::Tokenizer | Kind::Embedding);
        self.sections.iter().filter(is_read).map(|s| s.bytes).sum()
    }
    /// Bytes of keys and values (and of a memory) that the last token of a full context reads besides.
    pub fn state_bytes(&self) -> u64 {
        Plan::new(&self.config, &self.limits).state as u64 * 64
    }
    /// Tokens a second of decoding if the memory gives `bandwidth` bytes a second and nothing else takes time: at the start of
    /// a conversation, and at the end of the context.
    pub fn decode_rate(&self, bandwidth: f64) -> (f64, f64) {
        let (weights, state) = (self.token_bytes() as f64, self.state_bytes() as f64);
        (bandwidth / weights, bandwidth / (weights + state))
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{} ({})", printable(&self.name), printable(&self.architecture))?;
        self.notes.iter().try_for_each(|note| writeln!(f, "  {}", printable(note)))?;
        table(f, &self.sections)?;
        if let Some(adapted) = &self.adapted {
            write!(f, "{adapted}")?;
        }
        if let Some(pruned) = &self.pruned {
            write!(f, "{pruned}")?;
        }
        if let Some(reordered) = &self.reordered {
            write!(f, "{reordered}")?;
        }
        if let Some(tuning) = &self.tuning {
            write!(f, "{tuning}")?;
        }
        totals(f, self.image_bytes, &self.layers, &self.config, &self.limits)
    }
}
