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
use crate::image::split::{Apart, COLUMNS, Columns, ROW_BYTES, apart_unit, norm};
use crate::image::{Tensor, UNIT_ROWS};
use crate::memory::COARSE_VALUES;
use crate::source::Extent;
use bitnet_kernel::format::decode;
use bitnet_kernel::{Activations, Block, Format, Kernels, Matrix};
use core::ops::Range;
use zerocopy::IntoBytes;

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
    /// Rows of the low plane that were read for them.
    pub rows: u64,
}

/// The sections of a head in two planes.
#[derive(Clone, Copy, Debug)]
pub(super) struct SplitHead {
    pub columns: Extent,
    pub high: Tensor,
    pub apart: Extent,
    pub low: Tensor,
}

/// The input of a head.
#[derive(Debug)]
pub(super) struct HeadInput<'a> {
    /// int8 activations, zero past the columns; the columns apart become zeros.
    pub values: &'a mut [i8],
    /// What they were multiplied by.
    pub scale: f32,
    /// Room for what the high plane says, `[units][3][UNIT_ROWS]`: of each row the sum without the low plane, `i32` by its
    /// bits, the logit that would give, and the upper bound of its logit.
    pub coarse: &'a mut [f32],
}

/// One token's activations, as the stages use them.
#[derive(Clone, Copy, Debug)]
struct Prepared<'a> {
    /// Without the columns apart.
    values: Activations<'a>,
    /// In the columns apart.
    apart: [i16; COLUMNS],
    /// `|values|`, rounded up.
    norm: i64,
    /// `8 Σ values`.
    offset: i32,
    /// What a sum is multiplied by besides the row's scale.
    inverse: f32,
}

/// Rows whose logits make the threshold: some more than are asked for, since the best estimates are not the best logits.
///
/// Taken by their estimates they make the best threshold there is: on the head of SmolLM2-135M, 64 positions of a text, as many
/// rows reach it as reach the true one (2,038 for the best, 14,459 against 14,446 for the best 40). Taken by their upper bounds
/// they are the rows of the largest scales, and 6,664 and 27,046 reach it.
const fn seeds(best: usize) -> usize {
    2 * best + 8
}
const SEEDS_MAX: usize = seeds(Need::BEST_MAX as usize);
/// Steps of one row that are multiplied at once, and the columns in them: 4 KiB for four rows.
const CHUNK_STEPS: usize = 16;
const CHUNK_COLS: usize = CHUNK_STEPS * Format::I4.step_cols();
const CHUNKS_MAX: usize = Format::COLS_MAX / CHUNK_COLS;

/// The best rows by their estimates, the highest first.
#[derive(Debug)]
struct Seeds {
    rows: [(f32, u32); SEEDS_MAX],
    len: usize,
    max: usize,
}

impl Seeds {
    fn of(estimates: impl Iterator<Item = f32>, max: usize) -> Self {
        let mut seeds = Self { rows: [(0.0, 0); SEEDS_MAX], len: 0, max };
        let mut least = f32::NEG_INFINITY;
        for (r, estimate) in estimates.enumerate() {
            if estimate > least || seeds.len < max {
                least = seeds.insert(estimate, r as u32);
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

/// A row of the low plane that is to be multiplied.
#[derive(Clone, Copy, Debug)]
struct Row<'a> {
    /// What the caller knows it by.
    index: usize,
    /// The tile it lies in, and its place there.
    tile: &'a [Block],
    place: usize,
    /// The scale of its sum.
    factor: f32,
}

impl Row<'_> {
    /// Its logit, from the sum without the low plane (by its bits) and that of the low plane.
    fn logit(&self, sum: f32, low: i32) -> f32 {
        logit(sum, low, self.factor)
    }
}

/// Multiplies scattered rows of a plane of [`Format::I4`]: four at a time are laid side by side as a tile.
///
/// Rows lie in tiles of four, so a row is cache lines 256 bytes apart. Whole tiles would read four rows for one.
struct Gather<'a> {
    kernels: &'a dyn Kernels,
    /// The activations, prepared for [`CHUNK_COLS`] columns each.
    x: &'a [Activations<'a>],
    rows: [Row<'a>; 4],
    len: usize,
}

impl<'a> Gather<'a> {
    fn new(kernels: &'a dyn Kernels, x: &'a [Activations<'a>]) -> Self {
        Self { kernels, x, rows: [Row { index: 0, tile: &[], place: 0, factor: 0.0 }; 4], len: 0 }
    }
    /// Adds a row; there is room for four.
    fn push(&mut self, row: Row<'a>) {
        self.rows[self.len] = row;
        self.len += 1;
    }
    /// Gives each row that was added with its product to `each`; there are none afterwards.
    fn multiply(&mut self, mut each: impl FnMut(&Row<'_>, i32)) {
        let rows = &self.rows[..core::mem::take(&mut self.len)];
        if rows.is_empty() {
            return;
        }
        let mut sums = [0; 4];
        let mut buffer = [Block::ZERO; 4 * CHUNK_STEPS];
        for (chunk, x) in self.x.iter().enumerate() {
            let steps = Format::I4.steps(x.cols());
            for (r, row) in rows.iter().enumerate() {
                let blocks = row.tile[4 * chunk * CHUNK_STEPS..].iter().skip(row.place).step_by(4);
                for (to, from) in buffer.iter_mut().skip(r).step_by(4).zip(blocks).take(steps) {
                    *to = *from;
                }
            }
            let w = Matrix::new(Format::I4, rows.len(), x.cols(), &buffer[..4 * steps]);
            let mut part = [0; 4];
            self.kernels.matvec(w.expect("whole steps of one tile"), *x, &mut part[..rows.len()]);
            sums.iter_mut().zip(part).for_each(|(sum, part)| *sum += part);
        }
        rows.iter().zip(sums).for_each(|(row, sum)| each(row, sum));
    }
}

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
        let steps = self.source.fetch(tile)?.chunks_exact(Format::I4.step_blocks());
        for (step, x) in steps.zip(x.chunks_mut(Format::I4.step_cols())) {
            for (c, x) in x.iter_mut().enumerate() {
                *x = 16.0 * *x + 8.0 + f32::from(decode(Format::I4, step, place, c));
            }
        }
        let columns = Columns::from_floats(floats(self.source.fetch(head.columns)?));
        let unit = self.source.fetch(apart_unit(head.apart, row / UNIT_ROWS as u32))?;
        let (rows, _) = unit.as_bytes().as_chunks::<ROW_BYTES>();
        let apart = Apart::from_bytes(&rows[row as usize % UNIT_ROWS]);
        for (&column, weight) in columns.indices().iter().zip(apart.weights) {
            if let Some(x) = x.get_mut(column as usize) {
                *x = f32::from(weight) * f32::from(apart.step);
            }
        }
        x.iter_mut().for_each(|x| *x *= apart.scale);
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
        let x = self.prepare_split(head, values, scale)?;
        self.coarse(head, &x, coarse)?;
        let coarse = &*coarse;
        self.run(&[head.low], 1, logits, &|tensor, u, blocks, y| {
            let rows = tensor.unit_rows(u);
            let (weights, scales) = blocks.split_at(tensor.weight_blocks(rows));
            let mut low = [0; UNIT_ROWS];
            let w = Matrix::new(Format::I4, rows, tensor.cols as usize, weights).expect("a unit of this tensor");
            kernels.matvec(w, x.values, &mut low[..rows]);
            let sums = &coarse[u as usize * COARSE_VALUES * UNIT_ROWS..];
            for (((y, &sum), &low), scale) in y.iter_mut().zip(sums).zip(&low[..rows]).zip(floats(scales)) {
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
        let (kernels, vocab, cols) = (self.kernels, head.low.rows as usize, head.low.cols as usize);
        let HeadInput { values, scale, coarse } = input;
        let x = self.prepare_split(head, values, scale)?;
        self.coarse(head, &x, coarse)?;
        let coarse = &*coarse;

        // The prepared activations of pieces of a row, for rows that are gathered.
        let mut pieces = [x.values; CHUNKS_MAX];
        let count = cols.div_ceil(CHUNK_COLS);
        for (i, piece) in pieces[..count].iter_mut().enumerate() {
            let at = i * CHUNK_COLS;
            *piece = kernels.prepare(Format::I4, (cols - at).min(CHUNK_COLS), &x.values.values()[at..], &mut []);
        }
        let pieces = &pieces[..count];

        let seeds = Seeds::of((0..vocab).map(|r| estimate(coarse, r)), seeds(best));
        let mut exact = [0.0; SEEDS_MAX];
        let exact = &mut exact[..seeds.len];
        for (exact, &(_, row)) in exact.iter_mut().zip(&seeds.rows) {
            let (tile, place, scale) = head.low.row(row);
            let (block, at) = scale.expect("this format has row scales");
            let factor = floats(self.source.fetch(block)?)[at] * x.inverse;
            let mut gather = Gather::new(kernels, pieces);
            gather.push(Row { index: row as usize, tile: self.source.fetch(tile)?, place, factor });
            gather.multiply(|row, low| *exact = row.logit(sum(coarse, row.index), low));
        }
        // What is not a number makes no threshold: then all rows are computed.
        exact.sort_unstable_by(|a, b| b.total_cmp(a));
        let numbers = exact.iter().all(|e| e.is_finite());
        let threshold = exact.get(best - 1).copied().filter(|_| numbers).unwrap_or(f32::NEG_INFINITY);
        self.refine(head, (pieces, x.inverse), threshold, coarse, logits)
    }

    /// Takes the columns apart out of `values` and prepares both parts.
    fn prepare_split<'a>(
        &mut self,
        head: &SplitHead,
        values: &'a mut [i8],
        scale: f32,
    ) -> Result<Prepared<'a>, SourceError> {
        let cols = head.high.cols as usize;
        let columns = Columns::from_floats(floats(self.source.fetch(head.columns)?));
        let apart = columns.take(&mut values[..cols]).map(i16::from);
        let norm = norm(&values[..cols]).into();
        let values = self.kernels.prepare(Format::I4, cols, values, &mut []);
        Ok(Prepared { values, apart, norm, offset: 8 * values.sum(), inverse: 1.0 / scale })
    }

    /// What the high plane and the columns apart say of every row.
    fn coarse(&mut self, head: &SplitHead, x: &Prepared<'_>, coarse: &mut [f32]) -> Result<(), SourceError> {
        let kernels = self.kernels;
        self.run(&[head.high], COARSE_VALUES, coarse, &|tensor, u, blocks, y| {
            let rows = tensor.unit_rows(u);
            let weights = &blocks[..tensor.weight_blocks(rows)];
            let w = Matrix::new(Format::I4, rows, tensor.cols as usize, weights).expect("a unit of this tensor");
            let mut sums = [0; UNIT_ROWS];
            kernels.matvec(w, x.values, &mut sums[..rows]);
            y.iter_mut().zip(sums).for_each(|(y, sum)| *y = f32::from_bits(sum as u32));
        })?;
        let extent = |u| apart_unit(head.apart, u);
        self.run_units(head.high.units(), &extent, COARSE_VALUES * UNIT_ROWS, coarse, &|_, unit, y| {
            let (rows, _) = unit.as_bytes().as_chunks::<ROW_BYTES>();
            let (sums, bounds) = y.split_at_mut(UNIT_ROWS);
            let (estimates, uppers) = bounds.split_at_mut(UNIT_ROWS);
            for (((y, estimate), upper), row) in sums.iter_mut().zip(estimates).zip(uppers).zip(rows) {
                let row = Apart::from_bytes(row);
                let sum = 16 * y.to_bits() as i32 + x.offset + row.sum(&x.apart);
                *y = f32::from_bits(sum as u32);
                let factor = row.scale * x.inverse;
                *estimate = sum as f32 * factor;
                let most = i64::from(sum) + i64::from(row.norm) * x.norm;
                // A factor that turns bounds round is none of the packer's; then the row is always computed.
                *upper = if factor >= 0.0 { most as f32 * factor } else { f32::INFINITY };
            }
        })
    }

    /// Computes the logits of the rows whose bounds reach the threshold; those of the others become minus infinity. Returns
    /// the number of rows.
    fn refine(
        &mut self,
        head: &SplitHead,
        x: (&[Activations<'_>], f32),
        threshold: f32,
        coarse: &[f32],
        logits: &mut [f32],
    ) -> Result<u64, SourceError> {
        let (kernels, tensor, (x, inverse)) = (self.kernels, head.low, x);
        let reaches = |r: usize| {
            let upper = upper(coarse, r);
            upper >= threshold || upper.is_nan()
        };
        let rows = |units: Range<u32>| {
            units.start as usize * UNIT_ROWS..(units.end as usize * UNIT_ROWS).min(tensor.rows as usize)
        };
        let live = |u: u32| rows(u..u + 1).any(reaches);
        let units = tensor.units();
        logits.fill(f32::NEG_INFINITY);
        let mut first = 0;
        while first < units {
            let start = tensor.unit(first).start;
            let piece_blocks = self.source.piece_blocks();
            let fits = |u: u32| tensor.unit(u).end() - start <= piece_blocks;
            // All at once where weights lie in memory; elsewhere only units in which there is a row to read.
            let end = if fits(units - 1) {
                units
            } else if live(first) {
                (first + 1..units).find(|&u| !fits(u) || !live(u)).unwrap_or(units)
            } else {
                first += 1;
                continue;
            };
            let piece = self.source.fetch(Extent { start, blocks: tensor.unit(end - 1).end() - start })?;
            let threads = self.parallel.threads() as u32;
            // Rows to read are not spread evenly, so chunks are small.
            let chunk = if threads == 1 { end - first } else { (end - first).div_ceil(16 * threads) };
            let logits = &mut logits[rows(first..end)];
            self.parallel.for_each_chunk(logits, chunk as usize * UNIT_ROWS, &|i, logits| {
                let base = (first + i as u32 * chunk) as usize * UNIT_ROWS;
                let lent = |e: Extent| &piece[(e.start - start) as usize..][..e.blocks as usize];
                let mut gather = Gather::new(kernels, x);
                for r in (0..logits.len()).filter(|r| reaches(base + r)) {
                    let (tile, place, scale) = tensor.row((base + r) as u32);
                    let (block, at) = scale.expect("this format has row scales");
                    let factor = floats(lent(block))[at] * inverse;
                    gather.push(Row { index: r, tile: lent(tile), place, factor });
                    if gather.len == gather.rows.len() {
                        gather.multiply(|row, low| logits[row.index] = row.logit(sum(coarse, base + row.index), low));
                    }
                }
                gather.multiply(|row, low| logits[row.index] = row.logit(sum(coarse, base + row.index), low));
            });
            first = end;
        }
        Ok((0..tensor.rows as usize).filter(|&r| reaches(r)).count() as u64)
    }
}

/// The sum of row `r`, by its bits, in what [`Machine::coarse`] made.
fn sum(coarse: &[f32], r: usize) -> f32 {
    coarse[r / UNIT_ROWS * COARSE_VALUES * UNIT_ROWS + r % UNIT_ROWS]
}

/// The logit of row `r` without the low plane.
fn estimate(coarse: &[f32], r: usize) -> f32 {
    coarse[(r / UNIT_ROWS * COARSE_VALUES + 1) * UNIT_ROWS + r % UNIT_ROWS]
}

/// The upper bound of row `r`.
fn upper(coarse: &[f32], r: usize) -> f32 {
    coarse[(r / UNIT_ROWS * COARSE_VALUES + 2) * UNIT_ROWS + r % UNIT_ROWS]
}

#[cfg(all(test, feature = "std"))]
mod tests {
    use super::*;
    use crate::backend;
    use crate::image::split::split;
    use crate::parallel::{Parallel, Pool, Serial};
    use crate::source::{BlockDevice, Mapped, Streamed, WeightSource};
    use alloc::vec::Vec;
    use alloc::{format, vec};
    use bitnet_kernel::format::encode;

    /// Rows and columns with tails, and more columns than are multiplied at once.
    const SHAPES: [(usize, usize); 3] = [(200, 300), (131, 2100), (30, 20)];
    const FIRST_APART: usize = 2;

    /// A head as it lies in an image, and its int8 weights.
    struct Head {
        blocks: Vec<Block>,
        head: SplitHead,
        low: Vec<Vec<i8>>,
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
        let mut apart: Vec<Apart> = Vec::new();
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
            apart.push(Apart { scale, norm: norm(&low) as u16 - less, step, weights });
        }
        let low: Vec<Vec<i8>> = weights.iter().map(|row| row.iter().map(|&w| split(w).1).collect()).collect();
        let mut blocks = vec![Block::ZERO; 2];
        for (block, floats) in blocks.iter_mut().zip(columns.to_floats().chunks(16)) {
            block.0[..4 * floats.len()].copy_from_slice(floats.as_bytes());
        }
        let columns = Extent { start: 0, blocks: 2 };
        let plane = |blocks: &mut Vec<Block>, part: fn((i8, i8)) -> i8| {
            let (start, shape) = (blocks.len() as u32, (rows as u32, cols as u32));
            for first in (0..rows).step_by(UNIT_ROWS) {
                let n = UNIT_ROWS.min(rows - first);
                let mut unit = vec![Block::ZERO; Format::I4.matrix_blocks(n, cols)];
                encode(Format::I4, n, cols, &mut unit, |r, c| part(split(weights[first + r][c])));
                blocks.append(&mut unit);
                for rows in apart[first..first + n].chunks(16) {
                    let mut block = Block::ZERO;
                    for (bytes, row) in block.0.chunks_exact_mut(4).zip(rows) {
                        bytes.copy_from_slice(&row.scale.to_le_bytes());
                    }
                    blocks.push(block);
                }
            }
            Tensor { format: Format::I4, rows: shape.0, cols: shape.1, start, scale: 1.0 }
        };
        let high = plane(&mut blocks, |parts| parts.0);
        let start = blocks.len() as u32;
        for pair in apart.chunks(2) {
            let mut block = Block::ZERO;
            for (bytes, row) in block.0.chunks_exact_mut(ROW_BYTES).zip(pair) {
                bytes.copy_from_slice(&row.to_bytes());
            }
            blocks.push(block);
        }
        blocks.resize(start as usize + rows.div_ceil(UNIT_ROWS) * 32, Block::ZERO);
        let apart = Extent { start, blocks: blocks.len() as u32 - start };
        let low_plane = plane(&mut blocks, |parts| parts.1);
        Head { blocks, head: SplitHead { columns, high, apart, low: low_plane }, low }
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
        let mut staging = vec![Block::ZERO; h.head.high.unit(0).blocks.max(32) as usize];
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
        assert_eq!(stats.rows, out.iter().filter(|&&y| y > f32::NEG_INFINITY).count() as u64 * stats.tokens);
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
                let unit = &h.blocks[h.head.apart.start as usize + r / 2].0;
                let apart = Apart::from_bytes(unit[r % 2 * ROW_BYTES..][..ROW_BYTES].try_into().unwrap());
                let (tile, place, _) = h.head.high.row(r as u32);
                let tile = &h.blocks[tile.start as usize..][..tile.blocks as usize];
                let mut sum = 0;
                for c in 0..cols {
                    let weight = match c.checked_sub(FIRST_APART).filter(|&i| i < COLUMNS) {
                        Some(i) => i32::from(apart.weights[i]) * i32::from(apart.step),
                        None => {
                            let high = decode(Format::I4, &tile[c / 128 * 4..][..4], place, c % 128);
                            crate::image::split::join(high, h.low[r][c])
                        }
                    };
                    sum += weight * i32::from(x[c]);
                }
                assert_eq!(found, sum as f32 * (apart.scale * (1.0 / 3.0)), "row {r}");
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
