//! NEON kernels.
//!
//! A backend is a file. Its one entrance is the function of its name here, which exists on every architecture and
//! returns `None` where the CPU lacks the instructions, so that no caller needs a `cfg`.
//!
//! Every hot loop stands in a function of its own, never inlined, `OPERATION_FORMAT_INSTRUCTIONS`, and is the innermost loop
//! there. Products of a weight and an activation that one iteration makes:
//!
//! | function | products | used by |
//! |---|---|---|
//! | `matvec_tl_neon`, `add_tlg_neon`, `matvec_b1_neon`, `add_b1g_neon` (a group) | 768, 768, 1,024, 1,024 | all |
//! | `add_i2g_neon`, `add_i3g_neon` (one bit plane of a group) | 512, 341 | all |
//! | `matvec_{t2,t2r}_neon`, `matvec_i4_neon`, `matvec_i8_neon`, `sum_t2r_neon` | 256, 128, 256, 64 | `neon` |
//! | `matvec_{t2,t2r,i4}_neon_dotprod`, `matvec_i8_neon_dotprod`, `sum_t2r_neon_dotprod` | 1,024, 512, 256 | `neon-dotprod`, `neon-i8mm` |
//! | `matmat_{t2,i4,i8}_8_neon_dotprod` | 8,192, 4,096, 4,096 | `neon-dotprod` |
//! | `matmat_{t2,i4,i8}_4_neon_dotprod` | 4,096, 2,048, 2,048 | `neon-dotprod` |
//! | `matmat_{t2,i4,i8,bytes}_8_i8mm`, the same of fewer pairs of tokens: `_4_`, `_2_`, `_1_` | 4,096, 2,048, 1,024, 1,024 | `neon-i8mm`, SVE |
//! | `matmat_8_neon_i8mm`, `matmat_4_neon_i8mm` (any grouped format) | 1,024, 512 | `neon-i8mm` |
//!
//! Cycles in the comments are those of a static model, `llvm-mca-22`, for 256 products; where no CPU is named it is the Neoverse N1,
//! which stands for the Cortex-A76 of a Raspberry Pi 5. No hardware was at hand. Loops in assembly are what they are; those of
//! `neon` are as Rust 1.95 compiles them.
#![no_std]
#[cfg(feature = "std")]
extern crate std;

#[cfg(target_arch = "aarch64")]
mod apart;
#[cfg(target_arch = "aarch64")]
mod batch;
#[cfg(target_arch = "aarch64")]
mod dotprod;
#[cfg(target_arch = "aarch64")]
pub mod float;
#[cfg(target_arch = "aarch64")]
mod i8mm;
#[cfg(target_arch = "aarch64")]
mod indexed;
#[cfg(target_arch = "aarch64")]
mod lanes;
#[cfg(target_arch = "aarch64")]
mod neon;
#[cfg(target_arch = "aarch64")]
mod panel;
#[cfg(all(target_arch = "aarch64", not(feature = "std"), feature = "id-registers"))]
mod registers;
#[cfg(target_arch = "aarch64")]
mod unpack;

#[cfg(target_arch = "aarch64")]
pub use batch::tokens_min as i8mm_tokens_min;
use bitnet_kernel::Kernels;

/// The NEON kernels with dot products, if this CPU runs them.
///
/// With the feature `std` the system is asked, and with `id-registers` the CPU itself; without either, only a build that may
/// assume dot products throughout has them.
pub fn dotprod() -> Option<&'static dyn Kernels> {
    #[cfg(target_arch = "aarch64")]
    return dotprod::detect().map(|k| k as &dyn Kernels);
    #[cfg(not(target_arch = "aarch64"))]
    None
}

/// The NEON kernels with matrix products of bytes, if this CPU runs them. Detected as [`dotprod`] is.
pub fn i8mm() -> Option<&'static dyn Kernels> {
    #[cfg(target_arch = "aarch64")]
    return i8mm::detect().map(|k| k as &dyn Kernels);
    #[cfg(not(target_arch = "aarch64"))]
    None
}

/// The plain NEON kernels, which every 64-bit ARM CPU runs.
pub fn neon() -> Option<&'static dyn Kernels> {
    #[cfg(target_arch = "aarch64")]
    return neon::detect().map(|k| k as &dyn Kernels);
    #[cfg(not(target_arch = "aarch64"))]
    None
}
