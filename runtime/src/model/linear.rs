//! Matrices times the activations of a batch: fetched piece by piece, shared among threads unit by unit.
use super::{BATCH_MAX, Machine, ops::floats};
use crate::error::SourceError;
use crate::image::{Tensor, UNIT_ROWS};
use crate::memory::padded_rows;
use crate::parallel::{Parallel, Serial, for_each_item};
use crate::source::Extent;
use bitnet_kernel::{Activations, Batch, Block, Format, Kernels, Matrix};
use core::ops::Range;

/// The int8 input of linears, one row of `stride` a token.
#[derive(Debug)]
pub(super) struct Quantized<'a> {
    /// `[tokens][stride]`, zero past the columns.
    pub values: &'a [i8],
    /// Elements from one token to the next.
    pub stride: usize,
    /// What the floats were multiplied by, one a token.
    pub scales: &'a [f32],
    /// Room for what the backend prepares.
    pub tables: &'a mut [Block],
}

/// Where results go: token `t`'s from `rows[t · stride + first]` on, each tensor padded to whole units.
#[derive(Debug)]
pub(super) struct Output<'a> {
    pub rows: &'a mut [f32],
    pub stride: usize,
    pub first: usize,
    /// Room for the results of several tokens in the order in which threads write them.
    pub units: &'a mut [f32],
}

impl Output<'_> {
    /// Puts the results of several tokens, `width` each, from the order of threads into that of tokens, from `first` on.
    pub(super) fn spread(&mut self, parallel: &dyn Parallel, tokens: usize, first: usize, width: usize) {
        let units = &self.units[..tokens * width];
        parallel.for_each_chunk(&mut self.rows[..tokens * self.stride], self.stride, &|t, row| {
            spread_token(units, tokens, t, &mut row[first..][..width]);
        });
    }
}

/// Puts the results of one of several tokens, of `[units][tokens][UNIT_ROWS]`, one after another; the last unit may have more.
fn spread_token(units: &[f32], tokens: usize, t: usize, row: &mut [f32]) {
    for (y, unit) in row.chunks_mut(UNIT_ROWS).zip(units.chunks_exact(tokens * UNIT_ROWS)) {
        y.copy_from_slice(&unit[t * UNIT_ROWS..][..y.len()]);
    }
}

/// What is multiplied with a head.
#[derive(Debug)]
pub(super) enum Input<'a> {
    Quantized(Quantized<'a>),
    /// For [`Format::F16`]: `[tokens][columns]`.
    Floats(&'a [f32]),
}

/// Computes one unit: the tensor, the unit's number, its blocks, and its results, `[tokens][UNIT_ROWS]`.
type UnitTask<'a> = &'a (dyn Fn(&Tensor, u32, &[Block], &mut [f32]) + Sync);

/// Computes one part of a section: its number, its blocks, and its results.
type BlocksTask<'a> = &'a (dyn Fn(u32, &[Block], &mut [f32]) + Sync);

/// Chunks a thread, so that one that is held up does not hold up all.
const CHUNKS: u32 = 8;

/// Floats of all tokens below which it is not worth waking other threads for what is done once for each: a few microseconds' worth.
const AMONG_TOKENS_MIN: usize = 1 << 12;

impl<'m> Machine<'m> {
    /// Who shares among them what is done for each token by itself, `floats` for all.
    pub(super) fn among_tokens(&self, floats: usize) -> &'m dyn Parallel {
        if floats < AMONG_TOKENS_MIN { &Serial } else { self.parallel }
    }

    /// Multiplies `tensors`, which all have the same columns, with int8 activations.
    pub(super) fn linear(
        &mut self,
        tensors: &[Tensor],
        x: &mut Quantized<'_>,
        out: &mut Output<'_>,
    ) -> Result<(), SourceError> {
        let (tokens, mut first) = (x.scales.len(), out.first);
        // Tensors of one format are one job: they share what the backend prepares, and threads share all their units.
        for tensors in tensors.chunk_by(|a, b| a.format == b.format) {
            let width: usize = tensors.iter().map(|t| padded_rows(t.rows as usize)).sum();
            if tokens == 1 {
                // The order of units is the order of rows.
                self.products(tensors, x, &mut out.rows[first..first + width])?;
            } else {
                self.products(tensors, x, &mut out.units[..tokens * width])?;
                out.spread(self.among_tokens(tokens * width), tokens, first, width);
            }
            first += width;
        }
        Ok(())
    }

    /// Multiplies one tensor with the activations of several tokens, in as many parts as fit `units`: `out` has
    /// `[tokens][rows]`, which need not be whole units. A head is larger than what there is room for at once.
    pub(super) fn linear_in_parts(
        &mut self,
        tensor: Tensor,
        mut x: Input<'_>,
        units: &mut [f32],
        out: &mut [f32],
    ) -> Result<(), SourceError> {
        let rows = tensor.rows as usize;
        let tokens = match &x {
            Input::Quantized(x) => x.scales.len(),
            Input::Floats(x) => x.len() / tensor.cols as usize,
        };
        let most = (units.len() / (tokens * UNIT_ROWS)).max(1) as u32;
        let mut first = 0;
        while first < tensor.units() {
            let part = first..tensor.units().min(first + most);
            let y = &mut units[..part.len() * tokens * UNIT_ROWS];
            match &mut x {
                Input::Quantized(x) => self.products_of(&[tensor], part.clone(), x, y)?,
                Input::Floats(x) => self.products_f16(tensor, part.clone(), x, y)?,
            }
            let (y, at, width) = (&*y, first as usize * UNIT_ROWS, part.len() * UNIT_ROWS);
            self.among_tokens(y.len()).for_each_chunk(&mut out[..tokens * rows], rows, &|t, row| {
                spread_token(y, tokens, t, &mut row[at..rows.min(at + width)]);
            });
            first = part.end;
        }
        Ok(())
    }

    /// Multiplies `tensors`, which all have the same format and columns, with int8 activations. `y` has
    /// `[units][tokens][UNIT_ROWS]`.
    pub(super) fn products(
        &mut self,
        tensors: &[Tensor],
        x: &mut Quantized<'_>,
        y: &mut [f32],
    ) -> Result<(), SourceError> {
        self.products_of(tensors, 0..tensors.iter().map(Tensor::units).sum(), x, y)
    }

    /// [`Machine::products`] for some of the units of all tensors.
    fn products_of(
        &mut self,
        tensors: &[Tensor],
        units: Range<u32>,
        x: &mut Quantized<'_>,
        y: &mut [f32],
    ) -> Result<(), SourceError> {
        let (tokens, kernels, scales) = (x.scales.len(), self.kernels, x.scales);
        let (format, cols) = (tensors[0].format, tensors[0].cols as usize);
        let table_blocks = format.table_blocks(cols);
        let rows = x.values.chunks_exact(x.stride).take(tokens);
        let mut tables = x.tables[..tokens * table_blocks].chunks_exact_mut(table_blocks.max(1));
        let mut prepared = [None; BATCH_MAX];
        let each = prepared.iter_mut().zip(rows).map(|(to, values)| (to, values, tables.next().unwrap_or_default()));
        for_each_item::<_, BATCH_MAX>(self.among_tokens(tokens * cols), each, &|_, (to, values, tables)| {
            *to = Some(kernels.prepare_any(format, cols, values, tables));
        });
        let inert = prepared[0].expect("a pass has at least one token");
        let prepared = prepared.map(|x| x.unwrap_or(inert));
        let x = &prepared[..tokens];
        self.run_some(tensors, units, tokens, y, &|tensor, u, blocks, y| match x {
            [_] => unit::<1>(kernels, tensor, u, blocks, x, scales, y),
            _ => unit::<BATCH_MAX>(kernels, tensor, u, blocks, x, scales, y),
        })
    }

    /// Multiplies a [`Format::F16`] tensor with the floats `[tokens][columns]`.
    pub(super) fn linear_f16(&mut self, tensor: Tensor, x: &[f32], out: &mut Output<'_>) -> Result<(), SourceError> {
        let (tokens, width) = (x.len() / tensor.cols as usize, padded_rows(tensor.rows as usize));
        if tokens == 1 {
            let first = out.first;
            return self.products_f16(tensor, 0..tensor.units(), x, &mut out.rows[first..first + width]);
        }
        self.products_f16(tensor, 0..tensor.units(), x, &mut out.units[..tokens * width])?;
        out.spread(self.among_tokens(tokens * width), tokens, out.first, width);
        Ok(())
    }

    /// [`Machine::products`] of some units of a [`Format::F16`] tensor with the floats `[tokens][columns]`: weights are fetched
    /// once for all tokens.
    fn products_f16(&mut self, tensor: Tensor, units: Range<u32>, x: &[f32], y: &mut [f32]) -> Result<(), SourceError> {
        let (kernels, cols) = (self.kernels, tensor.cols as usize);
        self.run_some(&[tensor], units, x.len() / cols, y, &|tensor, u, blocks, y| {
            let rows = tensor.unit_rows(u);
            let w = Matrix::new(Format::F16, rows, cols, blocks).expect("a unit of this tensor");
            for (x, y) in x.chunks_exact(cols).zip(y.chunks_exact_mut(UNIT_ROWS)) {
                kernels.matvec_f16(w, x, &mut y[..rows]);
            }
        })
    }

    /// Runs `task` for every unit of the tensors, which lie in the image in this order. `y` has `[units][tokens][UNIT_ROWS]`.
    pub(super) fn run(
        &mut self,
        tensors: &[Tensor],
        tokens: usize,
        y: &mut [f32],
        task: UnitTask<'_>,
    ) -> Result<(), SourceError> {
        self.run_some(tensors, 0..tensors.iter().map(Tensor::units).sum(), tokens, y, task)
    }

    /// [`Machine::run`] for some of the units of all tensors.
    fn run_some(
        &mut self,
        tensors: &[Tensor],
        units: Range<u32>,
        tokens: usize,
        y: &mut [f32],
        task: UnitTask<'_>,
    ) -> Result<(), SourceError> {
        let extent = |i| {
            let (tensor, u) = locate(tensors, units.start + i);
            tensor.unit(u)
        };
        self.run_units(units.len() as u32, &extent, tokens * UNIT_ROWS, y, &|i, blocks, y| {
            let (tensor, u) = locate(tensors, units.start + i);
            task(tensor, u, blocks, y);
        })
    }

    /// Runs `task(i, its blocks, its part of y)` for the units 0 to `count`, which lie where `extent` says, one after another
    /// in the image. `y` has `[count][unit_len]`.
    pub(super) fn run_units(
        &mut self,
        count: u32,
        extent: &(dyn Fn(u32) -> Extent + Sync),
        unit_len: usize,
        y: &mut [f32],
        task: BlocksTask<'_>,
    ) -> Result<(), SourceError> {
        debug_assert_eq!(y.len(), count as usize * unit_len);
        let mut first = 0;
        while first < count {
            // As many units as the source lends at once: all of them if the image is mapped.
            let start = extent(first).start;
            let lent = self.source.piece_from(start);
            let fits = |i: &u32| extent(*i).end() - start <= lent;
            let end = (first + 1..count).take_while(fits).last().unwrap_or(first) + 1;
            let piece = self.source.fetch(Extent { start, blocks: extent(end - 1).end() - start })?;

            let y = &mut y[first as usize * unit_len..end as usize * unit_len];
            let threads = self.parallel.threads() as u32;
            let chunk = if threads == 1 { end - first } else { (end - first).div_ceil(CHUNKS * threads) };
            self.parallel.for_each_chunk(y, chunk as usize * unit_len, &|i, y| {
                for (unit, y) in (first + i as u32 * chunk..).zip(y.chunks_exact_mut(unit_len)) {
                    let Extent { start: at, blocks } = extent(unit);
                    task(unit, &piece[(at - start) as usize..][..blocks as usize], y);
                }
            });
            first = end;
        }
        Ok(())
    }
}

/// The tensor and the unit in it that is number `i` of all.
fn locate(tensors: &[Tensor], mut i: u32) -> (&Tensor, u32) {
    for tensor in tensors {
        if i < tensor.units() {
            return (tensor, i);
        }
        i -= tensor.units();
    }
    panic!("a unit past the last tensor")
}

/// One unit's results for `x.len() <= N` tokens: `y = sum · (scale of the weights / scale of the activations)`.
fn unit<const N: usize>(
    kernels: &dyn Kernels,
    tensor: &Tensor,
    u: u32,
    blocks: &[Block],
    x: &[Activations<'_>],
    scales: &[f32],
    y: &mut [f32],
) {
    let rows = tensor.unit_rows(u);
    let (weights, row_scales) = blocks.split_at(tensor.weight_blocks(rows));
    let w = Matrix::new(tensor.format, rows, tensor.cols as usize, weights).expect("a unit of this tensor");
    if tensor.format.is_grouped() {
        let mut sums = [[0.0; UNIT_ROWS]; N];
        let sums = &mut sums.as_flattened_mut()[..rows * x.len()];
        match x {
            [x] => kernels.matvec_grouped(w, *x, sums),
            _ => kernels.matmat_grouped(w, Batch::new(x), sums),
        }
        for ((sums, y), scale) in sums.chunks_exact(rows).zip(y.chunks_exact_mut(UNIT_ROWS)).zip(scales) {
            let inverse = 1.0 / scale;
            y.iter_mut().zip(sums).for_each(|(y, sum)| *y = sum * inverse);
        }
        return;
    }
    let mut sums = [[0; UNIT_ROWS]; N];
    let sums = &mut sums.as_flattened_mut()[..rows * x.len()];
    match x {
        [x] => kernels.matvec(w, *x, sums),
        _ => kernels.matmat(w, Batch::new(x), sums),
    }
    for ((sums, y), scale) in sums.chunks_exact(rows).zip(y.chunks_exact_mut(UNIT_ROWS)).zip(scales) {
        let inverse = 1.0 / scale;
        if tensor.format.has_row_scales() {
            for ((y, &sum), row_scale) in y.iter_mut().zip(sums).zip(floats(row_scales)) {
                *y = sum as f32 * (row_scale * inverse);
            }
        } else {
            let factor = tensor.scale * inverse;
            for (y, &sum) in y.iter_mut().zip(sums) {
                *y = sum as f32 * factor;
            }
        }
    }
}
