//! A heap that counts, for tests of how much memory something takes.
//!
//! A global allocator counts for the whole program, so such a test is alone in its file:
//!
//! ```
//! use bitnet_tests::alloc::{self, Counting};
//!
//! #[global_allocator]
//! static HEAP: Counting = alloc::counting();
//!
//! let (calls, before) = (alloc::calls(), HEAP.allocated());
//! let buffer = vec![1_u8; 1 << 20];
//! assert_eq!(alloc::calls() - calls, 1);
//! assert_eq!(HEAP.allocated() - before, 1 << 20);
//! drop(buffer);
//! assert_eq!(HEAP.allocated(), before);
//! assert!(HEAP.max_allocated() >= 1 << 20);
//! ```
//!
//! The peak is that since the start of the program and is never reset. `HEAP.set_limit(bytes)` makes whatever goes beyond
//! fail.
use cap::Cap;
use stats_alloc::{INSTRUMENTED_SYSTEM, StatsAlloc};
use std::alloc::System;

/// The system's heap, its bytes counted by [`Cap`] (`allocated`, `max_allocated`, `set_limit`) and its calls by [`calls`].
pub type Counting = Cap<&'static StatsAlloc<System>>;

/// The allocator to put into a `#[global_allocator]` static: without a limit at first.
pub const fn counting() -> Counting {
    Cap::new(&INSTRUMENTED_SYSTEM, usize::MAX)
}

/// Allocations made since the start by all threads, reallocations included. Zero for ever where [`counting`] is not in use.
pub fn calls() -> usize {
    let stats = INSTRUMENTED_SYSTEM.stats();
    stats.allocations + stats.reallocations
}
