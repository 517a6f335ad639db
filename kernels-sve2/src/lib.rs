//! SVE and SVE2 kernels, for vectors of any length from 128 to 2,048 bits.
//!
//! [`sve`] suits the Neoverse V1 (Graviton3: vectors of 256 bits, no SVE2), [`sve2`] the Neoverse V2 and N2 (Graviton4: 128
//! bits). They differ in the sums of the look-up formats alone. Both functions exist on every architecture and return `None`
//! where the CPU lacks the instructions, so that no caller needs a `cfg`.
//!
//! Stable Rust has no intrinsics of SVE, so its loops are `asm!`, each with registers of its own choice. What is not worth a
//! loop in SVE is NEON, which is part of every CPU of this architecture.
#![no_std]
#[cfg(feature = "std")]
extern crate std;

// First, for its macros.
#[cfg(target_arch = "aarch64")]
#[macro_use]
mod lanes;

#[cfg(target_arch = "aarch64")]
mod backend;
#[cfg(target_arch = "aarch64")]
mod grouped;
#[cfg(target_arch = "aarch64")]
mod planes;
#[cfg(all(target_arch = "aarch64", not(feature = "std"), feature = "id-registers"))]
mod registers;
#[cfg(target_arch = "aarch64")]
mod sparse;

use bitnet_kernel::Kernels;

/// The SVE kernels, if this CPU runs them.
///
/// With the feature `std` the system is asked, and with `id-registers` the CPU itself; without either, only a build that may
/// assume SVE throughout has them.
pub fn sve() -> Option<&'static dyn Kernels> {
    #[cfg(target_arch = "aarch64")]
    return backend::sve();
    #[cfg(not(target_arch = "aarch64"))]
    None
}

/// The SVE2 kernels, if this CPU runs them, as [`sve`].
pub fn sve2() -> Option<&'static dyn Kernels> {
    #[cfg(target_arch = "aarch64")]
    return backend::sve2();
    #[cfg(not(target_arch = "aarch64"))]
    None
}
