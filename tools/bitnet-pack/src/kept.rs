//! Which rows and columns of a linear hold anything but zeros: models that were pruned are recognised by their numbers.
use crate::checkpoint::sections::Source;
use crate::checkpoint::{Checkpoint, Dtype, TensorInfo};
use crate::{Error, Progress};
use bitnet_kernel::{Block, Format};
use bitnet_runtime::image::kept::{mask_blocks, set_mask};
use bitnet_runtime::image::{Encoding, Section, UNIT_ROWS};

/// The rows and columns that a compacted linear keeps.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Kept {
    /// For each row of the whole matrix, whether it is kept.
    pub rows: Vec<bool>,
    /// The same for its columns.
    pub cols: Vec<bool>,
}

/// What a compacted linear must save at least: one block of so many. Less is not worth gathering activations and scattering
/// results. Estimated, not timed.
const WORTH: u64 = 16;

/// Numbers at the start of a row that are looked at first. Whole blocks in every type.
const PREFIX: u64 = 512;

impl Kept {
    /// The number of rows and of columns that are kept.
    pub fn shape(&self) -> (u32, u32) {
        let count = |of: &[bool]| of.iter().filter(|&&kept| kept).count() as u32;
        (count(&self.rows), count(&self.cols))
    }
    /// The masks as the image has them.
    pub fn masks(&self) -> Vec<Block> {
        let [rows, cols] = [&self.rows, &self.cols].map(|kept| {
            let mut mask = vec![Block::ZERO; mask_blocks(kept.len() as u32) as usize];
            set_mask(&mut mask, kept.len(), |i| kept[i]);
            mask
        });
        [rows, cols].concat()
    }
    /// Keeps what makes the smallest matrix of `format` for kernels, and `None` if the whole one is about as small. Rows are
    /// left out before columns, and neither if nothing is saved; groups of columns stay whole in grouped formats.
    fn worth(mut self, format: Format) -> Option<Self> {
        let whole = (self.rows.len() as u32, self.cols.len() as u32);
        let (rows, cols) = self.shape();
        if rows == 0 || cols == 0 {
            return None; // A matrix of zeros says nothing about the model.
        }
        let cols = if format.is_grouped() { whole.1 } else { cols };
        let blocks = |rows, cols| Encoding::Matrix(format).blocks(rows, cols);
        // The first of the smallest.
        let (rows, cols) = [whole, (rows, whole.1), (whole.0, cols), (rows, cols)]
            .into_iter()
            .min_by_key(|&(rows, cols)| blocks(rows, cols))
            .expect("one of four");
        let saved =
            blocks(whole.0, whole.1).saturating_sub(blocks(rows, cols) + Encoding::Kept.blocks(whole.0, whole.1));
        if saved * WORTH < blocks(whole.0, whole.1) {
            return None;
        }
        if rows == whole.0 {
            self.rows.fill(true);
        }
        if cols == whole.1 {
            self.cols.fill(true);
        }
        Some(self)
    }
}

/// Looks for rows and columns of zeros in a linear, and says what to keep if that is worth it.
///
/// Only zeros of the checkpoint count, not what quantization makes zero. A matrix without columns of zeros is read as far as
/// its first rows, and the start of each other row.
///
/// # Errors
/// If it cannot be read, or holds what is no number.
pub fn find(
    checkpoint: &Checkpoint,
    source: &Source,
    section: &Section,
    format: Format,
    progress: &dyn Progress,
) -> Result<Option<Kept>, Error> {
    let Some(tensor) = source.tensor() else { return Ok(None) };
    let kept = Kept { rows: vec![false; section.rows as usize], cols: vec![false; section.cols as usize] };
    let mut finder = Finder { checkpoint, tensor, kept, raw: Vec::new(), floats: Vec::new() };
    if tensor.dtype == Dtype::U8 {
        finder.packed(progress)?
    } else {
        finder.floats(progress)?
    }
    Ok(finder.kept.worth(format))
}

struct Finder<'a> {
    checkpoint: &'a Checkpoint,
    tensor: &'a TensorInfo,
    kept: Kept,
    raw: Vec<u8>,
    floats: Vec<f32>,
}

impl Finder<'_> {
    /// Whether every column is known to be kept.
    fn all_columns(&self) -> bool {
        self.kept.cols.iter().all(|&kept| kept)
    }

    fn floats(&mut self, progress: &dyn Progress) -> Result<(), Error> {
        let (rows, cols) = (self.kept.rows.len(), self.kept.cols.len());
        for first in (0..rows).step_by(UNIT_ROWS) {
            if progress.cancelled() {
                return Err(Error::Interrupted);
            }
            let unit = first..rows.min(first + UNIT_ROWS);
            if !self.all_columns() {
                self.look(first, unit.len(), cols)?;
                continue;
            }
            for row in unit {
                let prefix = if cols as u64 > 2 * PREFIX { PREFIX as usize } else { cols };
                self.look(row, 1, prefix)?;
                if !self.kept.rows[row] {
                    self.look(row, 1, cols)?;
                }
            }
        }
        Ok(())
    }

    /// Looks at the first `cols` numbers of one row, or at `rows` whole rows.
    fn look(&mut self, first: usize, rows: usize, cols: usize) -> Result<(), Error> {
        let width = self.kept.cols.len();
        self.floats.resize(rows * cols, 0.0);
        self.checkpoint.read_floats(self.tensor, (first * width) as u64, &mut self.raw, &mut self.floats)?;
        for (row, values) in (first..).zip(self.floats.chunks_exact(cols)) {
            for (kept, value) in self.kept.cols.iter_mut().zip(values) {
                *kept |= *value != 0.0;
            }
            self.kept.rows[row] |= values.iter().any(|v| *v != 0.0);
        }
        Ok(())
    }

    /// Codes, four rows a byte; one that stands for nothing counts as a weight, and is refused later.
    fn packed(&mut self, progress: &dyn Progress) -> Result<(), Error> {
        const ZEROS: u8 = 0x55;
        let (rows, cols) = (self.kept.rows.len(), self.kept.cols.len());
        let quarter = rows.div_ceil(4);
        for byte_row in 0..quarter {
            if progress.cancelled() {
                return Err(Error::Interrupted);
            }
            // Planes whose rounding left them without a row are not looked at.
            let planes = (0..4).filter(|plane| plane * quarter + byte_row < rows);
            let used = planes.clone().fold(0u8, |mask, plane| mask | 3 << (2 * plane));
            let prefix = if cols as u64 > 2 * PREFIX && self.all_columns() { PREFIX as usize } else { cols };
            for length in [prefix, cols] {
                self.raw.resize(length, 0);
                self.checkpoint.read(self.tensor, (byte_row * cols) as u64, &mut self.raw)?;
                let found = self.raw.iter().fold(0, |found, byte| found | ((byte ^ ZEROS) & used));
                for plane in planes.clone() {
                    self.kept.rows[plane * quarter + byte_row] = found >> (2 * plane) & 3 != 0;
                }
                if length == cols || planes.clone().all(|plane| self.kept.rows[plane * quarter + byte_row]) {
                    break;
                }
            }
            for (kept, byte) in self.kept.cols.iter_mut().zip(&self.raw) {
                *kept |= (byte ^ ZEROS) & used != 0;
            }
        }
        Ok(())
    }
}
