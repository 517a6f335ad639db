use super::BlockDevice;
use crate::error::SourceError;
use bitnet_kernel::Block;
use std::fs::{File, Metadata};
use std::io::{ErrorKind, Result};
use std::time::SystemTime;
use zerocopy::IntoBytes;

/// An image in a file, read piece by piece: memory stays as small as the buffers.
///
/// On Linux what is read goes past the page cache (`O_DIRECT`) where the file system allows it; elsewhere, and for the ends
/// that are no multiple of [`ImageFile::DIRECT_BYTES`], it is dropped from the cache as soon as it is copied. So a large image
/// does not push out what other programs have in the cache.
#[derive(Debug)]
pub struct ImageFile {
    file: File,
    /// The same file, opened again for reading past the page cache.
    direct: Option<File>,
    opened: (u64, Option<SystemTime>),
}

impl ImageFile {
    /// Offsets, lengths and addresses of reads past the page cache are multiples of this: the largest sector in use.
    pub const DIRECT_BYTES: usize = 4096;

    /// Uses `file` as it is now: if it is written to later, reading fails.
    ///
    /// # Errors
    /// If the file does not tell its length.
    pub fn new(file: File) -> Result<Self> {
        let opened = stamp(&file.metadata()?);
        Ok(Self { direct: open_direct(&file), file, opened })
    }
    /// The same file once more, for another thread.
    ///
    /// # Errors
    /// If the system has no more files to give, or has no reads that leave the file's offset alone.
    pub fn try_clone(&self) -> Result<Self> {
        if cfg!(not(unix)) {
            return Err(ErrorKind::Unsupported.into());
        }
        let direct = self.direct.as_ref().map(File::try_clone).transpose()?;
        Ok(Self { file: self.file.try_clone()?, direct, opened: self.opened })
    }
    /// Whether reads go past the page cache.
    pub const fn is_direct(&self) -> bool {
        self.direct.is_some()
    }

    /// The part of `into` that can be read past the cache is, and the rest is read as usual.
    fn fill(&self, from: u64, into: &mut [u8]) -> Result<()> {
        let mut done = 0;
        let aligned =
            from.is_multiple_of(Self::DIRECT_BYTES as u64) && into.as_ptr().addr().is_multiple_of(Self::DIRECT_BYTES);
        if let Some(direct) = self.direct.as_ref().filter(|_| aligned) {
            let whole = into.len() / Self::DIRECT_BYTES * Self::DIRECT_BYTES;
            // What fails here is tried once more through the cache: file systems differ in what they can read past it.
            if whole > 0 && read_at(direct, from, &mut into[..whole]).is_ok() {
                done = whole;
            }
        }
        if done < into.len() {
            read_at(&self.file, from + done as u64, &mut into[done..])?;
            drop_cached(&self.file, from + done as u64, into.len() - done);
        }
        Ok(())
    }
}

impl BlockDevice for ImageFile {
    fn read(&mut self, start: u32, into: &mut [Block]) -> core::result::Result<(), SourceError> {
        let out_of_range = SourceError::OutOfRange { start, blocks: into.len() as u32 };
        self.fill(u64::from(start) * Block::BYTES as u64, into.as_mut_bytes()).map_err(|e| match e.kind() {
            ErrorKind::UnexpectedEof => out_of_range,
            _ => SourceError::Device,
        })?;
        // Whoever writes to the file moves its time first, so what was read before that is what was opened.
        match self.file.metadata() {
            Ok(now) if stamp(&now) == self.opened => Ok(()),
            Ok(now) if now.len() < self.opened.0 => Err(out_of_range),
            Ok(_) => Err(SourceError::Changed),
            Err(_) => Err(SourceError::Device),
        }
    }
    fn align_blocks(&self) -> u32 {
        if self.is_direct() { (Self::DIRECT_BYTES / Block::BYTES) as u32 } else { 1 }
    }
}

/// What changes when a file is written to or cut.
fn stamp(metadata: &Metadata) -> (u64, Option<SystemTime>) {
    (metadata.len(), metadata.modified().ok())
}

/// Fills `into`; short reads and interruptions by signals are continued. Files that are clones of each other do not disturb
/// each other: no offset is kept.
#[cfg(unix)]
fn read_at(file: &File, from: u64, into: &mut [u8]) -> Result<()> {
    std::os::unix::fs::FileExt::read_exact_at(file, into, from)
}
#[cfg(not(unix))]
fn read_at(mut file: &File, from: u64, into: &mut [u8]) -> Result<()> {
    use std::io::{Read, Seek, SeekFrom};
    file.seek(SeekFrom::Start(from))?;
    file.read_exact(into)
}

/// The file that is open, not the one that has its name by now.
#[cfg(target_os = "linux")]
fn open_direct(file: &File) -> Option<File> {
    use rustix::fs::{Mode, OFlags, open};
    use std::os::fd::AsRawFd;
    let path = alloc::format!("/proc/self/fd/{}", file.as_raw_fd());
    open(path.as_str(), OFlags::RDONLY | OFlags::DIRECT | OFlags::CLOEXEC, Mode::empty()).ok().map(File::from)
}
#[cfg(target_os = "linux")]
fn drop_cached(file: &File, from: u64, bytes: usize) {
    // A wish: what is right does not depend on it.
    let _ = rustix::fs::fadvise(file, from, (bytes as u64).try_into().ok(), rustix::fs::Advice::DontNeed);
}
#[cfg(not(target_os = "linux"))]
fn open_direct(_: &File) -> Option<File> {
    None
}
#[cfg(not(target_os = "linux"))]
fn drop_cached(_: &File, _: u64, _: usize) {}
