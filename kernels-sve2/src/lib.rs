//! SVE and SVE2 kernels: a place in the list of backends, not yet filled.
//!
//! Both functions exist on every architecture, so no caller has a `cfg`. They say `None` everywhere until the kernels are
//! written; CPUs with SVE run the NEON ones meanwhile.
#![no_std]

use bitnet_kernel::Kernels;

/// The SVE kernels (Graviton3: SVE without SVE2), if this CPU runs them.
pub fn sve() -> Option<&'static dyn Kernels> {
    None
}

/// The SVE2 kernels (Graviton4, Neoverse-N2), if this CPU runs them.
pub fn sve2() -> Option<&'static dyn Kernels> {
    None
}
