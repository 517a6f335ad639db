//! Two daemons behind a proxy: by the files for HAProxy and nginx that the daemon comes with, every turn of a conversation goes to
//! the daemon that has what came before in memory, also when the other one is gone.
//!
//! What is looked at does not depend on how long anything takes: which daemon a turn started at, and how many of its tokens were
//! there. A turn is asked for once the proxy knows its servers and has no other request, unless that is what is tried.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};

use crate::clients::{self, Checkpoint};
use crate::matrix::Need;
use crate::setup;
use crate::workspace::Workspace;

const FILES: &str = "boards/bitnetd/deploy/affinity";
/// How long anything may take before it counts as hanging.
const PATIENCE: Duration = Duration::from_secs(120);
/// Conversations that each daemon should get, and how many are begun for that: by a fair coin one in 10^16 runs would not do.
const EACH: usize = 2;
const OPENED_MAX: usize = 64;
const TURNS: usize = 4;
/// What the template of the daemons' model ends a prompt with. Its tokens may merge with the reply when that is read as history.
const REPLY_BEGINS: &str = "Assistant: ";
/// More than HAProxy looks at, so that it chooses a daemon before it has all of a body.
const LONG_BODY: usize = 200_000;
/// Requests that a daemon has beside the one that is looked at.
const OTHERS: u64 = 3;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Proxy {
    Haproxy,
    Nginx,
}

impl Proxy {
    /// Of the program, of Debian's package, and of the service that the package starts.
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Haproxy => "haproxy",
            Self::Nginx => "nginx",
        }
    }
    /// Debian puts it where only root looks for programs.
    pub(crate) fn program(self) -> PathBuf {
        let path = Path::new("/usr/sbin").join(self.name());
        if path.is_file() { path } else { self.name().into() }
    }
    /// What its file becomes here: other addresses, and what a proxy needs that is nobody's service.
    fn configuration(self, text: &str, folder: &Path, daemons: &[Daemon; 2]) -> Result<String> {
        let (folder, [one, two]) = (folder.display(), daemons.each_ref().map(|daemon| &daemon.address));
        let servers = [("192.0.2.1:8080", one.clone()), ("192.0.2.2:8080", two.clone())];
        let own = match self {
            Self::Haproxy => [
                ("global\n", format!("global\n    stats socket {folder}/stats\n")),
                ("bind 0.0.0.0:8080", format!("bind unix@{folder}/socket")),
            ],
            Self::Nginx => {
                let paths = ["client_body", "proxy", "fastcgi", "uwsgi", "scgi"]
                    .map(|kind| format!("    {kind}_temp_path {folder}/{kind};\n"))
                    .concat();
                [
                    (
                        "events {}\nhttp {\n",
                        format!(
                            "daemon off;\nmaster_process off;\npid {folder}/pid;\nevents {{}}\nhttp {{\n    access_log off;\n{paths}"
                        ),
                    ),
                    ("listen 0.0.0.0:8080", format!("listen unix:{folder}/socket")),
                ]
            }
        };
        let mut text = text.to_owned();
        for (from, to) in own.into_iter().chain(servers) {
            ensure!(text.matches(from).count() == 1, "the file of {} should have `{from}` once", self.name());
            text = text.replace(from, &to);
        }
        Ok(text)
    }
    fn command(self, file: &Path, folder: &Path) -> Command {
        let mut command = Command::new(self.program());
        match self {
            Self::Haproxy => command.arg("-db").arg("-f").arg(file),
            Self::Nginx => command.args(["-e", "stderr", "-p"]).arg(folder).arg("-c").arg(file),
        };
        command
    }
}

/// A daemon that may be gone.
struct Daemon {
    process: Option<clients::Daemon>,
    address: String,
}

impl Daemon {
    fn start(program: &str, image: &Path) -> Result<Self> {
        // Room for every conversation, whatever memory the machine has; and nobody is too slow here.
        let options = ["--threads", "1", "--sessions", "4", "--prompt-cache", "64M", "--read-seconds", "600"];
        let daemon = clients::serve(program, image, &options)?;
        let address = daemon.url.strip_prefix("http://").context("the daemon has an address")?.to_owned();
        Ok(Self { process: Some(daemon), address })
    }
    fn ask(&self, line: &str, body: &str) -> Result<String> {
        exchange(TcpStream::connect(&self.address)?, line, body)
    }
    /// Requests that it has given a conversation: each counts before its reply begins. None if it is gone.
    fn started(&self) -> Result<Option<u64>> {
        if self.process.is_none() {
            return Ok(None);
        }
        let text = self.ask("GET /metrics", "")?;
        let mut lines = text.lines();
        let count = lines.find_map(|line| line.strip_prefix("bitnetd_requests_started_total ")?.parse().ok());
        Ok(Some(count.context("the daemon counts no requests")?))
    }
}

/// The proxy, which ends with this.
struct Running {
    child: Child,
    kind: Proxy,
    folder: PathBuf,
    daemons: [Daemon; 2],
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        let _ = std::fs::remove_dir_all(&self.folder);
    }
}

/// A conversation so far, the daemon that has it, and how many tokens the last prompt had before what may merge with a reply.
struct Conversation {
    messages: Vec<Value>,
    daemon: usize,
    known: u64,
}

/// Two daemons behind each proxy in turn.
pub(crate) fn run(workspace: &Workspace) -> Result<bool> {
    let kinds = [Proxy::Haproxy, Proxy::Nginx];
    setup::ensure(&kinds.map(Need::Proxy))?;
    let made = workspace.target.join("proxy");
    std::fs::create_dir_all(&made).with_context(|| format!("making {}", made.display()))?;
    let (program, image) = clients::pack(workspace, &made, Checkpoint::Bundled)?;
    kinds.into_iter().try_for_each(|kind| check(workspace, kind, &program, &image).context(kind.name()))?;
    Ok(true)
}

/// Starts two daemons and the proxy before them, and has conversations.
fn check(workspace: &Workspace, kind: Proxy, program: &str, image: &Path) -> Result<()> {
    let daemons = [Daemon::start(program, image)?, Daemon::start(program, image)?];
    for daemon in &daemons {
        until("the model loads", || Ok(daemon.ask("GET /health", "").is_ok_and(|health| health.contains("\"ok\""))))?;
    }
    let tokens: Value =
        serde_json::from_str(&daemons[0].ask("POST /tokenize", &json!({ "content": REPLY_BEGINS }).to_string())?)?;
    let merging = tokens["tokens"].as_array().context("the tokens of a text")?.len() as u64;
    let mut running = start(workspace, kind, daemons)?;
    let mut conversations = open(&running, merging)?;
    for turn in 1..TURNS {
        for conversation in &mut conversations {
            running.turn(conversation, merging).with_context(|| format!("turn {turn}"))?;
        }
    }
    if kind == Proxy::Haproxy {
        busy(&running, &mut conversations, merging)?;
    }
    gone(&mut running, &mut conversations, merging)?;
    say!("{}: {} conversations, each with one daemon", kind.name(), conversations.len());
    Ok(())
}

fn start(workspace: &Workspace, kind: Proxy, daemons: [Daemon; 2]) -> Result<Running> {
    let folder = std::env::temp_dir().join(format!("bitnetd-{}-{}", kind.name(), std::process::id()));
    std::fs::create_dir_all(&folder).with_context(|| format!("making {}", folder.display()))?;
    let name = match kind {
        Proxy::Haproxy => "haproxy.cfg",
        Proxy::Nginx => "nginx.conf",
    };
    let text = std::fs::read_to_string(workspace.root.join(FILES).join(name)).with_context(|| name.to_owned())?;
    let file = folder.join(name);
    std::fs::write(&file, kind.configuration(&text, &folder, &daemons)?)?;
    let child = kind.command(&file, &folder).spawn().with_context(|| format!("starting {}", kind.name()))?;
    let mut running = Running { child, kind, folder, daemons };
    until("the proxy answers", || {
        if let Some(status) = running.child.try_wait()? {
            bail!("{} ends with {status}", kind.name());
        }
        Ok(running.connect().and_then(|stream| exchange(stream, "GET /health", "")).is_ok())
    })?;
    // Servers count as up before they have been looked at, and as down if they are not there at the first look.
    running.servers("are both up", |server| server.status == "UP" && server.check == "L7OK")?;
    Ok(running)
}

/// Begins conversations, every other with a system's message that they share, until each daemon has some.
fn open(running: &Running, merging: u64) -> Result<Vec<Conversation>> {
    let mut conversations: Vec<Conversation> = Vec::new();
    let has = |conversations: &[Conversation], daemon| {
        conversations.iter().filter(|conversation| conversation.daemon == daemon).count()
    };
    while (0..2).any(|daemon| has(&conversations, daemon) < EACH) {
        let i = conversations.len();
        ensure!(i < OPENED_MAX, "one daemon gets {} of {i} conversations", has(&conversations, 0));
        let mut messages = vec![json!({ "role": "user", "content": format!("{i} cats and {} dogs went out.", 3 * i) })];
        if i % 2 == 1 {
            messages.insert(0, json!({ "role": "system", "content": "Tell stories of {\"cats\"} and dogs." }));
        }
        let mut conversation = Conversation { messages, daemon: 0, known: 0 };
        (conversation.daemon, _) = running.reply(&mut conversation, merging)?;
        conversations.push(conversation);
    }
    Ok(conversations)
}

/// While a daemon has other requests that go on, its conversations still come to it: it has four at once.
fn busy(running: &Running, conversations: &mut [Conversation], merging: u64) -> Result<()> {
    for conversation in conversations {
        let daemon = conversation.daemon;
        let held = (1..=OTHERS).map(|n| running.hold(conversation, n)).collect::<Result<Vec<_>>>()?;
        let (answered, cached) = running.answered(conversation, merging)?;
        ensure!(answered == daemon && cached, "a turn leaves daemon {daemon}, which has {OTHERS} other requests");
        drop(held);
    }
    Ok(())
}

/// Without the second daemon the first has all conversations, and its own are still in memory.
fn gone(running: &mut Running, conversations: &mut [Conversation], merging: u64) -> Result<()> {
    running.daemons[1].process = None;
    running.servers("are one up and one down", |server| server.status == if server.first { "UP" } else { "DOWN" })?;
    for conversation in conversations.iter_mut() {
        if conversation.daemon == 0 {
            running.turn(conversation, merging)?;
        } else {
            (conversation.daemon, _) = running.reply(conversation, merging)?;
        }
    }
    conversations.iter_mut().try_for_each(|conversation| running.turn(conversation, merging))
}

impl Running {
    fn connect(&self) -> Result<UnixStream> {
        Ok(UnixStream::connect(self.folder.join("socket"))?)
    }
    /// A turn that has to come to the daemon that has the conversation.
    fn turn(&self, conversation: &mut Conversation, merging: u64) -> Result<()> {
        let expected = conversation.daemon;
        let (daemon, cached) = self.reply(conversation, merging)?;
        let messages = json!(conversation.messages);
        ensure!(daemon == expected, "a turn goes to daemon {daemon} and not to {expected}: {messages}");
        ensure!(cached, "a turn is not in the memory of its daemon: {messages}");
        Ok(())
    }
    /// The same, wherever it goes, once nothing else goes on: which daemon answers, and whether it had what came before.
    fn reply(&self, conversation: &mut Conversation, merging: u64) -> Result<(usize, bool)> {
        self.idle()?;
        self.answered(conversation, merging)
    }
    fn answered(&self, conversation: &mut Conversation, merging: u64) -> Result<(usize, bool)> {
        let before = self.started()?;
        let body = json!({ "messages": conversation.messages, "temperature": 0, "max_tokens": 8 }).to_string();
        let answer = exchange(self.connect()?, "POST /v1/chat/completions", &body)?;
        let reply: Value = serde_json::from_str(&answer).with_context(|| format!("the answer is `{answer}`"))?;
        let usage = &reply["usage"];
        let counts = (usage["prompt_tokens"].as_u64(), usage["prompt_tokens_details"]["cached_tokens"].as_u64());
        let (Some(prompt), Some(cached)) = counts else { bail!("the answer is `{answer}`") };
        let after = self.started()?;
        let answered: Vec<usize> = (0..2).filter(|&i| after[i] != before[i]).collect();
        let [daemon] = answered[..] else { bail!("a turn starts at {} daemons", answered.len()) };
        let known = std::mem::replace(&mut conversation.known, prompt - merging);
        conversation.messages.push(reply["choices"][0]["message"].clone());
        conversation.messages.push(json!({ "role": "user", "content": "And then?" }));
        Ok((daemon, cached >= known))
    }
    fn started(&self) -> Result<[Option<u64>; 2]> {
        Ok([self.daemons[0].started()?, self.daemons[1].started()?])
    }
    /// Most of a request that begins as this conversation did, once HAProxy has given it to the same daemon, as the `number`-th there.
    fn hold(&self, conversation: &Conversation, number: u64) -> Result<UnixStream> {
        if number == 1 {
            self.idle()?;
        }
        let mut messages = conversation.messages.clone();
        messages.push(json!({ "role": "user", "content": "x".repeat(LONG_BODY) }));
        let body = json!({ "messages": messages }).to_string();
        let mut stream = self.connect()?;
        write!(stream, "{}", head("POST /v1/chat/completions", body.len()))?;
        stream.write_all(&body.as_bytes()[..LONG_BODY * 9 / 10])?;
        let daemon = conversation.daemon;
        let expected = |server: &Server| if server.first == (daemon == 0) { number } else { 0 };
        self.servers("have what is held", |server| server.requests == expected(server))?;
        Ok(stream)
    }
    /// Waits until the proxy has no request any more.
    fn idle(&self) -> Result<()> {
        self.servers("have no request", |server| server.requests == 0)
    }
    /// Waits until it says so of both servers; nginx says nothing of them, and looks at nothing before it is asked.
    fn servers(&self, what: &str, there: impl Fn(&Server) -> bool) -> Result<()> {
        if self.kind == Proxy::Nginx {
            return Ok(());
        }
        until(what, || {
            let mut stream = UnixStream::connect(self.folder.join("stats"))?;
            stream.write_all(b"show stat\n")?;
            let mut table = String::new();
            stream.read_to_string(&mut table)?;
            let servers = servers(&table)?;
            Ok(servers.len() == 2 && servers.iter().all(&there))
        })
    }
}

/// What HAProxy says of a server.
#[derive(Debug, PartialEq, Eq)]
struct Server {
    /// Whether it is the first of the two.
    first: bool,
    status: String,
    check: String,
    /// That are going on.
    requests: u64,
}

/// The servers in HAProxy's table of statistics, whose first line names the columns.
fn servers(table: &str) -> Result<Vec<Server>> {
    let mut lines = table.trim_start_matches("# ").lines();
    let names: Vec<&str> = lines.next().context("HAProxy says nothing")?.split(',').collect();
    let column = |name: &str| {
        names.iter().position(|given| *given == name).with_context(|| format!("HAProxy's table has no `{name}`"))
    };
    let [name, status, check, requests] =
        [column("svname")?, column("status")?, column("check_status")?, column("scur")?];
    let of = |line: &str| {
        let fields: Vec<&str> = line.split(',').collect();
        let field = |at: usize| fields.get(at).copied().unwrap_or_default();
        let first = match field(name) {
            "one" => true,
            "two" => false,
            _ => return None,
        };
        // A star says that the next look is under way.
        let check = field(check).trim_start_matches("* ").to_owned();
        Some(Server { first, status: field(status).to_owned(), check, requests: field(requests).parse().ok()? })
    };
    Ok(lines.filter_map(of).collect())
}

/// Waits for something that has to come.
fn until(what: &str, mut there: impl FnMut() -> Result<bool>) -> Result<()> {
    let end = Instant::now() + PATIENCE;
    while !there()? {
        ensure!(Instant::now() < end, "it does not come to this: {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
    Ok(())
}

fn head(line: &str, length: usize) -> String {
    format!(
        "{line} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Type: application/json\r\nContent-Length: {length}\r\n\r\n"
    )
}

/// The body of an answer with status 200.
fn exchange(mut stream: impl Read + Write, line: &str, body: &str) -> Result<String> {
    write!(stream, "{}{body}", head(line, body.len()))?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    ensure!(answer.starts_with("HTTP/1.1 200"), "{line}: `{answer}`");
    Ok(answer.split_once("\r\n\r\n").context("an answer has a head")?.1.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn servers_are_read_by_the_names_of_columns() {
        let table = "# pxname,svname,scur,status,check_status,\nchat,FRONTEND,0,OPEN,,\ndaemons,one,0,UP,* L7OK,\n\
                     daemons,two,3,DOWN,L4CON,\ndaemons,BACKEND,3,UP,,\n\n";
        let server = |first, status: &str, check: &str, requests| Server {
            first,
            status: status.to_owned(),
            check: check.to_owned(),
            requests,
        };
        assert_eq!(servers(table).unwrap(), [server(true, "UP", "L7OK", 0), server(false, "DOWN", "L4CON", 3)]);
        assert!(servers("# pxname,svname\n").is_err());
    }
}
