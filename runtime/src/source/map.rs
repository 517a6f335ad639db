//! The memory map, and a copy of an image in memory of its own. Mapping a file is unsafe; nothing else here is.
use bitnet_kernel::Block;
use memmap2::{Mmap, MmapMut};
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};

/// Maps a whole file for reading.
///
/// The image is used where the system's page cache holds it: nothing is copied, and several processes share it. Whoever
/// truncates or rewrites the file meanwhile makes the process end by SIGBUS or compute nonsense; `bitnet-pack` never does, it
/// writes a new file and renames it.
///
/// # Errors
/// If the file cannot be mapped; an empty one cannot.
pub fn map_file(file: &File) -> std::io::Result<Mmap> {
    const { assert!(align_of::<Block>() <= 4096, "a page is aligned for blocks") };
    // SAFETY: the map is private to this process and read-only. That nobody changes the file is the user's part, as for
    // every program that maps its data; the packer keeps it by renaming.
    unsafe { Mmap::map(file) }
}

/// Reads a whole file of `bytes` into memory of its own, on pages of 2 MiB where the system has them to give.
///
/// It costs the time to read the file and as much memory as the file is long, which the system cannot drop when memory is
/// short. Nothing that happens to the file afterwards matters.
///
/// # Errors
/// If there is not so much memory, or the file is shorter or cannot be read.
pub fn load_file(mut file: &File, bytes: usize) -> std::io::Result<Mmap> {
    let mut memory = anonymous(bytes)?;
    file.seek(SeekFrom::Start(0))?;
    file.read_exact(&mut memory)?;
    memory.make_read_only()
}

/// Zeros in memory that begins with a page, on pages of 2 MiB where they fit and the system has them to give.
pub(super) fn anonymous(bytes: usize) -> std::io::Result<MmapMut> {
    let memory = MmapMut::map_anon(bytes)?;
    // A wish: what is right does not depend on the size of pages.
    #[cfg(target_os = "linux")]
    let _ = memory.advise(memmap2::Advice::HugePage);
    Ok(memory)
}
