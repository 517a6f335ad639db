//! Options: each is defined once, below, and has a name on the command line, in the environment and in a file.
//!
//! The command line has precedence over the environment, that over the file, and that over the default.
use crate::{log, room};
use anyhow::{Context as _, ensure};
use bitnet_host::open::ModelArgs;
use bitnet_host::weights::size;
use clap::builder::BoolishValueParser;
use clap::{Arg, ArgAction, ArgMatches, Command, CommandFactory as _, FromArgMatches as _, Parser};
use std::ffi::OsString;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;
use toml::de::{DeTable, DeValue};

/// Conversations that can be held in memory, and share a pass.
const SESSIONS_MAX: i64 = 64;

/// Serves a model over HTTP, in the shapes of OpenAI's API.
///
/// An image is made by `bitnet-pack pack CHECKPOINT -o IMAGE`.
#[derive(Debug, Parser)]
#[command(version, after_help = EXAMPLES, mut_arg("image", |image| image.long("model")))]
struct Cli {
    /// A file with options in TOML: `sessions = 8` is `--sessions 8`, and a list is for options that may be given several times.
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// The model.
    #[command(flatten)]
    model: ModelArgs,
    /// How to serve.
    #[command(flatten)]
    serve: ServeArgs,
}

const EXAMPLES: &str = "\
Examples:
  bitnetd --model model.bitnet
  bitnetd --model model.bitnet --listen 127.0.0.1:8081 --sessions 8 --context 2048
  bitnetd --model model.bitnet --listen 0.0.0.0:8080 --api-key-file keys --allow-host pi.local

Every option is also an environment variable (--sessions is BITNETD_SESSIONS) and a key of the file that --config names. The command
line goes before the environment, and that before the file. An unknown key is an error.

SIGHUP reads who may ask anew (the keys of --api-key-file, and --allow-host in the file of --config) and loads the model anew, beside
the one in memory if there is room for both; other options stay as they were at the start. SIGTERM and SIGINT let replies end within
--drain-seconds.
Exit codes: 0 stopped, 1 something failed (the reason is on standard error), 2 wrong usage.";

/// How to serve.
#[derive(Clone, Debug, clap::Args)]
pub struct ServeArgs {
    /// Address and port. Other than the loopback addresses need --api-key-file.
    #[arg(long, default_value = "127.0.0.1:8080")]
    pub listen: SocketAddr,
    /// A file with keys, one a line, of which clients must send one as `Authorization: Bearer KEY`.
    #[arg(long)]
    pub api_key_file: Option<PathBuf>,
    /// A name by which clients may call this host, beside localhost and addresses; may be given several times.
    #[arg(long = "allow-host", value_delimiter = ',', value_name = "NAME")]
    pub hosts: Vec<String>,
    /// The model's name in answers [default: the image's file name].
    #[arg(long)]
    pub model_name: Option<String>,
    /// Conversations in memory: so many requests are answered at once, and so many prompts are remembered [default: 4, or as many
    /// as there is room for].
    #[arg(long, value_parser = clap::value_parser!(u8).range(1..=SESSIONS_MAX))]
    pub sessions: Option<u8>,
    /// Memory for conversations beyond those, such as 256M: prompts that begin as one of them did need not read that again
    /// [default: sixteen conversations, and no more than a quarter of the free memory; none with --ram].
    #[arg(long, value_parser = size, value_name = "BYTES")]
    pub prompt_cache: Option<u64>,
    /// Requests that may wait for a conversation; others are told to come again.
    #[arg(long, default_value_t = 32)]
    pub queue: usize,
    /// Most bytes of a request's body.
    #[arg(long, default_value_t = 1 << 20)]
    pub body_bytes: usize,
    /// Measure how fast the memory is read before the model is loaded, so that /metrics tells the share of it that a pass gets.
    #[arg(long)]
    pub measure_bandwidth: bool,
    /// Seconds after which a reply ends wherever it is.
    #[arg(long, default_value = "600", value_parser = seconds, value_name = "SECONDS")]
    pub reply_seconds: Duration,
    /// Seconds that a client has for sending its headers, and again for its body.
    #[arg(long, default_value = "10", value_parser = seconds, value_name = "SECONDS")]
    pub read_seconds: Duration,
    /// Seconds after which a client that takes nothing of its reply is cut off.
    #[arg(long, default_value = "30", value_parser = seconds, value_name = "SECONDS")]
    pub stall_seconds: Duration,
    /// Seconds that replies have for ending after SIGTERM.
    #[arg(long, default_value = "20", value_parser = seconds, value_name = "SECONDS")]
    pub drain_seconds: Duration,
    /// Load the model when the first request comes, not at the start.
    #[arg(long)]
    pub lazy: bool,
    /// Seconds without a request after which the model leaves the memory; the next request loads it again [default: it stays].
    #[arg(long, value_parser = seconds, value_name = "SECONDS")]
    pub unload_after: Option<Duration>,
    /// How the log looks.
    #[arg(long, value_enum, default_value_t = log::Form::Plain)]
    pub log: log::Form,
}

/// The longest time that an option may say: a year, so that no sum of times is beyond what clocks hold.
const SECONDS_MAX: u64 = 365 * 24 * 60 * 60;

/// A time as people write it.
fn seconds(text: &str) -> Result<Duration, String> {
    let seconds = text.parse().ok().filter(|seconds| (1..=SECONDS_MAX).contains(seconds));
    seconds.map(Duration::from_secs).ok_or_else(|| format!("expected seconds from 1 to {SECONDS_MAX}"))
}

/// The command line: all options, and `doctor` with the same.
pub fn command() -> Command {
    with_doctor(options())
}

/// All options, and the environment variable of each.
fn options() -> Command {
    Cli::command().mut_args(|arg| {
        let Some(long) = arg.get_long() else { return arg };
        let variable = format!("BITNETD_{}", long.to_uppercase().replace('-', "_"));
        // Kernels are chosen by the same variable in all programs.
        let arg = if arg.get_env().is_none() { arg.env(variable) } else { arg };
        let switch = matches!(arg.get_action(), ArgAction::SetTrue);
        if switch { arg.value_parser(BoolishValueParser::new()) } else { arg }
    })
}

fn with_doctor(options: Command) -> Command {
    let doctor = options.clone().name(DOCTOR).about(DOCTOR_ABOUT).long_about(DOCTOR_ABOUT).after_help(DOCTOR_CODES);
    options.subcommand(doctor).subcommand_negates_reqs(true).args_conflicts_with_subcommands(true)
}

const DOCTOR: &str = "doctor";
const DOCTOR_ABOUT: &str =
    "Says what the daemon would do with these options, and whether anything is wrong with the model or the machine";
const DOCTOR_CODES: &str = "Exit codes: 0 all is well, 1 something is wrong, 2 wrong usage.";

/// What to do.
#[derive(Debug)]
pub enum Task {
    /// Serve.
    Serve(Settings),
    /// See [`doctor`](crate::doctor).
    Doctor(Settings),
}

impl Task {
    /// From words as a shell would give them, the environment, and the file that they name.
    ///
    /// # Errors
    /// A [`clap::Error`] if the words are no such options or ask for help; else what is wrong with a file or with an option.
    pub fn new<W: Into<OsString>>(words: impl IntoIterator<Item = W>) -> anyhow::Result<Self> {
        let words: Vec<OsString> = words.into_iter().map(Into::into).collect();
        let of =
            |matches: &ArgMatches| matches.subcommand().map_or_else(|| matches.clone(), |(_, matches)| matches.clone());
        // What is wrong with the words is told by the second look, which knows what the file has.
        let first = with_doctor(options()).ignore_errors(true).try_get_matches_from(&words)?;
        let options = match of(&first).get_one::<PathBuf>("config") {
            Some(path) => with_file(options(), path)?,
            None => options(),
        };
        let matches = with_doctor(options).try_get_matches_from(&words)?;
        let settings = Settings::new(Cli::from_arg_matches(&of(&matches))?, words)?;
        Ok(if matches.subcommand().is_some() { Self::Doctor(settings) } else { Self::Serve(settings) })
    }
}

/// Options whose defaults are what a file says.
fn with_file(command: Command, path: &Path) -> anyhow::Result<Command> {
    let text = std::fs::read_to_string(path).with_context(|| format!("reading {}", path.display()))?;
    from_text(command, &text).map_err(|(line, what)| anyhow::anyhow!("{}:{line}: {what}", path.display()))
}

/// Options whose defaults are what the text of a file says; or what is wrong with it and in which line.
fn from_text(mut command: Command, text: &str) -> Result<Command, (usize, String)> {
    let line = |at: usize| 1 + text[..at].matches('\n').count();
    let table =
        DeTable::parse(text).map_err(|e| (line(e.span().map_or(0, |span| span.start)), e.message().to_owned()))?;
    for (key, value) in table.get_ref() {
        let (name, line) = (key.get_ref().as_ref(), line(key.span().start));
        let arg = command.get_arguments().find(|arg| arg.get_long() == Some(name) && name != "config");
        let arg = arg.ok_or_else(|| (line, format!("there is no option `{name}`")))?.clone();
        let words =
            words(value.get_ref()).ok_or_else(|| (line, format!("`{name}` is no text, number or list of these")))?;
        check(arg.clone(), name, &words).map_err(|what| (line, what))?;
        command = command.mut_arg(arg.get_id(), |arg| arg.default_values(words).required(false));
    }
    Ok(command)
}

/// A value as words of a command line.
fn words(value: &DeValue<'_>) -> Option<Vec<String>> {
    let word = |value: &DeValue<'_>| match value {
        DeValue::String(text) => Some(text.clone().into_owned()),
        DeValue::Integer(n) => Some(i64::from_str_radix(n.as_str(), n.radix()).ok()?.to_string()),
        DeValue::Float(n) => Some(n.as_str().to_owned()),
        DeValue::Boolean(yes) => Some(yes.to_string()),
        _ => None,
    };
    match value {
        DeValue::Array(values) => values.iter().map(|value| word(value.get_ref())).collect(),
        value => Some(vec![word(value)?]),
    }
}

/// Whether an option takes such words; a switch is told by one.
fn check(arg: Arg, name: &str, words: &[String]) -> Result<(), String> {
    let (id, long) = (arg.get_id().clone(), format!("--{name}"));
    let switch = matches!(arg.get_action(), ArgAction::SetTrue);
    let arg = if switch { arg.action(ArgAction::Set).num_args(1) } else { arg };
    let given = words.iter().map(|word| format!("{long}={word}"));
    let matches: Result<ArgMatches, _> =
        Command::new("file").no_binary_name(true).arg(arg.required(false)).try_get_matches_from(given);
    match matches {
        Ok(matches) if matches.contains_id(id.as_str()) && !words.is_empty() => Ok(()),
        Ok(_) => Err(format!("`{name}` is empty")),
        Err(e) => {
            let text = e.to_string();
            let first = text.lines().next().unwrap_or_default();
            Err(first.strip_prefix("error: ").unwrap_or(first).to_owned())
        }
    }
}

/// Options that were checked.
#[derive(Clone, Debug)]
pub struct Settings {
    /// The model and how it runs.
    pub model: ModelArgs,
    /// What was asked for.
    pub serve: ServeArgs,
    /// Conversations in memory.
    pub sessions: u8,
    /// The model's name.
    pub name: String,
    /// Keys, none of them empty. Without any, whoever reaches the daemon may use it.
    pub keys: Vec<String>,
    /// What the options were read from, beside the environment.
    words: Vec<OsString>,
}

impl Settings {
    /// Reads what the options name, and refuses what would be open to all.
    ///
    /// # Errors
    /// If a file cannot be read or a key is missing.
    fn new(Cli { model, serve, .. }: Cli, words: Vec<OsString>) -> anyhow::Result<Self> {
        let mut keys = Vec::new();
        if let Some(path) = &serve.api_key_file {
            let name = path.display();
            let text = std::fs::read_to_string(path).with_context(|| format!("{name}"))?;
            keys = text.lines().map(str::trim).filter(|key| !key.is_empty()).map(str::to_owned).collect();
            ensure!(!keys.is_empty(), "{name} has no key");
            ensure!(keys.iter().all(|key| key.len() >= 16), "{name} has a key of less than 16 characters");
        }
        let stem = model.image.file_stem().map(|stem| stem.to_string_lossy().into_owned());
        let name = serve.model_name.clone().or(stem).unwrap_or_else(|| "model".to_owned());
        let sessions = serve.sessions.unwrap_or_else(|| room::sessions(&model));
        let settings = Self { model, serve, sessions, name, keys, words };
        settings.may_listen(settings.serve.listen)?;
        Ok(settings)
    }
    /// The same words read again, with what the files say now.
    ///
    /// # Errors
    /// As for [`Task::new`].
    pub fn again(&self) -> anyhow::Result<Self> {
        let (Task::Serve(settings) | Task::Doctor(settings)) = Task::new(self.words.clone())?;
        Ok(settings)
    }
    /// Whether the daemon may listen there: where others reach it, it needs keys.
    ///
    /// # Errors
    /// If it has none.
    pub fn may_listen(&self, address: SocketAddr) -> anyhow::Result<()> {
        let open = !address.ip().is_loopback() && self.keys.is_empty();
        ensure!(!open, "{address} can be reached by others: it needs --api-key-file");
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn task(words: &[&str]) -> anyhow::Result<Task> {
        Task::new(words)
    }
    fn settings(words: &[&str]) -> Settings {
        match task(&[&["bitnetd"], words].concat()).unwrap() {
            Task::Serve(settings) | Task::Doctor(settings) => settings,
        }
    }
    fn file(text: &str) -> tempfile::NamedTempFile {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), text).unwrap();
        file
    }

    #[test]
    fn a_file_gives_defaults_and_words_go_before_it() {
        let file = file(
            "# A comment.\nmodel = 'a.bitnet'\nsessions = 8\nthreads = 2\nread-seconds = 1_0\nprompt-cache = \"1M\"\n\
             allow-host = ['pi.local', 'pi']\nmeasure-bandwidth = true\npin = false\nlog = 'json'\n",
        );
        let path = file.path().to_str().unwrap();
        let read = settings(&["--config", path, "--sessions", "2"]);
        assert_eq!((read.sessions, read.name.as_str()), (2, "a"));
        assert_eq!(read.serve.hosts, ["pi.local", "pi"]);
        assert_eq!(read.serve.read_seconds, Duration::from_secs(10));
        assert_eq!(read.serve.prompt_cache, Some(1 << 20));
        assert!(read.serve.measure_bandwidth && !read.model.threads.pin);
        assert_eq!(read.serve.log, log::Form::Json);
        // What the file does not say is as without it.
        assert_eq!(read.serve.queue, settings(&["--model", "x"]).serve.queue);
        let words = ["bitnetd", "doctor", "--config", path];
        assert!(matches!(task(&words).unwrap(), Task::Doctor(settings) if settings.sessions == 8));
        let here = settings(&["--config", path, "--model", "b.bitnet", "--allow-host", "other"]);
        assert_eq!((here.name.as_str(), &*here.serve.hosts), ("b", &["other".to_owned()][..]));
    }

    #[test]
    fn every_option_has_a_variable_which_goes_before_the_file() {
        for arg in options().get_arguments().filter(|arg| arg.get_long().is_some_and(|long| long != "backend")) {
            let (long, variable) = (arg.get_long().unwrap(), arg.get_env().unwrap().to_str().unwrap());
            assert_eq!(variable.strip_prefix("BITNETD_").unwrap().to_lowercase().replace('_', "-"), long);
        }
        // The environment of a process is its own, so that this test asks another variable of its own process.
        let path = std::env::var_os("PATH").unwrap();
        let asked = options().mut_arg("model_name", |arg| arg.env("PATH"));
        let asked = from_text(asked, "model-name = 'file'").unwrap();
        let name = |words: &[&str]| {
            let matches = asked.clone().try_get_matches_from(words).unwrap();
            OsString::from(matches.get_one::<String>("model_name").unwrap())
        };
        assert_eq!(name(&["bitnetd", "--model", "x"]), path);
        assert_eq!(name(&["bitnetd", "--model", "x", "--model-name", "word"]), "word");
    }

    #[test]
    fn what_is_wrong_with_a_file_is_told_by_name_and_line() {
        for (text, expected) in [
            ("sessions = 1\n\nsesions = 2\n", ":3: there is no option `sesions`"),
            ("config = 'x'", ":1: there is no option `config`"),
            ("help = true", ":1: there is no option `help`"),
            ("sessions = 1000", ":1: invalid value '1000' for '--sessions <SESSIONS>'"),
            ("\nsessions = 'many'", ":2: invalid value 'many' for '--sessions <SESSIONS>'"),
            ("reply-seconds = 18446744073709551615", ":1: "),
            ("reply-seconds = 100000000000", ":1: invalid value '100000000000' for '--reply-seconds <SECONDS>'"),
            ("read-seconds = 0", ":1: invalid value '0'"),
            ("pin = 'perhaps'", ":1: invalid value 'perhaps'"),
            ("queue = [1, 2]", ":1: the argument '--queue <QUEUE>' cannot be used multiple times"),
            ("queue = []", ":1: `queue` is empty"),
            ("[server]\nqueue = 1", ":1: there is no option `server`"),
            ("queue = { a = 1 }", ":1: `queue` is no text, number or list of these"),
            ("queue = 1\nqueue = 2", ":2: "),
            ("queue = 1\nqueue", ":2: "),
            ("model = \"\u{0}\"", ":1: "),
        ] {
            let file = file(text);
            let error = task(&["bitnetd", "--model", "x", "--config", file.path().to_str().unwrap()]).unwrap_err();
            assert!(error.to_string().contains(expected), "{text}: {error}");
        }
        let missing = task(&["bitnetd", "--config", "/nowhere/bitnetd.toml"]).unwrap_err();
        assert!(format!("{missing:#}").starts_with("reading /nowhere/bitnetd.toml: "), "{missing:#}");
        let none = task(&["bitnetd", "--config", file("sessions = 2").path().to_str().unwrap()]).unwrap_err();
        assert!(none.to_string().contains("--model <IMAGE>"), "{none}");
    }

    #[test]
    fn times_are_bounded() {
        for option in ["--reply-seconds", "--read-seconds", "--stall-seconds", "--drain-seconds", "--unload-after"] {
            for wrong in ["0", "-1", "31536001", "18446744073709551615", "1e3", ""] {
                let error = task(&["bitnetd", "--model", "x", &format!("{option}={wrong}")]).unwrap_err();
                assert!(error.to_string().contains("seconds from 1 to 31536000"), "{option} {wrong}: {error}");
            }
            settings(&["--model", "x", option, "31536000"]);
        }
    }
}
