//! Where weights come from.
#[cfg(feature = "std")]
mod file;
#[cfg(feature = "std")]
#[expect(unsafe_code, reason = "a memory map is the one thing above the kernels that needs it")]
mod map;
mod mapped;
mod streamed;

#[cfg(feature = "std")]
pub use file::ImageFile;
#[cfg(feature = "std")]
pub use map::{load_file, map_file};
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

    /// The most blocks that one [`WeightSource::fetch`] can lend.
    fn piece_blocks(&self) -> u32;
}
