use super::Extent;
use crate::image::split::NORM_BLOCKS;
use crate::image::{Encoding, Image, Kind, Record};
use alloc::vec::Vec;
use bitnet_kernel::Block;

/// The weights of an image in the order in which a pass reads them, cut into pieces of whole units and vectors.
///
/// What is read a row at a time is in no piece: an embedding that is not the head too, and the second plane of a two-stage
/// head.
#[derive(Clone, Debug)]
pub struct Pieces {
    /// In order, none empty.
    all: Vec<Piece>,
    /// The most blocks of a piece.
    piece_blocks: u32,
    /// The most blocks of what is in no piece and fetched at once.
    row_blocks: u32,
    image_blocks: u32,
}

/// One piece, and the block of the resident memory it is kept in, if it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Piece {
    pub extent: Extent,
    pub resident: Option<u32>,
}

impl Pieces {
    /// Pieces of at most `piece_blocks`, or of one unit or vector where that is more.
    pub fn new(image: &Image<'_>, piece_blocks: u32) -> Self {
        let mut pieces = Self {
            all: Vec::new(),
            piece_blocks: piece_blocks.max(Self::piece_blocks_min(image)),
            row_blocks: ROW_BLOCKS_MIN,
            image_blocks: (image.file_bytes() / Block::BYTES as u64) as u32,
        };
        for record in image.sections().records() {
            if is_apart(record) || is_index(record) {
                pieces.row_blocks = pieces.row_blocks.max(largest(record));
            }
            if !is_apart(record) {
                parts(record, &mut |part| pieces.push(part));
            }
        }
        // A tied embedding's rows may lie in pieces that are not at hand.
        pieces.row_blocks = pieces.row_blocks.max(largest_tile(image));
        pieces
    }
    /// The largest unit or vector: no piece can be smaller.
    pub fn piece_blocks_min(image: &Image<'_>) -> u32 {
        let weights = image.sections().records().iter().filter(|r| !is_apart(r));
        weights.map(largest).max().unwrap_or(0)
    }
    fn push(&mut self, part: Extent) {
        let limit = self.piece_blocks;
        match self.all.last_mut() {
            _ if part.blocks == 0 => {}
            Some(Piece { extent, .. }) if extent.end() == part.start && part.end() - extent.start <= limit => {
                extent.blocks += part.blocks;
            }
            _ => self.all.push(Piece { extent: part, resident: None }),
        }
    }

    /// Keeps as many pieces in memory as fit `blocks`, and says how many blocks they take.
    ///
    /// A pass reads every piece once, so that all are worth the same a byte. They are spread evenly: while the resident ones
    /// are computed the reader has time for the others.
    pub fn keep(&mut self, blocks: u64) -> u64 {
        let total = self.blocks();
        let (mut seen, mut kept) = (0, 0);
        for Piece { extent, resident } in &mut self.all {
            seen += u64::from(extent.blocks);
            let fits = kept + u64::from(extent.blocks) <= (blocks as u128 * seen as u128 / total as u128) as u64;
            *resident = fits.then_some(kept as u32);
            kept += if fits { u64::from(extent.blocks) } else { 0 };
        }
        kept
    }

    /// Blocks in all pieces.
    pub fn blocks(&self) -> u64 {
        self.all.iter().map(|p| u64::from(p.extent.blocks)).sum()
    }
    /// Blocks that stay in memory.
    pub fn resident_blocks(&self) -> u64 {
        self.all.iter().filter(|p| p.resident.is_some()).map(|p| u64::from(p.extent.blocks)).sum()
    }
    /// Blocks that one pass over all pieces reads from the device.
    pub fn streamed_blocks(&self) -> u64 {
        self.blocks() - self.resident_blocks()
    }
    /// The most blocks of a piece.
    pub const fn piece_blocks(&self) -> u32 {
        self.piece_blocks
    }
    /// The most blocks of what is fetched at once and lies in no piece.
    pub const fn row_blocks(&self) -> u32 {
        self.row_blocks
    }

    pub(super) const fn image_blocks(&self) -> u32 {
        self.image_blocks
    }
    pub(super) fn all(&self) -> &[Piece] {
        &self.all
    }
    /// The piece in which all of `extent` lies.
    pub(super) fn find(&self, extent: Extent) -> Option<usize> {
        let i = self.all.partition_point(|p| p.extent.start <= extent.start).checked_sub(1)?;
        (extent.end() <= self.all[i].extent.end()).then_some(i)
    }
    /// The pieces that have a part of `extent`.
    pub(super) fn range(&self, extent: Extent) -> core::ops::Range<usize> {
        self.all.partition_point(|p| p.extent.end() <= extent.start)
            ..self.all.partition_point(|p| p.extent.start < extent.end())
    }
}

/// A page: tokenizers are read in such parts at least.
const ROW_BLOCKS_MIN: u32 = 64;

/// Whether a section is read a row at a time and in no piece.
pub(super) fn is_apart(record: &Record) -> bool {
    [Kind::Tokenizer, Kind::Embedding, Kind::HeadLow].iter().any(|&kind| kind as u8 == record.kind)
}

/// Whether a part of the section is fetched again after the matrix that follows it.
fn is_index(record: &Record) -> bool {
    record.encoding == Encoding::Kept.tag()
}

/// The parts of a section that are fetched whole.
fn parts(record: &Record, each: &mut dyn FnMut(Extent)) {
    match record.tensor() {
        Some(tensor) => (0..tensor.units()).for_each(|u| each(tensor.unit(u))),
        None if record.kind == Kind::HeadNorms as u8 => {
            let Extent { start, blocks } = record.extent();
            let norms = (start..start + blocks).step_by(NORM_BLOCKS);
            norms.for_each(|start| each(Extent { start, blocks: NORM_BLOCKS as u32 }));
        }
        None => each(record.extent()),
    }
}

/// Blocks of the largest of them; of a tokenizer any part does, of an embedding a tile.
fn largest(record: &Record) -> u32 {
    match record.tensor() {
        _ if record.kind == Kind::Tokenizer as u8 => 1,
        Some(tensor) if record.kind == Kind::Embedding as u8 => tensor.row(0).0.blocks,
        Some(tensor) => tensor.unit(0).blocks,
        None if record.kind == Kind::HeadNorms as u8 => NORM_BLOCKS as u32,
        None => record.blocks.get(),
    }
}

/// Blocks of a tile of the head.
fn largest_tile(image: &Image<'_>) -> u32 {
    image.head().row(0).0.blocks
}
