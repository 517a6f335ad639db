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
    /// The file is no text but ids of tokens, little-endian u16, as those that models are trained on: so many are read, each time
    /// from an empty conversation, and each is asked for the one after it.
    #[arg(long, value_name = "PIECE", value_parser = clap::value_parser!(u32).range(1..), conflicts_with = "against")]
    ids: Option<u32>,
    /// Score at most so many tokens.
    #[arg(long)]
    max_tokens: Option<usize>,
    /// Compare with another image of the same tokenizer, as the model in half precision that this one was packed from: how far
    /// the probabilities of this one are from those of the other (Kullback-Leibler divergence in nats a token), and for how many
    /// tokens both have the same best one.
    #[arg(long, value_name = "IMAGE")]
    against: Option<PathBuf>,
    /// Print one JSON object.
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(args: &Args) -> anyhow::Result<()> {
    let name = args.text.display();
    let bytes = std::fs::read(&args.text).with_context(|| format!("{name}"))?;
    let score = if args.ids.is_some() {
        let (pairs, rest) = bytes.as_chunks();
        ensure!(rest.is_empty(), "{name}: an odd number of bytes is no list of u16");
        let ids: Vec<u32> = pairs.iter().map(|&pair| u16::from_le_bytes(pair).into()).collect();
        with_model(&args.model, |opened| score_ids(args, ids, opened))?
    } else {
        let text = String::from_utf8(bytes).with_context(|| format!("{name}"))?;
        with_model(&args.model, |opened| match &args.against {
            None => score(args, &text, opened, None),
            Some(image) => {
                let against = ModelArgs { image: image.clone(), ..args.model.clone() };
                with_model(&against, |other| score(args, &text, opened, Some(other)))
            }
        })?
    };
    let tokens = score.tokens as f64;
    let nats = score.nats / tokens;
    let bits = score.nats / std::f64::consts::LN_2 / score.bytes as f64;
    let divergence = score.divergence.map(|d| (d.nats / tokens, d.same as f64 / tokens, (d.other / tokens).exp()));
    if args.json {
        let mut object = serde_json::json!({
            "tokens": score.tokens,
            "bytes": score.bytes,
            "nats_per_token": nats,
            "bits_per_byte": bits,
            "perplexity": nats.exp(),
        });
        if let Some((kl, same, perplexity)) = divergence {
            object["kl_nats_per_token"] = kl.into();
            object["same_best"] = same.into();
            object["perplexity_against"] = perplexity.into();
        }
        return Ok(output::write(&format!("{object}\n"))?);
    }
    output::write(&format!(
        "{} tokens, {} bytes: {nats:.4} nats a token (perplexity {:.3}), {bits:.4} bits a byte\n",
        score.tokens,
        score.bytes,
        nats.exp()
    ))?;
    let Some((kl, same, perplexity)) = divergence else { return Ok(()) };
    output::write(&format!(
        "against perplexity {perplexity:.3}: divergence {kl:.5} nats a token, the same best token in {:.2}%\n",
        same * 100.0
    ))?;
    Ok(())
}

#[derive(Default)]
struct Score {
    nats: f64,
    tokens: usize,
    bytes: usize,
    divergence: Option<Divergence>,
}

/// Sums over tokens.
#[derive(Clone, Copy, Debug, Default)]
struct Divergence {
    /// Of the divergence.
    nats: f64,
    /// Tokens for which both have the same best one.
    same: usize,
    /// Of the other's negative log probabilities.
    other: f64,
}

/// Tokens instead of a text, in pieces that share the token between them: the last that one is asked for is the next one's first.
fn score_ids(args: &Args, mut ids: Vec<u32>, opened: Opened<'_>) -> anyhow::Result<Score> {
    let tokenizer = Tokenizer::load(&opened.image, opened.source)?;
    ids.truncate(args.max_tokens.unwrap_or(usize::MAX));
    ensure!(ids.len() >= 2, "the file has fewer than two tokens");
    let vocab = opened.image.header().config.vocab;
    ensure!(ids.iter().all(|&id| id < vocab), "the file has ids beyond the {vocab} of the model");
    let piece = args.ids.expect("pieces were asked for") as usize;
    let (mut model, mut state, _) = opened.load()?;
    let mut score = Score::default();
    for start in (0..ids.len() - 1).step_by(piece) {
        let end = ids.len().min(start + piece + 1);
        state.rewind(0);
        model.prefill_each(&mut state, &ids[start..end - 1], &mut |i, logits| {
            let next = ids[start + i + 1];
            score.nats += negative_log_probability(logits, next);
            score.tokens += 1;
            score.bytes += tokenizer.bytes(next).len();
        })?;
    }
    Ok(score)
}

/// The text is cut into windows of the context's length. Every window starts with the token that starts a conversation, or,
/// in models without one, with a token that is not scored. Both models read a batch in turn.
fn score(args: &Args, text: &str, opened: Opened<'_>, other: Option<Opened<'_>>) -> anyhow::Result<Score> {
    let tokenizer = Tokenizer::load(&opened.image, opened.source)?;
    let mut tokens = tokenizer.encode(text)?;
    let mut other = match other {
        Some(other) => {
            let (config, vocab) = (opened.image.header().config, other.image.header().config.vocab);
            ensure!(vocab == config.vocab, "the models have {} and {vocab} tokens", config.vocab);
            let theirs = Tokenizer::load(&other.image, other.source)?;
            let same = theirs.bos() == tokenizer.bos() && theirs.encode(text)? == tokens;
            ensure!(same, "the two images have different tokenizers");
            ensure!(other.limits.context >= opened.limits.context, "the other's context is shorter; give a --context");
            Some(other.load()?)
        }
        None => None,
    };
    tokens.truncate(args.max_tokens.unwrap_or(usize::MAX));
    ensure!(tokens.len() >= 2, "the text has fewer than two tokens");
    let bos = tokenizer.bos();
    let window = opened.limits.context as usize - usize::from(bos.is_some());
    ensure!(window >= 2, "a context of {} is too short", opened.limits.context);

    let batch = opened.limits.batch as usize;
    let (mut model, mut state, _) = opened.load()?;
    // Hidden where standard error is not a terminal.
    let bar = ProgressBar::new(tokens.len() as u64);
    bar.set_style(ProgressStyle::with_template("{bar:40} {pos}/{len} tokens, {eta} left")?);
    let mut score = Score { divergence: other.is_some().then(Divergence::default), ..Score::default() };
    for part in tokens.chunks(window) {
        let input: Vec<u32> = bos.into_iter().chain(part.iter().copied()).collect();
        state.rewind(0);
        if let Some((_, state, _)) = &mut other {
            state.rewind(0);
        }
        let (read, _) = input.split_at(input.len() - 1);
        for (read, next) in read.chunks(batch).zip(input[1..].chunks(batch)) {
            let mut found: Vec<Vec<f32>> = Vec::new();
            model.prefill_each(&mut state, read, &mut |i, logits| {
                score.nats += negative_log_probability(logits, next[i]);
                score.tokens += 1;
                score.bytes += tokenizer.bytes(next[i]).len();
                if score.divergence.is_some() {
                    found.push(logits.to_vec());
                }
                bar.inc(1);
            })?;
            if let (Some((model, state, _)), Some(sums)) = (&mut other, &mut score.divergence) {
                model.prefill_each(state, read, &mut |i, logits| {
                    sums.nats += divergence(logits, &found[i]);
                    sums.same += usize::from(best(logits) == best(&found[i]));
                    sums.other += negative_log_probability(logits, next[i]);
                })?;
            }
        }
    }
    bar.finish_and_clear();
    Ok(score)
}

/// The Kullback-Leibler divergence of the probabilities `q` from those of `p`, both as logits: `Σ p (ln p - ln q)`, in double
/// precision.
fn divergence(p: &[f32], q: &[f32]) -> f64 {
    let logarithm = |logits: &[f32]| {
        let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let sum: f64 = logits.iter().map(|&l| f64::from(l - max).exp()).sum();
        f64::from(max) + sum.ln()
    };
    let (all_p, all_q) = (logarithm(p), logarithm(q));
    let terms = p.iter().zip(q).map(|(&p, &q)| {
        let (p, q) = (f64::from(p) - all_p, f64::from(q) - all_q);
        p.exp() * (p - q)
    });
    terms.sum()
}

/// The first of the best.
fn best(logits: &[f32]) -> Option<usize> {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    logits.iter().position(|&l| l == max)
}

/// `-ln softmax(logits)[token]`, in double precision.
fn negative_log_probability(logits: &[f32], token: u32) -> f64 {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = logits.iter().map(|&l| f64::from(l - max).exp()).sum();
    sum.ln() - f64::from(logits[token as usize] - max)
}

#[cfg(test)]
mod tests {
    use super::{best, divergence};

    /// By hand: a half and a half against three quarters and a quarter.
    #[test]
    fn divergence_of_two_coins() {
        let (p, q) = ([7.0, 7.0], [3.0f32.ln(), 0.0]);
        let expected = 0.5 * (0.5f64 / 0.75).ln() + 0.5 * (0.5f64 / 0.25).ln();
        assert!((divergence(&p, &q) - expected).abs() < 1e-7);
        let other = 0.75 * (0.75f64 / 0.5).ln() + 0.25 * (0.25f64 / 0.5).ln();
        assert!((divergence(&q, &p) - other).abs() < 1e-7);
        assert_eq!(divergence(&p, &p), 0.0);
        assert_eq!(best(&[1.0, 3.0, 3.0]), Some(1));
    }
}
