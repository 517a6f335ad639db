//! Runs steps, counts what passed, and says how to repeat what did not.

use std::io::{BufRead, BufReader, Write};
use std::num::NonZero;
use std::ops::Range;
use std::process::Stdio;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

use crate::matrix::{self, Action, Command, Step, Toolchain};
use crate::riscv::Way;
use crate::workspace::{Workspace, cargo};
use crate::{bochs, boot, elf, manifests, riscv, service, tidy};

/// How many checks passed and failed: tests count one by one, any other command counts as one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Count {
    passed: usize,
    failed: usize,
}

const PASSED: Count = Count { passed: 1, failed: 0 };
const FAILED: Count = Count { passed: 0, failed: 1 };

/// A step that has run.
#[derive(Debug)]
struct Done {
    count: Count,
    time: Duration,
}

/// Runs the steps in their order, and beside each other those that may. A failure does not stop the rest, so that one run tells
/// everything.
pub(crate) fn all(workspace: &Workspace, steps: &[Step]) -> Result<bool> {
    let start = Instant::now();
    let host = if steps.iter().any(|step| step.name == matrix::HOST_TESTS) { Host::Whole } else { Host::Programs };
    let begin = |index: usize| {
        let step = &steps[index];
        say!("\n== {} ({} of {}): {}", step.name, index + 1, steps.len(), describe(&step.action));
    };
    let end = |index: usize, count: Result<Count>, time: Duration| {
        let step = &steps[index];
        let count = count.unwrap_or_else(|error| {
            say!("error: {error:#}");
            FAILED
        });
        say!("-- {}: {}, {:.1} s", step.name, word(count), time.as_secs_f64());
        if count.failed > 0 {
            say!("   repeat with: {}", repeat(step));
        }
        Done { count, time }
    };
    let mut done = Vec::new();
    while done.len() < steps.len() {
        let first = done.len();
        let beside = steps[first..].iter().take_while(|step| step.beside).count();
        if beside > 1 {
            let shown = Mutex::new(());
            done.extend(side_by_side(first..first + beside, |index| {
                let start = Instant::now();
                let Action::Tests(command) = &steps[index].action else { unreachable!("only tests run beside others") };
                let mut lines = Vec::new();
                let count = tests(workspace, command, Output::Kept(&mut lines));
                let time = start.elapsed();
                let _shown = shown.lock().unwrap_or_else(PoisonError::into_inner);
                begin(index);
                lines.iter().for_each(|line| say!("{line}"));
                end(index, count, time)
            }));
        } else {
            begin(first);
            let start = Instant::now();
            let count = one(workspace, &steps[first], host);
            done.push(end(first, count, start.elapsed()));
        }
    }
    let mut total = Count::default();
    say!("\n{:<28} {:<7} {:>6} {:>6} {:>10}", "step", "", "passed", "failed", "time");
    for (step, Done { count, time }) in steps.iter().zip(&done) {
        let (word, seconds) = (word(*count), time.as_secs_f64());
        say!("{:<28} {word:<7} {:>6} {:>6} {seconds:>8.1} s", step.name, count.passed, count.failed);
        total.passed += count.passed;
        total.failed += count.failed;
    }
    for (step, _) in steps.iter().zip(&done).filter(|(_, done)| done.count.failed > 0) {
        say!("\nrepeat with: {}", repeat(step));
    }
    say!("\n{} passed, {} failed, {:.1} minutes", total.passed, total.failed, start.elapsed().as_secs_f64() / 60.0);
    Ok(total.failed == 0)
}

fn word(count: Count) -> &'static str {
    if count.failed == 0 { "ok" } else { "FAILED" }
}

/// The commands that repeat a step.
fn repeat(step: &Step) -> String {
    format!("{}\n     or: cargo xtask test {}", describe(&step.action), step.name)
}

/// Gives each index to `f`, as many at a time as there are cores; what `f` answers comes in the order of the indices.
fn side_by_side<T: Send>(indices: Range<usize>, f: impl Fn(usize) -> T + Sync) -> Vec<T> {
    let cores = thread::available_parallelism().map_or(1, NonZero::get);
    let next = AtomicUsize::new(indices.start);
    let worker = || {
        let mut own = Vec::new();
        loop {
            let index = next.fetch_add(1, Ordering::Relaxed);
            if !indices.contains(&index) {
                return own;
            }
            own.push((index, f(index)));
        }
    };
    let mut all: Vec<(usize, T)> = thread::scope(|scope| {
        let workers: Vec<_> = (0..cores.min(indices.len())).map(|_| scope.spawn(worker)).collect();
        workers.into_iter().flat_map(|worker| worker.join().expect("a worker does not panic")).collect()
    });
    all.sort_by_key(|(index, _)| *index);
    all.into_iter().map(|(_, answer)| answer).collect()
}

/// Prints the table of steps.
pub(crate) fn list(steps: &[Step]) {
    for step in steps {
        say!("{:<28} {}", step.name, describe(&step.action));
    }
}

/// The command of a step, as one would type it.
fn describe(action: &Action) -> String {
    match action {
        Action::Cargo(command) | Action::Tests(command) => {
            let way = way(command);
            let mut words: Vec<String> = Vec::new();
            words.extend(way.environment.iter().map(|(name, value)| format!("{name}={}", quote(value))));
            words.extend(command.environment.iter().map(|(name, value)| format!("{name}={}", quote(value))));
            words.push(way.program.unwrap_or("cargo").to_owned());
            words.extend(way.arguments.iter().map(|argument| quote(argument)));
            words.extend(command.arguments.iter().map(|argument| quote(argument)));
            words.join(" ")
        }
        Action::Tidy => "cargo xtask tidy".to_owned(),
        Action::Manifests => {
            "cargo xtask test style/manifests  # kubectl kustomize, kubernetes-validate --strict".to_owned()
        }
        Action::Bochs(cpu) => {
            format!("cargo {}  # booted in Bochs as {}", bochs::build_arguments().join(" "), cpu.model)
        }
        Action::Boot(request) => request.describe(),
        Action::Static { target, .. } => {
            format!(
                "cargo {}  # no dynamic linker in the three programs; the daemon as a service; on ARM in QEMU, and a story",
                static_build(target).join(" ")
            )
        }
    }
}

/// Quotes a word for a shell where it has to be.
fn quote(word: &str) -> String {
    let plain = |character: char| character.is_ascii_alphanumeric() || "-_=,./:+".contains(character);
    if !word.is_empty() && word.chars().all(plain) {
        word.to_owned()
    } else {
        format!("'{}'", word.replace('\'', r"'\''"))
    }
}

fn one(workspace: &Workspace, step: &Step, host: Host) -> Result<Count> {
    match &step.action {
        Action::Cargo(command) => Ok(if prepare(workspace, command).status()?.success() { PASSED } else { FAILED }),
        Action::Tests(command) => tests(workspace, command, Output::Shown),
        Action::Tidy => {
            let (passed, failed) = tidy::report(workspace)?;
            Ok(Count { passed, failed })
        }
        Action::Manifests => {
            let (passed, failed) = manifests::check(workspace)?;
            Ok(Count { passed, failed })
        }
        Action::Boot(request) => {
            let (passed, failed) = boot::check(workspace, *request, host)?;
            Ok(Count { passed, failed })
        }
        Action::Bochs(cpu) => Ok(if bochs::run(workspace, *cpu, host)? { PASSED } else { FAILED }),
        Action::Static { target, machine } => static_programs(workspace, target, *machine),
    }
}

/// How cargo is called.
fn way(command: &Command) -> Way {
    match command.toolchain {
        Toolchain::Pinned => riscv::PINNED,
        Toolchain::Riscv => riscv::way(),
    }
}

fn prepare(workspace: &Workspace, command: &Command) -> std::process::Command {
    let way = way(command);
    let mut process = way.program.map_or_else(cargo, std::process::Command::new);
    process.envs(way.environment.iter().copied()).args(way.arguments);
    process.args(&command.arguments).current_dir(&workspace.root);
    for (name, value) in &command.environment {
        process.env(name, value);
    }
    process
}

/// Where the output of a command goes.
enum Output<'a> {
    /// To this program's own, line by line.
    Shown,
    /// Into this, with what the command writes to its standard error.
    Kept(&'a mut Vec<String>),
}

impl Output<'_> {
    fn line(&mut self, line: String) {
        match self {
            Self::Shown => say!("{line}"),
            Self::Kept(lines) => lines.push(line),
        }
    }
}

/// Runs tests and counts them by the line that each test program ends with.
fn tests(workspace: &Workspace, command: &Command, mut output: Output<'_>) -> Result<Count> {
    let (reader, writer) = std::io::pipe()?;
    let mut process = prepare(workspace, command);
    if let Output::Kept(_) = output {
        process.stderr(writer.try_clone()?);
    }
    let mut child = process.stdout(writer).spawn().context("starting cargo")?;
    // It holds the writing end, and the reading one ends when nobody does.
    drop(process);
    let mut count = Count::default();
    for line in BufReader::new(reader).split(b'\n') {
        let line = String::from_utf8_lossy(&line?).into_owned();
        if let Some(program) = result(&line) {
            count.passed += program.passed;
            count.failed += program.failed;
        }
        output.line(line);
    }
    let success = child.wait()?.success();
    if success && count.passed == 0 {
        output.line("error: no test ran, so nothing was checked".to_owned());
    }
    // Cargo fails without a failed test where the code does not build or a test program dies.
    if count.failed == 0 && (!success || count.passed == 0) {
        count.failed = 1;
    }
    Ok(count)
}

/// Reads a line such as `test result: ok. 3 passed; 0 failed; 0 ignored; …`.
fn result(line: &str) -> Option<Count> {
    let (_, counts) = line.strip_prefix("test result: ")?.split_once(". ")?;
    let number = |word: &str| -> Option<usize> {
        counts.split("; ").find_map(|part| part.strip_suffix(word))?.trim().parse().ok()
    };
    Some(Count { passed: number(" passed")?, failed: number(" failed")? })
}

/// The two programs that people install.
pub(crate) const PROGRAMS: [&str; 2] = ["bitnet", "bitnet-pack"];
/// The same and the daemon, which are built as one static file each.
const STATIC_PROGRAMS: [&str; 3] = ["bitnet", "bitnet-pack", "bitnetd"];

/// Builds them with the settings of the tests: what is checked does not depend on these, and a release takes minutes longer. For ARM
/// the dependencies are those of the tests; where nothing else is built for the target, they are not optimized either.
fn static_build(target: &str) -> Vec<String> {
    let plain = if target == matrix::ARM_LINUX { &[][..] } else { &["--config", matrix::PLAIN_DEPENDENCIES] };
    let words = ["build", "--target", target].into_iter().chain(plain.iter().copied());
    words.chain(STATIC_PROGRAMS.iter().flat_map(|name| ["-p", name])).map(str::to_owned).collect()
}

/// Builds the static programs of a release and answers with where they lie, in the order of [`STATIC_PROGRAMS`].
pub(crate) fn released(workspace: &Workspace, target: &str) -> Result<Vec<(&'static str, String)>> {
    let words = ["build", "--release", "--target", target].into_iter();
    let arguments: Vec<String> =
        words.chain(STATIC_PROGRAMS.iter().flat_map(|name| ["-p", name])).map(str::to_owned).collect();
    build(workspace, &arguments, &STATIC_PROGRAMS)
}

/// What stands before a static program so that it runs here.
pub(crate) fn launcher(machine: elf::Machine) -> &'static [&'static str] {
    match machine {
        elf::Machine::X86_64 => &[],
        elf::Machine::Aarch64 => &["qemu-aarch64", "-cpu", STATIC_CPUS[0]],
    }
}

fn static_programs(workspace: &Workspace, target: &str, machine: elf::Machine) -> Result<Count> {
    let mut count = PASSED;
    let programs = build(workspace, &static_build(target), &STATIC_PROGRAMS)?;
    for (name, path) in &programs {
        let bytes = std::fs::read(path).with_context(|| format!("reading {path}"))?;
        match elf::check_static(&bytes, machine) {
            Ok(()) => {
                say!("{name}: static, {:.1} MB", bytes.len() as f64 / 1e6);
                count.passed += 1;
            }
            Err(error) => {
                say!("error: {name}: {error}");
                count.failed += 1;
            }
        }
    }
    let mut counted = |what: &str, done: Result<()>| match done {
        Ok(()) => count.passed += 1,
        Err(error) => {
            say!("error: {what}: {error:#}");
            count.failed += 1;
        }
    };
    if machine == elf::Machine::Aarch64 {
        for cpu in STATIC_CPUS {
            counted(cpu, tells_a_story(workspace, &programs, cpu));
        }
    }
    let [_, (_, packer), (_, daemon)] = &programs[..] else { unreachable!("there are three programs") };
    counted("bitnetd", serves(workspace, launcher(machine), packer, daemon));
    Ok(count)
}

/// The Raspberry Pi 3, 4 and 5, on which the programs for ARM are run as they are installed.
const STATIC_CPUS: [&str; 3] = ["cortex-a53", "cortex-a72", "cortex-a76"];
const PROMPT: &str = "Once upon a time";
/// How the bundled model's continuation begins.
pub(crate) const STORY: &str = "Once upon a time, there was a little girl named Lily.";

/// Packs the bundled checkpoint and lets it tell a story, with programs for ARM on a CPU of QEMU's user mode.
fn tells_a_story(workspace: &Workspace, programs: &[(&str, String)], cpu: &str) -> Result<()> {
    let [(_, bitnet), (_, packer), _] = programs else { unreachable!("there are three programs") };
    let folder = workspace.target.join("static");
    std::fs::create_dir_all(&folder)?;
    let image = folder.join("stories-ternary.bitnet").display().to_string();
    let checkpoint = workspace.root.join("models/stories-ternary").display().to_string();
    let run = |program: &str, arguments: &[&str]| -> Result<String> {
        let mut qemu = std::process::Command::new("qemu-aarch64");
        qemu.args(["-cpu", cpu, program]).args(arguments).env_clear();
        let output = qemu.output().context("starting qemu-aarch64")?;
        if !output.status.success() {
            bail!("{program}: {}", String::from_utf8_lossy(&output.stderr).trim());
        }
        Ok(String::from_utf8(output.stdout)?)
    };
    run(packer, &["pack", &checkpoint, "-o", &image])?;
    let story = run(bitnet, &["run", &image, PROMPT, "--temperature", "0", "--max-tokens", "24"])?;
    if !story.starts_with(STORY) {
        bail!("the story is `{}`, not `{STORY}`", story.trim_end());
    }
    say!("{cpu}: {}", story.trim_end());
    Ok(())
}

/// Packs the bundled checkpoint and has the daemon serve it, as a service manager would; for ARM on a CPU of QEMU's user mode.
fn serves(workspace: &Workspace, launcher: &[&str], packer: &str, daemon: &str) -> Result<()> {
    let folder = workspace.target.join("static");
    std::fs::create_dir_all(&folder)?;
    let image = folder.join("served.bitnet").display().to_string();
    pack(workspace, launcher, packer, &image)?;
    service::check(&[launcher, &[daemon]].concat(), &image)?;
    say!("bitnetd: ready, reloads, and stops as a service");
    Ok(())
}

/// What is built of the workspace for this machine with the settings of the tests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Host {
    /// `bitnet` and `bitnet-pack` alone, which is quick.
    Programs,
    /// All of it, tests too, which another step builds anyway: `bitnet` and `bitnet-pack` alone get fewer features of their
    /// dependencies, and so building them again would take minutes.
    Whole,
}

/// Builds `bitnet` and `bitnet-pack` with the settings of the tests and answers with where they lie, in this order.
pub(crate) fn host_programs(workspace: &Workspace, host: Host) -> Result<[String; 2]> {
    let arguments = match host {
        Host::Programs => ["build", "-p", "bitnet", "-p", "bitnet-pack"].as_slice(),
        Host::Whole => &["test", "--workspace", "--tests", "--no-run"],
    };
    both(workspace, arguments)
}

/// Packs the bundled checkpoint by a program that `launcher` runs.
pub(crate) fn pack(workspace: &Workspace, launcher: &[&str], packer: &str, image: &str) -> Result<()> {
    let words = [launcher, &[packer, "pack"]].concat();
    let mut pack = std::process::Command::new(words[0]);
    pack.args(&words[1..]).arg(workspace.root.join("models/stories-ternary")).args(["-o", image]);
    let packed = pack.output().with_context(|| format!("starting {}", words[0]))?;
    ensure!(packed.status.success(), "{}", String::from_utf8_lossy(&packed.stderr).trim());
    Ok(())
}

/// Builds `bitnet` and `bitnet-pack` as people do and answers with where they lie, in this order.
pub(crate) fn release_programs(workspace: &Workspace) -> Result<[String; 2]> {
    both(workspace, &["build", "--release", "-p", "bitnet", "-p", "bitnet-pack"])
}

/// Where the [`PROGRAMS`] lie that these arguments build.
fn both(workspace: &Workspace, arguments: &[&str]) -> Result<[String; 2]> {
    let arguments: Vec<String> = arguments.iter().map(|word| (*word).to_owned()).collect();
    let programs = build(workspace, &arguments, &PROGRAMS)?;
    let paths: Vec<String> = programs.into_iter().map(|(_, path)| path).collect();
    Ok(paths.try_into().expect("a program for each name"))
}

/// Builds by the given arguments and answers with the programs of these names, in their order, and where cargo says
/// that they lie: the folder depends on settings that only cargo knows.
pub(crate) fn build(
    workspace: &Workspace,
    arguments: &[String],
    names: &[&'static str],
) -> Result<Vec<(&'static str, String)>> {
    let output = cargo()
        .args(arguments)
        .args(["--message-format", "json-render-diagnostics"])
        .current_dir(&workspace.root)
        .stdin(Stdio::null())
        .stderr(Stdio::inherit())
        .output()
        .context("starting cargo")?;
    if !output.status.success() {
        bail!("cargo {} failed", arguments.join(" "));
    }
    let messages: Vec<Value> = output
        .stdout
        .split(|&byte| byte == b'\n')
        .filter(|line| !line.is_empty())
        .map(serde_json::from_slice)
        .collect::<Result<_, _>>()
        .context("reading what cargo built")?;
    let find = |name: &'static str| {
        // The tests of a program have its name too.
        let is_program = |message: &&Value| message["target"]["name"] == name && message["profile"]["test"] == false;
        let built = messages.iter().filter(is_program);
        let path = built.filter_map(|message| message["executable"].as_str()).next();
        path.map(|path| (name, path.to_owned())).with_context(|| format!("cargo built no program `{name}`"))
    };
    names.iter().copied().map(find).collect()
}

/// Licences and advisories of the dependencies. It is no step of `test`, because advisories come from the network and
/// change by the day: the same commit must not pass today and fail tomorrow.
pub(crate) fn deny() -> Result<bool> {
    let present = cargo().args(["deny", "--version"]).stdout(Stdio::null()).stderr(Stdio::null()).status()?.success();
    if !present {
        say!("cargo-deny is not installed; get it with: cargo install --locked cargo-deny");
        say!("Without network access, `cargo deny check licenses bans sources` needs no advisories.");
        return Ok(false);
    }
    std::io::stdout().flush()?;
    Ok(cargo().args(["deny", "check"]).status()?.success())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::matrix;

    #[test]
    fn counts_come_from_the_line_that_ends_a_test_program() {
        let line = "test result: FAILED. 12 passed; 3 failed; 1 ignored; 0 measured; 7 filtered out; finished in 0.02s";
        assert_eq!(result(line), Some(Count { passed: 12, failed: 3 }));
        let line = "test result: ok. 0 passed; 0 failed; 0 ignored; 0 measured; 0 filtered out; finished in 0.00s";
        assert_eq!(result(line), Some(Count::default()));
        assert_eq!(result("test result_of_something ... ok"), None);
        assert_eq!(result("running 3 tests"), None);
    }

    #[test]
    fn steps_beside_each_other_answer_in_their_order() {
        let pause = |index: usize| thread::sleep(Duration::from_millis([20, 0, 5, 0, 1][index % 5]));
        let answers = side_by_side(3..40, |index| {
            pause(index);
            2 * index
        });
        assert_eq!(answers, (3..40).map(|index| 2 * index).collect::<Vec<_>>());
        assert!(side_by_side(7..7, |index| index).is_empty());
    }

    #[test]
    fn words_are_quoted_only_where_a_shell_needs_it() {
        assert_eq!(quote("max,sve-max-vq=1"), "max,sve-max-vq=1");
        assert_eq!(quote("a b"), "'a b'");
        assert_eq!(quote("it's"), r"'it'\''s'");
        assert_eq!(quote(""), "''");
    }

    #[test]
    fn a_step_is_described_by_the_command_that_repeats_it() {
        let steps = matrix::steps();
        let find = |name: &str| describe(&steps.iter().find(|step| step.name == name).unwrap().action);
        assert_eq!(
            find("qemu/backends/sve-512"),
            "QEMU_CPU=max,sve-max-vq=4 cargo test --target aarch64-unknown-linux-musl -p bitnet-tests --test backends \
             --no-fail-fast"
        );
        assert_eq!(find("style/doc"), "RUSTDOCFLAGS=-Dwarnings cargo doc --workspace --no-deps");
    }
}
