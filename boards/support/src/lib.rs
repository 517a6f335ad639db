//! What bare-metal images share, in the order in which it happens: `start` goes from the first instruction to Rust, `exception`
//! says what went wrong, `console` is the serial port, `log` the log, `memory` what there is and what was used, `heap` the
//! allocator, `cores` the other cores, `time` clocks, `virtio` a disk, `map` what lies where, `exit` the end, and `story` the program.
//!
//! The unsafe code of all boards is here, so that a board is an address map and a few calls.
#![cfg(all(target_arch = "aarch64", target_os = "none"))]
#![no_std]

extern crate alloc;

pub mod console;
pub mod cores;
pub mod exception;
pub mod exit;
pub mod heap;
pub mod log;
pub mod map;
pub mod memory;
pub mod start;
pub mod story;
pub mod time;
pub mod virtio;
