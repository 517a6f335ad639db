//! The daemon over real connections, on the bundled model: shapes, ends, leaving, and requests that no client would send.
mod cache;
mod contract;
mod deploy;
mod hostile;
mod json;
mod leaving;
mod page;
mod service;
mod soak;
mod sse;

use bitnet_pack::Options;
use bitnet_tests::model;
use bitnetd::Signal;
use bitnetd::config::Task;
use serde_json::{Value, json};
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::LazyLock;
use std::time::{Duration, Instant};
use tokio::sync::mpsc::UnboundedSender;

/// So long nothing takes on any machine, emulated or not: waiting ends there.
const HANGS: Duration = Duration::from_secs(600);

/// A daemon in this process, which ends with it, or in one of its own.
struct Daemon {
    address: SocketAddr,
    process: Option<Child>,
    /// To one in this process.
    signals: Option<UnboundedSender<Signal>>,
}

impl Drop for Daemon {
    fn drop(&mut self) {
        if let Some(process) = &mut self.process {
            // By SIGKILL.
            let _ = process.kill();
            let _ = process.wait();
        }
    }
}

/// Turns as those of BitNet b1.58 2B4T, with the token that ends the bundled model's stories.
const TEMPLATE: &str = "{% for m in messages %}{{ m.role|capitalize + ': ' + m.content|trim + '</s>' }}{% endfor %}\
                        {% if add_generation_prompt %}{{ 'Assistant: ' }}{% endif %}";

const JSON: &str = "Host: localhost\r\nContent-Type: application/json\r\n";

impl Daemon {
    /// With the bundled model, which was given a chat template, once it is ready.
    fn start(options: &[&str]) -> Self {
        Self::of(image(), options)
    }
    fn of(image: &str, options: &[&str]) -> Self {
        let mut args = vec!["bitnetd", "--model", image];
        if !options.contains(&"--threads") {
            args.extend(["--threads", "1"]);
        }
        args.extend(options);
        let Task::Serve(settings) = Task::new(args).unwrap() else { panic!("it is to serve") };
        let (sender, receiver) = std::sync::mpsc::channel();
        let (signals, asked) = tokio::sync::mpsc::unbounded_channel();
        std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(async {
                let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
                sender.send(listener.local_addr().unwrap()).unwrap();
                bitnetd::serve(settings, listener, asked).await.unwrap();
            });
        });
        let daemon = Self { address: receiver.recv().unwrap(), process: None, signals: Some(signals) };
        daemon.until("the model loads", || daemon.health() == 200);
        daemon
    }
    /// As a process of `program`, once it is ready.
    fn spawn(program: &str) -> Self {
        let mut command = Command::new(program);
        command.args(["--model", image(), "--threads", "1", "--listen", "127.0.0.1:0"]).stderr(Stdio::piped());
        let mut process = command.spawn().unwrap();
        let mut line = String::new();
        BufReader::new(process.stderr.take().unwrap()).read_line(&mut line).unwrap();
        let address = line.trim().rsplit('/').next().unwrap().parse().unwrap();
        let daemon = Self { address, process: Some(process), signals: None };
        daemon.until("the model loads", || daemon.health() == 200);
        daemon
    }
    /// Waits for something that has to come.
    fn until(&self, what: &str, there: impl Fn() -> bool) {
        let end = Instant::now() + HANGS;
        while !there() {
            assert!(Instant::now() < end, "{what}");
            std::thread::sleep(Duration::from_millis(2));
        }
    }
    /// Asks something of one in this process.
    fn signal(&self, signal: Signal) {
        self.signals.as_ref().unwrap().send(signal).unwrap();
    }
    fn health(&self) -> u16 {
        self.get("/health").0
    }
    fn get(&self, path: &str) -> (u16, String) {
        self.exchange(&request(&format!("GET {path}"), "Host: localhost\r\n", ""))
    }
    /// A connection on which `bytes` were sent.
    fn send(&self, bytes: &[u8]) -> TcpStream {
        let mut stream = TcpStream::connect(self.address).unwrap();
        stream.set_read_timeout(Some(HANGS)).unwrap();
        // A daemon that refuses may close before it has read all.
        let _ = stream.write_all(bytes);
        stream
    }
    /// Sends bytes and reads until the daemon closes: status and all after the headers.
    fn exchange(&self, bytes: &[u8]) -> (u16, String) {
        let mut answer = Vec::new();
        let _ = self.send(bytes).read_to_end(&mut answer);
        let answer = String::from_utf8(answer).expect("whole characters");
        let (head, body) = answer.split_once("\r\n\r\n").unwrap_or((&answer, ""));
        (head.split(' ').nth(1).and_then(|status| status.parse().ok()).unwrap_or(0), body.to_owned())
    }
    fn post(&self, path: &str, body: &Value) -> (u16, Value) {
        let (status, body) = self.exchange(&request(&format!("POST {path}"), JSON, &body.to_string()));
        (status, serde_json::from_str(&body).unwrap_or_else(|e| panic!("{status}: {e} in {body}")))
    }
    /// The reply to a completion: its text and why it ended.
    fn text(&self, body: &Value) -> (String, String) {
        let (status, reply) = self.post("/v1/completions", body);
        assert_eq!(status, 200, "{reply}");
        let choice = &reply["choices"][0];
        (choice["text"].as_str().unwrap().to_owned(), choice["finish_reason"].as_str().unwrap().to_owned())
    }
    fn tokens(&self, text: &str) -> Vec<u32> {
        let (_, reply) = self.post("/tokenize", &json!({ "content": text }));
        serde_json::from_value(reply["tokens"].clone()).unwrap()
    }
    fn metric(&self, name: &str) -> u64 {
        let (_, text) = self.get("/metrics");
        text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' ')?.parse().ok()).unwrap()
    }
}

/// The image of the bundled model with a chat template, which this process makes once.
fn image() -> &'static str {
    static IMAGE: LazyLock<String> = LazyLock::new(|| {
        let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("chatty-stories");
        pack_with(
            &model("stories-ternary"),
            &folder,
            &[("tokenizer_config.json", &json!({ "chat_template": TEMPLATE }))],
        )
    });
    &IMAGE
}

/// Packs a checkpoint in `folder` that is another with these files.
fn pack_with(checkpoint: &Path, folder: &Path, files: &[(&str, &Value)]) -> String {
    std::fs::create_dir_all(folder).unwrap();
    for name in ["config.json", "model.safetensors", "tokenizer.json"] {
        let from = checkpoint.join(name);
        if from.exists() {
            std::fs::copy(from, folder.join(name)).unwrap();
        }
    }
    for (name, content) in files {
        std::fs::write(folder.join(name), content.to_string()).unwrap();
    }
    let image = folder.with_extension("bitnet");
    bitnet_pack::pack(folder, &image, &Options::default(), &mut ()).unwrap();
    image.to_str().unwrap().to_owned()
}

fn request(line: &str, headers: &str, body: &str) -> Vec<u8> {
    let length = body.len();
    format!("{line} HTTP/1.1\r\nConnection: close\r\nContent-Length: {length}\r\n{headers}\r\n{body}").into_bytes()
}
