//! Weights of a checkpoint that are left out because its activations say that they matter least.
//!
//! What a weight matters is its square times the mean square of the activations it is multiplied by: the diagonal of the
//! Hessian of the linear's own error. A neuron of the feed-forward layer matters the root mean square of what it hands to
//! down times the norm of its column there. The magnitude of ternary weights says nothing: measured, it was no better than chance.
//!
//! `prune` says which weights stay, and the checkpoint then reads as one that was pruned before: the packer recognises its
//! rows, columns and blocks of zeros as it does with any ([`crate::kept`]). Norms keep their width: what is left out is a zero
//! for them. Masters are ternarized by the mean magnitude of those that stay; by that of all of them, 2:4 cost +0.41 nats a
//! token on the bundled model in place of +0.34, a quarter of the neurons +0.126 in place of +0.132. The scale of weights that
//! are ternary already is the best for those that stay, whatever is left out.
//!
//! Figures: `bitnet-pack pack models/stories-ternary -o IMAGE --sparsity SHARE --sparsity-type TYPE --calibration TEXT`, with
//! samples of the teacher of that model as text and variants of this file.
use crate::calibrate::{HeldOut, Linear, Moment, Reference, Score, Site, Wanted, windows};
use crate::checkpoint::sections::Source;
use crate::checkpoint::{Checkpoint, TensorInfo};
use crate::quantize::{Absmean, MagnitudeSum};
use crate::{Error, Progress};
use bitnet_kernel::BlockShape;
use bitnet_kernel::blocks::STRIP_ROWS;
use bitnet_runtime::Config;
use bitnet_runtime::image::Kind;
use core::fmt;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// Which weights are left out together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pattern {
    /// Neurons of the feed-forward layer: rows of gate and up, columns of down. Attention stays whole.
    Neurons,
    /// Blocks of this size, of every linear of the layers.
    Blocks(BlockShape),
    /// Single weights of every row of every linear.
    Single,
    /// All but `n` of every `m` columns of every row.
    Of {
        /// Weights that stay.
        n: u32,
        /// Of so many side by side.
        m: u32,
    },
}

impl fmt::Display for Pattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Neurons => f.write_str("structured-rowcol"),
            Self::Blocks(shape) => write!(f, "block {}", shape.name()),
            Self::Single => f.write_str("unstructured"),
            Self::Of { n, m } => write!(f, "{n}:{m}"),
        }
    }
}

/// What the user chooses.
#[derive(Clone, Debug, PartialEq)]
pub struct Sparsity {
    /// The share that is left out, of each linear; [`Pattern::Of`] has its own.
    pub share: f64,
    /// Which weights are left out together.
    pub pattern: Pattern,
    /// A text of the kind that the model will read, UTF-8.
    pub text: PathBuf,
}

/// Tokens in a window.
const WINDOW: usize = 256;
/// Windows at most: three quarters say what matters, the rest what was lost.
const WINDOWS: usize = 64;
/// Nats a token from which on a loss is large: a tenth of the perplexity.
const LARGE: f64 = 0.1;
/// Largest `m`.
const GROUP_MAX: u32 = 64;

impl Sparsity {
    /// # Errors
    /// If nothing would be left out, or too much.
    pub(crate) fn check(&self) -> Result<(), Error> {
        let refuse = |what: String| Err(Error::Options(what));
        match self.pattern {
            Pattern::Of { n, m } if n == 0 || n >= m || m > GROUP_MAX => {
                refuse(format!("--sparsity-type {n}:{m}: of 2 to {GROUP_MAX} weights at least one stays, and not all"))
            }
            Pattern::Of { n, m } if (self.share - (1.0 - f64::from(n) / f64::from(m))).abs() > 0.005 => {
                refuse(format!("--sparsity {}: {n}:{m} leaves out {}", self.share, 1.0 - f64::from(n) / f64::from(m)))
            }
            _ if !(self.share > 0.0 && self.share <= 0.95) => {
                refuse(format!("--sparsity {}: a share above 0, and at most 0.95", self.share))
            }
            _ => Ok(()),
        }
    }
    /// The most memory that it takes: the weights of a layer three times, and the residual streams of all tokens; and a bit
    /// for each weight if single ones are left out.
    fn peak(&self, c: &Config) -> u64 {
        let wide = |n: u32| u64::from(n);
        let (hidden, ffn, query) = (wide(c.hidden), wide(c.ffn), wide(c.query_width()));
        let layer = hidden * (2 * query + 2 * wide(c.kv_width()) + 3 * ffn);
        let largest = layer.max(2 * wide(c.vocab) * hidden);
        const PASS: u64 = 1024;
        let inside = PASS * (8 * hidden + 6 * query + 4 * wide(c.kv_width()) + 8 * ffn);
        let streams = 3 * hidden * (WINDOWS * WINDOW) as u64;
        let bits = match self.pattern {
            Pattern::Single | Pattern::Of { .. } => wide(c.layers) * layer / 8,
            _ => wide(c.layers) * layer / 2048,
        };
        4 * (2 * largest + layer + inside + streams + 256 * 3 * wide(c.vocab)) + bits
    }
}

/// What stays of a tensor: tiles of one size, which rows and columns of a neuron, blocks and single weights are alike.
#[derive(Clone, Debug)]
pub(crate) struct Mask {
    rows: usize,
    cols: usize,
    tile: (usize, usize),
    /// Tiles in a row of them.
    across: usize,
    /// A bit for each tile.
    bits: Vec<u64>,
    /// How masters are ternarized.
    rule: Option<Absmean>,
}

impl Mask {
    /// Nothing stays.
    fn new((rows, cols): (usize, usize), tile: (usize, usize)) -> Self {
        let across = cols.div_ceil(tile.1);
        Self { rows, cols, tile, across, bits: vec![0; (rows.div_ceil(tile.0) * across).div_ceil(64)], rule: None }
    }
    fn keep(&mut self, tile: usize) {
        self.bits[tile / 64] |= 1 << (tile % 64);
    }
    /// Whether a weight stays.
    pub(crate) fn keeps(&self, row: usize, col: usize) -> bool {
        let tile = row / self.tile.0 * self.across + col / self.tile.1;
        self.bits[tile / 64] >> (tile % 64) & 1 != 0
    }
    /// Makes numbers from element `first` on what they are in the pruned tensor.
    pub(crate) fn apply(&self, first: usize, values: &mut [f32]) {
        for (i, value) in (first..).zip(&mut *values).filter(|(_, v)| **v != 0.0) {
            if !self.keeps(i / self.cols, i % self.cols) {
                *value = 0.0;
            }
        }
        if let Some(rule) = &self.rule {
            let mut codes = vec![0; values.len()];
            rule.ternarize(values, &mut codes);
            values.iter_mut().zip(codes).for_each(|(v, code)| *v = f32::from(code) * rule.multiplier);
        }
    }
    /// The same for codes, of which a byte has those of four rows, `quarter` apart.
    pub(crate) fn apply_packed(&self, first: usize, quarter: usize, bytes: &mut [u8]) {
        for (i, byte) in (first..).zip(bytes) {
            let (byte_row, col) = (i / self.cols, i % self.cols);
            for (plane, row) in (byte_row..self.rows).step_by(quarter).enumerate() {
                if !self.keeps(row, col) {
                    *byte = *byte & !(3 << (2 * plane)) | 1 << (2 * plane);
                }
            }
        }
    }
    /// Whether it makes masters ternary.
    pub(crate) const fn ternarizes(&self) -> bool {
        self.rule.is_some()
    }
}

/// What was left out, and what it costs.
#[derive(Clone, Debug)]
pub struct Pruned {
    /// Which weights were left out together.
    pub pattern: Pattern,
    /// The share that was left out of what the pattern is of.
    pub share: f64,
    /// The share of zeros in the linears of the layers, before and after.
    pub zeros: [f64; 2],
    /// How the model predicts the end of the text, in floats.
    pub score: Score,
    /// The most memory that it took, as promised.
    pub peak: u64,
}

impl Pruned {
    /// Whether a person should be warned.
    pub fn is_large(&self) -> bool {
        let lost = self.score.nats - self.score.source_nats;
        lost.is_nan() || lost >= LARGE
    }
}

impl fmt::Display for Pruned {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (s, [before, after]) = (&self.score, self.zeros);
        writeln!(
            f,
            "sparsity: {}, {:.0} %; {:.1} % of the linears' weights are zero, {:.1} % were",
            self.pattern,
            self.share * 100.0,
            after * 100.0,
            before * 100.0
        )?;
        let lost = s.nats - s.source_nats;
        writeln!(
            f,
            "held-out text: {:.4} nats a token before, {:.4} after ({lost:+.4} ± {:.4}; perplexity {:.2} and {:.2}), {} tokens",
            s.source_nats,
            s.nats,
            s.error,
            s.source_perplexity(),
            s.perplexity(),
            s.tokens
        )?;
        if self.is_large() {
            writeln!(f, "warning: this is a large loss; without training the pruned model again, leave out less")?;
        }
        if matches!(self.pattern, Pattern::Single | Pattern::Of { .. }) {
            writeln!(f, "note: no layout saves bytes or time on zeros in this pattern")?;
        }
        Ok(())
    }
}

/// The numbers of the `count` largest; of equal ones the first.
fn largest(scores: &[f64], count: usize) -> Vec<usize> {
    let mut order: Vec<usize> = (0..scores.len()).collect();
    order.sort_by(|&a, &b| scores[b].total_cmp(&scores[a]));
    order.truncate(count);
    order
}

/// How many of `all` stay: at least one.
fn staying(share: f64, all: usize) -> usize {
    (((1.0 - share) * all as f64).round() as usize).clamp(1, all)
}

/// Makes `pruned`, which was opened as `checkpoint` was, read as this with less weights.
///
/// # Errors
/// If the options are no sense, the checkpoint or the text cannot be read, or the user ends it.
pub(crate) fn prune(
    checkpoint: &Checkpoint,
    pruned: &mut Checkpoint,
    sparsity: &Sparsity,
    tokenizer: Option<&Path>,
    progress: &mut dyn Progress,
) -> Result<Pruned, Error> {
    let all = windows(checkpoint, tokenizer, &sparsity.text, WINDOW, WINDOWS)?;
    if all.count() < 4 {
        let what = format!("{} windows of {WINDOW} tokens; --sparsity needs 4, and has use for {WINDOWS}", all.count());
        return Err(Error::not_readable(&sparsity.text, what));
    }
    let held = all.count().div_ceil(4);
    let (calibration, held) = (all.part(0, all.count() - held), all.part(all.count() - held, held));
    let before = Reference::new(checkpoint, &*progress)?;
    let peak = sparsity.peak(before.config());
    progress.say(&format!("peak memory while weights are left out: {} MiB", peak.div_ceil(1 << 20)));
    let mut chosen = Chosen { model: &before, sparsity, masks: BTreeMap::new() };
    before.moments(&calibration, Wanted::Diagonal, progress, &mut |moment, _| chosen.site(&moment))?;
    pruned.prune(chosen.masks);
    let after = Reference::new(pruned, &*progress)?;
    let held = HeldOut::new(&before, held, progress)?;
    let zeros = core::cell::Cell::new([0u64; 3]);
    let change = |linear: Linear, weights: &mut [f32]| {
        let count = |weights: &[f32]| weights.iter().filter(|v| **v == 0.0).count() as u64;
        if linear.layer.is_none() {
            return Ok(());
        }
        let [from, to, all] = zeros.get();
        let from = from + count(weights);
        weights.copy_from_slice(&after.weights(linear)?);
        zeros.set([from, to + count(weights), all + weights.len() as u64]);
        Ok(())
    };
    let score = held.score(&change, progress)?;
    let [from, to, all] = zeros.get().map(|n| n as f64);
    Ok(Pruned { pattern: sparsity.pattern, share: sparsity.share, zeros: [from / all, to / all], score, peak })
}

struct Chosen<'a> {
    model: &'a Reference<'a>,
    sparsity: &'a Sparsity,
    /// By the tensor's name.
    masks: BTreeMap<String, Mask>,
}

impl Chosen<'_> {
    /// Chooses what stays of the linears that read what `moment` is of.
    fn site(&mut self, moment: &Moment) -> Result<(), Error> {
        let Some(layer) = moment.layer else { return Ok(()) };
        let squares = moment.diagonal();
        if self.sparsity.pattern == Pattern::Neurons {
            return if moment.site == Site::Down { self.neurons(layer, &squares) } else { Ok(()) };
        }
        moment.site.kinds().iter().try_for_each(|&kind| {
            let linear = Linear::new(layer, kind);
            let mask = self.weights(linear, &squares)?;
            self.put(linear, mask)
        })
    }

    /// Rows of gate and up, and columns of down, by mean square times the squared norm of the column.
    fn neurons(&mut self, layer: u32, squares: &[f32]) -> Result<(), Error> {
        let down = self.model.weights(Linear::new(layer, Kind::Down))?;
        let mut scores = vec![0.0; squares.len()];
        for row in down.chunks_exact(squares.len()) {
            scores.iter_mut().zip(row).for_each(|(score, w)| *score += f64::from(*w).powi(2));
        }
        scores.iter_mut().zip(squares).for_each(|(score, &square)| *score *= f64::from(square));
        let stay = largest(&scores, staying(self.sparsity.share, scores.len()));
        for kind in [Kind::Gate, Kind::Up, Kind::Down] {
            let linear = Linear::new(layer, kind);
            let (rows, cols) = self.model.shape(linear);
            let tile = if kind == Kind::Down { (rows, 1) } else { (1, cols) };
            let mut mask = Mask::new((rows, cols), tile);
            stay.iter().for_each(|&neuron| mask.keep(neuron));
            self.put(linear, mask)?;
        }
        Ok(())
    }

    /// Blocks or single weights of a linear, by square times the mean square of their column. Of single weights the masters are
    /// looked at where there are any, which tell equal ternary weights apart: on the bundled model half of them cost +0.20 nats a
    /// token with and +0.62 without. Blocks lost more with masters (a quarter: +1.31, +1.09 without).
    fn weights(&self, linear: Linear, squares: &[f32]) -> Result<Mask, Error> {
        let (shape, mut weights) = (self.model.shape(linear), self.model.weights(linear)?);
        if let (Source::Masters(tensor), Pattern::Single | Pattern::Of { .. }) =
            (self.model.source_of(linear), self.sparsity.pattern)
        {
            self.model.checkpoint().read_floats(tensor, 0, &mut Vec::new(), &mut weights)?;
        }
        let score = |w: f32, c: usize| f64::from(w).powi(2) * f64::from(squares[c]);
        let tile = match self.sparsity.pattern {
            Pattern::Blocks(blocks) => (STRIP_ROWS, blocks.cols()),
            _ => (1, 1),
        };
        let mut mask = Mask::new(shape, tile);
        if let Pattern::Blocks(_) = self.sparsity.pattern {
            let mut scores = vec![0.0; shape.0.div_ceil(tile.0) * mask.across];
            for (r, row) in weights.chunks_exact(shape.1).enumerate() {
                for (c, &w) in row.iter().enumerate() {
                    scores[r / tile.0 * mask.across + c / tile.1] += score(w, c);
                }
            }
            largest(&scores, staying(self.sparsity.share, scores.len())).into_iter().for_each(|tile| mask.keep(tile));
            return Ok(mask);
        }
        for (r, row) in weights.chunks_exact(shape.1).enumerate() {
            // A row, or m columns of it.
            let (width, n) = match self.sparsity.pattern {
                Pattern::Of { n, m } => (m as usize, n as usize),
                _ => (shape.1, staying(self.sparsity.share, shape.1)),
            };
            for (first, part) in (0..).step_by(width).zip(row.chunks(width)) {
                let scores: Vec<f64> = part.iter().zip(first..).map(|(&w, c)| score(w, c)).collect();
                largest(&scores, n).into_iter().for_each(|i| mask.keep(r * shape.1 + first + i));
            }
        }
        Ok(mask)
    }

    fn put(&mut self, linear: Linear, mut mask: Mask) -> Result<(), Error> {
        let source = self.model.source_of(linear);
        if let Source::Masters(tensor) = source {
            mask.rule = Some(self.rule(tensor, &mask)?);
        }
        if let (Pattern::Blocks(_), Source::Rows(_)) = (self.sparsity.pattern, source) {
            let what =
                format!("{linear} is not ternary, and only ternary linears are stored without blocks of zeros; ");
            return Err(Error::Options(what + "--sparsity-type structured-rowcol is for any"));
        }
        let tensor = source.tensor().expect("a linear has one");
        self.masks.insert(tensor.name.clone(), mask);
        Ok(())
    }

    /// The rule for those of a tensor's masters that stay.
    fn rule(&self, tensor: &TensorInfo, mask: &Mask) -> Result<Absmean, Error> {
        let cols = mask.cols;
        let (mut raw, mut row, mut sum) = (Vec::new(), vec![0.0; cols], MagnitudeSum::default());
        let mut stay = Vec::with_capacity(cols);
        for r in 0..mask.rows {
            self.model.checkpoint().read_floats(tensor, (r * cols) as u64, &mut raw, &mut row)?;
            stay.extend((0..cols).filter(|&c| mask.keeps(r, c)).map(|c| row[c]));
            let whole = stay.len() / 8 * 8;
            sum.add(&stay[..whole]);
            stay.drain(..whole);
        }
        sum.add(&stay);
        Ok(Absmean::new(sum.mean()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Codes of four rows a byte lose what numbers lose, in parts that start anywhere; codes without a row stay.
    #[test]
    fn packed_codes_are_pruned_as_numbers_are() {
        let (rows, cols, quarter) = (6, 5, 2);
        let mut mask = Mask::new((rows, cols), (1, 1));
        (0..rows * cols).filter(|i| i % 3 != 0).for_each(|i| mask.keep(i));
        let mut numbers = vec![1.0; rows * cols];
        mask.apply(0, &mut numbers);
        // Every code is +1.
        let mut bytes = vec![0b1010_1010u8; quarter * cols];
        let (a, b) = bytes.split_at_mut(3);
        mask.apply_packed(0, quarter, a);
        mask.apply_packed(3, quarter, b);
        for (i, number) in numbers.iter().enumerate() {
            let (row, col) = (i / cols, i % cols);
            let code = bytes[row % quarter * cols + col] >> (2 * (row / quarter)) & 3;
            assert_eq!(f32::from(code) - 1.0, *number, "row {row}, column {col}");
        }
        assert!(bytes.iter().all(|byte| byte >> 6 == 0b10), "the last two bits of a byte have no row");
    }

    #[test]
    fn the_largest_stay_and_at_least_one() {
        assert_eq!(largest(&[1.0, 3.0, 2.0, 3.0], 3), [1, 3, 2]);
        assert_eq!((staying(0.65, 100), staying(0.95, 3), staying(0.01, 3)), (35, 1, 3));
    }
}
