//! `cargo xtask layouts`: whether `bitnet tune` chooses what is fastest, found out without it.
//!
//! Checkpoints in the shape of BitNet b1.58 2B4T with 65 % of every linear left out, by rows, by columns, by both or by blocks, are
//! packed in every layout; those and the image that `bitnet tune` makes decode by turns. The tuner times products by themselves,
//! here passes are timed: one may not be more than 3 % slower than the fastest of the others.

use std::fs::{self, File};
use std::io::{BufWriter, Write as _};
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Map, Value, json};

use crate::run;
use crate::workspace::Workspace;

const HIDDEN: u64 = 2560;
const KV: u64 = 640;
const FFN: u64 = 6912;
const VOCAB: u64 = 512;
/// Enough that the linears are far larger than any cache, pruned as they are.
const LAYERS: u64 = 16;
/// What of a thousand rows, columns or blocks is left.
const LEFT: u64 = 350;
const TOKENIZER: &str = "models/stories-ternary/tokenizer.json";
/// Forced by `bitnet-pack pack --layout`.
const LAYOUTS: [&str; 4] = ["whole", "rowcol", "16x64", "16x16"];
const ROUNDS: usize = 9;
/// How much longer a token may take than with the best layout.
const MORE_AT_MOST: f64 = 0.03;

/// What is left out together.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Zeros {
    Rows,
    Columns,
    Both,
    /// Rows and columns of a block.
    Blocks(u64, u64),
}

const ZEROS: [(&str, Zeros); 5] = [
    ("rows", Zeros::Rows),
    ("columns", Zeros::Columns),
    ("both", Zeros::Both),
    ("16x64", Zeros::Blocks(16, 64)),
    ("16x16", Zeros::Blocks(16, 16)),
];

impl Zeros {
    fn keeps(self, r: u64, c: u64, seed: u64) -> bool {
        let left = |i: u64, of_thousand: u64| hash(i ^ seed << 40) % 1000 < of_thousand;
        // Of both as many as leave that share of all.
        let root = (LEFT as f64 / 1000.0).sqrt() * 1000.0;
        match self {
            Self::Rows => left(r, LEFT),
            Self::Columns => left(c, LEFT),
            Self::Both => left(r, root as u64) && left(c | 1 << 32, root as u64),
            Self::Blocks(rows, cols) => left(((r / rows) << 20) | (c / cols), LEFT),
        }
    }
}

/// The finish of SplitMix64: a number that looks like no other's.
fn hash(i: u64) -> u64 {
    let z = i.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ z >> 31
}

/// Those of [`ZEROS`] that are named, all if none is.
pub(crate) fn run(workspace: &Workspace, names: &[String]) -> Result<bool> {
    let names_of_all = ZEROS.map(|(name, _)| name);
    if let Some(unknown) = names.iter().find(|name| !names_of_all.contains(&name.as_str())) {
        bail!("nothing is left out by `{unknown}`; there are {}", names_of_all.join(", "));
    }
    let [bitnet, packer] = &run::release_programs(workspace)?;
    let folder = workspace.target.join("layouts");
    let checkpoint = folder.join("checkpoint");
    fs::create_dir_all(&checkpoint)?;
    let tokenizer = workspace.root.join(TOKENIZER).display().to_string();
    let name = |name: &str| folder.join(format!("{name}.bitnet")).display().to_string();
    say!("| left out | {} | tuned | best | tuned takes |", LAYOUTS.join(" | "));
    say!("|---|{}", "---|".repeat(LAYOUTS.len() + 3));
    let mut good = true;
    let chosen = |name: &str| names.is_empty() || names.iter().any(|chosen| chosen == name);
    for (what, zeros) in ZEROS.into_iter().filter(|(name, _)| chosen(name)) {
        eprintln!("{what}");
        write(&checkpoint, zeros)?;
        let source = checkpoint.display().to_string();
        for layout in LAYOUTS {
            quiet(packer, &["pack", &source, "--tokenizer", &tokenizer, "--layout", layout, "-o", &name(layout)])?;
        }
        let tuned = name("tuned");
        quiet(bitnet, &["tune", &name("whole"), "-o", &tuned])?;
        let images: Vec<String> = LAYOUTS.iter().map(|layout| name(layout)).chain([tuned.clone()]).collect();
        let mut times = vec![Vec::new(); images.len()];
        for _ in 0..ROUNDS {
            for (image, times) in images.iter().zip(&mut times) {
                times.push(token(bitnet, image)?);
            }
        }
        let times: Vec<f64> = times.into_iter().map(middle).collect();
        let (tuned_time, forced) = times.split_last().context("there are images")?;
        let (best, best_time) = LAYOUTS.iter().zip(forced).min_by(|a, b| a.1.total_cmp(b.1)).context("layouts")?;
        // What differs in nothing but the record of the choice takes as long, whatever a clock says.
        let same = checksums(packer, &tuned)? == checksums(packer, &name(best))?;
        let more = if same { 0.0 } else { tuned_time / best_time - 1.0 };
        let cells: Vec<String> = times.iter().map(|time| format!("{:.2}", time * 1e3)).collect();
        let more_is = if same { "the same".to_owned() } else { format!("{:+.1} %", 100.0 * more) };
        say!("| {what} | {} | {best} | {more_is} |", cells.join(" | "));
        good &= more <= MORE_AT_MOST;
    }
    fs::remove_dir_all(&folder)?;
    if !good {
        say!("error: the tuner's choice takes more than {:.0} % longer than the best", 100.0 * MORE_AT_MOST);
    }
    Ok(good)
}

fn middle(mut times: Vec<f64>) -> f64 {
    times.sort_by(f64::total_cmp);
    times[times.len() / 2]
}

/// Those of all sections.
fn checksums(packer: &str, image: &str) -> Result<Vec<Value>> {
    let summary: Value = serde_json::from_str(&quiet(packer, &["inspect", image, "--json"])?)?;
    let sections = summary["sections"].as_array().context("sections")?;
    ensure!(sections.iter().all(|section| section["checksum"].is_string()), "a section has no checksum");
    Ok(sections.iter().map(|section| section["checksum"].clone()).collect())
}

/// Seconds of one token.
fn token(bitnet: &str, image: &str) -> Result<f64> {
    let arguments = ["--context", "64", "--prompt-tokens", "8", "--tokens", "24", "--repetitions", "1", "--json"];
    let said = quiet(bitnet, &[&["bench", image][..], &arguments].concat())?;
    let found: Value = serde_json::from_str(&said)?;
    Ok(1.0 / found["decode_range"][1].as_f64().context("decode_range")?)
}

/// What a program prints.
fn quiet(program: &str, arguments: &[&str]) -> Result<String> {
    let output = Command::new(program).args(arguments).stdin(Stdio::null()).output()?;
    let error = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{program} {} failed: {error}", arguments.join(" "));
    Ok(String::from_utf8(output.stdout)?)
}

/// Writes a checkpoint of transformers' `BitNetForCausalLM`, packed, every linear with zeros of its own.
fn write(directory: &Path, zeros: Zeros) -> Result<()> {
    let config = json!({
        "architectures": ["BitNetForCausalLM"], "model_type": "bitnet", "vocab_size": VOCAB,
        "hidden_size": HIDDEN, "intermediate_size": FFN, "num_hidden_layers": LAYERS,
        "num_attention_heads": 20, "num_key_value_heads": 5, "head_dim": 128,
        "hidden_act": "relu2", "rms_norm_eps": 1e-5, "max_position_embeddings": 512, "rope_theta": 10000.0,
        "tie_word_embeddings": true, "bos_token_id": 1, "eos_token_id": 2,
        "quantization_config": {"quant_method": "bitnet", "linear_class": "autobitlinear", "quantization_mode": "offline"},
    });
    fs::write(directory.join("config.json"), serde_json::to_vec_pretty(&config)?)?;
    let (mut header, mut at) = (Map::new(), 0);
    let mut tensors: Vec<Tensor> = Vec::new();
    let mut add = |name: String, dtype: &str, shape: &[u64], size: u64, data: Data| {
        let end = at + shape.iter().product::<u64>() * size;
        header.insert(name, json!({"dtype": dtype, "shape": shape, "data_offsets": [at, end]}));
        tensors.push(Tensor { bytes: end - at, data });
        at = end;
    };
    for layer in 0..LAYERS {
        let name = |part: &str| format!("model.layers.{layer}.{part}.weight");
        for (part, n) in [
            ("input_layernorm", HIDDEN),
            ("post_attention_layernorm", HIDDEN),
            ("self_attn.attn_sub_norm", HIDDEN),
            ("mlp.ffn_sub_norm", FFN),
        ] {
            add(name(part), "F32", &[n], 4, Data::Ones);
        }
        let linears = [
            ("self_attn.q_proj", HIDDEN, HIDDEN),
            ("self_attn.k_proj", KV, HIDDEN),
            ("self_attn.v_proj", KV, HIDDEN),
            ("self_attn.o_proj", HIDDEN, HIDDEN),
            ("mlp.gate_proj", FFN, HIDDEN),
            ("mlp.up_proj", FFN, HIDDEN),
            ("mlp.down_proj", HIDDEN, FFN),
        ];
        for (i, (part, rows, cols)) in (0..).zip(linears) {
            add(name(part), "U8", &[rows / 4, cols], 1, Data::Packed { rows, cols, seed: 8 * layer + i });
            add(format!("model.layers.{layer}.{part}.weight_scale"), "F32", &[1], 4, Data::Ones);
        }
    }
    add("model.norm.weight".into(), "F32", &[HIDDEN], 4, Data::Ones);
    add("model.embed_tokens.weight".into(), "F32", &[VOCAB, HIDDEN], 4, Data::Random);

    let mut file = BufWriter::new(File::create(directory.join("model.safetensors"))?);
    let header = serde_json::to_vec(&header)?;
    file.write_all(&(header.len() as u64).to_le_bytes())?;
    file.write_all(&header)?;
    for Tensor { bytes, data } in tensors {
        match data {
            Data::Ones => (0..bytes / 4).try_for_each(|_| file.write_all(&1.0_f32.to_le_bytes()))?,
            Data::Random => (0..bytes / 4).try_for_each(|i| {
                let value = (hash(i) % 2001) as f32 / 2e4 - 0.05;
                file.write_all(&value.to_le_bytes())
            })?,
            Data::Packed { rows, cols, seed } => {
                let mut line = vec![0; cols as usize];
                for j in 0..rows / 4 {
                    for (c, byte) in (0..).zip(&mut line) {
                        // Four rows a byte, a quarter of all apart; a code is the weight and 1.
                        let code = |i: u64| {
                            let r = j + i * rows / 4;
                            let sign = hash(r * cols + c) % 3;
                            if zeros.keeps(r, c, seed) { sign << (2 * i) } else { 1 << (2 * i) }
                        };
                        *byte = (0..4).map(code).sum::<u64>() as u8;
                    }
                    file.write_all(&line)?;
                }
            }
        }
    }
    Ok(file.flush()?)
}

struct Tensor {
    bytes: u64,
    data: Data,
}

/// What a tensor has.
enum Data {
    Ones,
    Random,
    Packed { rows: u64, cols: u64, seed: u64 },
}
