//! `cargo xtask evaluate`: the table of what each image of a model costs and how well it predicts, early and late in a
//! conversation.
//!
//! Time is the best of all repetitions of several rounds, each of which goes through all lengths of a conversation, so that
//! whatever else the machine does meets all of them alike. Positions are skipped, not read: see `bitnet bench --position`.

use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

use crate::run;
use crate::workspace::Workspace;

/// Lengths of a conversation, in tokens.
const POSITIONS: [(&str, u64); 3] = [("1k", 1_000), ("32k", 32_000), ("1M", 1_000_000)];
/// Tokens that are timed at each, and how often.
const TOKENS: u64 = 32;
const REPETITIONS: &str = "5";
const ROUNDS: usize = 3;
/// Beyond so many bytes a token takes long enough for fewer.
const LONG_BYTES: u64 = 256 << 20;
/// Pieces in which tokens are predicted: the first is what the models are trained on.
const PIECES: [u64; 3] = [192, 512, 2_048];
/// As training holds them out: of the first 40,000 ids what fills batches of 8.
const HELD_OUT: &str = "39937";

const USAGE: &str = "\
evaluate IDS IMAGE...: IDS are token ids, little-endian u16; the table is named by the images' files";

/// What a token takes at one length.
#[derive(Clone, Copy, Debug)]
struct Cost {
    seconds: f64,
    read: u64,
    ram: u64,
}

/// One line of the table.
#[derive(Debug)]
struct Row {
    name: String,
    /// By [`PIECES`]; nothing where a conversation ends before.
    nats: Vec<Option<f64>>,
    bits: f64,
    bytes: u64,
    /// By [`POSITIONS`]; nothing where a conversation ends before.
    costs: Vec<Option<Cost>>,
    /// Where conversations have no end: see [`times_as_long`].
    late: Option<f64>,
}

pub(crate) fn run(workspace: &Workspace, arguments: &[String]) -> Result<bool> {
    let [ids, images @ ..] = arguments else { bail!(USAGE) };
    ensure!(!images.is_empty(), USAGE);
    let [bitnet, packer] = &run::release_programs(workspace)?;
    let rows = images.iter().map(|image| row(bitnet, packer, ids, image)).collect::<Result<Vec<_>>>()?;
    print(&rows);
    Ok(true)
}

fn row(bitnet: &str, packer: &str, ids: &str, image: &str) -> Result<Row> {
    let name = Path::new(image).file_stem().context("an image has a name")?.to_string_lossy().into_owned();
    eprintln!("{name}");
    let summary = json(packer, &["inspect", image, "--json"])?;
    let config = &summary["config"];
    let bounded = config["window"].is_null() && config["recurrence"] != true;
    let context = if bounded { number(&config["context"])? } else { u64::MAX };
    let layers = summary["layers"].as_array().context("layers")?;
    let sum = |key: &str| -> Result<u64> {
        layers.iter().filter(|layer| !layer["layer"].is_null()).map(|layer| number(&layer[key])).sum()
    };
    let bits = sum("bits")? as f64 / sum("weights")? as f64;
    let scored = |piece: u64| {
        let arguments = ["perplexity", image, ids, "--ids", &piece.to_string(), "--max-tokens", HELD_OUT, "--json"];
        json(bitnet, &arguments)?["nats_per_token"].as_f64().context("nats")
    };
    let nats = PIECES.iter().map(|&piece| (piece <= context).then(|| scored(piece)).transpose());
    let nats = nats.collect::<Result<Vec<_>>>()?;
    let mut costs = vec![None; POSITIONS.len()];
    for _ in 0..ROUNDS {
        for (cost, (_, position)) in costs.iter_mut().zip(POSITIONS) {
            if position + TOKENS <= context {
                *cost = Some(better(*cost, bench(bitnet, image, position, bounded)?));
            }
        }
    }
    let late = if bounded { None } else { Some(times_as_long(bitnet, image)?) };
    let bytes = number(&summary["image_bytes"])?;
    Ok(Row { name, nats, bits, bytes, costs, late })
}

fn better(old: Option<Cost>, new: Cost) -> Cost {
    old.filter(|old| old.seconds < new.seconds).unwrap_or(new)
}

/// Decodes late in a conversation, on one thread.
fn bench(bitnet: &str, image: &str, position: u64, bounded: bool) -> Result<Cost> {
    let once = |tokens: u64, repetitions: &str| {
        let (at, tokens, context) = (position.to_string(), tokens.to_string(), (position + TOKENS).to_string());
        let mut arguments = vec!["bench", image, "--position", &at, "--tokens", &tokens, "--repetitions", repetitions];
        arguments.extend(["--prompt-tokens", "256", "--threads", "1", "--source", "resident", "--json"]);
        if bounded {
            arguments.extend(["--context", &context]);
        }
        json(bitnet, &arguments)
    };
    let mut found = once(1, "1")?;
    if number(&found["bytes_per_token"])? < LONG_BYTES {
        found = once(TOKENS, REPETITIONS)?;
    }
    let fastest = found["decode_range"][1].as_f64().context("decode_range")?;
    Ok(Cost { seconds: 1.0 / fastest, read: number(&found["bytes_per_token"])?, ram: number(&found["plan_bytes"])? })
}

/// How many times as long a token takes at the last position as at the first: the two by turns, some milliseconds each, so that whatever
/// else the machine does befalls both.
fn times_as_long(bitnet: &str, image: &str) -> Result<f64> {
    let positions = format!("{},{}", POSITIONS[0].1, POSITIONS[POSITIONS.len() - 1].1);
    let arguments =
        ["bench", image, "--position", &positions, "--tokens", "32", "--repetitions", "401", "--threads", "1"];
    let found = json(bitnet, &[&arguments[..], &["--prompt-tokens", "70", "--source", "resident", "--json"]].concat())?;
    found["others"][0]["times_as_long"].as_f64().context("times_as_long")
}

fn number(value: &Value) -> Result<u64> {
    value.as_u64().with_context(|| format!("{value} is no whole number"))
}

/// What a program prints.
fn json(program: &str, arguments: &[&str]) -> Result<Value> {
    let output = Command::new(program).args(arguments).stdin(Stdio::null()).stderr(Stdio::inherit()).output()?;
    ensure!(output.status.success(), "{program} {} failed", arguments.join(" "));
    Ok(serde_json::from_slice(&output.stdout)?)
}

fn print(rows: &[Row]) {
    let pieces = PIECES.map(|piece| format!("in pieces of {piece}")).join(" | ");
    say!("| image | held out, nats a token, {pieces} | bits a weight | image, bytes |");
    say!("|{}", "---|".repeat(3 + PIECES.len()));
    for Row { name, nats, bits, bytes, .. } in rows {
        let nats: Vec<_> = nats.iter().map(|nats| nats.map_or("-".to_owned(), |nats| format!("{nats:.3}"))).collect();
        say!("| {name} | {} | {bits:.3} | {bytes} |", nats.join(" | "));
    }
    let each = |what: &str| POSITIONS.map(|(name, _)| format!("{what} at {name}")).join(" | ");
    say!("\n| image | {} | {} | {} |", each("RAM, KiB"), each("read, KiB"), each("µs"));
    say!("|{}", "---|".repeat(1 + 3 * POSITIONS.len()));
    for row in rows {
        let cells = |cell: fn(Cost) -> f64| {
            let cell = |cost: &Option<Cost>| cost.map_or("-".to_owned(), |cost| format!("{:.0}", cell(cost)));
            row.costs.iter().map(cell).collect::<Vec<_>>().join(" | ")
        };
        let (ram, read, time) =
            (cells(|c| c.ram as f64 / 1024.0), cells(|c| c.read as f64 / 1024.0), cells(|c| c.seconds * 1e6));
        say!("| {} | {ram} | {read} | {time} |", row.name);
    }
    let [short, middle, long] = [0, 1, 2];
    for row in rows {
        let (Some(late), Some(a), Some(b)) = (row.late, row.costs[short], row.costs[long]) else { continue };
        let percent = |a: f64, b: f64| 100.0 * (b / a - 1.0);
        say!(
            "\n{}: from 1k to 1M tokens {:+.1} % time and {:+.1} % RAM",
            row.name,
            100.0 * (late - 1.0),
            percent(a.ram as f64, b.ram as f64)
        );
        let dense = rows.iter().find_map(|row| Some((&row.name, row.costs[middle].filter(|_| row.late.is_none())?)));
        let Some((name, dense)) = dense else { continue };
        say!(
            "{} at 1M against {name} at 32k: {:.1} times as fast, a {:.0}th of its RAM",
            row.name,
            dense.seconds / b.seconds,
            dense.ram as f64 / b.ram as f64
        );
    }
}
