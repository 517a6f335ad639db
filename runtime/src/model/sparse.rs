//! Products with linears that are stored without their zeros: without whole rows and columns ([`crate::image::kept`]), or without
//! blocks ([`bitnet_kernel::blocks`]).
use super::Machine;
use super::linear::{Output, Quantized};
use super::weights::{Kept, Layout, Linear};
use crate::error::SourceError;
use crate::image::kept::kept;
use crate::image::{BlockTensor, Tensor, UNIT_ROWS};
use crate::memory::{Limits, padded_rows};
use crate::source::Extent;
use bitnet_kernel::{BlockActivations, BlockMatrix};
use zerocopy::{FromBytes, IntoBytes};

/// Memory that such linears need.
#[derive(Debug)]
pub(super) struct Room<'a> {
    /// As many as the int8 activations have; on blocks.
    pub bytes: &'a mut [i8],
    /// One a unit of the highest linear.
    pub starts: &'a mut [u32],
}

impl Machine<'_> {
    /// Multiplies `linears`, which all read the same columns, with int8 activations, however they are stored.
    pub(super) fn linears(
        &mut self,
        linears: &[Linear],
        mut x: Quantized<'_>,
        mut room: Room<'_>,
        out: &mut Output<'_>,
    ) -> Result<(), SourceError> {
        let first = out.first;
        let whole = |linear: &Linear| matches!(linear.layout, Layout::Whole(_));
        for linears in linears.chunk_by(|a, b| whole(a) && whole(b)) {
            match linears[0].layout {
                Layout::Kept(tensor, kept) => self.compact(&tensor, &kept, &mut x, room.bytes, out)?,
                Layout::Blocks(tensor, starts) => self.blocks(&tensor, starts, &x, &mut room, out)?,
                Layout::Whole(tensor) => {
                    let mut tensors = [tensor; 5];
                    tensors.iter_mut().zip(linears).for_each(|(tensor, linear)| *tensor = linear.whole());
                    self.linear(&tensors[..linears.len()], &mut x, out)?;
                }
            }
            out.first += linears.iter().map(|l| padded_rows(l.rows())).sum::<usize>();
        }
        out.first = first;
        Ok(())
    }

    /// Multiplies one compacted linear: gathers the activations of its columns, and scatters the results to its rows.
    fn compact(
        &mut self,
        tensor: &Tensor,
        whole: &Kept,
        x: &mut Quantized<'_>,
        gathered: &mut [i8],
        out: &mut Output<'_>,
    ) -> Result<(), SourceError> {
        let (tokens, stride) = (x.scales.len(), x.stride);
        let cols = tensor.cols as usize;
        let values = if tensor.cols == whole.cols {
            x.values
        } else {
            let mask = self.source.fetch(whole.col_mask)?;
            let rows = gathered.chunks_exact_mut(stride).zip(x.values.chunks_exact(stride));
            for (gathered, values) in rows.take(tokens) {
                // Masks are input like any other: what they keep may be more or less than what the matrix has, and past it.
                let mut columns = kept(mask);
                for gathered in &mut gathered[..cols] {
                    *gathered = columns.next().and_then(|c| values.get(c).copied()).unwrap_or(0);
                }
                gathered[cols..tensor.format.padded_cols(cols)].fill(0);
            }
            gathered
        };
        let units = &mut out.units[..tokens * padded_rows(tensor.rows as usize)];
        self.products(&[*tensor], &mut Quantized { values, stride, scales: x.scales, tables: x.tables }, units)?;

        let (rows, width) = (tensor.rows as usize, padded_rows(whole.rows as usize));
        // It lies before the matrix.
        let mask = self.source.fetch_row(whole.row_mask)?;
        for t in 0..tokens {
            let y = &mut out.rows[t * out.stride + out.first..][..width];
            y.fill(0.0);
            for (i, row) in kept(mask).take(rows).enumerate() {
                if let Some(y) = y.get_mut(row) {
                    *y = units[(i / UNIT_ROWS * tokens + t) * UNIT_ROWS + i % UNIT_ROWS];
                }
            }
        }
        Ok(())
    }

    /// Multiplies one block-sparse linear. A unit whose bitmaps disagree with its size has results of zero.
    fn blocks(
        &mut self,
        tensor: &BlockTensor,
        starts: Extent,
        x: &Quantized<'_>,
        room: &mut Room<'_>,
        out: &mut Output<'_>,
    ) -> Result<(), SourceError> {
        let (kernels, tokens, cols) = (self.kernels, x.scales.len(), tensor.cols as usize);
        let recorded = self.source.fetch(starts)?.as_bytes().as_chunks::<4>().0;
        let starts = &mut room.starts[..tensor.units() as usize];
        starts.iter_mut().zip(recorded).for_each(|(start, bytes)| *start = u32::from_le_bytes(*bytes));
        tensor.sound_starts(starts);
        let starts = &*starts;

        // A sum for 16 columns or more: they never need more room than the values.
        let sums = <[i32]>::mut_from_bytes(room.bytes.as_mut_bytes()).expect("blocks are aligned");
        let across = tensor.shape.across(cols);
        let (mut sums, mut rows) = (sums.chunks_exact_mut(across), x.values.chunks_exact(x.stride));
        let inputs: [Option<BlockActivations<'_>>; Limits::BATCH_MAX as usize] = core::array::from_fn(|t| {
            let values = rows.next().filter(|_| t < tokens)?;
            Some(BlockActivations::new(tensor.shape, cols, values, sums.next()?))
        });

        let width = padded_rows(tensor.rows as usize);
        let units = &mut out.units[..tokens * width];
        let extent = |u| tensor.unit(starts, u);
        self.run_units(tensor.units(), &extent, tokens * UNIT_ROWS, units, &|u, blocks, y| {
            let rows = tensor.unit_rows(u);
            let Some(w) = BlockMatrix::new(tensor.shape, rows, cols, blocks) else { return y.fill(0.0) };
            for ((x, y), scale) in inputs.iter().flatten().zip(y.chunks_exact_mut(UNIT_ROWS)).zip(x.scales) {
                let mut sums = [0; UNIT_ROWS];
                kernels.matvec_blocks(w, *x, &mut sums[..rows]);
                let factor = tensor.scale * (1.0 / scale);
                y.iter_mut().zip(&sums[..rows]).for_each(|(y, &sum)| *y = sum as f32 * factor);
            }
        })?;
        for (i, y) in units.chunks_exact(UNIT_ROWS).enumerate() {
            let (unit, t) = (i / tokens, i % tokens);
            out.rows[t * out.stride + out.first + unit * UNIT_ROWS..][..UNIT_ROWS].copy_from_slice(y);
        }
        Ok(())
    }
}
