//! Installs what steps need, and touches nothing where all of it is there.
//!
//! Whether something is there is found by trying it, not by asking a package manager: a QEMU built by hand is as good
//! as a packaged one, and a package whose QEMU lacks a CPU is not good enough.

mod apt;

use std::fmt::Write as _;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

use crate::matrix::{CPUS, Need};
use crate::{arm, bochs, boot, deb, riscv};

/// Makes sure of everything in `needs`. What cannot be installed is named, with what to do by hand.
pub(crate) fn ensure<'a>(needs: impl IntoIterator<Item = &'a Need>) -> Result<()> {
    let mut missing: Vec<Need> = Vec::new();
    for need in needs {
        if !missing.contains(need) && !present(*need) {
            missing.push(*need);
        }
    }
    if missing.is_empty() {
        return Ok(());
    }
    rustup(&missing)?;
    packages(&missing)?;
    missing.retain(|need| !present(*need));
    if missing.is_empty() { Ok(()) } else { bail!("{}", by_hand(&missing)) }
}

fn present(need: Need) -> bool {
    match need {
        Need::Component { program, .. } => output(Command::new(program).arg("--version")).is_some(),
        Need::Target(target) => sysroot_has(target),
        Need::Qemu => {
            printed(Command::new("qemu-aarch64").args(["-cpu", "help"])).is_some_and(|(list, _)| has_cpus(&list))
        }
        Need::QemuSystem => {
            let list = printed(Command::new("qemu-system-aarch64").args(["-M", "virt", "-cpu", "help"]));
            list.is_some_and(|(list, _)| boot::RUNS.iter().all(|run| names_cpu(&list, run.cpu)))
        }
        Need::Linker => output(Command::new("cc").arg("--version")).is_some(),
        Need::Llvm => [arm::MCA, arm::OBJDUMP].iter().all(|name| output(Command::new(name).arg("--version")).is_some()),
        Need::Riscv => {
            let programs = ["riscv64-linux-gnu-gcc", "qemu-riscv64"];
            (sysroot_has(riscv::TARGET) || riscv::debian())
                && programs.iter().all(|name| output(Command::new(name).arg("--version")).is_some())
        }
        Need::Python => output(Command::new("python3").args(["-c", "import ensurepip, venv"])).is_some(),
        Need::Proxy(proxy) => output(Command::new(proxy.program()).arg("-v")).is_some(),
        Need::Bochs => {
            output(Command::new("bochs").args(["--help", "cpu"])).is_some()
                && output(Command::new("xorriso").arg("--version")).is_some()
                && bochs::FILES.iter().all(|path| Path::new(path).is_file())
        }
        Need::Debian => deb::PACKAGES.iter().all(|name| output(Command::new(name).arg("--version")).is_some()),
    }
}

/// Whether the pinned toolchain has the standard library of a target.
pub(crate) fn sysroot_has(target: &str) -> bool {
    let sysroot = output(Command::new("rustc").args(["--print", "sysroot"]));
    sysroot.is_some_and(|path| Path::new(path.trim()).join("lib/rustlib").join(target).join("lib").is_dir())
}

/// What a command prints, if there is such a program and it succeeds.
fn output(command: &mut Command) -> Option<String> {
    printed(command).and_then(|(text, success)| success.then_some(text))
}

/// What a command prints and whether it succeeds, if there is such a program. (QEMU calls help an error.)
fn printed(command: &mut Command) -> Option<(String, bool)> {
    let output = command.stdin(Stdio::null()).stderr(Stdio::null()).output().ok()?;
    Some((String::from_utf8_lossy(&output.stdout).into_owned(), output.status.success()))
}

/// Whether QEMU's list names every CPU of the matrix; what follows a comma is a property of that CPU.
fn has_cpus(list: &str) -> bool {
    CPUS.iter().all(|cpu| names_cpu(list, cpu.qemu))
}

fn names_cpu(list: &str, cpu: &str) -> bool {
    let model = cpu.split(',').next();
    list.split_whitespace().any(|word| Some(word) == model)
}

/// Adds targets and components to the toolchain that is in use.
fn rustup(missing: &[Need]) -> Result<()> {
    let target = |need: &Need| match need {
        Need::Target(name) => Some(*name),
        Need::Riscv => Some(riscv::TARGET),
        _ => None,
    };
    let targets: Vec<&str> = missing.iter().filter_map(target).collect();
    let components: Vec<&str> = missing
        .iter()
        .filter_map(|need| if let Need::Component { name, .. } = need { Some(*name) } else { None })
        .collect();
    // One by one, for what cannot be had must not keep the others from coming.
    let targets = targets.into_iter().map(|name| ("target", name));
    for (kind, name) in targets.chain(components.into_iter().map(|name| ("component", name))) {
        say!("setup: rustup {kind} add {name}");
        let status = Command::new("rustup").args([kind, "add", name]).status();
        // A failure is not the end: whether all is there in the end is what counts, and by_hand() names the rest.
        if !status.is_ok_and(|status| status.success()) {
            say!("setup: rustup could not add it");
        }
    }
    Ok(())
}

/// Installs Debian packages, where apt-get exists.
fn packages(missing: &[Need]) -> Result<()> {
    let mut names = package_names(missing);
    names.dedup();
    if names.is_empty() || output(Command::new("apt-get").arg("--version")).is_none() {
        return Ok(());
    }
    let qemu = names.contains(&"qemu-user") || names.contains(&"qemu-system-arm");
    let Some(root) = root_prefix() else { return Ok(()) };
    let suite = if qemu { qemu_suite(&root)? } else { None };
    // An update that fails for one source of many (a vendor's that is down) need not matter to the packages wanted here.
    if !privileged(&root, &["apt-get", "update", "--quiet", "-o", "Acquire::Retries=3"])? {
        say!("setup: apt-get update failed; trying to install all the same");
    }
    let mut install =
        vec!["apt-get", "install", "--yes", "--quiet", "--no-install-recommends", "-o", "DPkg::Lock::Timeout=120"];
    if let Some(suite) = &suite {
        install.extend(["-t", suite.as_str()]);
    }
    install.extend(names);
    if !privileged(&root, &install)? {
        say!("setup: apt-get install failed");
    }
    for need in missing {
        // Debian starts what it installs; nobody asked for a proxy that serves. Where there is no systemd nothing was started.
        if let Need::Proxy(proxy) = need
            && output(Command::new("systemctl").arg("--version")).is_some()
        {
            privileged(&root, &["systemctl", "disable", "--now", "--quiet", proxy.name()])?;
        }
    }
    Ok(())
}

/// The packages that bring what is missing.
fn package_names(missing: &[Need]) -> Vec<&'static str> {
    let of = |need: &Need| match need {
        Need::Component { .. } | Need::Target(_) => vec![],
        Need::Qemu => vec!["qemu-user"],
        Need::QemuSystem => vec!["qemu-system-arm"],
        Need::Linker => vec!["gcc", "libc6-dev"],
        Need::Llvm => vec!["llvm-22"],
        Need::Python => vec!["python3-venv"],
        Need::Bochs => bochs::PACKAGES.to_vec(),
        Need::Proxy(proxy) => vec![proxy.name()],
        Need::Debian => deb::PACKAGES.to_vec(),
        // rustup was asked before this. What it brought need not come from Debian.
        Need::Riscv if sysroot_has(riscv::TARGET) => [&["qemu-user"][..], &riscv::LINKER_PACKAGES].concat(),
        Need::Riscv => [&["qemu-user"][..], &riscv::LINKER_PACKAGES, &riscv::COMPILER_PACKAGES].concat(),
    };
    let mut names: Vec<&str> = missing.iter().flat_map(of).collect();
    names.sort_unstable();
    names
}

/// The words before a command that needs to be root: none for root itself, `sudo` where there is one.
fn root_prefix() -> Option<Vec<&'static str>> {
    if output(Command::new("id").arg("-u")).is_some_and(|id| id.trim() == "0") {
        return Some(Vec::new());
    }
    output(Command::new("sudo").arg("--version")).map(|_| vec!["sudo"])
}

fn privileged(root: &[&str], words: &[&str]) -> Result<bool> {
    say!("setup: {}", [root, words].concat().join(" "));
    Ok(privileged_command(root, words).status().with_context(|| format!("starting {}", words[0]))?.success())
}

/// Noninteractive by `env`, because sudo clears the environment.
fn privileged_command(root: &[&str], words: &[&str]) -> Command {
    let words = [root, &["env", "DEBIAN_FRONTEND=noninteractive"], words].concat();
    let mut command = Command::new(words[0]);
    command.args(&words[1..]);
    command
}

/// The suite to take QEMU from, if it is not the one the machine has anyway: Debian 12 has 7.2, which knows neither
/// neoverse-v1 nor neoverse-n2, but its backports have a newer one. Adds the source where it is missing.
fn qemu_suite(root: &[&str]) -> Result<Option<String>> {
    let release = std::fs::read_to_string("/etc/os-release").unwrap_or_default();
    let Some(codename) = apt::needs_backports(&release) else { return Ok(None) };
    let suite = format!("{codename}-backports");
    match apt::backports(&source_files()?, codename) {
        apt::Backports::Present => Ok(Some(suite)),
        apt::Backports::Add { name, text } => {
            let path = format!("/etc/apt/sources.list.d/{name}");
            say!("setup: writing {path}");
            let mut tee =
                privileged_command(root, &["tee", &path]).stdin(Stdio::piped()).stdout(Stdio::null()).spawn()?;
            tee.stdin.take().context("the input of tee")?.write_all(text.as_bytes())?;
            if !tee.wait()?.success() {
                bail!("could not write {path}");
            }
            Ok(Some(suite))
        }
        apt::Backports::Unknown => {
            say!("setup: found no source of {codename} to copy, so {suite} cannot be added");
            Ok(None)
        }
    }
}

/// The files that say where packages come from.
fn source_files() -> Result<Vec<(PathBuf, String)>> {
    let mut paths = vec![PathBuf::from("/etc/apt/sources.list")];
    if let Ok(entries) = std::fs::read_dir("/etc/apt/sources.list.d") {
        paths.extend(entries.filter_map(|entry| Some(entry.ok()?.path())));
    }
    paths.sort();
    paths.retain(|path| path.is_file() && path.extension().is_some_and(|kind| kind == "list" || kind == "sources"));
    paths
        .into_iter()
        .map(|path| {
            let text = std::fs::read_to_string(&path).with_context(|| format!("reading {}", path.display()))?;
            Ok((path, text))
        })
        .collect()
}

/// What a person has to install, where this program may not or cannot.
fn by_hand(missing: &[Need]) -> String {
    let mut text = String::from("this is missing and could not be installed from here; please install it by hand:");
    for need in missing {
        let line = match need {
            Need::Component { name, .. } => format!("{name} of the Rust toolchain: rustup component add {name}"),
            Need::Target(name) => format!("the Rust target {name}: rustup target add {name}"),
            Need::Qemu => {
                let mut models: Vec<&str> = CPUS.iter().filter_map(|cpu| cpu.qemu.split(',').next()).collect();
                models.dedup();
                format!(
                    "qemu-aarch64 whose `-cpu help` names {}: QEMU 8.2 or newer (Debian and Ubuntu: package qemu-user; on \
                     Debian 12 from bookworm-backports: apt-get install -t bookworm-backports qemu-user)",
                    models.join(", ")
                )
            }
            Need::QemuSystem => {
                "qemu-system-aarch64 8.2 or newer (Debian and Ubuntu: package qemu-system-arm; on Debian 12 from \
                bookworm-backports)"
                    .to_owned()
            }
            Need::Linker => "a C compiler named cc (Debian and Ubuntu: packages gcc and libc6-dev)".to_owned(),
            Need::Llvm => format!("{} and {} (Debian: package llvm-22)", arm::MCA, arm::OBJDUMP),
            Need::Python => "Python 3 with venv (Debian and Ubuntu: package python3-venv)".to_owned(),
            Need::Proxy(proxy) => format!("{0} (Debian and Ubuntu: package {0})", proxy.name()),
            Need::Bochs => {
                format!("Bochs with its firmware and a boot loader (Debian: packages {})", bochs::PACKAGES.join(", "))
            }
            Need::Debian => format!("{} (Debian: packages of these names)", deb::PACKAGES.join(" and ")),
            Need::Riscv => format!(
                "the Rust target {0}: rustup target add {0}, or on Debian 12 the packages {1}; and {2} with qemu-user",
                riscv::TARGET,
                riscv::COMPILER_PACKAGES.join(", "),
                riscv::LINKER_PACKAGES.join(", ")
            ),
        };
        // Writing to a String cannot fail.
        let _ = write!(text, "\n  - {line}");
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_qemu_counts_only_with_every_cpu_of_the_matrix() {
        let all = "Available CPUs:\n  a64fx\n  cortex-a53\n  cortex-a72\n  cortex-a76\n  max\n  neoverse-n1\n  neoverse-n2\n  neoverse-v1\n";
        assert!(has_cpus(all));
        // Debian 12's own QEMU 7.2.
        assert!(!has_cpus(
            "Available CPUs:\n  a64fx\n  cortex-a53\n  cortex-a72\n  cortex-a76\n  max\n  neoverse-n1\n"
        ));
    }

    #[test]
    fn what_is_missing_is_named_with_what_to_do() {
        let text = by_hand(&[Need::Target("aarch64-unknown-none"), Need::Qemu, Need::Linker]);
        for part in ["rustup target add aarch64-unknown-none", "qemu-user", "neoverse-v1", "libc6-dev"] {
            assert!(text.contains(part), "{text}");
        }
    }
}
