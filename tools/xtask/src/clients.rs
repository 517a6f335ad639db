//! The daemon under clients of others, and for long: `cargo xtask clients` and `cargo xtask soak`.

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use anyhow::{Context, Result, ensure};

use crate::run;
use crate::workspace::{Workspace, cargo};

const PYTHON: [&str; 2] = ["openai==3.57.0", "schemathesis==4.32.5"];
const JAVASCRIPT: &str = "openai@6.49.0";
const SUITE: &str = "boards/bitnetd/tests/clients";
const CHECKPOINT: &str = "models/stories-ternary";

/// Requests of a soak.
const SOAK_REQUESTS: &str = "1000";

/// A daemon that ends with this.
pub(crate) struct Daemon {
    child: Child,
    pub(crate) url: String,
}

/// The model that a daemon serves.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Checkpoint {
    /// The bundled one with a chat template.
    Bundled,
    /// That with states of fixed size, whose conversations have no end.
    Stateful,
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Installs the clients below the target folder, and runs each against a daemon with the bundled model and a chat template.
pub(crate) fn run(workspace: &Workspace) -> Result<bool> {
    let folder = workspace.target.join("clients");
    std::fs::create_dir_all(&folder).with_context(|| format!("making {}", folder.display()))?;
    let (python, packages) = (folder.join("venv/bin"), folder.join("npm"));
    if !python.exists() {
        succeed(Command::new("python3").args(["-m", "venv"]).arg(folder.join("venv")))?;
    }
    succeed(Command::new(python.join("python")).args(["-m", "pip", "install", "--quiet"]).args(PYTHON))?;
    succeed(Command::new("npm").args(["install", "--silent", "--prefix"]).arg(&packages).arg(JAVASCRIPT))?;
    let daemon = start(workspace, &folder, Checkpoint::Bundled)?;
    let suite = workspace.root.join(SUITE);
    let mut fuzzer = Command::new(python.join("schemathesis"));
    fuzzer.args(["run", "--checks", "not_a_server_error,status_code_conformance,content_type_conformance"]);
    fuzzer.args(["--exclude-path", "/v1/embeddings", "--max-examples", "40", "--request-timeout", "60"]);
    let suites = [
        Command::new(python.join("python")).arg(suite.join("openai.py")).arg(&daemon.url).status(),
        Command::new("node").arg(suite.join("openai.mjs")).arg(&packages).arg(&daemon.url).status(),
        fuzzer.arg(format!("{}/openapi.json", daemon.url)).status(),
    ];
    let mut passed = true;
    for suite in suites {
        passed &= suite.context("starting a client")?.success();
    }
    Ok(passed)
}

/// Many clients for a while, of whom many leave, against a daemon of its own process, which is killed in the end and starts again.
pub(crate) fn soak(workspace: &Workspace) -> Result<bool> {
    let programs = run::build(workspace, &["build", "--release", "-p", "bitnetd"].map(str::to_owned), &["bitnetd"])?;
    let mut test = cargo();
    test.current_dir(&workspace.root);
    test.args(["test", "--release", "-p", "bitnet-tests", "--test", "daemon", "soak", "--", "--nocapture"]);
    test.env("BITNETD_PROGRAM", &programs[0].1).env("BITNETD_SOAK_REQUESTS", SOAK_REQUESTS);
    Ok(test.status().context("starting cargo")?.success())
}

pub(crate) fn succeed(command: &mut Command) -> Result<()> {
    let status = command.status().with_context(|| format!("starting {command:?}"))?;
    ensure!(status.success(), "{command:?} failed");
    Ok(())
}

/// Packs a model below `folder` and serves it.
pub(crate) fn start(workspace: &Workspace, folder: &Path, model: Checkpoint) -> Result<Daemon> {
    let (program, image) = pack(workspace, folder, model)?;
    let daemon = serve(&program, &image, &[])?;
    let ready =
        ["--silent", "--fail", "--retry", "100", "--retry-connrefused", "--retry-delay", "1", "-o", "/dev/null"];
    succeed(Command::new("curl").args(ready).arg(format!("{}/health", daemon.url)))?;
    Ok(daemon)
}

/// Packs a model below `folder`: where the daemon's program and the image are.
pub(crate) fn pack(workspace: &Workspace, folder: &Path, model: Checkpoint) -> Result<(String, PathBuf)> {
    let arguments = ["build", "--release", "-p", "bitnetd", "-p", "bitnet-pack"].map(str::to_owned);
    let programs = run::build(workspace, &arguments, &["bitnetd", "bitnet-pack"])?;
    let [(_, program), (_, packer)] = &programs[..] else { unreachable!("there are two programs") };
    let mut checkpoint = folder.join("checkpoint");
    std::fs::create_dir_all(&checkpoint)?;
    let files = ["config.json", "model.safetensors", "tokenizer.json"].map(|name| (CHECKPOINT, name));
    for (from, name) in files.into_iter().chain([(SUITE, "tokenizer_config.json")]) {
        std::fs::copy(workspace.root.join(from).join(name), checkpoint.join(name)).with_context(|| name.to_owned())?;
    }
    if model == Checkpoint::Stateful {
        let stateful = folder.join("stateful");
        // It is made anew, and writes over nothing.
        let _ = std::fs::remove_dir_all(&stateful);
        succeed(Command::new(packer).arg("convert").arg(&checkpoint).args(["--to-stateful", "-o"]).arg(&stateful))?;
        checkpoint = stateful;
    }
    let image = folder.join("stories.bitnet");
    succeed(Command::new(packer).arg("pack").arg(&checkpoint).arg("-o").arg(&image))?;
    Ok((program.clone(), image))
}

/// Serves an image at an address of the daemon's choice. The model may still be loading.
pub(crate) fn serve(program: &str, image: &Path, options: &[&str]) -> Result<Daemon> {
    let mut command = Command::new(program);
    command.arg("--model").arg(image).args(["--listen", "127.0.0.1:0"]).args(options).stderr(Stdio::piped());
    let mut child = command.spawn().context("starting the daemon")?;
    let mut lines = BufReader::new(child.stderr.take().context("the daemon's log")?).lines();
    let mut daemon = Daemon { child, url: String::new() };
    let line = lines.next().context("the daemon says nothing")??;
    let (_, url) = line.split_once(" at ").with_context(|| format!("the daemon says `{line}`"))?;
    url.clone_into(&mut daemon.url);
    // What else it says goes on; clients wait until it is ready.
    std::thread::spawn(move || lines.for_each(|line| eprintln!("{}", line.unwrap_or_default())));
    Ok(daemon)
}
