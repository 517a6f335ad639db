//! x86-64 kernels: the host's, for development and for servers.
//!
//! A backend is a file. Its one entrance is the function of its name here, which exists on every architecture and
//! returns `None` where the CPU lacks the instructions, so that no caller needs a `cfg`.
#![no_std]
#[cfg(feature = "std")]
extern crate std;

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod float;

use bitnet_kernel::Kernels;

/// The AVX2 kernels, if this CPU runs them.
///
/// With the feature `std` the CPU is asked; without it, only a build that may assume AVX2 throughout has them.
pub fn avx2() -> Option<&'static dyn Kernels> {
    #[cfg(target_arch = "x86_64")]
    return avx2::detect();
    #[cfg(not(target_arch = "x86_64"))]
    None
}
