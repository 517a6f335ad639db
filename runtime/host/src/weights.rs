//! Where weights lie while a model runs, and how much memory they may take.
use crate::open::mib;
use crate::system;
use anyhow::{Context as _, bail, ensure};
use bitnet_kernel::Block;
use bitnet_runtime::cgroup::available_memory;
use bitnet_runtime::image::Kind;
use bitnet_runtime::source::{BlockDevice as _, ImageFile, Pieces, Ring, RingOptions, Span, Watch};
use bitnet_runtime::{Config, Image, Limits, Plan};
use clap::ValueEnum;
use std::fmt;
use std::fs::File;
use std::io::{BufWriter, Write as _};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Where weights are read from.
#[derive(Clone, Debug, clap::Args)]
pub struct WeightArgs {
    /// Where weights are read from.
    #[arg(long, value_enum, default_value_t = Source::Auto)]
    pub source: Source,
    /// The most memory that the whole program may take, such as 256M or 1G: what fits stays in memory, the rest of the weights is
    /// streamed [default: what the system and the memory limits of its groups leave].
    #[arg(long, value_parser = size)]
    pub ram: Option<u64>,
    /// While streaming, compare every piece with its checksum before it is used. The whole image is read once first. Rows of
    /// the embedding and of a head's second plane are not compared.
    #[arg(long)]
    pub verify_stream: bool,
    /// Write when pieces were read and waited for, for chrome://tracing or ui.perfetto.dev: the first 32,768 reads and waits.
    #[arg(long, value_name = "FILE")]
    pub timeline: Option<PathBuf>,
    /// Bytes that the program will take besides, and that weights must leave.
    #[arg(skip)]
    pub reserve: u64,
}

/// Where weights are read from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Source {
    /// Resident if that fits, else streamed.
    Auto,
    /// A memory map: the system's page cache holds what fits. Whoever cuts the file short ends the program.
    Mapped,
    /// A copy in memory of its own, on pages of 2 MiB where the system gives them: faster to read, and never dropped.
    Resident,
    /// Read for every pass into a few small buffers, ahead of the computation; with --ram, what fits stays in memory.
    Streamed,
}

/// Bytes of weights that a pass goes over, zeros with them and rows that an exact pass can leave out.
#[derive(Clone, Copy, Debug)]
pub struct PassBytes {
    /// Of the layers.
    pub layers: u64,
    /// Of the head, which a prompt needs once, after its last token.
    pub head: u64,
}

impl PassBytes {
    /// All sections but the tokenizer and an embedding of its own, of which one row is read.
    pub fn of(image: &Image<'_>) -> Self {
        let unread = [Kind::Tokenizer as u8, Kind::Embedding as u8];
        let bytes = |head: bool| {
            let records = image.sections().records().iter().filter(|r| !unread.contains(&r.kind));
            let those =
                records.filter(|r| (r.kind >= Kind::FinalNorm as u8 && r.kind <= Kind::HeadInputNorm as u8) == head);
            those.map(|r| u64::from(r.blocks.get()) * Block::BYTES as u64).sum()
        };
        Self { layers: bytes(false), head: bytes(true) }
    }
    /// Of a token of a reply.
    pub const fn token(self) -> u64 {
        self.layers + self.head
    }
}

/// Bytes as people write them.
///
/// # Errors
/// What is expected.
pub fn size(text: &str) -> Result<u64, String> {
    let wrong = || "expected bytes, or a number with K, M or G, such as 256M".to_owned();
    let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let shift = match unit {
        "" => 0,
        "K" | "KiB" => 10,
        "M" | "MiB" => 20,
        "G" | "GiB" => 30,
        _ => return Err(wrong()),
    };
    number.parse().ok().and_then(|n: u64| n.checked_mul(1 << shift)).ok_or_else(wrong)
}

/// Where weights will lie.
#[derive(Debug)]
pub enum Place {
    /// In the page cache.
    Mapped,
    /// In memory of their own.
    Resident,
    /// In these pieces, some of them in memory, through so many buffers.
    Streamed {
        /// The pieces.
        pieces: Pieces,
        /// The buffers.
        slots: usize,
    },
}

/// How much memory weights take.
#[derive(Clone, Copy, Debug)]
pub enum Weights {
    /// In the page cache.
    Mapped(u64),
    /// In memory of their own.
    Resident(u64),
    /// Some of them, and buffers for the rest.
    Streamed {
        /// Bytes of those in memory.
        resident: u64,
        /// Bytes of the buffers.
        buffers: u64,
    },
}

impl Weights {
    /// Bytes of memory.
    pub const fn bytes(self) -> u64 {
        match self {
            Self::Mapped(bytes) | Self::Resident(bytes) => bytes,
            Self::Streamed { resident, buffers } => resident + buffers,
        }
    }
    /// Those of them that are pages of the file.
    pub const fn mapped(self) -> u64 {
        if let Self::Mapped(bytes) = self { bytes } else { 0 }
    }
}

impl fmt::Display for Weights {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::Mapped(bytes) => write!(f, "weights {} mapped", mib(bytes)),
            Self::Resident(bytes) => write!(f, "weights {} resident", mib(bytes)),
            Self::Streamed { resident, buffers } => {
                write!(f, "weights {} resident, buffers of the rest {}", mib(resident), mib(buffers))
            }
        }
    }
}

/// What is needed besides weights: the plan, and what the program, its tokenizer and one conversation's tokens will take.
#[derive(Clone, Copy, Debug)]
struct Rest<'a> {
    plan: &'a Plan,
    length: &'a str,
    own: u64,
}

/// Of what length a conversation can be.
pub fn length(config: &Config, limits: &Limits) -> String {
    if config.is_bounded() { format!("of {} tokens", limits.context) } else { "of any length".into() }
}

impl Rest<'_> {
    fn bytes(&self) -> u64 {
        self.plan.bytes() + self.own
    }
}

impl fmt::Display for Rest<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let block = |n: usize| mib((n * Block::BYTES) as u64);
        let Plan { state, scratch, sampler } = *self.plan;
        let (state, scratch, own) = (block(state), block(scratch + sampler), mib(self.own));
        write!(f, "conversation {} {state}, activations {scratch}, program and tokenizer {own}", self.length)
    }
}

/// What is read at once, and how many buffers there are for it: the first that fits the memory.
///
/// Reads of 1 MiB reach what a disk gives; more and larger buffers even out times.
const BUFFERS: [(u32, usize); 5] = [(2 << 20, 4), (1 << 20, 4), (1 << 19, 4), (0, 3), (0, RingOptions::SLOTS_MIN)];

/// How long a fetch waits for the disk. One that sleeps, or retries a bad sector, takes seconds.
const PATIENCE: Duration = Duration::from_secs(30);

/// Code that is not read from the program's file yet, stacks, and tables of the system's allocator.
const CODE_BYTES: u64 = 4 << 20;
/// Heap that a tokenizer takes, as a multiple of its bytes in the image.
const TOKENIZER_FACTOR: u64 = 16;

impl WeightArgs {
    /// Decides where weights will lie, within --ram or what is available, or says how much would be enough.
    pub fn place(&self, image: &Image<'_>, plan: &Plan, limits: &Limits) -> anyhow::Result<Place> {
        let tokenizer = image.tokenizer().map_or(0, |(_, bytes)| bytes as u64);
        let taken = system::rss().unwrap_or(0);
        let own = taken
            + CODE_BYTES
            + TOKENIZER_FACTOR * tokenizer
            + (self.spans() * size_of::<Span>()) as u64
            + self.reserve;
        let length = length(&image.header().config, limits);
        let rest = Rest { plan, length: &length, own };
        let resident = image.file_bytes();
        // What is taken already is part of --ram, and no part of what is available.
        let have = match self.ram {
            Some(ram) => ram,
            None => available().saturating_add(taken),
        };
        let name = if self.ram.is_some() { "--ram gives" } else { "there are" };
        let fits = resident + rest.bytes() <= have;
        match self.source {
            Source::Mapped if self.ram.is_some() => {
                bail!("--ram says nothing of mapped weights: the system decides how much of them it holds")
            }
            Source::Mapped => Ok(Place::Mapped),
            Source::Resident | Source::Auto if fits => Ok(Place::Resident),
            Source::Resident => bail!(
                "resident it needs {} (weights {}, {rest}) and {name} {}; --source streamed needs less",
                mib(resident + rest.bytes()),
                mib(resident),
                mib(have)
            ),
            Source::Streamed | Source::Auto => {
                let bounded = self.ram.is_some() || self.source == Source::Auto;
                let (pieces, slots) = pieces(image, bounded.then(|| have.saturating_sub(rest.bytes()))).map_err(|least| {
                    anyhow::anyhow!(
                        "streamed it needs at least {} (buffers {}, {rest}) and {name} {}; a smaller --context or --kv i8 \
                         needs less",
                        mib(least + rest.bytes()),
                        mib(least),
                        mib(have)
                    )
                })?;
                if self.source == Source::Auto {
                    // If standard error is closed there is nobody to tell.
                    let _ = writeln!(
                        std::io::stderr(),
                        "(streaming: it needs {} with all its weights, {}, in memory, and {name} {}; {} stay there and {} are read \
                         for every token; {rest})",
                        mib(resident + rest.bytes()),
                        mib(resident),
                        mib(have),
                        mib(pieces.resident_blocks() * Block::BYTES as u64),
                        mib(pieces.streamed_blocks() * Block::BYTES as u64),
                    );
                }
                Ok(Place::Streamed { pieces, slots })
            }
        }
    }

    /// Bytes that a second model would need while the first is in memory, where each is loaded as these options say; none if
    /// there is a bound that one of them was fitted into.
    pub fn beside(&self, image: &Image<'_>, plan: &Plan) -> Option<u64> {
        let tokenizer = image.tokenizer().map_or(0, |(_, bytes)| bytes as u64);
        let weights = match self.source {
            Source::Mapped => 0,
            Source::Streamed => u64::from(BUFFERS[0].0) * BUFFERS[0].1 as u64,
            Source::Auto | Source::Resident => image.file_bytes(),
        };
        self.ram.is_none().then(|| weights + plan.bytes() + TOKENIZER_FACTOR * tokenizer + self.reserve)
    }

    /// Reads and waits to record.
    const fn spans(&self) -> usize {
        if self.timeline.is_some() { SPANS_MAX } else { 0 }
    }

    /// Starts streaming.
    pub fn stream(
        &self,
        device: ImageFile,
        image: &Image<'_>,
        pieces: Pieces,
        slots: usize,
        path: &Path,
    ) -> anyhow::Result<(Ring, Stream)> {
        let bytes = Ring::bytes(&pieces, slots, device.align_blocks());
        let resident = pieces.resident_blocks() * Block::BYTES as u64;
        let options = RingOptions { slots, patience: PATIENCE, verify: self.verify_stream, spans: self.spans() };
        let direct = device.is_direct();
        let mut devices = vec![device];
        // A second reader makes it faster; without it goes on as well.
        devices.extend(devices[0].try_clone());
        let readers = devices.len();
        let ring = Ring::start(devices, image, pieces, options).with_context(|| format!("{}", path.display()))?;
        let (watch, buffers, path) = (ring.watch(), bytes - resident, path.into());
        let stream = Stream { watch, resident, buffers, slots, readers, direct, path };
        Ok((ring, stream))
    }

    /// Writes the timeline, if there is to be one.
    pub fn write_timeline(&self, stream: &Stream) -> anyhow::Result<()> {
        let Some(path) = &self.timeline else { return Ok(()) };
        // Event by event: all at once they take more memory than --ram counts for them.
        let write = || {
            let mut file = BufWriter::new(File::create(path)?);
            write!(file, "{{\"displayTimeUnit\":\"ms\",\"traceEvents\":[")?;
            let (mut written, mut separator) = (Ok(()), "\n");
            stream.watch.spans(&mut |span| {
                if written.is_ok() {
                    written = write!(file, "{separator}{}", event(span));
                }
                separator = ",\n";
            });
            written?;
            writeln!(file, "]}}")?;
            file.flush()
        };
        write().with_context(|| format!("writing {}", path.display()))
    }
}

/// One read or wait as a complete event of the Trace Event Format, times in microseconds.
fn event(span: &Span) -> String {
    let (name, thread) = span.reader.map_or(("wait", 1), |reader| ("read", 2 + reader));
    let micros = |t: Duration| t.as_nanos() as f64 / 1e3;
    let (from, time) = (micros(span.from), micros(span.to - span.from));
    let (block, bytes) = (span.start, u64::from(span.blocks) * Block::BYTES as u64);
    format!(
        r#"{{"name":"{name}","ph":"X","pid":1,"tid":{thread},"ts":{from},"dur":{time},"args":{{"block":{block},"bytes":{bytes}}}}}"#
    )
}

/// Of what is available so large a part is left alone: what the system says is an estimate.
const MARGIN: u64 = 16;
/// Some tens of gigabytes of streaming.
const SPANS_MAX: usize = 1 << 15;

/// Bytes that programs may still take, as far as the system knows.
pub fn available() -> u64 {
    available_memory().map_or(u64::MAX, |free| free - free / MARGIN)
}

/// Pieces and buffers that take at most `room`, if it is bounded, and keep in memory what fits; or the least that would do.
fn pieces(image: &Image<'_>, room: Option<u64>) -> Result<(Pieces, usize), u64> {
    let align = (ImageFile::DIRECT_BYTES / Block::BYTES) as u32;
    let mut least = 0;
    for (bytes, slots) in BUFFERS {
        let mut pieces = Pieces::new(image, bytes / Block::BYTES as u32);
        least = Ring::bytes(&pieces, slots, align);
        let Some(room) = room else { return Ok((pieces, slots)) };
        if let Some(left) = room.checked_sub(least) {
            pieces.keep(left / Block::BYTES as u64);
            return Ok((pieces, slots));
        }
    }
    Err(least)
}

/// Weights that are streamed.
#[derive(Debug)]
pub struct Stream {
    /// Tells what was read and waited for.
    pub watch: Watch,
    /// Bytes of the weights in memory.
    pub resident: u64,
    /// Bytes of the buffers.
    pub buffers: u64,
    /// How many buffers.
    pub slots: usize,
    /// How many threads fill them.
    pub readers: usize,
    /// Whether reads go past the page cache.
    pub direct: bool,
    path: PathBuf,
}

impl Stream {
    /// How much memory its weights take.
    pub const fn weights(&self) -> Weights {
        Weights::Streamed { resident: self.resident, buffers: self.buffers }
    }
    /// Bytes a second of the same reads with nothing else to do.
    pub fn storage_speed(&self) -> anyhow::Result<f64> {
        let pieces = self.watch.pieces();
        let bytes = pieces.streamed_blocks() * Block::BYTES as u64;
        ensure!(bytes > 0, "nothing is streamed");
        let mut device = ImageFile::new(File::open(&self.path)?)?;
        Ok(bytes as f64 / Ring::read_alone(&mut device, pieces)?.as_secs_f64())
    }
}
