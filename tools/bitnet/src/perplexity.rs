//! `bitnet perplexity`: how well a model predicts a text.
use crate::output;
use anyhow::{Context as _, ensure};
use bitnet_host::open::{ModelArgs, Opened, with_model};
use bitnet_runtime::tokenizer::Tokenizer;
use indicatif::{ProgressBar, ProgressStyle};
use std::path::PathBuf;

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    model: ModelArgs,
    /// The text, UTF-8.
    text: PathBuf,
    /// Score at most so many tokens.
    #[arg(long)]
    max_tokens: Option<usize>,
    /// Print one JSON object.
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(args: &Args) -> anyhow::Result<()> {
    let name = args.text.display();
    let text = std::fs::read_to_string(&args.text).with_context(|| format!("{name}"))?;
    with_model(&args.model, |opened| {
        let score = score(args, &text, opened)?;
        let nats = score.nats / score.tokens as f64;
        let bits = score.nats / std::f64::consts::LN_2 / score.bytes as f64;
        if args.json {
            let object = serde_json::json!({
                "tokens": score.tokens,
                "bytes": score.bytes,
                "nats_per_token": nats,
                "bits_per_byte": bits,
                "perplexity": nats.exp(),
            });
            output::write(&format!("{object}\n"))?;
        } else {
            output::write(&format!(
                "{} tokens, {} bytes: {nats:.4} nats a token (perplexity {:.3}), {bits:.4} bits a byte\n",
                score.tokens,
                score.bytes,
                nats.exp()
            ))?;
        }
        Ok(())
    })
}

struct Score {
    nats: f64,
    tokens: usize,
    bytes: usize,
}

/// The text is cut into windows of the context's length. Every window starts with the token that starts a conversation, or,
/// in models without one, with a token that is not scored.
fn score(args: &Args, text: &str, opened: Opened<'_>) -> anyhow::Result<Score> {
    let tokenizer = Tokenizer::load(&opened.image, opened.source)?;
    let mut tokens = tokenizer.encode(text)?;
    tokens.truncate(args.max_tokens.unwrap_or(usize::MAX));
    ensure!(tokens.len() >= 2, "the text has fewer than two tokens");
    let bos = tokenizer.bos();
    let window = opened.limits.context as usize - usize::from(bos.is_some());
    ensure!(window >= 2, "a context of {} is too short", opened.limits.context);

    let (mut model, mut state, _) = opened.load()?;
    // Hidden where standard error is not a terminal.
    let bar = ProgressBar::new(tokens.len() as u64);
    bar.set_style(ProgressStyle::with_template("{bar:40} {pos}/{len} tokens, {eta} left")?);
    let mut score = Score { nats: 0.0, tokens: 0, bytes: 0 };
    for part in tokens.chunks(window) {
        let input: Vec<u32> = bos.into_iter().chain(part.iter().copied()).collect();
        state.rewind(0);
        let (read, _) = input.split_at(input.len() - 1);
        if read.is_empty() {
            continue;
        }
        model.prefill_each(&mut state, read, &mut |i, logits| {
            let next = input[i + 1];
            score.nats += negative_log_probability(logits, next);
            score.tokens += 1;
            score.bytes += tokenizer.bytes(next).len();
            bar.inc(1);
        })?;
    }
    bar.finish_and_clear();
    Ok(score)
}

/// `-ln softmax(logits)[token]`, in double precision.
fn negative_log_probability(logits: &[f32], token: u32) -> f64 {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = logits.iter().map(|&l| f64::from(l - max).exp()).sum();
    sum.ln() - f64::from(logits[token as usize] - max)
}
