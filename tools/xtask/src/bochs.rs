//! AVX-512 where the CPU has none: the conformance suite and whole models in an image that Bochs boots, with the CPU models that it
//! has.
//!
//! The image is `tests/bochs`. A Multiboot loader of Syslinux on a CD takes it to 2 MiB and starts it, with the small models of
//! `tests/golden` beside it. What it writes to port 0xe9 is Bochs' standard output, and decides: Bochs' own exit status is 1 even
//! when all went well. Fingerprints among it are compared with those of `tests/fingerprints.json`.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde_json::Value;

use crate::run::{self, Host};
use crate::workspace::{Workspace, cargo};

/// A CPU model of Bochs, and the backend that must be the best on it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Cpu {
    pub(crate) model: &'static str,
    pub(crate) backend: &'static str,
}

/// One with VNNI and VBMI, one with BW alone, one without AVX-512.
pub(crate) const CPUS: [Cpu; 3] = [
    Cpu { model: "corei7_icelake_u", backend: "avx512-vnni" },
    Cpu { model: "corei7_skylake_x", backend: "avx512-bw" },
    Cpu { model: "broadwell_ult", backend: "avx2" },
];

/// The packages that bring the emulator, its firmware, the loader, and the program that makes a CD.
pub(crate) const PACKAGES: [&str; 6] = ["bochs", "bochsbios", "vgabios", "isolinux", "syslinux-common", "xorriso"];
/// The files among them.
pub(crate) const FILES: [&str; 6] = [BIOS, VIDEO_BIOS, LOADER, MODULES[0], MODULES[1], MODULES[2]];

const BIOS: &str = "/usr/share/bochs/BIOS-bochs-latest";
const VIDEO_BIOS: &str = "/usr/share/vgabios/vgabios.bin";
const LOADER: &str = "/usr/lib/ISOLINUX/isolinux.bin";
const MODULES: [&str; 3] = [
    "/usr/lib/syslinux/modules/bios/ldlinux.c32",
    "/usr/lib/syslinux/modules/bios/libcom32.c32",
    "/usr/lib/syslinux/modules/bios/mboot.c32",
];

/// A target whose code may use vector registers. (That of `x86_64-unknown-none` may not, and nothing of Linux is linked.)
pub(crate) const TARGET: &str = "x86_64-unknown-linux-gnu";
/// A run takes about a minute on an idle machine.
const PATIENCE: Duration = Duration::from_secs(1200);

/// A module of the image is whole blocks.
const BLOCK_BYTES: usize = 64;
/// Fingerprints of the logits of small models: the set of golden values, and by how keys and values are kept.
const FINGERPRINTS: &str = "tests/fingerprints.json";

/// How the linker is told of the script.
const SCRIPT: &str = "-Clink-arg=-Ttests/bochs/link.ld";
/// Programs of this target unwind otherwise, and without an operating system nothing can.
const NO_UNWINDING: &str = r#"profile.release.panic="abort""#;

/// The command that builds the image.
pub(crate) fn build_arguments() -> Vec<String> {
    // Relative to the root: cargo runs the compiler there.
    let arguments = ["rustc", "--release", "--config", NO_UNWINDING, "-p", "bitnet-bochs", "--bin", "bochs-image"]
        .into_iter()
        .chain(["--features", "image", "--target", TARGET, "--", "-Dwarnings", "-Clinker=rust-lld"])
        .chain(["-Clinker-flavor=ld.lld", "-Crelocation-model=static"])
        .chain(["-Clink-arg=-static", "-Clink-arg=--no-pie", "-Clink-arg=--oformat=binary", SCRIPT]);
    arguments.map(str::to_owned).collect()
}

/// Builds the image and boots it on one CPU; the answer is whether its backend was the expected one and conforms, and all logits
/// had their fingerprints.
pub(crate) fn run(workspace: &Workspace, cpu: Cpu, host: Host) -> Result<bool> {
    if !cargo().args(build_arguments()).current_dir(&workspace.root).status()?.success() {
        bail!("the image does not build");
    }
    let image = workspace.target.join(TARGET).join("release/bochs-image");
    let folder = workspace.target.join("bochs").join(cpu.model);
    let [_, packer] = run::host_programs(workspace, host)?;
    let fingerprints = json(&workspace.root.join(FINGERPRINTS))?;
    let sets = fingerprints.as_object().with_context(|| format!("{FINGERPRINTS} is no object"))?;
    make_cd(&image, &folder, |tree| {
        sets.keys().try_for_each(|set| make_module(workspace, &packer, set, &tree.join(set)))?;
        Ok(sets.keys().map(|set| format!(" --- /{set}")).collect())
    })?;
    std::fs::write(folder.join("bochsrc"), configuration(cpu))?;
    // The debugger, which Debian builds in, would wait for a command.
    std::fs::write(folder.join("commands"), "c\n")?;
    let transcript = folder.join("transcript");
    let complaints = folder.join("complaints");
    let mut bochs = Command::new("bochs")
        .args(["-q", "-f", "bochsrc", "-rc", "commands"])
        .current_dir(&folder)
        .stdin(Stdio::null())
        .stdout(std::fs::File::create(&transcript)?)
        .stderr(std::fs::File::create(&complaints)?)
        .spawn()
        .context("starting bochs")?;
    let ended = wait(&mut bochs)?;
    let text = lines_of(&std::fs::read(&transcript)?);
    text.iter().for_each(|line| say!("{line}"));
    match ended {
        None => say!("error: not done after {} s", PATIENCE.as_secs()),
        Some(_) if passed(&text, cpu, &fingerprints) => return Ok(true),
        Some(status) => {
            say!("error: Bochs ended with {status}, without what the image says when all is well; its last words:");
            for file in [folder.join("bochs.log"), complaints] {
                let words = std::fs::read(&file).unwrap_or_default();
                let words = String::from_utf8_lossy(&words);
                let lines: Vec<&str> = words.lines().collect();
                lines.iter().skip(lines.len().saturating_sub(10)).for_each(|line| say!("  {line}"));
            }
        }
    }
    Ok(false)
}

/// Whether the image said all that it says when all is well, and nothing else.
fn passed(lines: &[String], cpu: Cpu, fingerprints: &Value) -> bool {
    let mut expected = vec![format!("{} begins", cpu.backend), format!("{} conforms", cpu.backend)];
    for (set, of) in fingerprints.as_object().into_iter().flatten() {
        let line = |backend, kv| format!("/{set} {backend} {kv} {}", of[kv].as_str().unwrap_or("nothing"));
        expected.extend(["f32", "f16", "i8"].map(|kv| line(cpu.backend, kv)));
        expected.push(line("portable", "f16"));
    }
    expected.push("EXIT 0".to_owned());
    expected.iter().filter(|line| !lines.contains(line)).for_each(|line| say!("error: it did not say: {line}"));
    lines == expected
}

/// What the image wrote, from its first line to its last: Bochs' banner and its debugger's words are before and after.
fn lines_of(output: &[u8]) -> Vec<String> {
    let text = String::from_utf8_lossy(output).replace('\0', "");
    let mut lines: Vec<String> = text.lines().map(|line| line.trim_end().to_owned()).collect();
    if let Some(last) = lines.iter().position(|line| line.starts_with("EXIT ")) {
        lines.truncate(last + 1);
    }
    let first = lines.iter().position(|line| line.ends_with(" begins")).unwrap_or(0);
    lines.split_off(first)
}

/// Waits for the end, or ends it; the answer is how it ended by itself.
fn wait(child: &mut Child) -> Result<Option<ExitStatus>> {
    let start = Instant::now();
    while start.elapsed() < PATIENCE {
        if let Some(status) = child.try_wait()? {
            return Ok(Some(status));
        }
        std::thread::sleep(Duration::from_millis(200));
    }
    child.kill()?;
    child.wait()?;
    Ok(None)
}

/// Packs a small model for the image: as the fingerprints have it, and after it the number of its tokens, these, all of 32 bits, and
/// zeros up to a whole block.
fn make_module(workspace: &Workspace, packer: &str, set: &str, path: &Path) -> Result<()> {
    let golden = workspace.root.join("tests/golden").join(set);
    let mut pack = Command::new(packer);
    pack.arg("pack").arg(&golden).args(["--head", "f16", "-o"]).arg(path);
    let packed = pack.output().context("starting bitnet-pack")?;
    if !packed.status.success() {
        bail!("{set}: {}", String::from_utf8_lossy(&packed.stderr).trim());
    }
    let ids: Vec<u32> = serde_json::from_value(json(&golden.join("ids.json"))?["input_ids"][0].clone())?;
    let mut bytes = std::fs::read(path)?;
    bytes.extend([ids.len() as u32].iter().chain(&ids).flat_map(|number| number.to_le_bytes()));
    bytes.resize(bytes.len().next_multiple_of(BLOCK_BYTES), 0);
    Ok(std::fs::write(path, bytes)?)
}

fn json(path: &Path) -> Result<Value> {
    let read = || anyhow::Ok(serde_json::from_slice(&std::fs::read(path)?)?);
    read().with_context(|| path.display().to_string())
}

/// A CD that starts the image. `add` puts more files into its tree, and answers with the words by which the loader loads them.
fn make_cd(image: &Path, folder: &Path, add: impl FnOnce(&Path) -> Result<String>) -> Result<()> {
    let tree = folder.join("cd");
    let loader = tree.join("isolinux");
    std::fs::create_dir_all(&loader)?;
    let copy = |from: &Path, to: PathBuf| {
        std::fs::copy(from, to).map(|_| ()).with_context(|| format!("copying {}", from.display()))
    };
    for file in [LOADER].into_iter().chain(MODULES) {
        let file = Path::new(file);
        copy(file, loader.join(file.file_name().context("a file has a name")?))?;
    }
    copy(image, tree.join("image.bin"))?;
    let more = add(&tree)?;
    let menu =
        format!("DEFAULT image\nPROMPT 0\nTIMEOUT 1\nLABEL image\n KERNEL mboot.c32\n APPEND /image.bin{more}\n");
    std::fs::write(loader.join("isolinux.cfg"), menu)?;
    let output = Command::new("xorriso")
        .args(["-as", "mkisofs", "-quiet", "-o", "cd.iso", "-b", "isolinux/isolinux.bin", "-c", "isolinux/boot.cat"])
        .args(["-no-emul-boot", "-boot-load-size", "4", "-boot-info-table", "cd"])
        .current_dir(folder)
        .stdin(Stdio::null())
        .output()
        .context("starting xorriso")?;
    if !output.status.success() {
        bail!("xorriso: {}", String::from_utf8_lossy(&output.stderr));
    }
    Ok(())
}

fn configuration(cpu: Cpu) -> String {
    // The sound that Bochs chooses by itself is ALSA's, which overflows a buffer of Bochs where there is no sound card.
    format!(
        "display_library: rfb, options=\"timeout=0\"\n\
         cpu: model={}, ignore_bad_msrs=1, count=1, ips=50000000, reset_on_triple_fault=0\n\
         memory: guest=64, host=64\n\
         romimage: file={BIOS}\n\
         vgaromimage: file={VIDEO_BIOS}\n\
         ata0-master: type=cdrom, path=cd.iso, status=inserted\n\
         boot: cdrom\n\
         sound: driver=dummy\n\
         port_e9_hack: enabled=1\n\
         clock: sync=none\n\
         log: bochs.log\n\
         panic: action=fatal\n\
         error: action=ignore\n\
         info: action=report\n\
         debug: action=ignore\n",
        cpu.model
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_expected_backend_and_fingerprints_and_a_good_end_pass() {
        let [cpu, ..] = CPUS;
        let fingerprints = serde_json::json!({"small": {"f32": "0x1", "f16": "0x2", "i8": "0x3"}});
        let models = "/small avx512-vnni f32 0x1\n/small avx512-vnni f16 0x2\n/small avx512-vnni i8 0x3\n/small portable f16 0x2\n";
        let good = format!("avx512-vnni begins\navx512-vnni conforms\n{models}EXIT 0\n");
        let lines = lines_of(format!("Bochs x86 Emulator\n(0) [0x0000fffffff0] f000:fff0\n{good}(0).[1]\n").as_bytes());
        assert_eq!(lines, good.lines().collect::<Vec<_>>());
        let passes = |text: &str| passed(&lines_of(text.as_bytes()), cpu, &fingerprints);
        assert!(passes(&good));
        for (from, to) in [
            ("EXIT 0\n", ""),
            ("EXIT 0", "EXIT 1"),
            ("avx512-vnni", "avx2"),
            ("avx512-vnni conforms\n", ""),
            ("i8 0x3", "i8 0x2"),
            ("/small portable f16 0x2\n", ""),
            (models, ""),
        ] {
            assert!(!passes(&good.replace(from, to)), "{from}");
        }
        assert!(!passes(""));
    }
}
