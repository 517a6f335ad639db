//! What the CPU says of itself in registers that only kernels of operating systems and bare-metal images can read.
use core::arch::asm;

/// ID_AA64PFR0_EL1, SVE; and CPACR_EL1, ZEN, by which whoever started this machine has switched it on: without, the first
/// instruction of SVE is an exception.
pub(crate) fn sve() -> bool {
    let (pfr0, cpacr): (u64, u64);
    // SAFETY: the feature `id-registers` says that this runs at EL1 or above, where the registers can be read.
    unsafe {
        asm!("mrs {}, id_aa64pfr0_el1", out(reg) pfr0, options(nomem, nostack, preserves_flags));
        asm!("mrs {}, cpacr_el1", out(reg) cpacr, options(nomem, nostack, preserves_flags));
    }
    pfr0 >> 32 & 15 != 0 && cpacr >> 16 & 3 == 3
}

/// ID_AA64ZFR0_EL1, SVEver: SVE2. By number, since the assembler knows its name only where SVE is on.
pub(crate) fn sve2() -> bool {
    if !sve() {
        return false;
    }
    let zfr0: u64;
    // SAFETY: as above.
    unsafe { asm!("mrs {}, s3_0_c0_c4_4", out(reg) zfr0, options(nomem, nostack, preserves_flags)) };
    zfr0 & 15 != 0
}
