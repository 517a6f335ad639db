//! Options, from the command line or from environment variables.
use anyhow::{Context as _, ensure};
use bitnet_host::open::ModelArgs;
use bitnet_host::weights::size;
use clap::Parser;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

/// Conversations that can be held in memory, and share a pass.
const SESSIONS_MAX: i64 = 64;

/// Serves a model over HTTP, in the shapes of OpenAI's API.
///
/// An image is made by `bitnet-pack pack CHECKPOINT -o IMAGE`.
#[derive(Debug, Parser)]
#[command(version, after_help = EXAMPLES, mut_arg("image", |image| image.long("model").env("BITNETD_MODEL")))]
pub struct Cli {
    /// The model.
    #[command(flatten)]
    pub model: ModelArgs,
    /// How to serve.
    #[command(flatten)]
    pub serve: ServeArgs,
}

const EXAMPLES: &str = "\
Examples:
  bitnetd --model model.bitnet
  bitnetd --model model.bitnet --listen 127.0.0.1:8081 --sessions 8 --context 2048
  bitnetd --model model.bitnet --listen 0.0.0.0:8080 --api-key-file keys --allow-host pi.local

SIGTERM and SIGINT let replies end within --drain-seconds.
Exit codes: 0 stopped, 1 something failed (the reason is on standard error), 2 wrong usage.";

/// How to serve.
#[derive(Clone, Debug, clap::Args)]
pub struct ServeArgs {
    /// Address and port. Other than the loopback addresses need --api-key-file.
    #[arg(long, env = "BITNETD_LISTEN", default_value = "127.0.0.1:8080")]
    pub listen: SocketAddr,
    /// A file with keys, one a line, of which clients must send one as `Authorization: Bearer KEY`.
    #[arg(long, env = "BITNETD_API_KEY_FILE")]
    pub api_key_file: Option<PathBuf>,
    /// A name by which clients may call this host, beside localhost and addresses; may be given several times.
    #[arg(long = "allow-host", env = "BITNETD_ALLOW_HOST", value_delimiter = ',', value_name = "NAME")]
    pub hosts: Vec<String>,
    /// The model's name in answers [default: the image's file name].
    #[arg(long, env = "BITNETD_MODEL_NAME")]
    pub model_name: Option<String>,
    /// Conversations in memory: so many requests are answered at once, and so many prompts are remembered.
    #[arg(long, env = "BITNETD_SESSIONS", default_value_t = 4, value_parser = clap::value_parser!(u8).range(1..=SESSIONS_MAX))]
    pub sessions: u8,
    /// Memory for conversations beyond those, such as 256M: prompts that begin as one of them did need not read that again
    /// [default: sixteen conversations, and no more than a quarter of the free memory].
    #[arg(long, env = "BITNETD_PROMPT_CACHE", value_parser = size, value_name = "BYTES")]
    pub prompt_cache: Option<u64>,
    /// Requests that may wait for a conversation; others are told to come again.
    #[arg(long, env = "BITNETD_QUEUE", default_value_t = 32)]
    pub queue: usize,
    /// Most bytes of a request's body.
    #[arg(long, env = "BITNETD_BODY_BYTES", default_value_t = 1 << 20)]
    pub body_bytes: usize,
    /// Measure how fast the memory is read before the model is loaded, so that /metrics tells the share of it that a pass gets.
    #[arg(long, env = "BITNETD_MEASURE_BANDWIDTH")]
    pub measure_bandwidth: bool,
    /// Seconds after which a reply ends wherever it is.
    #[arg(long, env = "BITNETD_REPLY_SECONDS", default_value_t = 600)]
    pub reply_seconds: u64,
    /// Seconds that a client has for sending its headers, and again for its body.
    #[arg(long, env = "BITNETD_READ_SECONDS", default_value_t = 10)]
    pub read_seconds: u64,
    /// Seconds after which a client that takes nothing of its reply is cut off.
    #[arg(long, env = "BITNETD_STALL_SECONDS", default_value_t = 30)]
    pub stall_seconds: u64,
    /// Seconds that replies have for ending after SIGTERM.
    #[arg(long, env = "BITNETD_DRAIN_SECONDS", default_value_t = 20)]
    pub drain_seconds: u64,
}

/// Options that were checked.
#[derive(Clone, Debug)]
pub struct Settings {
    /// The model and how it runs.
    pub model: ModelArgs,
    /// What was asked for.
    pub serve: ServeArgs,
    /// The model's name.
    pub name: String,
    /// Keys, none of them empty. Without any, whoever reaches the daemon may use it.
    pub keys: Vec<String>,
}

impl Settings {
    /// Reads what the options name, and refuses what would be open to all.
    ///
    /// # Errors
    /// If a file cannot be read or a key is missing.
    pub fn new(Cli { model, serve }: Cli) -> anyhow::Result<Self> {
        let mut keys = Vec::new();
        if let Some(path) = &serve.api_key_file {
            let name = path.display();
            let text = std::fs::read_to_string(path).with_context(|| format!("{name}"))?;
            keys = text.lines().map(str::trim).filter(|key| !key.is_empty()).map(str::to_owned).collect();
            ensure!(!keys.is_empty(), "{name} has no key");
            ensure!(keys.iter().all(|key| key.len() >= 16), "{name} has a key of less than 16 characters");
        }
        let open = !serve.listen.ip().is_loopback() && keys.is_empty();
        ensure!(!open, "{} can be reached by others: it needs --api-key-file", serve.listen);
        let stem = model.image.file_stem().map(|stem| stem.to_string_lossy().into_owned());
        let name = serve.model_name.clone().or(stem).unwrap_or_else(|| "model".to_owned());
        Ok(Self { model, serve, name, keys })
    }
    /// From words as a shell would give them.
    ///
    /// # Errors
    /// If they are no such options, or as [`Settings::new`].
    pub fn parse<'a>(words: impl IntoIterator<Item = &'a str>) -> anyhow::Result<Self> {
        Self::new(Cli::try_parse_from(words)?)
    }
    pub(crate) const fn read_time(&self) -> Duration {
        Duration::from_secs(self.serve.read_seconds)
    }
    pub(crate) const fn stall_time(&self) -> Duration {
        Duration::from_secs(self.serve.stall_seconds)
    }
    pub(crate) const fn reply_time(&self) -> Duration {
        Duration::from_secs(self.serve.reply_seconds)
    }
}
