use super::{Extent, WeightSource};
use crate::error::SourceError;
use bitnet_kernel::Block;

/// What a board implements for its SD card, SPI flash or virtio disk.
pub trait BlockDevice {
    /// Fills `into` from block `start` of the image.
    ///
    /// # Errors
    /// If not all of it could be read.
    fn read(&mut self, start: u32, into: &mut [Block]) -> Result<(), SourceError>;

    /// Reads are fastest from multiples of so many blocks on, and of such a length.
    fn align_blocks(&self) -> u32 {
        1
    }
}

impl<D: BlockDevice + ?Sized> BlockDevice for &mut D {
    fn read(&mut self, start: u32, into: &mut [Block]) -> Result<(), SourceError> {
        (**self).read(start, into)
    }
    fn align_blocks(&self) -> u32 {
        (**self).align_blocks()
    }
}

/// A device behind one staging buffer, which bounds the memory that weights take.
#[derive(Debug)]
pub struct Streamed<'a, D> {
    device: D,
    staging: &'a mut [Block],
}

impl<'a, D: BlockDevice> Streamed<'a, D> {
    /// `staging` must hold the largest unit of the image and its longest vector: [`Streamed::staging_blocks_min`].
    pub const fn new(device: D, staging: &'a mut [Block]) -> Self {
        Self { device, staging }
    }
    /// The smallest staging buffer that serves an image.
    pub fn staging_blocks_min(image: &crate::Image<'_>) -> usize {
        let of = |r: &crate::image::Record| match r.tensor() {
            Some(tensor) if tensor.units() > 0 => tensor.unit(0).blocks,
            None if let Some(tensor) = r.block_tensor() => r.blocks.get().min(tensor.unit_max() as u32),
            _ if r.kind == crate::image::Kind::HeadNorms as u8 => crate::image::split::NORM_BLOCKS as u32,
            _ => r.blocks.get(),
        };
        let weights = image.sections().records().iter().filter(|r| r.kind != crate::image::Kind::Tokenizer as u8);
        weights.map(of).max().unwrap_or(0) as usize
    }
}

impl<D: BlockDevice> WeightSource for Streamed<'_, D> {
    fn fetch(&mut self, e: Extent) -> Result<&[Block], SourceError> {
        let staging = self.staging.len() as u32;
        let into = self.staging.get_mut(..e.blocks as usize);
        let into = into.ok_or(SourceError::TooLarge { blocks: e.blocks, staging })?;
        self.device.read(e.start, into)?;
        Ok(into)
    }
    fn piece_blocks(&self) -> u32 {
        self.staging.len() as u32
    }
}
