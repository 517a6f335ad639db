//! From the first instruction to Rust: `start.s`, and the numbers in it.
//!
//! The tables of addresses are data that the linker fills in, because they have to be there before any Rust code runs; a crate
//! that makes them at run time comes too late for that. A board brings the first level, `table_1`, whose last entry leads to
//! the stacks: see `boards/qemu-virt/src/tables.s`.
use crate::{cores, exception, memory};
use core::arch::global_asm;

/// 39 bits of address, pages of 4 KiB, walks through caches, no second region, physical addresses of 40 bits.
const TCR: u64 = 25 | 1 << 8 | 1 << 10 | 3 << 12 | 1 << 23 | 2 << 32;
/// Memory management, data and instruction caches, aligned stack; and the bits that are ones.
const SCTLR: u64 =
    0x30d0_0800 | 1 | 1 << 2 | 1 << 3 | 1 << 12 | if cfg!(feature = "strict-align") { 1 << 1 } else { 0 };

global_asm!(
    include_str!("start.s"),
    tcr = const TCR,
    sctlr = const SCTLR,
    stack_base = const memory::STACK_BASE,
    slot = const memory::STACK_SLOT,
    cores = const cores::CORES_MAX,
    pattern = const memory::STACK_PATTERN,
    main = sym main,
    worker = sym cores::worker,
    exception = sym exception::report,
);

/// What the first core was started with.
#[derive(Clone, Copy, Debug)]
pub struct Start {
    /// The address of the device tree, 0 if the loader gave none.
    pub device_tree: usize,
    /// The exception level of the first instruction, 1 to 3.
    pub level: u8,
}

unsafe extern "Rust" {
    /// The board's, made by [`entry!`](crate::entry).
    safe fn bitnet_board_main(start: Start) -> !;
}

extern "C" fn main(device_tree: usize, level: usize) -> ! {
    bitnet_board_main(Start { device_tree, level: level as u8 })
}

/// Names the function with which a board begins: `fn(Start) -> !`.
#[macro_export]
macro_rules! entry {
    ($main:path) => {
        #[unsafe(no_mangle)]
        fn bitnet_board_main(start: $crate::start::Start) -> ! {
            let main: fn($crate::start::Start) -> ! = $main;
            main(start)
        }
    };
}
