//! QEMU's `virt` machine, as `hw/arm/virt.c` has it.
use crate::console;
use crate::memory::{self, Tree};
use crate::story::Medium;
use crate::virtio::Disk;
use bitnet_kernel::Block;
use bitnet_runtime::image::MAGIC;
use bitnet_runtime::source::Sectors;
use zerocopy::IntoBytes;

/// The serial port, whose speed does not matter.
const CONSOLE: usize = 0x0900_0000;
/// The second bank of flash, and how long it is.
const FLASH: usize = 0x0400_0000;
const FLASH_BYTES: usize = 64 << 20;
/// The virtio transports, and how many.
const VIRTIO: usize = 0x0a00_0000;
const VIRTIO_COUNT: usize = 32;
/// Where RAM starts, with the device tree.
const RAM: usize = 0x4000_0000;
/// RAM that the tables know: 15 GiB.
const RAM_END: usize = RAM + (15 << 30);
/// RAM that is taken to be there when no device tree says how much.
const RAM_LEAST: usize = 128 << 20;

/// Opens the console.
pub fn open_console() {
    // SAFETY: a PL011 is there and the tables say Device.
    unsafe { console::open(CONSOLE, None) }
}

/// The RAM after the image. Once.
pub fn ram() -> &'static mut [Block] {
    // SAFETY: QEMU has put the tree there before the start, or there are zeros; nothing writes below the image.
    let tree = unsafe { Tree::at(RAM) };
    let end = tree.and_then(|tree| tree.ram_end(RAM)).unwrap_or(RAM + RAM_LEAST).min(RAM_END);
    // SAFETY: RAM, mapped as such, and the tree lies below the image.
    unsafe { memory::take(end) }
}

/// The image in flash, or else the disk.
pub fn medium() -> Option<Medium> {
    // SAFETY: flash is mapped as Normal memory, and nobody writes there.
    let flash = unsafe { memory::constant(FLASH, FLASH_BYTES) };
    if flash.as_bytes().starts_with(&MAGIC) {
        return Some(Medium::Flash(flash));
    }
    // SAFETY: the transports are there, and the tables say Device.
    let disk = unsafe { Disk::find(VIRTIO, VIRTIO_COUNT) };
    disk.map(|disk| Medium::Disk(Sectors::new(disk, 0)))
}
