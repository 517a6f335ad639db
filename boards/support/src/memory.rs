//! What memory there is, and how much of it was used.
//!
//! Stacks lie at the end of the address space, each in a slot whose first page leads nowhere. The image's own RAM ends with
//! `__image_end`; what comes after it, up to the end of RAM, is lent once, as blocks.
use crate::cores::CORES_MAX;
use bitnet_kernel::Block;
use bitnet_kernel::conformance::Workspace;
use core::slice;
use core::sync::atomic::{AtomicBool, Ordering::Relaxed};
use dtoolkit::fdt::Fdt;
use dtoolkit::{Node, Property};

/// Where the stacks' slots begin: the last GiB of addresses.
pub const STACK_BASE: u64 = 511 << 30;
/// One core's slot: a page that leads nowhere, and the stack.
pub const STACK_SLOT: usize = 128 << 10;
/// What a stack is full of before it is used.
pub const STACK_PATTERN: u64 = 0x5374_6163_6b20_6672;
/// The page below a stack.
const GUARD: usize = 4096;

unsafe extern "C" {
    static __ram_start: u8;
    static __image_end: u8;
}

/// The core whose stack's guard an address lies in.
pub fn guard_of(address: u64) -> Option<usize> {
    let offset = address.checked_sub(STACK_BASE)? as usize;
    (offset < CORES_MAX * STACK_SLOT && offset % STACK_SLOT < GUARD).then_some(offset / STACK_SLOT)
}

/// The most bytes of a core's stack that were in use at once, of `STACK_SLOT - 4096`. Only for a core that has started.
pub fn stack_used(core: usize) -> usize {
    assert!(core < CORES_MAX);
    let words = (STACK_SLOT - GUARD) / size_of::<u64>();
    let base = STACK_BASE as usize + core * STACK_SLOT + GUARD;
    let untouched = (0..words).take_while(|i| {
        // SAFETY: the address lies in the mapped part of the slot. Another core may write there: the read is volatile, and a
        // word is either the pattern or not.
        unsafe { (base as *const u64).add(*i).read_volatile() == STACK_PATTERN }
    });
    (words - untouched.count()) * size_of::<u64>()
}

/// Bytes of RAM that the image takes by itself: what it writes, the stacks, and the code where that is in RAM.
pub fn image_bytes() -> usize {
    (&raw const __image_end).addr() - (&raw const __ram_start).addr()
}

/// The RAM after the image, up to the address `end`, as zero blocks. It is lent once.
///
/// # Panics
/// The second time.
///
/// # Safety
/// From the image's end to `end` there is RAM that is mapped as such and that nothing else uses.
pub unsafe fn take(end: usize) -> &'static mut [Block] {
    static TAKEN: AtomicBool = AtomicBool::new(false);
    assert!(!TAKEN.swap(true, Relaxed), "the RAM was taken before");
    let start = (&raw const __image_end).addr().next_multiple_of(Block::BYTES);
    let blocks = end.saturating_sub(start) / Block::BYTES;
    // SAFETY: the caller says that it is RAM and free; it is aligned, lent once, and any bytes are blocks.
    unsafe { slice::from_raw_parts_mut(start as *mut Block, blocks) }
}

/// A run of memory or flash that holds an image for as long as the machine runs.
///
/// # Safety
/// The addresses are mapped as Normal memory and nothing writes there.
pub unsafe fn constant(start: usize, bytes: usize) -> &'static [Block] {
    assert!(start.is_multiple_of(Block::BYTES), "an image starts on a multiple of 64");
    // SAFETY: aligned, and readable and constant as the caller says.
    unsafe { slice::from_raw_parts(start as *const Block, bytes / Block::BYTES) }
}

/// Memory for the conformance suite, made of blocks that are something else afterwards; `None` if they are too few.
pub fn workspace(blocks: &mut [Block]) -> Option<&mut Workspace> {
    const { assert!(align_of::<Workspace>() <= align_of::<Block>()) };
    let blocks = blocks.get_mut(..size_of::<Workspace>().div_ceil(Block::BYTES))?;
    blocks.fill(Block::ZERO);
    // SAFETY: it is long enough and aligned, and a workspace is blocks, integers and floats, of which zero bytes are values.
    Some(unsafe { &mut *blocks.as_mut_ptr().cast::<Workspace>() })
}

/// What the device tree says.
#[derive(Clone, Copy, Debug)]
pub struct Tree(Fdt<'static>);

impl Tree {
    /// The device tree at `address`, if there is one.
    ///
    /// # Safety
    /// The addresses from there are mapped memory, and if they hold a device tree, nothing changes it.
    pub unsafe fn at(address: usize) -> Option<Self> {
        if address == 0 || !address.is_multiple_of(8) {
            return None;
        }
        // SAFETY: the caller's.
        unsafe { Fdt::from_raw(address as *const u8) }.ok().map(Self)
    }
}

impl Tree {
    /// The end of the run of RAM that `address` lies in.
    pub fn ram_end(&self, address: usize) -> Option<usize> {
        let memory = self.0.memory().ok()?;
        let runs = memory.reg().ok()??.filter_map(|run| {
            let start = run.address::<u64>().ok()? as usize;
            Some((start, start.checked_add(run.size::<u64>().ok()? as usize)?))
        });
        runs.into_iter().find(|(start, end)| (*start..*end).contains(&address)).map(|(_, end)| end)
    }
    /// The address and the length of the initial RAM disk, which a loader may have put somewhere.
    pub fn initrd(&self) -> Option<(usize, usize)> {
        let chosen = self.0.chosen()?;
        let number = |name: &str| {
            let property = chosen.property(name)?;
            let bytes = property.value();
            let wide = bytes.try_into().map(u64::from_be_bytes).ok();
            wide.or_else(|| Some(u32::from_be_bytes(bytes.try_into().ok()?).into()))
        };
        let (start, end) = (number("linux,initrd-start")? as usize, number("linux,initrd-end")? as usize);
        Some((start, end.checked_sub(start)?))
    }
    /// Where the tree ends in memory.
    pub fn end(&self) -> usize {
        self.0.data().as_ptr().addr() + self.0.data().len()
    }
}
