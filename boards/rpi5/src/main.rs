//! The image for the Raspberry Pi 5. See README.md.
#![no_std]
#![no_main]

use bitnet_support::cores::{Conduit, Cores, numbering};
use bitnet_support::map::rpi5 as map;
use bitnet_support::start::Start;
use bitnet_support::story::{Machine, tell};

core::arch::global_asm!(include_str!("tables.s"));

bitnet_support::entry!(main);

fn main(start: Start) -> ! {
    map::open_console();
    tell(Machine { board: "rpi5", start, wake, ram: map::ram(), medium: map::medium() })
}

fn wake(_: Start) -> Cores {
    // The firmware of a Pi 5 has PSCI at EL3. That of a Pi 4 has none.
    let conduit = map::is_rpi5().then_some(Conduit::Smc);
    Cores::wake(conduit, usize::MAX, numbering())
}
