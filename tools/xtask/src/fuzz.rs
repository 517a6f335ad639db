//! Fuzzing: libFuzzer drives the readers of `bitnet_tests::fuzz`, with the pinned toolchain and a C++ compiler.
//!
//! cargo-fuzz is not needed: what it adds to a build are these flags, and its address sanitizer, for which there is no stable
//! toolchain. Code without `unsafe` has no use for that.

use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::workspace::{Workspace, cargo};

const TARGETS: [&str; 8] = ["gguf", "safetensors", "llama2c", "tokenizer", "image", "plan", "widths", "text"];

/// What makes LLVM report which edges ran and what was compared, to whoever listens.
const FLAGS: &str = "--cfg fuzzing -Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4 \
     -Cllvm-args=-sanitizer-coverage-inline-8bit-counters -Cllvm-args=-sanitizer-coverage-pc-table \
     -Cllvm-args=-sanitizer-coverage-trace-compares";

/// An explicit target keeps the flags from build scripts and derive macros.
const HOST: &str = if cfg!(target_arch = "aarch64") { "aarch64-unknown-linux-gnu" } else { "x86_64-unknown-linux-gnu" };

/// `fuzz TARGET [SECONDS]`: runs one target; what it keeps lies in the target directory, beside what made it fail.
pub(crate) fn run(workspace: &Workspace, arguments: &[String]) -> Result<bool> {
    let (target, seconds) = match arguments {
        [target] => (target.as_str(), 600),
        [target, seconds] => (target.as_str(), seconds.parse().context("SECONDS is a number")?),
        _ => bail!("fuzz takes a target ({}) and a number of seconds, 600 if there is none", TARGETS.join(", ")),
    };
    let seconds: u32 = seconds;
    if !TARGETS.contains(&target) {
        bail!("there is no target `{target}`; there are {}", TARGETS.join(", "));
    }
    let folder = workspace.root.join("tests/fuzz");
    let output = workspace.target.join("fuzz");
    let built = cargo()
        .args(["build", "--release", "--locked", "--target", HOST])
        .current_dir(&folder)
        .env("CARGO_TARGET_DIR", &output)
        .env("RUSTFLAGS", FLAGS)
        .status()?;
    if !built.success() {
        bail!("the fuzzers were not built; if no error above says why: libFuzzer needs a C++ compiler (Debian: g++)");
    }
    let found = output.join("found").join(target);
    let kept = found.join("corpus");
    std::fs::create_dir_all(&kept).with_context(|| format!("creating {}", kept.display()))?;
    say!("inputs that reach something new: {}; failures: {}", kept.display(), found.display());
    let status = Command::new(output.join(HOST).join("release/bitnet-fuzz"))
        .env("BITNET_FUZZ_TARGET", target)
        .arg(&kept)
        .arg(folder.join("corpus").join(target))
        .arg(format!("-artifact_prefix={}/", found.display()))
        .arg(format!("-max_total_time={seconds}"))
        // No input that is this short may take longer, or a lot of memory.
        .args(["-max_len=16384", "-timeout=10", "-rss_limit_mb=1024", "-malloc_limit_mb=256", "-print_final_stats=1"])
        .status()?;
    Ok(status.success())
}
