//! The Raspberry Pi 5, and the 4, which is what QEMU has.
use crate::story::Medium;
use crate::{console, memory};
use aarch64_cpu::registers::{MIDR_EL1, Readable};
use bitnet_kernel::Block;
use bitnet_runtime::image::MAGIC;
use zerocopy::IntoBytes;

/// The port of the debug connector of a Pi 5: `serial10` of `bcm2712.dtsi` in Linux.
const CONSOLE_5: usize = 0x10_7d00_1000;
/// The port of pins 8 and 10 of a Pi 4: `serial0` of `bcm2711.dtsi`.
const CONSOLE_4: usize = 0xfe20_1000;
/// Where `config.txt` has the firmware put the model, and where RAM for everything else ends.
const MODEL: usize = 256 << 20;
/// Most bytes of a model: the firmware's own memory and the device tree begin no lower than 768 MiB.
const MODEL_BYTES_MAX: usize = 512 << 20;
/// The part number of the Cortex-A76 in `MIDR_EL1`.
const CORTEX_A76: u64 = 0xd0b;

/// Whether this is a Pi 5, by its CPU.
pub fn is_rpi5() -> bool {
    MIDR_EL1.get() >> 4 & 0xfff == CORTEX_A76
}

/// Opens the console, at the speed to which the firmware has set it.
pub fn open_console() {
    let address = if is_rpi5() { CONSOLE_5 } else { CONSOLE_4 };
    // SAFETY: a PL011 is there on the machine that has this CPU, and the tables say Device.
    unsafe { console::open(address, None) }
}

/// The RAM between the image and the model. Once.
pub fn ram() -> &'static mut [Block] {
    // SAFETY: every such board has a GiB of RAM, and the firmware puts nothing there.
    unsafe { memory::take(MODEL) }
}

/// The model, if the firmware has put one there.
pub fn medium() -> Option<Medium> {
    // SAFETY: RAM, mapped as such, which nothing writes to.
    let model = unsafe { memory::constant(MODEL, MODEL_BYTES_MAX) };
    model.as_bytes().starts_with(&MAGIC).then_some(Medium::Flash(model))
}
