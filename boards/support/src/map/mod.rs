//! The boards' maps of addresses: what lies where, and so the places where safe code meets memory that nothing else vouches for.
//!
//! A board calls the functions of its own module alone.
pub mod qemu_virt;
pub mod rpi5;
