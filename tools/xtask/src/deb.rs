//! The Debian packages of the daemon: `cargo xtask deb` builds them, and `cargo xtask deb-proof` installs each in a root file system of
//! Debian 12, starts the daemon as its unit says, and purges it again.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

use crate::clients::succeed;
use crate::elf::{self, Machine};
use crate::matrix::{ARM_LINUX, Need, PC_LINUX};
use crate::workspace::{Workspace, cargo};
use crate::{run, service, setup};

/// What makes a package of `[package.metadata.deb]`.
const CARGO_DEB: &str = "3.8.0";
/// What the proof needs of Debian, named as the programs are.
pub(crate) const PACKAGES: [&str; 2] = ["debootstrap", "lintian"];
/// The manual, which Debian has compressed.
const PAGES: [&str; 2] = ["bitnetd.1", "bitnetd-doctor.1"];
const SUITE: &str = "bookworm";
const FOLDER: &str = "boards/bitnetd";
/// Where the package has them.
const UNIT: &str = "usr/lib/systemd/system/bitnetd.service";
const CONFIGURATION: &str = "etc/bitnetd/bitnetd.toml";
/// Paths of what dpkg itself writes, which stay when a package leaves, and of what systemd has until the machine stops.
const KEPT: [&str; 4] = ["var/lib/dpkg/", "var/log/", "var/cache/ldconfig/", "run/systemd/"];
/// The user and group of nobody, as whom the daemon runs, for a service with `DynamicUser` has no other rights.
const NOBODY: &str = "--userspec=65534:65534";

/// An architecture that there is a package for.
#[derive(Clone, Copy, Debug)]
struct Architecture {
    /// As Debian names it.
    name: &'static str,
    target: &'static str,
    machine: Machine,
}

const ARCHITECTURES: [Architecture; 2] = [
    Architecture { name: "amd64", target: PC_LINUX, machine: Machine::X86_64 },
    Architecture { name: "arm64", target: ARM_LINUX, machine: Machine::Aarch64 },
];

/// Builds the packages and says where they lie.
pub(crate) fn run(workspace: &Workspace, arguments: &[String]) -> Result<bool> {
    for architecture in chosen(arguments)? {
        setup::ensure(&needs(architecture))?;
        say!("{}", build(workspace, architecture)?.display());
    }
    Ok(true)
}

/// Builds the packages, and looks at what each does to a system. Root alone may.
pub(crate) fn prove(workspace: &Workspace, arguments: &[String]) -> Result<bool> {
    for architecture in chosen(arguments)? {
        setup::ensure(needs(architecture).iter().chain(&[Need::Debian]))?;
        let package = build(workspace, architecture)?;
        proof(workspace, architecture, &package).with_context(|| format!("{}", package.display()))?;
        say!("{}: installed, served, removed and purged in Debian 12", package.display());
    }
    Ok(true)
}

/// The architectures that were asked for: all, or that of `--arch`.
fn chosen(arguments: &[String]) -> Result<Vec<Architecture>> {
    match arguments {
        [] => Ok(ARCHITECTURES.to_vec()),
        [option, name] if option == "--arch" => {
            let found = ARCHITECTURES.iter().find(|architecture| architecture.name == name);
            Ok(vec![*found.with_context(|| format!("--arch is amd64 or arm64, not `{name}`"))?])
        }
        other => bail!("expected nothing or --arch amd64|arm64, but got `{}`", other.join(" ")),
    }
}

fn needs(architecture: Architecture) -> Vec<Need> {
    let mut needs = vec![Need::Linker, Need::Target(architecture.target)];
    if architecture.machine == Machine::Aarch64 {
        needs.push(Need::Qemu);
    }
    needs
}

/// Builds one package: the programs as they are released, then what is made with them and of them, then the archive.
fn build(workspace: &Workspace, architecture: Architecture) -> Result<PathBuf> {
    let programs = run::released(workspace, architecture.target)?;
    let [_, (_, packer), (_, daemon)] = &programs[..] else { unreachable!("there are three programs") };
    let bytes = fs::read(daemon).with_context(|| format!("reading {daemon}"))?;
    elf::check_static(&bytes, architecture.machine).with_context(|| daemon.clone())?;
    // The manifest's `target/release/deb`.
    let folder = Path::new(daemon).with_file_name("deb");
    fs::create_dir_all(&folder).with_context(|| format!("making {}", folder.display()))?;
    let path = |name: &str| folder.join(name).display().to_string();
    succeed(Command::new(objcopy()?).args(["--strip-all", daemon, &path("bitnetd")]))?;
    let image = path("stories-ternary.bitnet");
    // The packer replaces nothing but an image, and an earlier call may have been broken off.
    let _ = fs::remove_file(&image);
    run::pack(workspace, run::launcher(architecture.machine), packer, &image)?;
    let example = ["run", "--quiet", "-p", "bitnetd", "--example", "package", "--"];
    succeed(cargo().args(example).arg(&folder).current_dir(&workspace.root))?;
    succeed(Command::new("gzip").args(["--force", "--best", "--no-name"]).args(PAGES.map(path)))?;
    fs::write(folder.join("notices"), notices(workspace, architecture.target)?)?;
    archive(workspace, architecture)
}

/// The licences of other people's code in the program, each text once with the packages that it is of.
fn notices(workspace: &Workspace, target: &str) -> Result<String> {
    let arguments = ["metadata", "--format-version", "1", "--locked", "--filter-platform", target];
    let output = cargo().args(arguments).current_dir(&workspace.root).output().context("starting cargo")?;
    ensure!(output.status.success(), "cargo metadata: {}", String::from_utf8_lossy(&output.stderr).trim());
    let metadata: Value = serde_json::from_slice(&output.stdout)?;
    let linked = linked(&metadata).context("cargo metadata lacks the graph of packages")?;
    let mut texts: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    for package in metadata["packages"].as_array().into_iter().flatten() {
        // A package without a source is of this tree.
        if !package["id"].as_str().is_some_and(|id| linked.contains(id)) || package["source"].is_null() {
            continue;
        }
        let word = |key: &str| package[key].as_str().unwrap_or_default();
        let folder = Path::new(word("manifest_path")).parent().context("a manifest lies in a folder")?;
        let name = format!("{} {} ({})", word("name"), word("version"), word("license"));
        let mut found = licences(folder)?;
        if found.is_empty() {
            found.push("The package has no text of its licence.\n".to_owned());
        }
        for text in found {
            texts.entry(text).or_default().insert(name.clone());
        }
    }
    ensure!(!texts.is_empty(), "the daemon has no code of others");
    let mut all: Vec<String> = texts
        .into_iter()
        .map(|(text, names)| format!("{}\n\n{text}\n", names.into_iter().collect::<Vec<_>>().join("\n")))
        .collect();
    all.sort();
    Ok(all.join(&format!("{}\n\n", "=".repeat(80))))
}

/// The ids of the packages whose code is linked into the daemon.
fn linked(metadata: &Value) -> Option<HashSet<&str>> {
    let nodes: HashMap<&str, &Value> =
        metadata["resolve"]["nodes"].as_array()?.iter().filter_map(|node| Some((node["id"].as_str()?, node))).collect();
    let daemon = metadata["packages"].as_array()?.iter().find(|package| package["name"] == "bitnetd")?;
    let (mut linked, mut open) = (HashSet::new(), vec![daemon["id"].as_str()?]);
    while let Some(id) = open.pop() {
        if linked.insert(id) {
            let normal = |dependency: &&Value| {
                dependency["dep_kinds"].as_array().is_some_and(|kinds| kinds.iter().any(|kind| kind["kind"].is_null()))
            };
            let dependencies = nodes.get(id)?["deps"].as_array()?.iter().filter(normal);
            open.extend(dependencies.filter_map(|dependency| dependency["pkg"].as_str()));
        }
    }
    Some(linked)
}

/// The texts in a package that have the name of a licence.
fn licences(folder: &Path) -> Result<Vec<String>> {
    let mut texts = Vec::new();
    for entry in fs::read_dir(folder).with_context(|| format!("reading {}", folder.display()))? {
        let entry = entry?;
        let name = entry.file_name().to_string_lossy().to_uppercase();
        let named = ["LICENSE", "LICENCE", "COPYING", "COPYRIGHT", "NOTICE", "UNLICENSE"];
        if named.iter().any(|start| name.starts_with(start)) && entry.file_type()?.is_file() {
            let text = fs::read(entry.path())?;
            texts.push(format!("{}\n", String::from_utf8_lossy(&text).trim()));
        }
    }
    Ok(texts)
}

/// The program by which the toolchain itself strips others, of whatever machine.
fn objcopy() -> Result<PathBuf> {
    let libraries = Command::new("rustc").args(["--print", "target-libdir"]).output().context("starting rustc")?;
    let libraries = PathBuf::from(String::from_utf8(libraries.stdout)?.trim());
    let program = libraries.with_file_name("bin").join("rust-objcopy");
    ensure!(program.is_file(), "the toolchain has no {}", program.display());
    Ok(program)
}

/// Has cargo-deb make the archive. Its times are those of the changelog, so that whoever makes it again gets the same bytes.
fn archive(workspace: &Workspace, architecture: Architecture) -> Result<PathBuf> {
    let folder = workspace.target.join("debian");
    let changelog = fs::read_to_string(workspace.root.join(FOLDER).join("debian/changelog"))?;
    let (version, date) = entry(&changelog).context("debian/changelog has no entry")?;
    let seconds = Command::new("date").args(["-d", date, "+%s"]).output().context("starting date")?;
    ensure!(seconds.status.success(), "debian/changelog has the date `{date}`");
    let package = folder.join(format!("bitnetd_{version}_{}.deb", architecture.name));
    let mut deb = Command::new(cargo_deb(&folder)?);
    deb.args(["--locked", "--no-build", "--no-strip", "-p", "bitnetd", "--target", architecture.target, "--output"]);
    deb.arg(&package).env("SOURCE_DATE_EPOCH", String::from_utf8(seconds.stdout)?.trim());
    succeed(deb.current_dir(&workspace.root))?;
    Ok(package)
}

/// The version and the date of the newest entry of a Debian changelog.
fn entry(changelog: &str) -> Option<(&str, &str)> {
    let (_, rest) = changelog.split_once('(')?;
    let (version, rest) = rest.split_once(')')?;
    let line = rest.lines().find(|line| line.starts_with(" -- "))?;
    Some((version, line.split_once(">  ")?.1))
}

/// Where cargo-deb is, which is installed if it is not there in this version.
fn cargo_deb(folder: &Path) -> Result<PathBuf> {
    let tools = folder.join("tools");
    let program = tools.join("bin/cargo-deb");
    let version = Command::new(&program).arg("--version").output();
    if !version.is_ok_and(|output| String::from_utf8_lossy(&output.stdout).trim().ends_with(CARGO_DEB)) {
        let install = ["install", "--quiet", "--locked", "cargo-deb", "--version", CARGO_DEB, "--force", "--root"];
        succeed(cargo().args(install).arg(&tools))?;
    }
    Ok(program)
}

/// Whatever a package does to a system, seen from its installation to its end.
fn proof(workspace: &Workspace, architecture: Architecture, package: &Path) -> Result<()> {
    succeed(Command::new("lintian").args(["--fail-on", "error,warning", "--tag-display-limit", "0"]).arg(package))?;
    let _emulated = match architecture.machine {
        Machine::Aarch64 => Some(Emulation::new()?),
        Machine::X86_64 => None,
    };
    let folder = workspace.target.join("debian");
    let pristine = root_file_system(&folder, architecture)?;
    let root = folder.join(format!("proof-{}", architecture.name));
    succeed(Command::new("rm").arg("-rf").arg(&root))?;
    succeed(Command::new("cp").arg("-a").arg(&pristine).arg(&root))?;
    let before = paths(&root)?;
    fs::copy(package, root.join("bitnetd.deb"))?;
    succeed(inside(&root).args(["dpkg", "--install", "/bitnetd.deb"]))?;
    fs::remove_file(root.join("bitnetd.deb"))?;
    let enabled = root.join("etc/systemd/system/multi-user.target.wants/bitnetd.service");
    ensure!(fs::symlink_metadata(&enabled).is_ok(), "the service is not enabled");
    succeed(inside(&root).args(["systemd-analyze", "verify", "--man=no", &format!("/{UNIT}")]))?;
    succeed(inside(&root).args([
        "systemd-analyze",
        "security",
        "--offline=true",
        "--threshold=10",
        &format!("/{UNIT}"),
    ]))?;
    serve(&root)?;
    succeed(inside(&root).args(["dpkg", "--remove", "bitnetd"]))?;
    ensure!(root.join(CONFIGURATION).exists(), "the configuration went with the program");
    ensure!(
        !root.join("usr/bin/bitnetd").exists() && !root.join(UNIT).exists(),
        "the program stays when it is removed"
    );
    succeed(inside(&root).args(["dpkg", "--purge", "bitnetd"]))?;
    let after = paths(&root)?;
    let rest: Vec<_> = after.symmetric_difference(&before).collect();
    ensure!(rest.is_empty(), "what is no more as it was: {rest:?}");
    succeed(Command::new("rm").arg("-rf").arg(&root))
}

/// A small Debian with systemd, made once.
fn root_file_system(folder: &Path, architecture: Architecture) -> Result<PathBuf> {
    let root = folder.join(format!("{SUITE}-{}", architecture.name));
    if !root.exists() {
        let part = root.with_extension("part");
        succeed(Command::new("rm").arg("-rf").arg(&part))?;
        let mut debootstrap = Command::new("debootstrap");
        debootstrap.args(["--variant=minbase", "--include=systemd", "--arch", architecture.name, SUITE]).arg(&part);
        succeed(&mut debootstrap)?;
        fs::rename(&part, &root)?;
    }
    Ok(root)
}

/// A command in a root file system, without this machine's environment.
fn inside(root: &Path) -> Command {
    let mut command = Command::new("chroot");
    command.arg(root).env_clear().env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin").env("LC_ALL", "C");
    command
}

/// All paths of a root file system but those of what keeps a record of packages.
fn paths(root: &Path) -> Result<BTreeSet<String>> {
    let find = Command::new("find").arg(root).args(["-mindepth", "1", "-printf", "%P %y %m %l\\n"]).output()?;
    ensure!(find.status.success(), "find {} failed", root.display());
    let found = String::from_utf8(find.stdout)?;
    let kept = |path: &&str| !KEPT.iter().any(|kept| path.starts_with(kept));
    Ok(found.lines().filter(kept).map(str::to_owned).collect())
}

/// Starts the daemon as the installed unit does, but at another port, and as the user nobody.
fn serve(root: &Path) -> Result<()> {
    let unit = fs::read_to_string(root.join(UNIT))?;
    let start = unit.lines().find_map(|line| line.strip_prefix("ExecStart=")).context("the unit starts nothing")?;
    // `/proc` is there for the daemon alone.
    let mut command = Command::new("unshare");
    let script = "mount -t proc proc \"$1/proc\" && exec chroot \"$0\" \"$@\"";
    command.args(["--mount", "sh", "-c", script, NOBODY]).arg(root).args(start.split_whitespace()).env_clear();
    command.env("PATH", std::env::var_os("PATH").unwrap_or_default());
    command.env("BITNETD_LISTEN", "127.0.0.1:0").env("NOTIFY_SOCKET", "/run/bitnetd-notify");
    let text = service::answers(command, &root.join("run/bitnetd-notify"))?;
    ensure!(text.starts_with(run::STORY), "the story is `{text}`");
    say!("{start}: {text}");
    Ok(())
}

/// As long as it lives, programs for ARM run here as others do, those in other root file systems too.
struct Emulation {
    mounted: bool,
    registered: bool,
}

const FORMATS: &str = "/proc/sys/fs/binfmt_misc";
const FORMAT: &str = "bitnet-edge-aarch64";
/// How programs of 64-bit ARM begin, and which bits of that count.
const MAGIC: &str = r"\x7fELF\x02\x01\x01\x00\x00\x00\x00\x00\x00\x00\x00\x00\x02\x00\xb7\x00";
const MASK: &str = r"\xff\xff\xff\xff\xff\xff\xff\x00\xff\xff\xff\xff\xff\xff\xff\xff\xfe\xff\xff\xff";

impl Emulation {
    /// Uses what the system has, if it has that, else registers QEMU's user mode, which is opened now and so found from anywhere.
    fn new() -> Result<Self> {
        let mut emulation = Self { mounted: false, registered: false };
        if cfg!(target_arch = "aarch64") {
            return Ok(emulation);
        }
        let formats = Path::new(FORMATS);
        if !formats.join("register").exists() {
            succeed(Command::new("mount").args(["-t", "binfmt_misc", "binfmt_misc", FORMATS]))?;
            emulation.mounted = true;
        }
        if !formats.join("qemu-aarch64").exists() && !formats.join(FORMAT).exists() {
            let qemu = Command::new("sh").args(["-c", "command -v qemu-aarch64"]).output()?;
            let qemu = String::from_utf8(qemu.stdout)?;
            let line = format!(":{FORMAT}:M::{MAGIC}:{MASK}:{}:F", qemu.trim());
            fs::write(formats.join("register"), line).context("registering QEMU for programs of ARM")?;
            emulation.registered = true;
        }
        Ok(emulation)
    }
}

impl Drop for Emulation {
    fn drop(&mut self) {
        if self.registered {
            let _ = fs::write(Path::new(FORMATS).join(FORMAT), "-1");
        }
        if self.mounted {
            let _ = Command::new("umount").arg(FORMATS).status();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn architectures_are_those_of_debian() {
        let names = |words: &[&str]| {
            let words: Vec<String> = words.iter().map(|&word| word.to_owned()).collect();
            chosen(&words).map(|chosen| chosen.iter().map(|architecture| architecture.name).collect::<Vec<_>>())
        };
        assert_eq!(names(&[]).unwrap(), ["amd64", "arm64"]);
        assert_eq!(names(&["--arch", "arm64"]).unwrap(), ["arm64"]);
        for wrong in [&["--arch"][..], &["--arch", "x86_64"], &["arm64"], &["--arch", "arm64", "amd64"]] {
            let error = names(wrong).unwrap_err().to_string();
            assert!(error.contains("amd64") && error.contains(wrong.last().unwrap()), "{error}");
        }
    }

    #[test]
    fn licences_are_those_of_what_is_linked() {
        let node = |id: &str, deps: &[(&str, Value)]| {
            let deps: Vec<_> =
                deps.iter().map(|(id, kind)| json!({ "pkg": id, "dep_kinds": [{ "kind": kind }] })).collect();
            json!({ "id": id, "deps": deps })
        };
        let metadata = json!({
            "packages": [{ "name": "other", "id": "o" }, { "name": "bitnetd", "id": "d" }],
            "resolve": { "nodes": [
                node("d", &[("a", Value::Null), ("b", json!("build")), ("c", json!("dev"))]),
                node("a", &[("e", Value::Null), ("d", Value::Null)]),
                node("b", &[]), node("c", &[]), node("e", &[]), node("o", &[]),
            ] },
        });
        assert_eq!(linked(&metadata), Some(HashSet::from(["d", "a", "e"])));
        assert_eq!(linked(&json!({ "packages": [], "resolve": null })), None);
    }

    #[test]
    fn the_changelog_says_which_version_it_is_and_since_when() {
        let text = "bitnetd (1.2.3-1) unstable; urgency=medium\n\n  * It (this).\n\n -- Who <a@b.c>  Thu, 26 Nov 2026 00:00:00 +0000\n";
        assert_eq!(entry(text), Some(("1.2.3-1", "Thu, 26 Nov 2026 00:00:00 +0000")));
        for cut in 0..text.find(">  ").unwrap() {
            assert_eq!(entry(&text[..cut]), None, "{cut}");
        }
    }
}
