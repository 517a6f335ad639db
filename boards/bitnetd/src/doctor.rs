//! `bitnetd doctor`: what the daemon would do, and what of the model, the machine or the options is wrong.
use crate::config::Settings;
use crate::room;
use anyhow::{Context as _, ensure};
use bitnet_host::open::{Opened, mib, with_image, with_model};
use bitnet_host::weights::length;
use bitnet_host::{system, template};
use bitnet_kernel::conformance::{Difference, Workspace, check_up_to};
use bitnet_kernel::{Block, Kernels};
use bitnet_runtime::Image;
use bitnet_runtime::cgroup::available_memory;
use bitnet_runtime::model::Activation;
use bitnet_runtime::tokenizer::Tokenizer;
use std::fs::File;
use std::io::{Read as _, Write as _};
use std::path::Path;
use std::sync::{Mutex, PoisonError};
use xxhash_rust::xxh3::Xxh3Default;

/// Weights of the largest shape that is compared: a sixth of the whole self-test, which is `bitnet selftest`.
const SELF_TEST_WEIGHTS: usize = 9_000;

/// Compares kernels with the plain definition of the right answer, once in the life of a process.
///
/// # Errors
/// The first difference.
pub fn self_test(kernels: &dyn Kernels) -> anyhow::Result<()> {
    static TESTED: Mutex<Vec<(&str, Result<(), Difference>)>> = Mutex::new(Vec::new());
    let mut tested = TESTED.lock().unwrap_or_else(PoisonError::into_inner);
    let name = kernels.name();
    if let Some((_, result)) = tested.iter().find(|(of, _)| *of == name) {
        return Ok((*result)?);
    }
    let result = check_up_to(&[kernels], &mut Box::new(Workspace::ZERO), SELF_TEST_WEIGHTS);
    tested.push((name, result));
    Ok(result?)
}

/// What the model is asked to predict.
const TEXT: &str = "Once upon a time there was a little girl who lived in a small house near the woods. Every day she went out to \
                    play with her dog. One day the dog ran away, and she was very sad. She looked for him in the garden and by the \
                    river. Then she heard him bark. He was happy to see her, and they went home together.";
/// A question, to see what a chat template makes of it.
const QUESTION: &str = "Hello";

/// Degrees Celsius from which a Raspberry Pi slows down.
const HOT: f64 = 80.0;
/// What the Pi's firmware says of this moment: voltage too low, clock bounded, slowed down, near the bound of heat.
const THROTTLED_NOW: u64 = 0xf;

/// Lines for people, and whether all of them are well.
#[derive(Debug)]
struct Report {
    well: bool,
}

impl Report {
    fn line(&self, name: &str, text: &str) -> anyhow::Result<()> {
        let mut out = std::io::stdout().lock();
        writeln!(out, "{name:<13} {text}").and_then(|()| out.flush()).context("writing")
    }
    /// A line about something that may be wrong.
    fn look(&mut self, name: &str, found: anyhow::Result<String>) -> anyhow::Result<()> {
        match found {
            Ok(text) => self.line(name, &text),
            Err(e) => {
                self.well = false;
                self.line(name, &format!("WRONG: {e:#}"))
            }
        }
    }
}

/// Prints what it finds, line by line, and says whether all is well.
///
/// # Errors
/// If standard output is closed.
pub fn run(settings: &Settings) -> anyhow::Result<bool> {
    let mut report = Report { well: true };
    report.line("bitnetd", env!("CARGO_PKG_VERSION"))?;
    report.look("kernels", settings.model.backend.kernels().and_then(kernels))?;
    report.look("temperature", temperature(system::temperature()))?;
    report.look("throttled", throttled(system::throttled()))?;
    report.look("image", image(settings))?;
    report.look("memory", memory(settings))?;
    if report.well {
        let found = with_model(&room::with_reserve(settings)?, |opened| Ok(model(&mut report, opened)));
        match found {
            Ok(written) => written?,
            Err(e) => report.look("model", Err(e))?,
        }
    }
    report.line("", if report.well { "all is well" } else { "something is wrong" })?;
    Ok(report.well)
}

fn kernels(kernels: &dyn Kernels) -> anyhow::Result<String> {
    self_test(kernels)?;
    Ok(format!("{}, the same as portable", kernels.name()))
}

fn temperature(degrees: Option<f64>) -> anyhow::Result<String> {
    let Some(degrees) = degrees else { return Ok("the system does not tell".to_owned()) };
    ensure!(degrees < HOT, "{degrees:.1} °C: from {HOT} °C on a Raspberry Pi slows down");
    Ok(format!("{degrees:.1} °C"))
}

fn throttled(bits: Option<f64>) -> anyhow::Result<String> {
    let Some(bits) = bits else { return Ok("the system does not tell".to_owned()) };
    let bits = bits as u64;
    ensure!(bits & THROTTLED_NOW == 0, "now, by {bits:#x}: see vcgencmd get_throttled");
    Ok(if bits == 0 {
        "never since the start".to_owned()
    } else {
        format!("not now, but since the start, by {bits:#x}")
    })
}

/// The header, and every section's bytes.
fn image(settings: &Settings) -> anyhow::Result<String> {
    with_image(&settings.model, |image, _, _| {
        let sections = sums(&settings.model.image, &image)?;
        let (header, head) = (image.header(), image.head());
        let provenance = header.provenance;
        let activation = match header.config.activation {
            Activation::SquaredRelu => "relu2",
            Activation::Silu => "silu",
        };
        let stages = if header.config.split_head { " in two stages" } else { "" };
        let tied = if header.config.tied { ", the embedding too" } else { "" };
        Ok(format!(
            "{} ({}), {}, {sections} sections sound; activation {activation}, head {}{stages}{tied}",
            provenance.name,
            provenance.architecture,
            mib(image.file_bytes()),
            head.format.name(),
        ))
    })
}

/// Compares all sections with their checksums, and gives their number.
fn sums(path: &Path, image: &Image<'_>) -> anyhow::Result<usize> {
    let records = image.sections().records();
    let (mut file, mut at) = (File::open(path)?, 0);
    let mut buffer = vec![0; 1 << 20];
    for (i, record) in records.iter().enumerate() {
        let start = u64::from(record.start.get()) * Block::BYTES as u64;
        std::io::copy(&mut (&mut file).take(start - at), &mut std::io::sink())?;
        let mut left = record.blocks.get() as usize * Block::BYTES;
        at = start + left as u64;
        let mut sum = Xxh3Default::new();
        while left > 0 {
            let part = left.min(buffer.len());
            file.read_exact(&mut buffer[..part]).with_context(|| format!("section {i}"))?;
            sum.update(&buffer[..part]);
            left -= part;
        }
        ensure!(sum.digest() == record.checksum.get(), "section {i} is damaged; `bitnet-pack verify` says where");
    }
    Ok(records.len())
}

fn memory(settings: &Settings) -> anyhow::Result<String> {
    with_image(&settings.model, |image, limits, plan| {
        let sessions = u64::from(settings.sessions);
        let each = ((plan.state + plan.sampler) * Block::BYTES) as u64;
        let have = available_memory();
        let (others, most) = ((sessions - 1) * each, mib(image.file_bytes() + plan.bytes() + (sessions - 1) * each));
        let text = format!(
            "{most} with all weights in memory; {sessions} conversations {} take {} each; available {}",
            length(&image.header().config, &limits),
            mib(each),
            have.map_or_else(|| "the system does not tell".to_owned(), mib)
        );
        ensure!(have.is_none_or(|have| plan.bytes() + others <= have), "{text}");
        Ok(text)
    })
}

/// What needs the model in memory.
fn model(report: &mut Report, opened: Opened<'_>) -> anyhow::Result<()> {
    report.line("weights", &opened.plan_text())?;
    report.line("threads", &opened.threads.pool().threads_max().to_string())?;
    let tokenizer = Tokenizer::load(&opened.image, opened.source).context("the image has no usable tokenizer");
    let tokenizer = match tokenizer {
        Ok(tokenizer) => tokenizer,
        Err(e) => return report.look("tokenizer", Err(e)),
    };
    let text = opened.image.header().text;
    report.look("template", template_ids(text.chat_template, text.stop.ids(), &tokenizer))?;
    report.look("text", loss(opened, &tokenizer))
}

/// The ids of a question, among which nothing that a person writes becomes a control token.
fn template_ids(chat: &str, ends: &[u32], tokenizer: &Tokenizer) -> anyhow::Result<String> {
    if chat.is_empty() {
        return Ok("none: /v1/completions alone".to_owned());
    }
    let end = ends.first().copied();
    let ids = |content: String| template::encode(chat, &[template::Message { role: "user", content }], end, tokenizer);
    let question = ids(QUESTION.to_owned())?;
    let spelled: String = ends.iter().filter_map(|&end| tokenizer.control_text(end)).collect();
    let control = |ids: &[u32]| ids.iter().filter(|&&id| tokenizer.control_text(id).is_some()).count();
    let hostile = ids(format!("{QUESTION}{spelled}"))?;
    ensure!(control(&hostile) == control(&question), "what a person writes becomes a control token");
    Ok(format!("`{QUESTION}` is {question:?}"))
}

/// How well the model predicts a text: better than one that knows nothing.
fn loss(opened: Opened<'_>, tokenizer: &Tokenizer) -> anyhow::Result<String> {
    let config = opened.image.header().config;
    let mut tokens: Vec<u32> = tokenizer.bos().into_iter().chain(tokenizer.encode(TEXT)?).collect();
    tokens.truncate(opened.limits.context as usize);
    ensure!(tokens.len() >= 2, "the context is too short");
    let (mut model, mut state, _) = opened.load()?;
    let mut nats = 0.0;
    model.prefill_each(&mut state, &tokens[..tokens.len() - 1], &mut |i, logits| {
        nats += surprise(logits, tokens[i + 1])
    })?;
    judge(nats / (tokens.len() - 1) as f64, config.vocab)
}

/// `-ln softmax(logits)[token]`, in double precision.
fn surprise(logits: &[f32], token: u32) -> f64 {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = logits.iter().map(|&l| f64::from(l - max).exp()).sum();
    sum.ln() - f64::from(logits[token as usize] - max)
}

fn judge(nats: f64, vocab: u32) -> anyhow::Result<String> {
    let chance = f64::from(vocab).ln();
    let text = format!("{nats:.3} nats a token of a plain story, where one of {vocab} by chance has {chance:.3}");
    ensure!(nats < chance, "{text}");
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_wrong_is_told_from_what_is_not() {
        assert_eq!(temperature(Some(48.3)).unwrap(), "48.3 °C");
        assert!(temperature(Some(80.0)).unwrap_err().to_string().starts_with("80.0 °C"));
        assert_eq!(throttled(Some(0.0)).unwrap(), "never since the start");
        // Voltage was too low once; it is now.
        assert_eq!(throttled(Some(f64::from(0x50000))).unwrap(), "not now, but since the start, by 0x50000");
        assert!(throttled(Some(f64::from(0x50005))).unwrap_err().to_string().contains("0x50005"));
        for unknown in [temperature(None), throttled(None)] {
            assert_eq!(unknown.unwrap(), "the system does not tell");
        }
        assert!(judge(2.0, 512).unwrap().starts_with("2.000 nats a token"));
        for wrong in [6.5, f64::NAN, f64::INFINITY] {
            assert!(judge(wrong, 512).is_err());
        }
        assert!((surprise(&[0.0, 3f32.ln()], 1) - (4f64 / 3.0).ln()).abs() < 1e-6);
    }
}
