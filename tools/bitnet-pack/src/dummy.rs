//! Images of given shapes with pseudo-random weights, for benchmarks without a download.
//!
//! Their speed and memory are those of a trained model of the same shape; their tokens are noise. A few MiB of random units
//! are encoded and written again and again in random order: read from the image, one copy costs as much as another.
use crate::Error;
use crate::encode::{encode, encode_f16, encode_grouped};
use crate::pack::{Options, PROGRAM_BYTES};
use crate::report::{LayerBits, Progress, Report, SectionReport};
use crate::split;
use crate::tokenizer;
use crate::verify::{Opened, verify_with};
use crate::write::{BUFFER_BYTES, ImageWriter, Layout, Parts};
use bitnet_kernel::{Block, Format, Matrix};
use bitnet_runtime::Config;
use bitnet_runtime::image::split::{COLUMNS, Columns, norm};
use bitnet_runtime::image::{Encoding, Kind, Section, StopIds, UNIT_ROWS, expected_sections};
use bitnet_runtime::model::{Activation, Quantizers, Rope};
use half::f16;
use std::path::Path;
use zerocopy::IntoBytes;

/// Shapes of known models.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Preset {
    /// BitNet b1.58 2B-4T.
    B2B4T,
    /// bitnet_b1_58-3B.
    B3B,
    /// Llama3-8B-1.58.
    B8B,
    /// SmolLM 135M.
    B135M,
    /// 75 million ternary weights and a vocabulary of 32,000: small enough that what is not a matrix shows.
    Small,
    /// Nothing but small.
    Tiny,
}

impl Preset {
    /// All of them, as options spell them.
    pub const ALL: [(&'static str, Self); 6] = [
        ("2b4t", Self::B2B4T),
        ("3b", Self::B3B),
        ("8b", Self::B8B),
        ("135m", Self::B135M),
        ("small", Self::Small),
        ("tiny", Self::Tiny),
    ];

    /// As options spell it.
    pub fn name(self) -> &'static str {
        Self::ALL.iter().find(|(_, p)| *p == self).expect("all are listed").0
    }
    /// Its shape.
    pub fn shape(self) -> Shape {
        let bitnet = Config {
            vocab: 128_256,
            hidden: 2560,
            ffn: 6912,
            layers: 30,
            heads: 20,
            kv_heads: 5,
            head_dim: 128,
            context: 4096,
            norm_eps: 1e-5,
            activation: Activation::SquaredRelu,
            rope: Rope::HalfSplit,
            sub_norms: true,
            qk_norms: false,
            linear_norm_eps: None,
            live_ffn: false,
            sparse: false,
            window: None,
            memory: None,
            delayed_writes: false,
            recurrence: false,
            quantizers: Quantizers::INT8,
            tied: true,
            linear_head: false,
            split_head: false,
            formats: 1 << Format::TL as u8,
        };
        let llama = Config { activation: Activation::Silu, sub_norms: false, ..bitnet };
        let heads = |c: Config, heads, kv_heads, head_dim| Config { heads, kv_heads, head_dim, ..c };
        let size = |c: Config, vocab, hidden, ffn, layers, context| Config { vocab, hidden, ffn, layers, context, ..c };
        let (config, theta) = match self {
            Self::B2B4T => (bitnet, 500_000.0),
            Self::B3B => {
                let c = heads(size(bitnet, 32_002, 3200, 8640, 26, 2048), 32, 32, 100);
                (Config { activation: Activation::Silu, ..c }, 10_000.0)
            }
            Self::B8B => {
                let c = heads(size(llama, 128_256, 4096, 14_336, 32, 8192), 32, 8, 128);
                (Config { tied: false, ..c }, 500_000.0)
            }
            Self::B135M => (heads(size(llama, 49_152, 576, 1536, 30, 2048), 9, 3, 64), 10_000.0),
            Self::Small => (heads(size(llama, 32_000, 768, 2048, 12, 2048), 12, 4, 64), 10_000.0),
            Self::Tiny => (heads(size(bitnet, 320, 256, 512, 2, 256), 4, 2, 64), 10_000.0),
        };
        Shape { name: format!("dummy-{}", self.name()), config, theta }
    }
}

/// What to make.
#[derive(Clone, Debug)]
pub struct Shape {
    /// A name for people.
    pub name: String,
    /// The model. `formats` is set from the options.
    pub config: Config,
    /// The base of the rotary frequencies.
    pub theta: f64,
}

/// Writes an image of `shape` as `output`. The same seed gives the same bytes. It has the tokenizer of the
/// options, or none, which may have fewer tokens than the model: the others are no text.
///
/// # Errors
/// If the shape is beyond the format's limits, the tokenizer cannot be read or has tokens that the model has not, or the system
/// refuses.
pub fn dummy(
    output: &Path,
    shape: &Shape,
    options: &Options,
    seed: u64,
    progress: &mut dyn Progress,
) -> Result<Report, Error> {
    options.check()?;
    let config = options.stored(shape.config);
    config.check().map_err(|e| Error::Options(e.to_string()))?;
    let limits = options.limits(&config)?;
    let parts = Parts {
        tuning: String::new(),
        config,
        limits,
        name: options.name.clone().unwrap_or_else(|| shape.name.clone()),
        architecture: ARCHITECTURE.into(),
        bos: None,
        stop: StopIds::default(),
        chat_template: String::new(),
    };
    let name = parts.name.clone();
    let sections = expected_sections(&parts.config).map(|section| {
        let encoding = options.encoding(section.kind);
        (section, encoding, encoding.blocks(section.rows, section.cols))
    });
    let tokenizer = options.tokenizer.as_deref().map(|path| tokenizer::from_file(path, config.vocab)).transpose()?;
    let layout = Layout::new(&parts, tokenizer.as_ref().map(Vec::len), sections)?;
    let image_bytes = layout.file_bytes();
    let peak_bytes = peak(&config, options);
    progress.say(&format!("peak memory: {} MiB", peak_bytes.div_ceil(1 << 20)));
    progress.start(image_bytes);
    let mut writer = ImageWriter::create(output, parts, layout)?;
    if let Some(tokenizer) = &tokenizer {
        writer.begin(1.0)?;
        writer.put(tokenizer)?;
        writer.end()?;
    }
    let mut maker =
        Maker { writer: &mut writer, progress, random: Random(seed), pools: Vec::new(), live_ffn: config.live_ffn };
    for section in expected_sections(&config) {
        match section.kind {
            Kind::Head | Kind::HeadColumns | Kind::HeadApart | Kind::HeadNorms | Kind::HeadLow if config.split_head => {
                maker.split_head(&section, &config)?;
            }
            _ => maker.section(&section, options.encoding(section.kind), shape.theta)?,
        }
    }
    drop(maker);
    let finished = writer.finish()?;
    verify_with(finished.path(), progress)?;
    let opened = Opened::open(finished.path())?;
    let image = opened.image()?;
    let sections = image.sections().records().iter().filter_map(SectionReport::of).collect();
    let layers = LayerBits::of(&image);
    finished.publish()?;
    let notes = vec![format!("random weights from seed {seed}: true in speed and memory; the tokens are noise")];
    let architecture = ARCHITECTURE.into();
    Ok(Report {
        name,
        architecture,
        config,
        limits,
        image_bytes,
        peak_bytes,
        sections,
        layers,
        notes,
        adapted: None,
        pruned: None,
        reordered: None,
        tuning: None,
    })
}

/// In place of a checkpoint's class.
const ARCHITECTURE: &str = "dummy";

/// The most memory that it will take: all pools, one unit while it is made, and what the packer has anyway.
fn peak(config: &Config, options: &Options) -> u64 {
    let (mut shapes, mut pools, mut largest) = (Vec::new(), 0, 0);
    for section in expected_sections(config) {
        let Encoding::Matrix(format) = options.encoding(section.kind) else { continue };
        let (rows, cols) = (section.rows as usize, section.cols as usize);
        for rows in [UNIT_ROWS.min(rows), rows % UNIT_ROWS] {
            if rows == 0 || shapes.contains(&(format, rows, cols)) {
                continue;
            }
            shapes.push((format, rows, cols));
            pools += pool_units(format, rows, cols) * format.matrix_blocks(rows, cols) * Block::BYTES;
            // Codes of a byte, or half-precision floats.
            largest = largest.max(rows * format.padded_cols(cols) * if format == Format::F16 { 2 } else { 1 });
        }
    }
    PROGRAM_BYTES + (pools + largest + 2 * BUFFER_BYTES) as u64
}

/// SplitMix64.
pub(crate) struct Random(pub(crate) u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ self.0 >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ z >> 31
    }
    /// Evenly within `0..n`.
    fn below(&mut self, n: usize) -> usize {
        ((u128::from(self.next()) * n as u128) >> 64) as usize
    }
    /// Evenly within 0 and 1.
    fn fraction(&mut self) -> f32 {
        (self.next() >> 40) as f32 / (1 << 24) as f32
    }
    /// Nearly normal, of mean 0 and deviation 1: the sum of twelve fractions.
    pub(crate) fn normal(&mut self) -> f32 {
        (0..12).map(|_| self.fraction()).sum::<f32>() - 6.0
    }
    /// Evenly within `low..=high`.
    pub(crate) fn within(&mut self, low: i8, high: i8) -> i8 {
        (i32::from(low) + self.below((i32::from(high) - i32::from(low) + 1) as usize) as i32) as i8
    }
}

/// Random units of one shape.
struct Pool {
    format: Format,
    rows: usize,
    cols: usize,
    dead: bool,
    units: Vec<Vec<Block>>,
}

impl Pool {
    /// Of each unit, the norms of its rows.
    fn norms(&self) -> Vec<Vec<u16>> {
        let of = |unit: &Vec<Block>| {
            let w = Matrix::new(self.format, self.rows, self.cols, unit).expect("a unit");
            let row = |r| (0..self.cols).map(|c| w.weight(r, c)).collect::<Vec<_>>();
            (0..self.rows).map(|r| norm(&row(r)) as u16).collect()
        };
        self.units.iter().map(of).collect()
    }
}

/// Units in a pool: 6 MiB of them, within 4 and 64.
fn pool_units(format: Format, rows: usize, cols: usize) -> usize {
    const POOL_BYTES: usize = 6 << 20;
    let unit_bytes = format.matrix_blocks(rows, cols) * Block::BYTES;
    (POOL_BYTES / unit_bytes.max(1)).clamp(4, 64)
}

/// Appends to the open section and says so, unless the user has ended it.
fn put(writer: &mut ImageWriter, progress: &mut dyn Progress, bytes: &[u8]) -> Result<(), Error> {
    if progress.cancelled() {
        return Err(Error::Interrupted);
    }
    writer.put(bytes)?;
    progress.advance(bytes.len() as u64);
    Ok(())
}

struct Maker<'a> {
    writer: &'a mut ImageWriter,
    progress: &'a mut dyn Progress,
    random: Random,
    pools: Vec<Pool>,
    live_ffn: bool,
}

impl Maker<'_> {
    fn section(&mut self, section: &Section, encoding: Encoding, theta: f64) -> Result<(), Error> {
        match section.layer {
            Some(layer) => self.progress.section(&format!("layer {layer}: {}", section.kind.name())),
            None => self.progress.section(section.kind.name()),
        }
        let cols = section.cols as usize;
        match encoding {
            Encoding::Matrix(format) => self.matrix(section, format)?,
            _ => {
                let values = match section.kind {
                    Kind::RopeFrequencies => {
                        use crate::checkpoint::rope::{Scaling, frequencies};
                        frequencies(theta, section.cols * 2, Scaling::None)
                    }
                    _ => vec![1.0; cols],
                };
                self.writer.begin(1.0)?;
                put(self.writer, self.progress, values.as_bytes())?;
            }
        }
        self.writer.end()
    }

    fn matrix(&mut self, section: &Section, format: Format) -> Result<(), Error> {
        let (rows, cols) = (section.rows as usize, section.cols as usize);
        let scale = scale(format, cols);
        self.writer.begin(if format.has_matrix_scale() { scale } else { 1.0 })?;
        let dead = self.live_ffn && section.kind == Kind::Gate;
        let full = self.pool((format, UNIT_ROWS.min(rows), cols), dead, scale);
        let last = self.pool((format, rows % UNIT_ROWS, cols), dead, scale);
        for u in 0..rows.div_ceil(UNIT_ROWS) {
            let unit_rows = UNIT_ROWS.min(rows - u * UNIT_ROWS);
            let units = &self.pools[if unit_rows == UNIT_ROWS { full } else { last }].units;
            let unit = units[self.random.below(units.len())].as_bytes();
            put(self.writer, self.progress, unit)?;
            if format.has_row_scales() {
                let mut scales = [0.0; UNIT_ROWS];
                // Each row its own, so that the rows of two copies of a unit differ and no two tokens score the same.
                scales[..unit_rows].fill_with(|| scale * (0.5 + self.random.fraction()));
                put(self.writer, self.progress, scales[..unit_rows.next_multiple_of(16)].as_bytes())?;
            }
        }
        Ok(())
    }

    /// A section of a head in two planes. Both take their units from one pool; the low plane in an order that the norms know.
    fn split_head(&mut self, section: &Section, config: &Config) -> Result<(), Error> {
        self.progress.section(section.kind.name());
        self.writer.begin(1.0)?;
        let (vocab, cols) = (config.vocab as usize, config.hidden as usize);
        if section.kind == Kind::HeadColumns {
            let columns = Columns::new(core::array::from_fn(|i| i.min(cols) as u32));
            put(self.writer, self.progress, columns.to_floats().as_bytes())?;
            return self.writer.end();
        }
        let (format, cols) =
            if section.kind == Kind::HeadApart { (split::APART, COLUMNS) } else { (split::FORMAT, cols) };
        let scale = scale(Format::I8, config.hidden as usize);
        let full = self.pool((format, UNIT_ROWS.min(vocab), cols), false, scale);
        let last = self.pool((format, vocab % UNIT_ROWS, cols), false, scale);
        let norms = match section.kind {
            Kind::HeadNorms => [full, last].map(|pool| self.pools[pool].norms()),
            _ => [vec![], vec![]],
        };
        for first in (0..vocab).step_by(UNIT_ROWS) {
            let rows = UNIT_ROWS.min(vocab - first);
            let (pool, norms) = if rows == UNIT_ROWS { (full, &norms[0]) } else { (last, &norms[1]) };
            let units = &self.pools[pool].units;
            let low = first / UNIT_ROWS * 7 % units.len();
            if section.kind == Kind::HeadNorms {
                let mut padded = [0; UNIT_ROWS];
                padded[..rows].copy_from_slice(&norms[low]);
                put(self.writer, self.progress, padded.as_bytes())?;
                continue;
            }
            let scales: [f32; UNIT_ROWS] = core::array::from_fn(|r| {
                let mut random = Random((first + r) as u64);
                match section.kind {
                    _ if r >= rows => 0.0,
                    Kind::HeadApart => 1.0,
                    _ => scale * (0.5 + random.fraction()),
                }
            });
            let unit = if section.kind == Kind::HeadLow { low } else { self.random.below(units.len()) };
            put(self.writer, self.progress, units[unit].as_bytes())?;
            put(self.writer, self.progress, scales[..rows.next_multiple_of(16)].as_bytes())?;
        }
        self.writer.end()
    }

    /// The pool of this shape, made when it is first asked for.
    fn pool(&mut self, (format, rows, cols): (Format, usize, usize), dead: bool, scale: f32) -> usize {
        let same = |p: &Pool| (p.format, p.rows, p.cols, p.dead) == (format, rows, cols, dead);
        if let Some(i) = self.pools.iter().position(same) {
            return i;
        }
        let units = (0..pool_units(format, rows, cols))
            .map(|_| unit((format, rows, cols), dead, scale, &mut self.random))
            .collect();
        self.pools.push(Pool { format, rows, cols, dead, units });
        self.pools.len() - 1
    }
}

/// What weights are multiplied by: such that a linear keeps the magnitude of its input, and logits are about 1.
fn scale(format: Format, cols: usize) -> f32 {
    let (low, high) = match format {
        Format::F16 => (-127.0, 127.0),
        _ => (f32::from(format.range().0), f32::from(format.range().1)),
    };
    let deviation = match format.is_odd() {
        // Of `n` equally likely numbers at a distance of two it is `sqrt((n² - 1) / 3)`, and the largest is `n - 1`.
        true => (high * (high + 2.0) / 3.0).sqrt(),
        false => ((high - low + 1.0) * (high - low + 1.0) / 12.0).sqrt(),
    };
    1.0 / (deviation * (cols as f32).sqrt())
}

/// Of `dead` units three rows of ten are zeros, where the format has zeros: a random gate closes for half of the neurons, that
/// of a trained squared ReLU for two thirds.
fn unit((format, rows, cols): (Format, usize, usize), dead: bool, scale: f32, random: &mut Random) -> Vec<Block> {
    let mut blocks = vec![Block::ZERO; format.matrix_blocks(rows, cols)];
    let stride = format.padded_cols(cols);
    if format == Format::F16 {
        let mut halves = vec![0; rows * stride];
        for row in halves.chunks_exact_mut(stride) {
            let value = |random: &mut Random| f16::from_f32(f32::from(random.within(-127, 127)) * scale).to_bits();
            row[..cols].iter_mut().for_each(|w| *w = value(random));
        }
        encode_f16(rows, cols, &halves, &mut blocks);
        return blocks;
    }
    let mut codes = vec![0; rows * stride];
    let (low, high) = format.range();
    for row in codes.chunks_exact_mut(stride) {
        if dead && !format.is_odd() && random.below(10) < 3 {
            continue;
        }
        row[..cols].iter_mut().for_each(|w| {
            *w = if format.is_odd() { random.within(0, high) * 2 - high } else { random.within(low, high) }
        });
    }
    if format.is_grouped() {
        // Each row its own, so that the rows of two copies of a unit differ.
        let each = |random: &mut Random| f16::from_f32(scale * (0.5 + random.fraction())).to_bits();
        let scales: Vec<u16> = (0..rows * format.steps(cols)).map(|_| each(random)).collect();
        encode_grouped(format, rows, cols, &codes, &scales, &mut blocks);
    } else {
        encode(format, rows, cols, &codes, &mut blocks);
    }
    blocks
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::verify;

    fn write(shape: &Shape, options: &Options, seed: u64) -> (Vec<u8>, Report, u64) {
        let place = tempfile::tempdir().unwrap();
        let path = place.path().join("image.bitnet");
        let report = dummy(&path, shape, options, seed, &mut ()).unwrap();
        let verified = verify(&path).unwrap();
        (std::fs::read(&path).unwrap(), report, verified.weights)
    }

    #[test]
    fn every_format_and_odd_shapes_are_sound() {
        let tiny = Preset::Tiny.shape();
        let odd = Config { vocab: 67, hidden: 40, ffn: 100, heads: 5, kv_heads: 1, head_dim: 6, ..tiny.config };
        for config in [tiny.config, odd, Config { tied: false, vocab: 3, ..odd }] {
            for format in [&Format::INTEGER[..], &Format::GROUPED].concat() {
                for head in [&[Format::I8, Format::I4, Format::F16][..], &Format::GROUPED].concat() {
                    let options = Options { format, head, ..Options::default() };
                    let shape = Shape { config, ..tiny.clone() };
                    let (bytes, report, weights) = write(&shape, &options, 7);
                    assert_eq!(bytes.len() as u64, report.image_bytes);
                    assert_eq!(weights, report.layers.iter().map(|l| l.weights).sum::<u64>());
                }
            }
        }
    }

    #[test]
    fn a_tokenizer_may_have_fewer_tokens() {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../models/stories-ternary/tokenizer.json");
        let with = |vocab| {
            let tiny = Preset::Tiny.shape();
            let shape = Shape { config: Config { vocab, ..tiny.config }, ..tiny };
            let options = Options { tokenizer: Some(path.clone()), ..Options::default() };
            let place = tempfile::tempdir().unwrap();
            let image = place.path().join("image.bitnet");
            dummy(&image, &shape, &options, 1, &mut ())?;
            verify(&image)?;
            Ok::<_, Error>(Opened::open(&image)?.image()?.tokenizer().is_some())
        };
        // It has 512 tokens.
        for vocab in [512, 700] {
            assert!(with(vocab).unwrap());
        }
        assert!(with(511).unwrap_err().to_string().contains("token 511 lies outside"));
    }

    #[test]
    fn the_seed_decides() {
        let (shape, options) = (Preset::Tiny.shape(), Options::default());
        let image = |seed| write(&shape, &options, seed).0;
        assert!(image(1) == image(1));
        assert!(image(1) != image(2));
    }

    #[test]
    fn presets_have_the_weights_of_their_models() {
        let weights = |preset: Preset| {
            let sections = expected_sections(&preset.shape().config).filter(|s| s.rows > 1);
            sections.map(|s| u64::from(s.rows) * u64::from(s.cols)).sum::<u64>()
        };
        // 2.4 and 8.0 thousand million, as the models' cards say.
        assert_eq!(weights(Preset::B2B4T), 2_412_380_160);
        assert_eq!(weights(Preset::B8B), 8_029_995_008);
        // 75.5 million in the layers and 24.6 million in the head.
        assert_eq!(weights(Preset::Small), 12 * 6_291_456 + 32_000 * 768);
        for (_, preset) in Preset::ALL {
            preset.shape().config.check().unwrap();
        }
    }
}
