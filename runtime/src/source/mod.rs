//! Where weights come from.
mod mapped;
mod streamed;

pub use mapped::Mapped;
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

/// Lends the image's blocks, in place or through a staging buffer of its own.
pub trait WeightSource {
    /// The blocks of `extent`, until the next call.
    ///
    /// # Errors
    /// If they are not all there, are more than [`WeightSource::piece_blocks`], or the medium fails.
    fn fetch(&mut self, extent: Extent) -> Result<&[Block], SourceError>;

    /// The most blocks that one [`WeightSource::fetch`] can lend.
    fn piece_blocks(&self) -> u32;

    /// A hint that `extent` is fetched next, so that a device may start reading while the CPU computes.
    fn prefetch(&mut self, extent: Extent) {
        let _ = extent;
    }
}
