//! The daemon as a service manager sees it: `bitnetd` is started with a socket, told to reload and to stop by signals, and what it
//! says by sd_notify(3) is listened to. Nothing here depends on how long anything takes; times only end what hangs.

use std::fs;
use std::io::{BufRead, BufReader, Read as _, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::OwnedFd;
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::net::UnixDatagram;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{self, Receiver};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};

/// How long anything may take before it counts as hanging.
const PATIENCE: Duration = Duration::from_secs(120);
/// In what is asked, and nowhere in the log.
const PROMPT: &str = "Once upon a time";

/// What ends with the test, however that ends.
struct Running {
    child: Child,
    messages: Receiver<String>,
    address: SocketAddr,
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Starts and stops the daemon, which `launcher` with the program last and its arguments runs, in the ways that systemd has.
pub(crate) fn check(launcher: &[&str], image: &str) -> Result<()> {
    let folder = std::env::temp_dir().join(format!("bitnetd-{}", std::process::id()));
    fs::create_dir_all(&folder).with_context(|| format!("making {}", folder.display()))?;
    let checked = manners(launcher, image, &folder.join("notify")).and_then(|()| bound(launcher, image));
    fs::remove_dir_all(&folder).with_context(|| format!("removing {}", folder.display()))?;
    checked
}

fn manners(launcher: &[&str], image: &str, notify: &std::path::Path) -> Result<()> {
    let messages = listen(UnixDatagram::bind(notify).context("binding the socket for messages")?);
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let address = listener.local_addr()?;
    // The shell has the socket as its input and gives it to the daemon as file 3, whose process it becomes.
    let mut command = Command::new("sh");
    command.args(["-c", "exec 3<&0 </dev/null; LISTEN_FDS=1 LISTEN_PID=$$ exec \"$@\"", "sh"]).args(launcher);
    command.args(["--model", image, "--threads", "1", "--log", "json", "--drain-seconds", "600"]);
    command.env("NOTIFY_SOCKET", notify).env("WATCHDOG_USEC", "200000");
    command.stdin(Stdio::from(OwnedFd::from(listener))).stderr(Stdio::piped());
    let mut child = command.spawn().context("starting the daemon")?;
    let log = BufReader::new(child.stderr.take().context("the daemon's log")?);
    let mut running = Running { child, messages, address };
    running.heard("READY=1")?;
    ensure!(running.get("/health")?.starts_with("HTTP/1.1 200"), "it is ready and does not say so");
    running.heard("WATCHDOG=1")?;
    running.signal("HUP")?;
    ensure!(running.heard("RELOADING=1")?.contains("MONOTONIC_USEC="), "a reload has a time");
    running.heard("READY=1")?;
    let mut stream = running.stream()?;
    let mut begun = [0; 1];
    stream.read_exact(&mut begun).context("a reply that begins")?;
    running.signal("TERM")?;
    running.heard("STOPPING=1")?;
    let mut rest = String::new();
    stream.read_to_string(&mut rest).context("a reply that ends after SIGTERM")?;
    ensure!(rest.contains("data: [DONE]") && rest.contains("\"length\""), "SIGTERM cuts a reply off: {rest}");
    let status = running.ends()?;
    ensure!(status.success(), "after SIGTERM it ends with {status}");
    logged(log)
}

/// Messages as they come: nobody who sends one has to wait until somebody wants to know.
fn listen(socket: UnixDatagram) -> Receiver<String> {
    let (sender, messages) = mpsc::channel();
    std::thread::spawn(move || {
        let mut buffer = [0; 4096];
        while let Ok(n) = socket.recv(&mut buffer) {
            if sender.send(String::from_utf8_lossy(&buffer[..n]).into_owned()).is_err() {
                break;
            }
        }
    });
    messages
}

/// Where the daemon listens, by the first line of its log.
fn announced(log: &mut impl BufRead) -> Result<SocketAddr> {
    let mut line = String::new();
    log.read_line(&mut line)?;
    let address = line.trim().rsplit('/').next().and_then(|address| address.parse().ok());
    address.with_context(|| format!("the daemon says `{}`", line.trim()))
}

/// Starts an installed daemon by `command`, which lets it listen where nobody does and say by the socket at `notify` that it is ready;
/// asks for its health and what it makes of [`PROMPT`], and stops it.
pub(crate) fn answers(mut command: Command, notify: &std::path::Path) -> Result<String> {
    let socket = UnixDatagram::bind(notify).with_context(|| format!("binding {}", notify.display()))?;
    // The daemon is another user.
    fs::set_permissions(notify, fs::Permissions::from_mode(0o777))?;
    let mut child = command.stderr(Stdio::piped()).spawn().context("starting the daemon")?;
    let mut log = BufReader::new(child.stderr.take().context("the daemon's log")?);
    let mut running = Running { child, messages: listen(socket), address: ([127, 0, 0, 1], 0).into() };
    running.address = announced(&mut log)?;
    running.heard("READY=1")?;
    let health = running.get("/health")?;
    ensure!(health.starts_with("HTTP/1.1 200"), "it is ready and says {health}");
    let mut stream = running.complete(&json!({ "prompt": PROMPT, "max_tokens": 24, "temperature": 0 }))?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    let (_, body) = answer.split_once("\r\n\r\n").context("an answer without a body")?;
    let body: Value = serde_json::from_str(body).with_context(|| format!("it answers {answer}"))?;
    let text = body["choices"][0]["text"].as_str().with_context(|| format!("it answers {answer}"))?;
    running.signal("TERM")?;
    running.heard("STOPPING=1")?;
    let status = running.ends()?;
    ensure!(status.success(), "after SIGTERM it ends with {status}");
    fs::remove_file(notify)?;
    Ok(format!("{PROMPT}{text}"))
}

/// What the log has: objects, one of them for the reply, and nothing of what was asked.
fn logged(log: impl BufRead) -> Result<()> {
    let mut replies = 0;
    for line in log.lines() {
        let line = line?;
        ensure!(!line.contains(PROMPT), "the log has a prompt: {line}");
        let object: Value = serde_json::from_str(&line).with_context(|| format!("the log has `{line}`"))?;
        replies += usize::from(object["path"] == "/v1/completions" && object["finish"] == "length");
    }
    ensure!(replies == 1, "the log has {replies} replies, and there was one");
    Ok(())
}

/// A client that never gets on does not keep a daemon that shall stop.
fn bound(launcher: &[&str], image: &str) -> Result<()> {
    let mut command = Command::new(launcher[0]);
    command.args(&launcher[1..]).args(["--model", image, "--threads", "1", "--listen", "127.0.0.1:0"]);
    command.args(["--drain-seconds", "1", "--read-seconds", "86400"]).stderr(Stdio::piped());
    let mut child = command.spawn().context("starting the daemon")?;
    let mut log = BufReader::new(child.stderr.take().context("the daemon's log")?);
    let mut running = Running { child, messages: mpsc::channel().1, address: ([127, 0, 0, 1], 0).into() };
    running.address = announced(&mut log)?;
    let start = Instant::now();
    while !running.get("/health")?.starts_with("HTTP/1.1 200") {
        ensure!(start.elapsed() < PATIENCE, "the model does not load");
        std::thread::sleep(Duration::from_millis(20));
    }
    let mut stream = TcpStream::connect(running.address)?;
    stream.write_all(
        b"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 9\r\n\r\n{",
    )?;
    // It has read the beginning when it answers somebody who came later.
    running.get("/health")?;
    running.signal("TERM")?;
    let status = running.ends()?;
    ensure!(status.success(), "with a client that waits it ends with {status}");
    Ok(())
}

impl Running {
    /// Waits for a message with this line; others are of no interest.
    fn heard(&self, line: &str) -> Result<String> {
        let end = Instant::now() + PATIENCE;
        loop {
            let left = end.saturating_duration_since(Instant::now());
            let message =
                self.messages.recv_timeout(left).with_context(|| format!("the daemon does not say {line}"))?;
            if message.lines().any(|said| said == line) {
                return Ok(message);
            }
        }
    }
    fn signal(&self, name: &str) -> Result<()> {
        let status =
            Command::new("kill").args(["-s", name, &self.child.id().to_string()]).status().context("starting kill")?;
        ensure!(status.success(), "kill -s {name} failed");
        Ok(())
    }
    fn connect(&self) -> Result<TcpStream> {
        let stream = TcpStream::connect(self.address).context("connecting to the daemon")?;
        stream.set_read_timeout(Some(PATIENCE))?;
        Ok(stream)
    }
    fn get(&self, path: &str) -> Result<String> {
        let mut stream = self.connect()?;
        write!(stream, "GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        Ok(answer)
    }
    /// A reply that is being written.
    fn stream(&self) -> Result<TcpStream> {
        self.complete(&json!({ "prompt": PROMPT, "max_tokens": 200, "stream": true, "logit_bias": { "2": -100 } }))
    }
    /// The connection on which a request for a completion is answered.
    fn complete(&self, body: &Value) -> Result<TcpStream> {
        let body = body.to_string();
        let mut stream = self.connect()?;
        let headers = "Host: localhost\r\nConnection: close\r\nContent-Type: application/json";
        write!(stream, "POST /v1/completions HTTP/1.1\r\n{headers}\r\nContent-Length: {}\r\n\r\n{body}", body.len())?;
        Ok(stream)
    }
    fn ends(&mut self) -> Result<ExitStatus> {
        let end = Instant::now() + PATIENCE;
        while Instant::now() < end {
            if let Some(status) = self.child.try_wait()? {
                return Ok(status);
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        bail!("the daemon does not end")
    }
}
