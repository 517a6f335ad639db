//! `cargo xtask load`: what the daemon gives one client and four at once, and how long each of eight waits for a first token.
//!
//! The model is of random weights in the shape of BitNet b1.58 2B4T: too large for caches, so that a pass is a pass over memory. Times
//! are of whole requests with prompts of one token, alone and together by turns. The middle one of the gains counts, for the speed of
//! memory that others use too changes from second to second; the daemon's own log has when replies began.

use std::fs;
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{self, Receiver};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};

use crate::run;
use crate::workspace::Workspace;

const PRESET: &str = "2b4t";
/// A vocabulary of 512 tokens: what else the model says is no text, and takes as long.
const TOKENIZER: &str = "models/stories-ternary/tokenizer.json";
const SESSIONS: usize = 4;
const CONTEXT: &str = "512";
/// Tokens of a reply.
const REPLY: usize = 96;
const REPETITIONS: usize = 7;
/// Clients that ask at once for their first token, of whom half have to wait for a conversation, and how often each asks.
const CLIENTS: usize = 8;
const ROUNDS: usize = 3;
/// Tokens of their prompts, and of their replies.
const PROMPT: usize = 64;
const SHORT: usize = 16;
/// What four together have to give, as a multiple of what one gets.
const GAIN_LEAST: f64 = 2.5;

struct Daemon {
    child: Child,
    address: SocketAddr,
    log: Receiver<Value>,
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

pub(crate) fn run(workspace: &Workspace) -> Result<bool> {
    let arguments = ["build", "--release", "-p", "bitnetd", "-p", "bitnet-pack"].map(str::to_owned);
    let programs = run::build(workspace, &arguments, &["bitnetd", "bitnet-pack"])?;
    let [(_, program), (_, packer)] = &programs[..] else { unreachable!("there are two programs") };
    let folder = workspace.target.join("load");
    fs::create_dir_all(&folder)?;
    let image = folder.join("2b4t.bitnet").display().to_string();
    let tokenizer = workspace.root.join(TOKENIZER).display().to_string();
    let mut dummy = Command::new(packer);
    dummy.args(["dummy", "--preset", PRESET, "--tokenizer", &tokenizer, "-o", &image]);
    if !dummy.stdout(Stdio::null()).stderr(Stdio::null()).status()?.success() {
        bail!("bitnet-pack could not make {image}");
    }
    let daemon = start(program, &image)?;
    // Once each, for threads that are not decided on yet and pages that are not there.
    daemon.ask(1, 1, REPLY)?;
    daemon.ask(SESSIONS, 1, REPLY)?;
    let rate = |sessions: usize| -> Result<f64> {
        Ok((sessions * REPLY) as f64 / daemon.ask(sessions, 1, REPLY)?.as_secs_f64())
    };
    let rates: Vec<(f64, f64)> = (0..REPETITIONS).map(|_| Ok((rate(1)?, rate(SESSIONS)?))).collect::<Result<_>>()?;
    let (one, all, gain) = (
        middle(rates.iter().map(|(one, _)| *one)),
        middle(rates.iter().map(|(_, all)| *all)),
        middle(rates.iter().map(|(one, all)| all / one)),
    );
    say!("one session      {one:.2} tokens/s");
    say!("{SESSIONS} sessions       {all:.2} tokens/s together, {gain:.2} times as many");
    daemon.log.try_iter().for_each(drop);
    for _ in 0..ROUNDS {
        daemon.ask(CLIENTS, PROMPT, SHORT)?;
    }
    let replies: Vec<Value> = (0..CLIENTS * ROUNDS).map(|_| daemon.reply()).collect::<Result<_>>()?;
    let seconds = |field: &str| {
        let mut all: Vec<f64> = replies.iter().filter_map(|reply| reply[field].as_f64()).collect();
        all.sort_by(f64::total_cmp);
        (all[all.len() / 2], all[all.len() - 1])
    };
    let (queue, first) = (seconds("queue_seconds"), seconds("first_token_seconds"));
    say!("{CLIENTS} clients, prompts of {PROMPT} tokens, replies of {SHORT}:");
    say!("  conversation   after {:.2} s, at most {:.2} s", queue.0, queue.1);
    say!("  first token    after {:.2} s, at most {:.2} s", first.0, first.1);
    if gain < GAIN_LEAST {
        say!("error: {SESSIONS} sessions give {gain:.2} times what one gets, not {GAIN_LEAST}");
    }
    Ok(gain >= GAIN_LEAST)
}

fn start(program: &str, image: &str) -> Result<Daemon> {
    let mut command = Command::new(program);
    command.args(["--model", image, "--listen", "127.0.0.1:0", "--log", "json", "--context", CONTEXT]);
    command.args(["--sessions", &SESSIONS.to_string()]).stderr(Stdio::piped());
    let mut child = command.spawn().context("starting the daemon")?;
    let lines = BufReader::new(child.stderr.take().context("the daemon's log")?).lines();
    let (sender, log) = mpsc::channel();
    std::thread::spawn(move || {
        for line in lines.map_while(Result::ok) {
            let Ok(value) = serde_json::from_str(&line) else { continue };
            if sender.send(value).is_err() {
                break;
            }
        }
    });
    let mut daemon = Daemon { child, address: ([127, 0, 0, 1], 0).into(), log };
    loop {
        let line = daemon.log.recv().context("the daemon ended")?;
        let message = line["message"].as_str().unwrap_or_default();
        if let Some((_, address)) = message.split_once(" at http://") {
            daemon.address = address.parse()?;
        } else if message.starts_with("ready") {
            say!("{message}");
            return Ok(daemon);
        }
    }
}

impl Daemon {
    /// The time that so many requests at once take.
    fn ask(&self, clients: usize, prompt: usize, reply: usize) -> Result<Duration> {
        let (address, start) = (self.address, Instant::now());
        std::thread::scope(|scope| {
            let clients: Vec<_> = (0..clients).map(|i| scope.spawn(move || ask(address, i, prompt, reply))).collect();
            clients.into_iter().try_for_each(|client| client.join().expect("a client does not panic"))
        })?;
        Ok(start.elapsed())
    }
    /// What the log says of the next reply.
    fn reply(&self) -> Result<Value> {
        loop {
            let line = self.log.recv().context("the daemon ended")?;
            if line["path"] == "/v1/completions" {
                return Ok(line);
            }
        }
    }
}

/// The one in the middle.
fn middle(numbers: impl Iterator<Item = f64>) -> f64 {
    let mut numbers: Vec<f64> = numbers.collect();
    numbers.sort_by(f64::total_cmp);
    numbers[numbers.len() / 2]
}

/// Asks once and waits for the whole reply.
fn ask(address: SocketAddr, client: usize, prompt: usize, reply: usize) -> Result<()> {
    let prompt: Vec<usize> = (0..prompt).map(|i| 3 + (i * 7 + client * 31) % 500).collect();
    let body = json!({ "prompt": prompt, "max_tokens": reply, "temperature": 0, "cache_prompt": false }).to_string();
    let mut stream = TcpStream::connect(address)?;
    let headers = "Host: localhost\r\nConnection: close\r\nContent-Type: application/json";
    write!(stream, "POST /v1/completions HTTP/1.1\r\n{headers}\r\nContent-Length: {}\r\n\r\n{body}", body.len())?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    let body = answer.split_once("\r\n\r\n").map_or("", |(_, body)| body);
    let body: Value = serde_json::from_str(body).with_context(|| format!("the daemon answers `{answer}`"))?;
    ensure!(body["usage"]["completion_tokens"] == reply, "a reply is short: {body}");
    Ok(())
}
