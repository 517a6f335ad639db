//! x86-64 kernels: the host's, for development and for servers.
#![no_std]
#[cfg(feature = "std")]
extern crate std;

use bitnet_kernel::Kernels;

/// The AVX2 kernels, if this CPU runs them.
pub fn avx2() -> Option<&'static dyn Kernels> {
    None
}
