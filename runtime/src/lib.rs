//! checkpoint → `bitnet-pack` → [`image`] → [`source`] → [`backend`] → [`model`] → logits → [`sampler`] → [`tokenizer`] → text
//!
//! Runs 1-bit, ternary and few-bit language models in memory whose size is known before anything is loaded: a [`Plan`] says
//! it, the caller gives it, and nothing is allocated per token. `no_std`; a heap is needed only for the tokenizer (feature
//! `alloc`), an operating system only for memory maps and threads (feature `std`).
#![no_std]
#![warn(clippy::alloc_instead_of_core, clippy::std_instead_of_alloc, clippy::std_instead_of_core)]
#![deny(unsafe_code)]
#[cfg(feature = "alloc")]
extern crate alloc;
#[cfg(feature = "std")]
extern crate std;

#[cfg(target_endian = "big")]
compile_error!("images are little-endian, and weights are used where they lie");

#[cfg(not(target_pointer_width = "64"))]
compile_error!("sizes of a plan within the limits can pass 32 bits");

pub mod backend;
#[cfg(feature = "std")]
pub mod cgroup;
pub mod error;
#[cfg(feature = "alloc")]
pub mod generate;
pub mod image;
#[cfg(feature = "alloc")]
pub mod lookup;
pub mod memory;
pub mod model;
pub mod parallel;
pub mod sampler;
pub mod source;
#[cfg(feature = "alloc")]
pub mod tokenizer;

pub use bitnet_kernel as kernel;
pub use error::Error;
pub use image::Image;
pub use memory::{Limits, Plan};
pub use model::{Config, Model, State};
