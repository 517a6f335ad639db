//! An image becomes a GGUF file that llama.cpp reads, so that models packed here can be run and compared there.
//!
//! Ternary weights stay what they are. Their scale is beside them (`.scale`) in BitNet's architectures, bit for bit; elsewhere
//! it is in each block, rounded to half precision, and a note says so. What has eight bits or fewer keeps its integers in
//! Q8_0. Linears without their rows, columns or blocks of zeros get them back.
mod text;

use crate::checkpoint::rope::{Scaling, frequencies};
use crate::report::{Progress, size};
use crate::verify::Opened;
use crate::weights::{Unit, Whole, vector};
use crate::write::{Replaces, replaceable};
use crate::{Error, verify};
use bitnet_kernel::Format;
use bitnet_runtime::Image;
use bitnet_runtime::image::{Encoding, Kind, Record};
use bitnet_runtime::model::{Activation, Config, Quantizers, Rope};
use core::fmt;
use half::f16;
use std::io::{BufWriter, Write};
use std::path::Path;

/// How ternary weights are stored.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Ternary {
    /// TQ2_0: 2.06 bits a weight, the faster.
    #[default]
    Two,
    /// TQ1_0: 1.69 bits a weight.
    Five,
}

/// What was written.
#[derive(Clone, Debug)]
pub struct Exported {
    /// GGUF's name of the architecture.
    pub architecture: &'static str,
    /// Length of the file.
    pub bytes: u64,
    /// Tensors.
    pub tensors: usize,
    /// What a person should know.
    pub notes: Vec<String>,
}

/// GGUF's element types that are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Type {
    F32 = 0,
    F16 = 1,
    Q8_0 = 8,
    Tq1 = 34,
    Tq2 = 35,
}

impl Type {
    /// Elements and bytes of a block.
    const fn block(self) -> (u64, u64) {
        match self {
            Self::F32 => (1, 4),
            Self::F16 => (1, 2),
            Self::Q8_0 => (32, 34),
            Self::Tq1 => (256, 54),
            Self::Tq2 => (256, 66),
        }
    }
}

/// A tensor to be written.
struct Planned<'a> {
    name: String,
    kind: Type,
    /// Columns, then rows.
    shape: Vec<u64>,
    from: From<'a>,
}

enum From<'a> {
    Vector(&'a Record),
    Values(Vec<f32>),
    /// A matrix; whether its one scale is in a tensor beside it; the width of heads whose rows are put in the other order.
    Matrix(Whole, Beside, Option<usize>),
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Beside {
    Scale,
    Nothing,
}

impl Planned<'_> {
    fn bytes(&self) -> u64 {
        let (elements, bytes) = self.kind.block();
        self.shape.iter().product::<u64>() / elements * bytes
    }
}

/// Where tensors start, and the default of every reader.
const ALIGNMENT: u64 = 32;

/// Writes `image` as the GGUF file `output`.
///
/// # Errors
/// If the image is not sound, or has what GGUF's architectures have not. Then nothing is there under the name `output` that
/// was not there before.
pub fn export(image: &Path, output: &Path, ternary: Ternary, progress: &mut dyn Progress) -> Result<Exported, Error> {
    verify::verify_with(image, progress)?;
    replaceable(output, Replaces::Gguf)?;
    let opened = Opened::open(image)?;
    let checked = opened.image()?;
    let config = &checked.header().config;
    let architecture = architecture(config)?;
    let mut notes = Vec::new();
    let tensors = plan(&opened, &checked, architecture, ternary, &mut notes)?;
    let mut keys = Keys::default();
    model_keys(&mut keys, &checked, architecture, ternary);
    rotation(&mut keys, &opened, &checked, architecture)?;
    text::keys(&mut keys, &opened, &checked, &mut notes)?;
    let header = header(&keys, &tensors);

    let directory = output.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let failed = |e| Error::io(output, "write", e);
    let temporary = tempfile::NamedTempFile::new_in(directory).map_err(|e| Error::io(output, "create", e))?;
    let mut out = Out { inner: BufWriter::new(temporary.as_file()), bytes: 0 };
    progress.start(tensors.iter().map(Planned::bytes).sum());
    out.put(&header).and_then(|()| out.pad()).map_err(failed)?;
    for tensor in &tensors {
        progress.section(&tensor.name);
        write(&opened, tensor, &mut |bytes| {
            if progress.cancelled() {
                return Err(Error::Interrupted);
            }
            progress.advance(bytes.len() as u64);
            out.put(bytes).map_err(failed)
        })?;
        out.pad().map_err(failed)?;
    }
    let bytes = out.bytes;
    out.inner.flush().map_err(failed)?;
    drop(out);
    temporary.as_file().sync_all().map_err(failed)?;
    temporary.persist(output).map_err(|e| Error::io(output, "create", e.error))?;
    Ok(Exported { architecture, bytes, tensors: tensors.len(), notes })
}

struct Out<W> {
    inner: W,
    bytes: u64,
}

impl<W: Write> Out<W> {
    fn put(&mut self, bytes: &[u8]) -> std::io::Result<()> {
        self.bytes += bytes.len() as u64;
        self.inner.write_all(bytes)
    }
    fn pad(&mut self) -> std::io::Result<()> {
        let missing = self.bytes.next_multiple_of(ALIGNMENT) - self.bytes;
        self.put(&[0; ALIGNMENT as usize][..missing as usize])
    }
}

fn refuse<T>(what: &str) -> Result<T, Error> {
    Err(Error::Options(format!("cannot be exported: {what}")))
}

/// The architecture that computes what the image does.
fn architecture(c: &Config) -> Result<&'static str, Error> {
    if c.split_head {
        return refuse("the head is in two planes; pack the model with another --head");
    }
    if c.live_ffn {
        return refuse("up and down are stored for --live-ffn; pack the model without it");
    }
    if c.memory.is_some() {
        return refuse("it has a memory beside attention, which no architecture of GGUF has");
    }
    if c.window.is_some() {
        return refuse("its attention sees a window and the first positions, which no architecture of GGUF does");
    }
    if c.quantizers != Quantizers::INT8 {
        return refuse(
            "its activations have four bits, or half of them are left out, which no architecture of GGUF does",
        );
    }
    if c.linear_norm_eps.is_some() {
        return refuse("its linears have norms of their own, which no architecture of GGUF has");
    }
    match (c.sub_norms, c.qk_norms, c.activation, c.rope) {
        (true, false, Activation::SquaredRelu, Rope::HalfSplit) => Ok("bitnet-b1.58"),
        (true, false, Activation::Silu, Rope::HalfSplit) => Ok("bitnet"),
        (false, false, Activation::Silu, _) => Ok("llama"),
        (false, true, Activation::Silu, Rope::HalfSplit) => Ok("qwen3"),
        _ => refuse("no architecture of GGUF has these norms, this activation and this rotation together"),
    }
}

/// The tensor that a section becomes.
fn name(kind: Kind, layer: Option<u32>) -> Option<String> {
    let part = match kind {
        Kind::Embedding => return Some("token_embd.weight".into()),
        Kind::Head => return Some("output.weight".into()),
        Kind::FinalNorm => return Some("output_norm.weight".into()),
        Kind::AttentionNorm => "attn_norm",
        Kind::Query => "attn_q",
        Kind::Key => "attn_k",
        Kind::Value => "attn_v",
        Kind::AttentionSubNorm => "attn_sub_norm",
        Kind::Output => "attn_output",
        Kind::FfnNorm => "ffn_norm",
        Kind::Gate => "ffn_gate",
        Kind::Up => "ffn_up",
        Kind::FfnSubNorm => "ffn_sub_norm",
        Kind::Down => "ffn_down",
        Kind::QueryNorm => "attn_q_norm",
        Kind::KeyNorm => "attn_k_norm",
        _ => return None,
    };
    Some(format!("blk.{}.{part}.weight", layer?))
}

/// The type of a matrix, the smallest that has room for its weights.
fn kind_of(tensor: &Whole, ternary: Ternary) -> Type {
    let (cols, f) = (tensor.cols as usize, tensor.format);
    let has_three = matches!(f, Format::T2 | Format::TL | Format::B1);
    match () {
        () if has_three && cols.is_multiple_of(256) && ternary == Ternary::Five => Type::Tq1,
        () if has_three && cols.is_multiple_of(256) => Type::Tq2,
        () if f != Format::F16 && cols.is_multiple_of(32) => Type::Q8_0,
        () => Type::F16,
    }
}

fn plan<'a>(
    opened: &Opened,
    image: &Image<'a>,
    architecture: &str,
    ternary: Ternary,
    notes: &mut Vec<String>,
) -> Result<Vec<Planned<'a>>, Error> {
    let config = image.header().config;
    let bitnet = architecture.starts_with("bitnet");
    let mut tensors = Vec::new();
    let mut rounded = 0;
    for record in image.sections().records() {
        let Some(kind) = crate::report::kind(record.kind) else { continue };
        let layer = (record.layer.get() != Record::NO_LAYER).then(|| record.layer.get().into());
        // A head that is the embedding too has one tensor, that of the embedding.
        let named = if kind == Kind::Head && config.tied { Kind::Embedding } else { kind };
        let Some(name) = name(named, layer) else { continue };
        let Some(tensor) = Whole::of(opened, image, record)? else {
            if Encoding::from_tag(record.encoding) == Some(Encoding::Vector) {
                let from = From::Vector(record);
                tensors.push(Planned { name, kind: Type::F32, shape: vec![record.cols.get().into()], from });
            }
            continue;
        };
        let shape = vec![tensor.cols.into(), tensor.rows.into()];
        // llama.cpp turns pairs of neighbours in this architecture, and halves in the others.
        let turned = architecture == "llama" && config.rope == Rope::HalfSplit;
        let heads = (turned && matches!(kind, Kind::Query | Kind::Key)).then_some(config.head_dim as usize);
        let beside = if bitnet && tensor.format.has_matrix_scale() { Beside::Scale } else { Beside::Nothing };
        if beside == Beside::Scale {
            let from = From::Values(vec![tensor.scale]);
            let name = name.replace(".weight", ".scale");
            tensors.push(Planned { name, kind: Type::F32, shape: vec![1], from });
        }
        let kind = kind_of(&tensor, ternary);
        // Scales of groups have half precision already.
        let is_exact = beside == Beside::Scale || (tensor.format.is_grouped() && kind != Type::F16);
        rounded += usize::from(!is_exact && tensor.format != Format::F16);
        tensors.push(Planned { name, kind, shape, from: From::Matrix(tensor, beside, heads) });
    }
    if let Some(factors) = factors(opened, image)?.1 {
        let shape = vec![factors.len() as u64];
        tensors.push(Planned { name: "rope_freqs.weight".into(), kind: Type::F32, shape, from: From::Values(factors) });
    }
    if rounded > 0 {
        notes.push(format!("the scales of {rounded} matrices are rounded to half precision, or their weights are"));
    }
    Ok(tensors)
}

/// The base of the angles, and what they are divided by, if they do not follow from it.
fn factors(opened: &Opened, image: &Image<'_>) -> Result<(f64, Option<Vec<f32>>), Error> {
    let head_dim = image.header().config.head_dim;
    let record = image.sections().find(Kind::RopeFrequencies, None).expect("a checked image has angles");
    let angles = vector(opened, record)?;
    // The second angle tells the base, but for rounding: the one near it that gives all angles bit for bit is the right one.
    let second = angles.get(1).map_or(1e4, |&f| f64::from(f).powf(-f64::from(head_dim) / 2.0));
    let near = (second * 2e-5).ceil().clamp(1.0, 1e3) as i64;
    let bases = [1e4, 5e5, 1e6].into_iter().chain((-near..=near).map(|d| (second.round() as i64 + d) as f64));
    let exact = |theta: &f64| *theta > 0.0 && frequencies(*theta, head_dim, Scaling::None) == angles;
    if let Some(theta) = bases.into_iter().find(exact) {
        return Ok((theta, None));
    }
    // Scaled ones: the first are never scaled where only long waves are, so factors say the rest.
    let theta = second.round();
    let plain = frequencies(theta, head_dim, Scaling::None);
    Ok((theta, Some(plain.iter().zip(&angles).map(|(plain, angle)| plain / angle).collect())))
}

fn rotation(keys: &mut Keys, opened: &Opened, image: &Image<'_>, architecture: &str) -> Result<(), Error> {
    let (theta, _) = factors(opened, image)?;
    keys.f32(&format!("{architecture}.rope.freq_base"), theta as f32);
    Ok(())
}

/// Keys in the order in which they are written.
#[derive(Default)]
struct Keys {
    count: u64,
    bytes: Vec<u8>,
}

impl Keys {
    fn string(&mut self, text: &[u8]) {
        self.bytes.extend((text.len() as u64).to_le_bytes());
        self.bytes.extend(text);
    }
    fn key(&mut self, key: &str, tag: u32) {
        self.count += 1;
        self.string(key.as_bytes());
        self.bytes.extend(tag.to_le_bytes());
    }
    fn u32(&mut self, key: &str, value: u32) {
        self.key(key, 4);
        self.bytes.extend(value.to_le_bytes());
    }
    fn f32(&mut self, key: &str, value: f32) {
        self.key(key, 6);
        self.bytes.extend(value.to_le_bytes());
    }
    fn bool(&mut self, key: &str, value: bool) {
        self.key(key, 7);
        self.bytes.push(value.into());
    }
    fn text(&mut self, key: &str, value: &str) {
        self.key(key, 8);
        self.string(value.as_bytes());
    }
    fn array(&mut self, key: &str, tag: u32, count: usize) {
        self.key(key, 9);
        self.bytes.extend(tag.to_le_bytes());
        self.bytes.extend((count as u64).to_le_bytes());
    }
    fn texts(&mut self, key: &str, values: &[String]) {
        self.array(key, 8, values.len());
        values.iter().for_each(|value| self.string(value.as_bytes()));
    }
    fn f32s(&mut self, key: &str, values: &[f32]) {
        self.array(key, 6, values.len());
        self.bytes.extend(values.iter().flat_map(|v| v.to_le_bytes()));
    }
    fn i32s(&mut self, key: &str, values: &[i32]) {
        self.array(key, 5, values.len());
        self.bytes.extend(values.iter().flat_map(|v| v.to_le_bytes()));
    }
}

fn model_keys(keys: &mut Keys, image: &Image<'_>, architecture: &str, ternary: Ternary) {
    let (c, name) = (&image.header().config, image.header().provenance.name);
    keys.text("general.architecture", architecture);
    keys.text("general.name", name);
    // llama.cpp's numbers of mostly TQ1_0 and mostly TQ2_0.
    keys.u32("general.file_type", if ternary == Ternary::Five { 36 } else { 37 });
    keys.u32("general.quantization_version", 2);
    for (key, value) in [
        ("block_count", c.layers),
        ("context_length", c.context),
        ("embedding_length", c.hidden),
        ("feed_forward_length", c.ffn),
        ("attention.head_count", c.heads),
        ("attention.head_count_kv", c.kv_heads),
        ("attention.key_length", c.head_dim),
        ("attention.value_length", c.head_dim),
        ("rope.dimension_count", c.head_dim),
        ("vocab_size", c.vocab),
    ] {
        keys.u32(&format!("{architecture}.{key}"), value);
    }
    keys.f32(&format!("{architecture}.attention.layer_norm_rms_epsilon"), c.norm_eps);
}

fn header(keys: &Keys, tensors: &[Planned<'_>]) -> Vec<u8> {
    const VERSION: u32 = 3;
    let mut file = b"GGUF".to_vec();
    file.extend(VERSION.to_le_bytes());
    file.extend((tensors.len() as u64).to_le_bytes());
    file.extend(keys.count.to_le_bytes());
    file.extend(&keys.bytes);
    let mut end = 0u64;
    for tensor in tensors {
        file.extend((tensor.name.len() as u64).to_le_bytes());
        file.extend(tensor.name.as_bytes());
        file.extend((tensor.shape.len() as u32).to_le_bytes());
        file.extend(tensor.shape.iter().flat_map(|d| d.to_le_bytes()));
        file.extend((tensor.kind as u32).to_le_bytes());
        file.extend(end.to_le_bytes());
        end += tensor.bytes().next_multiple_of(ALIGNMENT);
    }
    file
}

/// Gives a tensor's bytes to `put`, a row or more at a time.
fn write(opened: &Opened, tensor: &Planned<'_>, put: &mut dyn FnMut(&[u8]) -> Result<(), Error>) -> Result<(), Error> {
    let floats = |values: &[f32]| values.iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<u8>>();
    match &tensor.from {
        From::Vector(record) => put(&floats(&vector(opened, record)?)),
        From::Values(values) => put(&floats(values)),
        From::Matrix(matrix, beside, heads) => {
            let mut rows: Vec<Vec<u8>> = Vec::new();
            for u in 0..matrix.units() {
                let unit = matrix.unit(opened, u)?;
                for r in 0..unit.rows {
                    let bytes = row(&unit, r, tensor.kind, *beside);
                    if heads.is_some() { rows.push(bytes) } else { put(&bytes)? }
                }
            }
            // Row 2i of a head was row i, and row 2i + 1 was in the other half.
            let Some(head) = heads else { return Ok(()) };
            (0..rows.len()).try_for_each(|at| {
                let (start, i) = (at / head * head, at % head);
                put(&rows[start + i / 2 + i % 2 * (head / 2)])
            })
        }
    }
}

fn row(unit: &Unit, r: usize, kind: Type, beside: Beside) -> Vec<u8> {
    let half = |v: f32| f16::from_f32(v).to_le_bytes();
    if kind == Type::F16 {
        let values = unit.values(r);
        // A scale beside the weights is not in them too.
        let scale = if beside == Beside::Scale { unit.row_scales(r)[0] } else { 1.0 };
        return values.iter().flat_map(|v| half(v / scale)).collect();
    }
    let (codes, scales) = (unit.row(r), unit.row_scales(r));
    let block = kind.block().0 as usize;
    let mut bytes = Vec::new();
    for (i, codes) in codes.chunks(block).enumerate() {
        let scale = match (beside, scales) {
            (Beside::Scale, _) => 1.0,
            (_, [scale]) => *scale,
            _ => scales[i * block / Format::GROUP_COLS],
        };
        match kind {
            Type::Q8_0 => {
                bytes.extend(half(scale));
                bytes.extend(codes.iter().map(|&w| w as u8));
            }
            Type::Tq2 => {
                tq2(codes, &mut bytes);
                bytes.extend(half(scale));
            }
            _ => {
                tq1(codes, &mut bytes);
                bytes.extend(half(scale));
            }
        }
    }
    bytes
}

/// Two bits a weight: in each half of 128, byte `p` has the weights `p`, `p + 32`, `p + 64` and `p + 96`, the first lowest.
fn tq2(codes: &[i8], bytes: &mut Vec<u8>) {
    for half in codes.chunks(128) {
        bytes.extend((0..32).map(|p| (0..4).fold(0, |byte, j| byte | ((half[p + 32 * j] + 1) as u8) << (2 * j))));
    }
}

/// Five weights a byte, as a fraction of 3⁵ rounded up; the last sixteen four a byte.
fn tq1(codes: &[i8], bytes: &mut Vec<u8>) {
    for (start, stride, digits) in [(0, 32, 5), (160, 16, 5), (240, 4, 4)] {
        bytes.extend((0..stride).map(|p| {
            let number = (0..5).fold(0u32, |n, j| {
                let digit = if j < digits { (codes[start + p + j * stride] + 1) as u32 } else { 0 };
                3 * n + digit
            });
            (256 * number).div_ceil(243) as u8
        }));
    }
}

impl fmt::Display for Exported {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.notes.iter().try_for_each(|note| writeln!(f, "  {note}"))?;
        writeln!(f, "{} tensors, {}, architecture {}", self.tensors, size(self.bytes), self.architecture)
    }
}
