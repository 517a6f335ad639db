use super::{Extent, WeightSource};
use crate::error::{ImageError, SourceError};
use bitnet_kernel::Block;
use zerocopy::FromBytes;

/// An image already in the address space: flash that executes in place, a memory map, or `include_bytes!`.
#[derive(Clone, Copy, Debug)]
pub struct Mapped<'a>(&'a [Block]);

impl<'a> Mapped<'a> {
    /// Uses `blocks`, an image from its first byte on.
    pub const fn new(blocks: &'a [Block]) -> Self {
        Self(blocks)
    }
    /// Uses `bytes`, which must lie on a multiple of 64; a tail shorter than a block is left out.
    ///
    /// # Errors
    /// [`ImageError::Unaligned`]: `include_bytes!` gives no alignment by itself, put it into an aligned wrapper.
    pub fn from_bytes(bytes: &'a [u8]) -> Result<Self, ImageError> {
        let whole = &bytes[..bytes.len() / Block::BYTES * Block::BYTES];
        let blocks = <[Block]>::ref_from_bytes(whole).map_err(|_| {
            // The length is whole blocks, so only the address can be wrong.
            ImageError::Unaligned { offset: (bytes.as_ptr().addr() % Block::BYTES) as u32 }
        });
        blocks.map(Self)
    }
}

impl WeightSource for Mapped<'_> {
    fn fetch(&mut self, e: Extent) -> Result<&[Block], SourceError> {
        let (start, len) = (e.start as usize, e.blocks as usize);
        let out_of_range = SourceError::OutOfRange { start: e.start, blocks: e.blocks };
        self.0.get(start..).and_then(|b| b.get(..len)).ok_or(out_of_range)
    }
    fn piece_blocks(&self) -> u32 {
        u32::MAX
    }
}
