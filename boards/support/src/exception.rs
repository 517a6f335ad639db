//! What went wrong, said as far as a person can use it, and the end of the run.
use crate::console::Last;
use crate::{exit, memory};
use aarch64_cpu::registers::{ELR_EL1, ESR_EL1, FAR_EL1, Readable};
use core::fmt::Write;
use core::panic::PanicInfo;

/// Reports an exception and ends. `kind` is the number of the vector, `stack` and `link` are the stack pointer and the return
/// address as they were.
pub(crate) extern "C" fn report(kind: usize, stack: u64, link: u64) -> ! {
    let (syndrome, address) = (ESR_EL1.get(), FAR_EL1.get());
    let source = ["synchronous", "IRQ", "FIQ", "SError"][kind % 4];
    let _ = writeln!(Last, "\nexception: {source}, {}", class(syndrome));
    let _ = writeln!(Last, "  at {:#x}, called from {link:#x}, stack pointer {stack:#x}", ELR_EL1.get());
    let _ = writeln!(Last, "  address {address:#x}, syndrome {syndrome:#x}, vector {kind}");
    if let Some(core) = memory::guard_of(address) {
        let _ = writeln!(Last, "  the stack of core {core} is full ({} bytes)", memory::STACK_SLOT - 4096);
    }
    exit::with(exit::EXCEPTION)
}

/// What a syndrome says (Arm ARM, ESR_EL1: EC in bits 31 to 26, the status of an abort in bits 5 to 0).
fn class(syndrome: u64) -> &'static str {
    match (syndrome >> 26 & 63, syndrome & 63) {
        (0b00_0000, _) => "an instruction that this CPU does not have, or an unknown reason",
        (0b00_0111, _) => "floating point is off",
        (0b01_1001, _) => "SVE is off",
        (0b10_0000 | 0b10_0001, _) => "instructions were fetched from where there are none",
        (0b10_0010, _) => "the program counter is not aligned",
        (0b10_0110, _) => "the stack pointer is not aligned",
        (0b10_0100 | 0b10_0101, 0b10_0001) => "an access that is not aligned",
        (0b10_0100 | 0b10_0101, 0b00_0100..=0b00_0111) => "an access to an address that is not mapped",
        (0b10_0100 | 0b10_0101, 0b00_1100..=0b00_1111) => "a write where nothing may be written",
        (0b10_0100 | 0b10_0101, 0b01_0000) => "an access that no device answered",
        (0b10_0100 | 0b10_0101, _) => "an access that failed",
        (0b11_1100, _) => "a breakpoint",
        _ => "of another class",
    }
}

#[panic_handler]
fn panic(info: &PanicInfo<'_>) -> ! {
    let _ = writeln!(Last, "\n{info}");
    exit::with(exit::PANIC)
}
