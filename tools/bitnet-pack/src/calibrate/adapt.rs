//! From a text and a rule to the format and the codes of every linear that is not ternary.
use super::allocate::{Choice, allocate};
use super::gptq::{Factor, compensate, output_errors, predicted_embedding_loss, predicted_loss};
use super::spool::Spool;
use super::{HeldOut, Linear, Moment, Plan, Reference, Score, Wanted, Windows, windows};
use crate::checkpoint::Checkpoint;
use crate::{Error, Progress, quantize};
use bitnet_kernel::Format;
use bitnet_runtime::Config;
use bitnet_runtime::image::{Encoding, Kind};
use core::ops::Range;
use std::collections::{HashMap, HashSet};
use std::path::{Path, PathBuf};

/// Tokens in a window of calibration.
const WINDOW: usize = 512;
/// Windows for second moments, then for gradients, then to compare on. Fewer where the text has fewer: at least one each.
const WINDOWS: [usize; 3] = [16, 6, 8];
/// What labels are drawn with.
const SEED: u64 = 1;
/// Rows that are quantized together: a head has many.
const SLAB: usize = 4096;

/// How formats are chosen.
#[derive(Clone, Debug, PartialEq)]
pub enum Rule {
    /// One for all.
    Uniform(Format),
    /// The least predicted loss within the bytes that one format for all takes.
    AsMuch(Format),
    /// The same within so many bits a weight of all linears that are chosen for, scales and padding included.
    Average(f64),
    /// The same within the bytes that an image of this length leaves for them.
    Size(u64),
    /// `i8` where four bits are predicted to lose more than `high` nats a token, `i3g128` where three lose less than `low`,
    /// else `i4g128`.
    Thresholds {
        /// Nats above which a linear has eight bits.
        high: f64,
        /// Nats below which it has three.
        low: f64,
    },
    /// A file.
    Plan(PathBuf),
    /// Without a text: `i8` for value, for the last layer's gate, up and down, for the first layer's output, and for the head; else
    /// `i4g128`.
    Fixed,
}

impl Rule {
    /// Whether it needs to know what each format would lose.
    const fn predicts(&self) -> bool {
        matches!(self, Self::AsMuch(_) | Self::Average(_) | Self::Size(_) | Self::Thresholds { .. })
    }
}

/// What the user chooses.
#[derive(Clone, Debug, PartialEq)]
pub struct Adaptive {
    /// How formats are chosen.
    pub rule: Rule,
    /// A text of the kind that the model will read, UTF-8. Without one, weights are rounded.
    pub text: Option<PathBuf>,
    /// Whether the head, if it has floats, is one of the linears that are chosen for.
    pub head: bool,
}

impl Adaptive {
    /// The most memory that calibration takes: the weights of a layer or of the head, in floats and twice; the residual streams
    /// of all tokens, and at every layer those of a pass with gradients; what is inside a layer for the tokens of a pass; the second
    /// moment, its factor and their products; and the logits of some tokens.
    pub(crate) fn peak(&self, c: &Config) -> u64 {
        let wide = |n: u32| u64::from(n);
        let (hidden, ffn, query, kv) = (wide(c.hidden), wide(c.ffn), wide(c.query_width()), wide(c.kv_width()));
        let layer = hidden * (2 * query + 2 * kv + 3 * ffn);
        let head = wide(c.vocab) * hidden;
        let largest = layer.max(2 * head);
        // Of its weights, what becomes of them, errors, codes and products, some of them twice.
        let slab = if self.head { 8 * wide(c.vocab.min(SLAB as u32)) * hidden } else { 0 };
        if self.text.is_none() {
            return 4 * (3 * layer).max(if self.head { 2 * head + slab } else { 0 });
        }
        const PASS: u64 = 1024;
        let inside = PASS * (8 * hidden + 6 * query + 4 * kv + 8 * ffn);
        let streams = hidden * (2 * (WINDOWS[0] * WINDOW) as u64 + PASS * wide(c.layers));
        let moment = 4 * ffn.max(hidden) * ffn.max(hidden);
        let logits = 256 * 3 * wide(c.vocab);
        4 * (largest + layer + slab + inside + streams + moment + logits)
    }
}

/// A linear and what became of it.
#[derive(Clone, Debug)]
pub struct LinearReport {
    /// Which.
    pub linear: Linear,
    /// Rows and columns.
    pub shape: (usize, usize),
    /// The trace of the loss's Hessian with respect to its weights as the product of the traces of its two factors, if
    /// gradients were computed.
    pub trace: Option<f64>,
    /// Bytes and predicted loss in nats a token of the formats of [`Plan::FORMATS`], if they were computed.
    pub choices: Vec<Choice>,
    /// The format that it has.
    pub format: Format,
    /// Bytes in the image.
    pub bytes: u64,
    /// The root of the energy of what it lost, over that of its weights; of eight bits if it was not quantized before.
    pub error: f64,
}

/// What was chosen, and how good it is.
#[derive(Clone, Debug, Default)]
pub struct Adapted {
    /// All linears that are not ternary, in execution order.
    pub linears: Vec<LinearReport>,
    /// How well the model predicts the end of the text, if there is one.
    pub score: Option<Score>,
    /// Of the formats that fit for all the one that is predicted to lose least, and how well that does, where the formats were to be better than that.
    pub uniform: Option<(Format, Score)>,
    /// What a person should know.
    pub notes: Vec<String>,
}

/// Formats and codes.
#[derive(Debug)]
pub(crate) struct Prepared {
    pub(crate) plan: Plan,
    pub(crate) spool: Spool,
    pub(crate) adapted: Adapted,
}

/// Where things lie: the checkpoint, its tokenizer if it was chosen, and a directory for what is large.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Places<'a> {
    pub(crate) checkpoint: &'a Checkpoint,
    pub(crate) tokenizer: Option<&'a Path>,
    pub(crate) directory: &'a Path,
    /// Bytes of the image that are not those of the linears.
    pub(crate) rest: u64,
}

/// Bytes of a linear in a format.
fn bytes(format: Format, (rows, cols): (usize, usize)) -> u64 {
    Encoding::Matrix(format).blocks(rows as u32, cols as u32) * 64
}

/// Rows, some at a time.
fn slabs(rows: usize) -> impl Iterator<Item = Range<usize>> {
    (0..rows).step_by(SLAB).map(move |first| first..rows.min(first + SLAB))
}

/// How often each token of a vocabulary is in a text, as a share of all.
fn shares(text: &Windows, vocab: usize) -> Vec<f64> {
    let mut shares = vec![0.0; vocab];
    let part = 1.0 / text.tokens().len() as f64;
    for &token in text.tokens() {
        if let Some(share) = shares.get_mut(token as usize) {
            *share += part;
        }
    }
    shares
}

/// Rounds a linear as [`Format::I8`] does.
fn round_i8(weights: &mut [f32], cols: usize) {
    let mut codes = vec![0; cols];
    for row in weights.chunks_exact_mut(cols) {
        let scale = quantize::row_i8(row, &mut codes);
        row.iter_mut().zip(&codes).for_each(|(w, code)| *w = f32::from(*code) * scale);
    }
}

/// Chooses a format for every linear that is not ternary, and quantizes it.
///
/// # Errors
/// If the checkpoint or the text cannot be read, a budget is too small, a plan is not for this model, or the user ends it.
pub(crate) fn adapt(adaptive: &Adaptive, places: Places<'_>, progress: &mut dyn Progress) -> Result<Prepared, Error> {
    let model = Reference::new(places.checkpoint, &*progress)?;
    let all = model.linears().chain(adaptive.head.then_some(Linear::HEAD));
    let linears: Vec<Linear> = all.filter(|&linear| model.is_dense(linear)).collect();
    if linears.is_empty() {
        return Err(Error::Options("all linears are ternary; there is nothing to choose for".into()));
    }
    let mut run = Run {
        model: &model,
        linears,
        spool: Spool::new(places.directory)?,
        choices: HashMap::new(),
        traces: HashMap::new(),
        holes: HashSet::new(),
        shares: Vec::new(),
        notes: Vec::new(),
    };
    let rule = &adaptive.rule;
    let fixed = match rule {
        Rule::Uniform(format) => Some(run.uniform(*format)),
        Rule::Plan(path) => Some(Plan::read(path, &run.linears)?),
        Rule::Fixed => Some(run.fixed()),
        _ => None,
    };
    let text = match &adaptive.text {
        Some(path) => {
            let all = windows(places.checkpoint, places.tokenizer, path, WINDOW, WINDOWS.iter().sum())?;
            Some(split(path, &all)?)
        }
        None if rule.predicts() => {
            return Err(Error::Options("a budget or thresholds need a text: --calibration".into()));
        }
        None => None,
    };
    let wanted = |linear| match &fixed {
        Some(plan) => plan.format(linear).into_iter().collect(),
        None => Plan::FORMATS.to_vec(),
    };
    match &text {
        Some([for_moments, for_gradients, _]) => {
            let fisher = match rule.predicts() {
                true => model.fisher(for_gradients, SEED, progress)?.into_iter().collect(),
                false => HashMap::new(),
            };
            run.shares = shares(for_moments, model.config().vocab as usize);
            model.moments(for_moments, Wanted::Full, progress, &mut |moment, progress| {
                run.quantize(&moment, &fisher, &wanted, progress)
            })?;
        }
        None => run.round(&wanted, progress)?,
    }
    let (plan, uniform) = match fixed {
        Some(plan) => (plan, None),
        None => run.choose(rule, places.rest)?,
    };
    run.finish(plan, uniform, text, progress)
}

/// Windows for moments, gradients and comparison.
fn split(path: &Path, all: &Windows) -> Result<[Windows; 3], Error> {
    let (count, sum) = (all.count(), WINDOWS.iter().sum::<usize>());
    if count < 3 {
        let what = format!("{count} windows of {WINDOW} tokens; calibration needs 3, and has use for {sum}");
        return Err(Error::not_readable(path, what));
    }
    let part = |share: usize| (share * count / sum).max(1);
    let (gradients, held) = (part(WINDOWS[1]), part(WINDOWS[2]));
    let moments = count - gradients - held;
    Ok([all.part(0, moments), all.part(moments, gradients), all.part(moments + gradients, held)])
}

struct Run<'a> {
    model: &'a Reference<'a>,
    linears: Vec<Linear>,
    spool: Spool,
    choices: HashMap<Linear, Vec<Choice>>,
    traces: HashMap<Linear, f64>,
    /// What has no prediction.
    holes: HashSet<Linear>,
    /// How often each token is in the text.
    shares: Vec<f64>,
    notes: Vec<String>,
}

impl Run<'_> {
    /// One format for all that have a prediction.
    fn uniform(&self, format: Format) -> Plan {
        let of = |linear| if self.holes.contains(linear) { Format::I8 } else { format };
        Plan::new(self.linears.iter().map(|linear| (*linear, of(linear))))
    }

    fn fixed(&self) -> Plan {
        let last = self.model.config().layers - 1;
        let eight = |linear: &Linear| match linear.kind {
            Kind::Value => true,
            Kind::Gate | Kind::Up | Kind::Down => linear.layer == Some(last),
            Kind::Output => linear.layer == Some(0),
            Kind::Head => true,
            _ => false,
        };
        let format = |linear: &Linear| if eight(linear) { Format::I8 } else { Format::I4G };
        Plan::new(self.linears.iter().map(|linear| (*linear, format(linear))))
    }

    /// Quantizes the linears that read what `moment` is of, and predicts what each format loses.
    fn quantize(
        &mut self,
        moment: &Moment,
        fisher: &HashMap<Linear, Vec<f32>>,
        wanted: &dyn Fn(Linear) -> Vec<Format>,
        progress: &mut dyn Progress,
    ) -> Result<(), Error> {
        let of = moment.site.kinds().iter().map(|&kind| Linear { layer: moment.layer, kind });
        let of: Vec<Linear> = of.filter(|linear| self.linears.contains(linear)).collect();
        if of.iter().all(|&linear| wanted(linear).iter().all(|f| !f.is_grouped())) {
            return Ok(());
        }
        let factor = Factor::new(&moment.values, moment.cols).unwrap_or_else(|| {
            self.notes.push(format!("{}: what it reads has no sound second moment; rounded", of[0]));
            Factor::identity(moment.cols)
        });
        for linear in of {
            let formats = wanted(linear);
            let losses = self.candidates(linear, moment, &factor, fisher, &formats, progress)?;
            if let Some(fisher) = fisher.get(&linear) {
                let shape = self.model.shape(linear);
                let choice = |(format, loss)| Choice { bytes: bytes(format, shape), loss };
                let mut choices: Vec<Choice> = formats.into_iter().zip(losses).map(choice).collect();
                let sum = |values: &[f32]| values.iter().map(|v| f64::from(*v)).sum::<f64>();
                self.traces.insert(linear, sum(fisher) * sum(&moment.diagonal()));
                self.without_holes(linear, &mut choices);
                self.choices.insert(linear, choices);
            }
        }
        Ok(())
    }

    /// Quantizes a linear in each of these formats, and says what it is predicted to lose in each, zero without gradients.
    fn candidates(
        &mut self,
        linear: Linear,
        moment: &Moment,
        factor: &Factor,
        fisher: &HashMap<Linear, Vec<f32>>,
        formats: &[Format],
        progress: &mut dyn Progress,
    ) -> Result<Vec<f64>, Error> {
        let (rows, cols) = self.model.shape(linear);
        let mut losses = vec![0.0; formats.len()];
        for rows in slabs(rows) {
            if progress.cancelled() {
                return Err(Error::Interrupted);
            }
            progress.section(&format!("quantizing {linear}"));
            let weights = self.model.rows(linear, rows.start, rows.len())?;
            for (&format, loss) in formats.iter().zip(&mut losses) {
                let mut changed = weights.clone();
                if format.is_grouped() {
                    let quantized = compensate(&weights, factor, format);
                    self.spool.put(linear, format, &quantized)?;
                    changed = quantized.weights();
                } else {
                    round_i8(&mut changed, cols);
                }
                if let Some(fisher) = fisher.get(&linear) {
                    let errors = output_errors(&weights, &changed, &moment.values, cols);
                    *loss += predicted_loss(&errors, &fisher[rows.clone()]);
                }
                if let (Linear::HEAD, true, Some(fisher)) =
                    (linear, self.model.config().tied, fisher.get(&Linear::EMBEDDING))
                {
                    *loss += predicted_embedding_loss(&weights, &changed, fisher, &self.shares[rows.clone()]);
                }
            }
        }
        Ok(losses)
    }

    /// What has no prediction gets eight bits: nothing is known that would speak for fewer.
    fn without_holes(&mut self, linear: Linear, choices: &mut [Choice]) {
        let sound = choices.iter().all(|c| c.loss.is_finite()) && choices.iter().any(|c| c.loss > 0.0);
        if !sound {
            self.notes.push(format!("{linear}: its gradients or inputs are zero or no numbers; it gets eight bits"));
            self.holes.insert(linear);
            let last = choices.len() - 1;
            choices.iter_mut().enumerate().for_each(|(i, c)| c.loss = if i == last { 0.0 } else { 1e3 });
        }
    }

    /// Quantizes without a text.
    fn round(&mut self, wanted: &dyn Fn(Linear) -> Vec<Format>, progress: &mut dyn Progress) -> Result<(), Error> {
        self.notes.push("no text for calibration: weights are rounded, and no loss is known".into());
        for linear in self.linears.clone() {
            let formats: Vec<Format> = wanted(linear).into_iter().filter(|f| f.is_grouped()).collect();
            let (rows, cols) = self.model.shape(linear);
            for rows in slabs(rows) {
                if progress.cancelled() {
                    return Err(Error::Interrupted);
                }
                let weights = self.model.rows(linear, rows.start, rows.len())?;
                for &format in &formats {
                    let quantized = compensate(&weights, &Factor::identity(cols), format);
                    self.spool.put(linear, format, &quantized)?;
                }
            }
        }
        Ok(())
    }

    /// The plan of a rule that predicts, and the uniform format that it has to beat.
    fn choose(&mut self, rule: &Rule, rest: u64) -> Result<(Plan, Option<Format>), Error> {
        let weights: usize = self.linears.iter().map(|&l| self.model.shape(l).0 * self.model.shape(l).1).sum();
        let budget = match *rule {
            Rule::AsMuch(format) => self.linears.iter().map(|&linear| bytes(format, self.model.shape(linear))).sum(),
            Rule::Average(bits) => (bits * weights as f64 / 8.0) as u64,
            Rule::Size(size) => size.saturating_sub(rest),
            Rule::Thresholds { high, low } => {
                let of = |choices: &[Choice]| match () {
                    () if choices[4].loss > high => Format::I8,
                    () if choices[3].loss < low => Format::I3G,
                    () => Format::I4G,
                };
                return Ok((Plan::new(self.linears.iter().map(|l| (*l, of(&self.choices[l])))), None));
            }
            _ => unreachable!("{rule:?} is a plan already"),
        };
        let choices: Vec<Vec<Choice>> = self.linears.iter().map(|linear| self.choices[linear].clone()).collect();
        let Some(at) = allocate(&choices, budget) else {
            let least: u64 = choices.iter().map(|c| c.iter().map(|c| c.bytes).min().unwrap_or(0)).sum();
            return Err(Error::Options(format!(
                "{budget} bytes for {} linears, which take {least} at least ({:.3} bits a weight)",
                choices.len(),
                least as f64 * 8.0 / weights as f64
            )));
        };
        let plan = Plan::new(self.linears.iter().copied().zip(at.iter().map(|&i| Plan::FORMATS[i])));
        let one = |linear: &Linear, i: usize| {
            let c = &self.choices[linear];
            if self.holes.contains(linear) { &c[c.len() - 1] } else { &c[i] }
        };
        let sum = |i: usize| {
            let all = self.linears.iter().map(|linear| one(linear, i));
            all.fold((0, 0.0), |(bytes, loss), c| (bytes + c.bytes, loss + c.loss))
        };
        let fit = (0..Plan::FORMATS.len()).filter(|&i| sum(i).0 <= budget);
        let uniform = fit.min_by(|&a, &b| sum(a).1.total_cmp(&sum(b).1)).map(|i| Plan::FORMATS[i]);
        Ok((plan, uniform))
    }

    /// Measures the plan, takes the uniform format instead if that is better, and reports.
    fn finish(
        mut self,
        mut plan: Plan,
        uniform: Option<Format>,
        text: Option<[Windows; 3]>,
        progress: &mut dyn Progress,
    ) -> Result<Prepared, Error> {
        let mut adapted = Adapted::default();
        if let Some([_, _, held]) = text {
            let held = HeldOut::new(self.model, held, progress)?;
            let mut score = self.score(&held, &plan, progress)?;
            if let Some(format) = uniform {
                let all = self.uniform(format);
                let other = self.score(&held, &all, progress)?;
                if other.kl <= score.kl {
                    let what = "the plan was no better than one format for all on the end of the text";
                    self.notes.push(format!(
                        "{what} (divergence {:.4}, {:.4}); all that are predicted are {}",
                        score.kl,
                        other.kl,
                        format.name()
                    ));
                    (plan, score) = (all, other.clone());
                }
                adapted.uniform = Some((format, other));
            }
            adapted.score = Some(score);
        }
        for &linear in &self.linears {
            let (format, shape) = (plan.format(linear).expect("a plan has all"), self.model.shape(linear));
            let weights = self.model.weights(linear)?;
            let mut changed = weights.clone();
            self.change(&plan, linear, &mut changed)?;
            let energy = |values: &mut dyn Iterator<Item = f32>| values.map(|v| f64::from(v * v)).sum::<f64>();
            let lost = energy(&mut weights.iter().zip(&changed).map(|(w, c)| w - c));
            let all = energy(&mut weights.iter().copied());
            adapted.linears.push(LinearReport {
                linear,
                shape,
                trace: self.traces.get(&linear).copied(),
                choices: self.choices.get(&linear).cloned().unwrap_or_default(),
                format,
                bytes: bytes(format, shape),
                error: if all > 0.0 { (lost / all).sqrt() } else { 0.0 },
            });
        }
        adapted.notes = self.notes;
        Ok(Prepared { plan, spool: self.spool, adapted })
    }

    fn change(&self, plan: &Plan, linear: Linear, weights: &mut [f32]) -> Result<(), Error> {
        match plan.format(linear) {
            Some(format) if self.spool.has(linear, format) => {
                let (rows, cols) = self.model.shape(linear);
                for rows in slabs(rows) {
                    let part = &mut weights[rows.start * cols..rows.end * cols];
                    part.copy_from_slice(&self.spool.rows(linear, format, rows)?.weights());
                }
            }
            Some(_) => round_i8(weights, self.model.shape(linear).1),
            None => {}
        }
        Ok(())
    }

    fn score(&self, held: &HeldOut<'_>, plan: &Plan, progress: &mut dyn Progress) -> Result<Score, Error> {
        held.score(&|linear, weights| self.change(plan, linear, weights), progress)
    }
}
