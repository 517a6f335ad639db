//! The memory map: the only file of the runtime with unsafe code.
use bitnet_kernel::Block;
use memmap2::Mmap;
use std::fs::File;

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
