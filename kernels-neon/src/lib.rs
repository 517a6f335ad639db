//! NEON kernels.
#![no_std]
#[cfg(feature = "std")]
extern crate std;

use bitnet_kernel::Kernels;

/// The NEON kernels with dot products, if this CPU runs them.
pub fn dotprod() -> Option<&'static dyn Kernels> {
    None
}
