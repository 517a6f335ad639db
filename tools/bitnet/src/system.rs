//! What the operating system and the CPU say about this process.
use rayon::prelude::*;
use std::time::Instant;

/// The version and what it was built for.
pub(crate) const VERSION: &str = concat!(env!("CARGO_PKG_VERSION"), " (", env!("BITNET_TARGET"), ")");

/// The most memory this process has had at one time, in bytes, where the system tells.
pub(crate) fn peak_rss() -> Option<u64> {
    status_bytes("VmHWM:")
}

/// The memory this process has that no file backs, in bytes, where the system tells.
pub(crate) fn anonymous_rss() -> Option<u64> {
    status_bytes("RssAnon:")
}

/// The memory that can be had without swapping, in bytes, where the system tells.
pub(crate) fn available_memory() -> Option<u64> {
    field_bytes("/proc/meminfo", "MemAvailable:")
}

fn status_bytes(field: &str) -> Option<u64> {
    field_bytes("/proc/self/status", field)
}

/// A field in kilobytes of one of the system's lists.
fn field_bytes(list: &str, field: &str) -> Option<u64> {
    let status = std::fs::read_to_string(list).ok()?;
    let line = status.lines().find_map(|l| l.strip_prefix(field))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib * 1024)
}

/// Bytes a second that `threads` threads read from memory, the best of several passes over more than the caches hold.
pub(crate) fn read_bandwidth(threads: usize) -> anyhow::Result<f64> {
    const BYTES: usize = 256 << 20;
    const PASSES: usize = 5;
    let words: Vec<u64> = vec![1; BYTES / 8];
    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build()?;
    let best = pool.install(|| {
        let pass = || {
            let start = Instant::now();
            let sum: u64 = words.par_chunks(words.len().div_ceil(threads)).map(sum).sum();
            assert_eq!(sum, words.len() as u64);
            start.elapsed().as_secs_f64()
        };
        (0..PASSES).map(|_| pass()).fold(f64::INFINITY, f64::min)
    });
    Ok(BYTES as f64 / best)
}

/// Adds in many lanes, so that memory is the only limit.
fn sum(words: &[u64]) -> u64 {
    let mut lanes = [0u64; 32];
    for chunk in words.chunks_exact(32) {
        for (lane, word) in lanes.iter_mut().zip(chunk) {
            *lane = lane.wrapping_add(*word);
        }
    }
    let rest = words.chunks_exact(32).remainder();
    lanes.iter().chain(rest).sum()
}
