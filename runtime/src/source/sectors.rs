use super::BlockDevice;
use crate::error::SourceError;
use bitnet_kernel::Block;
use zerocopy::IntoBytes;

/// A medium that is read in whole sectors: what a driver for a disk, a card or a flash does.
pub trait SectorDevice {
    /// Bytes of a sector: a power of two, up to [`SECTOR_BYTES_MAX`].
    const SECTOR_BYTES: usize;

    /// How many there are.
    fn sectors(&self) -> u64;

    /// Fills `into`, which is whole sectors, from sector `first` on. All of them are there.
    ///
    /// # Errors
    /// If not all could be read.
    fn read_sectors(&mut self, first: u64, into: &mut [u8]) -> Result<(), SourceError>;
}

/// The largest sector that is read: that of disks of the "advanced format".
pub const SECTOR_BYTES_MAX: usize = 4096;

/// An image that begins with a sector of a medium, for instance the first of a partition.
///
/// Blocks are 64 bytes and begin anywhere in a sector: whole sectors are read to where they are wanted, and the ends of what is
/// asked for by way of a sector on the stack.
#[derive(Clone, Copy, Debug)]
pub struct Sectors<D> {
    device: D,
    /// The image's first.
    first: u64,
}

impl<D: SectorDevice> Sectors<D> {
    /// The image begins with sector `first`.
    pub const fn new(device: D, first: u64) -> Self {
        const { assert!(D::SECTOR_BYTES.is_power_of_two() && D::SECTOR_BYTES <= SECTOR_BYTES_MAX) };
        Self { device, first }
    }
    /// Bytes from the image's first sector to the medium's last.
    pub fn bytes(&self) -> u64 {
        self.device.sectors().saturating_sub(self.first).saturating_mul(D::SECTOR_BYTES as u64)
    }
    /// The driver.
    pub fn into_inner(self) -> D {
        self.device
    }

    /// Fills `into`, a part of one sector that begins at byte `from` of the image.
    fn read_part(&mut self, from: u64, into: &mut [u8]) -> Result<(), SourceError> {
        let mut sector = [Block::ZERO; SECTOR_BYTES_MAX / Block::BYTES];
        let sector = &mut sector.as_mut_bytes()[..D::SECTOR_BYTES];
        self.read_whole(from, sector)?;
        into.copy_from_slice(&sector[(from % D::SECTOR_BYTES as u64) as usize..][..into.len()]);
        Ok(())
    }
    /// Fills `into`, whole sectors of which the first holds byte `from` of the image.
    fn read_whole(&mut self, from: u64, into: &mut [u8]) -> Result<(), SourceError> {
        if into.is_empty() {
            return Ok(());
        }
        self.device.read_sectors(self.first + from / D::SECTOR_BYTES as u64, into)
    }
}

impl<D: SectorDevice> BlockDevice for Sectors<D> {
    fn read(&mut self, start: u32, into: &mut [Block]) -> Result<(), SourceError> {
        let sector = D::SECTOR_BYTES as u64;
        let from = u64::from(start) * Block::BYTES as u64;
        let end = from + size_of_val(into) as u64;
        if end > self.bytes() {
            return Err(SourceError::OutOfRange { start, blocks: into.len() as u32 });
        }
        let whole = from.next_multiple_of(sector).min(end);
        let (head, rest) = into.as_mut_bytes().split_at_mut((whole - from) as usize);
        if !head.is_empty() {
            self.read_part(from, head)?;
        }
        let tail = (end - end % sector).max(whole);
        let (rest, last) = rest.split_at_mut((tail - whole) as usize);
        self.read_whole(whole, rest)?;
        if last.is_empty() { Ok(()) } else { self.read_part(tail, last) }
    }
    fn align_blocks(&self) -> u32 {
        // Where sectors are smaller than blocks, all blocks are whole sectors, since both are powers of two.
        D::SECTOR_BYTES.div_ceil(Block::BYTES) as u32
    }
}
