//! The image for QEMU's `virt` machine. See README.md.
#![no_std]
#![no_main]

use bitnet_support::cores::{Conduit, Cores, by_first_part};
use bitnet_support::log;
use bitnet_support::map::qemu_virt as map;
use bitnet_support::start::Start;
use bitnet_support::story::{Machine, tell};

core::arch::global_asm!(include_str!("tables.s"));

bitnet_support::entry!(main);

fn main(start: Start) -> ! {
    map::open_console();
    log::open(c"bitnet.defmt");
    tell(Machine { board: "qemu-virt", start, wake, ram: map::ram(), medium: map::medium() })
}

fn wake(start: Start) -> Cores {
    // QEMU itself is the firmware: above what the image was started with. At EL3 it leaves that to the image.
    let conduit = match start.level {
        1 => Some(Conduit::Hvc),
        2 => Some(Conduit::Smc),
        _ => None,
    };
    Cores::wake(conduit, usize::MAX, by_first_part)
}
