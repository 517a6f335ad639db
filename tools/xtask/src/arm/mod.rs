//! `cargo xtask arm`: how fast the ARM kernels should be, without ARM hardware.
//!
//! Two estimates of every kernel, from the program as it is released:
//!
//! - Instructions for one weight, executed under QEMU in one product of 64 by 3072 weights: calls, sums across lanes and
//!   all else included.
//! - Cycles for 256 weights by a static model of the CPU (`llvm-mca`) for the loops that these instructions form. No
//!   number of weights an iteration is written down anywhere: the trace says how often a loop went round in that product.
//!
//! The model knows no caches and takes every core for its ideal; no estimate here was compared with a real core.

mod mca;
mod trace;

use std::collections::HashMap;
use std::io::BufReader;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

use crate::matrix::Need;
use crate::report::{Options, kernels, table};
use crate::setup;
use crate::workspace::Workspace;

pub(crate) use mca::{MCA, OBJDUMP};

/// What is built, and where its programs run.
const TARGET: &str = "aarch64-unknown-linux-musl";

/// The names of the two functions around the product, in `tests/benches/kernels/once.rs`.
const MARKS: (&str, &str) = ("mark_begin", "mark_end");

/// A CPU by the names that the model and the emulator have for it.
#[derive(Debug)]
struct Cpu {
    model: &'static str,
    qemu: &'static str,
}

const CPUS: [Cpu; 4] = [
    // Graviton2, and the Cortex-A76 of a Raspberry Pi 5, whose own name stands for the much older A57's model.
    Cpu { model: "neoverse-n1", qemu: "neoverse-n1" },
    // Graviton3: SVE of 256 bits.
    Cpu { model: "neoverse-v1", qemu: "neoverse-v1" },
    Cpu { model: "neoverse-n2", qemu: "neoverse-n2" },
    // Graviton4. QEMU has none; the N2 has the same instructions and the same length of vector.
    Cpu { model: "neoverse-v2", qemu: "neoverse-n2" },
];

const CHOICE: [&str; 4] = ["--backend", "--op", "--format", "--cpu"];

/// One product on one CPU of the emulator.
#[derive(Debug)]
struct Run {
    steps: Vec<trace::Step>,
    /// Multiplications of a weight.
    weights: f64,
}

/// Which kernel: backend, operation, format.
type Kernel = [String; 3];

/// An estimate of one kernel on one CPU.
#[derive(Debug)]
struct Estimate {
    cycles: f64,
    instructions: f64,
    /// The part of the instructions that is in the loops.
    share: f64,
}

/// A kernel with its estimates, one a CPU that was chosen; none where the CPU does not run it.
type Row = (Kernel, Vec<Option<Estimate>>);

/// Runs the command.
pub(crate) fn run(workspace: &Workspace, arguments: &[String]) -> Result<bool> {
    let options = Options::read(arguments, &CHOICE, &["--json", "--page"])?;
    let cpus: Vec<&Cpu> = CPUS.iter().filter(|cpu| options.chosen("--cpu", cpu.model)).collect();
    if cpus.is_empty() {
        bail!("the CPUs are {}", CPUS.each_ref().map(|cpu| cpu.model).join(", "));
    }
    setup::ensure(&[Need::Target(TARGET), Need::Qemu, Need::Llvm])?;
    let program = kernels(workspace, Some(TARGET))?;
    let texts = mca::disassemble(&program)?;
    let mut runs: HashMap<(&str, Kernel), Run> = HashMap::new();
    let mut estimates: Vec<Row> = Vec::new();
    for (column, cpu) in cpus.iter().enumerate() {
        for kernel in list(&program, cpu, &options)? {
            let run = match runs.entry((cpu.qemu, kernel.clone())) {
                std::collections::hash_map::Entry::Occupied(known) => known.into_mut(),
                std::collections::hash_map::Entry::Vacant(new) => new.insert(traced(&program, cpu, &kernel)?),
            };
            let estimate =
                estimate(run, cpu, &texts).with_context(|| format!("{} on {}", kernel.join(" "), cpu.model))?;
            let row = match estimates.iter().position(|(known, _)| *known == kernel) {
                Some(row) => row,
                None => {
                    estimates.push((kernel, cpus.iter().map(|_| None).collect()));
                    estimates.len() - 1
                }
            };
            estimates[row].1[column] = Some(estimate);
        }
    }
    finish(workspace, &options, &cpus, &estimates)
}

/// The kernels of this CPU that were chosen. The portable backend, which no one runs for speed, has to be named.
fn list(program: &str, cpu: &Cpu, options: &Options) -> Result<Vec<Kernel>> {
    let output = emulator(cpu).args([program, "list"]).output().context("starting qemu-aarch64")?;
    if !output.status.success() {
        bail!("the program failed on {}: {}", cpu.qemu, String::from_utf8_lossy(&output.stderr).trim());
    }
    let named = options.choice.iter().any(|(_, value)| value == "portable");
    let mut kernels = Vec::new();
    for line in String::from_utf8_lossy(&output.stdout).lines() {
        let row: Value = serde_json::from_str(line).context("reading the list of kernels")?;
        let kernel = ["backend", "op", "format"].map(|key| row[key].as_str().unwrap_or_default().to_owned());
        let chosen = CHOICE.iter().zip(&kernel).all(|(name, value)| options.chosen(name, value));
        if chosen && (named || kernel[0] != "portable") {
            kernels.push(kernel);
        }
    }
    Ok(kernels)
}

fn emulator(cpu: &Cpu) -> Command {
    let mut command = Command::new("qemu-aarch64");
    command.args(["-cpu", cpu.qemu]).stdin(Stdio::null());
    command
}

/// Runs one product and reads every instruction from the log, which goes to the standard error.
fn traced(program: &str, cpu: &Cpu, kernel: &Kernel) -> Result<Run> {
    let mut child = emulator(cpu)
        .args(["-one-insn-per-tb", "-d", "exec,nochain", program, "once"])
        .args(kernel)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .context("starting qemu-aarch64")?;
    let mut log = BufReader::new(child.stderr.take().context("the log of qemu-aarch64")?);
    let steps = trace::read(&mut log, MARKS.0, MARKS.1);
    // To its end, or the program would wait for a reader.
    std::io::copy(&mut log, &mut std::io::sink())?;
    let output = child.wait_with_output()?;
    if !output.status.success() {
        bail!("{} failed on {}", kernel.join(" "), cpu.qemu);
    }
    let about: Value = serde_json::from_slice(&output.stdout).context("reading what was multiplied")?;
    let weights = about["products"].as_f64().context("the program says no number of products")?;
    Ok(Run { steps: steps?, weights })
}

/// Adds up the cycles of the loops.
fn estimate(run: &Run, cpu: &Cpu, texts: &HashMap<u64, String>) -> Result<Estimate> {
    let loops = trace::loops(&run.steps);
    let mut cycles = 0.0;
    for one in &loops {
        let addresses = trace::iteration(&run.steps, one);
        let body: Option<Vec<&str>> = addresses.iter().map(|address| texts.get(address).map(String::as_str)).collect();
        let body = body.with_context(|| format!("{OBJDUMP} shows no instruction at one of {addresses:x?}"))?;
        cycles += mca::cycles(cpu.model, &body)? * one.iterations as f64;
    }
    let executed: u64 = loops.iter().map(|one| one.executed).sum();
    Ok(Estimate {
        cycles: cycles * 256.0 / run.weights,
        instructions: run.steps.len() as f64 / run.weights,
        share: executed as f64 / run.steps.len() as f64,
    })
}

/// Prints the table and writes what was asked for.
fn finish(workspace: &Workspace, options: &Options, cpus: &[&Cpu], estimates: &[Row]) -> Result<bool> {
    if estimates.is_empty() {
        bail!("no kernel was chosen; `--cpu {}` may not have it", cpus[0].model);
    }
    let mut rows = Vec::new();
    let mut json_rows = Vec::new();
    for (kernel, of_cpus) in estimates {
        let mut row = kernel.to_vec();
        let figure = |f: fn(&Estimate) -> f64, digits: usize| {
            of_cpus.iter().map(move |one| one.as_ref().map_or("-".to_owned(), |one| format!("{:.digits$}", f(one))))
        };
        row.extend(figure(|one| one.cycles, 1));
        row.extend(figure(|one| one.instructions, 3));
        let least = of_cpus.iter().flatten().map(|one| one.share).fold(1.0, f64::min);
        row.push(format!("{:.0} %", 100.0 * least));
        rows.push(row);
        for (cpu, one) in cpus.iter().zip(of_cpus) {
            if let Some(one) = one {
                json_rows.push(json!({
                    "backend": kernel[0], "op": kernel[1], "format": kernel[2], "cpu": cpu.model,
                    "cycles_per_256": one.cycles, "instructions_per_weight": one.instructions,
                    "loop_share": one.share,
                }));
            }
        }
    }
    let short = |cpu: &&Cpu| cpu.model.trim_start_matches("neoverse-").to_owned();
    let cycles = cpus.iter().map(|cpu| format!("{} cycles", short(cpu)));
    let instructions = cpus.iter().map(|cpu| format!("{} instr", short(cpu)));
    let names = ["backend", "op", "format"].map(str::to_owned).into_iter();
    let head: Vec<String> = names.chain(cycles).chain(instructions).chain(["in loops".to_owned()]).collect();
    let table = table(&head.iter().map(String::as_str).collect::<Vec<_>>(), &rows);
    let note = format!(
        "Estimates, not measurements. Cycles for 256 weights (of matmat: 256 products) by {MCA}'s models; instructions for \
         one weight, executed under QEMU; the part of them in the loops that the cycles are of. Commit {}.",
        crate::report::commit(workspace)
    );
    say!("{note}\n\n{table}");
    options.write_rows(workspace, &json_rows)?;
    options.write_page("arm", &format!("{note}\n\n{table}"))?;
    Ok(true)
}
