//! A checkpoint becomes an image, one unit of 64 rows after another.
use crate::calibrate::{Adaptive, Linear, Places, Prepared, adapt};
use crate::checkpoint::sections::{self, Bound, Source};
use crate::checkpoint::{Checkpoint, Dtype, Naming, Table, TensorInfo, groups};
use crate::encode::{encode, encode_f16, encode_grouped};
use crate::kept::{Kept, Live};
use crate::prune::{Pruned, Sparsity, prune};
use crate::quantize::{self, Absmean, Distance, Gaps, MagnitudeSum};
use crate::reorder::{Reordered, reorder};
use crate::report::{LayerBits, Progress, Report, SectionReport, planned_bits};
use crate::split::{self, Energy, Plane};
use crate::tune::{self, Costs, Measured, Target, Timer, Tuner, Tuning};
use crate::verify::{Opened, verify_with};
use crate::write::{BUFFER_BYTES, Finished, ImageWriter, Layout, Parts};
use crate::{Error, tokenizer};
use bitnet_kernel::blocks::{STRIP_ROWS, encode_unit};
use bitnet_kernel::{Block, BlockShape, Format};
use bitnet_runtime::image::split::{COLUMNS, Columns};
use bitnet_runtime::image::{Encoding, Kind, UNIT_ROWS};
use bitnet_runtime::memory::KvFormat;
use bitnet_runtime::parallel::cpus::Granted;
use bitnet_runtime::{Config, Limits, backend};
use half::f16;
use std::panic::resume_unwind;
use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::thread;
use zerocopy::IntoBytes;

/// What the user chooses.
#[derive(Clone, Debug)]
pub struct Options {
    /// The ternary linears' format.
    pub format: Format,
    /// The format of linears that are not ternary.
    pub dense: Format,
    /// The head's format.
    pub head: Format,
    /// Whether the head is in two planes; its format then counts for an embedding of its own only.
    pub split_head: bool,
    /// The embedding's format, where it is not the head; the head's if `None`.
    pub embedding: Option<Format>,
    /// How I2_S tensors of GGUF files are read: [`Dtype::I2_S`] or [`Dtype::I2_S_64`]; if `None`, as their numbers say.
    pub i2s: Option<Dtype>,
    /// The tokenizer file, where the choice is not left to the packer.
    pub tokenizer: Option<PathBuf>,
    /// A name for people; the directory's if `None`.
    pub name: Option<String>,
    /// Positions that the memory plan is for.
    pub context: Option<u32>,
    /// Tokens in a batch that it is for.
    pub batch: Option<u32>,
    /// How keys and values are kept in it.
    pub kv: Option<KvFormat>,
    /// Whether the feed-forward layer is stored so that only its live part is read ([`Config::live_ffn`]).
    pub live_ffn: bool,
    /// How linears with rows and columns of zeros are laid out.
    pub layout: Layouts,
    /// How linears that are not ternary get formats of their own, in place of `dense`.
    pub adaptive: Option<Adaptive>,
    /// Which weights are left out.
    pub sparsity: Option<Sparsity>,
    /// A text, UTF-8, whose tokens say which neurons are stored side by side where only the live ones are read.
    pub reorder: Option<PathBuf>,
    /// The CPU whose speed decides between layouts, in place of bytes alone.
    pub target: Option<Target>,
    /// Whether linears that should be ternary may be far from it: [`FAR`].
    pub lossy: bool,
}

/// Masters that are further from ternary ([`Distance`]) are not made ternary without a word.
///
/// A choice: the farthest linear of each kind in the bundled model, which was trained to be ternary, is at 0.56 to 0.71
/// (`bitnet-pack pack models/stories-ternary` shows them), and where nothing is left of the weights is 1. Nearness is no evidence
/// of training, since numbers from a normal distribution are at 0.513: plain weights of a model that is said to be a BitNet
/// pass. What is refused has most of its energy in few large weights, which no ternary matrix can follow.
pub const FAR: f32 = 0.85;

/// Which layouts of linears the packer may choose.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Layouts {
    /// Rows, columns and blocks of zeros are left out, of these what saves most, where that saves something: [`crate::kept`].
    Auto,
    /// Only rows and columns of zeros are left out.
    Kept,
    /// Only blocks of zeros of this size are left out.
    Blocks(BlockShape),
    /// All linears are whole.
    Whole,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            format: Format::TL,
            dense: Format::I8,
            head: Format::I8,
            split_head: false,
            embedding: None,
            i2s: None,
            tokenizer: None,
            name: None,
            context: None,
            batch: None,
            kv: None,
            live_ffn: false,
            layout: Layouts::Auto,
            adaptive: None,
            sparsity: None,
            reorder: None,
            target: None,
            lossy: false,
        }
    }
}

impl Options {
    /// The encoding of a section.
    pub(crate) fn encoding(&self, kind: Kind) -> Encoding {
        let encoding = match kind {
            Kind::Head if !self.split_head => Encoding::Matrix(self.head),
            Kind::Head | Kind::HeadLow => Encoding::Matrix(split::FORMAT),
            Kind::HeadApart => Encoding::Matrix(split::APART),
            Kind::HeadNorms => Encoding::Bytes,
            Kind::Embedding => Encoding::Matrix(self.embedding.unwrap_or(self.head)),
            Kind::UpRows | Kind::DownColumns => Encoding::Matrix(Format::T2R),
            _ if kind.is_linear() => Encoding::Matrix(self.format),
            Kind::Tokenizer => Encoding::Bytes,
            _ => Encoding::Vector,
        };
        debug_assert!(kind.allows(encoding) || matches!(encoding, Encoding::Matrix(_)));
        encoding
    }
    /// The encoding of a section that is made from `source`.
    pub(crate) fn encoding_of(&self, kind: Kind, source: &Source) -> Encoding {
        match source {
            Source::Rows(_) if kind.is_linear() => Encoding::Matrix(self.dense),
            // A head that is a linear as those of the layers are.
            Source::Masters(_) if kind == Kind::Head => Encoding::Matrix(self.format),
            // One bit a weight instead of five thirds, and the same products.
            Source::Ternary(.., gaps) if self.encoding(kind) == Encoding::Matrix(Format::TL) => {
                let left_out = kind.has_layouts() && matches!(self.layout, Layouts::Auto | Layouts::Kept);
                let binary = *gaps == Gaps::None || *gaps == Gaps::Lines && left_out;
                Encoding::Matrix(if binary { Format::B1 } else { Format::TL })
            }
            Source::Grouped(_, true) => Encoding::Matrix(Format::B1G),
            Source::Grouped(_, false) => Encoding::Matrix(Format::TLG),
            _ => self.encoding(kind),
        }
    }
    pub(crate) fn check(&self) -> Result<(), Error> {
        for (option, kind) in [("--format", Kind::Query), ("--head", Kind::Head), ("--embedding", Kind::Embedding)] {
            let encoding = self.encoding(kind);
            let is_ternary_f16 = kind.is_linear() && encoding == Encoding::Matrix(Format::F16);
            // A head has a ternary format where it is a linear, and then that of the others.
            let allows = if kind == Kind::Head { Kind::Embedding } else { kind }.allows(encoding);
            if is_ternary_f16 || !allows {
                let Encoding::Matrix(format) = encoding else { unreachable!("{kind:?}") };
                return Err(Error::Options(format!("{option} cannot be {}", format.name())));
            }
        }
        if !matches!(self.dense, Format::I4 | Format::I8 | Format::F16 | Format::I4G | Format::I3G | Format::I2G) {
            return Err(Error::Options(format!("--dense cannot be {}", self.dense.name())));
        }
        if self.adaptive.as_ref().is_some_and(|adaptive| adaptive.head) && self.split_head {
            return Err(Error::Options("a head in two planes has no format that could be chosen".into()));
        }
        if self.adaptive.is_some() && self.live_ffn {
            return Err(Error::Options("--live-ffn is for ternary linears, whose formats are not chosen".into()));
        }
        if self.reorder.is_some() && !self.live_ffn {
            return Err(Error::Options("the order of neurons matters with --live-ffn only".into()));
        }
        if let Some(sparsity) = &self.sparsity {
            sparsity.check()?;
            if self.adaptive.is_some() {
                let what = "--sparsity does not go with --bits or --plan, whose quantizing would fill what is left out";
                return Err(Error::Options(what.into()));
            }
        }
        if let Some(i2s) = self.i2s
            && !matches!(i2s, Dtype::I2_S | Dtype::I2_S_64)
        {
            return Err(Error::Options(format!("I2_S is not read as {}", i2s.name())));
        }
        Ok(())
    }
    /// Whether the choices suit a checkpoint, whose head has floats.
    fn check_source(&self) -> Result<(), Error> {
        let refuse = |option, format: Format, why| Err(Error::Options(format!("{option} {}: {why}", format.name())));
        if self.format.is_grouped() {
            return refuse(
                "--format",
                self.format,
                "linears that have a scale for every 128 columns take this format by themselves",
            );
        }
        for (option, format) in [("--head", Some(self.head)), ("--embedding", self.embedding)] {
            if let Some(format @ (Format::TLG | Format::B1G)) = format {
                return refuse(option, format, "this checkpoint's has floats; i2g128 is the smallest that holds them");
            }
        }
        Ok(())
    }
    /// `config` with what the options say about how it is stored.
    pub(crate) fn stored(&self, config: Config) -> Config {
        let live = if self.live_ffn { 1 << Format::T2R as u8 } else { 0 };
        let formats = 1 << self.format as u8 | live;
        Config { live_ffn: self.live_ffn, split_head: self.split_head, formats, ..config }
    }
    /// The limits that the header's plan is for.
    pub(crate) fn limits(&self, config: &Config) -> Result<Limits, Error> {
        let default = Limits::default_for(config);
        let limits = Limits {
            context: self.context.unwrap_or(default.context),
            batch: self.batch.unwrap_or(default.batch),
            kv: self.kv.unwrap_or(default.kv),
        };
        limits.check(config).map_err(|e| Error::Options(e.to_string()))?;
        Ok(limits)
    }
}

/// Packs `source`, a directory, a `.safetensors` file in one, a GGUF file or one of llama2.c, as `output`.
///
/// # Errors
/// The first thing that is wrong. Then nothing is there under the name `output` that was not there before.
pub fn pack(source: &Path, output: &Path, options: &Options, progress: &mut dyn Progress) -> Result<Report, Error> {
    let Ready {
        checkpoint,
        mut table,
        mut bound,
        tokenizer,
        mut parts,
        mut layout,
        peak_bytes,
        pruned,
        reordered,
        tuning,
    } = ready(source, options, progress)?;
    progress.say(&format!("peak memory: {} MiB", peak_bytes.div_ceil(1 << 20)));
    let prepared = match &options.adaptive {
        Some(adaptive) => {
            let places = Places {
                checkpoint: &checkpoint,
                tokenizer: options.tokenizer.as_deref(),
                directory: output.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new(".")),
                rest: layout.file_bytes()
                    - bound.iter().filter(|b| chosen(b, adaptive.head).is_some()).map(linear_bytes).sum::<u64>(),
            };
            let prepared = adapt(adaptive, places, progress)?;
            for bound in &mut bound {
                if let Some(format) = chosen(bound, adaptive.head).and_then(|linear| prepared.plan.format(linear)) {
                    bound.encoding = Encoding::Matrix(format);
                }
            }
            table.config.formats = sections::formats(&bound);
            parts.config = table.config;
            layout = laid_out(&parts, tokenizer.as_deref(), &bound)?;
            Some(prepared)
        }
        None => None,
    };
    let mut reports: Vec<SectionReport> = layout.records().iter().filter_map(SectionReport::of).collect();
    let (name, limits) = (parts.name.clone(), parts.limits);
    progress.start(layout.file_bytes());
    let mut writer = ImageWriter::create(output, parts, layout)?;
    let mut written = 0;
    if let Some(tokenizer) = &tokenizer {
        writer.begin(1.0)?;
        writer.put(tokenizer)?;
        writer.end()?;
        written = 1;
    }
    let (buffers, columns, lossy) = (Buffers::default(), None, options.lossy);
    let prepared_ref = prepared.as_ref();
    let mut packer = Packer {
        checkpoint: &checkpoint,
        writer: &mut writer,
        progress,
        buffers,
        columns,
        prepared: prepared_ref,
        lossy,
    };
    for (bound, report) in bound.iter().zip(&mut reports[written..]) {
        packer.section(bound, report)?;
    }
    let finished = writer.finish()?;
    let layers = check_written(&finished, &bound, progress)?;
    finished.publish()?;
    Ok(Report {
        name,
        architecture: table.architecture,
        config: table.config,
        limits,
        image_bytes: reports_end(output)?,
        peak_bytes,
        sections: reports,
        layers,
        notes: table.notes,
        adapted: prepared.map(|prepared| prepared.adapted),
        pruned,
        reordered,
        tuning,
    })
}

/// What says how fast layouts are on `target`.
fn timer(target: Target, format: Format, config: &Config) -> Result<Box<dyn Timer>, Error> {
    if target != Target::Native {
        return Ok(Box::new(Costs(target)));
    }
    let threads = Granted::now().threads();
    let measured = Measured::new(backend::best(), threads, tune::linear_bytes(config, format));
    Ok(Box::new(measured.map_err(|e| Error::Options(format!("--target-arch native: no {threads} threads: {e}")))?))
}

/// What [`pack`] would write, without writing it. The numbers of linears are read where they decide on a format; how far
/// masters are from ternary is not known yet.
///
/// # Errors
/// The first thing that is wrong, or if formats of linears are to be chosen by calibration.
pub fn plan(source: &Path, options: &Options, progress: &mut dyn Progress) -> Result<Report, Error> {
    if options.adaptive.is_some() {
        return Err(Error::Options("formats that are chosen one by one are not known without calibration".into()));
    }
    let Ready { table, bound, parts, layout, peak_bytes, pruned, reordered, tuning, .. } =
        ready(source, options, progress)?;
    Ok(Report {
        name: parts.name,
        architecture: table.architecture,
        config: table.config,
        limits: parts.limits,
        image_bytes: layout.file_bytes(),
        peak_bytes,
        sections: layout.records().iter().filter_map(SectionReport::of).collect(),
        layers: planned(&bound),
        notes: table.notes,
        adapted: None,
        pruned,
        reordered,
        tuning,
    })
}

/// A checkpoint of which all is known but the weights.
struct Ready {
    checkpoint: Checkpoint,
    table: Table,
    bound: Vec<Bound>,
    tokenizer: Option<Vec<u8>>,
    parts: Parts,
    layout: Layout,
    peak_bytes: u64,
    pruned: Option<Pruned>,
    reordered: Option<Reordered>,
    tuning: Option<Tuning>,
}

fn ready(source: &Path, options: &Options, progress: &mut dyn Progress) -> Result<Ready, Error> {
    options.check()?;
    options.check_source()?;
    let (i2s, note) = options.i2s.map_or_else(|| groups::found(source), |i2s| Ok((i2s, None)))?;
    let mut checkpoint = Checkpoint::open(source, i2s)?;
    let pruned = match &options.sparsity {
        Some(sparsity) => {
            let mut less = Checkpoint::open(source, i2s)?;
            let pruned = prune(&checkpoint, &mut less, sparsity, options.tokenizer.as_deref(), progress)?;
            checkpoint = less;
            Some(pruned)
        }
        None => None,
    };
    let reordered = match &options.reorder {
        Some(text) => Some(reorder(&mut checkpoint, text, options.tokenizer.as_deref(), progress)?),
        None => None,
    };
    let mut table = checkpoint.table()?;
    table.notes.extend(note);
    if table.config.linear_head && options.split_head {
        return Err(Error::Options("--head two-stage: this checkpoint's head is ternary, and small already".into()));
    }
    if table.config.quantizers.rotate() && (options.live_ffn || options.dense == Format::F16) {
        let what = "activation_quantization rotates activations: none is zero then, for --live-ffn, and floats (--dense f16) are multiplied as they are";
        return Err(Error::Options(what.into()));
    }
    table.config.split_head = options.split_head;
    table.config.live_ffn = options.live_ffn;
    let limits = options.limits(&table.config)?;
    let mut timer = options.target.map(|target| timer(target, options.format, &table.config)).transpose()?;
    let mut tuner = timer.as_mut().map(|timer| Tuner::new(timer.as_mut()));
    let bound = sections::bind(&checkpoint, &mut table, options, tuner.as_mut(), progress)?;
    let tuning = tuner.map(Tuner::finish);
    let calibration = options.adaptive.as_ref().map_or(0, |adaptive| adaptive.peak(&table.config));
    let mut peak_bytes = peak(&checkpoint, &bound, options)? + calibration;
    peak_bytes += pruned.as_ref().map_or(0, |pruned| pruned.peak);
    peak_bytes += reordered.as_ref().map_or(0, |reordered| reordered.peak);

    let text = tokenizer::read(&checkpoint, &mut table, options.tokenizer.as_deref())?;
    let parts = Parts {
        config: table.config,
        limits,
        name: options.name.clone().unwrap_or_else(|| name_of(source, &checkpoint)),
        architecture: table.architecture.clone(),
        bos: text.bos,
        stop: text.stop,
        chat_template: text.chat_template,
        tuning: [tuning.as_ref().map(Tuning::to_string), reordered.as_ref().map(Reordered::to_string)]
            .into_iter()
            .flatten()
            .collect(),
    };
    let layout = laid_out(&parts, text.tokenizer.as_deref(), &bound)?;
    Ok(Ready {
        checkpoint,
        table,
        bound,
        tokenizer: text.tokenizer,
        parts,
        layout,
        peak_bytes,
        pruned,
        reordered,
        tuning,
    })
}

fn laid_out(parts: &Parts, tokenizer: Option<&[u8]>, bound: &[Bound]) -> Result<Layout, Error> {
    let sections = bound.iter().map(|b| (b.stored(), b.encoding, b.blocks()));
    Layout::new(parts, tokenizer.map(<[u8]>::len), sections)
}

/// The linear that a section is, if it gets a format of its own where formats are chosen, that of the `head` too.
fn chosen(bound: &Bound, head: bool) -> Option<Linear> {
    let kind = bound.section.kind;
    let dense = (kind.is_linear() || head && kind == Kind::Head) && matches!(bound.source, Source::Rows(_));
    dense.then_some(Linear { layer: bound.section.layer, kind: bound.section.kind })
}

/// Bytes of a section.
fn linear_bytes(bound: &Bound) -> u64 {
    bound.encoding.blocks(bound.section.rows, bound.section.cols) * 64
}

fn reports_end(output: &Path) -> Result<u64, Error> {
    output.metadata().map(|m| m.len()).map_err(|e| Error::io(output, "read", e))
}

/// Reads the image back: every checksum, every code, and whether it has the bits that were planned.
fn check_written(finished: &Finished, bound: &[Bound], progress: &mut dyn Progress) -> Result<Vec<LayerBits>, Error> {
    verify_with(finished.path(), progress)?;
    let opened = Opened::open(finished.path())?;
    let image = opened.image()?;
    let found = LayerBits::of(&image);
    let planned = planned(bound);
    if let Some((p, f)) = planned.iter().zip(&found).find(|(p, f)| p != f) {
        let layer = p.layer.map_or("embedding and head".into(), |l| format!("layer {l}"));
        let (planned, found) = (p.average(), f.average());
        return Err(Error::Planned(format!(
            "{layer}: {planned:.4} bits a weight were planned, {found:.4} were written"
        )));
    }
    if planned.len() != found.len() {
        return Err(Error::Planned(format!("{} layers were planned, {} were written", planned.len(), found.len())));
    }
    Ok(found)
}

/// The bits that each layer is to have.
fn planned(bound: &[Bound]) -> Vec<LayerBits> {
    let bits = bound.iter().filter_map(|b| match b.encoding {
        Encoding::Blocks(_) => {
            let section = b.stored();
            Some((section.layer, u64::from(section.rows) * u64::from(section.cols), 8 * 64 * b.blocks()))
        }
        Encoding::Matrix(format) => {
            let section = b.stored();
            let (rows, cols) = (section.rows.into(), section.cols.into());
            let weights = if matches!(section.kind, Kind::HeadApart | Kind::HeadLow) { 0 } else { rows * cols };
            Some((section.layer, weights, planned_bits(format, rows, cols)))
        }
        _ => None,
    });
    LayerBits::sum(bits)
}

/// A name for people: the directory's, or the repository's in a Hugging Face cache; the file's where one file is all.
fn name_of(source: &Path, checkpoint: &Checkpoint) -> String {
    let path = source.canonicalize().unwrap_or_else(|_| source.into());
    if checkpoint.naming() != Naming::HuggingFace && !path.is_dir() {
        return path.file_stem().map_or("model".into(), |n| n.to_string_lossy().into_owned());
    }
    let directory = if path.is_dir() { Some(path.as_path()) } else { path.parent() };
    let last = |p: &Path| p.file_name().map(|n| n.to_string_lossy().into_owned());
    let cached = directory.and_then(Path::parent).filter(|p| p.ends_with("snapshots")).and_then(Path::parent);
    let cached = cached.and_then(last).and_then(|n| n.strip_prefix("models--").map(|n| n.replace("--", "/")));
    cached.or_else(|| directory.and_then(last)).unwrap_or_else(|| "model".into())
}

/// What is said of a linear that should be ternary and is not.
pub(crate) fn far(distance: f32, lossy: &str) -> String {
    format!(
        "not ternary, and {:.0}% from it, which the model should be (the root of the energy of what becomes of it by the \
         absmean rule, over that of the weights); {lossy}",
        distance * 100.0
    )
}

/// Memory of the program itself, its libraries and its stack.
pub(crate) const PROGRAM_BYTES: u64 = 10 << 20;
/// What a tensor's entry in the header costs, in the maps and in the lists made from them.
const ENTRY_BYTES: u64 = 1024;
/// Bytes that converting a tokenizer takes for each byte of its file, measured with vocabularies of 32,000 to 128,000 tokens.
const TOKENIZER_FACTOR: u64 = 24;

/// The most memory that packing will take.
fn peak(checkpoint: &Checkpoint, bound: &[Bound], options: &Options) -> Result<u64, Error> {
    let tokenizers = tokenizer::source_bytes(checkpoint, options.tokenizer.as_deref())?;
    let most = bound.iter().map(Sizes::of).fold(Sizes::default(), Sizes::max);
    let entries = checkpoint.tensors().count() as u64 * ENTRY_BYTES;
    Ok(PROGRAM_BYTES + entries + tokenizers * TOKENIZER_FACTOR + most.bytes() + 3 * BUFFER_BYTES as u64)
}

/// Elements in each buffer while one section is packed.
#[derive(Clone, Copy, Default)]
struct Sizes {
    raw: usize,
    floats: usize,
    codes: usize,
    halves: usize,
    blocks: usize,
    columns: usize,
    kept: usize,
}

impl Sizes {
    fn of(Bound { section, source, encoding, kept, live }: &Bound) -> Self {
        let transposed = section.kind == Kind::DownColumns;
        let stored = section;
        let section = sections::in_checkpoint(section);
        // What is made of the rows of a matrix without being one takes what its planes take.
        let (rows, cols, encoding) = match (section.kind, source) {
            (Kind::HeadColumns | Kind::HeadApart | Kind::HeadNorms, Source::Rows(t)) => {
                (t.shape[0] as usize, t.shape[1] as usize, Encoding::Matrix(split::FORMAT))
            }
            _ => (section.rows as usize, section.cols as usize, coded(*encoding)),
        };
        let rows = UNIT_ROWS.min(rows);
        let (elements, bytes) = source.tensor().map_or((1, 0), |t| t.dtype.block());
        let raw = |n: usize| n.div_ceil(elements as usize) * bytes as usize;
        let Encoding::Matrix(format) = encoding else {
            return Self { raw: raw(cols), floats: cols, ..Self::default() };
        };
        let padded = rows * format.padded_cols(cols);
        let dense = format == Format::F16;
        Self {
            raw: raw(rows * cols),
            floats: if matches!(source, Source::Packed(..)) { 0 } else { rows * cols },
            codes: if dense { 0 } else { padded },
            halves: if dense {
                padded
            } else if format.is_grouped() {
                rows * format.steps(cols)
            } else {
                0
            },
            blocks: if transposed {
                format.matrix_blocks(UNIT_ROWS.min(cols), stored.cols as usize)
            } else {
                // Bitmaps are beside the blocks.
                format.matrix_blocks(rows, cols) + live.as_ref().map_or(0, |live| live.shape.bitmap_blocks(rows, cols))
            },
            columns: if transposed { cols * format.padded_cols(stored.cols as usize) } else { 0 },
            kept: if kept.is_some() { UNIT_ROWS * format.padded_cols(cols) } else { 0 },
        }
    }
    fn max(self, other: Self) -> Self {
        Self {
            raw: self.raw.max(other.raw),
            floats: self.floats.max(other.floats),
            codes: self.codes.max(other.codes),
            halves: self.halves.max(other.halves),
            blocks: self.blocks.max(other.blocks),
            columns: self.columns.max(other.columns),
            kept: self.kept.max(other.kept),
        }
    }
    const fn bytes(self) -> u64 {
        (self.raw
            + AHEAD * 4 * self.floats
            + self.codes
            + self.columns
            + self.kept
            + 2 * self.halves
            + 64 * self.blocks) as u64
    }
}

/// Units whose numbers are in memory: one is quantized while the next is read.
const AHEAD: usize = 2;

/// One unit on its way. Reused, and never larger than [`peak`] counted.
#[derive(Default)]
struct Buffers {
    raw: Vec<u8>,
    /// They stay here, for what one thread frees another may not get.
    floats: [Vec<f32>; AHEAD],
    codes: Vec<i8>,
    halves: Vec<u16>,
    blocks: Vec<Block>,
    /// A whole matrix by its columns, where it is stored so.
    columns: Vec<i8>,
    /// Rows of a compacted matrix that have not made a unit yet, and their scales.
    kept: Vec<i8>,
    kept_scales: Vec<f32>,
}

/// Gives a buffer a length without ever reserving more than that.
fn fit<T: Clone>(buffer: &mut Vec<T>, length: usize, value: T) -> &mut [T] {
    buffer.reserve_exact(length.saturating_sub(buffer.len()));
    buffer.resize(length, value);
    buffer
}

/// A matrix that is being packed, and a unit of it.
#[derive(Clone, Copy)]
struct Unit<'a> {
    tensor: &'a TensorInfo,
    format: Format,
    /// Rows and columns of the matrix.
    shape: (usize, usize),
    /// Rows of the tensor before the matrix.
    before: usize,
    /// First row of the unit, and their number.
    first: usize,
    rows: usize,
    /// Whether the image has its columns for rows.
    transposed: bool,
    /// What the image keeps of it, if that is not all.
    kept: Option<&'a Kept>,
    /// Its live blocks, if the image has only those.
    live: Option<&'a Live>,
}

/// How weights are coded on their way into an image: those of a block-sparse matrix as T2's.
const fn coded(encoding: Encoding) -> Encoding {
    match encoding {
        Encoding::Blocks(_) => Encoding::Matrix(Format::T2),
        encoding => encoding,
    }
}

/// The units of a matrix as the checkpoint has it.
fn units<'a>(tensor: &'a TensorInfo, format: Format, bound: &'a Bound) -> impl Iterator<Item = Unit<'a>> + use<'a> {
    let transposed = bound.section.kind == Kind::DownColumns;
    let (kept, live) = (bound.kept.as_ref(), bound.live.as_ref());
    let section = sections::in_checkpoint(&bound.section);
    let shape = (section.rows as usize, section.cols as usize);
    let before = if let Source::Part(_, first) = bound.source { first as usize } else { 0 };
    (0..shape.0).step_by(UNIT_ROWS).map(move |first| {
        let rows = UNIT_ROWS.min(shape.0 - first);
        Unit { tensor, format, shape, before, first, rows, transposed, kept, live }
    })
}

/// The units of a whole tensor, as of a head in two planes.
fn rows_of(tensor: &TensorInfo) -> impl Iterator<Item = Unit<'_>> {
    let shape = (tensor.shape[0] as usize, tensor.shape[1] as usize);
    (0..shape.0).step_by(UNIT_ROWS).map(move |first| {
        let rows = UNIT_ROWS.min(shape.0 - first);
        Unit { tensor, format: split::FORMAT, shape, before: 0, first, rows, transposed: false, kept: None, live: None }
    })
}

struct Packer<'a> {
    checkpoint: &'a Checkpoint,
    writer: &'a mut ImageWriter,
    progress: &'a mut dyn Progress,
    buffers: Buffers,
    /// The columns apart of a head in two planes, once they are chosen.
    columns: Option<Columns>,
    /// Linears that are quantized already.
    prepared: Option<&'a Prepared>,
    /// Whether masters may be far from ternary.
    lossy: bool,
}

impl Packer<'_> {
    fn section(&mut self, bound: &Bound, report: &mut SectionReport) -> Result<(), Error> {
        let Bound { section, source, encoding, kept, live } = bound;
        match section.layer {
            Some(layer) => self.progress.section(&format!("layer {layer}: {}", section.kind.name())),
            None => self.progress.section(section.kind.name()),
        }
        match (source, coded(*encoding)) {
            (Source::Index, _) => {
                self.writer.begin(1.0)?;
                match (kept, live) {
                    (Some(kept), _) => self.put(kept.masks().as_bytes())?,
                    (None, Some(live)) => self.put(&live.starts())?,
                    (None, None) => {}
                }
            }
            (Source::Values(values), Encoding::Vector) => self.vector(values)?,
            (Source::Vector(tensor), Encoding::Vector) => {
                let mut values = vec![0.0; section.cols as usize];
                self.checkpoint.read_floats(tensor, 0, &mut self.buffers.raw, &mut values)?;
                self.vector(&values)?;
            }
            (Source::Packed(tensor, multiplier), Encoding::Matrix(format)) => {
                self.begin_ternary(format, *multiplier, report)?;
                for unit in units(tensor, format, bound) {
                    self.read_packed(&unit)?;
                    self.put_ternary(&unit, *multiplier)?;
                }
            }
            (Source::Masters(tensor) | Source::Part(tensor, _), Encoding::Matrix(format)) => {
                self.masters(tensor, format, bound, report)?
            }
            (Source::Rows(tensor), Encoding::Vector) => self.columns(tensor)?,
            (Source::Rows(tensor), _) if matches!(section.kind, Kind::HeadApart | Kind::HeadNorms | Kind::HeadLow) => {
                self.split_head(tensor, section.kind)?;
            }
            (Source::Rows(tensor), _) if section.kind == Kind::Head && self.columns.is_some() => {
                self.split_head(tensor, section.kind)?;
            }
            (Source::Ternary(tensor, magnitude, beside, _), Encoding::Matrix(format)) => {
                let multiplier = magnitude * beside;
                self.begin_ternary(format, multiplier, report)?;
                self.ahead(units(tensor, format, bound), |packer, unit, values| {
                    packer.signs(unit, values);
                    packer.put_ternary(unit, multiplier)
                })?;
            }
            (Source::Grouped(tensor, _), Encoding::Matrix(format)) => {
                self.writer.begin(1.0)?;
                self.ahead(units(tensor, format, bound), Self::grouped)?;
            }
            (Source::Rows(tensor), Encoding::Matrix(format)) if self.is_prepared(bound, format) => {
                self.prepared(tensor, format, bound, report)?;
            }
            (Source::Rows(tensor), Encoding::Matrix(format)) => {
                self.writer.begin(1.0)?;
                let mut distance = Distance::default();
                self.ahead(units(tensor, format, bound), |packer, unit, values| {
                    packer.dense(unit, values, &mut distance)
                })?;
                report.error = (format != Format::F16).then(|| distance.relative());
            }
            _ => unreachable!("{encoding:?} from {source:?}"),
        }
        self.writer.end()
    }

    fn put(&mut self, bytes: &[u8]) -> Result<(), Error> {
        if self.progress.cancelled() {
            return Err(Error::Interrupted);
        }
        self.writer.put(bytes)?;
        self.progress.advance(bytes.len() as u64);
        Ok(())
    }

    fn is_prepared(&self, bound: &Bound, format: Format) -> bool {
        let has = |linear| self.prepared.is_some_and(|prepared| prepared.spool.has(linear, format));
        chosen(bound, true).is_some_and(has)
    }

    /// A linear that is quantized already.
    fn prepared(
        &mut self,
        tensor: &TensorInfo,
        format: Format,
        bound: &Bound,
        report: &mut SectionReport,
    ) -> Result<(), Error> {
        let spool = &self.prepared.expect("it was looked up").spool;
        let linear = chosen(bound, true).expect("it was looked up");
        self.writer.begin(1.0)?;
        let mut distance = Distance::default();
        self.ahead(units(tensor, format, bound), |packer, unit, values| {
            let (cols, stride) = (unit.shape.1, format.padded_cols(unit.shape.1));
            let quantized = spool.rows(linear, format, unit.first..unit.first + unit.rows)?;
            let groups = values
                .chunks_exact(cols)
                .zip(quantized.codes.chunks_exact(cols))
                .flat_map(|(values, codes)| values.chunks(Format::GROUP_COLS).zip(codes.chunks(Format::GROUP_COLS)));
            for ((values, codes), scale) in groups.zip(&quantized.scales) {
                distance.add(values, codes, f16::from_bits(*scale).to_f32());
            }
            let Buffers { codes, blocks, .. } = &mut packer.buffers;
            let codes = fit(codes, unit.rows * stride, 0);
            for (codes, from) in codes.chunks_exact_mut(stride).zip(quantized.codes.chunks_exact(cols)) {
                let (codes, padding) = codes.split_at_mut(cols);
                padding.fill(0);
                codes.copy_from_slice(from);
            }
            let mut out = core::mem::take(blocks);
            let filled = fit(&mut out, format.matrix_blocks(unit.rows, cols), Block::ZERO);
            encode_grouped(format, unit.rows, cols, &packer.buffers.codes, &quantized.scales, filled);
            packer.put(filled.as_bytes())?;
            packer.buffers.blocks = out;
            Ok(())
        })?;
        report.error = Some(distance.relative());
        Ok(())
    }

    /// Chooses the columns apart of a head in two planes, and writes them.
    fn columns(&mut self, tensor: &TensorInfo) -> Result<(), Error> {
        let mut energy = Energy::new(tensor.shape[1] as usize);
        self.ahead(rows_of(tensor), |_, _, values| {
            energy.add(values);
            Ok(())
        })?;
        let columns = energy.columns();
        self.columns = Some(columns);
        self.vector(&columns.to_floats())
    }

    /// One plane of a head in two, its columns apart, or its norms.
    fn split_head(&mut self, tensor: &TensorInfo, kind: Kind) -> Result<(), Error> {
        let columns = self.columns.expect("the columns come first");
        self.writer.begin(1.0)?;
        self.ahead(rows_of(tensor), |packer, unit, values| {
            let (cols, stride) = (unit.shape.1, unit.format.padded_cols(unit.shape.1));
            let codes = fit(&mut packer.buffers.codes, unit.rows * stride, 0);
            let (mut scales, mut steps, mut norms) = ([0.0; UNIT_ROWS], [0.0; UNIT_ROWS], [0u16; UNIT_ROWS]);
            let mut apart = [[0; COLUMNS]; UNIT_ROWS];
            for (r, (values, codes)) in values.chunks_exact(cols).zip(codes.chunks_exact_mut(stride)).enumerate() {
                let (codes, padding) = codes.split_at_mut(cols);
                padding.fill(0);
                let row = split::row(values, &columns, codes);
                (scales[r], steps[r], norms[r], apart[r]) = (row.scale, row.step.into(), row.norm, row.apart);
                split::plane(codes, if kind == Kind::Head { Plane::High } else { Plane::Low });
            }
            match kind {
                Kind::HeadApart => {
                    let unit = Unit { format: split::APART, shape: (unit.shape.0, COLUMNS), ..*unit };
                    let apart = apart[..unit.rows].as_flattened();
                    fit(&mut packer.buffers.codes, apart.len(), 0).copy_from_slice(apart);
                    packer.put_codes(&unit)?;
                    packer.put_scales(&unit, &steps[..unit.rows])?;
                }
                Kind::HeadNorms => packer.put(norms.as_bytes())?,
                _ => {
                    packer.put_codes(unit)?;
                    packer.put_scales(unit, &scales[..unit.rows])?;
                }
            }
            Ok(())
        })
    }

    fn vector(&mut self, values: &[f32]) -> Result<(), Error> {
        self.writer.begin(1.0)?;
        self.put(values.as_bytes())
    }

    fn begin_ternary(&mut self, format: Format, multiplier: f32, report: &mut SectionReport) -> Result<(), Error> {
        let scale = if format.has_row_scales() { 1.0 } else { multiplier };
        report.scale = (!format.has_row_scales()).then_some(multiplier);
        self.writer.begin(scale)
    }

    /// Ternarizes float masters: once over them for the mean, once for the weights.
    fn masters(
        &mut self,
        tensor: &TensorInfo,
        format: Format,
        bound: &Bound,
        report: &mut SectionReport,
    ) -> Result<(), Error> {
        let mut sum = MagnitudeSum::default();
        // Of all rows, whichever of them this matrix has.
        self.ahead(rows_of(tensor), |_, _, values| {
            sum.add(values);
            Ok(())
        })?;
        let rule = Absmean::new(sum.mean());
        self.begin_ternary(format, rule.multiplier, report)?;
        let mut distance = Distance::default();
        self.ahead(units(tensor, format, bound), |packer, unit, values| {
            let (cols, stride) = (unit.shape.1, unit.format.padded_cols(unit.shape.1));
            let codes = fit(&mut packer.buffers.codes, unit.rows * stride, 0);
            for (values, codes) in values.chunks_exact(cols).zip(codes.chunks_exact_mut(stride)) {
                let (codes, padding) = codes.split_at_mut(cols);
                padding.fill(0);
                rule.ternarize(values, codes);
                distance.add(values, codes, rule.multiplier);
            }
            packer.put_ternary(unit, rule.multiplier)
        })?;
        report.distance = Some(distance.relative());
        if distance.relative() > FAR && !self.lossy {
            let what = far(distance.relative(), "--lossy makes it ternary all the same");
            return Err(Error::tensor(self.checkpoint.path_of(tensor), &tensor.name, what));
        }
        Ok(())
    }

    /// Has the numbers of units read and decoded by a thread of its own, and does `each` with them in their order meanwhile. All
    /// of them must be finite.
    fn ahead<'u>(
        &mut self,
        units: impl Iterator<Item = Unit<'u>> + Send,
        mut each: impl FnMut(&mut Self, &Unit<'u>, &[f32]) -> Result<(), Error>,
    ) -> Result<(), Error> {
        let (checkpoint, mut raw) = (self.checkpoint, core::mem::take(&mut self.buffers.raw));
        let (full, filled) = mpsc::channel();
        let (give, empty) = mpsc::channel();
        let to_fill = &mut raw;
        let read = move || {
            for unit in units {
                // Whoever takes the numbers has left when something was wrong with them.
                let Ok(mut floats) = empty.recv() else { break };
                let values = fit(&mut floats, unit.rows * unit.shape.1, 0.0);
                let first = ((unit.before + unit.first) * unit.shape.1) as u64;
                let read = checkpoint.read_floats(unit.tensor, first, to_fill, values);
                if full.send(read.map(|()| (unit, floats))).is_err() {
                    break;
                }
            }
            empty
        };
        let result = thread::scope(|scope| {
            // What ends this closure early ends the reader, too: it gets no more to fill.
            let give = give;
            let reader = thread::Builder::new().spawn_scoped(scope, read);
            let reader = reader.map_err(|e| Error::Options(format!("the system gives no thread to read with: {e}")))?;
            // As long as the reader may wait for them there is someone to take them.
            core::mem::take(&mut self.buffers.floats).into_iter().for_each(|floats| drop(give.send(floats)));
            for read in filled {
                let (unit, floats) = read?;
                each(self, &unit, &floats)?;
                drop(give.send(floats));
            }
            let left = reader.join().unwrap_or_else(|panic| resume_unwind(panic));
            for (buffer, floats) in self.buffers.floats.iter_mut().zip(left.try_iter()) {
                *buffer = floats;
            }
            Ok(())
        });
        self.buffers.raw = raw;
        result
    }

    /// The codes of a unit of numbers that are ternary but for a factor.
    fn signs(&mut self, unit: &Unit<'_>, values: &[f32]) {
        let (cols, stride) = (unit.shape.1, unit.format.padded_cols(unit.shape.1));
        let codes = fit(&mut self.buffers.codes, unit.rows * stride, 0);
        for (values, codes) in values.chunks_exact(cols).zip(codes.chunks_exact_mut(stride)) {
            let (codes, padding) = codes.split_at_mut(cols);
            padding.fill(0);
            codes.iter_mut().zip(values).for_each(|(code, v)| *code = i8::from(*v > 0.0) - i8::from(*v < 0.0));
        }
    }

    /// Unpacks a unit of codes. Byte row `r % R` holds row `r` at bit `2 (r / R)`, `R` being a quarter of the rows, rounded
    /// up; where that rounding leaves codes without a row, nobody looks at them.
    fn read_packed(&mut self, unit: &Unit<'_>) -> Result<(), Error> {
        let (cols, stride) = (unit.shape.1, unit.format.padded_cols(unit.shape.1));
        let quarter = unit.shape.0.div_ceil(4);
        let Buffers { raw, codes, .. } = &mut self.buffers;
        let codes = fit(codes, unit.rows * stride, 0);
        let mut done = 0;
        while done < unit.rows {
            let row = unit.first + done;
            let (plane, byte_row) = (row / quarter, row % quarter);
            let run = (unit.rows - done).min(quarter - byte_row);
            let raw = fit(raw, run * cols, 0);
            self.checkpoint.read(unit.tensor, (byte_row * cols) as u64, raw)?;
            let rows = raw.chunks_exact(cols).zip(codes[done * stride..].chunks_exact_mut(stride));
            for (r, (bytes, codes)) in rows.enumerate() {
                let (codes, padding) = codes.split_at_mut(cols);
                padding.fill(0);
                for (code, byte) in codes.iter_mut().zip(bytes) {
                    *code = (byte >> (2 * plane) & 3) as i8 - 1;
                }
                if let Some(column) = codes.iter().position(|&c| c == 2) {
                    let what = format!("row {}, column {column}: code 3, which no weight has", row + r);
                    return Err(Error::tensor(self.checkpoint.path_of(unit.tensor), &unit.tensor.name, what));
                }
            }
            done += run;
        }
        Ok(())
    }

    /// Encodes the codes and writes them.
    fn put_ternary(&mut self, unit: &Unit<'_>, multiplier: f32) -> Result<(), Error> {
        if unit.format == Format::B1 {
            self.refuse_zeros(unit)?;
        }
        let scales = [multiplier; UNIT_ROWS];
        self.put_unit(unit, &scales[..unit.rows])
    }

    /// Writes the codes of a unit and its row scales.
    fn put_unit(&mut self, unit: &Unit<'_>, scales: &[f32]) -> Result<(), Error> {
        if let Some(live) = unit.live {
            return self.put_live(unit, live);
        }
        let Some(kept) = unit.kept else {
            self.put_codes(unit)?;
            return self.put_scales(unit, scales);
        };
        let (whole, cols) = (unit.format.padded_cols(unit.shape.1), kept.shape().1 as usize);
        let stride = unit.format.padded_cols(cols);
        for (r, scale) in scales.iter().enumerate().filter(|(r, _)| kept.rows[unit.first + r]) {
            let Buffers { codes, kept: rows, kept_scales, .. } = &mut self.buffers;
            rows.reserve_exact((UNIT_ROWS * stride).saturating_sub(rows.len()));
            let end = rows.len() + stride;
            rows.extend(codes[r * whole..].iter().zip(&kept.cols).filter(|(_, kept)| **kept).map(|(code, _)| *code));
            rows.resize(end, 0);
            kept_scales.push(*scale);
            if kept_scales.len() == UNIT_ROWS {
                self.put_kept(unit, cols)?;
            }
        }
        let last = unit.first + unit.rows == unit.shape.0;
        if last && !self.buffers.kept_scales.is_empty() { self.put_kept(unit, cols) } else { Ok(()) }
    }

    /// Writes the live blocks of a unit.
    fn put_live(&mut self, unit: &Unit<'_>, live: &Live) -> Result<(), Error> {
        let (cols, stride) = (unit.shape.1, unit.format.padded_cols(unit.shape.1));
        let most = live.shape.unit_blocks(unit.rows, cols, unit.rows.div_ceil(STRIP_ROWS) * live.shape.across(cols));
        let mut blocks = core::mem::take(&mut self.buffers.blocks);
        let out = fit(&mut blocks, most, Block::ZERO);
        let (first, codes) = (unit.first / STRIP_ROWS, &self.buffers.codes);
        let is_live = |s, b| live.is_live(first + s, b);
        let n = encode_unit(live.shape, unit.rows, cols, is_live, |r, c| codes[r * stride + c], out);
        self.put(out[..n].as_bytes())?;
        self.buffers.blocks = blocks;
        Ok(())
    }

    /// Writes a unit of the rows that were kept.
    fn put_kept(&mut self, unit: &Unit<'_>, cols: usize) -> Result<(), Error> {
        let (codes, scales) = (core::mem::take(&mut self.buffers.kept), core::mem::take(&mut self.buffers.kept_scales));
        let whole = core::mem::replace(&mut self.buffers.codes, codes);
        let unit = Unit { shape: (unit.shape.0, cols), rows: scales.len(), kept: None, ..*unit };
        self.put_codes(&unit)?;
        self.put_scales(&unit, &scales)?;
        (self.buffers.kept, self.buffers.kept_scales) = (core::mem::replace(&mut self.buffers.codes, whole), scales);
        self.buffers.kept.clear();
        self.buffers.kept_scales.clear();
        Ok(())
    }

    fn refuse_zeros(&self, unit: &Unit<'_>) -> Result<(), Error> {
        let (cols, stride) = (unit.shape.1, unit.format.padded_cols(unit.shape.1));
        let is_kept = |r: usize, c: usize| unit.kept.is_none_or(|kept| kept.rows[unit.first + r] && kept.cols[c]);
        for (r, row) in self.buffers.codes.chunks_exact(stride).enumerate() {
            if let Some(column) = (0..cols).find(|&c| row[c] == 0 && is_kept(r, c)) {
                let what = format!("row {}, column {column} is zero, which b1 cannot hold; use tl", unit.first + r);
                return Err(Error::tensor(self.checkpoint.path_of(unit.tensor), &unit.tensor.name, what));
            }
        }
        Ok(())
    }

    fn put_codes(&mut self, unit: &Unit<'_>) -> Result<(), Error> {
        if unit.transposed {
            return self.put_columns(unit);
        }
        let mut blocks = core::mem::take(&mut self.buffers.blocks);
        let out = fit(&mut blocks, unit.format.matrix_blocks(unit.rows, unit.shape.1), Block::ZERO);
        encode(unit.format, unit.rows, unit.shape.1, &self.buffers.codes, out);
        self.put(out.as_bytes())?;
        self.buffers.blocks = blocks;
        Ok(())
    }

    /// Keeps the codes of a unit by their columns; writes all of them when the last unit has come.
    fn put_columns(&mut self, unit: &Unit<'_>) -> Result<(), Error> {
        let (rows, cols) = unit.shape;
        let (stride, height) = (unit.format.padded_cols(cols), unit.format.padded_cols(rows));
        let Buffers { codes, columns, .. } = &mut self.buffers;
        if unit.first == 0 {
            fit(columns, cols * height, 0).fill(0);
        }
        for (c, column) in columns.chunks_exact_mut(height).enumerate() {
            for (r, code) in column[unit.first..unit.first + unit.rows].iter_mut().enumerate() {
                *code = codes[r * stride + c];
            }
        }
        if unit.first + unit.rows < rows {
            return Ok(());
        }
        let (columns, mut blocks) = (core::mem::take(columns), core::mem::take(&mut self.buffers.blocks));
        for columns in columns.chunks(UNIT_ROWS * height) {
            let count = columns.len() / height;
            let out = fit(&mut blocks, unit.format.matrix_blocks(count, rows), Block::ZERO);
            encode(unit.format, count, rows, columns, out);
            self.put(out.as_bytes())?;
        }
        (self.buffers.columns, self.buffers.blocks) = (columns, blocks);
        Ok(())
    }

    /// Writes a unit's row scales, padded with zeros to whole blocks, in formats that have them.
    fn put_scales(&mut self, unit: &Unit<'_>, scales: &[f32]) -> Result<(), Error> {
        if !unit.format.has_row_scales() {
            return Ok(());
        }
        let mut padded = [0.0; UNIT_ROWS];
        padded[..scales.len()].copy_from_slice(scales);
        self.put(padded[..scales.len().next_multiple_of(16)].as_bytes())
    }

    /// Quantizes and writes one unit of a matrix that is not ternary.
    fn dense(&mut self, unit: &Unit<'_>, values: &[f32], distance: &mut Distance) -> Result<(), Error> {
        let (cols, stride) = (unit.shape.1, unit.format.padded_cols(unit.shape.1));
        if unit.format == Format::F16 {
            return self.dense_f16(unit, values);
        }
        if unit.format.is_grouped() {
            return self.dense_grouped(unit, values, distance);
        }
        let codes = fit(&mut self.buffers.codes, unit.rows * stride, 0);
        let mut scales = [0.0; UNIT_ROWS];
        let rows = values.chunks_exact(cols).zip(codes.chunks_exact_mut(stride));
        for ((values, codes), scale) in rows.zip(&mut scales) {
            let (codes, padding) = codes.split_at_mut(cols);
            padding.fill(0);
            *scale = match unit.format {
                Format::I4 => quantize::row_i4(values, codes),
                _ => quantize::row_i8(values, codes),
            };
            distance.add(values, codes, *scale);
        }
        self.put_unit(unit, &scales[..unit.rows])
    }

    /// Writes a unit of numbers that are ternary in each group of columns, but for the group's factor.
    fn grouped(&mut self, unit: &Unit<'_>, values: &[f32]) -> Result<(), Error> {
        self.signs(unit, values);
        let (format, cols) = (unit.format, unit.shape.1);
        let Buffers { codes, halves, blocks, .. } = &mut self.buffers;
        let halves = fit(halves, unit.rows * format.steps(cols), 0);
        for (values, scales) in values.chunks_exact(cols).zip(halves.chunks_exact_mut(format.steps(cols))) {
            for (values, scale) in values.chunks(Format::GROUP_COLS).zip(scales) {
                *scale = quantize::group_scale(values).expect("the numbers were looked at before");
            }
        }
        let mut out = core::mem::take(blocks);
        let filled = fit(&mut out, format.matrix_blocks(unit.rows, cols), Block::ZERO);
        encode_grouped(format, unit.rows, cols, codes, halves, filled);
        self.put(filled.as_bytes())?;
        self.buffers.blocks = out;
        Ok(())
    }

    fn dense_grouped(&mut self, unit: &Unit<'_>, values: &[f32], distance: &mut Distance) -> Result<(), Error> {
        let (format, cols) = (unit.format, unit.shape.1);
        let (stride, groups) = (format.padded_cols(cols), format.steps(cols));
        let Buffers { codes, halves, blocks, .. } = &mut self.buffers;
        let (codes, halves) = (fit(codes, unit.rows * stride, 0), fit(halves, unit.rows * groups, 0));
        codes.fill(0);
        let rows = values.chunks_exact(cols).zip(codes.chunks_exact_mut(stride)).zip(halves.chunks_exact_mut(groups));
        for (r, ((values, codes), scales)) in rows.enumerate() {
            let parts = values.chunks(Format::GROUP_COLS).zip(codes.chunks_exact_mut(Format::GROUP_COLS)).zip(scales);
            for (g, ((values, codes), scale)) in parts.enumerate() {
                *scale = quantize::group(format, values, &mut codes[..values.len()]).ok_or_else(|| {
                    let (row, column) = (unit.first + r, g * Format::GROUP_COLS);
                    let what = format!("row {row}, columns from {column}: a scale beyond f16; use --head i8");
                    Error::tensor(self.checkpoint.path_of(unit.tensor), &unit.tensor.name, what)
                })?;
                distance.add(values, codes, f16::from_bits(*scale).to_f32());
            }
        }
        let mut out = core::mem::take(blocks);
        let filled = fit(&mut out, format.matrix_blocks(unit.rows, cols), Block::ZERO);
        encode_grouped(format, unit.rows, cols, codes, halves, filled);
        self.put(filled.as_bytes())?;
        self.buffers.blocks = out;
        Ok(())
    }

    fn dense_f16(&mut self, unit: &Unit<'_>, values: &[f32]) -> Result<(), Error> {
        let (cols, stride) = (unit.shape.1, unit.format.padded_cols(unit.shape.1));
        let Buffers { halves, blocks, .. } = &mut self.buffers;
        let halves = fit(halves, unit.rows * stride, 0);
        let rows = values.chunks_exact(cols).zip(halves.chunks_exact_mut(stride));
        for (r, (values, halves)) in rows.enumerate() {
            let (halves, padding) = halves.split_at_mut(cols);
            padding.fill(0);
            quantize::row_f16(values, halves).map_err(|column| {
                let (row, value) = (unit.first + r, values[column]);
                let what = format!("row {row}, column {column}: {value} is beyond f16; use --head i8");
                Error::tensor(self.checkpoint.path_of(unit.tensor), &unit.tensor.name, what)
            })?;
        }
        let mut out = core::mem::take(blocks);
        let filled = fit(&mut out, Format::F16.matrix_blocks(unit.rows, cols), Block::ZERO);
        encode_f16(unit.rows, cols, halves, filled);
        self.put(filled.as_bytes())?;
        self.buffers.blocks = out;
        Ok(())
    }
}
