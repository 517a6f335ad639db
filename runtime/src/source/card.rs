use super::SectorDevice;
use crate::error::SourceError;
use embedded_sdmmc_types::blockdevice::{Block as CardBlock, BlockDevice as CardDevice, BlockIdx};

/// A card behind a driver of [`embedded_sdmmc`](https://docs.rs/embedded-sdmmc), such as its `SdCard` on SPI.
///
/// That crate's blocks are a type of their own, which says nothing about where its bytes lie. So sectors are read into a few
/// such blocks and copied from there.
#[derive(Debug)]
pub struct Card<'a, D> {
    device: D,
    through: &'a mut [CardBlock],
    sectors: u32,
}

impl<'a, D: CardDevice> Card<'a, D> {
    /// Reads as many sectors at once as `through` has: a card wants few commands.
    ///
    /// # Errors
    /// If the card does not tell its size.
    ///
    /// # Panics
    /// If `through` is empty.
    pub fn new(device: D, through: &'a mut [CardBlock]) -> Result<Self, SourceError> {
        assert!(!through.is_empty(), "sectors are read into something");
        let sectors = device.num_blocks().map_err(|_| SourceError::Device)?.0;
        Ok(Self { device, through, sectors })
    }
}

impl<D: CardDevice> SectorDevice for Card<'_, D> {
    const SECTOR_BYTES: usize = CardBlock::LEN;

    fn sectors(&self) -> u64 {
        self.sectors.into()
    }
    fn read_sectors(&mut self, first: u64, into: &mut [u8]) -> Result<(), SourceError> {
        let mut sector = first as u32;
        for piece in into.chunks_mut(self.through.len() * CardBlock::LEN) {
            let through = &mut self.through[..piece.len() / CardBlock::LEN];
            self.device.read(through, BlockIdx(sector)).map_err(|_| SourceError::Device)?;
            for (to, from) in piece.chunks_mut(CardBlock::LEN).zip(&*through) {
                to.copy_from_slice(&from.contents);
            }
            sector += through.len() as u32;
        }
        Ok(())
    }
}
