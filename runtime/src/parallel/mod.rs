//! How one pass is shared among cores.
//!
//! Results never depend on the number of threads: work is cut into units of rows or heads, each computed by one thread from
//! beginning to end.
//!
//! [`Pool`] has the threads, [`cpus`] says how many the system grants, and [`Tuned`] finds out how many help.
#[cfg(feature = "std")]
pub mod cpus;
#[expect(unsafe_code, reason = "an item is moved out of a shared slot by whoever takes it")]
mod items;
#[cfg(feature = "std")]
#[expect(unsafe_code, reason = "threads that outlive a job work on what its caller borrows for the job")]
mod pool;
#[cfg(feature = "std")]
mod tuned;

pub(crate) use items::for_each_item;
#[cfg(feature = "std")]
pub use pool::Pool;
#[cfg(feature = "std")]
pub use tuned::{Choice, Threads, Tuned};

/// Cores that work on one pass together.
pub trait Parallel: Sync {
    /// Threads that take part, the caller's included.
    fn threads(&self) -> usize;

    /// Calls `f(i, chunk)` for every chunk of `data`, `chunk` long but for the last, in any order and on any thread; returns
    /// when all are done.
    fn for_each_chunk(&self, data: &mut [f32], chunk: usize, f: &(dyn Fn(usize, &mut [f32]) + Sync));

    /// A pass for `tokens` tokens begins, and [`Parallel::end`] will say when it is over: for those who choose how many
    /// threads take part in passes of a kind.
    fn begin(&self, tokens: usize) {
        let _ = tokens;
    }

    /// The pass is over.
    fn end(&self) {}
}

/// The caller's core alone.
#[derive(Clone, Copy, Debug)]
pub struct Serial;

impl Parallel for Serial {
    fn threads(&self) -> usize {
        1
    }
    fn for_each_chunk(&self, data: &mut [f32], chunk: usize, f: &(dyn Fn(usize, &mut [f32]) + Sync)) {
        for (i, chunk) in data.chunks_mut(chunk).enumerate() {
            f(i, chunk);
        }
    }
}
