//! From arguments to a model in memory.
use crate::signature::Signed;
use crate::weights::{Place, Stream, WeightArgs, Weights, length};
use anyhow::{Context as _, bail, ensure};
use bitnet_kernel::{Block, Kernels};
use bitnet_runtime::cgroup::available_memory;
use bitnet_runtime::image::{HEADER_BYTES_MAX, PREFIX_BYTES, checksum};
use bitnet_runtime::memory::KvFormat;
use bitnet_runtime::parallel::{Threads, Tuned};
use bitnet_runtime::source::{ImageFile, Mapped, WeightSource, load_file, map_file};
use bitnet_runtime::{Image, Limits, Model, Plan, State, backend};
use clap::ValueEnum;
use std::fmt;
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};
use zerocopy::IntoBytes as _;

/// The image and how to run it.
#[derive(Clone, Debug, clap::Args)]
pub struct ModelArgs {
    /// The image, made by `bitnet-pack pack`.
    pub image: PathBuf,
    /// Use the image only if IMAGE.sig is its signature by this key: Ed25519, in PEM. `bitnet-pack sign` makes signatures.
    #[arg(long, value_name = "PUBLIC_KEY")]
    pub require_signature: Option<PathBuf>,
    /// Threads.
    #[command(flatten)]
    pub threads: ThreadArgs,
    /// Kernels.
    #[command(flatten)]
    pub backend: BackendArgs,
    /// Positions a conversation can have [default: what the image plans]. Conversations of models with a window or a recurrence
    /// have no end: there it is how many of the last tokens are kept, for penalties.
    #[arg(long)]
    pub context: Option<u32>,
    /// Prompt tokens that share one pass over the weights, 1 to 16 [default: what the image plans].
    #[arg(long)]
    pub batch: Option<u32>,
    /// How keys and values are kept [default: what the image plans].
    #[arg(long, value_enum)]
    pub kv: Option<Kv>,
    /// Where weights are.
    #[command(flatten)]
    pub weights: WeightArgs,
}

/// How many threads compute, and where. The number changes the time and never the result.
#[derive(Clone, Debug, clap::Args)]
pub struct ThreadArgs {
    /// Threads: a number, or `auto` for as many as prove fastest of those that affinity, cpuset and the cgroup's quota let
    /// run at once.
    #[arg(long, default_value = "auto", value_parser = threads)]
    pub threads: Threads,
    /// Threads while a prompt is read [default: --threads; `auto` chooses apart for either].
    #[arg(long, value_parser = threads)]
    pub prefill_threads: Option<Threads>,
    /// Give every thread a core of its own and keep it there.
    #[arg(long)]
    pub pin: bool,
}

impl ThreadArgs {
    fn start(&self) -> anyhow::Result<Tuned> {
        Tuned::new(self.prefill_threads.unwrap_or(self.threads), self.threads, self.pin).context("starting threads")
    }
}

/// Threads as people write them.
fn threads(text: &str) -> Result<Threads, String> {
    match text.parse() {
        _ if text == "auto" => Ok(Threads::Auto),
        Ok(n @ 1..=256) => Ok(Threads::Fixed(n)),
        _ => Err("neither `auto` nor a number from 1 to 256".to_owned()),
    }
}

/// Which kernels compute.
#[derive(Clone, Debug, clap::Args)]
pub struct BackendArgs {
    /// Kernels to use in place of the best that this CPU runs.
    #[arg(long, env = backend::VARIABLE, value_parser = backend_names())]
    pub backend: Option<String>,
}

fn backend_names() -> clap::builder::PossibleValuesParser {
    backend::names().collect::<Vec<_>>().into()
}

/// How keys and values are kept.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub enum Kv {
    /// Single precision.
    F32,
    /// Half precision.
    F16,
    /// Eight bits and a scale a head and position.
    I8,
}

impl BackendArgs {
    /// The kernels to use.
    pub fn kernels(&self) -> anyhow::Result<&'static dyn Kernels> {
        let Some(name) = &self.backend else { return Ok(backend::best()) };
        let available = || backend::available().map(Kernels::name).collect::<Vec<_>>().join(", ");
        backend::by_name(name).with_context(|| {
            format!("this CPU has no {name} kernels, or they are not written yet; it runs {}", available())
        })
    }
}

/// A model that is open but not yet in memory.
pub struct Opened<'a> {
    /// Its checked header.
    pub image: Image<'a>,
    /// What was asked for.
    pub limits: Limits,
    /// The memory that follows.
    pub plan: Plan,
    /// What computes.
    pub kernels: &'static dyn Kernels,
    /// Where it computes.
    pub threads: &'a Tuned,
    /// Where the weights are.
    pub source: &'a mut dyn WeightSource,
    /// How much memory the weights take.
    pub weights: Weights,
    /// Tells what streaming does, if weights are streamed.
    pub stream: Option<&'a Stream>,
    /// Room for one conversation and its model.
    pub memory: &'a mut Memory,
}

impl fmt::Debug for Opened<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut f = f.debug_struct("Opened");
        f.field("limits", &self.limits)
            .field("plan", &self.plan)
            .field("kernels", &self.kernels)
            .finish_non_exhaustive()
    }
}

impl Opened<'_> {
    /// Memory that running takes, in bytes: weights, conversation, activations and sampler.
    pub const fn plan_bytes(&self) -> u64 {
        self.weights.bytes() + self.plan.bytes()
    }
    /// Compares the weights that lie in memory with their checksums. Streamed ones are compared as they come, with
    /// `--verify-stream`.
    ///
    /// # Errors
    /// Which section is damaged.
    pub fn verify(&mut self) -> anyhow::Result<()> {
        if let Weights::Streamed { .. } = self.weights {
            return Ok(());
        }
        for (i, record) in self.image.sections().records().iter().enumerate() {
            let bytes = self.source.fetch(record.extent())?.as_bytes();
            ensure!(
                checksum(bytes) == record.checksum.get(),
                "section {i} is damaged; `bitnet-pack verify` says where"
            );
        }
        Ok(())
    }
    /// The plan in words.
    pub fn plan_text(&self) -> String {
        let block = |n: usize| mib((n * Block::BYTES) as u64);
        let Plan { state, scratch, sampler } = self.plan;
        format!(
            "{} ({}, conversation {} {}, activations {})",
            mib(self.plan_bytes()),
            self.weights,
            length(&self.image.header().config, &self.limits),
            block(state),
            block(scratch + sampler),
        )
    }
}

/// Memory for a model and one conversation, as large as the plan says.
#[derive(Debug)]
pub struct Memory {
    state: Vec<Block>,
    scratch: Vec<Block>,
    sampler: Vec<Block>,
}

impl Memory {
    /// Refuses a plan beyond what this machine has: an image may plan for more.
    fn check(plan: &Plan, limits: &Limits) -> anyhow::Result<()> {
        let available = available_memory().unwrap_or(u64::MAX);
        ensure!(plan.bytes() <= available, "{} and {} are available", too_large(plan, limits), mib(available));
        Ok(())
    }
    /// Takes what the plan says, or says why not.
    fn new(plan: &Plan, limits: &Limits) -> anyhow::Result<Self> {
        let blocks = |n| {
            let mut blocks = Vec::new();
            blocks.try_reserve_exact(n).with_context(|| too_large(plan, limits))?;
            blocks.resize(n, Block::ZERO);
            anyhow::Ok(blocks)
        };
        Ok(Self { state: blocks(plan.state)?, scratch: blocks(plan.scratch)?, sampler: blocks(plan.sampler)? })
    }
}

fn too_large(plan: &Plan, limits: &Limits) -> String {
    let needed = mib(plan.bytes());
    format!("a context of {} needs {needed} of memory (a smaller --context or --kv i8 needs less)", limits.context)
}

impl<'a> Opened<'a> {
    /// Makes a model and an empty conversation of it, and gives the memory of a sampler.
    pub fn load(self) -> anyhow::Result<(Model<'a>, State<'a>, &'a mut [Block])> {
        let Self { image, limits, kernels, threads, source, memory, .. } = self;
        let state = State::new(&image.header().config, &limits, &mut memory.state)?;
        Ok((Model::new(&image, limits, kernels, threads, source, &mut memory.scratch)?, state, &mut memory.sampler))
    }
}

/// Opens the image and runs `f` with it on the threads that were asked for.
pub fn with_model<R>(args: &ModelArgs, f: impl FnOnce(Opened<'_>) -> anyhow::Result<R>) -> anyhow::Result<R> {
    let kernels = args.backend.kernels()?;
    let threads = args.threads.start()?;
    let path = args.image.display();
    let (file, header, file_bytes) = read_image(&args.image)?;
    let signed = args.require_signature.as_ref().map(|key| Signed::read(key, &args.image)).transpose()?;
    let (image, limits, plan) = planned(args, &header, file_bytes)?;
    Memory::check(&plan, &limits)?;
    let place = args.weights.place(&image, &plan, &limits).with_context(|| format!("{path}"))?;
    let (threads, memory) = (&threads, &mut Memory::new(&plan, &limits)?);
    let open = |source: &mut dyn WeightSource, weights, stream: Option<&Stream>| {
        threads.pool().enter(|| f(Opened { image, limits, plan, kernels, threads, source, weights, stream, memory }))
    };
    match place {
        Place::Mapped | Place::Resident => {
            let (map, weights) = if let Place::Mapped = place {
                (map_file(&file).with_context(|| format!("mapping {path}"))?, Weights::Mapped(file_bytes))
            } else {
                let map = load_file(&file, file_bytes as usize).with_context(|| format!("reading {path}"))?;
                (map, Weights::Resident(file_bytes))
            };
            // Between the check and the map the file may have become another one.
            ensure!(map.len() as u64 == file_bytes, "{path}: the file changed while it was opened");
            // The header that is used, and the rest as it lies in memory: what happens to the file cannot matter.
            let signed = signed.map_or(Ok(()), |signed| signed.check(&header, &map[header.len()..]));
            signed.with_context(|| format!("{path}"))?;
            open(&mut Mapped::from_bytes(&map)?, weights, None)
        }
        Place::Streamed { pieces, slots } => {
            let signing = file.try_clone().with_context(|| format!("{path}"))?;
            // What is written to the file from now on makes reading fail.
            let device = ImageFile::new(file).with_context(|| format!("{path}"))?;
            let signed = signed.map_or(Ok(()), |signed| signed.check_file(&header, &signing));
            signed.with_context(|| format!("{path}"))?;
            let (mut ring, stream) = args.weights.stream(device, &image, pieces, slots, &args.image)?;
            let done = open(&mut ring, stream.weights(), Some(&stream));
            args.weights.write_timeline(&stream)?;
            done
        }
    }
}

/// Looks at the image without loading it: its header, and what it would need with these arguments.
///
/// # Errors
/// If it cannot be read, or the arguments ask for what it cannot do; and those of `f`.
pub fn with_image<R>(
    args: &ModelArgs,
    f: impl FnOnce(Image<'_>, Limits, Plan) -> anyhow::Result<R>,
) -> anyhow::Result<R> {
    let (_, header, file_bytes) = read_image(&args.image)?;
    let (image, limits, plan) = planned(args, &header, file_bytes)?;
    f(image, limits, plan)
}

/// Opens an image and reads its header; gives the file's bytes too.
fn read_image(path: &Path) -> anyhow::Result<(File, Vec<u8>, u64)> {
    let (file, file_bytes) = open_file(path)?;
    let header = read_header(&file, file_bytes).with_context(|| format!("{}", path.display()))?;
    Ok((file, header, file_bytes))
}

fn planned<'a>(args: &ModelArgs, header: &'a [u8], file_bytes: u64) -> anyhow::Result<(Image<'a>, Limits, Plan)> {
    let image = Image::check(header, file_bytes).with_context(|| format!("{}", args.image.display()))?;
    let limits = limits(args, &image)?;
    let plan = Plan::new(&image.header().config, &limits);
    Ok((image, limits, plan))
}

fn limits(args: &ModelArgs, image: &Image<'_>) -> anyhow::Result<Limits> {
    let mut limits = image.header().plan.limits;
    limits.context = args.context.unwrap_or(limits.context);
    limits.batch = args.batch.unwrap_or(limits.batch);
    limits.kv = match args.kv {
        None => limits.kv,
        Some(Kv::F32) => KvFormat::F32,
        Some(Kv::F16) => KvFormat::F16,
        Some(Kv::I8) => KvFormat::I8,
    };
    limits.check(&image.header().config)?;
    Ok(limits)
}

/// Opens a regular file; anything else could block or have no length.
fn open_file(path: &Path) -> anyhow::Result<(File, u64)> {
    let name = path.display();
    let metadata = std::fs::metadata(path).with_context(|| format!("{name}"))?;
    if metadata.is_dir() {
        bail!("{name} is a directory, not an image (a checkpoint? convert it with `bitnet-pack pack`)");
    }
    ensure!(metadata.is_file(), "{name} is not a regular file");
    let file = File::open(path).with_context(|| format!("{name}"))?;
    let len = file.metadata().with_context(|| format!("{name}"))?.len();
    Ok((file, len))
}

/// Reads the start of an image, as much as its prefix asks for and the limits allow.
fn read_header(file: &File, file_bytes: u64) -> anyhow::Result<Vec<u8>> {
    let mut start = Vec::with_capacity(PREFIX_BYTES);
    file.take(PREFIX_BYTES as u64).read_to_end(&mut start)?;
    let len = Image::header_bytes(&start)?.min(PREFIX_BYTES + HEADER_BYTES_MAX as usize);
    let rest = (len as u64).min(file_bytes).saturating_sub(PREFIX_BYTES as u64);
    start.reserve_exact(rest as usize);
    file.take(rest).read_to_end(&mut start)?;
    Ok(start)
}

/// Mebibytes for people.
pub fn mib(bytes: u64) -> String {
    format!("{:.1} MiB", bytes as f64 / f64::from(1 << 20))
}
