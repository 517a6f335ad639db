//! NEON kernels.
//!
//! A backend is a file. Its one entrance is the function of its name here, which exists on every architecture and
//! returns `None` where the CPU lacks the instructions, so that no caller needs a `cfg`.
#![no_std]
#[cfg(feature = "std")]
extern crate std;

#[cfg(target_arch = "aarch64")]
mod dotprod;

use bitnet_kernel::Kernels;

/// The NEON kernels with dot products, if this CPU runs them.
///
/// With the feature `std` the CPU is asked; without it, only a build that may assume dot products throughout has them.
pub fn dotprod() -> Option<&'static dyn Kernels> {
    #[cfg(target_arch = "aarch64")]
    return dotprod::detect();
    #[cfg(not(target_arch = "aarch64"))]
    None
}
