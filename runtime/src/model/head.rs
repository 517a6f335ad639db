//! The head in two stages: the high plane of all rows, the low plane of those that can be among the best.
//!
//! [`image::split`](crate::image::split) says what the planes are and what bounds the part of a sum that the low plane gives. A
//! pass computes an estimate and an upper bound of every logit from the high plane, takes the rows of the highest estimates,
//! computes their logits, and has in the k-th best of these a threshold that the true k-th best cannot be below. It then computes every
//! row whose bound reaches the threshold, ties included; no other row can be among the k best. Their logits are, bit for
//! bit, those that [`Machine::split_head_all`] computes: the integer sum is the same and so is the multiplication after it.
//! The logits of the rest are minus infinity.
//!
//! Bounds of sums are integers. From there to a bound of the logit nothing can go wrong: conversion to f32 and multiplication
//! by a factor that is not negative are both monotone, rounding included.
use super::{Machine, ops::floats};
use crate::error::SourceError;
use crate::image::split::{COLUMNS, Columns, norm, norms, norms_unit, step};
use crate::image::{Tensor, UNIT_ROWS};
use crate::memory::COARSE_VALUES;
use crate::source::Extent;
use bitnet_kernel::format::decode;
use bitnet_kernel::{Activations, Format, Matrix};
use core::ops::Range;

/// Which logits a caller needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Need {
    /// All of them.
    All,
    /// Those of the so many best tokens, and of all that tie with the last of them. Others may be minus infinity. Counts
    /// beyond [`Need::BEST_MAX`] are as good as [`Need::All`].
    Best(u32),
}

impl Need {
    /// Most tokens that two stages are worth their bounds for.
    pub const BEST_MAX: u32 = 100;
}

/// What the two stages of a head read since the model was made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct HeadStats {
    /// Tokens whose logits were computed in two stages.
    pub tokens: u64,
    /// Rows of the low plane that were read for them: whole tiles, and whole units where most tiles are needed.
    pub rows: u64,
}

/// The sections of a head in two planes.
#[derive(Clone, Copy, Debug)]
pub(super) struct SplitHead {
    pub columns: Extent,
    pub high: Tensor,
    pub apart: Tensor,
    pub norms: Extent,
    pub low: Tensor,
}

/// The input of a head.
#[derive(Debug)]
pub(super) struct HeadInput<'a> {
    /// int8 activations, zero past the columns; the columns apart become zeros.
    pub values: &'a mut [i8],
    /// What they were multiplied by.
    pub scale: f32,
    /// Room for what is known without the low plane, `[units][3][UNIT_ROWS]`: of each row the sum so far, `i32` by its bits, the
    /// upper bound of its logit (before it, the factor from sums to logits), and the logit that the sum would give.
    pub coarse: &'a mut [f32],
}

/// One token's activations, as the stages use them.
#[derive(Clone, Copy, Debug)]
struct Prepared<'a> {
    /// Without the columns apart.
    values: Activations<'a>,
    /// In the columns apart.
    apart: Activations<'a>,
    /// `|values|`, rounded up.
    norm: i32,
    /// `8 Σ values`.
    offset: i32,
    /// What a sum is multiplied by besides the row's scale.
    inverse: f32,
}

/// Rows whose logits make the threshold: some more than are asked for, since the best estimates are not the best logits.
///
/// Taken by their estimates they make the best threshold there is: on the head of SmolLM2-135M with 24 columns apart, 64
/// positions of a text, as many rows reach it as reach the true one (2,038 for the best, 14,459 against 14,446 for the best
/// 40). Taken by their upper bounds they are the rows of the largest scales, and 6,664 and 27,046 reach it.
const fn seeds(best: usize) -> usize {
    2 * best + 8
}
const SEEDS_MAX: usize = seeds(Need::BEST_MAX as usize);
/// Rows of a tile of either plane.
const TILE_ROWS: usize = Format::I4.tile_rows();

/// The best rows by their estimates, the highest first.
#[derive(Debug)]
struct Seeds {
    rows: [(f32, u32); SEEDS_MAX],
    len: usize,
    max: usize,
}

impl Seeds {
    /// Of `rows` rows.
    fn of(coarse: &[f32], rows: usize, max: usize) -> Self {
        let mut seeds = Self { rows: [(0.0, 0); SEEDS_MAX], len: 0, max };
        let mut least = f32::NEG_INFINITY;
        for first in (0..rows).step_by(UNIT_ROWS) {
            let estimates = &Coarse::of(coarse, first / UNIT_ROWS).estimates[..UNIT_ROWS.min(rows - first)];
            // Without leaving early it is a loop of vectors, and nearly all units end with it.
            if seeds.len == max && !estimates.iter().fold(false, |any, &e| any | (e > least)) {
                continue;
            }
            for (r, &estimate) in (first..).zip(estimates) {
                if estimate > least || seeds.len < max {
                    least = seeds.insert(estimate, r as u32);
                }
            }
        }
        seeds
    }
    /// Returns what an estimate must exceed from now on.
    fn insert(&mut self, estimate: f32, row: u32) -> f32 {
        let at = self.rows[..self.len].partition_point(|&(e, _)| e >= estimate);
        if at < self.max {
            self.len = (self.len + 1).min(self.max);
            self.rows.copy_within(at..self.len - 1, at + 1);
            self.rows[at] = (estimate, row);
        }
        if self.len < self.max { f32::NEG_INFINITY } else { self.rows[self.len - 1].0 }
    }
}

/// What is known of the rows of a unit without the low plane, one value a row.
#[derive(Clone, Copy, Debug)]
struct Coarse<'a> {
    /// Sums, `i32` by their bits.
    sums: &'a [f32],
    /// Upper bounds of logits.
    uppers: &'a [f32],
    /// Logits without the low plane.
    estimates: &'a [f32],
}

impl<'a> Coarse<'a> {
    /// Of unit `u`.
    fn of(coarse: &'a [f32], u: usize) -> Self {
        let (sums, rest) = coarse[u * COARSE_VALUES * UNIT_ROWS..].split_at(UNIT_ROWS);
        let (uppers, rest) = rest.split_at(UNIT_ROWS);
        Self { sums, uppers, estimates: &rest[..UNIT_ROWS] }
    }
}

/// Whether a row with this bound can be among the best; one without a bound can.
fn reaches(upper: f32, threshold: f32) -> bool {
    upper >= threshold || upper.is_nan()
}

/// Whether one of these rows can.
fn one_reaches(uppers: &[f32], threshold: f32) -> bool {
    uppers.iter().fold(false, |any, &upper| any | reaches(upper, threshold))
}

/// The rows of a unit to multiply: runs of tiles in which a row's bound reaches the threshold, or all if those are most.
///
/// A tile of which one row is needed is read whole. Its rows take turns of a cache line, and laying those of four tiles side by
/// side for one product cost 240 ns a row of 576 columns: little less than the 270 to 350 ns of a tile where it lies, and rows
/// to read come together. In order a tile takes 140 ns, so a unit is read as a whole if most of it is needed.
fn runs(uppers: &[f32], threshold: f32) -> impl Iterator<Item = Range<usize>> {
    let tiles = uppers.len().div_ceil(TILE_ROWS);
    let mut live = 0u32;
    if one_reaches(uppers, threshold) {
        for (tile, uppers) in uppers.chunks(TILE_ROWS).enumerate() {
            live |= u32::from(one_reaches(uppers, threshold)) << tile;
        }
    }
    if 2 * live.count_ones() as usize > tiles {
        live = (1 << tiles) - 1;
    }
    let rows = uppers.len();
    core::iter::from_fn(move || {
        let start = if live == 0 { return None } else { live.trailing_zeros() };
        let end = start + (live >> start).trailing_ones();
        live &= u32::MAX << end;
        Some(start as usize * TILE_ROWS..(end as usize * TILE_ROWS).min(rows))
    })
}

const _: () = assert!(UNIT_ROWS / TILE_ROWS < u32::BITS as usize, "a bit for each tile");

/// A logit, from the sum without the low plane (by its bits) and the low plane's.
fn logit(sum: f32, low: i32, factor: f32) -> f32 {
    (sum.to_bits() as i32 + low) as f32 * factor
}

impl Machine<'_> {
    /// The logits that are needed.
    pub(super) fn split_head(
        &mut self,
        head: &SplitHead,
        input: HeadInput<'_>,
        need: Need,
        logits: &mut [f32],
        stats: &mut HeadStats,
    ) -> Result<(), SourceError> {
        match need {
            Need::Best(best) if best <= Need::BEST_MAX => {
                stats.rows += self.split_head_best(head, input, best as usize, logits)?;
                stats.tokens += 1;
                Ok(())
            }
            _ => self.split_head_all(head, input, logits),
        }
    }

    /// Makes of `x`, row `row` of the high plane, that row of the embedding that the head is too.
    pub(super) fn split_embedding(&mut self, head: &SplitHead, row: u32, x: &mut [f32]) -> Result<(), SourceError> {
        let (tile, place, _) = head.low.row(row);
        let steps = self.source.fetch_row(tile)?.chunks_exact(Format::I4.step_blocks());
        for (step, x) in steps.zip(x.chunks_mut(Format::I4.step_cols())) {
            for (c, x) in x.iter_mut().enumerate() {
                *x = 16.0 * *x + 8.0 + f32::from(decode(Format::I4, step, place, c));
            }
        }
        let columns = Columns::from_floats(floats(self.source.fetch_row(head.columns)?));
        let (tile, place, scale) = head.apart.row(row);
        let (block, at) = scale.expect(ROW_SCALES);
        let step_of_row = step(floats(self.source.fetch_row(block)?)[at]) as f32;
        let tile = self.source.fetch_row(tile)?;
        for (c, &column) in columns.indices().iter().enumerate() {
            if let Some(x) = x.get_mut(column as usize) {
                *x = f32::from(decode(Format::I8, tile, place, c)) * step_of_row;
            }
        }
        let (_, _, scale) = head.low.row(row);
        let (block, at) = scale.expect(ROW_SCALES);
        let scale = floats(self.source.fetch_row(block)?)[at];
        x.iter_mut().for_each(|x| *x *= scale);
        Ok(())
    }

    /// All logits: every row of both planes.
    fn split_head_all(
        &mut self,
        head: &SplitHead,
        input: HeadInput<'_>,
        logits: &mut [f32],
    ) -> Result<(), SourceError> {
        let kernels = self.kernels;
        let HeadInput { values, scale, coarse } = input;
        let mut apart = [0; COLUMNS];
        let x = self.prepare_split(head, values, &mut apart, scale)?;
        self.coarse(head, &x, coarse)?;
        let coarse = &*coarse;
        self.run(&[head.low], 1, logits, &|tensor, u, blocks, y| {
            let rows = tensor.unit_rows(u);
            let (weights, scales) = blocks.split_at(tensor.weight_blocks(rows));
            let mut low = [0; UNIT_ROWS];
            let w = Matrix::new(Format::I4, rows, tensor.cols as usize, weights).expect("a unit of this tensor");
            kernels.matvec(w, x.values, &mut low[..rows]);
            let coarse = Coarse::of(coarse, u as usize);
            for (((y, &sum), &low), scale) in y.iter_mut().zip(coarse.sums).zip(&low[..rows]).zip(floats(scales)) {
                *y = logit(sum, low, scale * x.inverse);
            }
        })
    }

    /// The logits of the `best` best rows and of those that tie with the last, minus infinity for others. Returns how many
    /// rows were computed.
    fn split_head_best(
        &mut self,
        head: &SplitHead,
        input: HeadInput<'_>,
        best: usize,
        logits: &mut [f32],
    ) -> Result<u64, SourceError> {
        let HeadInput { values, scale, coarse } = input;
        let mut apart = [0; COLUMNS];
        let x = self.prepare_split(head, values, &mut apart, scale)?;
        self.coarse(head, &x, coarse)?;
        let coarse = &*coarse;

        let seeds = Seeds::of(coarse, head.low.rows as usize, seeds(best));
        let mut exact = [0.0; SEEDS_MAX];
        let exact = &mut exact[..seeds.len];
        for (exact, &(_, row)) in exact.iter_mut().zip(&seeds.rows) {
            let (tile, place, scale) = head.low.row(row);
            let (block, at) = scale.expect(ROW_SCALES);
            let factor = floats(self.source.fetch_row(block)?)[at] * x.inverse;
            let mut low = [0; TILE_ROWS];
            let w = Matrix::new(Format::I4, TILE_ROWS, head.low.cols as usize, self.source.fetch_row(tile)?);
            self.kernels.matvec(w.expect("a tile"), x.values, &mut low);
            let (unit, row) = (row as usize / UNIT_ROWS, row as usize % UNIT_ROWS);
            *exact = logit(Coarse::of(coarse, unit).sums[row], low[place], factor);
        }
        // What is not a number makes no threshold: then all rows are computed.
        exact.sort_unstable_by(|a, b| b.total_cmp(a));
        let numbers = exact.iter().all(|e| e.is_finite());
        let threshold = exact.get(best - 1).copied().filter(|_| numbers).unwrap_or(f32::NEG_INFINITY);
        self.refine(head.low, &x, threshold, coarse, logits)
    }

    /// Moves the columns apart out of `values` into `apart` and prepares both.
    fn prepare_split<'a>(
        &mut self,
        head: &SplitHead,
        values: &'a mut [i8],
        apart: &'a mut [i8; COLUMNS],
        scale: f32,
    ) -> Result<Prepared<'a>, SourceError> {
        let cols = head.high.cols as usize;
        let columns = Columns::from_floats(floats(self.source.fetch(head.columns)?));
        *apart = columns.take(&mut values[..cols]);
        let norm = norm(&values[..cols]) as i32;
        let values = self.kernels.prepare(Format::I4, cols, values, &mut []);
        let apart = self.kernels.prepare(Format::I8, COLUMNS, apart, &mut []);
        Ok(Prepared { values, apart, norm, offset: 8 * values.sum(), inverse: 1.0 / scale })
    }

    /// What the high plane and the columns apart say of every row.
    ///
    /// Three sections one after another, since a source lends one piece at a time.
    fn coarse(&mut self, head: &SplitHead, x: &Prepared<'_>, coarse: &mut [f32]) -> Result<(), SourceError> {
        let kernels = self.kernels;
        self.run(&[head.high], COARSE_VALUES, coarse, &|tensor, u, blocks, y| {
            let rows = tensor.unit_rows(u);
            let (weights, scales) = blocks.split_at(tensor.weight_blocks(rows));
            let w = Matrix::new(Format::I4, rows, tensor.cols as usize, weights).expect("a unit of this tensor");
            let mut products = [0; UNIT_ROWS];
            kernels.matvec(w, x.values, &mut products[..rows]);
            let (sums, factors) = y.split_at_mut(UNIT_ROWS);
            for (sum, product) in sums.iter_mut().zip(products) {
                *sum = f32::from_bits((16 * product + x.offset) as u32);
            }
            factors.iter_mut().zip(floats(scales)).for_each(|(factor, scale)| *factor = scale * x.inverse);
        })?;
        self.run(&[head.apart], COARSE_VALUES, coarse, &|tensor, u, blocks, y| {
            let rows = tensor.unit_rows(u);
            let (weights, steps) = blocks.split_at(tensor.weight_blocks(rows));
            let w = Matrix::new(Format::I8, rows, COLUMNS, weights).expect("a unit of this tensor");
            let mut products = [0; UNIT_ROWS];
            kernels.matvec(w, x.apart, &mut products[..rows]);
            let (sums, rest) = y.split_at_mut(UNIT_ROWS);
            let (factors, estimates) = rest.split_at_mut(UNIT_ROWS);
            for (((y, product), &scale), (factor, estimate)) in
                sums.iter_mut().zip(products).zip(floats(steps)).zip(factors.iter().zip(estimates))
            {
                let sum = y.to_bits() as i32 + step(scale) * product;
                *y = f32::from_bits(sum as u32);
                *estimate = sum as f32 * factor;
            }
        })?;
        let extent = |u| norms_unit(head.norms, u);
        self.run_units(head.high.units(), &extent, COARSE_VALUES * UNIT_ROWS, coarse, &|_, unit, y| {
            let (sums, uppers) = y.split_at_mut(UNIT_ROWS);
            for ((sum, upper), &norm) in sums.iter().zip(uppers).zip(norms(unit)) {
                // A product that no norm of the packer's gives may be beyond the sum's range, no sum is.
                let most = (sum.to_bits() as i32).saturating_add(i32::from(norm) * x.norm);
                let factor = *upper;
                // A factor that turns bounds round is none of the packer's; then the row is always computed.
                *upper = if factor >= 0.0 { most as f32 * factor } else { f32::INFINITY };
            }
        })
    }

    /// Computes the logits of the rows whose bounds reach the threshold; those of the others become minus infinity. Returns
    /// the number of rows that were read.
    fn refine(
        &mut self,
        low: Tensor,
        x: &Prepared<'_>,
        threshold: f32,
        coarse: &[f32],
        logits: &mut [f32],
    ) -> Result<u64, SourceError> {
        let (kernels, units, cols) = (self.kernels, low.units(), low.cols as usize);
        let uppers = |u: u32| &Coarse::of(coarse, u as usize).uppers[..low.unit_rows(u)];
        let live = |u: u32| one_reaches(uppers(u), threshold);
        let (tile_blocks, mut first) = (Format::I4.tile_blocks(cols), 0);
        while first < units {
            let start = low.unit(first).start;
            let piece_blocks = self.source.piece_from(start);
            let fits = |u: u32| low.unit(u).end() - start <= piece_blocks;
            // All at once where weights lie in memory; elsewhere only units in which there is a row to read.
            let end = if fits(units - 1) {
                units
            } else if live(first) {
                (first + 1..units).find(|&u| !fits(u) || !live(u)).unwrap_or(units)
            } else {
                logits[first as usize * UNIT_ROWS..][..UNIT_ROWS].fill(f32::NEG_INFINITY);
                first += 1;
                continue;
            };
            let piece = self.source.fetch(Extent { start, blocks: low.unit(end - 1).end() - start })?;
            let threads = self.parallel.threads() as u32;
            // Rows to read are not spread evenly, so chunks are small.
            let chunk = if threads == 1 { end - first } else { (end - first).div_ceil(16 * threads) };
            let logits = &mut logits[first as usize * UNIT_ROWS..end as usize * UNIT_ROWS];
            self.parallel.for_each_chunk(logits, chunk as usize * UNIT_ROWS, &|i, logits| {
                for (u, y) in (first + i as u32 * chunk..).zip(logits.chunks_exact_mut(UNIT_ROWS)) {
                    y.fill(f32::NEG_INFINITY);
                    let Extent { start: at, blocks } = low.unit(u);
                    let unit = &piece[(at - start) as usize..][..blocks as usize];
                    let (weights, scales) = unit.split_at(low.weight_blocks(low.unit_rows(u)));
                    let Coarse { sums, uppers: bounds, .. } = Coarse::of(coarse, u as usize);
                    for rows in runs(uppers(u), threshold) {
                        let (tile, tiles) = (rows.start / TILE_ROWS, rows.len().div_ceil(TILE_ROWS));
                        let weights = &weights[tile * tile_blocks..][..tiles * tile_blocks];
                        let w = Matrix::new(Format::I4, rows.len(), cols, weights).expect("whole tiles of this tensor");
                        let mut products = [0; UNIT_ROWS];
                        kernels.matvec(w, x.values, &mut products[..rows.len()]);
                        for (r, product) in rows.zip(products) {
                            if reaches(bounds[r], threshold) {
                                y[r] = logit(sums[r], product, floats(scales)[r] * x.inverse);
                            }
                        }
                    }
                }
            });
            first = end;
        }
        Ok((0..units).flat_map(|u| runs(uppers(u), threshold)).map(|rows| rows.len() as u64).sum())
    }
}

/// Both planes and what is apart have row scales.
const ROW_SCALES: &str = "this format has row scales";

#[cfg(all(test, feature = "std"))]
mod tests {
    use super::*;
    use crate::backend;
    use crate::image::split::{NORM_BLOCKS, join, split};
    use crate::parallel::{Parallel, Pool, Serial};
    use crate::source::{BlockDevice, Mapped, Streamed, WeightSource};
    use alloc::vec::Vec;
    use alloc::{format, vec};
    use bitnet_kernel::format::encode;
    use bitnet_kernel::{Block, Kernels};
    use zerocopy::IntoBytes;

    /// Rows and columns with tails, and more columns than are multiplied at once.
    const SHAPES: [(usize, usize); 3] = [(200, 300), (131, 2100), (30, 20)];
    const FIRST_APART: usize = 2;

    /// A head as it lies in an image, and its int8 weights.
    struct Head {
        blocks: Vec<Block>,
        head: SplitHead,
        low: Vec<Vec<i8>>,
        rows: Vec<Row>,
    }

    /// What a row has besides its planes.
    #[derive(Clone, Copy)]
    struct Row {
        scale: f32,
        norm: u16,
        step: u8,
        apart: [i8; COLUMNS],
    }

    fn random(seed: u64) -> impl FnMut(i32) -> i32 {
        let mut state = seed;
        move |n| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            ((state >> 33) as i32) % n
        }
    }

    /// Rows of random weights, the columns apart among the first. Rows 5, 6 and the last are equal, row 7 is zero, and the low
    /// parts of row 8 are all the same, with the largest scale. `less` is taken from every norm.
    fn head(rows: usize, cols: usize, less: u16) -> Head {
        let mut random = random(rows as u64);
        let columns = Columns::new(core::array::from_fn(|i| (FIRST_APART + i) as u32));
        let mut weights: Vec<Vec<i8>> =
            (0..rows).map(|_| (0..cols).map(|_| (random(255) - 127) as i8).collect()).collect();
        weights[6] = weights[5].clone();
        weights[rows - 1] = weights[5].clone();
        weights[7].fill(0);
        weights[8].fill(15);
        let mut apart: Vec<Row> = Vec::new();
        for (r, row) in weights.iter_mut().enumerate() {
            let weights = columns.take(row);
            let mut low: Vec<i8> = row.iter().map(|&w| split(w).1).collect();
            let _ = columns.take(&mut low);
            let scale = match r {
                8 => 0.03,
                _ if r == 6 || r == rows - 1 => apart[5].scale,
                _ => 0.01 + 0.001 * (random(5) as f32),
            };
            let step = 1 + (r % 3 * usize::from(!(5..9).contains(&r) && r != rows - 1)) as u8;
            apart.push(Row { scale, norm: norm(&low) as u16 - less, step, apart: weights });
        }
        let low: Vec<Vec<i8>> = weights.iter().map(|row| row.iter().map(|&w| split(w).1).collect()).collect();
        let mut blocks = vec![Block::ZERO; COLUMNS / 16];
        for (block, floats) in blocks.iter_mut().zip(columns.to_floats().chunks(16)) {
            block.0[..4 * floats.len()].copy_from_slice(floats.as_bytes());
        }
        let columns = Extent { start: 0, blocks: COLUMNS as u32 / 16 };
        // A matrix with row scales, from its weight in a row and column and the scale of a row.
        let matrix =
            |blocks: &mut Vec<Block>, format, cols, w: &dyn Fn(usize, usize) -> i8, scale: &dyn Fn(&Row) -> f32| {
                let start = blocks.len() as u32;
                for first in (0..rows).step_by(UNIT_ROWS) {
                    let n = UNIT_ROWS.min(rows - first);
                    let mut unit = vec![Block::ZERO; Format::matrix_blocks(format, n, cols)];
                    encode(format, n, cols, &mut unit, |r, c| w(first + r, c));
                    blocks.append(&mut unit);
                    for rows in apart[first..first + n].chunks(16) {
                        let mut block = Block::ZERO;
                        for (bytes, row) in block.0.chunks_exact_mut(4).zip(rows) {
                            bytes.copy_from_slice(&scale(row).to_le_bytes());
                        }
                        blocks.push(block);
                    }
                }
                Tensor { format, rows: rows as u32, cols: cols as u32, start, scale: 1.0 }
            };
        let high = matrix(&mut blocks, Format::I4, cols, &|r, c| split(weights[r][c]).0, &|row| row.scale);
        let apart_of = |r: usize, c: usize| apart[r].apart[c];
        let apart_matrix = matrix(&mut blocks, Format::I8, COLUMNS, &apart_of, &|row| row.step.into());
        let start = blocks.len() as u32;
        for rows in apart.chunks(32) {
            let mut block = Block::ZERO;
            for (bytes, row) in block.0.chunks_exact_mut(2).zip(rows) {
                bytes.copy_from_slice(&row.norm.to_le_bytes());
            }
            blocks.push(block);
        }
        blocks.resize(start as usize + rows.div_ceil(UNIT_ROWS) * NORM_BLOCKS, Block::ZERO);
        let norms = Extent { start, blocks: blocks.len() as u32 - start };
        let low_plane = matrix(&mut blocks, Format::I4, cols, &|r, c| split(weights[r][c]).1, &|row| row.scale);
        Head { blocks, head: SplitHead { columns, high, apart: apart_matrix, norms, low: low_plane }, low, rows: apart }
    }

    struct Disk<'a>(&'a [Block]);

    impl BlockDevice for Disk<'_> {
        fn read(&mut self, start: u32, into: &mut [Block]) -> Result<(), SourceError> {
            into.copy_from_slice(&self.0[start as usize..][..into.len()]);
            Ok(())
        }
    }

    fn logits(
        h: &Head,
        kernels: &dyn Kernels,
        threads: Option<&Pool>,
        streamed: bool,
        x: &[i8],
        need: Need,
    ) -> Vec<f32> {
        let (rows, cols) = (h.head.high.rows as usize, h.head.high.cols as usize);
        let mut staging = vec![Block::ZERO; h.head.high.unit(0).blocks.max(h.head.apart.unit(0).blocks) as usize];
        let (mut mapped, mut disk) = (Mapped::new(&h.blocks), Streamed::new(Disk(&h.blocks), &mut staging));
        let source: &mut dyn WeightSource = if streamed { &mut disk } else { &mut mapped };
        let parallel: &dyn Parallel = threads.map_or(&Serial, |pool| pool);
        let mut machine = Machine { kernels, parallel, source };
        let mut values = x.to_vec();
        values.resize(cols.next_multiple_of(256), 0);
        let padded = rows.next_multiple_of(UNIT_ROWS);
        let (mut coarse, mut out) = (vec![0.0; COARSE_VALUES * padded], vec![0.0; padded]);
        let input = HeadInput { values: &mut values, scale: 3.0, coarse: &mut coarse };
        let mut stats = HeadStats::default();
        machine.split_head(&h.head, input, need, &mut out, &mut stats).unwrap();
        out.truncate(rows);
        let tiles = |unit: &[f32]| {
            unit.chunks(TILE_ROWS).map(|t| (t.iter().any(|&y| y > f32::NEG_INFINITY), t.len())).collect()
        };
        let of_unit = |unit: &[f32]| {
            let tiles: Vec<(bool, usize)> = tiles(unit);
            let live = tiles.iter().filter(|t| t.0).count();
            tiles.iter().filter(|t| t.0 || 2 * live > tiles.len()).map(|t| t.1).sum::<usize>()
        };
        let read: usize = out.chunks(UNIT_ROWS).map(of_unit).sum();
        assert_eq!(stats.rows, read as u64 * stats.tokens);
        out
    }

    /// The vectors that are hardest: none, the extremes, single columns, columns apart alone, the low parts of a row, which
    /// make its bound exact, and their opposites; and random ones.
    fn inputs(h: &Head, cols: usize) -> Vec<Vec<i8>> {
        let apart = FIRST_APART..FIRST_APART + COLUMNS;
        let mut inputs = vec![vec![0; cols], vec![127; cols], vec![-127; cols]];
        let one = |at: usize, value| (0..cols).map(|c| if c == at { value } else { 0 }).collect();
        inputs.extend([one(0, 127), one(cols - 1, -127), one(FIRST_APART, 127)]);
        inputs.push((0..cols).map(|c| if apart.contains(&c) { 127 } else { 0 }).collect());
        for r in [0, 5, 8, 11] {
            for factor in [15, -15, 1] {
                let along = |c: usize| if apart.contains(&c) { 0 } else { h.low[r][c] * factor };
                inputs.push((0..cols).map(along).collect());
            }
        }
        let mut random = random(9);
        for spread in [3, 30, 255, 255] {
            inputs.push((0..cols).map(|_| (random(spread) - spread / 2) as i8).collect());
        }
        inputs
    }

    /// What [`Need::Best`] promises.
    fn check(all: &[f32], best: &[f32], k: usize) -> Result<(), &'static str> {
        let mut order: Vec<f32> = all.to_vec();
        order.sort_by(|a, b| b.total_cmp(a));
        let last = order[k.min(order.len()) - 1];
        for (&a, &b) in all.iter().zip(best) {
            if a >= last && a.to_bits() != b.to_bits() {
                return Err("one of the best is missing");
            }
            if b > f32::NEG_INFINITY && a.to_bits() != b.to_bits() {
                return Err("a logit differs");
            }
        }
        Ok(())
    }

    #[test]
    fn the_best_are_those_of_the_full_head_in_every_way() {
        let pool = Pool::new(3).unwrap();
        for (rows, cols) in SHAPES {
            let h = head(rows, cols, 0);
            for (i, x) in inputs(&h, cols).iter().enumerate() {
                let all = logits(&h, &bitnet_kernel::portable::Portable, None, false, x, Need::All);
                for kernels in backend::available() {
                    let name = format!("{rows}x{cols}, input {i}, {}", kernels.name());
                    for (threads, streamed) in [(None, false), (Some(&pool), false), (None, true)] {
                        assert_eq!(logits(&h, kernels, threads, streamed, x, Need::All), all, "{name}");
                        let one = logits(&h, kernels, threads, streamed, x, Need::Best(1));
                        assert_eq!(check(&all, &one, 1), Ok(()), "{name}, 1");
                    }
                    for k in [2, 7, 40, 100, 101] {
                        let best = logits(&h, kernels, Some(&pool), k % 2 == 1, x, Need::Best(k));
                        assert_eq!(check(&all, &best, k as usize), Ok(()), "{name}, {k}");
                    }
                }
            }
        }
    }

    /// The integer sum is the definition's, scale and all.
    #[test]
    fn the_full_head_is_the_definition() {
        let (rows, cols) = SHAPES[0];
        let h = head(rows, cols, 0);
        for x in inputs(&h, cols) {
            let all = logits(&h, backend::best(), None, false, &x, Need::All);
            for (r, &found) in all.iter().enumerate() {
                let row = &h.rows[r];
                let (tile, place, _) = h.head.high.row(r as u32);
                let tile = &h.blocks[tile.start as usize..][..tile.blocks as usize];
                let mut sum = 0;
                for c in 0..cols {
                    let weight = match c.checked_sub(FIRST_APART).filter(|&i| i < COLUMNS) {
                        Some(i) => i32::from(row.apart[i]) * i32::from(row.step),
                        None => {
                            let high = decode(Format::I4, &tile[c / 128 * 4..][..4], place, c % 128);
                            join(high, h.low[r][c])
                        }
                    };
                    sum += weight * i32::from(x[c]);
                }
                assert_eq!(found, sum as f32 * (row.scale * (1.0 / 3.0)), "row {r}");
            }
        }
    }

    /// The check can fail: with norms that are lower by one it does, for the inputs that make bounds exact.
    #[test]
    fn bounds_that_are_too_low_are_found() {
        let (rows, cols) = SHAPES[0];
        let (sound, broken) = (head(rows, cols, 0), head(rows, cols, 1));
        let failures = inputs(&sound, cols).into_iter().filter(|x| {
            let all = logits(&sound, backend::best(), None, false, x, Need::All);
            let best = logits(&broken, backend::best(), None, false, x, Need::Best(1));
            check(&all, &best, 1).is_err()
        });
        assert!(failures.count() > 0);
    }

    /// Without activations outside the columns apart every bound is exact: then no row is read but the best and its equals.
    #[test]
    fn no_row_is_read_that_cannot_be_the_best() {
        let (rows, cols) = SHAPES[1];
        let h = head(rows, cols, 0);
        let apart = FIRST_APART..FIRST_APART + COLUMNS;
        let x: Vec<i8> = (0..cols).map(|c| if apart.contains(&c) { 127 } else { 0 }).collect();
        let all = logits(&h, backend::best(), None, false, &x, Need::All);
        let best = logits(&h, backend::best(), None, false, &x, Need::Best(1));
        let max = all.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let expected: Vec<f32> = all.iter().map(|&y| if y == max { y } else { f32::NEG_INFINITY }).collect();
        assert_eq!(best, expected);
    }
}
