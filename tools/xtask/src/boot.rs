//! Boards: builds their images, boots them in QEMU, and listens to what they say.
//!
//! What an image says on its serial port is compared with what the program for this machine says: the same model, the same prompt,
//! and so the same text. Its log, in defmt's encoding, lies in `target/boot/BOARD/bitnet.defmt` afterwards; where `defmt-print` is
//! installed, the figures in it are printed.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::matrix::{ARM_BARE, Need};
use crate::run::Host;
use crate::workspace::{Workspace, cargo};
use crate::{elf, run, setup};

/// One boot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Run {
    board: Board,
    /// QEMU's name for it.
    pub(crate) cpu: &'static str,
    cores: u8,
    medium: Medium,
    /// The exception level that it starts at. At 3 there is no firmware that could start further cores.
    level: u8,
    /// The backend that must be chosen.
    backend: &'static str,
}

/// A folder in `boards/`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Board {
    QemuVirt,
    /// On the Raspberry Pi 4 that QEMU has.
    Rpi5,
}

impl Board {
    const ALL: [Self; 2] = [Self::QemuVirt, Self::Rpi5];

    const fn name(self) -> &'static str {
        match self {
            Self::QemuVirt => "qemu-virt",
            Self::Rpi5 => "rpi5",
        }
    }
    /// The image as its machine takes it.
    const fn file(self) -> &'static str {
        match self {
            Self::QemuVirt => "code.flash",
            Self::Rpi5 => "kernel_2712.img",
        }
    }
}

/// Where the model is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Medium {
    Flash,
    Disk,
    /// On a disk, another model than that of all other runs: of random weights, and [`LARGE_TIMES`] the machine's RAM.
    Large,
    /// In flash, the bundled model whose conversations are of one size, of any length.
    Stateful,
    /// In RAM, where a loader has put it.
    Ram,
}

const fn boot(cpu: &'static str, cores: u8, level: u8, backend: &'static str) -> Run {
    Run { board: Board::QemuVirt, cpu, cores, medium: Medium::Flash, level, backend }
}

/// Every CPU on one core and on four, every level to start from, both media, a model larger than RAM, and one with a memory beside
/// attention; and the board that QEMU has not.
pub(crate) const RUNS: [Run; 12] = [
    boot("cortex-a76", 1, 1, "neon-dotprod"),
    boot("cortex-a76", 4, 1, "neon-dotprod"),
    Run { medium: Medium::Disk, ..boot("cortex-a76", 1, 1, "neon-dotprod") },
    Run { medium: Medium::Large, ..boot("cortex-a76", 1, 1, "neon-dotprod") },
    Run { medium: Medium::Stateful, ..boot("cortex-a76", 1, 1, "neon-dotprod") },
    boot("neoverse-v1", 1, 1, "sve"),
    boot("neoverse-v1", 4, 2, "sve"),
    boot("neoverse-n2", 1, 3, "sve2"),
    boot("neoverse-n2", 4, 1, "sve2"),
    boot("max", 1, 1, "sve2"),
    boot("max", 4, 1, "sve2"),
    Run { board: Board::Rpi5, medium: Medium::Ram, ..boot("cortex-a72", 1, 2, "neon") },
];

/// What a step of `cargo xtask test` asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Request {
    /// The runs on one CPU of `qemu-virt`.
    Cpu(&'static str),
    /// The run of `rpi5`.
    Rpi5,
}

/// The CPU with most backends.
const STRICT: Run = boot("max", 1, 1, "sve2");

const CHECKPOINT: &str = "models/stories-ternary";
const MODEL: &str = "stories-ternary.bitnet";
const STATEFUL_CHECKPOINT: &str = "models/stories-stateful";
const STATEFUL_MODEL: &str = "stories-stateful.bitnet";
/// Where `boards/rpi5/config.txt` has the model put.
const RPI5_MODEL: u64 = 256 << 20;
/// What an image says that has nobody to give an exit code to.
const ENDED: &str = "\nended with 0\n";
const PROMPT: &str = "Once upon a time";
/// RAM of all machines but one, and of that one.
const RAM_MIB: u64 = 128;
const LARGE_RAM_MIB: u64 = 8;
/// How many times the RAM a large model is, at least.
const LARGE_TIMES: u64 = 4;
/// 75 million weights and a head of 25 million, for conversations so short that it takes seconds: each token reads all of it. With
/// this seed the tokens differ.
const LARGE: &str = "dummy --preset small --head i8 --context 8 --seed 3";
const LARGE_MODEL: &str = "large.bitnet";
/// It has no tokenizer.
const LARGE_PROMPT: &str = "1,20,300";
/// Most tokens of an answer, as boards/support has it.
const TOKENS: &str = "64";
/// A boot takes some seconds.
const PATIENCE: Duration = Duration::from_secs(240);
/// What a boot takes at most to its first token on a machine that does nothing else.
const FIRST_TOKEN_SECONDS: f64 = 5.0;
/// How many times that fails: a shared machine may be slower, and on one that was the emulated CPU itself needed 5.3 s.
const FIRST_TOKEN_PATIENCE: f64 = 4.0;
/// A bank of flash has this size, whatever is in it.
const FLASH_BYTES: u64 = 64 << 20;
/// What RAM may hold beside the conversation where code and model are in flash.
const FLASH_RAM_BYTES: u64 = 2 << 20;
/// What every log has in its frames.
const LOGGED: [&str; 4] = ["self-test: ", " after power-on", "no allocation per token", "core 0: "];
/// Disks are whole sectors.
const SECTOR_BYTES: u64 = 512;

/// The steps.
pub(crate) fn requests() -> Vec<Request> {
    let virt = RUNS.iter().filter(|run| run.board == Board::QemuVirt);
    let mut requests: Vec<Request> = virt.map(|run| Request::Cpu(run.cpu)).collect();
    requests.dedup();
    requests.push(Request::Rpi5);
    requests
}

impl Request {
    pub(crate) fn name(self) -> String {
        match self {
            Self::Cpu(cpu) => format!("qemu-virt/{cpu}"),
            Self::Rpi5 => "rpi5".to_owned(),
        }
    }
    pub(crate) fn describe(self) -> String {
        match self {
            Self::Cpu(cpu) => format!("cargo xtask boot qemu-virt --cpu {cpu}"),
            Self::Rpi5 => "cargo xtask boot rpi5".to_owned(),
        }
    }
}

/// Does what a step asks for; the answer is how many runs passed and failed.
pub(crate) fn check(workspace: &Workspace, request: Request, host: Host) -> Result<(usize, usize)> {
    let of = |board| RUNS.into_iter().filter(move |run| run.board == board);
    let (board, alignment, runs) = match request {
        Request::Cpu(cpu) => {
            (Board::QemuVirt, Alignment::Free, of(Board::QemuVirt).filter(|run| run.cpu == cpu).collect())
        }
        Request::Rpi5 => (Board::Rpi5, Alignment::Free, of(Board::Rpi5).collect::<Vec<_>>()),
    };
    let image = Image::build(workspace, board, alignment, host)?;
    let mut counts = (0, 0);
    for run in runs {
        match image.expected(run).and_then(|expected| image.boot(run, &expected)) {
            Ok(()) => counts.0 += 1,
            Err(error) => {
                say!("error: {}: {error:#}", run.title());
                counts.1 += 1;
            }
        }
    }
    Ok(counts)
}

/// Whether unaligned accesses fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Alignment {
    Free,
    Strict,
}

/// The command line.
#[derive(Debug)]
struct Options {
    board: Board,
    alignment: Alignment,
    interactive: bool,
    cpu: Option<String>,
    cores: Option<u8>,
    medium: Option<Medium>,
}

impl Options {
    fn parse(arguments: &[String]) -> Result<Self> {
        let mut words = arguments.iter().map(String::as_str);
        let name = words.next().unwrap_or_default();
        let Some(board) = Board::ALL.into_iter().find(|board| board.name() == name) else {
            bail!("no board `{name}` boots here; {} do", Board::ALL.map(Board::name).join(" and "));
        };
        let mut options =
            Self { board, alignment: Alignment::Free, interactive: false, cpu: None, cores: None, medium: None };
        while let Some(word) = words.next() {
            let mut value = || words.next().with_context(|| format!("{word} needs a value"));
            match word {
                "--strict-align" => options.alignment = Alignment::Strict,
                "--interactive" => options.interactive = true,
                "--cpu" => options.cpu = Some(value()?.to_owned()),
                "--cores" => options.cores = Some(value()?.parse().context("--cores is a number")?),
                "--medium" => {
                    options.medium = Some(match value()? {
                        "flash" => Medium::Flash,
                        "disk" => Medium::Disk,
                        "large" => Medium::Large,
                        "stateful" => Medium::Stateful,
                        other => bail!("--medium is `flash`, `disk`, `large` or `stateful`, not `{other}`"),
                    });
                }
                other => bail!("`boot` has no option `{other}`"),
            }
        }
        Ok(options)
    }

    /// The runs that are meant.
    fn runs(&self) -> Result<Vec<Run>> {
        let all = if self.alignment == Alignment::Strict { &[STRICT][..] } else { &RUNS };
        let fits = |run: &&Run| {
            run.board == self.board
                && self.cpu.as_deref().is_none_or(|cpu| cpu == run.cpu)
                && self.cores.is_none_or(|cores| cores == run.cores)
                && self.medium.is_none_or(|medium| medium == run.medium)
        };
        let runs: Vec<Run> = all.iter().filter(fits).copied().collect();
        if runs.is_empty() {
            let titles: Vec<String> = all.iter().map(|run| run.title()).collect();
            bail!("no run is like that; there are:\n  {}", titles.join("\n  "));
        }
        Ok(runs)
    }
}

/// `cargo xtask boot`.
pub(crate) fn run(workspace: &Workspace, arguments: &[String]) -> Result<bool> {
    let options = Options::parse(arguments)?;
    let runs = options.runs()?;
    setup::ensure(&[Need::Target(ARM_BARE), Need::QemuSystem, Need::Linker])?;
    let image = Image::build(workspace, options.board, options.alignment, Host::Programs)?;
    if options.interactive {
        let status = image.qemu(runs[0]).status().context("starting qemu-system-aarch64")?;
        return Ok(status.success());
    }
    let mut good = true;
    for run in runs {
        if let Err(error) = image.expected(run).and_then(|expected| image.boot(run, &expected)) {
            say!("error: {}: {error:#}", run.title());
            good = false;
        }
    }
    Ok(good)
}

impl Run {
    fn title(&self) -> String {
        let Self { board, cpu, cores, medium, level, .. } = self;
        format!("{}, {cpu}, {cores} cores, model in {medium:?}, started at EL{level}", board.name())
    }
    fn prompt(&self) -> &'static str {
        if self.medium == Medium::Large { LARGE_PROMPT } else { PROMPT }
    }
    fn ram_mib(&self) -> u64 {
        if self.medium == Medium::Large { LARGE_RAM_MIB } else { RAM_MIB }
    }
    /// What the image says before the first token.
    fn mark(&self) -> String {
        let prompt = self.prompt();
        // Ids are not said again.
        if self.medium == Medium::Large { format!("> {prompt}\n") } else { format!("> {prompt}\n{prompt}") }
    }
}

/// What is booted: files in a folder of their own.
#[derive(Debug)]
struct Image {
    board: Board,
    alignment: Alignment,
    folder: PathBuf,
    bitnet: String,
    elf: PathBuf,
}

impl Image {
    /// Builds the image and the programs for this machine, packs the model, and makes flashes and a disk of them.
    fn build(workspace: &Workspace, board: Board, alignment: Alignment, host: Host) -> Result<Self> {
        let name = board.name();
        let features = if alignment == Alignment::Strict { "image,strict-align" } else { "image" };
        let arguments =
            ["build", "--release", "--target", ARM_BARE, "-p", &format!("bitnet-{name}"), "--features", features];
        if !cargo().args(arguments).current_dir(&workspace.root).status()?.success() {
            bail!("the image does not build");
        }
        let [bitnet, packer] = run::host_programs(workspace, host)?;
        let folder = workspace.target.join("boot").join(name);
        fs::create_dir_all(&folder)?;
        let elf = workspace.target.join(ARM_BARE).join("release").join(name);
        let image = Self { board, alignment, folder, bitnet, elf };
        let pack = |checkpoint: &str, path: &Path| -> Result<Vec<u8>> {
            let mut pack = Command::new(&packer);
            pack.arg("pack").arg(workspace.root.join(checkpoint)).arg("-o").arg(path).stdout(Stdio::null());
            if !pack.stderr(Stdio::null()).status()?.success() {
                bail!("bitnet-pack could not pack {checkpoint}");
            }
            Ok(fs::read(path)?)
        };
        let model = pack(CHECKPOINT, &image.folder.join(MODEL))?;
        let code = elf::flat(&fs::read(&image.elf)?).with_context(|| image.elf.display().to_string())?;
        say!("{name}: {} bytes of code and constants, {features}", code.len());
        if board == Board::Rpi5 {
            fs::write(image.folder.join(board.file()), &code)?;
            return Ok(image);
        }
        padded(&image.folder.join(board.file()), &code, FLASH_BYTES)?;
        padded(&image.folder.join("model.flash"), &model, FLASH_BYTES)?;
        padded(&image.folder.join("model.disk"), &model, (model.len() as u64).next_multiple_of(SECTOR_BYTES))?;
        let stateful = pack(STATEFUL_CHECKPOINT, &image.folder.join(STATEFUL_MODEL))?;
        padded(&image.folder.join("stateful.flash"), &stateful, FLASH_BYTES)?;
        image.make_large(&packer)?;
        Ok(image)
    }

    /// Makes the model that is larger than RAM, and its disk.
    fn make_large(&self, packer: &str) -> Result<()> {
        let path = self.folder.join(LARGE_MODEL);
        let mut pack = Command::new(packer);
        pack.args(LARGE.split(' ')).arg("-o").arg(&path).stdout(Stdio::null()).stderr(Stdio::null());
        if !pack.status()?.success() {
            bail!("bitnet-pack could not make {}", path.display());
        }
        let bytes = path.metadata()?.len();
        if bytes < LARGE_TIMES * (LARGE_RAM_MIB << 20) {
            bail!("{} has {bytes} bytes, less than {LARGE_TIMES} times {LARGE_RAM_MIB} MiB", path.display());
        }
        padded(&self.folder.join("large.disk"), &fs::read(&path)?, bytes.next_multiple_of(SECTOR_BYTES))
    }

    /// What the program for this machine says.
    fn expected(&self, run: Run) -> Result<String> {
        let mut command = Command::new(&self.bitnet);
        command.arg("run").args(["--temperature", "0", "--max-tokens", TOKENS]);
        match run.medium {
            Medium::Large => command.arg(self.folder.join(LARGE_MODEL)).args(["--print-ids", "--ids", LARGE_PROMPT]),
            Medium::Stateful => command.arg(self.folder.join(STATEFUL_MODEL)).arg(PROMPT),
            Medium::Flash | Medium::Disk | Medium::Ram => command.arg(self.folder.join(MODEL)).arg(PROMPT),
        };
        let output = command.output().context("starting bitnet")?;
        if !output.status.success() {
            bail!("bitnet: {}", String::from_utf8_lossy(&output.stderr).trim());
        }
        Ok(String::from_utf8(output.stdout)?)
    }

    fn qemu(&self, run: Run) -> Command {
        let mut qemu = Command::new("qemu-system-aarch64");
        qemu.args(["-nodefaults", "-display", "none", "-serial", "stdio"]).current_dir(&self.folder);
        if run.medium == Medium::Ram {
            let model = format!("loader,file={MODEL},addr={RPI5_MODEL:#x},force-raw=on");
            qemu.args(["-M", "raspi4b", "-kernel", self.board.file(), "-device", &model]);
            return qemu;
        }
        let machine =
            ["virt", "virt,virtualization=on", "virt,virtualization=on,secure=on"][usize::from(run.level) - 1];
        qemu.args([
            "-M",
            machine,
            "-cpu",
            run.cpu,
            "-smp",
            &run.cores.to_string(),
            "-m",
            &format!("{}M", run.ram_mib()),
        ])
        .args(["-semihosting-config", "enable=on,target=native"])
        .args(["-drive", "if=pflash,index=0,format=raw,readonly=on,file=code.flash"]);
        match run.medium {
            Medium::Flash | Medium::Stateful => {
                let file = if run.medium == Medium::Stateful { "stateful.flash" } else { "model.flash" };
                qemu.args(["-drive", &format!("if=pflash,index=1,format=raw,readonly=on,file={file}")])
            }
            Medium::Ram | Medium::Disk | Medium::Large => {
                let file = if run.medium == Medium::Large { "large.disk" } else { "model.disk" };
                let drive = format!("if=none,id=model,format=raw,readonly=on,file={file}");
                qemu.args(["-drive", &drive, "-device", "virtio-blk-device,drive=model"])
            }
        };
        qemu
    }

    /// One boot, whose transcript has to be right.
    fn boot(&self, run: Run, expected: &str) -> Result<()> {
        let log = self.folder.join("bitnet.defmt");
        let _ = fs::remove_file(&log);
        let start = Instant::now();
        let mut child = self.qemu(run).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
        child.stdin.take().context("the input of QEMU")?.write_all(format!("{}\r\r", run.prompt()).as_bytes())?;
        let (transcript, first) = listen(&mut child, start, &run.mark())?;
        fs::write(self.folder.join("transcript"), &transcript)?;
        let status = child.wait()?;
        if self.board == Board::Rpi5 {
            judge(&transcript, expected, run)?;
            return self.seen(run, first);
        }
        if !status.success() {
            bail!("the image ended with {status}:\n{transcript}");
        }
        judge(&transcript, expected, run)?;
        self.seen(run, first)?;
        self.show_log(&log, &transcript)
    }

    /// Says that a run was good, if its first token came in time. A large model may take longer, of which each pass reads all; and so
    /// may a build that checks alignment, whose self-test is the whole one of every backend.
    fn seen(&self, run: Run, first: Option<First>) -> Result<()> {
        let first = first.context("no token was seen")?;
        let cpu = first.cpu.map_or(String::new(), |cpu| format!(" and {cpu:.2} s of CPU"));
        let title = run.title();
        say!("{title}: as expected; first token {:.2} s{cpu} after the start of QEMU", first.wall);
        let may_be_late = run.medium == Medium::Large || self.alignment == Alignment::Strict;
        if first.comes_within(FIRST_TOKEN_SECONDS) || may_be_late {
            return Ok(());
        }
        let longest = FIRST_TOKEN_SECONDS * FIRST_TOKEN_PATIENCE;
        if !first.comes_within(longest) {
            bail!("the first token has to come within {FIRST_TOKEN_SECONDS} s, or {longest} s on a busy machine");
        }
        say!("warning: {title}: the first token came after more than {FIRST_TOKEN_SECONDS} s: is this machine busy?");
        Ok(())
    }

    /// Checks the log's first line, and prints the rest where it can be decoded.
    fn show_log(&self, log: &Path, transcript: &str) -> Result<()> {
        let bytes = fs::read(log).context("the log")?;
        let end = bytes.iter().position(|&byte| byte == b'\n').context("the log has no first line")?;
        if transcript.lines().next().map(str::as_bytes) != Some(&bytes[..end]) || bytes.len() < end + 2 {
            bail!("the log does not begin as the transcript does, or ends there");
        }
        let mut decoder = Command::new("defmt-print");
        decoder.arg("-e").arg(&self.elf).stdin(Stdio::piped()).stdout(Stdio::piped());
        // Whoever has not installed it sees no figures.
        let Ok(mut decoder) = decoder.spawn() else { return Ok(()) };
        decoder.stdin.take().context("the input of defmt-print")?.write_all(&bytes[end + 1..])?;
        let figures = decoder.wait_with_output()?.stdout;
        let figures = String::from_utf8_lossy(&figures);
        say!("{}", figures.trim_end());
        if !LOGGED.iter().all(|part| figures.contains(part)) {
            bail!("the log lacks one of {LOGGED:?}");
        }
        Ok(())
    }
}

/// Writes a file of a fixed size, zeros at the end.
fn padded(path: &Path, content: &[u8], size: u64) -> Result<()> {
    if content.len() as u64 > size {
        bail!("{} would be {} bytes, and {size} fit", path.display(), content.len());
    }
    let mut file = File::create(path)?;
    file.write_all(content)?;
    Ok(file.set_len(size)?)
}

/// What the first token took since the start of QEMU: seconds of the clock, and of all CPUs together.
#[derive(Clone, Copy, Debug, PartialEq)]
struct First {
    wall: f64,
    cpu: Option<f64>,
}

impl First {
    /// Whether it came in time. On a busy machine the clock says nothing, but then what was computed does.
    fn comes_within(&self, seconds: f64) -> bool {
        self.cpu.unwrap_or(self.wall).min(self.wall) < seconds
    }
}

/// Seconds that all threads of a process have computed, where the system tells: the fourteenth and fifteenth number of
/// `/proc/PID/stat`, in hundredths of a second (proc(5)).
fn cpu_seconds(process: u32) -> Option<f64> {
    let stat = fs::read_to_string(format!("/proc/{process}/stat")).ok()?;
    let numbers = stat.rsplit_once(')')?.1;
    let ticks: Vec<f64> = numbers.split_whitespace().skip(11).take(2).map_while(|n| n.parse().ok()).collect();
    (ticks.len() == 2).then(|| ticks.iter().sum::<f64>() / 100.0)
}

/// Reads all that QEMU prints, without carriage returns, and notes when the first token came, which is after `mark`.
fn listen(child: &mut Child, start: Instant, mark: &str) -> Result<(String, Option<First>)> {
    let mut output = child.stdout.take().context("the output of QEMU")?;
    let (sender, receiver) = mpsc::channel();
    std::thread::spawn(move || {
        let mut buffer = [0; 4096];
        while let Ok(count @ 1..) = output.read(&mut buffer) {
            if sender.send(buffer[..count].to_vec()).is_err() {
                break;
            }
        }
    });
    let (mut bytes, mut first) = (Vec::new(), None);
    loop {
        match receiver.recv_timeout(PATIENCE.saturating_sub(start.elapsed())) {
            Ok(more) => {
                bytes.extend(more.into_iter().filter(|&byte| byte != b'\r'));
                if bytes.ends_with(ENDED.as_bytes()) {
                    child.kill()?;
                }
            }
            Err(RecvTimeoutError::Disconnected) => return Ok((String::from_utf8_lossy(&bytes).into_owned(), first)),
            Err(RecvTimeoutError::Timeout) => {
                child.kill()?;
                child.wait()?;
                bail!("not done after {} s:\n{}", PATIENCE.as_secs(), String::from_utf8_lossy(&bytes));
            }
        }
        let token = bytes.windows(mark.len()).position(|window| window == mark.as_bytes());
        if first.is_none() && token.is_some_and(|at| at + mark.len() < bytes.len()) {
            first = Some(First { wall: start.elapsed().as_secs_f64(), cpu: cpu_seconds(child.id()) });
        }
    }
}

/// Whether a transcript is that of a good run.
fn judge(transcript: &str, expected: &str, run: Run) -> Result<()> {
    let Run { cores, level, backend, .. } = run;
    let cores = if level == 3 { 1 } else { cores };
    for part in [
        format!("started at EL{level}, {backend}\n"),
        format!("self-test: {backend} conforms\n"),
        format!("\n{cores} cores\n"),
        format!("> {}\n{expected}(", run.prompt()),
    ] {
        if !transcript.contains(&part) {
            bail!("the transcript lacks:\n{part}\nIt is:\n{transcript}");
        }
    }
    let ram = ram(transcript).context("the transcript does not say what RAM is used")?;
    if matches!(run.medium, Medium::Flash | Medium::Stateful) && ram > FLASH_RAM_BYTES {
        bail!(
            "{ram} bytes of RAM beside the conversation, and {FLASH_RAM_BYTES} are enough without a copy of the model"
        );
    }
    Ok(())
}

/// Bytes of RAM in use, but for the conversation.
fn ram(transcript: &str) -> Option<u64> {
    let (_, rest) = transcript.split_once("\nRAM: ")?;
    let (used, rest) = rest.split_once(" bytes, of which the conversation ")?;
    let (state, _) = rest.split_once('\n')?;
    used.parse::<u64>().ok()?.checked_sub(state.parse().ok()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(line: &str) -> Vec<String> {
        line.split_whitespace().map(str::to_owned).collect()
    }

    #[test]
    fn options_choose_runs() {
        let runs = |line| Options::parse(&words(line)).and_then(|options| options.runs());
        assert_eq!(runs("qemu-virt").unwrap(), RUNS[..11]);
        assert_eq!(runs("rpi5").unwrap(), [RUNS[11]]);
        assert_eq!(runs("qemu-virt --cpu neoverse-v1 --cores 4").unwrap(), [RUNS[6]]);
        assert_eq!(runs("qemu-virt --medium disk").unwrap(), [RUNS[2]]);
        assert_eq!(runs("qemu-virt --medium large").unwrap(), [RUNS[3]]);
        assert_eq!(runs("qemu-virt --medium stateful").unwrap(), [RUNS[4]]);
        assert_eq!(runs("qemu-virt --strict-align").unwrap(), [STRICT]);
        assert!(runs("rpi5 --strict-align").is_err(), "the other board stands for it");
        for (line, complaint) in [
            ("", "no board ``"),
            ("toaster", "no board `toaster`"),
            ("qemu-virt --cpu", "needs a value"),
            ("qemu-virt --cores many", "a number"),
            ("qemu-virt --cpu z80", "no run is like that"),
            ("qemu-virt --fast", "no option `--fast`"),
        ] {
            let error = runs(line).unwrap_err().to_string();
            assert!(error.contains(complaint), "{line}: {error}");
        }
    }

    #[test]
    fn a_first_token_is_late_by_the_clock_and_by_what_was_computed() {
        let first = |wall, cpu| First { wall, cpu }.comes_within(FIRST_TOKEN_SECONDS);
        assert!(first(4.9, Some(12.0)) && first(60.0, Some(4.9)) && first(4.9, None));
        assert!(!first(5.1, Some(5.1)) && !first(5.1, None));
    }

    #[test]
    #[cfg(target_os = "linux")]
    fn this_process_has_computed_for_some_time() {
        let start = Instant::now();
        while start.elapsed() < Duration::from_millis(30) {}
        assert!((0.0..1e6).contains(&cpu_seconds(std::process::id()).unwrap()));
        assert_eq!(cpu_seconds(u32::MAX), None);
    }

    #[test]
    fn a_transcript_with_another_text_backend_or_start_is_not_good() {
        let run = RUNS[5];
        let good = format!(
            "bitnet-edge\nx: started at EL1, sve\nself-test: sve conforms\nRAM: 3000000 bytes, of which the conversation 1000000\n\
             1 cores\n> {PROMPT}\n{PROMPT}, a fox.\n(5 tokens"
        );
        let expected = format!("{PROMPT}, a fox.\n");
        judge(&good, &expected, run).unwrap();
        for (from, to) in [
            ("fox", "dog"),
            ("EL1", "EL2"),
            ("conforms", "differs"),
            ("1 cores", "4 cores"),
            ("EL1, sve", "EL1, neon"),
            ("RAM: 3", "RAM: 4"),
            ("RAM: 3000000", "RAM: much"),
        ] {
            assert!(judge(&good.replace(from, to), &expected, run).is_err(), "{from}");
        }
    }
}
