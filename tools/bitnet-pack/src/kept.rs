//! Which rows, columns and blocks of a linear hold anything but zeros: models that were pruned are recognised by their numbers.
use crate::checkpoint::sections::Source;
use crate::checkpoint::{Checkpoint, Dtype, TensorInfo};
use crate::tune::Tuner;
use crate::{Error, Layouts, Progress};
use bitnet_kernel::blocks::STRIP_ROWS;
use bitnet_kernel::{Block, BlockShape, Format};
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

/// The blocks of a ternary linear that are not all zero.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Live {
    /// The size of the blocks.
    pub shape: BlockShape,
    rows: usize,
    cols: usize,
    /// Strip after strip.
    live: Vec<bool>,
}

impl Live {
    /// Whether block `b` of strip `s` is live.
    pub fn is_live(&self, s: usize, b: usize) -> bool {
        self.live[s * self.shape.across(self.cols) + b]
    }
    /// Blocks of each unit in the image.
    fn units(&self) -> impl Iterator<Item = usize> + '_ {
        let strips = UNIT_ROWS / STRIP_ROWS;
        self.live.chunks(strips * self.shape.across(self.cols)).enumerate().map(move |(u, live)| {
            let rows = UNIT_ROWS.min(self.rows - u * UNIT_ROWS);
            self.shape.unit_blocks(rows, self.cols, live.iter().filter(|&&live| live).count())
        })
    }
    /// Blocks of the whole section.
    pub fn blocks(&self) -> u64 {
        self.units().map(|n| n as u64).sum()
    }
    /// Where units start, as the index has it.
    pub fn starts(&self) -> Vec<u8> {
        let mut start = 0;
        let starts = self.units().flat_map(|n| {
            let bytes = (start as u32).to_le_bytes();
            start += n;
            bytes
        });
        starts.collect()
    }
    /// The same with wide blocks, of square ones.
    fn widened(&self) -> Self {
        let (from, to) = (self.shape.across(self.cols), BlockShape::Wide.across(self.cols));
        let four = BlockShape::Wide.cols() / self.shape.cols();
        let mut live = vec![false; self.live.len() / from * to];
        for (i, _) in self.live.iter().enumerate().filter(|(_, live)| **live) {
            live[i / from * to + i % from / four] = true;
        }
        Self { shape: BlockShape::Wide, live, ..*self }
    }
}

/// How a linear with zeros is best stored.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Found {
    /// With its zeros.
    Whole,
    /// Without rows and columns of zeros.
    Kept(Kept),
    /// Without blocks of zeros.
    Live(Live),
}

impl Found {
    /// What people call it.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Whole => "whole",
            Self::Live(live) => live.shape.name(),
            Self::Kept(kept) => match (kept.rows.contains(&false), kept.cols.contains(&false)) {
                (true, false) => "rows",
                (false, true) => "columns",
                _ => "rows and columns",
            },
        }
    }
    /// Blocks of a linear of `rows` by `cols` whose weights have `format` where they are not in blocks.
    pub fn blocks(&self, format: Format, rows: u32, cols: u32) -> u64 {
        match self {
            Self::Whole => Encoding::Matrix(format).blocks(rows, cols),
            Self::Kept(kept) => kept.blocks(format),
            Self::Live(live) => live.blocks(),
        }
    }
    /// The encoding of a linear so stored, and of the index before it.
    pub const fn encodings(&self, format: Format) -> (Encoding, Encoding) {
        match self {
            Self::Whole => (Encoding::Matrix(format), Encoding::Whole),
            Self::Kept(_) => (Encoding::Matrix(format), Encoding::Kept),
            Self::Live(live) => (Encoding::Blocks(live.shape), Encoding::Starts),
        }
    }
}

/// What a block-sparse linear must save beside a compacted one: its kernels take so many hundredths longer for a byte. By the
/// prototype of this kernel on a Zen 3 core, in cache; see the module of the kernel crate.
const BLOCK_COST: u64 = 107;

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
    /// Blocks of the matrix that is stored.
    pub fn blocks(&self, format: Format) -> u64 {
        let (rows, cols) = self.shape();
        Encoding::Matrix(format).blocks(rows, cols)
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
    /// left out before columns, and neither if nothing is saved; of one bit a weight all that are zero are. Linears of grouped
    /// formats and of half precision stay whole.
    fn worth(mut self, format: Format) -> Option<Self> {
        let whole = (self.rows.len() as u32, self.cols.len() as u32);
        let (rows, cols) = self.shape();
        // It cannot hold the zeros of what is left out.
        if format == Format::B1 {
            return Some(self).filter(|_| (rows, cols) != whole && rows > 0);
        }
        // A matrix of zeros says nothing about the model.
        if rows == 0 || cols == 0 || format.is_grouped() || format == Format::F16 {
            return None;
        }
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

/// Where a linear has nothing but zeros.
#[derive(Clone, Debug)]
pub struct Zeros {
    kept: Kept,
    /// Blocks of 16 by 16, of ternary linears, and while they are worth looking at.
    squares: Option<Live>,
}

impl Zeros {
    /// Of a linear of zeros, to which [`Zeros::note`] adds what is not. Blocks only where the linear is ternary.
    pub fn new(rows: usize, cols: usize, ternary: bool) -> Self {
        let squares = ternary.then(|| {
            let live = vec![false; rows.div_ceil(STRIP_ROWS) * BlockShape::Square.across(cols)];
            Live { shape: BlockShape::Square, rows, cols, live }
        });
        Self { kept: Kept { rows: vec![false; rows], cols: vec![false; cols] }, squares }
    }

    /// Notes which of the first `cols` numbers of `row` are not zero. Blocks are looked at in whole rows alone.
    pub fn note(&mut self, row: usize, cols: usize, nonzero: impl Fn(usize) -> bool) {
        for (c, kept) in self.kept.cols[..cols].iter_mut().enumerate() {
            if nonzero(c) {
                (*kept, self.kept.rows[row]) = (true, true);
            }
        }
        if cols == self.kept.cols.len() {
            self.note_blocks(row, nonzero);
        }
    }

    /// Notes the blocks of `row` that hold something.
    fn note_blocks(&mut self, row: usize, nonzero: impl Fn(usize) -> bool) {
        if let Some(Live { shape, cols, live, .. }) = &mut self.squares {
            let across = shape.across(*cols);
            let strip = &mut live[row / STRIP_ROWS * across..][..across];
            for (b, live) in strip.iter_mut().enumerate() {
                *live |= (b * shape.cols()..(*cols).min((b + 1) * shape.cols())).any(&nonzero);
            }
        }
    }

    /// What takes the fewest bytes of what `layouts` allows, if that is worth it.
    fn smallest(self, format: Format, layouts: Layouts) -> Found {
        let Self { kept, squares } = self;
        let (rows, cols) = (kept.rows.len() as u32, kept.cols.len() as u32);
        let squares = squares.filter(|_| layouts != Layouts::Kept);
        let whole = Encoding::Matrix(format).blocks(rows, cols);
        let kept = if matches!(layouts, Layouts::Blocks(_)) { None } else { kept.worth(format) };
        let compact = kept.as_ref().map_or(whole, |kept| kept.blocks(format));
        let live = squares.into_iter().flat_map(|squares| [squares.widened(), squares]);
        let live = live.filter(|live| live.live.contains(&false));
        let live = live.filter(|live| !matches!(layouts, Layouts::Blocks(shape) if shape != live.shape));
        // Wide blocks, whose kernels are the faster ones, unless square ones are smaller by the same share.
        let live =
            live.reduce(|wide, square| if square.blocks() * BLOCK_COST < wide.blocks() * 100 { square } else { wide });
        let worth = |live: &Live| {
            live.blocks() * BLOCK_COST < compact * 100 && (whole.saturating_sub(live.blocks())) * WORTH >= whole
        };
        match (live.filter(worth), kept) {
            (Some(live), _) => Found::Live(live),
            (None, Some(kept)) => Found::Kept(kept),
            (None, None) => Found::Whole,
        }
    }

    /// Every layout that takes fewer bytes than the whole linear, and this first where `format` can hold zeros. Linears of
    /// grouped formats and of half precision stay whole.
    pub fn layouts(self, format: Format) -> Vec<Found> {
        let Self { kept, squares } = self;
        let count = |of: &[bool]| of.iter().filter(|&&kept| kept).count();
        let (left, all) = ((count(&kept.rows), count(&kept.cols)), (kept.rows.len(), kept.cols.len()));
        let mut found = vec![Found::Whole];
        if left.0 == 0 || format.is_grouped() || format == Format::F16 {
            return found;
        }
        let with = |rows: bool, cols: bool| Kept {
            rows: kept.rows.iter().map(|&kept| kept || !rows).collect(),
            cols: kept.cols.iter().map(|&kept| kept || !cols).collect(),
        };
        if format == Format::B1 {
            return vec![kept.worth(format).map_or(Found::Whole, Found::Kept)];
        }
        let compacted = [(left.0 < all.0, false), (false, left.1 < all.1), (left.0 < all.0, left.1 < all.1)];
        for (i, (rows, cols)) in compacted.into_iter().enumerate() {
            // The third is both, or it is one of the others.
            if (rows || cols) && (i < 2 || rows && cols) {
                found.push(Found::Kept(with(rows, cols)));
            }
        }
        let live = squares.into_iter().flat_map(|squares| [squares.widened(), squares]);
        found.extend(live.filter(|live| live.live.contains(&false)).map(Found::Live));
        let blocks = |found: &Found| found.blocks(format, all.0 as u32, all.1 as u32);
        let whole = blocks(&Found::Whole);
        found.retain(|found| *found == Found::Whole || blocks(found) < whole);
        found
    }
}

/// Looks for rows, columns and blocks of zeros in a linear, and says what to keep: what `tuner` chooses, or else what is
/// smallest if that is worth it. Blocks only where the linear would be ternary.
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
    layouts: Layouts,
    tuner: Option<&mut Tuner<'_>>,
    progress: &dyn Progress,
) -> Result<Found, Error> {
    let Some(tensor) = source.tensor() else { return Ok(Found::Whole) };
    if layouts == Layouts::Whole {
        return Ok(Found::Whole);
    }
    let (rows, cols) = (section.rows as usize, section.cols as usize);
    let ternary = matches!(source, Source::Packed(..) | Source::Ternary(..) | Source::Masters(..))
        && matches!(format, Format::T2 | Format::TL);
    let zeros = Zeros::new(rows, cols, ternary && layouts != Layouts::Kept);
    let mut finder = Finder { checkpoint, tensor, zeros, raw: Vec::new(), floats: Vec::new() };
    if tensor.dtype == Dtype::U8 {
        finder.packed(progress)?
    } else {
        finder.floats(progress)?
    }
    let zeros = finder.zeros;
    Ok(match tuner {
        Some(tuner) => tuner.choose(section, format, zeros),
        None => zeros.smallest(format, layouts),
    })
}

struct Finder<'a> {
    checkpoint: &'a Checkpoint,
    tensor: &'a TensorInfo,
    zeros: Zeros,
    raw: Vec<u8>,
    floats: Vec<f32>,
}

impl Finder<'_> {
    /// Whether rows need not be read to their end: every column is known to be kept, and no block of the first rows is all
    /// zero, which the blocks of a ternary matrix are only where it was pruned by blocks.
    fn is_dense(&mut self, read: usize) -> bool {
        if read >= UNIT_ROWS
            && let Some(squares) = &self.zeros.squares
        {
            let first = UNIT_ROWS / STRIP_ROWS * squares.shape.across(squares.cols);
            if squares.live[..first].iter().all(|&live| live) {
                self.zeros.squares = None;
            }
        }
        self.zeros.squares.is_none() && self.zeros.kept.cols.iter().all(|&kept| kept)
    }

    fn floats(&mut self, progress: &dyn Progress) -> Result<(), Error> {
        let (rows, cols) = (self.zeros.kept.rows.len(), self.zeros.kept.cols.len());
        for first in (0..rows).step_by(UNIT_ROWS) {
            if progress.cancelled() {
                return Err(Error::Interrupted);
            }
            let unit = first..rows.min(first + UNIT_ROWS);
            if !self.is_dense(first) {
                self.look(first, unit.len(), cols)?;
                continue;
            }
            for row in unit {
                let prefix = if cols as u64 > 2 * PREFIX { PREFIX as usize } else { cols };
                self.look(row, 1, prefix)?;
                if !self.zeros.kept.rows[row] {
                    self.look(row, 1, cols)?;
                }
            }
        }
        Ok(())
    }

    /// Looks at the first `cols` numbers of one row, or at `rows` whole rows.
    fn look(&mut self, first: usize, rows: usize, cols: usize) -> Result<(), Error> {
        let width = self.zeros.kept.cols.len();
        self.floats.resize(rows * cols, 0.0);
        self.checkpoint.read_floats(self.tensor, (first * width) as u64, &mut self.raw, &mut self.floats)?;
        let floats = core::mem::take(&mut self.floats);
        for (row, values) in (first..).zip(floats.chunks_exact(cols)) {
            self.zeros.note(row, cols, |c| values[c] != 0.0);
        }
        self.floats = floats;
        Ok(())
    }

    /// Codes, four rows a byte; one that stands for nothing counts as a weight, and is refused later.
    fn packed(&mut self, progress: &dyn Progress) -> Result<(), Error> {
        const ZEROS: u8 = 0x55;
        let (rows, cols) = (self.zeros.kept.rows.len(), self.zeros.kept.cols.len());
        let quarter = rows.div_ceil(4);
        for byte_row in 0..quarter {
            if progress.cancelled() {
                return Err(Error::Interrupted);
            }
            // Planes whose rounding left them without a row are not looked at.
            let planes = (0..4).filter(|plane| plane * quarter + byte_row < rows);
            let used = planes.clone().fold(0u8, |mask, plane| mask | 3 << (2 * plane));
            let prefix = if self.is_dense(byte_row) && cols as u64 > 2 * PREFIX { PREFIX as usize } else { cols };
            for length in [prefix, cols] {
                self.raw.resize(length, 0);
                self.checkpoint.read(self.tensor, (byte_row * cols) as u64, &mut self.raw)?;
                let found = self.raw.iter().fold(0, |found, byte| found | ((byte ^ ZEROS) & used));
                for plane in planes.clone() {
                    self.zeros.kept.rows[plane * quarter + byte_row] = found >> (2 * plane) & 3 != 0;
                }
                if length == cols || planes.clone().all(|plane| self.zeros.kept.rows[plane * quarter + byte_row]) {
                    break;
                }
            }
            if self.raw.len() == cols {
                let raw = core::mem::take(&mut self.raw);
                for plane in planes {
                    self.zeros.note_blocks(plane * quarter + byte_row, |c| (raw[c] ^ ZEROS) >> (2 * plane) & 3 != 0);
                }
                self.raw = raw;
            }
            for (kept, byte) in self.zeros.kept.cols.iter_mut().zip(&self.raw) {
                *kept |= (byte ^ ZEROS) & used != 0;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_saves_something_is_kept() {
        let kept = |rows: usize, cols: usize| Kept {
            rows: (0..512).map(|r| r < rows).collect(),
            cols: (0..256).map(|c| c < cols).collect(),
        };
        let shape = |rows, cols, format| kept(rows, cols).worth(format).map(|kept| kept.shape());
        assert_eq!(shape(100, 256, Format::TL), Some((100, 256)));
        assert_eq!(shape(512, 256, Format::TL), None);
        assert_eq!(shape(500, 256, Format::TL), None, "as many tiles");
        assert_eq!(shape(448, 250, Format::T2), Some((448, 256)), "as many steps");
        assert_eq!(shape(512, 64, Format::I8), Some((512, 64)));
        assert_eq!(shape(100, 64, Format::I4G), None, "its scales belong to groups of columns");
        assert_eq!(shape(0, 0, Format::TL), None);
    }
}
