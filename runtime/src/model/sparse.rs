//! Products with linears that are stored without their rows and columns of zeros ([`crate::image::kept`]).
use super::Machine;
use super::linear::{Output, Quantized};
use super::weights::{Kept, Linear};
use crate::error::SourceError;
use crate::image::UNIT_ROWS;
use crate::image::kept::kept;
use crate::memory::padded_rows;

impl Machine<'_> {
    /// Multiplies `linears`, which all read the same columns, with int8 activations, those that are compacted too. `gathered`
    /// has room for as many values as `x`.
    pub(super) fn linears(
        &mut self,
        linears: &[Linear],
        mut x: Quantized<'_>,
        gathered: &mut [i8],
        out: &mut Output<'_>,
    ) -> Result<(), SourceError> {
        let first = out.first;
        for linears in linears.chunk_by(|a, b| a.kept.is_none() && b.kept.is_none()) {
            match linears[0].kept {
                Some(kept) => self.compact(&linears[0], &kept, &mut x, gathered, out)?,
                None => {
                    let mut tensors = [linears[0].tensor; 5];
                    tensors.iter_mut().zip(linears).for_each(|(tensor, linear)| *tensor = linear.tensor);
                    let Quantized { values, stride, scales, .. } = x;
                    let x = Quantized { values, stride, scales, tables: x.tables };
                    self.linear(&tensors[..linears.len()], x, out)?;
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
        linear: &Linear,
        whole: &Kept,
        x: &mut Quantized<'_>,
        gathered: &mut [i8],
        out: &mut Output<'_>,
    ) -> Result<(), SourceError> {
        let (tensor, tokens, stride) = (linear.tensor, x.scales.len(), x.stride);
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
        self.products(&[tensor], &mut Quantized { values, stride, scales: x.scales, tables: x.tables }, units)?;

        let (rows, width) = (tensor.rows as usize, padded_rows(linear.rows()));
        let mask = self.source.fetch(whole.row_mask)?;
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
}
