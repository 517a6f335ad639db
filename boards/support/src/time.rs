//! Clocks: the generic timer for seconds, the performance monitor for cycles.
use aarch64_cpu::asm::barrier;
use aarch64_cpu::registers::{CNTFRQ_EL0, CNTPCT_EL0, Readable};
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

/// Microseconds since the machine was switched on, or from wherever the timer counts.
pub fn micros() -> u64 {
    barrier::isb(barrier::SY);
    let frequency = CNTFRQ_EL0.get().max(1);
    (u128::from(CNTPCT_EL0.get()) * 1_000_000 / u128::from(frequency)) as u64
}
