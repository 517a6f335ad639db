//! The contract between packed weights and the code that multiplies them.
//!
//! In the order of the data: [`block`] is the unit of storage, [`format`](mod@format) says what the bytes mean,
//! [`matrix`] wraps bytes and activations in views whose invariants the kernels rely on, [`tables`] holds the partial
//! sums that the look-up formats share, [`Kernels`] says what must be computed, [`portable`] is the definition of the
//! right answer, [`float`] is the same for floating point with one order of summation, and [`conformance`] compares any
//! backend with all of that.
#![no_std]
#![warn(clippy::alloc_instead_of_core, clippy::std_instead_of_alloc, clippy::std_instead_of_core)]
#![forbid(unsafe_code)]

pub mod block;
pub mod blocks;
pub mod conformance;
pub mod float;
pub mod format;
pub mod kernels;
pub mod matrix;
pub mod portable;
pub mod tables;

pub use block::Block;
pub use blocks::{BlockActivations, BlockMatrix, BlockShape};
pub use format::{Format, Geometry};
pub use kernels::Kernels;
pub use matrix::{Activations, Batch, Matrix};
pub use tables::Table;
