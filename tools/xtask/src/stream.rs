//! `cargo xtask stream-proof`: a model larger than the memory of a control group, beside the same one in memory and mapped.
//!
//! An image of the shape of BitNet b1.58 2B4T runs with `--ram 128M` in a control group of 160 MiB, and has to give the logits of
//! the image in memory, stay within both numbers, keep the page cache of the group small, and decode at nine tenths of what the
//! same reads give alone. It makes the control group itself (version 1 or 2), which root may.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde_json::Value;

use crate::run;
use crate::timeline::{Overlap, Timeline};
use crate::workspace::Workspace;

const GROUP: &str = "bitnet-stream-proof";
const GROUP_BYTES: u64 = 160 << 20;
const RAM: &str = "128M";
const RAM_BYTES: u64 = 128 << 20;
/// What decoding has to reach of the reads alone.
const SHARE_LEAST: f64 = 0.9;
/// What the group may have in the page cache: the program itself, and little of the image.
const CACHE_BYTES_MAX: u64 = 32 << 20;
/// How often the group's page cache is looked at.
const LOOK: Duration = Duration::from_millis(20);
const LOGITS: [&str; 4] = ["--context", "256", "--ids", "1,5,9,100"];
/// Mapped, a token reads the whole image by page faults: a few will do. `bench` would not fit the group beside it.
const MAPPED: &str = "--context 256 --ids 1 --print-ids --temperature 0 --max-tokens 5 --stats --source mapped";
/// What is drawn of.
const TIMELINE: &str = "--context 256 --ids 1 --print-ids --temperature 0 --max-tokens 6 --ram 128M --timeline";
/// Of a token, a sixth or so: more, and single reads would not be seen.
const DRAWN_MS: f64 = 30.0;
/// Few tokens between two passes of reads alone, so that both see the same disk.
const BENCH: &str = "--context 256 --prompt-tokens 1 --tokens 2 --repetitions 16 --json --ram 128M";

/// A memory control group. Dropping it removes it.
#[derive(Debug)]
struct Group {
    folder: PathBuf,
    /// Version 2 has other names.
    v2: bool,
}

impl Group {
    fn new() -> Result<Self> {
        let root = Path::new("/sys/fs/cgroup");
        let v2 = root.join("cgroup.controllers").exists();
        let folder = if v2 { root.join(GROUP) } else { root.join("memory").join(GROUP) };
        let made = if folder.exists() { Ok(()) } else { fs::create_dir(&folder) };
        made.with_context(|| format!("making the control group {}, which root may", folder.display()))?;
        let group = Self { folder, v2 };
        if v2 {
            // Where the root does not hand memory on, the limit cannot be set, and that is the error.
            let _ = fs::write(root.join("cgroup.subtree_control"), "+memory");
        }
        let limit = group.folder.join(if v2 { "memory.max" } else { "memory.limit_in_bytes" });
        fs::write(&limit, GROUP_BYTES.to_string()).with_context(|| limit.display().to_string())?;
        if v2 {
            // Without swap in the system there is no such file.
            let _ = fs::write(group.folder.join("memory.swap.max"), "0");
        }
        Ok(group)
    }

    fn number(&self, file: &str) -> Option<u64> {
        fs::read_to_string(self.folder.join(file)).ok()?.trim().parse().ok()
    }
    /// Most bytes of the group so far, its page cache included.
    fn most(&self) -> Option<u64> {
        self.number(if self.v2 { "memory.peak" } else { "memory.max_usage_in_bytes" })
    }
    /// Starts the count anew where the system does so: version 1, and late versions 2.
    fn forget_most(&self) {
        let _ = fs::write(self.folder.join(if self.v2 { "memory.peak" } else { "memory.max_usage_in_bytes" }), "0");
    }
    /// Bytes of the page cache that are the group's now.
    fn cache(&self) -> Option<u64> {
        let stat = fs::read_to_string(self.folder.join("memory.stat")).ok()?;
        let name = if self.v2 { "file" } else { "cache" };
        stat.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' ')?.parse().ok())
    }

    /// Runs a command in the group.
    fn run(&self, program: &str, arguments: &[&str]) -> Result<Done> {
        say!("bitnet {}", arguments.join(" "));
        self.forget_most();
        let mut shell = Command::new("sh");
        shell.args(["-c", "echo $$ > \"$0\" && exec \"$@\""]).arg(self.folder.join("cgroup.procs"));
        shell.arg(program).args(arguments).stdin(Stdio::null()).stdout(Stdio::piped());
        let mut child = shell.stderr(Stdio::piped()).spawn()?;
        let mut most_cache = 0;
        while child.try_wait()?.is_none() {
            most_cache = most_cache.max(self.cache().unwrap_or(0));
            std::thread::sleep(LOOK);
        }
        // What these commands print fits a pipe.
        let output = child.wait_with_output()?;
        if !output.status.success() {
            bail!("it ended with {}: {}", output.status, String::from_utf8_lossy(&output.stderr).trim());
        }
        Ok(Done { output, most: self.most().context("what the group used")?, most_cache })
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        // A group that is still in use stays, and is used again.
        let _ = fs::remove_dir(&self.folder);
    }
}

/// What a command in the group said, and the most bytes of the group and of its page cache that were seen.
#[derive(Debug)]
struct Done {
    output: Output,
    most: u64,
    most_cache: u64,
}

pub(crate) fn run(workspace: &Workspace) -> Result<bool> {
    let group = Group::new()?;
    let [bitnet, packer] = &run::release_programs(workspace)?;
    let folder = workspace.target.join("stream-proof");
    fs::create_dir_all(&folder)?;
    let image = folder.join("2b4t.bitnet").display().to_string();
    let mut dummy = Command::new(packer);
    dummy.args(["dummy", "--preset", "2b4t", "--head", "i4", "-o", &image]);
    if !dummy.stdout(Stdio::null()).stderr(Stdio::null()).status()?.success() {
        bail!("bitnet-pack could not make {image}");
    }
    let same = logits_agree(&group, bitnet, &image, &folder)?;
    let bench: Vec<&str> = ["bench", &image].into_iter().chain(BENCH.split(' ')).collect();
    let streamed = group.run(bitnet, &bench)?;
    forget(&image)?;
    let mapped: Vec<&str> = ["run", &image].into_iter().chain(MAPPED.split(' ')).collect();
    let mapped = group.run(bitnet, &mapped)?;
    draw(&group, bitnet, &image, &folder)?;
    judge(same, &streamed, &mapped)
}

/// Records a timeline, draws it, and says how much of the time there was more than one thing done.
fn draw(group: &Group, bitnet: &str, image: &str, folder: &Path) -> Result<()> {
    let [json, svg] = ["timeline.json", "timeline.svg"].map(|name| folder.join(name));
    let path = json.display().to_string();
    let arguments: Vec<&str> = ["run", image].into_iter().chain(TIMELINE.split(' ')).chain([path.as_str()]).collect();
    group.run(bitnet, &arguments)?;
    let timeline = Timeline::parse(&fs::read(&json)?)?;
    fs::write(&svg, timeline.svg(DRAWN_MS))?;
    let Overlap { reading, both, computing, computing_and_reading } = timeline.overlap();
    let percent = |share: f64| format!("{:.0} %", 100.0 * share);
    say!(
        "{}: {} of the time a reader was reading, {} two; {} the computation computed, {} while a reader was reading",
        svg.display(),
        percent(reading),
        percent(both),
        percent(computing),
        percent(computing_and_reading)
    );
    Ok(())
}

/// Drops the image from the page cache, where the run in memory left it: pages that another group pays for cost this one nothing.
fn forget(image: &str) -> Result<()> {
    let mut dd = Command::new("dd");
    dd.arg(format!("if={image}")).args(["iflag=nocache", "count=0", "status=none"]);
    if !dd.status()?.success() {
        bail!("dd could not drop {image} from the page cache");
    }
    Ok(())
}

/// Whether the logits in the group are those of the image in memory, bit for bit.
fn logits_agree(group: &Group, bitnet: &str, image: &str, folder: &Path) -> Result<bool> {
    let logits = |how: [&str; 2], group: Option<&Group>| -> Result<Vec<u8>> {
        let path = folder.join("logits");
        let _ = fs::remove_file(&path);
        let output = path.display().to_string();
        let arguments = [&["logits", image][..], &LOGITS, &how, &["-o", &output]].concat();
        match group {
            Some(group) => drop(group.run(bitnet, &arguments)?),
            None if Command::new(bitnet).args(&arguments).status()?.success() => {}
            None => bail!("bitnet could not run the image in memory"),
        }
        Ok(fs::read(&path)?)
    };
    Ok(logits(["--source", "resident"], None)? == logits(["--ram", RAM], Some(group))?)
}

/// Prints the table, and says what is not as promised.
fn judge(same: bool, streamed: &Done, mapped: &Done) -> Result<bool> {
    let report: Value = serde_json::from_slice(&streamed.output.stdout).context("what bench says")?;
    let number =
        |path: &str| report.pointer(path).and_then(Value::as_f64).with_context(|| format!("bench says no {path}"));
    let mib = |bytes: f64| format!("{:.1} MiB", bytes / f64::from(1 << 20));
    let stats = String::from_utf8_lossy(&mapped.output.stderr);
    let speed = stats.lines().find_map(|line| line.strip_prefix("decode: ")).context("run says no speed")?;
    let (share, peak) = (number("/bandwidth_share")?, number("/peak_rss_bytes")?);
    let [decode, low, high] = ["/decode_tokens_per_s", "/decode_range/0", "/decode_range/1"].map(number);
    say!("\n| | `--ram {RAM}` | mapped |\n|---|---|---|");
    say!("| logits equal to those in memory | {} | |", if same { "yes" } else { "NO" });
    say!("| decode, tokens/s, median (lowest to highest) | {:.2} ({:.2} to {:.2}) | {speed} |", decode?, low?, high?);
    say!("| read for a token | {} | |", mib(number("/stream/bytes_per_token")?));
    say!(
        "| the same reads alone, one after another, after each repetition | {:.2} GB/s | |",
        number("/read_gb_per_s")?
    );
    let [low, high] = ["/stream/bandwidth_range/0", "/stream/bandwidth_range/1"].map(number);
    say!("| decoding reads of that, median (lowest to highest) | {share:.2} ({:.2} to {:.2}) | |", low?, high?);
    say!("| a reader was reading | {:.0} % of the time | |", 100.0 * number("/stream/reading_share")?);
    say!("| the computation waited | {:.0} % of the time | |", 100.0 * number("/stream/waited_share")?);
    say!("| most memory of the process | {} | |", mib(peak));
    say!("| most memory of the group | {} | {} |", mib(streamed.most as f64), mib(mapped.most as f64));
    say!("| most page cache of the group | {} | {} |", mib(streamed.most_cache as f64), mib(mapped.most_cache as f64));
    let promises = [
        (same, "the logits are those of the image in memory"),
        (peak <= RAM_BYTES as f64, "the process stays within --ram"),
        (streamed.most < GROUP_BYTES, "the group stays below its limit"),
        (streamed.most_cache <= CACHE_BYTES_MAX, "the page cache stays small"),
        (share >= SHARE_LEAST, "decoding reads at nine tenths of what the disk gives"),
    ];
    for (_, promise) in promises.iter().filter(|(kept, _)| !kept) {
        say!("error: not so: {promise}");
    }
    Ok(promises.iter().all(|(kept, _)| *kept))
}
