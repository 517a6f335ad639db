//! `bitnet bench`: prefill and decode, beside what the memory can give.
use crate::output;
use bitnet_host::open::{ModelArgs, Opened, mib, with_model};
use bitnet_host::system;
use bitnet_host::weights::PassBytes;
use bitnet_kernel::Block;
use bitnet_runtime::image::Kind;
use bitnet_runtime::memory::read_bytes;
use bitnet_runtime::model::{HeadStats, LiveRows, Need};
use bitnet_runtime::parallel::Tuned;
use bitnet_runtime::{Image, Model, State};
use serde::Serialize;
use std::time::{Duration, Instant};

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    model: ModelArgs,
    /// Tokens of the prompt.
    #[arg(long, default_value_t = 64, value_parser = clap::value_parser!(u32).range(1..))]
    prompt_tokens: u32,
    /// Tokens to decode.
    #[arg(long, default_value_t = 32, value_parser = clap::value_parser!(u32).range(1..))]
    tokens: u32,
    /// Decode as if the conversation had so many tokens; those after the prompt are not read. For the time and the bytes that a token
    /// takes late in a conversation. Of several, as 1000,1000000, each repetition decodes at all of them, one after another, and the
    /// others are compared with the first.
    #[arg(long, value_delimiter = ',')]
    position: Vec<u32>,
    /// Compute the logits of the best so many tokens only, as choosing among them needs; 0: all. Matters to images with a
    /// two-stage head: 1 is what --temperature 0 does, 40 what `run` does by default.
    #[arg(long, default_value_t = 0)]
    best: u32,
    /// Times each is measured.
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..))]
    repetitions: u32,
    /// Print one JSON object.
    #[arg(long)]
    json: bool,
}

/// What was measured. Rates are medians, with the lowest and the highest.
#[derive(Debug, Serialize)]
struct Report {
    prefill_tokens_per_s: f64,
    prefill_range: [f64; 2],
    decode_tokens_per_s: f64,
    decode_range: [f64; 2],
    /// Bytes of weights and of the conversation that decoding one token reads; of streamed weights, those that are read from the file.
    bytes_per_token: u64,
    /// Rows of the second plane of a two-stage head that were read for a token; absent for other heads and with --best 0.
    head_rows: Option<f64>,
    /// Shares of up's rows and of down's columns that were read; absent in images that have them read whole.
    ffn_live: Option<[f64; 2]>,
    /// What as many threads read from memory in this run, at most; of streamed weights, what the same reads with nothing else
    /// to do give, of which there is a pass after each repetition: the median.
    read_gb_per_s: f64,
    /// Bytes that decoding read a second, as a share of that. Above 1 if the caches hold the model. Of streamed weights, the median
    /// of the shares that each repetition has of the reads after it, since disks change their speed from one second to the next.
    bandwidth_share: f64,
    /// Present if weights are streamed.
    stream: Option<StreamReport>,
    plan_bytes: u64,
    peak_rss_bytes: Option<u64>,
    /// While decoding.
    threads: usize,
    prefill_threads: usize,
    /// What the system grants, and why the numbers of threads are what they are.
    threads_because: String,
    backend: &'static str,
    prompt_tokens: u32,
    /// Tokens in the conversation when decoding began.
    position: u32,
    tokens: u32,
    repetitions: u32,
    /// The same at the other positions.
    others: Vec<Other>,
}

/// Decoding at another position.
#[derive(Debug, Serialize)]
struct Other {
    position: u32,
    decode_tokens_per_s: f64,
    decode_range: [f64; 2],
    /// How many times as long a token takes as at the first position in the same repetition: the median, the lowest and the highest.
    times_as_long: f64,
    times_as_long_range: [f64; 2],
}

impl Other {
    fn new(position: u32, first: &[f64], here: Vec<f64>) -> Self {
        let (times_as_long, times_as_long_range) = median(first.iter().zip(&here).map(|(a, b)| a / b).collect());
        let (decode_tokens_per_s, decode_range) = median(here);
        Self { position, decode_tokens_per_s, decode_range, times_as_long, times_as_long_range }
    }
}

/// How decoding streamed, without the measurement that came before.
#[derive(Debug, Serialize)]
struct StreamReport {
    /// Read for each token.
    bytes_per_token: u64,
    resident_bytes: u64,
    buffer_bytes: u64,
    buffers: usize,
    read_bytes: u64,
    /// Whether reads go past the page cache.
    direct: bool,
    /// Of what was read, what the computation did not use.
    dropped_share: f64,
    /// Of the time, what the computation waited for the reader.
    waited_share: f64,
    /// Threads that read.
    readers: usize,
    /// Of the time, what one of them read.
    reading_share: f64,
    /// The lowest and the highest share of a repetition, of which `bandwidth_share` is the median.
    bandwidth_range: [f64; 2],
}

pub(crate) fn run(args: &Args) -> anyhow::Result<()> {
    let report = with_model(&args.model, |opened| measure(args, opened))?;
    let read = report.bytes_per_token as f64 * report.decode_tokens_per_s / 1e9;
    if args.json {
        return Ok(output::write(&format!("{}\n", serde_json::to_string(&report)?))?);
    }
    let from = if report.stream.is_some() { "file" } else { "memory" };
    let Report { prefill_range: [p0, p1], decode_range: [d0, d1], .. } = report;
    let others = report.others.iter().map(|o| {
        let [t0, t1] = o.times_as_long_range;
        format!(
            "           {:.2} tokens/s at {}: a token takes {:.3} times as long ({t0:.3} to {t1:.3})\n",
            o.decode_tokens_per_s, o.position, o.times_as_long
        )
    });
    let others: String = others.collect();
    let peak = report.peak_rss_bytes.map_or("unknown".to_owned(), mib);
    let head = report
        .head_rows
        .map_or(String::new(), |rows| format!("head       {rows:.1} rows of the second plane a token\n"));
    let live = report.ffn_live.map_or(String::new(), |[up, down]| {
        format!("ffn        {:.0} % of up's rows and {:.0} % of down's columns read\n", 100.0 * up, 100.0 * down)
    });
    Ok(output::write(&format!(
        "backend    {}\n\
         threads    {}\n\
         prefill    {:.2} tokens/s ({p0:.2} to {p1:.2}), {} tokens\n\
         decode     {:.2} tokens/s ({d0:.2} to {d1:.2}), {} tokens, median of {}\n\
{others}{head}{live}\
         reads      {} a token, {read:.2} GB/s: {:.0} % of the {:.2} GB/s that this {from} gives\n\
         RAM        {} planned, {peak} used at most\n",
        report.backend,
        report.threads_because,
        report.prefill_tokens_per_s,
        report.prompt_tokens,
        report.decode_tokens_per_s,
        report.tokens,
        report.repetitions,
        mib(report.bytes_per_token),
        100.0 * report.bandwidth_share,
        report.read_gb_per_s,
        mib(report.plan_bytes),
    ))?)
}

fn measure(args: &Args, opened: Opened<'_>) -> anyhow::Result<Report> {
    let (backend, threads, plan_bytes) = (opened.kernels.name(), opened.threads, opened.plan_bytes());
    let (image, stream) = (opened.image, opened.stream);
    let (config, limits) = (image.header().config, opened.limits);
    let room = if config.is_bounded() { limits.context } else { u32::MAX };
    let tokens = args.tokens.min(room.saturating_sub(1)).max(1);
    let first = args.position.iter().copied().min().unwrap_or(u32::MAX);
    let prompt_tokens = args.prompt_tokens.min(room - tokens).min(first).max(1);
    let position = args.position.first().map_or(prompt_tokens, |&position| position.max(prompt_tokens));
    for &position in [position].iter().chain(&args.position) {
        anyhow::ensure!(
            u64::from(position) + u64::from(tokens) <= u64::from(room),
            "{tokens} tokens after {position} are beyond the context of {room}"
        );
    }
    let state_bytes = read_bytes(&config, &limits, u64::from(position + tokens / 2));
    let job = Job { position, tokens, need: if args.best == 0 { Need::All } else { Need::Best(args.best) } };

    let (mut model, mut state, _) = opened.load()?;
    let vocab = model.config().vocab;
    // Any tokens do: the time does not depend on them.
    let prompt: Vec<u32> = (0..prompt_tokens).map(|i| (u64::from(i) * 7_919 % u64::from(vocab)) as u32).collect();
    // Once for nothing: caches, pages, clocks. And on until the numbers of threads are settled, a while at most.
    let start = Instant::now();
    while {
        repetition(&mut model, &mut state, &prompt, &Job { tokens: tokens.min(SETTLING_TOKENS), ..job })?;
        !settled(threads) && start.elapsed() < SETTLING
    } {}
    let before = model.head_stats();
    let live_before = model.live_rows();
    let stream = stream.map(|stream| (stream, stream.watch.stats()));
    let streamed_bytes = stream.map_or(0, |(stream, _)| stream.watch.pieces().streamed_blocks() * Block::BYTES as u64);
    let (mut prefill, mut decode, mut alone, mut time) = (Vec::new(), Vec::new(), Vec::new(), Duration::ZERO);
    let mut others: Vec<(u32, Vec<f64>)> =
        args.position.iter().skip(1).map(|&position| (position, Vec::new())).collect();
    for _ in 0..args.repetitions {
        let start = Instant::now();
        let (p, d) = repetition(&mut model, &mut state, &prompt, &job)?;
        prefill.push(p);
        decode.push(d);
        for (position, decode) in &mut others {
            let position = (*position).max(prompt_tokens);
            decode.push(repetition(&mut model, &mut state, &prompt, &Job { position, ..job })?.1);
        }
        time += start.elapsed();
        if let Some((stream, _)) = stream.filter(|_| streamed_bytes > 0) {
            alone.push(stream.storage_speed()?);
        }
    }
    let shares = decode.iter().zip(&alone).map(|(decode, alone)| decode * streamed_bytes as f64 / alone);
    let shares = (!alone.is_empty()).then(|| median(shares.collect()));
    let (head_rows, unread) = head_rows(&image, before, model.head_stats());
    let (ffn_live, dead) = ffn_live(&image, live_before, model.live_rows());
    let others = others.into_iter().map(|(position, here)| Other::new(position, &decode, here)).collect();
    let ((prefill_tokens_per_s, prefill_range), (decode_tokens_per_s, decode_range)) =
        (median(prefill), median(decode));
    let peak_rss_bytes = system::peak_rss();
    let stream_report = stream.map(|(stream, before)| {
        let (now, time) = (stream.watch.stats(), time.as_secs_f64());
        StreamReport {
            bytes_per_token: streamed_bytes,
            resident_bytes: stream.resident,
            buffer_bytes: stream.buffers,
            buffers: stream.slots,
            read_bytes: u64::from(stream.watch.pieces().piece_blocks()) * Block::BYTES as u64,
            direct: stream.direct,
            dropped_share: (now.dropped - before.dropped) as f64 / (now.blocks - before.blocks).max(1) as f64,
            waited_share: (now.waiting - before.waiting).as_secs_f64() / time,
            readers: stream.readers,
            reading_share: (now.reading - before.reading).as_secs_f64() / time / stream.readers as f64,
            bandwidth_range: shares.map_or([0.0; 2], |(_, range)| range),
        }
    });
    let (bytes_per_token, read_gb_per_s, bandwidth_share) = match shares {
        Some((share, _)) => (streamed_bytes, median(alone).0 / 1e9, share),
        None => {
            let bytes = PassBytes::of(&image).token() + state_bytes - unread - dead;
            let speed = system::read_bandwidth(threads.pool(), threads.decode().threads) / 1e9;
            (bytes, speed, bytes as f64 * decode_tokens_per_s / 1e9 / speed)
        }
    };
    Ok(Report {
        prefill_tokens_per_s,
        prefill_range,
        decode_tokens_per_s,
        decode_range,
        bytes_per_token,
        head_rows,
        ffn_live,
        read_gb_per_s,
        bandwidth_share,
        stream: stream_report,
        plan_bytes,
        peak_rss_bytes,
        threads: threads.decode().threads,
        prefill_threads: threads.prefill().threads,
        threads_because: because(threads),
        backend,
        prompt_tokens,
        position,
        tokens,
        repetitions: args.repetitions,
        others,
    })
}

/// The longest time to let the numbers of threads settle, and the tokens decoded between two looks at the clock.
const SETTLING: Duration = Duration::from_secs(3);
const SETTLING_TOKENS: u32 = 8;

fn settled(threads: &Tuned) -> bool {
    threads.prefill().settled && threads.decode().settled
}

fn because(threads: &Tuned) -> String {
    format!("{}; prefill {}; decode {}", threads.granted(), threads.prefill(), threads.decode())
}

/// What is measured: a prompt, then decoding from a position on.
#[derive(Clone, Copy, Debug)]
struct Job {
    position: u32,
    tokens: u32,
    need: Need,
}

/// Tokens a second of one prefill and one decode.
fn repetition(model: &mut Model<'_>, state: &mut State<'_>, prompt: &[u32], job: &Job) -> anyhow::Result<(f64, f64)> {
    state.rewind(0);
    let start = Instant::now();
    model.prefill_for(state, prompt, job.need)?;
    let prefill = prompt.len() as f64 / start.elapsed().as_secs_f64();
    state.skip_to(job.position as usize)?;
    let start = Instant::now();
    for i in 0..job.tokens {
        model.step_for(state, i % model.config().vocab, job.need)?;
    }
    Ok((prefill, f64::from(job.tokens) / start.elapsed().as_secs_f64()))
}

/// The median, and the lowest and the highest.
fn median(mut values: Vec<f64>) -> (f64, [f64; 2]) {
    values.sort_by(f64::total_cmp);
    (values[values.len() / 2], [values[0], values[values.len() - 1]])
}

/// Rows of the low plane that one token read, and bytes of it that it did not.
pub(crate) fn head_rows(image: &Image<'_>, before: HeadStats, after: HeadStats) -> (Option<f64>, u64) {
    let tokens = after.tokens - before.tokens;
    let Some(low) = image.sections().find(Kind::HeadLow, None).filter(|_| tokens > 0) else { return (None, 0) };
    let rows = (after.rows - before.rows) as f64 / tokens as f64;
    let unread = 1.0 - rows / f64::from(low.rows.get());
    (Some(rows), (f64::from(low.blocks.get()) * Block::BYTES as f64 * unread) as u64)
}

/// Shares of up's rows and down's columns that were read, and bytes of both that one token did not read.
pub(crate) fn ffn_live(image: &Image<'_>, before: LiveRows, after: LiveRows) -> (Option<[f64; 2]>, u64) {
    let all = after.all - before.all;
    if all == 0 {
        return (None, 0);
    }
    let share = |before, after| (after - before) as f64 / all as f64;
    let (up, down) = (share(before.up, after.up), share(before.down, after.down));
    let bytes = |kind: Kind| {
        let records = image.sections().records().iter().filter(|r| r.kind == kind as u8);
        records.map(|r| u64::from(r.blocks.get())).sum::<u64>() as f64 * Block::BYTES as f64
    };
    let dead = bytes(Kind::UpRows) * (1.0 - up) + bytes(Kind::DownColumns) * (1.0 - down);
    (Some([up, down]), dead as u64)
}
