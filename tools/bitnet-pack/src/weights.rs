//! Weights of an image, read back unit by unit, with the zeros that a layout leaves out.
use crate::Error;
use crate::report::kind;
use crate::verify::Opened;
use bitnet_kernel::blocks::STRIP_ROWS;
use bitnet_kernel::{Block, BlockMatrix, Format, Matrix};
use bitnet_runtime::Image;
use bitnet_runtime::image::kept::{kept, mask_blocks};
use bitnet_runtime::image::{BlockTensor, Encoding, Record, Tensor, UNIT_ROWS};
use half::f16;
use zerocopy::{FromBytes, IntoBytes};

/// A matrix of a verified image, however it is laid out there.
#[derive(Debug)]
pub(crate) struct Whole {
    /// How weights are encoded; [`Format::T2`] for block-sparse ones.
    pub(crate) format: Format,
    /// Rows and columns, those of zeros included.
    pub(crate) rows: u32,
    pub(crate) cols: u32,
    /// What all weights are multiplied by; 1 where rows have scales of their own.
    pub(crate) scale: f32,
    layout: Layout,
}

#[derive(Debug)]
enum Layout {
    Whole(Tensor),
    /// The matrix that is stored, and which rows and columns it has.
    Kept(Tensor, Vec<usize>, Vec<usize>),
    /// The matrix that is stored, and where its units start.
    Blocks(BlockTensor, Vec<u32>),
}

impl Whole {
    /// The matrix in a section, or `None` if it holds something else.
    pub(crate) fn of(opened: &Opened, image: &Image<'_>, record: &Record) -> Result<Option<Self>, Error> {
        let index = index(image, record);
        let index_blocks = |record: &Record| {
            let mut blocks = vec![Block::ZERO; record.blocks.get() as usize];
            opened.read(u64::from(record.start.get()) * Block::BYTES as u64, blocks.as_mut_bytes())?;
            Ok::<_, Error>(blocks)
        };
        if let (Some(blocks), Some(index)) = (record.block_tensor(), index) {
            let starts = index_blocks(index)?;
            let starts = starts.as_bytes().as_chunks::<4>().0.iter().take(blocks.units() as usize);
            let starts = starts.map(|bytes| u32::from_le_bytes(*bytes)).collect();
            let (rows, cols, scale) = (blocks.rows, blocks.cols, blocks.scale);
            return Ok(Some(Self { format: Format::T2, rows, cols, scale, layout: Layout::Blocks(blocks, starts) }));
        }
        let Some(tensor) = record.tensor() else { return Ok(None) };
        let Tensor { format, rows, cols, scale, .. } = tensor;
        let is_kept = |index: &&Record| Encoding::from_tag(index.encoding) == Some(Encoding::Kept);
        let Some(index) = index.filter(is_kept) else {
            return Ok(Some(Self { format, rows, cols, scale, layout: Layout::Whole(tensor) }));
        };
        let (rows, cols, masks) = (index.rows.get(), index.cols.get(), index_blocks(index)?);
        let (row_mask, col_mask) = masks.split_at(mask_blocks(rows) as usize);
        let layout = Layout::Kept(tensor, kept(row_mask).collect(), kept(col_mask).collect());
        Ok(Some(Self { format, rows, cols, scale, layout }))
    }
    /// Whether the image has it with its zeros.
    pub(crate) const fn is_stored_whole(&self) -> bool {
        matches!(self.layout, Layout::Whole(_))
    }
    /// Units of 64 rows.
    pub(crate) const fn units(&self) -> u32 {
        self.rows.div_ceil(UNIT_ROWS as u32)
    }
    /// Reads rows `64 u` to `64 u + 63`.
    pub(crate) fn unit(&self, opened: &Opened, u: u32) -> Result<Unit, Error> {
        let first = u as usize * UNIT_ROWS;
        let rows = UNIT_ROWS.min(self.rows as usize - first);
        match &self.layout {
            Layout::Whole(tensor) => Unit::read(opened, tensor, u),
            Layout::Blocks(tensor, starts) => Unit::read_blocks(opened, tensor, starts, u),
            Layout::Kept(tensor, kept_rows, kept_cols) => {
                let mut unit = Unit::zeros(rows, self.cols as usize, tensor);
                let mut stored: Option<(usize, Unit)> = None;
                let here = |(_, r): &(usize, &usize)| (first..first + rows).contains(*r);
                for (i, r) in kept_rows.iter().enumerate().filter(here) {
                    let at = i / UNIT_ROWS;
                    if stored.as_ref().is_none_or(|(number, _)| *number != at) {
                        stored = Some((at, Unit::read(opened, tensor, at as u32)?));
                    }
                    let (_, from) = stored.as_ref().expect("just read");
                    unit.put(r - first, from, i % UNIT_ROWS, kept_cols);
                }
                Ok(unit)
            }
        }
    }
}

/// The section that says how this one is laid out.
pub(crate) fn index<'a>(image: &Image<'a>, record: &Record) -> Option<&'a Record> {
    let kind = kind(record.kind)?;
    let layer = Some(record.layer.get()).filter(|&layer| layer != Record::NO_LAYER).map(u32::from);
    Some(kind.index()).filter(|&index| index != kind).and_then(|index| image.sections().find(index, layer))
}

/// Up to 64 rows of a matrix.
#[derive(Debug, Default)]
pub(crate) struct Unit {
    pub(crate) rows: usize,
    /// Integer weights, row after row; empty for half-precision ones.
    pub(crate) codes: Vec<i8>,
    /// Bits of half-precision weights.
    pub(crate) halves: Vec<u16>,
    /// What the weights of a row are multiplied by: one number, or one for each group of columns.
    pub(crate) scales: Vec<f32>,
}

impl Unit {
    /// Reads unit `u`.
    fn read(opened: &Opened, tensor: &Tensor, u: u32) -> Result<Self, Error> {
        let (extent, rows, cols) = (tensor.unit(u), tensor.unit_rows(u), tensor.cols as usize);
        let mut blocks = vec![Block::ZERO; extent.blocks as usize];
        opened.read(u64::from(extent.start) * Block::BYTES as u64, blocks.as_mut_bytes())?;
        let (weights, scales) = blocks.split_at(tensor.weight_blocks(rows));
        let w = Matrix::new(tensor.format, rows, cols, weights).expect("a unit of a checked image");
        let places = (0..rows).flat_map(|r| (0..cols).map(move |c| (r, c)));
        let mut unit = Self { rows, ..Self::default() };
        if tensor.format == Format::F16 {
            unit.halves = places.map(|(r, c)| w.weight_f16(r, c)).collect();
            unit.scales = vec![1.0; rows];
            return Ok(unit);
        }
        unit.codes = places.map(|(r, c)| w.weight(r, c)).collect();
        unit.scales = if tensor.format.is_grouped() {
            let step = |r: usize, g: usize| {
                let at = r / tensor.format.tile_rows() * w.steps() + g;
                &weights[at * tensor.format.step_blocks()..][..tensor.format.step_blocks()]
            };
            let scale = |r: usize, g: usize| {
                let bits = bitnet_kernel::format::scales(tensor.format, step(r, g))[r % tensor.format.tile_rows()];
                f16::from_le_bytes(bits).to_f32()
            };
            (0..rows).flat_map(|r| (0..w.steps()).map(move |g| (r, g))).map(|(r, g)| scale(r, g)).collect()
        } else if tensor.format.has_row_scales() {
            <[f32]>::ref_from_bytes(scales.as_bytes()).expect("a block is 16 floats")[..rows].into()
        } else {
            vec![tensor.scale; rows]
        };
        Ok(unit)
    }
    /// The zeros of so many rows and columns, to which rows of `tensor` are added. Half-precision linears and those of grouped
    /// formats are never compacted.
    fn zeros(rows: usize, cols: usize, tensor: &Tensor) -> Self {
        let scale = if tensor.format.has_row_scales() { 0.0 } else { tensor.scale };
        Self { rows, codes: vec![0; rows * cols], halves: Vec::new(), scales: vec![scale; rows] }
    }
    /// Sets row `r` to row `i` of a matrix that has the columns `cols` alone.
    fn put(&mut self, r: usize, from: &Self, i: usize, cols: &[usize]) {
        let width = self.codes.len() / self.rows;
        let row = &mut self.codes[r * width..][..width];
        cols.iter().zip(from.row(i)).for_each(|(&c, &code)| row[c] = code);
        self.scales[r] = from.scales[i];
    }
    /// Reads unit `u` of a block-sparse matrix.
    fn read_blocks(opened: &Opened, tensor: &BlockTensor, starts: &[u32], u: u32) -> Result<Self, Error> {
        let (extent, rows, cols) = (tensor.unit(starts, u), tensor.unit_rows(u), tensor.cols as usize);
        let mut blocks = vec![Block::ZERO; extent.blocks as usize];
        opened.read(u64::from(extent.start) * Block::BYTES as u64, blocks.as_mut_bytes())?;
        let w = BlockMatrix::new(tensor.shape, rows, cols, &blocks).expect("a unit of a verified image");
        let mut codes = vec![0; rows * cols];
        for (strip, codes) in w.strips().zip(codes.chunks_mut(STRIP_ROWS * cols)) {
            let live: Vec<usize> = strip.live().collect();
            for (i, b) in live.iter().enumerate() {
                for (r, row) in codes.chunks_exact_mut(cols).enumerate() {
                    for (c, code) in row.iter_mut().skip(b * tensor.shape.cols()).take(tensor.shape.cols()).enumerate()
                    {
                        let (block, byte, bit) = tensor.shape.place(live.len(), i, r, c);
                        *code = (strip.blocks()[block].0[byte] >> bit & 3) as i8 - 1;
                    }
                }
            }
        }
        Ok(Self { rows, codes, halves: Vec::new(), scales: vec![tensor.scale; rows] })
    }
    /// Integer weights of row `r`.
    pub(crate) fn row(&self, r: usize) -> &[i8] {
        let cols = self.codes.len() / self.rows;
        &self.codes[r * cols..][..cols]
    }
    /// The numbers of row `r`.
    pub(crate) fn values(&self, r: usize) -> Vec<f32> {
        if self.codes.is_empty() {
            let cols = self.halves.len() / self.rows;
            return self.halves[r * cols..][..cols].iter().map(|&bits| f16::from_bits(bits).to_f32()).collect();
        }
        let scales = self.row_scales(r);
        let one = |scale: f32, codes: &[i8]| codes.iter().map(|&w| f32::from(w) * scale).collect::<Vec<_>>();
        match *scales {
            [scale] => one(scale, self.row(r)),
            _ => self.row(r).chunks(Format::GROUP_COLS).zip(scales).flat_map(|(codes, &s)| one(s, codes)).collect(),
        }
    }
    /// Scales of row `r`.
    pub(crate) fn row_scales(&self, r: usize) -> &[f32] {
        let groups = self.scales.len() / self.rows;
        &self.scales[r * groups..][..groups]
    }
}

/// The numbers of a vector.
pub(crate) fn vector(opened: &Opened, record: &Record) -> Result<Vec<f32>, Error> {
    let bytes = bytes(opened, record, record.cols.get() as usize * 4)?;
    Ok(bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect())
}

/// The first bytes of a section.
pub(crate) fn bytes(opened: &Opened, record: &Record, length: usize) -> Result<Vec<u8>, Error> {
    let mut bytes = vec![0; length];
    opened.read(u64::from(record.start.get()) * Block::BYTES as u64, &mut bytes)?;
    Ok(bytes)
}
