//! `bitnet`: the command a person types to run a packed model.
//!
//! In the order of use: `bitnet_host::open` turns arguments into a model in memory, then each subcommand is a file.
mod bench;
mod chat;
mod logits;
mod output;
mod perplexity;
mod run;
mod sampling;
mod selftest;
mod tune;

use clap::{Parser, Subcommand};
use std::process::ExitCode;

/// Runs 1-bit and ternary language models from packed images.
///
/// An image is made by `bitnet-pack pack CHECKPOINT -o IMAGE`. The same image gives the same text on every machine.
#[derive(Debug, Parser)]
#[command(version = VERSION, after_help = EXAMPLES)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

/// The version and what it was built for.
const VERSION: &str = concat!(env!("CARGO_PKG_VERSION"), " (", env!("BITNET_TARGET"), ")");

const EXAMPLES: &str = "\
Examples:
  bitnet run model.bitnet \"Once upon a time\"
  bitnet run model.bitnet \"Once upon a time\" --temperature 0 --max-tokens 24
  bitnet chat model.bitnet
  bitnet bench model.bitnet --threads 2 --json
  bitnet tune model.bitnet -o tuned.bitnet
  bitnet selftest

Exit codes: 0 done, 1 something failed (the reason is on standard error), 2 wrong usage.";

#[derive(Debug, Subcommand)]
enum Command {
    /// Continue a prompt.
    Run(run::Args),
    /// Talk with a model that has a chat template.
    Chat(chat::Args),
    /// Measure prefill and decode, beside the memory bandwidth.
    Bench(bench::Args),
    /// Measure how well a model predicts a text.
    Perplexity(perplexity::Args),
    /// Write the logits of every position, for comparing with other implementations.
    Logits(logits::Args),
    /// Choose the layouts of linears with zeros by timing them on this machine, and write the image so.
    Tune(tune::Args),
    /// Compare every kernel that this CPU runs with the portable ones.
    Selftest(selftest::Args),
}

fn main() -> ExitCode {
    let result = match Cli::parse().command {
        Command::Run(args) => run::run(&args),
        Command::Chat(args) => chat::run(&args),
        Command::Bench(args) => bench::run(&args),
        Command::Perplexity(args) => perplexity::run(&args),
        Command::Logits(args) => logits::run(&args),
        Command::Tune(args) => tune::run(&args),
        Command::Selftest(args) => selftest::run(&args),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        // Whoever read our output has seen enough.
        Err(e) if output::is_closed_pipe(&e) => ExitCode::SUCCESS,
        Err(e) => {
            output::note(&format!("error: {e:#}\n"));
            ExitCode::FAILURE
        }
    }
}
