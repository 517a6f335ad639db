//! `llvm-objdump` and `llvm-mca`: the text of instructions, and how many cycles a CPU's model takes for them.

use std::collections::HashMap;
use std::io::Write as _;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

/// The release whose models the figures are of; another's would not compare.
pub(crate) const OBJDUMP: &str = "llvm-objdump-22";
/// See [`OBJDUMP`].
pub(crate) const MCA: &str = "llvm-mca-22";

/// Instructions simulated for one figure: so many that what comes before the steady state does not matter.
const INSTRUCTIONS: usize = 20_000;

/// The instructions of a program by address, as an assembler reads them anywhere.
pub(crate) fn disassemble(program: &str) -> Result<HashMap<u64, String>> {
    let mut command = Command::new(OBJDUMP);
    let output = command
        .args(["--disassemble", "--no-show-raw-insn", "--mattr=+all", program])
        .output()
        .with_context(|| format!("starting {OBJDUMP}"))?;
    if !output.status.success() {
        bail!("{OBJDUMP} failed: {}", String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(String::from_utf8_lossy(&output.stdout).lines().filter_map(instruction).collect())
}

/// Reads a line such as `  21234: b.ne 0x21200 <f+0x10>`.
fn instruction(line: &str) -> Option<(u64, String)> {
    let (address, text) = line.split_once(':')?;
    let address = u64::from_str_radix(address.trim(), 16).ok()?;
    let text = text.split("//").next()?.trim().replace('\t', " ");
    (!text.is_empty()).then(|| (address, relative(address, &text)))
}

/// The same instruction with a distance in place of an absolute address, which objdump writes before the name of its place.
fn relative(address: u64, text: &str) -> String {
    let Some((text, _)) = text.split_once('<') else { return text.to_owned() };
    let text = text.trim_end();
    let Some((start, target)) = text.rsplit_once("0x") else { return text.to_owned() };
    let start = start.trim_end_matches('#');
    match u64::from_str_radix(target, 16) {
        // A page is a distance in pages; none would say more to a model that knows no memory.
        _ if text.starts_with("adrp") => format!("{start}#0"),
        Ok(target) => format!("{start}#{}", target.wrapping_sub(address).cast_signed()),
        Err(_) => text.to_owned(),
    }
}

/// The cycles that one iteration of `body` takes on `cpu` when it follows itself, by the static model.
pub(crate) fn cycles(cpu: &str, body: &[&str]) -> Result<f64> {
    let iterations = (INSTRUCTIONS / body.len().max(1)).clamp(10, 1000);
    let mut child = Command::new(MCA)
        .args(["--mtriple=aarch64", &format!("--mcpu={cpu}"), &format!("--iterations={iterations}")])
        .args(["--instruction-info=false", "--resource-pressure=false"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .with_context(|| format!("starting {MCA}"))?;
    // It reads all before it writes anything, so that neither waits for the other.
    child.stdin.take().context("the input of llvm-mca")?.write_all(format!("{}\n", body.join("\n")).as_bytes())?;
    let output = child.wait_with_output()?;
    let (text, errors) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    if !output.status.success() || errors.contains("error:") {
        bail!("{MCA} --mcpu={cpu} failed: {}", errors.trim());
    }
    total_cycles(&text).map(|total| total / iterations as f64)
}

/// Reads the summary that begins each report.
fn total_cycles(report: &str) -> Result<f64> {
    let line = report.lines().find_map(|line| line.strip_prefix("Total Cycles:"));
    let total = line.and_then(|number| number.trim().parse::<u64>().ok());
    total
        .filter(|&total| total > 0)
        .map(|total| total as f64)
        .context("the report of llvm-mca names no total of cycles")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_total_is_read_from_a_report() {
        let report = "Iterations:        200\nInstructions:      1200\nTotal Cycles:      412\nTotal uOps:        1600\n\n\
                      Dispatch Width:    3\nuOps Per Cycle:    3.88\nIPC:               2.91\nBlock RThroughput: 2.0\n";
        assert_eq!(total_cycles(report).unwrap(), 412.0);
        for broken in
            ["", "Total Cycles:      \n", "Total Cycles:      many\n", "Total Cycles: 0\n", "error: no code\n"]
        {
            assert!(total_cycles(broken).is_err(), "{broken}");
        }
    }

    #[test]
    fn instructions_are_read_with_their_addresses() {
        let read = |line| instruction(line).map(|(address, text)| format!("{address:x} {text}"));
        assert_eq!(read("  223848:      \tsub\tsp, sp, #0x10"), Some("223848 sub sp, sp, #0x10".to_owned()));
        assert_eq!(read("  223850: \tldr q0, [x1, #0x20] // comment"), Some("223850 ldr q0, [x1, #0x20]".to_owned()));
        assert_eq!(read("0000000000223848 <f>:"), None);
        assert_eq!(read("Disassembly of section .text:"), None);
        assert_eq!(read(""), None);
    }

    #[test]
    fn targets_become_distances() {
        assert_eq!(relative(0x2000, "b.ne 0x1ff0 <f+0x10>"), "b.ne #-16");
        assert_eq!(relative(0x2000, "cbz x1, 0x2010 <f+0x30>"), "cbz x1, #16");
        assert_eq!(relative(0x2000, "tbnz w3, #0x2, 0x2008 <f>"), "tbnz w3, #0x2, #8");
        assert_eq!(relative(0x2000, "adrp x8, 0x201000 <g+0x20>"), "adrp x8, #0");
        assert_eq!(relative(0x2000, "add x0, x0, #0x40"), "add x0, x0, #0x40");
    }
}
