//! Where weights come from.
#[cfg(feature = "embedded-sdmmc")]
mod card;
#[cfg(feature = "std")]
mod file;
#[cfg(feature = "embedded-storage")]
mod flash;
#[cfg(feature = "std")]
#[expect(unsafe_code, reason = "a memory map is the one thing above the kernels that needs it")]
mod map;
mod mapped;
#[cfg(feature = "std")]
mod pieces;
#[cfg(feature = "std")]
mod ring;
mod sectors;
mod streamed;

#[cfg(feature = "embedded-sdmmc")]
pub use card::Card;
#[cfg(feature = "std")]
pub use file::ImageFile;
#[cfg(feature = "embedded-storage")]
pub use flash::Flash;
#[cfg(feature = "std")]
pub use map::{load_file, map_file};
pub use mapped::Mapped;
#[cfg(feature = "std")]
pub use pieces::Pieces;
#[cfg(feature = "std")]
pub use ring::{Ring, RingOptions, RingStats, Span, Watch};
pub use sectors::{SECTOR_BYTES_MAX, SectorDevice, Sectors};
pub use streamed::{BlockDevice, Streamed};

use crate::error::SourceError;
use bitnet_kernel::Block;

/// A run of blocks in the image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// First block.
    pub start: u32,
    /// Number of blocks.
    pub blocks: u32,
}

impl Extent {
    /// The block after the last.
    pub const fn end(&self) -> u32 {
        self.start + self.blocks
    }
}

/// Lends the image's blocks, in place or through a staging buffer of its own.
pub trait WeightSource {
    /// The blocks of `extent`, until the next call.
    ///
    /// # Errors
    /// If they are not all there, are more than [`WeightSource::piece_blocks`], or the medium fails.
    fn fetch(&mut self, extent: Extent) -> Result<&[Block], SourceError>;

    /// The blocks of a row that is read by itself, such as a token's row of the embedding: not in the order of
    /// [`WeightSource::expect`], which goes on afterwards.
    ///
    /// # Errors
    /// As [`WeightSource::fetch`].
    fn fetch_row(&mut self, extent: Extent) -> Result<&[Block], SourceError> {
        self.fetch(extent)
    }

    /// The most blocks that one [`WeightSource::fetch`] can lend.
    fn piece_blocks(&self) -> u32;

    /// The most blocks that one [`WeightSource::fetch`] can lend from `start` on, which is where a section or a unit of one
    /// begins: that unit at least.
    fn piece_from(&self, start: u32) -> u32 {
        let _ = start;
        self.piece_blocks()
    }

    /// What will be fetched next lies in `order`, from its first block to its last, and probably in that order again and again:
    /// for sources that read ahead.
    fn expect(&mut self, order: Extent) {
        let _ = order;
    }
}
