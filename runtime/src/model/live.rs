//! Feed-forward layers of which only the live part is read.
//!
//! A neuron whose gate's activation is zero needs no row of up; a neuron whose quantized result is zero needs no column of
//! down. Both are exact: the products left out are zeros. Up is stored with every row by itself, down by its columns, so
//! that what is not needed is not read. Lists are made where they are used: from the gate's results, and from the int8
//! input of down.
use super::linear::{Output, Quantized};
use super::{Activation, Machine, Model, ops};
use crate::error::{Error, SourceError};
use crate::image::{Kind, Tensor, UNIT_ROWS};
use crate::memory::{Limits, padded_rows};
use crate::source::{Extent, WeightSource};
use bitnet_kernel::{Activations, Block, Format, Matrix};
use core::ops::Range;
use zerocopy::{FromBytes, IntoBytes};

/// Neurons that one list names: units enough that a list is long, and few enough that all tokens of a batch find their rows
/// in the second-level cache.
const RUN: usize = 8 * UNIT_ROWS;
/// The same for the sums of one token alone, where kernels take a few dozen rows at a time and nobody comes back to them: the
/// first few dozen of a list are not fetched ahead.
const LONG_RUN: usize = 4 * RUN;

/// Rows of up and columns of down that were read, and all that there are; for one token each.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LiveRows {
    /// Rows of up that were read.
    pub up: u64,
    /// Columns of down that were read.
    pub down: u64,
    /// Rows of up, and columns of down, that there are.
    pub all: u64,
}

impl Model<'_> {
    /// What the feed-forward layers have read since the model was opened. Nothing is counted in models that read all of them.
    pub const fn live_rows(&self) -> LiveRows {
        self.live
    }

    /// [`Model::feed_forward`] in models that have [`crate::Config::live_ffn`].
    pub(super) fn live_feed_forward(&mut self, layer: u32, n: usize) -> Result<(), Error> {
        let (c, weights) = (self.config, self.weights.layer(layer));
        let (hidden, ffn) = (c.hidden as usize, c.ffn as usize);
        let (up, down) = (weights.linear(Kind::UpRows), weights.linear(Kind::DownColumns));
        let mut scales = [0.0; Limits::BATCH_MAX as usize];
        let (stride, scales) = (self.quantized_stride(), &mut scales[..n]);

        self.norm(weights.norm(Kind::FfnNorm), n)?;
        let width = 2 * padded_rows(ffn);
        self.linears(layer, &[weights.linear(Kind::Gate)], c.quantizers.ffn, hidden, n, width, 0)?;
        // A squared ReLU would make zero of minus infinity.
        if !self.scratch.projected.chunks_exact(width).take(n).all(|row| ops::finite(&row[..ffn])) {
            return Err(Error::NotFinite { layer });
        }
        self.quantize(layer, up.input_norm, c.quantizers.ffn, hidden, scales)?;
        let s = &mut self.scratch;
        let x = Quantized { values: s.quantized, stride, scales, tables: s.tables };
        let units = &mut s.units[..n * padded_rows(ffn)];
        let is_live = |gate: f32| match c.activation {
            Activation::SquaredRelu => gate > 0.0,
            Activation::Silu => gate != 0.0,
        };
        self.machine.live_products(&up.whole(), x, &is_live, (s.projected, width), units)?;
        let among = self.machine.among_tokens(units.len());
        Output { rows: s.projected, stride: width, first: 0, units }.spread(
            among,
            n,
            padded_rows(ffn),
            padded_rows(ffn),
        );
        for (row, out) in s.projected.chunks_exact(width).zip(s.norm.chunks_exact_mut(ffn)).take(n) {
            let (gate, up) = (&row[..ffn], &row[padded_rows(ffn)..][..ffn]);
            self.live.up += gate.iter().filter(|&&gate| is_live(gate)).count() as u64;
            c.activation.apply(self.machine.kernels, gate, up, out);
        }

        self.sub_norm(weights.norm(Kind::FfnSubNorm), ffn, n)?;
        self.quantize(layer, down.input_norm, c.quantizers.down, ffn, scales)?;
        let s = &mut self.scratch;
        let live = |x: &[i8]| x[..ffn].iter().filter(|&&v| v != 0).count() as u64;
        self.live.down += s.quantized.chunks_exact(stride).take(n).map(live).sum::<u64>();
        self.live.all += (n * ffn) as u64;
        let x = Quantized { values: s.quantized, stride, scales, tables: s.tables };
        self.machine.live_sums(&down.whole(), x, s.units, s.projected)?;
        self.add_projected(n);
        Ok(())
    }
}

impl Machine<'_> {
    /// `y[unit][t][r] = up[r] x[t]` where the neuron's gate is live, and zero elsewhere. `gate` has rows of one length.
    fn live_products(
        &mut self,
        up: &Tensor,
        x: Quantized<'_>,
        is_live: &(dyn Fn(f32) -> bool + Sync),
        (gate, width): (&[f32], usize),
        y: &mut [f32],
    ) -> Result<(), SourceError> {
        let (kernels, scales, tokens) = (self.kernels, x.scales, x.scales.len());
        let (cols, rows) = (up.cols as usize, up.rows as usize);
        let x = prepare(&x, cols);
        let mut done = 0;
        while done < rows {
            let (piece, range) = rows_from(self.source, up, done)?;
            done = range.end;
            let w = Matrix::new(Format::T2R, range.len(), cols, piece).expect("rows of this tensor");
            let units = &mut y[range.start * tokens..range.end.next_multiple_of(UNIT_ROWS) * tokens];
            self.parallel.for_each_chunk(units, RUN * tokens, &|i, y| {
                let run = range.start + i * RUN..range.end.min(range.start + (i + 1) * RUN);
                for (t, (x, scale)) in x.iter().zip(scales).enumerate().take(tokens) {
                    let gate = &gate[t * width..][run.clone()];
                    let (mut list, mut sums) = ([0; RUN], [0; RUN]);
                    let mut live = 0;
                    for (r, &gate) in gate.iter().enumerate() {
                        list[live] = (i * RUN + r) as u32;
                        live += usize::from(is_live(gate));
                    }
                    kernels.dot_rows(w, &list[..live], *x, &mut sums[..live]);
                    for unit in y.chunks_exact_mut(tokens * UNIT_ROWS) {
                        unit[t * UNIT_ROWS..][..UNIT_ROWS].fill(0.0);
                    }
                    let factor = up.scale * (1.0 / scale);
                    for (&r, &sum) in list[..live].iter().zip(&sums) {
                        let r = r as usize - i * RUN;
                        let y = &mut y[(r / UNIT_ROWS * tokens + t) * UNIT_ROWS + r % UNIT_ROWS];
                        *y = sum as f32 * factor;
                    }
                }
            });
        }
        Ok(())
    }

    /// `y[t] = Σ_r x[t][r] · columns[r]`, of those that are not multiplied by zero. Several parts of the sum are made at once
    /// in `parts`; they are integers, so that their number does not matter.
    fn live_sums(
        &mut self,
        columns: &Tensor,
        x: Quantized<'_>,
        parts: &mut [f32],
        y: &mut [f32],
    ) -> Result<(), SourceError> {
        let (kernels, tokens) = (self.kernels, x.scales.len());
        let (cols, rows) = (columns.cols as usize, columns.rows as usize);
        let width = padded_rows(cols);
        let part = tokens * width;
        let count = (parts.len() / part).min(self.parallel.threads()).max(1);
        let parts = &mut parts[..count * part];
        parts.fill(0.0); // The bits of the integer 0.
        let run = if tokens == 1 { LONG_RUN } else { RUN };
        let mut done = 0;
        while done < rows {
            let (piece, range) = rows_from(self.source, columns, done)?;
            done = range.end;
            let w = Matrix::new(Format::T2R, range.len(), cols, piece).expect("rows of this tensor");
            let share = range.len().div_ceil(count).next_multiple_of(UNIT_ROWS);
            self.parallel.for_each_chunk(parts, part, &|i, sums| {
                let sums = <[i32]>::mut_from_bytes(sums.as_mut_bytes()).expect("of one size");
                let end = range.len().min((i + 1) * share);
                for first in (i * share..end).step_by(run) {
                    for (t, sums) in sums.chunks_exact_mut(width).enumerate() {
                        let values = &x.values[t * x.stride + range.start..][first..end.min(first + run)];
                        let (mut list, mut each) = ([0; LONG_RUN], [0; LONG_RUN]);
                        let mut live = 0;
                        for (r, &value) in values.iter().enumerate() {
                            (list[live], each[live]) = ((first + r) as u32, value);
                            live += usize::from(value != 0);
                        }
                        kernels.sum_rows(w, &list[..live], &each[..live], &mut sums[..cols]);
                    }
                }
            });
        }
        let parts = <[i32]>::ref_from_bytes(parts.as_bytes()).expect("of one size");
        for (t, (y, scale)) in y.chunks_exact_mut(width).zip(x.scales).enumerate() {
            let factor = columns.scale * (1.0 / scale);
            for (c, y) in y[..cols].iter_mut().enumerate() {
                let sum: i32 = parts.chunks_exact(part).map(|p| p[t * width + c]).sum();
                *y = sum as f32 * factor;
            }
        }
        Ok(())
    }
}

/// The rows from `first` on that the source lends at once, whole units, and which they are.
fn rows_from<'a>(
    source: &'a mut dyn WeightSource,
    tensor: &Tensor,
    first: usize,
) -> Result<(&'a [Block], Range<usize>), SourceError> {
    let row_blocks = Format::T2R.tile_blocks(tensor.cols as usize);
    let start = tensor.start + (first * row_blocks) as u32;
    let units = (source.piece_from(start) as usize / (UNIT_ROWS * row_blocks)).max(1);
    let end = (tensor.rows as usize).min(first.saturating_add(units.saturating_mul(UNIT_ROWS)));
    let blocks = ((end - first) * row_blocks) as u32;
    Ok((source.fetch(Extent { start, blocks })?, first..end))
}

/// One entry a token of `x`, ready for rows of `cols` columns; the first over again where there is no token.
fn prepare<'a>(x: &Quantized<'a>, cols: usize) -> [Activations<'a>; Limits::BATCH_MAX as usize] {
    let tokens = x.scales.len();
    core::array::from_fn(|t| {
        let values = &x.values[if t < tokens { t * x.stride } else { 0 }..];
        Activations::new(Format::T2R, cols, values, false, &[])
    })
}
