//! What an image says of itself. Reads the header only: whether the rest is sound is for [`crate::verify()`].
use crate::Error;
use crate::report::{LayerBits, SectionReport, printable, size, totals};
use crate::verify::Opened;
use bitnet_kernel::Block;
use bitnet_runtime::image::{Encoding, Header, Kind, VERSION};
use bitnet_runtime::memory::KvFormat;
use bitnet_runtime::model::{Activation, Memory, Quantizer, Quantizers, Rope};
use bitnet_runtime::{Config, Limits, Plan};
use core::fmt;
use serde_json::{Value, json};
use std::path::Path;

/// An image's header, for people and for programs.
#[derive(Clone, Debug)]
pub struct Summary {
    /// Length of the image.
    pub image_bytes: u64,
    /// The model's name.
    pub name: String,
    /// The checkpoint's class.
    pub architecture: String,
    /// The packer and its version.
    pub packer: String,
    /// The model.
    pub config: Config,
    /// What the memory plan is for.
    pub limits: Limits,
    /// Blocks that the packer's version needs for it, which may be another number than this version's.
    pub recorded: u64,
    /// The token that starts a conversation.
    pub bos: Option<u32>,
    /// Tokens that end a reply.
    pub stop: Vec<u32>,
    /// Jinja, or empty.
    pub chat_template: String,
    /// What chose the layouts of linears, or empty.
    pub tuning: String,
    /// All sections, in the order of the file.
    pub sections: Vec<SectionReport>,
    /// First byte and checksum of each section.
    pub places: Vec<(u64, u64)>,
    /// Bits a layer.
    pub layers: Vec<LayerBits>,
}

/// Reads and checks an image's header.
///
/// # Errors
/// If it is not a sound one.
pub fn inspect(path: &Path) -> Result<Summary, Error> {
    let opened = Opened::open(path)?;
    let image = opened.image()?;
    let Header { config, plan, provenance, text, .. } = *image.header();
    let records = image.sections().records();
    Ok(Summary {
        image_bytes: image.file_bytes(),
        name: provenance.name.into(),
        architecture: provenance.architecture.into(),
        packer: provenance.packer.into(),
        config,
        limits: plan.limits,
        recorded: plan.state.saturating_add(plan.scratch).saturating_add(plan.sampler),
        bos: text.bos,
        stop: text.stop.ids().into(),
        chat_template: text.chat_template.into(),
        tuning: image.header().tuning.into(),
        sections: records.iter().filter_map(SectionReport::of).collect(),
        places: records.iter().map(|r| (u64::from(r.start.get()) * Block::BYTES as u64, r.checksum.get())).collect(),
        layers: LayerBits::of(&image),
    })
}

const fn activation(activation: Activation) -> &'static str {
    match activation {
        Activation::SquaredRelu => "relu2",
        Activation::Silu => "silu",
    }
}

const fn rope(rope: Rope) -> &'static str {
    match rope {
        Rope::HalfSplit => "half_split",
        Rope::Interleaved => "interleaved",
    }
}

const fn quantizer(quantizer: Quantizer) -> &'static str {
    match quantizer {
        Quantizer::Int8 => "int8",
        Quantizer::Int4 => "int4",
        Quantizer::Int8LargestHalf => "int8_largest_half",
        Quantizer::Int4Absmax => "int4_absmax",
        Quantizer::Fp4 => "fp4",
        Quantizer::Int8Hadamard => "int8_hadamard",
        Quantizer::Int4Hadamard => "int4_hadamard",
    }
}

pub(crate) const fn kv(kv: KvFormat) -> &'static str {
    match kv {
        KvFormat::F32 => "f32",
        KvFormat::F16 => "f16",
        KvFormat::I8 => "i8",
    }
}

impl Summary {
    /// Everything, as one object. Sizes are in bytes, checksums hexadecimal.
    pub fn to_json(&self) -> Value {
        let c = &self.config;
        let plan = Plan::new(c, &self.limits);
        let sections = self.sections.iter().zip(&self.places).enumerate().map(|(index, (s, (start, checksum)))| {
            json!({
                "index": index,
                "kind": s.kind.name(),
                "layer": s.layer,
                "encoding": s.format_name(),
                "rows": s.rows,
                "cols": s.cols,
                "start": start,
                "bytes": s.bytes,
                "bits_per_weight": bits(s),
                "scale": s.scale.map(decimal),
                "checksum": format!("{checksum:016x}"),
            })
        });
        let layers = self
            .layers
            .iter()
            .map(|l| json!({"layer": l.layer, "weights": l.weights, "bits": l.bits, "bits_per_weight": l.average()}));
        json!({
            "version": VERSION,
            "image_bytes": self.image_bytes,
            "name": self.name,
            "architecture": self.architecture,
            "packer": self.packer,
            "config": {
                "vocab": c.vocab,
                "hidden": c.hidden,
                "ffn": c.ffn,
                "layers": c.layers,
                "heads": c.heads,
                "kv_heads": c.kv_heads,
                "head_dim": c.head_dim,
                "context": c.context,
                "norm_eps": decimal(c.norm_eps),
                "activation": activation(c.activation),
                "rope": rope(c.rope),
                "sub_norms": c.sub_norms,
                "qk_norms": c.qk_norms,
                "linear_norm_eps": c.linear_norm_eps.map(decimal),
                "live_ffn": c.live_ffn,
                "sparse": c.sparse,
                "window": c.window.map(|w| json!({ "positions": w.positions, "sinks": w.sinks })),
                "memory": c.memory.map(|memory| match memory {
                    Memory::Matrices(m) => json!({ "heads": m.heads, "key": m.key, "value": m.value }),
                    Memory::Vector(v) => json!({ "width": v.width }),
                    Memory::Shared => json!("shared"),
                }),
                "delayed_writes": c.delayed_writes,
                "recurrence": c.recurrence,
                "quantizers": {
                    "attention": quantizer(c.quantizers.attention),
                    "output": quantizer(c.quantizers.output),
                    "ffn": quantizer(c.quantizers.ffn),
                    "down": quantizer(c.quantizers.down),
                },
                "tied": c.tied,
                "linear_head": c.linear_head,
            },
            "text": {
                "tokenizer_bytes": self.tokenizer_bytes(),
                "bos": self.bos,
                "stop": self.stop,
                "chat_template": (!self.chat_template.is_empty()).then_some(&self.chat_template),
            },
            "plan": {
                "context": self.limits.context,
                "batch": self.limits.batch,
                "kv": kv(self.limits.kv),
                "state_bytes": plan.state * Block::BYTES,
                "scratch_bytes": plan.scratch * Block::BYTES,
                "sampler_bytes": plan.sampler * Block::BYTES,
                "total_bytes": plan.bytes(),
                "recorded_bytes": self.recorded_bytes(),
            },
            "tuning": self.tuning.lines().collect::<Vec<_>>(),
            "layers": layers.collect::<Vec<_>>(),
            "sections": sections.collect::<Vec<_>>(),
        })
    }

    /// Memory that the packer's version needs.
    const fn recorded_bytes(&self) -> u64 {
        self.recorded.saturating_mul(Block::BYTES as u64)
    }
    /// Bytes of the tokenizer, if the image has one.
    fn tokenizer_bytes(&self) -> Option<u32> {
        self.sections.iter().find(|s| s.kind == Kind::Tokenizer).map(|s| s.cols)
    }
}

/// The number that JSON should show: 1e-5, not what its f32 is exactly. It reads back as the same f32.
fn decimal(value: f32) -> f64 {
    value.to_string().parse().expect("a float's own spelling")
}

/// Bits a weight, padding and row scales included; of vectors, nothing.
fn bits(section: &SectionReport) -> Option<f64> {
    (section.weights() > 0).then(|| (section.bytes * 8) as f64 / section.weights() as f64)
}

impl fmt::Display for Summary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let c = &self.config;
        let yes = |yes| if yes { "yes" } else { "no" };
        let own = c.linear_norm_eps.map_or("no".into(), |eps| format!("yes, epsilon {eps:e}"));
        let tokenizer = self.tokenizer_bytes().map_or("none".into(), |n| format!("{n} bytes"));
        let bos = self.bos.map_or("none".into(), |id| id.to_string());
        let stop = self.stop.iter().map(u32::to_string).collect::<Vec<_>>().join(", ");
        let stop = if stop.is_empty() { "none" } else { &stop };
        let template = match self.chat_template.len() {
            0 => "none".into(),
            bytes => format!("{bytes} bytes"),
        };
        writeln!(f, "model         {} ({})", printable(&self.name), printable(&self.architecture))?;
        writeln!(f, "packed by     {}, image format {VERSION}", printable(&self.packer))?;
        writeln!(f, "width         {}, feed-forward {} ({})", c.hidden, c.ffn, activation(c.activation))?;
        writeln!(f, "layers        {}", c.layers)?;
        if c.recurrence {
            writeln!(
                f,
                "recurrence    {} numbers a layer in place of attention, for conversations without an end",
                c.hidden
            )?;
        } else {
            writeln!(f, "heads         {} of {}, sharing {} of keys and values", c.heads, c.head_dim, c.kv_heads)?;
            writeln!(f, "positions     {}, rotated {}", c.context, rope(c.rope).replace('_', "-"))?;
        }
        let head = if c.linear_head {
            "a ternary head with a norm of its input".into()
        } else {
            format!("head is the embedding too: {}", yes(c.tied))
        };
        writeln!(f, "vocabulary    {}, {head}", c.vocab)?;
        if let Some(window) = c.window {
            writeln!(f, "window        the last {} positions and the first {}", window.positions, window.sinks)?;
        }
        let written = if c.delayed_writes { ", of what has left the window" } else { "" };
        match c.memory {
            Some(Memory::Matrices(m)) => {
                writeln!(f, "memory        {} heads of {} values by {} keys{written}", m.heads, m.value, m.key)?;
            }
            Some(Memory::Vector(v)) => writeln!(f, "memory        a vector of {}{written}", v.width)?,
            Some(Memory::Shared) => writeln!(f, "memory        by attention's keys and values{written}")?,
            None => {}
        }
        let quantizers =
            [c.quantizers.attention, c.quantizers.output, c.quantizers.ffn, c.quantizers.down].map(quantizer);
        if c.quantizers != Quantizers::INT8 {
            let [attention, output, ffn, down] = quantizers;
            writeln!(f, "activations   attention {attention}, output {output}, feed-forward {ffn}, down {down}")?;
        }
        let (sub, heads) = (yes(c.sub_norms), yes(c.qk_norms));
        writeln!(
            f,
            "norms         epsilon {:e}, sub-norms: {sub}, of heads: {heads}, own of linears: {own}",
            c.norm_eps
        )?;
        writeln!(
            f,
            "text          tokenizer {tokenizer}, first token {bos}, stop tokens {stop}, chat template {template}"
        )?;
        self.tuning.lines().try_for_each(|line| writeln!(f, "tuning        {}", printable(line)))?;
        writeln!(f)?;
        self.table(f)?;
        writeln!(f)?;
        totals(f, self.image_bytes, &self.layers, c, &self.limits)?;
        if self.recorded_bytes() != Plan::new(c, &self.limits).bytes() {
            let recorded = size(self.recorded_bytes());
            writeln!(f, "         the version that packed it needs {recorded}: this one goes by its own number")?;
        }
        Ok(())
    }
}

impl Summary {
    /// One line a section.
    fn table(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "{:>5}  {:<18} {:>5}  {:<8} {:>13} {:>13} {:>12} {:>7} {:>11}  checksum",
            "index", "section", "layer", "encoding", "shape", "start", "bytes", "bits", "scale"
        )?;
        for (index, (s, (start, checksum))) in self.sections.iter().zip(&self.places).enumerate() {
            let layer = s.layer.map_or("-".into(), |l| l.to_string());
            let shape = if s.weights() > 0 { format!("{}x{}", s.rows, s.cols) } else { s.cols.to_string() };
            let bits = bits(s).map_or("-".into(), |b| format!("{b:.3}"));
            let scale = match s.scale {
                Some(scale) => format!("{scale:.4e}"),
                None if matches!(s.encoding, Encoding::Matrix(format) if format.has_row_scales()) => "one a row".into(),
                None => "-".into(),
            };
            writeln!(
                f,
                "{index:>5}  {:<18} {layer:>5}  {:<8} {shape:>13} {start:>13} {:>12} {bits:>7} {scale:>11}  {checksum:016x}",
                s.kind.name(),
                s.format_name(),
                s.bytes,
            )?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Options, Preset, dummy};

    #[test]
    fn a_person_and_a_program_are_told_the_same() {
        let place = tempfile::tempdir().unwrap();
        let path = place.path().join("image.bitnet");
        let options = Options { name: Some("tiny\x1b[31m".into()), ..Options::default() };
        dummy(&path, &Preset::Tiny.shape(), &options, 1, &mut ()).unwrap();
        let summary = inspect(&path).unwrap();
        let json = summary.to_json();
        let text = summary.to_string();
        assert!(!text.contains('\x1b'), "a name cannot colour the terminal");
        let sections = json["sections"].as_array().unwrap();
        assert_eq!(sections.len(), summary.sections.len());
        for section in sections {
            let checksum = section["checksum"].as_str().unwrap();
            let line =
                text.lines().find(|line| line.ends_with(checksum) && line.contains(section["kind"].as_str().unwrap()));
            assert!(line.is_some(), "{section}");
        }
        // Each section starts where the one before it ends, and the last one ends the file.
        let number = |section: &Value, key: &str| section[key].as_u64().unwrap();
        for pair in sections.windows(2) {
            assert_eq!(number(&pair[0], "start") + number(&pair[0], "bytes"), number(&pair[1], "start"));
        }
        let last = sections.last().unwrap();
        assert_eq!(number(last, "start") + number(last, "bytes"), json["image_bytes"].as_u64().unwrap());
        assert_eq!(json["config"]["norm_eps"], 1e-5);
        assert_eq!(json["config"]["activation"], "relu2");
        assert_eq!(json["text"]["tokenizer_bytes"], Value::Null);
        assert_eq!(json["plan"]["total_bytes"], Plan::new(&summary.config, &summary.limits).bytes());
    }
}
