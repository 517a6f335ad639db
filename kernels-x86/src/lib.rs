//! x86-64 kernels: the host's, for development and for servers.
//!
//! A backend is a file. Its one entrance is the function of its name here, which exists on every architecture and
//! returns `None` where the CPU lacks the instructions, so that no caller needs a `cfg`. The CPU is asked at run time,
//! without an operating system too.
#![no_std]

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(all(target_arch = "x86_64", feature = "avx512"))]
mod avx512;
#[cfg(all(target_arch = "x86_64", feature = "avx512"))]
mod avx512_bw;
#[cfg(all(target_arch = "x86_64", feature = "avx512"))]
mod avx512_vnni;
#[cfg(target_arch = "x86_64")]
mod blocks;
#[cfg(all(target_arch = "x86_64", feature = "avx512"))]
mod blocks_vnni;
#[cfg(target_arch = "x86_64")]
mod cpu;
#[cfg(target_arch = "x86_64")]
mod float;
#[cfg(target_arch = "x86_64")]
mod grouped;
#[cfg(target_arch = "x86_64")]
mod rows;
#[cfg(all(target_arch = "x86_64", feature = "avx512"))]
mod rows_vnni;
#[cfg(target_arch = "x86_64")]
mod tiles;

use bitnet_kernel::Kernels;

/// The AVX-512 kernels for CPUs with VNNI and VBMI (Ice Lake, Zen 4 and later), if this CPU runs them.
///
/// `None` without the feature `avx512`.
pub fn avx512_vnni() -> Option<&'static dyn Kernels> {
    #[cfg(all(target_arch = "x86_64", feature = "avx512"))]
    return avx512_vnni::detect();
    #[cfg(not(all(target_arch = "x86_64", feature = "avx512")))]
    None
}

/// The AVX-512 kernels for CPUs with BW (Skylake-X and later), if this CPU runs them.
///
/// `None` without the feature `avx512`.
pub fn avx512_bw() -> Option<&'static dyn Kernels> {
    #[cfg(all(target_arch = "x86_64", feature = "avx512"))]
    return avx512_bw::detect();
    #[cfg(not(all(target_arch = "x86_64", feature = "avx512")))]
    None
}

/// The AVX2 kernels, if this CPU runs them.
pub fn avx2() -> Option<&'static dyn Kernels> {
    #[cfg(target_arch = "x86_64")]
    return avx2::detect();
    #[cfg(not(target_arch = "x86_64"))]
    None
}
