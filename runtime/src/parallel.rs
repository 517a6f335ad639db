//! How one pass is shared among cores.
//!
//! Results never depend on the number of threads: work is cut into units of rows or heads, each computed by one thread from
//! beginning to end.

/// Cores that work on one pass together.
pub trait Parallel: Sync {
    /// Threads that take part, the caller's included.
    fn threads(&self) -> usize;

    /// Calls `f(i, chunk)` for every chunk of `data`, `chunk` long but for the last, in any order and on any thread; returns
    /// when all are done.
    fn for_each_chunk(&self, data: &mut [f32], chunk: usize, f: &(dyn Fn(usize, &mut [f32]) + Sync));
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

#[cfg(feature = "std")]
pub use pool::Pool;

#[cfg(feature = "std")]
mod pool {
    use super::{Parallel, Serial};
    use rayon::prelude::*;

    /// A pool of threads. Run the whole of a conversation inside [`Pool::enter`]: entering costs a switch of threads.
    #[derive(Debug)]
    pub struct Pool {
        /// `None` for one thread.
        pool: Option<rayon::ThreadPool>,
    }

    impl Pool {
        /// Starts `threads` threads, at least one.
        ///
        /// # Errors
        /// If the system starts no more threads.
        pub fn new(threads: usize) -> std::io::Result<Self> {
            if threads <= 1 {
                return Ok(Self { pool: None });
            }
            let builder = rayon::ThreadPoolBuilder::new().num_threads(threads);
            let pool = builder.thread_name(|i| std::format!("bitnet-{i}")).build();
            Ok(Self { pool: Some(pool.map_err(std::io::Error::other)?) })
        }
        /// The threads to use unless told otherwise: one a core this process may run on, but at most four. Decoding is bound
        /// by memory, which four cores saturate on the boards this is for.
        pub fn default_threads() -> usize {
            std::thread::available_parallelism().map_or(1, |n| n.get().min(4))
        }
        /// Runs `f` on one of the pool's threads.
        pub fn enter<R: Send>(&self, f: impl FnOnce() -> R + Send) -> R {
            match &self.pool {
                Some(pool) => pool.install(f),
                None => f(),
            }
        }
    }

    impl Parallel for Pool {
        fn threads(&self) -> usize {
            self.pool.as_ref().map_or(1, rayon::ThreadPool::current_num_threads)
        }
        fn for_each_chunk(&self, data: &mut [f32], chunk: usize, f: &(dyn Fn(usize, &mut [f32]) + Sync)) {
            match &self.pool {
                Some(pool) if data.len() > chunk => {
                    pool.install(|| data.par_chunks_mut(chunk).enumerate().for_each(|(i, chunk)| f(i, chunk)));
                }
                _ => Serial.for_each_chunk(data, chunk, f),
            }
        }
    }
}
