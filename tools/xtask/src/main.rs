//! `cargo xtask`: the project's own commands, so that what CI does is code that anyone can run.
//!
//! In the order in which they are used: [`workspace`] finds the tree, [`matrix`] is the table of everything that is
//! checked, [`setup`] installs what the chosen steps need, [`riscv`] is one of these needs, [`run`] runs them and counts, [`bochs`] boots what needs a CPU that the machine may lack, [`boot`] the boards' images, [`tidy`] holds the rules about
//! the tree itself, [`elf`] looks into finished programs, [`mod@bench`] and [`arm`] say how fast the kernels are with what
//! [`report`] has for both, [`fuzz`] searches for input that fails, [`evaluate`] compares images of one model, [`layouts`] those of one pruned one, [`stream`] runs a model in less memory than it has, [`service`] starts and stops the daemon as systemd does, [`clients`] puts it under clients of others, [`page`] under a browser, [`proxy`] behind proxies, [`manifests`] reads what clusters are told of it, [`deb`] makes packages of it, and [`demo`] shows the project to a newcomer.
#![forbid(unsafe_code)]
#![allow(clippy::std_instead_of_core, clippy::std_instead_of_alloc, reason = "a host tool; it always has std")]

/// `println!`, but for a reader that went away (`cargo xtask list | head`), which is no reason to panic.
macro_rules! say {
    ($($arguments:tt)*) => {{
        use std::io::Write as _;
        let _ = writeln!(std::io::stdout(), $($arguments)*);
    }};
}

mod arm;
mod bench;
mod bochs;
mod boot;
mod clients;
mod deb;
mod demo;
mod elf;
mod evaluate;
mod fuzz;
mod layouts;
mod load;
mod manifests;
mod matrix;
mod page;
mod proxy;
mod report;
mod riscv;
mod run;
mod service;
mod setup;
mod stream;
mod tidy;
mod timeline;
mod workspace;

use std::process::ExitCode;

use anyhow::{Result, bail};

use crate::workspace::Workspace;

const USAGE: &str = "\
Usage: cargo xtask COMMAND

  test [STEP...]  set up what is needed, then run every check, or those named (a name or the start of one)
  list            print the steps of `test`, with the command behind each
  setup           install what the steps of `test` need: rustup targets and Debian packages
  tidy            check the rules about the tree: arrows, unsafe, dead files, words, README
  bench [OPTION]  how fast the kernels of this machine are, in cache and from memory, beside a loop that only reads:
                  --backend, --op, --format, --shape ROWSxCOLS, --threads N choose, each as often as you like;
                  --json FILE writes rows, --plot FILE a drawing (SVG), --page FILE the table into docs/benchmarks.md
  arm [OPTION]    estimates for ARM kernels, without ARM hardware: cycles by llvm-mca, instructions by QEMU:
                  --backend, --op, --format, --cpu choose; --json FILE and --page FILE write
  fuzz TARGET [SECONDS]
                  search for input that makes a reader fail: gguf, safetensors, llama2c, tokenizer, image, plan, widths, text
  boot BOARD      (qemu-virt or rpi5) build a board's image and boot it in QEMU, on every CPU or on that of --cpu MODEL, on --cores N cores, with the
                  model in flash or on a disk, or one of five times the RAM on a disk
                  (--medium flash|disk|large|stateful), and compare what it says with what `bitnet` says;
                  --strict-align makes every unaligned access a fault and runs the whole self-test;
                  --interactive gives you the console in place of the comparison (an empty line ends it)
  stream-proof    an image of 574 MiB with 128 MiB of RAM in a control group of 160 MiB, which root may make: the same logits,
                  within both, and as fast as nine tenths of the disk; beside it the same image mapped (a minute or two);
                  draws when readers read and the computation computed (target/stream-proof/timeline.svg)
  clients         OpenAI's clients and schemathesis against the daemon (installs them with pip and npm below target/clients)
  page            the daemon's chat page in headless Chromium: by keyboard, in light and dark, with axe-core's rules for
                  accessibility; pictures go to target/page (installs its driver with npm there)
  proxy           two daemons behind HAProxy and behind nginx, by the files that the daemon comes with: every turn of a conversation is
                  found in the memory of one of them, also when the other is gone (installs Debian's packages, a few seconds)
  soak            a thousand requests of eight clients to the daemon, a third cut off; it is killed in the end and starts again
  load            what the daemon gives one client and four at once, of a model in the shape of BitNet b1.58 2B4T, and how long eight wait
                  for a first token; fails below 2.5 times as many tokens/s (a minute or two, and nothing else may run)
  layouts [ZEROS...]
                  whether `bitnet tune` chooses the fastest layout of a pruned model: models in the shape of BitNet b1.58 2B4T without 65 % of
                  every linear (by rows, columns, both, 16x64 or 16x16; all five if none is named) decode in every layout and as
                  tuned, by turns; fails where the choice takes 3 % longer than the best (two minutes each, and nothing else may run)
  evaluate IDS IMAGE...
                  what each image costs and how well it predicts the token ids in IDS (u16): loss, bits, and RAM, bytes read and
                  time a token after 1 k, 32 k and 1 M tokens; the tables of docs/beyond-bitnet.md
  deb [--arch A]  Debian packages of the daemon for amd64 and arm64, or one of them, in target/debian (installs cargo-deb there)
  deb-proof [--arch A]
                  the same, each then looked at by lintian, installed in a Debian 12 (debootstrap), started as its unit says,
                  asked, removed and purged, which root may do; arm64 under QEMU's user mode
  demo            build, pack the bundled checkpoints and let each tell a story (the same as `cargo demo`)
  deny            licences and advisories of the dependencies, by cargo-deny";

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    match command(&arguments) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("xtask: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Runs one command; the answer is whether what it checked was right.
fn command(arguments: &[String]) -> Result<bool> {
    let (name, rest) = arguments.split_first().map_or(("help", &[][..]), |(name, rest)| (name.as_str(), rest));
    if !["test", "bench", "arm", "boot", "fuzz", "evaluate", "layouts", "deb", "deb-proof"].contains(&name)
        && !rest.is_empty()
    {
        bail!("`{name}` takes no arguments, but got `{}`\n\n{USAGE}", rest.join(" "));
    }
    match name {
        "test" => {
            let steps = matrix::select(matrix::steps(), rest)?;
            let workspace = Workspace::load()?;
            setup::ensure(steps.iter().flat_map(|step| &step.needs))?;
            run::all(&workspace, &steps)
        }
        "list" => {
            run::list(&matrix::steps());
            Ok(true)
        }
        "setup" => {
            setup::ensure(matrix::steps().iter().flat_map(|step| &step.needs))?;
            say!("everything that `cargo xtask test` needs is installed");
            Ok(true)
        }
        "tidy" => {
            let (passed, failed) = tidy::report(&Workspace::load()?)?;
            say!("{passed} passed, {failed} failed");
            Ok(failed == 0)
        }
        "bench" => bench::run(&Workspace::load()?, rest),
        "arm" => arm::run(&Workspace::load()?, rest),
        "fuzz" => fuzz::run(&Workspace::load()?, rest),
        "boot" => boot::run(&Workspace::load()?, rest),
        "stream-proof" => stream::run(&Workspace::load()?),
        "clients" => clients::run(&Workspace::load()?),
        "page" => page::run(&Workspace::load()?),
        "proxy" => proxy::run(&Workspace::load()?),
        "soak" => clients::soak(&Workspace::load()?),
        "layouts" => layouts::run(&Workspace::load()?, rest),
        "load" => load::run(&Workspace::load()?),
        "evaluate" => evaluate::run(&Workspace::load()?, rest),
        "deb" => deb::run(&Workspace::load()?, rest),
        "deb-proof" => deb::prove(&Workspace::load()?, rest),
        "demo" => demo::run(&Workspace::load()?),
        "deny" => run::deny(),
        "help" | "--help" | "-h" => {
            say!("{USAGE}");
            Ok(true)
        }
        other => bail!("there is no command `{other}`\n\n{USAGE}"),
    }
}
