//! What is checked, as data: one table of steps, and the CPUs with the test suites that each of them runs.
//!
//! A new check is a line here. A step is one command with a name, so that what failed can be repeated alone.

use anyhow::{Result, bail};

use crate::proxy::Proxy;
use crate::riscv::TARGET as RISCV;
use crate::{bochs, boot};

/// Something that has to be on the machine before a step can run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Need {
    /// A component of the Rust toolchain, and the program by which it is known to be there.
    Component { name: &'static str, program: &'static str },
    /// The standard library of a target.
    Target(&'static str),
    /// `qemu-aarch64` with every CPU of [`CPUS`].
    Qemu,
    /// `qemu-system-aarch64` with every CPU of [`crate::boot::RUNS`].
    QemuSystem,
    /// A C compiler, which links programs for the host.
    Linker,
    /// LLVM's disassembler and static model of CPUs, of the release that the figures are of.
    Llvm,
    /// What [`crate::riscv`] needs: a compiler, a linker and an emulator.
    Riscv,
    /// Python with what makes virtual environments.
    Python,
    /// What [`crate::bochs`] needs: an emulator, its firmware, a boot loader, and what makes a CD.
    Bochs,
    /// A proxy, of Debian. No step needs it, but [`crate::proxy`] does.
    Proxy(Proxy),
    /// What [`crate::deb`] needs to make a root file system of Debian, and to look at a package as Debian does.
    Debian,
}

/// What a step does.
#[derive(Debug)]
pub(crate) enum Action {
    /// A command that passes or fails as a whole.
    Cargo(Command),
    /// Tests, counted one by one. A command that runs no test at all fails, for it checks nothing.
    Tests(Command),
    /// The rules of [`crate::tidy`].
    Tidy,
    /// What [`crate::manifests`] checks.
    Manifests,
    /// The kernels' conformance and whole models on a CPU of Bochs.
    Bochs(crate::bochs::Cpu),
    /// A board's image, booted and listened to.
    Boot(crate::boot::Request),
    /// Builds of the three programs for a target, each checked to be one static file for that machine. The daemon is run as
    /// a service; those for ARM run in QEMU, and tell a story.
    Static { target: &'static str, machine: crate::elf::Machine },
}

/// Whose cargo it is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Toolchain {
    /// The one pinned in `rust-toolchain.toml`.
    #[default]
    Pinned,
    /// What [`crate::riscv`] finds.
    Riscv,
}

/// One call of cargo.
#[derive(Debug, Default)]
pub(crate) struct Command {
    pub(crate) toolchain: Toolchain,
    pub(crate) environment: Vec<(&'static str, String)>,
    pub(crate) arguments: Vec<String>,
}

/// One line of the table.
#[derive(Debug)]
pub(crate) struct Step {
    pub(crate) name: String,
    pub(crate) needs: Vec<Need>,
    pub(crate) action: Action,
    /// Whether it may run beside its neighbours that may, too: it builds nothing, for a step before them all has.
    pub(crate) beside: bool,
}

/// A CPU of QEMU's user mode, and the suites that run on it.
#[derive(Debug)]
pub(crate) struct Cpu {
    /// The last part of the step's name.
    pub(crate) name: &'static str,
    /// What `QEMU_CPU` says.
    pub(crate) qemu: &'static str,
    suites: &'static [&'static Suite],
}

/// Tests that run under emulation, as arguments to `cargo test`.
#[derive(Debug)]
pub(crate) struct Suite {
    name: &'static str,
    arguments: &'static str,
}

/// The reference and the contract, which hold no instruction that only some CPUs have: one CPU has to do.
const CONTRACT: Suite = Suite { name: "contract", arguments: "-p bitnet-kernel --tests" };

/// The kernel crates' own tests: conformance of each backend with the portable reference. The feature `std` is named
/// because without it a crate sees only the compile-time features and would have nothing to test.
const KERNELS: Suite = Suite {
    name: "kernels",
    arguments: "-p bitnet-kernels-neon -p bitnet-kernels-sve2 \
        --features bitnet-kernels-neon/std,bitnet-kernels-sve2/std --tests",
};

/// The SVE kernels alone, for the many lengths of vectors.
const SVE: Suite =
    Suite { name: "sve", arguments: "-p bitnet-kernels-sve2 --features bitnet-kernels-sve2/std --tests" };

/// Every backend as the runtime chooses it: kernel by kernel against the portable reference, and passes of every model
/// of `tests/fingerprints.json`.
const BACKENDS: Suite = Suite { name: "backends", arguments: "-p bitnet-tests --test backends" };

/// The whole of the integration tests. Emulation makes this slow, so one CPU has to do: the Raspberry Pi 5's.
const WHOLE: Suite = Suite { name: "whole", arguments: "-p bitnet-tests --tests" };

const SUITES: &[&Suite] = &[&CONTRACT, &KERNELS, &SVE, &BACKENDS, &WHOLE];

/// Every CPU claimed. `neoverse-n2` also stands for Graviton4 (`neoverse-v2`, not in QEMU).
pub(crate) const CPUS: &[Cpu] = &[
    // Raspberry Pi 3 and Zero 2: plain NEON.
    Cpu { name: "cortex-a53", qemu: "cortex-a53", suites: &[&KERNELS, &BACKENDS, &CONTRACT] },
    // Raspberry Pi 4: plain NEON.
    Cpu { name: "cortex-a72", qemu: "cortex-a72", suites: &[&KERNELS, &BACKENDS] },
    // Raspberry Pi 5: NEON with dot products.
    Cpu { name: "cortex-a76", qemu: "cortex-a76", suites: &[&KERNELS, &BACKENDS, &WHOLE] },
    // Graviton3: i8mm and SVE of 256 bits, but no SVE2.
    Cpu { name: "neoverse-v1", qemu: "neoverse-v1", suites: &[&KERNELS, &BACKENDS] },
    // i8mm, and SVE2 of 128 bits.
    Cpu { name: "neoverse-n2", qemu: "neoverse-n2", suites: &[&KERNELS, &BACKENDS] },
    // SVE without i8mm, 512 bits: products of several tokens take the other way.
    Cpu { name: "a64fx", qemu: "a64fx", suites: &[&SVE] },
    // SVE2 at other lengths, powers of two and not, to the longest: code that assumes a length fails on one of them. User mode
    // gives 512 bits unless the default length says otherwise; -1 is the longest there is.
    Cpu { name: "sve-128", qemu: "max,sve-max-vq=1", suites: &[&KERNELS, &BACKENDS] },
    Cpu { name: "sve-256", qemu: "max,sve-max-vq=2", suites: &[&SVE] },
    Cpu { name: "sve-384", qemu: "max,sve-max-vq=3", suites: &[&SVE] },
    Cpu { name: "sve-512", qemu: "max,sve-max-vq=4", suites: &[&KERNELS, &BACKENDS] },
    Cpu { name: "sve-1024", qemu: "max,sve-max-vq=8,sve-default-vector-length=-1", suites: &[&SVE] },
    Cpu { name: "sve-1920", qemu: "max,sve-max-vq=15,sve-default-vector-length=-1", suites: &[&SVE] },
    Cpu { name: "sve-2048", qemu: "max,sve-max-vq=16,sve-default-vector-length=-1", suites: &[&SVE] },
];

pub(crate) const ARM_LINUX: &str = "aarch64-unknown-linux-musl";
pub(crate) const ARM_BARE: &str = "aarch64-unknown-none";
pub(crate) const PC_LINUX: &str = "x86_64-unknown-linux-musl";

const CLIPPY: Need = Need::Component { name: "clippy", program: "cargo-clippy" };
const RUSTFMT: Need = Need::Component { name: "rustfmt", program: "cargo-fmt" };

/// The step that builds and runs all tests of the workspace for this machine.
pub(crate) const HOST_TESTS: &str = "host/tests";

/// The setting with which other people's crates are not optimized. Where they do little, that saves minutes of building.
pub(crate) const PLAIN_DEPENDENCIES: &str = r#"profile.dev.package."*".opt-level=0"#;

const KERNEL_CRATES: &str = "-p bitnet-kernel -p bitnet-kernels-neon -p bitnet-kernels-sve2 -p bitnet-kernels-x86";

/// The whole of CI, cheap steps first.
pub(crate) fn steps() -> Vec<Step> {
    let mut steps = vec![
        // (a) Style. Clippy sees the code for ARM too, most of which the host never compiles; left out is what needs most of the
        // dependencies, and has no lines for ARM alone or is built for the emulated tests anyway.
        step("style/tidy", &[], Action::Tidy),
        step("style/fmt", &[RUSTFMT], cargo("fmt --all --check")),
        step("style/lock", &[], cargo("update --workspace --locked --quiet")),
        // The fuzzers are a workspace of their own, since nobody builds them with the rest.
        step(
            "style/lock-fuzz",
            &[],
            cargo("update --manifest-path tests/fuzz/Cargo.toml --workspace --locked --quiet"),
        ),
        step("style/clippy", &[CLIPPY], cargo("clippy --workspace --all-targets -- -D warnings")),
        step(
            "style/clippy-aarch64",
            &[CLIPPY, Need::Target(ARM_LINUX)],
            cargo(&format!(
                "clippy --workspace --exclude xtask --exclude bitnetd --exclude bitnet-tests --all-targets \
                 --target {ARM_LINUX} -- -D warnings"
            )),
        ),
        step("style/doc", &[], documentation()),
        step("style/manifests", &[Need::Python], Action::Manifests),
        // (b) The host.
        step(HOST_TESTS, &[Need::Linker], tests("test --workspace --tests --no-fail-fast")),
        // As a whole, because there may be no example in any documentation.
        step("host/doctests", &[Need::Linker], cargo("test --workspace --doc --no-fail-fast")),
    ];
    // (c) Features removed one by one. Clippy in place of check, because what is dead without a feature is a warning.
    for (name, arguments) in [
        ("features/runtime-none", "-p bitnet-runtime --no-default-features"),
        ("features/runtime-alloc", "-p bitnet-runtime --no-default-features --features alloc"),
        ("features/runtime-std", "-p bitnet-runtime --no-default-features --features std"),
        (
            "features/runtime-drivers",
            "-p bitnet-runtime --no-default-features --features embedded-sdmmc,embedded-storage",
        ),
        ("features/kernel", "-p bitnet-kernel --no-default-features"),
        ("features/kernels-neon", "-p bitnet-kernels-neon --no-default-features"),
        ("features/kernels-sve2", "-p bitnet-kernels-sve2 --no-default-features"),
        ("features/kernels-x86", "-p bitnet-kernels-x86 --no-default-features"),
        ("features/kernels-x86-avx512", "-p bitnet-kernels-x86 --no-default-features --features avx512"),
    ] {
        steps.push(step(name, &[CLIPPY], cargo(&format!("clippy {arguments} -- -D warnings"))));
    }
    // (d) ARM Linux under emulation: each suite is built once and then run on the CPUs that name it. The runs are beside each other,
    // the longest first: most of the conformance is one test, which is one thread.
    for suite in SUITES {
        steps.push(step(
            &format!("qemu/{}/build", suite.name),
            &[Need::Target(ARM_LINUX)],
            cargo(&format!("test --target {ARM_LINUX} {} --no-run", suite.arguments)),
        ));
    }
    for suite in SUITES.iter().rev() {
        for cpu in CPUS.iter().filter(|cpu| cpu.suites.iter().any(|named| named.name == suite.name)) {
            let run = step(
                &format!("qemu/{}/{}", suite.name, cpu.name),
                &[Need::Target(ARM_LINUX), Need::Qemu],
                Action::Tests(Command {
                    environment: vec![("QEMU_CPU", cpu.qemu.to_owned())],
                    ..command(&format!("test --target {ARM_LINUX} {} --no-fail-fast", suite.arguments))
                }),
            );
            steps.push(Step { beside: true, ..run });
        }
    }
    // (e) RISC-V Linux under emulation: the plain code that every other backend is compared with, and whole models by it, whose
    // fingerprints are those of every CPU. What tests the suite itself, for minutes under emulation, is left to the host.
    for (name, arguments) in [
        (
            "riscv/kernels",
            "-p bitnet-kernel --tests --no-fail-fast -- --skip the_first_difference_is_named --skip every_operation_is_looked_at",
        ),
        (
            "riscv/model",
            "-p bitnet-tests --no-default-features --test end_to_end --test backends -- one_portable_pass committed_bits",
        ),
    ] {
        let command = command(&format!("test --config {PLAIN_DEPENDENCIES} --target {RISCV} {arguments}"));
        steps.push(step(name, &[Need::Riscv], Action::Tests(Command { toolchain: Toolchain::Riscv, ..command })));
    }
    // (f) x86-64 with AVX-512 and without, under emulation.
    for cpu in bochs::CPUS {
        let needs = [Need::Target(bochs::TARGET), Need::Bochs, Need::Linker];
        steps.push(step(&format!("bochs/{}", cpu.backend), &needs, Action::Bochs(cpu)));
    }
    // (g) Builds that are not run here: bare metal, and the static programs that people install.
    for (name, arguments) in [
        ("bare/kernels", KERNEL_CRATES),
        ("bare/runtime", "-p bitnet-runtime"),
        ("bare/runtime-alloc", "-p bitnet-runtime --features alloc,embedded-sdmmc,embedded-storage"),
    ] {
        let build = format!("build --release --target {ARM_BARE} {arguments}");
        steps.push(step(name, &[Need::Target(ARM_BARE)], cargo(&build)));
    }
    // (h) Bare metal that boots.
    let boards =
        "-p bitnet-support -p bitnet-qemu-virt -p bitnet-rpi5 --features bitnet-qemu-virt/image,bitnet-rpi5/image";
    let clippy = format!("clippy --release --target {ARM_BARE} {boards} -- -D warnings");
    steps.push(step("bare/boards", &[CLIPPY, Need::Target(ARM_BARE)], cargo(&clippy)));
    let needs = [Need::Target(ARM_BARE), Need::QemuSystem, Need::Linker];
    for request in boot::requests() {
        steps.push(step(&format!("boot/{}", request.name()), &needs, Action::Boot(request)));
    }
    for (name, target, machine) in [
        ("static/x86_64", PC_LINUX, crate::elf::Machine::X86_64),
        ("static/aarch64", ARM_LINUX, crate::elf::Machine::Aarch64),
    ] {
        let needs: &[Need] = match machine {
            crate::elf::Machine::X86_64 => &[Need::Target(target), Need::Linker],
            crate::elf::Machine::Aarch64 => &[Need::Target(target), Need::Linker, Need::Qemu],
        };
        steps.push(step(name, needs, Action::Static { target, machine }));
    }
    steps
}

/// The steps that someone named: each name is that of a step, or its beginning up to a slash. None means all.
pub(crate) fn select(steps: Vec<Step>, names: &[String]) -> Result<Vec<Step>> {
    let matches = |step: &Step, name: &str| {
        step.name == name || step.name.strip_prefix(name).is_some_and(|rest| rest.starts_with('/'))
    };
    for name in names {
        let name = name.trim_end_matches('/');
        if !steps.iter().any(|step| matches(step, name)) {
            bail!("there is no step `{name}`; `cargo xtask list` prints them");
        }
    }
    let chosen = |step: &Step| names.is_empty() || names.iter().any(|name| matches(step, name.trim_end_matches('/')));
    Ok(steps.into_iter().filter(chosen).collect())
}

fn step(name: &str, needs: &[Need], action: Action) -> Step {
    Step { name: name.to_owned(), needs: needs.to_vec(), action, beside: false }
}

fn command(arguments: &str) -> Command {
    Command { arguments: arguments.split_whitespace().map(str::to_owned).collect(), ..Command::default() }
}

fn cargo(arguments: &str) -> Action {
    Action::Cargo(command(arguments))
}

fn tests(arguments: &str) -> Action {
    Action::Tests(command(arguments))
}

fn documentation() -> Action {
    let environment = vec![("RUSTDOCFLAGS", "-Dwarnings".to_owned())];
    Action::Cargo(Command { environment, ..command("doc --workspace --no-deps") })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(chosen: &[&str]) -> Vec<String> {
        let chosen: Vec<String> = chosen.iter().map(|&name| name.to_owned()).collect();
        select(steps(), &chosen).unwrap().into_iter().map(|step| step.name).collect()
    }

    #[test]
    fn every_step_has_a_name_of_its_own() {
        let mut all = names(&[]);
        let count = all.len();
        all.sort();
        all.dedup();
        assert_eq!(all.len(), count);
    }

    #[test]
    fn a_step_is_chosen_by_its_name_or_its_beginning_up_to_a_slash() {
        assert_eq!(names(&["style/fmt"]), ["style/fmt"]);
        assert_eq!(names(&["bare/runtime"]), ["bare/runtime"], "not bare/runtime-alloc");
        assert_eq!(names(&["style/clippy"]), ["style/clippy"], "not style/clippy-aarch64");
        assert_eq!(names(&["static/", "style/fmt"]), ["style/fmt", "static/x86_64", "static/aarch64"]);
        let unknown = select(steps(), &["styl".to_owned()]).unwrap_err();
        assert!(unknown.to_string().contains("no step `styl`"), "{unknown}");
    }

    #[test]
    fn every_cpu_runs_the_kernels_and_the_backends() {
        for cpu in CPUS {
            let ran: Vec<_> = cpu.suites.iter().map(|suite| suite.name).collect();
            assert!(ran == ["sve"] || ran.starts_with(&["kernels", "backends"]), "{}: {ran:?}", cpu.name);
        }
    }

    #[test]
    fn only_tests_run_beside_others() {
        for step in steps().iter().filter(|step| step.beside) {
            assert!(matches!(step.action, Action::Tests(_)), "{}", step.name);
        }
    }

    #[test]
    fn what_runs_under_emulation_names_its_cpu_and_needs_qemu() {
        let steps = select(steps(), &["qemu".to_owned()]).unwrap();
        for step in steps.iter().filter(|step| !step.name.ends_with("/build")) {
            let Action::Tests(command) = &step.action else { panic!("{} runs no tests", step.name) };
            assert_eq!(command.environment[0].0, "QEMU_CPU");
            assert!(step.needs.contains(&Need::Qemu), "{}", step.name);
        }
    }
}
