//! `bitnet run`: continue a prompt.
use crate::bench::{ffn_live, head_rows};
use crate::output;
use crate::sampling::SamplingArgs;
use anyhow::{Context as _, ensure};
use bitnet_host::open::{ModelArgs, Opened, mib, with_model};
use bitnet_host::system;
use bitnet_kernel::Block;
use bitnet_runtime::generate::{Event, Finish, Until};
use bitnet_runtime::lookup;
use bitnet_runtime::model::{HeadStats, LiveRows};
use bitnet_runtime::parallel::Tuned;
use bitnet_runtime::source::RingStats;
use bitnet_runtime::tokenizer::{TextStream, Tokenizer};
use std::fmt::Write as _;
use std::io::Read as _;
use std::ops::ControlFlow;
use std::path::PathBuf;
use std::time::{Duration, Instant};

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    model: ModelArgs,
    /// The text to continue; `-` or nothing reads standard input.
    #[arg(conflicts_with_all = ["file", "ids"])]
    prompt: Option<String>,
    /// Read the text to continue from a file.
    #[arg(long, conflicts_with = "ids")]
    file: Option<PathBuf>,
    /// Token ids in place of a text, separated by commas; nothing is added to them.
    #[arg(long, value_delimiter = ',', num_args = 1..)]
    ids: Option<Vec<u32>>,
    #[command(flatten)]
    sampling: SamplingArgs,
    /// Print the ids of the reply's tokens, separated by commas, in place of text.
    #[arg(long)]
    print_ids: bool,
    /// Do not print the prompt before its continuation.
    #[arg(long)]
    no_echo: bool,
    /// Print speed, sizes and memory on standard error afterwards.
    #[arg(long)]
    stats: bool,
}

/// Longest prompt file: far beyond any context.
const PROMPT_BYTES_MAX: u64 = 64 << 20;

pub(crate) fn run(args: &Args) -> anyhow::Result<()> {
    let prompt = match &args.ids {
        Some(_) => String::new(),
        None => prompt(args)?,
    };
    with_model(&args.model, |opened| generate(args, &prompt, opened))
}

fn prompt(args: &Args) -> anyhow::Result<String> {
    let read = |reader: &mut dyn std::io::Read, what: &str| {
        let mut bytes = Vec::new();
        reader.take(PROMPT_BYTES_MAX + 1).read_to_end(&mut bytes).with_context(|| what.to_owned())?;
        ensure!(bytes.len() as u64 <= PROMPT_BYTES_MAX, "{what} is longer than {PROMPT_BYTES_MAX} bytes");
        String::from_utf8(bytes)
            .map_err(|e| anyhow::anyhow!("{what} is not UTF-8 (byte {})", e.utf8_error().valid_up_to()))
    };
    match (&args.prompt, &args.file) {
        (Some(prompt), None) if prompt != "-" => Ok(prompt.clone()),
        (None, Some(path)) => {
            let name = path.display().to_string();
            ensure!(path.is_file(), "{name} is not a file");
            read(&mut std::fs::File::open(path).with_context(|| name.clone())?, &name)
        }
        _ => read(&mut std::io::stdin().lock(), "standard input"),
    }
}

fn generate(args: &Args, prompt: &str, opened: Opened<'_>) -> anyhow::Result<()> {
    let text = opened.image.header().text;
    let (image, needs_text) = (opened.image, args.ids.is_none() || !args.print_ids);
    let tokenizer = match Tokenizer::load(&image, opened.source) {
        Ok(tokenizer) => Some(tokenizer),
        Err(e) => {
            ensure!(!needs_text, "{e}; use --ids together with --print-ids for an image without one");
            None
        }
    };
    let ids = match (&args.ids, &tokenizer) {
        (Some(ids), _) => ids.clone(),
        (None, Some(tokenizer)) => tokenizer.bos().into_iter().chain(tokenizer.encode(prompt)?).collect(),
        (None, None) => Vec::new(),
    };
    ensure!(!ids.is_empty(), "the prompt is empty");

    let (backend, threads) = (opened.kernels.name(), opened.threads);
    let (planned, file_bytes) = (opened.plan_text(), image.file_bytes());
    let (mapped, streamed) = (opened.weights.mapped(), opened.stream);
    let (model, state, sampler) = opened.load()?;
    let mut session = args.sampling.session(model, state, sampler)?;

    let start = Instant::now();
    session.prompt(&ids)?;
    let prefill = start.elapsed();
    if !args.print_ids && !args.no_echo {
        output::write(prompt)?;
    }
    let mut stream = tokenizer.as_ref().map(|t| TextStream::new(t, &args.sampling.stops));
    let (mut produced, mut failure) = (0, None);
    let start = Instant::now();
    let until = Until { max_tokens: args.sampling.max_tokens, stop_ids: text.stop.ids() };
    let finish = session.generate(until, stream.as_mut(), &mut |event| {
        let written = match event {
            Event::Token(token) => {
                produced += 1;
                let separator = if produced == 1 { "" } else { "," };
                if args.print_ids { output::write(&format!("{separator}{token}")) } else { Ok(()) }
            }
            Event::Text(text) if !args.print_ids => output::write(text),
            Event::Text(_) => Ok(()),
        };
        failure = written.err();
        if failure.is_some() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    })?;
    let decode = start.elapsed();
    if let Some(e) = failure {
        return Err(e.into());
    }
    output::write("\n")?;
    if finish == Finish::Context {
        output::note(&format!("(the context of {} tokens is full)\n", session.model().limits().context));
    }
    if args.stats {
        let speed = Speed { prompt: ids.len(), prefill, produced, decode, lookup: session.lookup() };
        let head = head_rows(&image, HeadStats::default(), session.model().head_stats());
        output::note(&stats(&speed, backend, threads, &planned, file_bytes, mapped));
        if let Some(stream) = streamed {
            let RingStats { blocks, reading, waiting, .. } = stream.watch.stats();
            let read = blocks * Block::BYTES as u64;
            let rate = read as f64 / 1e6 / reading.as_secs_f64().max(1e-9);
            let (read, waiting) = (mib(read), waiting.as_secs_f64());
            output::note(&format!("stream: {read} read at {rate:.0} MB/s, computation waited {waiting:.2} s\n"));
        }
        if let (Some([up, down]), dead) = ffn_live(&image, LiveRows::default(), session.model().live_rows()) {
            let (up, down) = (100.0 * up, 100.0 * down);
            output::note(&format!("ffn: {up:.0} % of up and {down:.0} % of down read, {} a token not\n", mib(dead)));
        }
        if let (Some(rows), unread) = head {
            output::note(&format!("head: {rows:.1} rows of the second plane a token, {} not read\n", mib(unread)));
        }
    }
    Ok(())
}

struct Speed {
    prompt: usize,
    prefill: Duration,
    produced: usize,
    decode: Duration,
    lookup: Option<lookup::Stats>,
}

fn stats(speed: &Speed, backend: &str, threads: &Tuned, planned: &str, file_bytes: u64, mapped: u64) -> String {
    let rate = |n: usize, t: Duration| n as f64 / t.as_secs_f64().max(1e-9);
    let Speed { prompt, prefill, produced, decode, lookup } = *speed;
    let mut s = String::new();
    let _ = writeln!(s, "prefill: {prompt} tokens, {:.1} tokens/s", rate(prompt, prefill));
    // The first token's logits are the prompt's.
    let steps = produced.saturating_sub(1);
    let _ = writeln!(s, "decode: {produced} tokens, {:.1} tokens/s", rate(steps, decode));
    if let Some(lookup) = lookup {
        let lookup::Stats { passes, drafted, accepted } = lookup;
        let each = lookup.tokens_per_pass();
        let _ = writeln!(s, "lookup: {drafted} drafted, {accepted} accepted, {passes} passes, {each:.2} tokens a pass");
    }
    let _ = writeln!(s, "backend: {backend}");
    let _ = writeln!(s, "threads: prefill {}; decode {}", threads.prefill(), threads.decode());
    let _ = writeln!(s, "image size: {}", mib(file_bytes));
    let _ = writeln!(s, "RAM planned: {planned}");
    if let (Some(peak), Some(own)) = (system::peak_rss(), system::anonymous_rss()) {
        // The code of the program is read from its file when it runs and dropped when memory is short, as for any program.
        let code = mib(peak.saturating_sub(own + mapped));
        let _ = writeln!(s, "RAM used: {} and {code} of program code", mib(own + mapped));
    }
    s
}
