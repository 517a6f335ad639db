//! What the boot loader has put beside the image: Multiboot's modules.
use bitnet_kernel::Block;
use core::ffi::CStr;
use core::{ptr, slice};

/// Where the loader tells of them (Multiboot 0.6.96, 3.3): a number of flags, one of which says that there are modules, later their
/// number and the address of the first of them. All numbers have 32 bits.
const FLAG: u32 = 1 << 3;
const COUNT: usize = 20;
const FIRST: usize = 24;
/// One of them: where its bytes begin and end, and what the loader was told to call it.
const MODULE_BYTES: usize = 16;

/// A file of the loader's.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Module {
    /// Its name, as the loader's configuration has it.
    pub(crate) name: &'static str,
    /// Its bytes but for those that make no whole block.
    pub(crate) blocks: &'static [Block],
}

/// All of them.
///
/// # Safety
/// `information` is what a Multiboot loader has left in EBX, and nothing was written there or to the modules since. All of it is
/// mapped, at its own address.
pub(crate) unsafe fn modules(information: usize) -> impl Iterator<Item = Module> {
    // SAFETY: the numbers that are read are where the loader has put them, says the caller.
    let number = |address: usize| unsafe { ptr::with_exposed_provenance::<u32>(address).read_unaligned() };
    let there = number(information) & FLAG != 0;
    let count = if there { number(information + COUNT) as usize } else { 0 };
    (0..count).map(move |index| {
        let at = number(information + FIRST) as usize + index * MODULE_BYTES;
        let [start, end, name] = [0, 4, 8].map(|offset| number(at + offset) as usize);
        assert!(start.is_multiple_of(Block::BYTES), "the header asks for modules that begin with a page");
        // SAFETY: the loader has put a module there, which nobody writes to, and what it is called, with a zero at the end.
        unsafe {
            Module {
                name: CStr::from_ptr(ptr::with_exposed_provenance(name)).to_str().unwrap_or("?"),
                blocks: slice::from_raw_parts(ptr::with_exposed_provenance(start), (end - start) / Block::BYTES),
            }
        }
    })
}
