use super::BlockDevice;
use crate::error::SourceError;
use bitnet_kernel::Block;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use zerocopy::IntoBytes;

/// An image in a file, read piece by piece: memory stays as small as the staging buffer.
#[derive(Debug)]
pub struct ImageFile(pub File);

impl BlockDevice for ImageFile {
    fn read(&mut self, start: u32, into: &mut [Block]) -> Result<(), SourceError> {
        let out_of_range = SourceError::OutOfRange { start, blocks: into.len() as u32 };
        let from = SeekFrom::Start(u64::from(start) * Block::BYTES as u64);
        self.0.seek(from).map_err(|_| SourceError::Device)?;
        self.0.read_exact(into.as_mut_bytes()).map_err(|e| match e.kind() {
            std::io::ErrorKind::UnexpectedEof => out_of_range,
            _ => SourceError::Device,
        })
    }
}
