use super::SectorDevice;
use crate::error::SourceError;
use embedded_storage::nor_flash::ReadNorFlash;

/// Flash behind a driver of [`embedded_storage`], such as a chip on SPI. Flash in the address space needs no driver and no
/// copy: it is [`Mapped`](super::Mapped).
#[derive(Clone, Copy, Debug)]
pub struct Flash<F>(F);

impl<F: ReadNorFlash> Flash<F> {
    /// Reads by way of `flash`.
    pub const fn new(flash: F) -> Self {
        Self(flash)
    }
}

impl<F: ReadNorFlash> SectorDevice for Flash<F> {
    const SECTOR_BYTES: usize = F::READ_SIZE;

    fn sectors(&self) -> u64 {
        self.0.capacity() as u64 / F::READ_SIZE as u64
    }
    fn read_sectors(&mut self, first: u64, into: &mut [u8]) -> Result<(), SourceError> {
        // Flash is addressed by 32 bits, whatever capacity its driver names.
        let offset = first.checked_mul(F::READ_SIZE as u64).and_then(|bytes| u32::try_from(bytes).ok());
        // What is out of bounds was refused before: an error here is the driver's.
        self.0.read(offset.ok_or(SourceError::Device)?, into).map_err(|_| SourceError::Device)
    }
}
