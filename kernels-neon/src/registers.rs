//! What the CPU says of itself in registers that only kernels of operating systems and bare-metal images can read.
use core::arch::asm;

/// ID_AA64ISAR0_EL1, DP: dot products.
pub(crate) fn dotprod() -> bool {
    let isar0: u64;
    // SAFETY: the feature `id-registers` says that this runs at EL1 or above, where the register can be read.
    unsafe { asm!("mrs {}, id_aa64isar0_el1", out(reg) isar0, options(pure, nomem, nostack, preserves_flags)) };
    isar0 >> 44 & 15 != 0
}

/// ID_AA64ISAR1_EL1, I8MM: matrix products of bytes.
pub(crate) fn i8mm() -> bool {
    let isar1: u64;
    // SAFETY: as above.
    unsafe { asm!("mrs {}, id_aa64isar1_el1", out(reg) isar1, options(pure, nomem, nostack, preserves_flags)) };
    isar1 >> 52 & 15 != 0
}
