//! The program: look at the machine, test the kernels, find the model, and continue what is typed.
use crate::console::Console;
use crate::cores::Cores;
use crate::log::BuildId;
use crate::start::Start;
use crate::virtio::Disk;
use crate::{exit, heap, memory, time};
use aarch64_cpu::registers::{MIDR_EL1, Readable};
use alloc::string::String;
use alloc::vec::Vec;
use bitnet_kernel::conformance::{self, Difference};
use bitnet_kernel::{Block, Kernels};
use bitnet_runtime::error::ImageError;
use bitnet_runtime::generate::{Event, Session, Until};
use bitnet_runtime::parallel::Parallel;
use bitnet_runtime::sampler::{Sampler, Sampling};
use bitnet_runtime::source::{BlockDevice, Mapped, Sectors, Streamed, WeightSource};
use bitnet_runtime::tokenizer::{TextStream, Tokenizer};
use bitnet_runtime::{Error, Image, Model, Plan, State, backend};
use core::fmt::{self, Write};
use core::ops::ControlFlow;
use zerocopy::IntoBytes;

/// Most tokens of one answer.
const TOKENS_MAX: usize = 64;
/// Weights of the largest shape in the self-test: a sixth of the work finds all but overflows of the widest sums. A build
/// that checks alignment runs the whole.
const SELFTEST_WEIGHTS: usize = if cfg!(feature = "strict-align") { usize::MAX } else { 9_000 };
/// Blocks of a megabyte, the least that is read at once where memory allows.
const STAGING_BLOCKS: usize = (1 << 20) / Block::BYTES;

/// Where the image is.
#[derive(Debug)]
#[expect(clippy::large_enum_variant, reason = "there is one, and it is moved once")]
pub enum Medium {
    /// In the address space, where the weights are used as they lie.
    Flash(&'static [Block]),
    /// On a disk, from which they are read piece by piece.
    Disk(Sectors<Disk>),
}

/// What the program runs on.
#[derive(Debug)]
pub struct Machine {
    /// The board's name.
    pub board: &'static str,
    /// How it was started.
    pub start: Start,
    /// Wakes the other cores. They are needed when a prompt is read, and not before: cores that wait for work are idle on a
    /// board, but on an emulator or a busy host they take time from the one that works.
    pub wake: fn(Start) -> Cores,
    /// All RAM that nothing else uses.
    pub ram: &'static mut [Block],
    /// Where the image is; `None` if the board found no such place.
    pub medium: Option<Medium>,
}

/// Why a run ended badly.
#[derive(Debug)]
enum Failure {
    Runtime(Error),
    SelfTest(Difference),
    /// Bytes of RAM.
    Ram {
        what: &'static str,
        needed: usize,
        left: usize,
    },
    NoMedium,
    Prompt,
    Allocated(usize),
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Self::Runtime(error)
    }
}

impl From<ImageError> for Failure {
    fn from(error: ImageError) -> Self {
        Self::Runtime(error.into())
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Runtime(error) => error.fmt(f),
            Self::SelfTest(difference) => difference.fmt(f),
            Self::Ram { what, needed, left } => write!(f, "{what} needs {needed} bytes of RAM, and {left} are left"),
            Self::NoMedium => f.write_str("no image was found: see the board's README"),
            Self::Prompt => f.write_str("an image without a tokenizer continues numbers of tokens, such as 1,20,300"),
            Self::Allocated(n) => write!(f, "{n} allocations while tokens were generated; there may be none"),
        }
    }
}

/// Runs until a person enters an empty line, and ends with an exit code.
pub fn tell(machine: Machine) -> ! {
    match run(machine) {
        Ok(()) => exit::with(exit::SUCCESS),
        Err(failure) => {
            let _ = writeln!(Console, "error: {failure}");
            defmt::error!("{}", defmt::Display2Format(&failure));
            exit::with(exit::FAILURE)
        }
    }
}

fn run(machine: Machine) -> Result<(), Failure> {
    let Machine { board, start, wake, ram, medium } = machine;
    let kernels = backend::best();
    let (cpu, name) = (MIDR_EL1.get(), kernels.name());
    let _ = writeln!(Console, "bitnet-edge {} build {BuildId}", env!("CARGO_PKG_VERSION"));
    let _ = writeln!(Console, "{board}: CPU {cpu:#x}, started at EL{}, {name}", start.level);
    defmt::info!("CPU {=u64:#x}, EL{=u8}, backend {=str}", cpu, start.level, name);
    time::count_cycles();
    time::wake_often();
    self_test(ram)?;
    let wake = || wake(start);
    let mut ram = Ram { left: ram, used: memory::image_bytes() };
    match medium.ok_or(Failure::NoMedium)? {
        Medium::Flash(blocks) => {
            let bytes = Image::stated_bytes(blocks.as_bytes())?;
            let _ = writeln!(Console, "image: {bytes} bytes, used where they lie");
            let image = Image::check(blocks.as_bytes(), bytes.min(size_of_val(blocks) as u64))?;
            chat(&image, &mut Mapped::new(blocks), &mut ram, kernels, &wake)
        }
        Medium::Disk(mut disk) => {
            let prefix = ram.take("the header", 1)?;
            disk.read(0, prefix).map_err(Error::from)?;
            let prefix = prefix.as_bytes();
            let bytes = Image::stated_bytes(prefix)?;
            let header = ram.take("the header", Image::header_bytes(prefix)?.div_ceil(Block::BYTES))?;
            disk.read(0, header).map_err(Error::from)?;
            let image = Image::check(header.as_bytes(), bytes.min(disk.bytes()))?;
            let least = Streamed::<Sectors<Disk>>::staging_blocks_min(&image);
            let staging = ram.take("the staging buffer", least.max(STAGING_BLOCKS))?;
            let _ = writeln!(Console, "image: {bytes} bytes, read through {}", size_of_val(staging));
            chat(&image, &mut Streamed::new(disk, staging), &mut ram, kernels, &wake)
        }
    }
}

/// The kernels' conformance suite, in memory that is the model's afterwards.
fn self_test(ram: &mut [Block]) -> Result<(), Failure> {
    let (started, left) = (time::micros(), size_of_val(ram));
    let needed = size_of::<conformance::Workspace>();
    let workspace = memory::workspace(ram).ok_or(Failure::Ram { what: "the self-test", needed, left })?;
    let backends = if cfg!(feature = "strict-align") { usize::MAX } else { 1 };
    for kernels in backend::available().take(backends) {
        conformance::check_up_to(&[kernels], workspace, SELFTEST_WEIGHTS).map_err(Failure::SelfTest)?;
        let _ = writeln!(Console, "self-test: {} conforms", kernels.name());
    }
    defmt::info!("self-test: {=u64:us}", time::micros() - started);
    Ok(())
}

/// RAM, lent piece by piece and never given back.
struct Ram {
    left: &'static mut [Block],
    /// Bytes that are in use.
    used: usize,
}

impl Ram {
    fn take(&mut self, what: &'static str, blocks: usize) -> Result<&'static mut [Block], Failure> {
        let left = size_of_val(self.left);
        if blocks > self.left.len() {
            return Err(Failure::Ram { what, needed: blocks.saturating_mul(Block::BYTES), left });
        }
        let (taken, rest) = core::mem::take(&mut self.left).split_at_mut(blocks);
        self.left = rest;
        self.used += size_of_val(taken);
        Ok(taken)
    }
}

/// Loads the model and answers lines until one is empty.
fn chat(
    image: &Image<'_>,
    source: &mut dyn WeightSource,
    ram: &mut Ram,
    kernels: &dyn Kernels,
    wake: &dyn Fn() -> Cores,
) -> Result<(), Failure> {
    let limits = image.header().plan.limits;
    let config = image.header().config;
    let plan = Plan::new(&config, &limits);
    heap::give(ram.take("the heap", heap_bytes(image).div_ceil(Block::BYTES))?);
    let tokenizer = match image.tokenizer() {
        Some(_) => Some(Tokenizer::load(image, source)?),
        None => None,
    };
    let state = State::new(&config, &limits, ram.take("the conversation", plan.state)?)?;
    let sampler = Sampler::new(config.vocab, Sampling::GREEDY, ram.take("the sampler", plan.sampler)?)?;
    let scratch = ram.take("activations", plan.scratch)?;
    let cores = wake();
    let model = Model::new(image, limits, kernels, &cores, source, scratch)?;
    let mut session = Session::new(model, state, sampler);
    let state_bytes = plan.state * Block::BYTES;
    let (used, count) = (ram.used, cores.threads());
    let _ = writeln!(Console, "RAM: {used} bytes, of which the conversation {state_bytes}");
    let _ = writeln!(Console, "{count} cores");
    defmt::info!("RAM {=usize} B, state {=usize} B, {=usize} cores", used, state_bytes, count);
    defmt::info!("ready {=u64:us} after power-on", time::micros());
    let mut first = true;
    loop {
        let _ = Console.write_str("> ");
        let line = Console.line();
        if line.is_empty() {
            return Ok(());
        }
        let answer = answer(&mut session, tokenizer.as_ref(), image, &line);
        match answer {
            Ok(speed) => speed.report(first, cores.threads(), ram.used),
            // What was typed is a person's, who may try again.
            Err(Failure::Prompt) => {
                let _ = writeln!(Console, "{}", Failure::Prompt);
            }
            Err(failure) => return Err(failure),
        }
        first = false;
    }
}

/// Bytes of heap that loading the tokenizer and reading a prompt need: measured for the bundled model, with room.
fn heap_bytes(image: &Image<'_>) -> usize {
    let tokenizer = image.tokenizer().map_or(0, |(_, len)| len);
    (256 << 10) + 16 * tokenizer + size_of::<u32>() * image.header().plan.limits.context as usize
}

/// How an answer went.
#[derive(Debug)]
struct Speed {
    prompt: usize,
    tokens: usize,
    first_micros: u64,
    micros: u64,
    cycles: u64,
}

fn answer(
    session: &mut Session<'_>,
    tokenizer: Option<&Tokenizer>,
    image: &Image<'_>,
    line: &str,
) -> Result<Speed, Failure> {
    let ids: Vec<u32> = match tokenizer {
        Some(tokenizer) => tokenizer.bos().into_iter().chain(tokenizer.encode(line)?).collect(),
        None => line.split(',').map(str::parse).collect::<Result<_, _>>().map_err(|_| Failure::Prompt)?,
    };
    const NO_STOPS: &[String] = &[];
    let mut stream = tokenizer.map(|tokenizer| TextStream::new(tokenizer, NO_STOPS));
    let until = Until { max_tokens: TOKENS_MAX, stop_ids: image.header().text.stop.ids() };
    let (started, cycles) = (time::micros(), time::cycles());
    session.prompt(&ids)?;
    let first_micros = time::micros();
    if tokenizer.is_some() {
        let _ = Console.write_str(line);
    }
    let allocations = heap::allocations();
    let mut tokens = 0;
    session.generate(until, stream.as_mut(), &mut |event| {
        match event {
            Event::Token(token) => {
                if tokenizer.is_none() {
                    let _ = write!(Console, "{}{token}", if tokens == 0 { "" } else { "," });
                }
                tokens += 1;
            }
            Event::Text(text) => {
                let _ = Console.write_str(text);
            }
        }
        ControlFlow::Continue(())
    })?;
    let _ = Console.write_str("\n");
    match heap::allocations() - allocations {
        0 => {}
        n => return Err(Failure::Allocated(n)),
    }
    let (micros, cycles) = (time::micros() - started, time::cycles() - cycles);
    Ok(Speed { prompt: ids.len(), tokens, first_micros, micros, cycles })
}

impl Speed {
    fn report(&self, first: bool, cores: usize, ram: usize) {
        let Self { prompt, tokens, first_micros, micros, cycles } = *self;
        if first {
            defmt::info!("first token {=u64:us} after power-on", first_micros);
        }
        defmt::info!(
            "{=usize} tokens read, {=usize} generated, {=u64:us}, {=u64} cycles",
            prompt,
            tokens,
            micros,
            cycles
        );
        defmt::info!("RAM {=usize} B, heap most {=usize} B, no allocation per token", ram, heap::most());
        for core in 0..cores {
            defmt::info!("core {=usize}: {=usize} B of stack used", core, memory::stack_used(core));
        }
        let _ = writeln!(Console, "({prompt} tokens read, {tokens} generated, {} ms, {cycles} cycles)", micros / 1000);
    }
}
