//! Neurons of the feed-forward layer that fire together, stored side by side.
//!
//! With [`crate::Options::live_ffn`] a token reads some rows of up and some columns of down. Memory is fastest where these
//! lie together, so the packer can put the neurons of each layer into another order: rows of gate and up, weights of the
//! norm before down, and columns of down. All products and sums of integers are the same in any order. The norm's sum of
//! squares is one of floats in the stored order, so logits are those of the image without it up to that sum's rounding;
//! one image gives the same bits on every backend, as ever.
//!
//! The order is a chain that starts with the neuron that fires most; each is followed by the one, of those left, that fires most
//! often after the same tokens. The rows that a token reads less the neighbours that it reads both are its pieces, so a better
//! chain is one with a larger sum over neighbours. On text that was held out the bundled model's pieces are 1.62 rows of up and
//! 1.30 of down as trained; ordered by how often a neuron fires 1.71 and 1.35; in the chain 2.25 and 1.72. Joining the pairs
//! that fire together most before all others gave 2.29 and 1.74, turning round parts of that until nothing improves 2.32 and
//! 1.76: too little for counts of all pairs, which a model of 6,912 neurons has 24 million of in each layer.
use crate::calibrate::{Firing, Linear, Reference, windows};
use crate::checkpoint::Checkpoint;
use crate::{Error, Progress};
use bitnet_runtime::Config;
use bitnet_runtime::image::Kind;
use core::fmt;
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

/// Tokens in a window.
const WINDOW: usize = 256;
/// Windows at most: three quarters decide, the rest show what it is worth.
const WINDOWS: usize = 32;
/// How the line in the header starts that says that neurons are in another order.
pub(crate) const RECORD: &str = "neurons: ";

/// The order in which rows or columns of a tensor are read.
#[derive(Clone, Debug)]
pub(crate) struct Order {
    /// The place in the checkpoint of each neuron.
    neurons: Arc<[u32]>,
    along: Along,
}

/// What of a tensor belongs to a neuron.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Along {
    Rows,
    Columns,
}

/// A run within one row: the row, its first column, and where it lies in what is read.
fn runs(cols: usize, first: usize, len: usize) -> impl Iterator<Item = (usize, usize, core::ops::Range<usize>)> {
    let mut done = 0;
    core::iter::from_fn(move || {
        let (row, col) = ((first + done) / cols, (first + done) % cols);
        let n = (cols - col).min(len - done);
        done += n;
        (n > 0).then(|| (row, col, done - n..done))
    })
}

impl Order {
    /// Reads elements from `first` on of a tensor with so many columns; `read` reads them as they are stored.
    pub(crate) fn floats(
        &self,
        cols: usize,
        first: usize,
        into: &mut [f32],
        mut read: impl FnMut(usize, &mut [f32]) -> Result<(), Error>,
    ) -> Result<(), Error> {
        let mut whole = vec![0.0; if self.along == Along::Columns { cols } else { 0 }];
        for (row, col, run) in runs(cols, first, into.len()) {
            match self.along {
                Along::Rows => read(self.neurons[row] as usize * cols + col, &mut into[run])?,
                Along::Columns => {
                    read(row * cols, &mut whole)?;
                    into[run].iter_mut().zip(&self.neurons[col..]).for_each(|(v, &c)| *v = whole[c as usize]);
                }
            }
        }
        Ok(())
    }

    /// The same for codes, of which a byte has those of four rows, `quarter` apart.
    pub(crate) fn packed(
        &self,
        (quarter, cols): (usize, usize),
        first: usize,
        into: &mut [u8],
        mut read: impl FnMut(usize, &mut [u8]) -> Result<(), Error>,
    ) -> Result<(), Error> {
        let mut part = vec![0; cols];
        for (byte_row, col, run) in runs(cols, first, into.len()) {
            let into = &mut into[run];
            if self.along == Along::Columns {
                read(byte_row * cols, &mut part)?;
                into.iter_mut().zip(&self.neurons[col..]).for_each(|(byte, &c)| *byte = part[c as usize]);
                continue;
            }
            into.fill(0);
            for (plane, row) in (byte_row..self.neurons.len()).step_by(quarter).enumerate() {
                let row = self.neurons[row] as usize;
                let part = &mut part[..into.len()];
                read(row % quarter * cols + col, part)?;
                let codes = part.iter().map(|byte| byte >> (2 * (row / quarter)) & 3);
                into.iter_mut().zip(codes).for_each(|(byte, code)| *byte |= code << (2 * plane));
            }
        }
        Ok(())
    }
}

/// Rows that are read, and the pieces in which they lie.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Pieces {
    /// Rows, or columns, that are read.
    pub rows: u64,
    /// Pieces without a gap.
    pub pieces: u64,
}

impl Pieces {
    fn add(&mut self, firing: &Firing, order: impl Iterator<Item = usize>) {
        let mut before: &[u64] = &[];
        for neuron in order {
            let own = firing.neuron(neuron);
            let rows = together(own, own);
            self.rows += rows;
            self.pieces += rows - together(own, before);
            before = own;
        }
    }
    /// Mean rows in a piece.
    pub fn mean(self) -> f64 {
        self.rows as f64 / self.pieces.max(1) as f64
    }
}

/// What the order of the neurons is worth, on text that did not decide it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reordered {
    /// Tokens of that text.
    pub tokens: usize,
    /// Rows of up and columns of down in the checkpoint's order.
    pub before: [Pieces; 2],
    /// The same in the image's.
    pub after: [Pieces; 2],
    /// The most memory that it took, as promised.
    pub peak: u64,
}

impl fmt::Display for Reordered {
    /// What the image's header records.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ([up, down], [up_now, down_now]) = (self.before.map(Pieces::mean), self.after.map(Pieces::mean));
        writeln!(
            f,
            "{RECORD}those that fire together lie together: {up_now:.2} rows of up are read in one piece, {up:.2} were; \
             {down_now:.2} columns of down, {down:.2} were ({} held-out tokens)",
            self.tokens
        )
    }
}

/// Tokens after which two neurons fire; none if one has no tokens.
fn together(a: &[u64], b: &[u64]) -> u64 {
    a.iter().zip(b).map(|(a, b)| u64::from((a & b).count_ones())).sum()
}

/// The chain of a layer's neurons. Of equal ones the first in the checkpoint comes first.
fn chain(firing: &[Firing; 2]) -> Vec<u32> {
    let both = |a: usize, b: usize| firing.iter().map(|f| together(f.neuron(a), f.neuron(b))).sum::<u64>();
    let mut left: Vec<usize> = (0..firing[0].neurons()).collect();
    let mut order = Vec::with_capacity(left.len());
    let mut last = None;
    while !left.is_empty() {
        let count = |neuron: usize| both(last.unwrap_or(neuron), neuron);
        let best = (0..left.len()).max_by_key(|&i| (count(left[i]), core::cmp::Reverse(i)));
        let neuron = left.remove(best.expect("some are left"));
        order.push(neuron as u32);
        last = Some(neuron);
    }
    order
}

/// The most memory that it takes: the weights of a layer, the residual streams of all tokens, and who fires when.
fn peak(c: &Config) -> u64 {
    let wide = |n: u32| u64::from(n);
    let (hidden, ffn, query) = (wide(c.hidden), wide(c.ffn), wide(c.query_width()));
    let layer = hidden * (2 * query + 2 * wide(c.kv_width()) + 3 * ffn);
    const PASS: u64 = 1024;
    let inside = PASS * (8 * hidden + 6 * query + 4 * wide(c.kv_width()) + 8 * ffn);
    let streams = 2 * hidden * (WINDOWS * WINDOW) as u64;
    let fires = 2 * ffn * (WINDOWS * WINDOW) as u64 / 8;
    4 * (2 * layer + inside + streams) + fires + wide(c.layers) * ffn * 4
}

/// Makes `checkpoint` read with the neurons of each layer in an order by which of them fire together in `text`.
///
/// # Errors
/// If the checkpoint or the text cannot be read, or the user ends it.
pub(crate) fn reorder(
    checkpoint: &mut Checkpoint,
    text: &Path,
    tokenizer: Option<&Path>,
    progress: &mut dyn Progress,
) -> Result<Reordered, Error> {
    let all = windows(checkpoint, tokenizer, text, WINDOW, WINDOWS)?;
    if all.count() < 4 {
        let what = format!(
            "{} windows of {WINDOW} tokens; an order of neurons needs 4, and has use for {WINDOWS}",
            all.count()
        );
        return Err(Error::not_readable(text, what));
    }
    let model = Reference::new(checkpoint, &*progress)?;
    let peak = peak(model.config());
    progress.say(&format!("peak memory while neurons are put in order: {} MiB", peak.div_ceil(1 << 20)));
    let held = all.count().div_ceil(4);
    let (calibration, held) = (all.part(0, all.count() - held), all.part(all.count() - held, held));
    let mut chains = Vec::new();
    model.firing(&calibration, progress, &mut |_, firing| {
        chains.push(chain(&firing));
        Ok(())
    })?;
    let mut reordered =
        Reordered { tokens: held.tokens().len(), before: Default::default(), after: Default::default(), peak };
    model.firing(&held, progress, &mut |layer, firing| {
        for (i, firing) in firing.iter().enumerate() {
            reordered.before[i].add(firing, 0..firing.neurons());
            reordered.after[i].add(firing, chains[layer as usize].iter().map(|&n| n as usize));
        }
        Ok(())
    })?;
    let mut orders = BTreeMap::new();
    for (layer, chain) in (0..).zip(chains) {
        let neurons: Arc<[u32]> = chain.into();
        let kinds = [
            (Kind::Gate, Along::Rows),
            (Kind::Up, Along::Rows),
            (Kind::FfnSubNorm, Along::Columns),
            (Kind::Down, Along::Columns),
        ];
        for (kind, along) in kinds {
            if let Some(tensor) = model.source_in(Linear::new(layer, kind)).and_then(|source| source.tensor()) {
                orders.insert(tensor.name.clone(), Order { neurons: Arc::clone(&neurons), along });
            }
        }
    }
    checkpoint.reorder(orders);
    Ok(reordered)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn order(neurons: &[u32], along: Along) -> Order {
        Order { neurons: neurons.into(), along }
    }

    /// Runs that start and end anywhere are those of the whole.
    #[test]
    fn any_part_of_a_tensor_is_read_in_order() {
        let (rows, cols) = (3, 4);
        let stored: Vec<f32> = (0..rows * cols).map(|i| i as f32).collect();
        let read = |first: usize, into: &mut [f32]| {
            into.copy_from_slice(&stored[first..][..into.len()]);
            Ok(())
        };
        for (order, expected) in [
            (order(&[2, 0, 1], Along::Rows), [8., 9., 10., 11., 0., 1., 2., 3., 4., 5., 6., 7.]),
            (order(&[3, 1, 0, 2], Along::Columns), [3., 1., 0., 2., 7., 5., 4., 6., 11., 9., 8., 10.]),
        ] {
            for (first, end) in (0..=12).flat_map(|first| (first..=12).map(move |end| (first, end))) {
                let mut into = vec![f32::NAN; end - first];
                order.floats(cols, first, &mut into, read).unwrap();
                assert_eq!(into, expected[first..end], "{first}..{end}");
            }
        }
    }

    /// Codes of four rows a byte are in the order of their rows or columns, in parts too.
    #[test]
    fn packed_codes_are_read_in_order() {
        let (rows, cols, quarter) = (6, 5, 2);
        let code = |r: usize, c: usize| ((r * 7 + c * 5) % 3) as u8;
        let pack = |code: &dyn Fn(usize, usize) -> u8| -> Vec<u8> {
            let byte = |i: usize| {
                (i / cols..rows).step_by(quarter).enumerate().fold(0, |b, (p, r)| b | code(r, i % cols) << (2 * p))
            };
            (0..quarter * cols).map(byte).collect()
        };
        let stored = pack(&code);
        let read = |first: usize, into: &mut [u8]| {
            into.copy_from_slice(&stored[first..][..into.len()]);
            Ok(())
        };
        let (by_row, by_col) = ([4, 2, 0, 5, 1, 3], [1, 4, 0, 3, 2]);
        let rows_in_order = pack(&|r, c| code(by_row[r], c));
        let cols_in_order = pack(&|r, c| code(r, by_col[c]));
        for (order, expected) in [
            (order(&by_row.map(|r| r as u32), Along::Rows), rows_in_order),
            (order(&by_col.map(|c| c as u32), Along::Columns), cols_in_order),
        ] {
            for (first, end) in (0..=10).flat_map(|first| (first..=10).map(move |end| (first, end))) {
                let mut into = vec![0xff; end - first];
                order.packed((quarter, cols), first, &mut into, read).unwrap();
                assert_eq!(into, expected[first..end], "{first}..{end}");
            }
        }
    }

    /// Each neuron is followed by the one that fires with it most, and pieces are runs without a gap.
    #[test]
    fn a_chain_puts_side_by_side_what_fires_together() {
        // 0 and 3 fire together, 1 and 2 do.
        let fires = [[0, 2, 4, 6].as_slice(), &[1, 3], &[1, 3, 5], &[0, 2, 4]];
        let mut firing = Firing::new(4, 70);
        fires.iter().enumerate().for_each(|(neuron, tokens)| tokens.iter().for_each(|&t| firing.set(neuron, t)));
        firing.set(0, 69);
        let chained = chain(&[firing.clone(), firing.clone()]);
        assert_eq!(chained, [0, 3, 1, 2]);
        let (mut before, mut after) = (Pieces::default(), Pieces::default());
        before.add(&firing, 0..4);
        after.add(&firing, chained.iter().map(|&n| n as usize));
        assert_eq!(before, Pieces { rows: 13, pieces: 11 });
        assert_eq!(after, Pieces { rows: 13, pieces: 8 });
    }
}
