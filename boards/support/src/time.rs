//! Clocks: the generic timer for seconds, the performance monitor for cycles.
use aarch64_cpu::asm::barrier;
use aarch64_cpu::registers::{CNTFRQ_EL0, CNTKCTL_EL1, CNTPCT_EL0, Readable, Writeable};
use core::arch::asm;

/// Starts this core's cycle counter.
pub fn count_cycles() {
    // SAFETY: the counter is nobody else's. PMCNTENSET_EL0: the cycle counter; PMCR_EL0: enable, and 64 bits of cycles.
    unsafe {
        asm!("msr pmcntenset_el0, {0}", "msr pmcr_el0, {1}", "isb", in(reg) 1_u64 << 31, in(reg) 1_u64 | 1 << 6, options(nomem, nostack));
    }
}

/// Cycles of this core since [`count_cycles`].
pub fn cycles() -> u64 {
    let cycles: u64;
    // SAFETY: a read of a counter.
    unsafe { asm!("isb", "mrs {}, pmccntr_el0", out(reg) cycles, options(nomem, nostack)) };
    cycles
}

/// Has the timer wake this core from `wfe` again and again, each time that bit 11 of its count turns to one: every 76 microseconds
/// at the 54 MHz of a Raspberry Pi 5, while a byte on its serial port takes 87.
pub fn wake_often() {
    CNTKCTL_EL1.write(CNTKCTL_EL1::EVNTEN::Enable + CNTKCTL_EL1::EVNTI.val(11));
}

/// Microseconds since the machine was switched on, or from wherever the timer counts.
pub fn micros() -> u64 {
    barrier::isb(barrier::SY);
    let frequency = CNTFRQ_EL0.get().max(1);
    (u128::from(CNTPCT_EL0.get()) * 1_000_000 / u128::from(frequency)) as u64
}
